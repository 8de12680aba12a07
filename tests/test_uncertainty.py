import math

import pytest
import torch

from interventions.calibration import area_under_risk, auroc, calibration, expected_calibration_error, risk_coverage
from interventions.mixing import next_token
from interventions.uncertainty import (
    Prediction,
    SequenceScores,
    answered,
    entropy_split,
    responsibility_entropy,
    specialists,
)


def members(n: int = 6, sharp: float = 3.0) -> torch.Tensor:
    logits = sharp * torch.randn(4, n, 3, generator=torch.Generator().manual_seed(0))
    return logits.softmax(-1)


def test_information_lies_between_zero_and_log_m():
    for sharp in (0.0, 1e-4, 1.0, 50.0):
        total, aleatoric, information = entropy_split(members(200, sharp))
        assert (information >= 0).all() and (information <= math.log(4)).all()
        torch.testing.assert_close(total, aleatoric + information, atol=1e-6, rtol=1e-6)
    apart = torch.eye(4)[:, None]  # four certain members, four answers
    assert entropy_split(apart)[2].item() == pytest.approx(math.log(4)) and entropy_split(apart)[1] == 0


def test_information_is_the_mean_divergence_from_the_mixture():
    p = members().double()
    expected = (p * (p / p.mean(0)).log()).sum(-1).mean(0)
    torch.testing.assert_close(entropy_split(p)[2], expected.float())


def test_prediction_combines_and_counts():
    p = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.45, 0.55]]])
    seen = Prediction(p, ("yes", "no"))
    assert seen.named() == ["yes"] and Prediction(p, ("yes", "no"), "vote").named() == ["no"]
    assert seen.vote.tolist() == [[pytest.approx(1 / 3), pytest.approx(2 / 3)]]
    assert seen.disagreement.item() == pytest.approx(1 / 3)
    torch.testing.assert_close(seen.spread[0, 0], p[:, 0, 0].std(correction=0))
    tie = Prediction(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]]), (), "vote")
    assert tie.predictions.tolist() == [0] and "1 texts, 2 members" in repr(tie)


def test_abstain_and_route_follow_mutual_information():
    seen = Prediction(members(10))
    keep = seen.abstain(0.3)
    assert keep.sum() == 3 and seen.mutual_information[keep].max() <= seen.mutual_information[~keep].min()
    routed = seen.route(seen.mutual_information.median().item())
    assert ((routed == -1) == (seen.mutual_information > seen.mutual_information.median())).all()
    surest = -(seen.members * seen.members.log()).sum(-1)
    assert (routed[routed >= 0] == surest.argmin(0)[routed >= 0]).all()
    with pytest.raises(ValueError, match="coverage is 0; expected a share"):
        answered(torch.zeros(3), 0)


def test_specialists_and_conflict():
    s = torch.tensor([[0.0, -9.0, 0.0], [-9.0, 0.0, 0.0]])
    weights = torch.softmax(s, 0)
    table = specialists(weights, ["a", "b", "both"])
    assert table["a"][0] > 0.99 and table["b"][1] > 0.99 and table["both"].tolist() == [0.5, 0.5]
    entropy = responsibility_entropy(s, 1.0)
    assert entropy[2].item() == pytest.approx(math.log(2)) and entropy[0] < 0.01
    with pytest.raises(ValueError, match="2 groups for 3 examples"):
        specialists(weights, ["a", "b"])


def test_sequence_mixture_is_at_least_the_token_mixtures_bound():
    scores = SequenceScores(torch.log(torch.tensor([[0.2], [0.4]])), torch.zeros(1), torch.ones(1, dtype=torch.long))
    assert scores.sequence_mixture.exp().item() == pytest.approx(0.3)


def test_next_token_of_sequences_is_the_exact_conditional():
    """Enumerate all two-token sequences: p(second | first) of the mixture of sequences."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(3, 4, generator=generator), torch.rand(3, 4, 4, generator=generator)
    first, second = first / first.sum(-1, keepdim=True), second / second.sum(-1, keepdim=True)
    whole = (first[..., None] * second).mean(0)
    for y in range(4):
        found = next_token(second[:, y].log()[:, None], first[:, y].log()[:, None], "sequence")
        torch.testing.assert_close(found[0], whole[y] / whole[y].sum())
    mixed = next_token(second[:, 0].log()[:, None], first[:, 0].log()[:, None], "mixture")
    torch.testing.assert_close(mixed[0], second[:, 0].mean(0))


def test_calibration_by_hand():
    p, gold = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]), torch.tensor([0, 1, 1])
    seen = calibration(p, gold)
    assert seen.accuracy == pytest.approx(2 / 3) and seen.n == 3
    assert seen.nll == pytest.approx(-sum(map(math.log, (0.8, 0.4, 0.7))) / 3)
    assert seen.brier == pytest.approx((2 * 0.04 + 2 * 0.36 + 2 * 0.09) / 3)
    assert seen.ece == pytest.approx((0.2 + 0.6 + 0.3) / 3)
    sure = torch.full((1000,), 0.75)
    assert expected_calibration_error(sure, (torch.arange(1000) % 4 != 0).float()) == pytest.approx(0.0)


def test_risk_coverage_and_auroc():
    uncertainty, wrong = torch.tensor([0.1, 0.4, 0.2, 0.9]), torch.tensor([False, True, False, True])
    coverage, risk = risk_coverage(uncertainty, wrong)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0] and risk.tolist() == pytest.approx([0, 0, 1 / 3, 0.5])
    assert auroc(uncertainty, wrong) == 1.0 and auroc(torch.zeros(4), wrong) == 0.5
    assert area_under_risk(uncertainty, wrong) < area_under_risk(-uncertainty, wrong)
    with pytest.raises(ValueError, match="0 of 4 examples are positive"):
        auroc(uncertainty, torch.zeros(4, dtype=torch.bool))

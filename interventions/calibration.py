"""Are probabilities true, and is uncertainty worth acting on? Calibration error, proper scores, risk-coverage, AUROC."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """`ece`: expected calibration error of the chosen column; `nll` in nats; `brier` summed over columns, in [0, 2]."""

    accuracy: float
    ece: float
    nll: float
    brier: float
    n: int


def calibration(
    probabilities: Float[Tensor, "example column"], gold: Int[Tensor, " example"], bins: int = 15
) -> Calibration:
    p = probabilities.double()
    confidence, chosen = p.max(-1)
    right = (chosen == gold).double()
    at_gold = p.gather(1, gold[:, None])[:, 0]
    brier = (p.square().sum(-1) - 2 * at_gold + 1).mean()
    nll = -at_gold.clamp(min=torch.finfo(torch.float32).tiny).log().mean()
    return Calibration(
        right.mean().item(), expected_calibration_error(confidence, right, bins), nll.item(), brier.item(), len(gold)
    )


def expected_calibration_error(
    confidence: Float[Tensor, " example"], right: Float[Tensor, " example"], bins: int = 15
) -> float:
    """Σ over equal-width bins (low, high] of the share of examples times |accuracy − mean confidence|."""
    where = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, where, right.double() - confidence.double())
    return (gap.abs().sum() / len(confidence)).item()


def risk_coverage(
    uncertainty: Float[Tensor, " example"], wrong: Bool[Tensor, " example"]
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
    """(coverage, error rate among the answered) as ever more uncertain examples are answered."""
    order = uncertainty.argsort(stable=True)
    count = torch.arange(1, len(wrong) + 1)
    return count / len(wrong), wrong[order].float().cumsum(0) / count


def area_under_risk(uncertainty: Float[Tensor, " example"], wrong: Bool[Tensor, " example"]) -> float:
    """Mean risk over coverages (AURC): lower is better."""
    return risk_coverage(uncertainty, wrong)[1].mean().item()


def auroc(score: Float[Tensor, " example"], positive: Bool[Tensor, " example"]) -> float:
    """Probability that a positive example scores above a negative one, ties half."""
    from scipy.stats import rankdata

    hits, total = int(positive.sum()), len(positive)
    if hits in (0, total):
        raise ValueError(f"{hits} of {total} examples are positive; AUROC needs both kinds")
    ranks = torch.as_tensor(rankdata(score.double().cpu().numpy()))
    return ((ranks[positive.cpu()].sum() - hits * (hits + 1) / 2) / (hits * (total - hits))).item()

"""The judge's numbers against values worked out by hand."""

import pytest
import torch
from test_discovery import TokenTask

from circuits import Circuit, Head, HeadScores, ablation, faithfulness, gradient
from circuits.judge import PERCENT, _curve, _resampled, auroc, compare_methods, cpr_cmd, stability

from models import shared_tiny


def test_a_ranking_that_finds_nothing_until_half_scores_the_known_floor():
    """f = 0 up to 50 % and 1 at 100 %: the triangle under the last segment."""
    kept = [0.0] * (len(PERCENT) - 1) + [1.0]
    cpr, cmd = cpr_cmd(PERCENT, kept)
    assert cpr == pytest.approx(0.25) and cmd == pytest.approx(0.749, abs=1e-9)
    assert cpr_cmd((0.0, *PERCENT), [0.0, *kept])[1] == pytest.approx(0.75)


def test_a_perfect_circuit_and_an_overshooting_one():
    assert cpr_cmd(PERCENT, [1.0] * 10) == pytest.approx((0.999, 0.0))
    cpr, cmd = cpr_cmd(PERCENT, [2.0] * 10)
    assert cpr == pytest.approx(1.998) and cmd == pytest.approx(0.999)
    with pytest.raises(ValueError, match="sizes increasing"):
        cpr_cmd([1.0, 1.0], [0.0, 1.0])


def test_auroc_by_counting_pairs():
    scores = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert auroc(scores, Circuit([Head(0, 0), Head(1, 0)])) == pytest.approx(3 / 4)
    assert auroc(torch.ones(2, 2), Circuit([Head(0, 0)])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="both sides"):
        auroc(scores, Circuit([]))


def test_stability_is_one_without_noise_and_low_with_it():
    steady = torch.arange(12.0).view(1, 3, 4).repeat(8, 1, 1)
    assert stability(HeadScores.from_examples(steady, "m"), k=3) == pytest.approx(1.0)
    noise = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))
    assert 0.1 < stability(HeadScores.from_examples(noise, "m"), k=3) < 0.8


def test_the_oracle_agrees_with_itself():
    model, task = shared_tiny("llama"), TokenTask()
    oracle = ablation(model, task, progress=False)
    methods = {"ablation": lambda: oracle, "gradient": lambda: gradient(model, task, progress=False)}
    first, second = compare_methods(model, task, methods, oracle, known=oracle.top(3), progress=False)
    assert first.spearman == pytest.approx(1) and first.auroc == 1 and first.top == 1
    assert second.spearman < 1 and first.curve[-1] == pytest.approx(1)
    assert first.row().count("|") == 10


def test_intervals_hold_the_value_and_shrink_with_examples():
    """Per-example scores = one ranking + noise: the interval of the correlation is wide for few examples, narrow for many."""
    truth = torch.arange(12.0).view(3, 4)
    widths = []
    for n in (8, 200):
        noise = torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n)) * 8
        noisy, oracle = HeadScores.from_examples(truth + noise, "noisy"), HeadScores(truth, "oracle")
        intervals = _resampled(noisy, oracle, Circuit([Head(2, 3), Head(2, 2)]), 2, 200, 0)
        assert set(intervals) == {"pearson", "spearman", "top", "auroc"}
        low, high = intervals["pearson"]
        assert low <= noisy.correlation(oracle)["pearson"] <= high
        widths.append(high - low)
    assert widths[0] > 3 * widths[1] > 0


def test_examples_are_resampled_together_with_the_oracles():
    """The same noise in method and oracle cancels; drawn apart it would not."""
    noise = torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(1))
    same = HeadScores.from_examples(noise, "method")
    assert _resampled(same, HeadScores.from_examples(noise, "oracle"), None, 2, 50, 0)["pearson"] == pytest.approx(
        (1, 1)
    )


def test_area_intervals_come_from_the_held_out_margins():
    model, task = shared_tiny("llama"), TokenTask()
    oracle = ablation(model, task, progress=False)
    kept, bounds = _curve(model, task, oracle, "mean", 0, 100, False)
    curve = faithfulness(model, task, oracle, sizes=[1, 2, 6, 12], controls=0, progress=False)
    assert kept == pytest.approx([0, 0, 0, 0, 0, *curve.faithfulness[[0, 0, 1, 2, 3]].tolist()], rel=1e-4)
    (low, high), (cpr, _) = bounds["cpr"], cpr_cmd(PERCENT, kept)
    assert low < cpr < high
    (row,) = compare_methods(model, task, {"oracle": lambda: oracle}, oracle, progress=False)
    assert row.intervals["cmd"] == _curve(model, task, oracle, "mean", 0, 200, False)[1]["cmd"]
    assert f"| {row.cpr:.2f} ({row.intervals['cpr'][0]:.2f} to " in row.row()

"""Which method finds the right heads? Curves as MIB codes them, ROC against known circuits, stability, agreement with ablation.

1. f(k) = (m_k - m_0) / (m_full - m_0): keep the top k heads by signed score, ablate the rest; k in 0.1 ... 100 % of all heads.
2. CPR = area under f over linear k (trapezoids), CMD = area under |1 - f| (MIB circuit track, arXiv 2504.13151). CPR is not
   capped: a circuit that overshoots the model gets more than 1, so both are reported. A ranking that finds nothing until half
   of the heads are in has CPR 0.25 and CMD 0.75.
3. AUROC: the probability that a head of a known circuit outranks a head outside it.
4. Stability: mean Jaccard of the top-k sets of pairs of bootstrap resamples of the examples (1 = always the same heads).
5. Agreement: Pearson, Spearman and top-k overlap with exact ablation.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .faithful import faithfulness
from .heads import Circuit, HeadScores
from .model import Model
from .tasks import Task

PERCENT = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def cpr_cmd(percent: Sequence[float], kept: Sequence[float]) -> tuple[float, float]:
    """Areas under f and under |1 - f| over k as a share of all heads, by trapezoids between the given sizes."""
    k = torch.tensor(list(percent), dtype=torch.float64) / 100
    f = torch.tensor(list(kept), dtype=torch.float64)
    if len(k) != len(f) or len(k) < 2 or (k.diff() <= 0).any():
        raise ValueError(f"{len(k)} sizes and {len(f)} values; expected as many values as sizes, sizes increasing")
    return float(torch.trapezoid(f, k)), float(torch.trapezoid((1 - f).abs(), k))


def auroc(scores: Float[Tensor, "layer head"], known: Circuit) -> float:
    """Area under the ROC curve of the signed scores; ties count half."""
    from scipy.stats import rankdata

    layers, heads = scores.shape
    known.check(layers, heads)
    inside = torch.zeros(layers, heads, dtype=torch.bool)
    for head in known:
        inside[head.layer, head.head] = True
    positive = int(inside.sum())
    if not 0 < positive < inside.numel():
        raise ValueError(f"the known circuit has {positive} of {inside.numel()} heads; AUROC needs heads on both sides")
    ranks = torch.from_numpy(rankdata(scores.flatten().double().numpy()))
    above = ranks[inside.flatten()].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (inside.numel() - positive)))


def stability(scores: HeadScores, k: int, resamples: int = 100, seed: int = 0) -> float:
    """Mean Jaccard of the top-k heads over pairs of bootstrap resamples of the examples."""
    if scores.examples is None or len(scores.examples) < 2:
        raise ValueError(
            f"{scores.method} has no per-example values to resample; stability needs at least two examples"
        )
    n = len(scores.examples)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    tops = torch.stack([scores.examples[draw].mean(0).flatten() for draw in draws]).topk(k, dim=1).indices
    member = torch.zeros(resamples, scores.values.numel()).scatter_(1, tops, 1.0)
    common = member @ member.T
    jaccard = common / (2 * k - common)
    return float((jaccard.sum() - resamples) / (resamples * (resamples - 1)))


@dataclass(frozen=True)
class Verdict:
    """One row of the judge's table."""

    method: str
    seconds: float
    cpr: float
    cmd: float
    auroc: float | None
    pearson: float
    spearman: float
    top: float  # share of the oracle's top k that the method has too
    stability: float | None
    curve: tuple[float, ...]

    def row(self) -> str:
        known = "-" if self.auroc is None else f"{self.auroc:.2f}"
        stable = "-" if self.stability is None else f"{self.stability:.2f}"
        values = (
            f"{self.pearson:.2f} | {self.spearman:.2f} | {self.top:.2f} | {known} | {self.cpr:.2f} | {self.cmd:.2f}"
        )
        return f"| {self.method} | {values} | {stable} | {self.seconds:.1f} |"


HEADER = (
    "| method | Pearson | Spearman | top-k overlap | AUROC | CPR | CMD | stability | seconds |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def compare_methods(
    model: Model,
    held: Task,
    methods: dict[str, Callable[[], HeadScores]],
    oracle: HeadScores,
    known: Circuit | None = None,
    k: int | None = None,
    ablate: str = "mean",
    seed: int = 0,
    progress: bool = True,
) -> list[Verdict]:
    """Run each method, and measure its ranking on the held-out task. `k` (default: the known circuit's size, or a tenth)."""
    total = oracle.values.numel()
    k = k or (len(known) if known is not None else max(1, total // 10))
    sizes = [int(p * total / 100 + 0.5) for p in PERCENT]  # below half a head nothing is kept and f = 0
    verdicts = []
    for name, method in methods.items():
        begin = time.perf_counter()
        scores = method()
        seconds = time.perf_counter() - begin
        curve = faithfulness(
            model,
            held,
            scores,
            ablate=ablate,
            sizes=sorted({s for s in sizes if s}),
            controls=0,
            seed=seed,
            progress=progress,
        )
        kept = dict(zip((int(s) for s in curve.sizes), curve.faithfulness.tolist(), strict=True))
        f = [kept[size] if size else 0.0 for size in sizes]
        cpr, cmd = cpr_cmd(PERCENT, f)
        agreement = scores.correlation(oracle)
        common = len(scores.top(k) & oracle.top(k)) / k
        stable = stability(scores, k, seed=seed) if scores.examples is not None else None
        area = None if known is None else auroc(scores.values, known)
        values = (cpr, cmd, area, agreement["pearson"], agreement["spearman"], common, stable, tuple(f))
        verdicts.append(Verdict(name, seconds, *values))
    return verdicts

"""Which method finds the right heads? Curves as MIB codes them, ROC against known circuits, stability, agreement with ablation.

1. f(k) = (m_k - m_0) / (m_full - m_0): keep the top k heads by signed score, ablate the rest; k in 0.1 ... 100 % of all heads.
2. CPR = area under f over linear k (trapezoids), CMD = area under |1 - f| (MIB circuit track, arXiv 2504.13151). CPR is not
   capped: a circuit that overshoots the model gets more than 1, so both are reported. A ranking that finds nothing until half
   of the heads are in has CPR 0.25 and CMD 0.75.
3. AUROC: the probability that a head of a known circuit outranks a head outside it.
4. Stability: mean Jaccard of the top-k sets of pairs of bootstrap resamples of the examples (1 = always the same heads).
5. Agreement: Pearson, Spearman and top-k overlap with exact ablation.
6. Intervals: percentile bootstrap over examples. CPR and CMD resample the held-out examples with the ranking as it is; what
   compares rankings resamples the examples that were scored, the same ones for the method and for ablation.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .faithful import bootstrap_weights, faithfulness
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
    """One row of the judge's table. `intervals` has the 95 % bounds of the measures that have some, by name."""

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
    intervals: dict[str, tuple[float, float]]

    def row(self) -> str:
        names = ("pearson", "spearman", "top", "auroc", "cpr", "cmd", "stability")
        return f"| {self.method} | {' | '.join(map(self._cell, names))} | {self.seconds:.2f} |"

    def _cell(self, name: str) -> str:
        value = getattr(self, name)
        if value is None:
            return "-"
        low, high = self.intervals.get(name, (None, None))
        return f"{value:.2f}" if low is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


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
    resamples: int = 200,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> list[Verdict]:
    """Run each method, and measure its ranking on the held-out task. `k` (default: the known circuit's size, or a tenth)."""
    total = oracle.values.numel()
    k = k or (len(known) if known is not None else max(1, total // 10))
    verdicts = []
    for name, method in methods.items():
        begin = clock()
        scores = method()
        seconds = clock() - begin
        kept, intervals = _curve(model, held, scores, ablate, seed, resamples, progress)
        cpr, cmd = cpr_cmd(PERCENT, kept)
        agreement = _agreement(scores.values, oracle.values, known, k)
        stable = None
        if scores.examples is not None and len(scores.examples) > 1:
            stable = stability(scores, k, seed=seed)
            intervals |= _resampled(scores, oracle, known, k, resamples, seed)
        values = (cpr, cmd, agreement.get("auroc"), agreement["pearson"], agreement["spearman"], agreement["top"])
        verdicts.append(Verdict(name, seconds, *values, stable, kept, intervals))
    return verdicts


def _curve(
    model: Model, held: Task, scores: HeadScores, ablate: str, seed: int, resamples: int, progress: bool
) -> tuple[tuple[float, ...], dict[str, tuple[float, float]]]:
    """f at every size, and the intervals of the areas under it."""
    sizes = [int(p * scores.values.numel() / 100 + 0.5) for p in PERCENT]  # below half a head nothing is kept and f = 0
    wanted = sorted({size for size in sizes if size})
    curve = faithfulness(model, held, scores, ablate=ablate, sizes=wanted, controls=0, seed=seed, progress=progress)
    place = {int(size): i for i, size in enumerate(curve.sizes)}

    def kept(weights: Float[Tensor, " example"]) -> tuple[float, ...]:
        empty, full = weights @ curve.empty, weights @ curve.full
        f = (curve.margins @ weights - empty) / (full - empty)
        return tuple(float(f[place[size]]) if size else 0.0 for size in sizes)

    n = len(curve.full)
    draws = [cpr_cmd(PERCENT, kept(weights)) for weights in bootstrap_weights(n, resamples, seed)]
    bounds = {name: _bounds(values) for name, values in zip(("cpr", "cmd"), zip(*draws, strict=True), strict=True)}
    return kept(torch.full((n,), 1 / n)), bounds


def _resampled(
    scores: HeadScores, oracle: HeadScores, known: Circuit | None, k: int, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Intervals of what compares rankings; the oracle is resampled too where it was measured on the same examples."""
    assert scores.examples is not None
    paired = oracle.examples is not None and len(oracle.examples) == len(scores.examples)
    draws = []
    for weights in bootstrap_weights(len(scores.examples), resamples, seed):
        mine = torch.einsum("e,elh->lh", weights, scores.examples.float())
        theirs = torch.einsum("e,elh->lh", weights, oracle.examples.float()) if paired else oracle.values
        draws.append(_agreement(mine, theirs, known, k))
    return {name: _bounds([draw[name] for draw in draws]) for name in draws[0]}


def _agreement(
    mine: Float[Tensor, "layer head"], oracle: Float[Tensor, "layer head"], known: Circuit | None, k: int
) -> dict[str, float]:
    found, wanted = HeadScores(mine, "method"), HeadScores(oracle, "oracle")
    correlation = found.correlation(wanted)
    values = {"pearson": correlation["pearson"], "spearman": correlation["spearman"]}
    values["top"] = len(found.top(k) & wanted.top(k)) / k
    return values if known is None else values | {"auroc": auroc(mine, known)}


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)

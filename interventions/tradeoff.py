"""Reading a comparison: choose on validation, then report test figures with paired bootstrap intervals.

1. Per arm, target, size and seed the run with the highest validation accuracy is chosen (ties: the smaller distance from
   the start). Its test figures are the arm's.
2. Intervals: percentile bootstrap that draws seeds, then test texts, with replacement; arms are compared on the same draws.
3. The trade-off: every run, chosen or not, as a point (target accuracy, kept accuracy), so that arms can be compared at the
   same target accuracy and not only at the point validation chose.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Lines = Sequence[dict[str, Any]]


def choose(lines: Lines, target: str, n: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Step 1: {arm: {seed: line}}, in the order arms appear."""
    chosen: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["target"] != target or line["n"] not in (0, n):
            continue
        best = chosen.setdefault(line["arm"], {}).get(line["seed"])
        key = (line.get("validation", 0.0), -line.get("distance", 0.0))
        if best is None or key > (best.get("validation", 0.0), -best.get("distance", 0.0)):
            chosen[line["arm"]][line["seed"]] = line
    return chosen


def draws(seeds: int, texts: int, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Step 2: indices of seeds [resample, seed] and of texts [resample, text]."""
    generator = np.random.default_rng(seed)
    return generator.integers(seeds, size=(resamples, seeds)), generator.integers(texts, size=(resamples, texts))


def bootstrap(
    right: Float[np.ndarray, "seed text"], resamples: int = 2000, seed: int = 0
) -> Float[np.ndarray, " resample"]:
    """Accuracy of every resample. Two matrices of one shape get the same draws, so their differences are paired."""
    which_seeds, which_texts = draws(*right.shape, resamples, seed)
    return np.array([right[np.ix_(s, t)].mean() for s, t in zip(which_seeds, which_texts, strict=True)])


class Row(NamedTuple):
    """One arm: mean test figures over seeds, their intervals, and the paired difference from the reference arm."""

    arm: str
    seeds: int
    trained: float
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    difference: tuple[float, float, float] | None
    kept: dict[str, tuple[float, float, float]]


def summarise(lines: Lines, target: str, n: int, reference: str = "circuit") -> list[Row]:
    """One row per arm, over the seeds that every chosen arm has. Raises ValueError when there are none."""
    chosen = choose(lines, target, n)
    if reference not in chosen:
        raise ValueError(
            f"no finished run of arm {reference!r} on {target!r} with {n} examples; run the comparison further"
        )
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in chosen.values())))
    if not seeds:
        raise ValueError(f"no seed has finished every arm on {target!r} with {n} examples; run the comparison further")
    compared = matrix(chosen[reference], seeds, target)
    rows = []
    for arm, by_seed in chosen.items():
        right = matrix(by_seed, seeds, target)
        f1 = float(np.mean([by_seed[s]["tests"][target]["macro_f1"] for s in seeds]))
        gap = (
            None if arm == reference else spread(right.mean() - compared.mean(), bootstrap(right) - bootstrap(compared))
        )
        kept = {}
        for name in by_seed[seeds[0]]["tests"]:
            if name != target:
                other = matrix(by_seed, seeds, name)
                kept[name] = spread(other.mean(), bootstrap(other))
        trained = float(np.mean([by_seed[s].get("trained", 0) for s in seeds]))
        interval = spread(right.mean(), bootstrap(right))[1:]
        rows.append(Row(arm, len(seeds), trained, float(right.mean()), interval, f1, gap, kept))
    return rows


def matrix(by_seed: dict[int, dict[str, Any]], seeds: Sequence[int], test: str) -> Float[np.ndarray, "seed text"]:
    return np.array([[float(c == "1") for c in by_seed[s]["tests"][test]["right"]] for s in seeds])


def spread(value: Any, resampled: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(value), float(low), float(high)


def table(rows: Sequence[Row], reference: str = "circuit") -> str:
    """Markdown."""
    kept = list(dict.fromkeys(name for row in rows for name in row.kept))
    head = ["arm", "values trained", "target accuracy [95 %]", "macro-F1", f"minus {reference} [95 %]", *kept]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        gap = "" if row.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.difference)
        others = ["{:.3f} [{:.3f}, {:.3f}]".format(*row.kept[name]) if name in row.kept else "" for name in kept]
        accuracy = f"{row.accuracy:.3f} [{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
        lines.append([row.arm, f"{row.trained:,.0f}", accuracy, f"{row.macro_f1:.3f}", gap, *others])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def trade_off(lines: Lines, target: str, n: int) -> str:
    """Step 3 as markdown: mean over seeds of every arm at every learning rate, chosen or not, by target accuracy."""
    points: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        if line["target"] == target and line["n"] == n and "source" in line["tests"]:
            points.setdefault((line["arm"], line["lr"], line["anchor"]), []).append(line)
    rows = []
    for (arm, lr, anchor), group in points.items():
        reached, kept = (np.mean([line["tests"][name]["accuracy"] for line in group]) for name in (target, "source"))
        rows.append((-reached, f"| {arm} | {lr:g} | {anchor:g} | {len(group)} | {reached:.3f} | {kept:.3f} |"))
    head = "| arm | rate | anchor | seeds | target | source kept |\n| --- | --- | --- | --- | --- | --- |"
    return "\n".join([head, *(text for _, text in sorted(rows))])


def agreement(circuits: Sequence[Any]) -> float:
    """Mean Jaccard index of the head sets of all pairs of seeds."""
    pairs = [(a, b) for i, a in enumerate(circuits) for b in circuits[i + 1 :]]
    return float(np.mean([a.jaccard(b) for a, b in pairs])) if pairs else 1.0

"""Reading a comparison: choose on validation, then report test figures with paired bootstrap intervals.

1. Per arm, target, size and seed the run with the highest validation accuracy is chosen (ties: the smaller distance from
   the start). Its test figures are the arm's.
2. Intervals: percentile bootstrap that draws seeds, then test texts, with replacement; arms are compared on the same draws.
3. The trade-off: every setting, chosen or not, as a point (target accuracy, kept accuracy), so that arms can be compared at
   the same target accuracy and not only at the point validation chose. A setting is on the front when none beats it on both.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Lines = Sequence[dict[str, Any]]


def choose(lines: Lines, target: str, n: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Step 1: {arm: {seed: line}}, in the order arms appear. Every seed of an arm chooses among the same settings."""
    chosen: dict[str, dict[int, dict[str, Any]]] = {}
    for line in finished(line for line in lines if line["target"] == target and line["n"] in (0, n)):
        best = chosen.setdefault(line["arm"], {}).get(line["seed"])
        key = (line.get("validation", 0.0), -line.get("distance", 0.0))
        if best is None or key > (best.get("validation", 0.0), -best.get("distance", 0.0)):
            chosen[line["arm"]][line["seed"]] = line
    return chosen


def finished(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the settings of an arm that fewer seeds have finished than another of its settings (an interrupted comparison)."""
    lines = list(lines)

    def setting(line: dict[str, Any]) -> tuple:
        return tuple(line[key] for key in ("arm", "target", "n", "lr", "anchor", "depth"))

    seeds = Counter(map(setting, lines))
    most: dict[tuple, int] = {}
    for key, count in seeds.items():
        most[key[:3]] = max(count, most.get(key[:3], 0))
    return [line for line in lines if seeds[setting(line)] == most[setting(line)[:3]]]


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


Spread = tuple[float, float, float]


class Row(NamedTuple):
    """One arm: mean test figures over seeds, their intervals, and the paired differences from the reference arm.

    Triples are value, low, high; `kept` and `kept_difference` have one per task that is not the target.
    """

    arm: str
    seeds: int
    moved: float
    accuracy: Spread
    macro_f1: float
    difference: Spread | None
    kept: dict[str, Spread]
    kept_difference: dict[str, Spread]


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
    return [_row(arm, chosen, reference, seeds, target) for arm in chosen]


def _row(arm: str, chosen: dict[str, dict[int, dict[str, Any]]], reference: str, seeds: list[int], target: str) -> Row:
    mine, other = chosen[arm], chosen[reference]

    def difference(name: str) -> Spread:
        a, b = matrix(mine, seeds, name), matrix(other, seeds, name)
        return spread(a.mean() - b.mean(), bootstrap(a) - bootstrap(b))

    tests = {name: matrix(mine, seeds, name) for name in mine[seeds[0]]["tests"]}
    means = {name: spread(right.mean(), bootstrap(right)) for name, right in tests.items()}
    gaps = {} if arm == reference else {name: difference(name) for name in tests if name in other[seeds[0]]["tests"]}
    f1 = float(np.mean([mine[seed]["tests"][target]["macro_f1"] for seed in seeds]))
    # Word counts have no weights that could have stood still before.
    moved = float(np.mean([mine[seed].get("moved", mine[seed].get("trained", 0)) for seed in seeds]))
    accuracy, gap = means.pop(target), gaps.pop(target, None)
    return Row(arm, len(seeds), moved, accuracy, f1, gap, means, gaps)


def matrix(by_seed: dict[int, dict[str, Any]], seeds: Sequence[int], test: str) -> Float[np.ndarray, "seed text"]:
    return np.array([[float(c == "1") for c in by_seed[s]["tests"][test]["right"]] for s in seeds])


def spread(value: Any, resampled: np.ndarray) -> Spread:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(value), float(low), float(high)


def table(rows: Sequence[Row], reference: str = "circuit") -> str:
    """Markdown. Of the differences on kept tasks, that on the source is shown."""
    kept = list(dict.fromkeys(name for row in rows for name in row.kept))
    minus = f"minus {reference} [95 %]"
    head = ["arm", "values moved", "target [95 %]", "macro-F1", minus]
    for name in kept:
        head += [f"{name} kept [95 %]"] + ([minus] if name == "source" else [])
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [row.arm, f"{row.moved:,.0f}", _cell(row.accuracy), f"{row.macro_f1:.3f}", _cell(row.difference, "+")]
        for name in kept:
            line += [_cell(row.kept.get(name))]
            line += [_cell(row.kept_difference.get(name), "+")] if name == "source" else []
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Spread | None, sign: str = "") -> str:
    return "" if value is None else "{0:{s}.3f} [{1:{s}.3f}, {2:{s}.3f}]".format(*value, s=sign)


class Point(NamedTuple):
    """One setting of an arm: means over seeds, and whether no other setting beats it on both accuracies."""

    arm: str
    lr: float
    anchor: float
    depth: int | None
    seeds: int
    reached: float
    kept: float
    front: bool


def points(lines: Lines, target: str, n: int, kept: str = "source") -> list[Point]:
    """Step 3, by target accuracy; settings that not all seeds have finished are left out."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        if line["target"] == target and line["n"] == n and kept in line["tests"]:
            groups.setdefault((line["arm"], line["lr"], line["anchor"], line["depth"]), []).append(line)
    seeds = max(map(len, groups.values()), default=0)
    means = {
        setting: tuple(float(np.mean([line["tests"][name]["accuracy"] for line in group])) for name in (target, kept))
        for setting, group in groups.items()
        if len(group) == seeds
    }
    found = []
    for setting, (reached, held) in means.items():
        beaten = any(r >= reached and h >= held and (r, h) != (reached, held) for r, h in means.values())
        found.append(Point(*setting, seeds, reached, held, not beaten))
    return sorted(found, key=lambda point: -point.reached)


def trade_off(lines: Lines, target: str, n: int) -> str:
    """The points as markdown."""
    rows = [
        f"| {p.arm} | {p.lr:g} | {p.anchor:g} | {'' if p.depth is None else p.depth} | {p.seeds} | {p.reached:.3f} | {p.kept:.3f} "
        f"| {'yes' if p.front else ''} |"
        for p in points(lines, target, n)
    ]
    head = "| arm | rate | anchor | depth | seeds | target | source kept | front |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    return "\n".join([head, *rows])


def arrows(lines: Lines, target: str, n: int) -> dict[str, dict[str, dict[str, dict[str, float | int]]]]:
    """What `viz.training` draws: each arm's chosen runs, before and after, as means over seeds."""
    chosen = choose(lines, target, n)
    start = chosen["untuned"]

    def means(by_seed: dict[int, dict[str, Any]]) -> dict[str, dict[str, float | int]]:
        tests = [line["tests"] for line in by_seed.values()]
        return {
            name: {
                "accuracy": float(np.mean([test[name]["accuracy"] for test in tests])),
                "n": sum(len(test[name]["right"]) for test in tests),
            }
            for name in tests[0]
        }

    return {
        arm: {"before": means({seed: start[seed] for seed in by_seed}), "after": means(by_seed)}
        for arm, by_seed in chosen.items()
        if arm != "untuned" and "source" in next(iter(by_seed.values()))["tests"]
    }


def agreement(circuits: Sequence[Any]) -> float:
    """Mean Jaccard index of the head sets of all pairs of seeds."""
    pairs = [(a, b) for i, a in enumerate(circuits) for b in circuits[i + 1 :]]
    return float(np.mean([a.jaccard(b) for a, b in pairs])) if pairs else 1.0

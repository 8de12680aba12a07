"""Backward discovery: from the logits to the heads that write the answer, then to the heads that feed those (CT-SFT section 4).

1. T(0) = the logits. Score every head (eq. 4), average over examples, keep the highest: C(0).
2. Depth d: T(d) = C(d-1). Score every head that comes before a target against each target (eq. 6, or another reading of
   `targets`), average over targets and examples, keep the highest that are not yet in the circuit: C(d). The circuit is the union.
3. Optional: stop as soon as the circuit keeps enough of the behaviour (CD-T algorithm 1's test), and at the end drop heads
   one by one as long as what is kept does not fall (its greedy pruning).

What a circuit keeps, (m(C) - m(none)) / (m(all) - m(none)), is itself a decomposition: all other heads are one source, and
m(C) is the margin minus its exact β. Many candidate circuits therefore run in one batch.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import Program
from .carrier import Node
from .cdt import check_sources, logit_scores, reference
from .encoding import Encoded
from .families import read
from .heads import Circuit, Head
from .model import Model
from .propagation import DEFAULT_MEMORY
from .targets import check_sites, target_scores
from .tasks import Task


def discover(
    model: Model,
    task: Task,
    *,
    depth: int = 2,
    per_depth: float | int = 0.02,
    percentile: float | None = None,
    rules: str = "exact",
    through: Sequence[str] = ("z",),
    score: str | None = None,
    means: str | Float[Tensor, "layer *place head d_head"] = "label-balanced",
    per_position: bool = False,
    stop_at: float | None = None,
    prune: bool = False,
    batch_size: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = True,
) -> Circuit:
    """The circuit of `depth` backward steps after the first. Its provenance has every step's heads, scores and faithfulness.

    `per_depth`: a share of all heads (0.02) or a number of heads (6) added per step; `percentile` (90 to 99 in CD-T) keeps
    instead the heads at or above that percentile of the step's scores. `stop_at` ends when faithfulness reaches it.
    `through` and `score` say how heads feed a target (`targets`): eq. 6 at its z by default; `through=("q", "k", "v")` adds up the
    "effect" of its queries, keys and values, which finds heads that act where nothing is written towards the answer.
    """
    size = _size(per_depth, percentile, depth, model)
    score = score or ("answer" if tuple(through) == ("z",) else "effect")
    check_sites(through, score)
    encoded = task.encode(model)
    mean = reference(model, task, means, per_position, batch_size, encoded.tokens.shape[1])
    check_sources(model, [[Node(0, 0)]], encoded.tokens.shape[1], rules)
    options = dict(batch_size=batch_size, memory=memory, progress=progress)
    chosen: list[Head] = []
    frontier: list[Head] | None = None
    steps: list[dict] = []
    with torch.no_grad(), model.evaluating():
        program = read(model.hf)
        for step in range(depth + 1):
            candidates = _upstream(model, chosen, frontier)
            if not candidates:
                break
            nodes = [[Node(head.layer, head.head)] for head in candidates]
            if frontier is None:
                scores = logit_scores(program, model, encoded, nodes, mean, rules, **options).mean(1)
            else:
                how = (mean, rules, through, score)
                scores = target_scores(program, model, encoded, nodes, frontier, *how, **options).mean((1, 2))
            frontier = _best(candidates, scores, size, percentile)
            chosen += frontier
            kept = _kept(program, model, encoded, [chosen], mean, memory)[0]
            values = {str(head): float(scores[candidates.index(head)]) for head in frontier}
            steps.append({"depth": step, "heads": values, "faithfulness": kept})
            if stop_at is not None and kept >= stop_at:
                break
        dropped = _prune(program, model, encoded, chosen, mean, memory) if prune else []
    return Circuit(
        [head for head in chosen if head not in dropped],
        model.anatomy.n_layers,
        model.anatomy.n_heads,
        {
            "how": f"cdt-{rules} discovery", "model": model.name, "revision": model.revision, "task": task.name,
            "data": task.fingerprint, "steps": steps, "pruned": [str(head) for head in dropped],
            "options": {
                "depth": depth, "per_depth": per_depth, "percentile": percentile, "rules": rules, "stop_at": stop_at,
                "means": means if isinstance(means, str) else "given", "per_position": per_position, "prune": prune,
                "through": list(through), "score": score,
            },
        },
    )  # fmt: skip


def _size(per_depth: float | int, percentile: float | None, depth: int, model: Model) -> int:
    if depth < 0:
        raise ValueError(f"depth={depth}; expected 0 (logits only) or more backward steps")
    if percentile is not None and not 0 < percentile < 100:
        raise ValueError(f"percentile={percentile}; expected a number between 0 and 100, such as 98")
    total = model.anatomy.n_layers * model.anatomy.n_heads
    size = per_depth if isinstance(per_depth, int) else max(1, int(per_depth * total))
    if not 0 < per_depth or size > total:
        raise ValueError(f"per_depth={per_depth}; expected a share of heads (0.02) or a number of heads up to {total}")
    return size


def _upstream(model: Model, chosen: Sequence[Head], frontier: Sequence[Head] | None) -> list[Head]:
    before = model.anatomy.n_layers if frontier is None else max(head.layer for head in frontier)
    return [head for head in model.anatomy.heads() if head.layer < before and head not in chosen]


def _best(candidates: list[Head], scores: Tensor, size: int, percentile: float | None) -> list[Head]:
    order = scores.argsort(descending=True, stable=True).tolist()
    if percentile is not None:
        bar = torch.quantile(scores.float(), percentile / 100)
        size = max(1, int((scores >= bar).sum()))
    return [candidates[i] for i in order[:size]]


def _kept(
    program: Program, model: Model, encoded: Encoded, circuits: Sequence[Sequence[Head]], mean: Tensor, memory: int
) -> list[float]:
    """Faithfulness of each circuit under mean ablation, per the module docstring."""
    heads = model.anatomy.heads()
    outside = [[Node(*head) for head in heads if head not in circuit] for circuit in [*circuits, ()]]
    empty = [i for i, nodes in enumerate(outside) if not nodes]
    nodes = [nodes or [Node(*heads[0])] for nodes in outside]
    lost = logit_scores(program, model, encoded, nodes, mean, "exact", memory=memory).mean(1)
    lost[empty] = 0.0
    span = lost[-1]  # all heads out: m(all) - m(none)
    return (1 - lost[:-1] / span).tolist() if span.abs() > 1e-9 else [float("nan")] * len(circuits)


def _prune(
    program: Program, model: Model, encoded: Encoded, chosen: list[Head], mean: Tensor, memory: int
) -> list[Head]:
    """CD-T algorithm 1: while some head can go without loss, drop the one whose absence keeps the most."""
    left, dropped = list(chosen), []
    kept = _kept(program, model, encoded, [left], mean, memory)[0]
    while len(left) > 1:
        without = [[other for other in left if other != head] for head in left]
        keeps = _kept(program, model, encoded, without, mean, memory)
        best = max(range(len(left)), key=keeps.__getitem__)
        if not keeps[best] > kept:
            break
        kept = keeps[best]
        dropped.append(left.pop(best))
    return dropped

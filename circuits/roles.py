"""Which alphas mean something: signed penalties, and nulls.

Adam with a large step pushes every alpha towards 0 or 1, also of heads whose gradient is noise, so a near-binary alpha shows
nothing by itself. Two remedies, each one call, each fitted in a single backward:

1. head_roles (after causal head gating, Nam et al. 2025): fit twice, with the pull +chg and -chg on mean theta.
     needed       alpha stays high though it is pulled down     (min of the two alphas is high)
     harmful      alpha stays low though it is pulled up        (max of the two alphas is low)
     indifferent  alpha follows the pull                        (the difference is large)
2. null_selections: the same fit with the answers permuted, and with the embedding of another task. What alpha looks like when
   there is nothing to learn, and how far its loss falls anyway.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .embedding import TaskEmbedding
from .fewshot import FewShotTask
from .heads import HeadScores
from .selection import HeadSelection, select_heads


def roles(
    low: Float[Tensor, "layer head"], high: Float[Tensor, "layer head"]
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """(needed, harmful, indifferent) from alpha fitted under a pull down and a pull up; each in [0, 1]."""
    return low.minimum(high), 1 - low.maximum(high), (high - low).clamp(min=0)


@dataclass(frozen=True)
class HeadRoles:
    needed: HeadScores
    harmful: HeadScores
    indifferent: HeadScores
    pulled_down: HeadSelection
    pulled_up: HeadSelection

    def __repr__(self) -> str:
        names = ("needed", "harmful", "indifferent")
        leading = [f"most {name}: {' '.join(map(str, getattr(self, name).top(3)))}" for name in names]
        return f"HeadRoles({'; '.join(leading)})"


def head_roles(
    model: Any, task: FewShotTask, embedding: TaskEmbedding | Tensor, *, chg: float | int = 1.0, **options: Any
) -> HeadRoles:
    """`chg` is the strength of the pull; `options` are those of `select_heads`. The mean over seeds is used."""
    if chg <= 0:
        raise ValueError(f"chg={chg} must be positive; both signs are fitted")
    down = select_heads(model, task, embedding, chg=-chg, **options)
    up = select_heads(model, task, embedding, chg=chg, **options)
    assert isinstance(down, HeadSelection) and isinstance(up, HeadSelection)
    found = roles(down.values, up.values)
    meta = dict(model=down.model, revision=down.revision, task=down.task, data=down.data, seed=down.seed)
    names = ("needed", "harmful", "indifferent")
    scores = [
        HeadScores(values, f"site {name}", options={"chg": chg, "units": "alpha"}, **meta)  # type: ignore[arg-type]
        for name, values in zip(names, found, strict=True)
    ]
    return HeadRoles(*scores, pulled_down=down, pulled_up=up)


def null_selections(
    model: Any,
    task: FewShotTask,
    embedding: TaskEmbedding | Tensor,
    other: TaskEmbedding | Tensor,
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, HeadSelection]:
    """Fits of "task", "permuted labels" and "mismatched embedding" (`other`), all in one backward."""
    tasks = {"task": task, "permuted labels": task.permuted(seed), "mismatched embedding": task}
    embeddings = {"task": embedding, "permuted labels": embedding, "mismatched embedding": other}
    found = select_heads(model, tasks, embeddings, seed=seed, **options)
    assert isinstance(found, dict)
    return found

"""Who feeds whom: the relevance of every head to every later head's z, query, key or value.

1. Each source head is split as in CD-T (β = z - mean) and β is carried to the target's site; all targets in one pass.
2. The score (`targets`): "answer", what the source makes the target write towards the answer (site z); "effect", how much of the
   margin passes from the source through that site; or "share" of the target's own vector.
3. Under rules="exact" β is the change of the target when the source is mean-ablated, direct paths and indirect ones together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .carrier import Node
from .cdt import check_sources, reference
from .families import read
from .files import load_tensors, save_tensors
from .heads import Circuit, Head
from .model import Model
from .propagation import DEFAULT_MEMORY
from .targets import check_sites, target_scores
from .tasks import Task


@dataclass(frozen=True, eq=False)
class HeadGraph:
    """`values[source, target]` averaged over examples; 0 where the source does not come before the target."""

    values: Float[Tensor, "source target"]
    sources: tuple[Head, ...]
    targets: tuple[Head, ...]
    site: str
    score: str
    options: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, pair: tuple[Head, Head]) -> float:
        source, target = pair
        return float(self.values[self.sources.index(Head(*source)), self.targets.index(Head(*target))])

    def edges(self, circuit: Circuit | None = None, k: int | None = None) -> dict[tuple[Head, Head], float]:
        """(source, target) to value, strongest first; only inside `circuit`, only the `k` strongest. Feeds `viz.flow`."""
        pairs = {
            (source, target): float(self.values[i, j])
            for i, source in enumerate(self.sources)
            for j, target in enumerate(self.targets)
            if source.layer < target.layer and (circuit is None or (source in circuit and target in circuit))
        }
        return dict(sorted(pairs.items(), key=lambda item: -abs(item[1]))[:k])

    def __repr__(self) -> str:
        strongest = ", ".join(f"{s}->{t} {value:+.3f}" for (s, t), value in self.edges(k=5).items())
        return f"HeadGraph({len(self.sources)} sources to {self.site} of {len(self.targets)} heads; {strongest})"

    def save(self, stem: str | Path) -> Path:
        names = {"sources": list(map(str, self.sources)), "targets": list(map(str, self.targets))}
        meta = {"format": "luthier.graph/1", "site": self.site, "score": self.score, "options": self.options, **names}
        return save_tensors(stem, {"values": self.values}, meta)

    @classmethod
    def load(cls, stem: str | Path) -> "HeadGraph":
        tensors, meta = load_tensors(stem)
        if meta.get("format") != "luthier.graph/1":
            raise ValueError(f"{str(stem)!r} does not hold a head graph; expected a pair written by HeadGraph.save")
        sources, targets = (tuple(map(Head.parse, meta[name])) for name in ("sources", "targets"))
        return cls(tensors["values"], sources, targets, meta["site"], meta["score"], meta["options"])


def head_to_head(
    model: Model,
    task: Task,
    *,
    sources: Iterable[Head] | None = None,
    targets: Iterable[Head] | None = None,
    site: str = "z",
    score: str | None = None,
    rules: str = "exact",
    means: str | Float[Tensor, "layer *place head d_head"] = "label-balanced",
    batch_size: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = True,
) -> HeadGraph:
    """Relevance of `sources` (None: all heads) to `site` of `targets` (None: all heads).

    `score`: "answer" (the default for z), "effect", or "share" (the default for q, k and v).
    """
    score = score or ("answer" if site == "z" else "share")
    check_sites((site,), score)
    found = [_heads(model, heads) for heads in (sources, targets)]
    encoded = task.encode(model)
    mean = reference(model, task, means, False, batch_size, encoded.tokens.shape[1])
    nodes = [[Node(head.layer, head.head)] for head in found[0]]
    check_sources(model, nodes, encoded.tokens.shape[1], rules)
    options = dict(batch_size=batch_size, memory=memory, progress=progress)
    with torch.no_grad(), model.evaluating():
        program = read(model.hf)
        values = target_scores(program, model, encoded, nodes, found[1], mean, rules, (site,), score, **options)
    about = {"model": model.name, "task": task.name, "data": task.fingerprint, "n": len(encoded), "rules": rules}
    return HeadGraph(values.mean(-1).cpu(), found[0], found[1], site, score, about)


def _heads(model: Model, heads: Iterable[Head] | None) -> tuple[Head, ...]:
    if heads is None:
        return tuple(model.anatomy.heads())
    return tuple(Circuit(heads).check(model.anatomy.n_layers, model.anatomy.n_heads))

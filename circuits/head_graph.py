"""Who feeds whom: the relevance of every head to every later head's z, query, key or value.

1. Each source head is split as in CD-T (β = z - mean) and β is carried to the target's site; all targets in one pass.
2. score="answer" (site z): what the source makes the target write towards the answer (eq. 6), at the read-out position.
   score="share" (any site): β · x / |x|^2, the share of the target's own vector that is there because of the source. z and q
   are read where the answer is read; k and v over all real tokens, since a head looks elsewhere for them.
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
from .cdt import check_sources, reference, task_directions
from .families import read
from .files import load_tensors, save_tensors
from .heads import Circuit, Head
from .model import Model
from .propagation import DEFAULT_MEMORY, propagate
from .tasks import Task
from .trace import Batch


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
    """Relevance of `sources` (None: all heads) to `site` of `targets` (None: all heads). `score=None`: "answer" for z, else "share"."""
    score = score or ("answer" if site == "z" else "share")
    _check(site, score)
    found = [_heads(model, heads) for heads in (sources, targets)]
    encoded = task.encode(model)
    mean = reference(model, task, means, False, batch_size, encoded.tokens.shape[1])
    nodes = [[Node(head.layer, head.head)] for head in found[0]]
    check_sources(model, nodes, encoded.tokens.shape[1], rules)
    tokens, mask, readout = (x.to(model.device) for x in (encoded.tokens, encoded.attention_mask, encoded.readout))
    everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    batch = Batch(tokens, mask, readout[:, None] if site in "zq" else everywhere)
    values = torch.zeros(len(found[0]), len(found[1]), device=model.device)
    with torch.no_grad(), model.evaluating():
        program = read(model.hf)
        directions = task_directions(program, encoded)

        def measure(layer: int, _: str, beta: Tensor, total: Tensor, indices: Tensor, examples: slice) -> None:
            real = mask[examples].gather(1, batch.rows[examples]).to(beta)
            for column, target in enumerate(found[1]):
                if target.layer != layer:
                    continue
                index = model.anatomy.kv_head(target.head) if site in "kv" else target.head
                relevant, whole = beta[..., index, :], total[..., index, :]
                if score == "answer":
                    written = relevant[:, :, 0] @ model.anatomy.W_O(model.hf, layer)[target.head].to(beta)
                    per_example = (written * directions[examples].to(beta)).sum(-1)
                else:
                    shared = ((relevant * whole).sum(-1) * real).sum(-1)
                    per_example = shared / (whole.pow(2).sum(-1) * real).sum(-1).clamp(min=1e-12)
                values[indices, column] += per_example.sum(1).to(values)

        sites = {target.layer: (site,) for target in found[1]}
        propagate(program, batch, nodes, mean, rules, None, sites, measure, batch_size, memory, progress)
    before = torch.tensor([[s.layer < t.layer for t in found[1]] for s in found[0]], device=model.device)
    about = {"model": model.name, "task": task.name, "data": task.fingerprint, "n": len(encoded), "rules": rules}
    return HeadGraph((values * before / len(encoded)).cpu(), found[0], found[1], site, score, about)


def _check(site: str, score: str) -> None:
    if site not in ("z", "q", "k", "v"):
        raise ValueError(f"site={site!r}; expected 'z', 'q', 'k' or 'v'")
    if score not in ("answer", "share"):
        raise ValueError(f"score={score!r}; expected 'answer' or 'share'")
    if score == "answer" and site != "z":
        raise ValueError(f"score='answer' needs site='z' (what a head writes); for {site!r} use score='share'")


def _heads(model: Model, heads: Iterable[Head] | None) -> tuple[Head, ...]:
    if heads is None:
        return tuple(model.anatomy.heads())
    return tuple(Circuit(heads).check(model.anatomy.n_layers, model.anatomy.n_heads))

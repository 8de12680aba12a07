"""CD-T scores of any sources: (layer, position, head) nodes, or sets of nodes and heads that act together.

1. A source is a set of nodes, each a head at one position or at all of them; β = z - mean at every node of the set at once, and the
   score is that of `relevance` (CT-SFT eq. 4 at the logits, eq. 6 at target heads). Under rules="exact" it is what the margin loses
   when the whole set is mean-ablated: sets are more than the sum of their heads, or less where heads back each other up.
2. sources="nodes" takes every head at every position (the paper's unit). Where prompts differ in length positions count back from
   the last token, and a node that an example does not have scores 0 there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import files
from .carrier import Node
from .cdt import check_sources, logit_scores, reference
from .encoding import Encoded
from .families import read
from .heads import Circuit, Head
from .model import Model
from .propagation import DEFAULT_MEMORY
from .targets import target_scores
from .tasks import Task

Source = tuple[Node, ...]


def node_name(node: Node) -> str:
    """`a3.h5` for a whole head, `a3.h5@4` for one position."""
    return str(Head(node.layer, node.head)) + ("" if node.position is None else f"@{node.position}")


@dataclass(frozen=True, eq=False, repr=False)
class SourceScores:
    """One signed number per source, and one per source and example."""

    sources: tuple[Source, ...]
    examples: Float[Tensor, "example source"]
    method: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> Float[Tensor, " source"]:
        return self.examples.mean(0)

    def __getitem__(self, source: Node | Head | Iterable[Node | Head]) -> float:
        wanted = _source(source)
        if wanted not in self.sources:
            raise ValueError(f"{_name(wanted)} is not one of the {len(self.sources)} sources that were scored")
        return float(self.values[self.sources.index(wanted)])

    def top(self, k: int) -> list[Source]:
        """The k sources with the highest signed score, best first."""
        return [self.sources[i] for i in self.values.argsort(descending=True, stable=True)[:k].tolist()]

    def grid(self) -> Float[Tensor, "layer position head"]:
        """Scores of single nodes by place; column -1 is the last position. Places that were not scored hold 0."""
        if any(len(source) != 1 or source[0].position is None for source in self.sources):
            raise ValueError("only sources of one node with a position lie on a grid; score sources='nodes'")
        nodes = torch.tensor([source[0] for source in self.sources])
        nodes[:, 2] %= int(self.about["positions"])
        out = torch.zeros(int(nodes[:, 0].max()) + 1, int(self.about["positions"]), int(nodes[:, 1].max()) + 1)
        return out.index_put((nodes[:, 0], nodes[:, 2], nodes[:, 1]), self.values.float())

    def __repr__(self) -> str:
        best = "\n".join(f"{_name(source):<24}{self[source]:>+9.3f}" for source in self.top(10))
        return f"SourceScores({self.method}: {len(self.sources)} sources, n={len(self.examples)})\n{best}"

    def save(self, stem: str | Path) -> Path:
        sources = [[list(node) for node in source] for source in self.sources]
        meta = {"format": "luthier.sources/1", "method": self.method, "sources": sources, "about": dict(self.about)}
        return files.save_tensors(stem, {"examples": self.examples}, meta)

    @classmethod
    def load(cls, stem: str | Path) -> "SourceScores":
        tensors, meta = files.load_tensors(stem)
        if meta.get("format") != "luthier.sources/1":
            raise ValueError(f"{str(stem)!r} does not hold source scores; expected a pair written by SourceScores.save")
        sources = tuple(tuple(Node(*node) for node in source) for source in meta["sources"])
        return cls(sources, tensors["examples"], meta["method"], meta["about"])


def source_relevance(
    model: Model,
    task: Task,
    sources: str | Iterable[Node | Iterable[Node | Head]] = "nodes",
    *,
    means: str | Float[Tensor, "layer *place head d_head"] = "label-balanced",
    rules: str = "exact",
    targets: Iterable[Head] | None = None,
    per_position: bool = False,
    batch_size: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = True,
) -> SourceScores:
    """Signed relevance of each source: "nodes", or a list whose members are nodes or sets (a `Circuit` acts as one set).

    `means`, `rules`, `targets` and `per_position` are those of `relevance`.
    """
    encoded = task.encode(model)
    length = encoded.tokens.shape[1]
    chosen = _chosen(model, encoded, sources)
    check_sources(model, chosen, length, rules)
    mean = reference(model, task, means, per_position, batch_size, length)
    options: dict[str, Any] = dict(batch_size=batch_size, memory=memory, progress=progress)
    goals = None if targets is None else list(Circuit(targets).check(model.anatomy.n_layers, model.anatomy.n_heads))
    with torch.no_grad(), model.evaluating():
        program = read(model.hf)
        if goals is None:
            found = logit_scores(program, model, encoded, [list(source) for source in chosen], mean, rules, **options)
        else:
            found = target_scores(program, model, encoded, chosen, goals, mean, rules, **options).mean(1)
    about = {
        "model": model.name, "revision": model.revision, "task": task.name, "data": task.fingerprint, "positions": length,
        "means": means if isinstance(means, str) else "given", "per_position": per_position,
        **({} if goals is None else {"targets": " ".join(map(str, goals))}),
    }  # fmt: skip
    return SourceScores(tuple(chosen), found.T.float().cpu(), f"cdt-{rules}", about)


def _chosen(model: Model, encoded: Encoded, sources: str | Iterable[Node | Iterable[Node | Head]]) -> list[Source]:
    if not isinstance(sources, str):
        return [_source(source) for source in sources]
    if sources != "nodes":
        raise ValueError(
            f"sources={sources!r}; expected 'nodes', or a list of Node and of sets of nodes (heads: relevance)"
        )
    length = encoded.tokens.shape[1]
    positions: Sequence[int] = range(length) if bool(encoded.attention_mask.all()) else range(-length, 0)
    return [(Node(*head, position),) for head in model.anatomy.heads() for position in positions]


def _source(source: Node | Head | Iterable[Node | Head]) -> Source:
    members = [source] if isinstance(source, Node | Head) else source
    return tuple(node if isinstance(node, Node) else Node(node.layer, node.head) for node in members)


def _name(source: Source) -> str:
    return " + ".join(map(node_name, source))

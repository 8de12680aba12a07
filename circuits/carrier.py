"""Carry a chunk of sources through the layers: each joins at its own layer, straight at z; below it β is 0.

1. `plan` sorts sources by the first position and the first layer they act at, so that neighbours share their work.
2. `Carrier.carry` walks the layers once for all sources of a chunk. At a source, β becomes z - mean and γ the mean, whatever
   had arrived there before (CD-T, algorithm 1).
3. The last layer computes only the positions that are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .decomposition import RULES
from .streams import Frame, Relevant, Totals, Values, Verbs, attend, finish
from .trace import Batch, Trace


class Node(NamedTuple):
    """One attention head as a source, at every position (None) or at one; negative positions count from the last real token."""

    layer: int
    head: int
    position: int | None = None


# What to do with a site's relevant part: (layer, site, β [source batch row head d_head], total, source indices, examples).
Measure = Callable[[int, str, Tensor, Tensor, Tensor, slice], None]


@dataclass(frozen=True)
class Plan:
    """A source set, ready to run: what is replaced in which layer, and where that begins."""

    index: int
    layers: dict[int, dict[int, list[int | None]]]  # layer -> head -> positions (None: all)
    first_layer: int
    first_position: int


def plan(sources: Sequence[Sequence[Node]], batch: Batch, causal: bool) -> list[Plan]:
    """Sorted so that sources that share their work are neighbours."""
    plans = []
    earliest_read = int(batch.rows.min())
    for index, nodes in enumerate(sources):
        layers: dict[int, dict[int, list[int | None]]] = {}
        starts = []
        for node in nodes:
            layers.setdefault(node.layer, {}).setdefault(node.head, []).append(node.position)
            # A row that is too short does not have the position: nothing acts there.
            starts.append(0 if node.position is None else max(0, int(batch.absolute(node.position).min())))
        start = min(*starts, earliest_read) if causal and starts else 0
        plans.append(Plan(index, layers, min(layers), start))
    return sorted(plans, key=lambda p: (p.first_position, p.first_layer))


class Carrier:
    """One chunk of sources on one batch of examples, carried layer by layer; the same for every rule."""

    def __init__(self, run: Trace, plans: list[Plan], means: Tensor, rules: str):
        self.run, self.plans, self.means, self.rules = run, plans, means, rules
        self.start = plans[0].first_position
        self.exact = rules == "exact"

    def carry(self, last: int, targets: dict[int, tuple[str, ...]], measure: Measure | None, examples: slice) -> Tensor:
        """Through layer `last`; returns the stream at the rows that are read. Sites in `targets` are handed to `measure`."""
        active: list[Plan] = []
        x: Tensor | None = None
        for layer in range(min(p.first_layer for p in self.plans), last + 1):
            rows = self.run.batch.rows if layer == last else None
            frame = self.run.frame(layer, self.start, rows)
            totals = Totals(self.run.records[layer], frame)
            verbs = self.verbs(totals)
            block = self.run.program.blocks[layer]
            z, projections = None, {}
            if x is not None:
                z, projections = attend(block, x, frame, verbs)
            joining = [p for p in self.plans if p.first_layer == layer]
            x, z = self._join(x, z, totals, len(joining))
            active = active + joining
            self._set(z, active, layer, totals, frame)
            if measure is not None and layer in targets:
                self._report(layer, targets[layer], {"z": z, **projections}, totals, frame, active, measure, examples)
                if layer == last:
                    return z
            x = finish(block, x, z, frame, verbs)
        assert x is not None
        return x[torch.tensor([p.index for p in active]).argsort()]

    def relevant(self, x: Tensor, total: Tensor) -> Tensor:
        """β of a stream."""
        return total - x if self.exact else x

    def verbs(self, totals: Totals) -> Verbs:
        if not self.exact:
            return Relevant(RULES[self.rules], totals)
        if not self.start or "k_rotated" not in totals.record:
            return Values()
        return Values(prefix=(totals.record["k_rotated"][:, : self.start], totals.record["v_heads"][:, : self.start]))

    def _join(self, x: Tensor | None, z: Tensor | None, totals: Totals, count: int) -> tuple[Tensor, Tensor]:
        """Sources that start in this layer arrive with β = 0 (γ = the total) and need no attention of their own."""
        whole_x = totals.record["x"][:, totals.frame.start :]
        fresh_x, fresh_z = (
            (t if self.exact else torch.zeros_like(t)).expand(count, *t.shape) for t in (whole_x, totals["z"])
        )
        if x is None or z is None:
            return fresh_x, fresh_z.clone()
        return torch.cat((x, fresh_x)), torch.cat((z, fresh_z))

    def _set(self, z: Tensor, active: list[Plan], layer: int, totals: Totals, frame: Frame) -> None:
        """At a source, in place: γ becomes the mean, β becomes total - mean."""
        replaced = self._replaced(active, layer, frame, z)
        if replaced is None:
            return
        sources, heads, hit, new = replaced
        if not self.exact:
            new = totals["z"][:, :, heads].permute(2, 0, 1, 3) - new
        z[sources, :, :, heads] = torch.where(hit, new.to(z.dtype), z[sources, :, :, heads])

    def _replaced(self, active: list[Plan], layer: int, frame: Frame, z: Tensor) -> tuple[Tensor, ...] | None:
        """What this layer's source nodes replace: stream index, head, at which positions, by which mean."""
        entries = [(i, head, places) for i, p in enumerate(active) for head, places in p.layers.get(layer, {}).items()]
        if not entries:
            return None
        sources = torch.tensor([i for i, _, _ in entries], device=z.device)
        heads = torch.tensor([head for _, head, _ in entries], device=z.device)
        positions = self._positions(frame, z.shape[2])
        hit = torch.stack([self._hit(places, positions) for _, _, places in entries])
        return sources, heads, hit[..., None], self._reference(layer, heads, positions)

    def _positions(self, frame: Frame, queries: int) -> Int[Tensor, "batch query"]:
        if frame.rows is not None:
            return frame.rows + frame.start
        size = len(self.run.batch.tokens)
        return torch.arange(frame.start, frame.start + queries, device=self.run.batch.tokens.device).expand(size, -1)

    def _hit(self, places: list[int | None], positions: Tensor) -> Bool[Tensor, "batch query"]:
        """Where a node acts; never at a pad."""
        real = self.run.batch.attention_mask.gather(1, positions).bool()
        if None in places:
            return real
        wanted = torch.stack([self.run.batch.absolute(place) for place in places if place is not None])
        return (positions[None] == wanted[:, :, None]).any(0) & real

    def _reference(self, layer: int, heads: Tensor, positions: Tensor) -> Float[Tensor, "node batch query d_head"]:
        if self.means.ndim == 3:
            return self.means[layer, heads][:, None, None].expand(-1, *positions.shape, -1)
        return self.means[layer][positions][:, :, heads].permute(2, 0, 1, 3)

    def _report(self, layer, sites, found, totals, frame, active, measure, examples) -> None:
        indices = torch.tensor([p.index for p in active])
        for site in sites:
            if site not in found:  # only fresh sources: nothing has reached q, k or v
                continue
            beta, total = found[site], totals["v_heads" if site == "v" else site]
            total = total.unflatten(-1, beta.shape[-2:]) if total.ndim == 3 else total
            beta = self.relevant(beta, total)
            if frame.rows is None or site in ("k", "v"):
                rows = self.run.batch.rows - frame.start
                pick = torch.arange(len(rows), device=rows.device)[:, None]
                beta, total = beta[:, pick, rows], total[pick, rows]
            measure(layer, site, beta, total, indices[: len(beta)], examples)

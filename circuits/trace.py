"""Totals: one ordinary run of a batch, kept by block and site, checked against the model itself.

1. Run the model's own forward; keep each block's input and rotary angles, and the last block's output.
2. Run the explicit program (`blocks`, `streams`) on each of those inputs; its output must be the next block's input, so an
   architecture that computes something unknown is refused and not decomposed wrongly.
3. Keep the activations that the rules will look up. They do not depend on any source: made once, shared by all.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .blocks import Block, Program
from .encoding import Encoded
from .streams import Frame, Values, attend, finish


@dataclass(frozen=True)
class Batch:
    """Token rows and what is read from them."""

    tokens: Int[Tensor, "batch position"]
    attention_mask: Int[Tensor, "batch position"]
    rows: Int[Tensor, "batch row"]  # positions that are read

    @classmethod
    def read_once(cls, encoded: Encoded, device: torch.device) -> "Batch":
        """A task's examples, each read where its answer is."""
        tokens, mask, rows = (x.to(device) for x in (encoded.tokens, encoded.attention_mask, encoded.readout))
        return cls(tokens, mask, rows[:, None])

    def __getitem__(self, examples: slice) -> "Batch":
        return Batch(self.tokens[examples], self.attention_mask[examples], self.rows[examples])

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Index of the last real token, whatever the padding side."""
        steps = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        return (self.attention_mask * steps).argmax(-1)

    def absolute(self, position: int) -> Int[Tensor, " batch"]:
        return self.last + 1 + position if position < 0 else torch.full_like(self.last, position)


@dataclass
class Trace:
    """Totals of one batch: per block, by site; rotary angles; and the residual stream after the last block."""

    program: Program
    batch: Batch
    records: list[dict[str, Tensor]]
    angles: list[tuple[Tensor, Tensor] | None]
    final: Tensor

    def frame(self, layer: int, start: int = 0, rows: Tensor | None = None) -> Frame:
        block = self.program.blocks[layer]
        angles = self.angles[layer]
        cos, sin = (None, None) if angles is None else (part[:, start:] for part in angles)
        padded = not bool(self.batch.attention_mask.all())
        rows = None if rows is None else rows - start
        plain = block.causal and not padded and block.window is None and rows is None and start == 0
        if plain:
            return Frame(None, cos, sin)
        allowed = _allowed(block, self.batch.attention_mask if padded else self.batch.attention_mask[:1])
        allowed = allowed[:, start:]
        if rows is not None:
            allowed = allowed.expand(len(rows), -1, -1)[torch.arange(len(rows), device=rows.device)[:, None], rows]
        return Frame(allowed, cos, sin, start, rows)


def _allowed(block: Block, real: Int[Tensor, "batch position"]) -> Tensor:
    """Which keys a query may see. A pad sees only itself and is seen by nothing else: no row is empty, no β reaches it."""
    steps = torch.arange(real.shape[1], device=real.device)
    distance = steps[:, None] - steps[None, :]
    allowed = real.bool()[:, None, :] & real.bool()[:, :, None]
    if block.causal:
        allowed = allowed & (distance >= 0)
    if block.window is not None:
        allowed = allowed & (distance < block.window)
    return allowed | (distance == 0)


def trace(program: Program, batch: Batch, keep: frozenset[str] | None = None) -> Trace:
    """Run the model once, then the explicit program on each block's own input; they must agree."""
    return walk(program, batch, *run(program, batch), keep)


def walk(
    program: Program,
    batch: Batch,
    inputs: list[Tensor],
    angles: list[tuple[Tensor, Tensor] | None],
    final: Tensor,
    keep: frozenset[str] | None = None,
) -> Trace:
    """The explicit program on what `run` found."""
    found = Trace(program, batch, [], angles, final)
    real = batch.attention_mask.bool()
    ends = [*inputs[1:], final]
    for layer, (block, x) in enumerate(zip(program.blocks, inputs, strict=True)):
        record: dict[str, Tensor] = {}
        verbs, frame = Values(record), found.frame(layer)
        z, _ = attend(block, x[None], frame, verbs)
        out = finish(block, x[None], z, frame, verbs)[0]
        _check(out[real], ends[layer][real], layer, program)
        record["x"] = x
        found.records.append({site: t for site, t in record.items() if keep is None or site in keep})
    return found


def _check(ours: Tensor, theirs: Tensor, layer: int, program: Program) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    off = float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-12))
    limit = 1e-3 if ours.dtype.itemsize >= 4 else 5e-2
    if not off < limit:
        raise ValueError(
            f"{type(program.base).__name__}: block {layer} computes something that is not known here (its output differs by "
            f"{off:.1e} of its norm); use ablation(), which needs only hooks"
        )


def run(program: Program, batch: Batch) -> tuple[list[Tensor], list[tuple[Tensor, Tensor] | None], Tensor]:
    """Each block's input and rotary angles, and the last block's output, from the model's own forward."""
    inputs: list[Tensor] = []
    angles: list[tuple[Tensor, Tensor] | None] = []
    final: list[Tensor] = []

    pads = ~batch.attention_mask.bool()[..., None]

    def before(_, args, kwargs):
        # Some implementations leave NaN at pads; nothing real sees a pad, but 0 * NaN is NaN.
        inputs.append((args[0] if args else kwargs["hidden_states"]).masked_fill(pads, 0))
        found = kwargs.get("position_embeddings")
        angles.append(None if found is None else (found[0], found[1]))

    def after(_, args, output):
        final.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in program.modules]
    handles.append(program.modules[-1].register_forward_hook(after))
    try:
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        program.base(batch.tokens, attention_mask=batch.attention_mask, position_ids=positions)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, angles, final[0]

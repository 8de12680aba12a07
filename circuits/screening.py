"""Which heads deserve an exact decomposition: attribution patching, from the very run that the decomposition starts from.

1. One forward of the model keeps each block's input and every z; one backward gives ∂m/∂z of the task's margin m.
2. Estimate of head h: <z_h - mean_h, ∂m/∂z_h> (`attribution.gradient`), averaged over the examples.
3. The shortlist is the heads with the largest |estimate|. Under rules="exact" the runs are handed on as long as they fit into
   `memory`: block inputs and z are all that γ starts from, so screening costs one backward pass and no second forward.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import sharding
from .blocks import Program
from .encoding import Encoded
from .heads import Head
from .hooks import rewrite
from .model import Model
from .propagation import example_chunks
from .streams import Values, read_out
from .trace import Batch, Trace, run, walk


def estimate(
    z: Float[Tensor, "layer example position head d_head"],
    slope: Float[Tensor, "layer example position head d_head"],
    means: Float[Tensor, "layer *place head d_head"],
    real: Int[Tensor, "example position"],
) -> Float[Tensor, "layer head example"]:
    """<z - mean, ∂m/∂z> over the real positions."""
    against = means[:, None, None] if means.ndim == 3 else means[:, None, : z.shape[2]]
    moved = (z - against) * slope
    return moved.masked_fill(real[..., None, None] == 0, 0).sum((2, 4)).movedim(1, -1)


def shortlist_size(screen: float | int, n_heads: int) -> int:
    """A share of the heads, or a number of them."""
    size = screen if isinstance(screen, int) else max(1, round(screen * n_heads))
    if not 0 < size <= n_heads:
        raise ValueError(f"screen={screen}; expected a share of the {n_heads} heads (0.1) or a number of them")
    return size


def shortlist(
    program: Program,
    model: Model,
    encoded: Encoded,
    heads: list[Head],
    size: int,
    means: Tensor,
    rules: str,
    batch_size: int | None,
    memory: int,
) -> tuple[list[Head], list[Trace]]:
    """The `size` heads with the largest |estimate|, and the runs of the first chunks of examples for `propagate`."""
    mine = encoded.select(sharding.share(len(encoded)))
    batch, runs, found = Batch.read_once(mine, model.device), [], []
    for examples in example_chunks(program, batch, size, rules, batch_size, memory):
        made, slope = _run_with_slopes(program, model, batch[examples], mine.select(range(len(mine))[examples]))
        if examples.start == 0:
            _refuse_unknown_blocks(made)
        z = torch.stack([record["z"] for record in made.records])
        found.append(estimate(z.float(), slope.float(), means.float(), made.batch.attention_mask))
        memory -= sum(t.numel() * t.itemsize for record in made.records for t in record.values())
        if rules == "exact" and memory >= 0:
            runs.append(made)
    values = sharding.gather(torch.cat(found, -1), len(encoded)).mean(-1)
    return sorted(sorted(heads, key=lambda head: -abs(float(values[head])))[:size]), runs


def _refuse_unknown_blocks(made: Trace) -> None:
    """One example is enough for that."""
    inputs = [record["x"][:1] for record in made.records]
    angles = [None if pair is None else (pair[0][:1], pair[1][:1]) for pair in made.angles]
    walk(made.program, made.batch[:1], inputs, angles, made.final[:1], frozenset())


def _run_with_slopes(
    program: Program, model: Model, batch: Batch, encoded: Encoded
) -> tuple[Trace, Float[Tensor, "layer example position head d_head"]]:
    probes: dict[int, Tensor] = {}
    records: list[dict[str, Tensor]] = []
    pads = batch.attention_mask[..., None, None] == 0

    def add_probe(z: Tensor, layer: int) -> Tensor:
        probes[layer] = torch.zeros_like(z, requires_grad=True)
        records.append({"z": z.detach().masked_fill(pads, 0)})
        return z + probes[layer]

    with torch.enable_grad(), rewrite(model, "z", add_probe):
        inputs, angles, final = run(program, batch)
        rows = torch.arange(len(batch.rows), device=final.device)[:, None]
        logits = read_out(
            program.unembedding, final[rows, batch.rows][None], encoded.columns.to(final.device), Values()
        )
        slopes = torch.autograd.grad(encoded.margin(logits[0, :, 0]).sum(), list(probes.values()))
    for record, x in zip(records, inputs, strict=True):
        record["x"] = x.detach()
    return Trace(program, batch, records, angles, final.detach()), torch.stack(slopes)

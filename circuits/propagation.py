"""Many sources, many examples, one budget: what to run together, and what comes out.

1. Examples are the outer loop (their totals are the large thing to keep), neighbouring sources the inner one.
2. Sources that act late share a first position: under a causal mask nothing earlier changes, so it is not computed.
3. `batch_size=None` chooses how many (source, example) rows are carried together from `memory` bytes.
4. Only the wanted columns are unembedded, only at the positions that are read.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .blocks import Program
from .carrier import Carrier, Measure, Node, Plan, plan
from .progress import track
from .streams import Frame, Totals, Values, read_out
from .trace import Batch, Trace, trace

EXACT_SITES = frozenset({"x", "z", "k_rotated", "v_heads"})
DEFAULT_MEMORY = 2**29


def propagate(
    program: Program,
    batch: Batch,
    sources: Sequence[Sequence[Node]],
    means: Float[Tensor, "layer *place head d_head"],
    rules: str,
    columns: Int[Tensor, " column"] | None = None,
    targets: dict[int, tuple[str, ...]] | None = None,
    measure: Measure | None = None,
    batch_size: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    runs: Sequence[Trace] = (),
) -> Float[Tensor, "source batch row column"] | None:
    """Relevant part of the logits of every source, or, with `targets`, what `measure` makes of each target site.

    `runs`: traces that exist already, of the first `example_chunks`.
    """
    n_columns = program.unembedding.out.weight.shape[0] if columns is None else len(columns)
    out = None
    if measure is None:
        out = batch.tokens.new_zeros((len(sources), *batch.rows.shape, n_columns), dtype=_wide(means.dtype))
    last = len(program.blocks) - 1 if measure is None else max(targets or {0: ()})
    keep = _kept_sites(rules, targets)
    steps = _chunks(program, batch, sources, rules, batch_size, memory)
    run, current, made = None, None, iter(runs)
    for examples, plans in track(steps, "relevance", enabled=progress):
        if run is None or current != examples:
            run, current = next(made, None) or trace(program, batch[examples], keep), examples
        carrier = Carrier(run, plans, means, rules)
        x = carrier.carry(last, targets or {}, measure, examples)
        if out is not None:
            indices = torch.tensor(sorted(p.index for p in plans))
            out[indices, examples] = _logits(run, x, carrier, columns).to(out)
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _kept_sites(rules: str, targets: dict[int, tuple[str, ...]] | None) -> frozenset[str] | None:
    if rules != "exact":
        return None
    return EXACT_SITES | {site for sites in (targets or {}).values() for site in sites}


def _logits(run: Trace, x: Tensor, carrier: Carrier, columns: Tensor | None) -> Tensor:
    """The head, on the rows that are read: β of the logits."""
    head, rows = run.program.unembedding, run.batch.rows
    total_x = run.final[torch.arange(len(rows), device=rows.device)[:, None], rows][None]
    record: dict[str, Tensor] = {}
    total = read_out(head, total_x, columns, Values(record))
    return carrier.relevant(read_out(head, x, columns, carrier.verbs(Totals(record, Frame(None, None, None)))), total)


def example_chunks(
    program: Program, batch: Batch, n_sources: int, rules: str, batch_size: int | None, memory: int
) -> list[slice]:
    """Examples that run together: few enough for all sources at once, and for their totals to fit."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected a positive number of (source, example) rows, or None")
    n_examples, length = batch.tokens.shape
    carried, kept = _bytes_per_token(program, rules)
    rows = batch_size or max(1, memory // (2 * carried * length))
    together = min(n_examples, max(1, rows // max(1, n_sources)), max(1, memory // (2 * kept * length)))
    return [slice(begin, min(n_examples, begin + together)) for begin in range(0, n_examples, together)]


def _chunks(
    program: Program, batch: Batch, sources: Sequence[Sequence[Node]], rules: str, batch_size: int | None, memory: int
) -> list[tuple[slice, list[Plan]]]:
    """Examples outermost (their totals are the expensive thing to keep), then neighbouring sources."""
    length, steps = batch.tokens.shape[1], []
    rows = batch_size or max(1, memory // (2 * _bytes_per_token(program, rules)[0] * length))
    for examples in example_chunks(program, batch, len(sources), rules, batch_size, memory):
        plans = plan(sources, batch[examples], program.causal)
        together = examples.stop - examples.start
        steps += [(examples, group) for group in _groups(plans, rows, together, length, batch_size is None)]
    return steps


def _groups(plans: list[Plan], rows: int, n_examples: int, length: int, stretch: bool) -> Iterator[list[Plan]]:
    """Runs of plans with one first position; late positions are short, so more of them fit."""
    group: list[Plan] = []
    for item in plans:
        fits = rows * length // (length - item.first_position) if stretch else rows
        if group and (group[0].first_position != item.first_position or len(group) >= max(1, fits // n_examples)):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _bytes_per_token(program: Program, rules: str) -> tuple[int, int]:
    """Peak working set of one carried token, and totals kept per token over all layers."""
    block = program.blocks[0]
    d_model, d_mlp = block.o.weight.shape[0], block.up.weight.shape[0]
    size = block.o.weight.dtype.itemsize
    qkv = sum(part.weight.shape[0] for part in (block.q, block.k, block.v))
    carried = size * (4 * d_model + 2 * qkv + (5 if block.gate else 4) * d_mlp)
    kept = size * (d_model + 2 * qkv if rules == "exact" else 8 * d_model + 3 * qkv + (4 if block.gate else 2) * d_mlp)
    return carried, kept * len(program.blocks)

"""Logits of the few columns a task asks about, at the one position it reads, for many interventions in one forward."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .encoding import Encoded, batch_size_for
from .model import Model


def column_logits(model: Model, encoded: Encoded, copies: int = 1) -> Float[Tensor, "copy batch column"]:
    """Run `copies` copies of the batch side by side (copy-major rows) and read the task's columns, in float32.

    Copies let one forward carry many interventions: a hook that edits row `copy * batch + example` edits one of them.
    The vocabulary is never unembedded in full (`Model.logits`).
    """
    tokens, mask = encoded.tokens.repeat(copies, 1), encoded.attention_mask.repeat(copies, 1)
    logits = model.logits(tokens, mask, encoded.readout.repeat(copies), encoded.columns)
    return logits.float().unflatten(0, (copies, len(encoded)))


def rows_that_fit(model: Model, encoded: Encoded, batch_size: int | None) -> int:
    """Rows of one forward: as asked, else as many as memory allows."""
    if batch_size is None:
        return batch_size_for(model, encoded.tokens.shape[1])
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected a positive number of rows, or None to choose one")
    return batch_size


def short_batches(encoded: Encoded, size: int) -> Iterator[tuple[Int[Tensor, " batch"], Encoded]]:
    """Batches of examples of like length, without the columns on the right that are padding in all of them.

    Yields the examples' indices with each batch. Column p of a batch is column p of the whole: only the end is cut.
    """
    # The last real column, not the number of real ones: with padding on the left nothing can be cut.
    ends = _ends(encoded)
    for indices in ends.argsort(stable=True).split(size):
        batch, width = encoded.select(indices), int(ends[indices].max()) + 1
        yield indices, _cut(batch, width)


def _ends(encoded: Encoded) -> Int[Tensor, " example"]:
    columns = torch.arange(encoded.attention_mask.shape[1])
    ends = (encoded.attention_mask.cpu() * columns).argmax(-1)
    return ends if encoded.corrupted is None else torch.maximum(ends, _ends(encoded.corrupted))


def _cut(encoded: Encoded, width: int) -> Encoded:
    return replace(
        encoded,
        tokens=encoded.tokens[:, :width],
        attention_mask=encoded.attention_mask[:, :width],
        corrupted=None if encoded.corrupted is None else _cut(encoded.corrupted, width),
    )

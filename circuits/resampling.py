"""Resample ablation: what stands in a head's place was computed on another example.

1. Donor: the example's corrupted twin where the task has twins. Else another example of the task: one cycle through a seeded
   random order, so that every example gives once, receives once, and never to itself.
2. z is swapped position by position, counted from the read-out. Where a donor has no such position, its outermost real token
   stands in. Twins are equally long, so for them this is the plain swap.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .encoding import Encoded
from .hooks import record
from .model import Model


def donors(n: int, seed: int = 0) -> Int[Tensor, " example"]:
    """For each of `n` examples the one it receives from: a single random cycle."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    giver = torch.empty_like(order)
    giver[order] = order.roll(1)
    return giver


def with_donors(encoded: Encoded) -> Encoded:
    """The examples with their donors as `corrupted`. Raises ValueError for unequal twins and for a single example."""
    if encoded.corrupted is None:
        if len(encoded) < 2:
            raise ValueError(
                "ablate='resample' takes z from another example, and there is only one; give more, or ablate='mean'"
            )
        return replace(encoded, corrupted=encoded.select(donors(len(encoded))))
    if not torch.equal(encoded.attention_mask, encoded.corrupted.attention_mask):
        unequal = (encoded.attention_mask.sum(1) != encoded.corrupted.attention_mask.sum(1)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"ablate='resample' swaps z position by position, but rows {unequal[:8]} have a different number of tokens "
            "in 'prompt' and 'corrupted'; make the twins equally long, or use ablate='mean'"
        )
    return encoded


def matching_positions(batch: Encoded) -> Int[Tensor, "batch pos"]:
    """For each position of an example, the donor's position at the same distance from the read-out, within its real tokens."""
    donor = batch.corrupted
    assert donor is not None
    steps = torch.arange(batch.tokens.shape[1], device=donor.attention_mask.device)
    real = donor.attention_mask * (steps + 1)
    first = torch.where(real > 0, real, len(steps) + 1).amin(1, keepdim=True) - 1
    wanted = steps + (donor.readout - batch.readout)[:, None]
    return wanted.maximum(first).minimum(real.amax(1, keepdim=True) - 1)


def donor_z(model: Model, batch: Encoded) -> Float[Tensor, "layer batch pos head d_head"]:
    """z of the batch's donors, one forward pass, aligned with the batch."""
    donor = batch.corrupted
    assert donor is not None
    with torch.no_grad(), record(model, "z") as cache:
        model.hidden(donor.tokens, donor.attention_mask)
    z, index = cache.stack(), matching_positions(batch)
    return z[:, torch.arange(len(index))[:, None], index]

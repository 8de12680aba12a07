"""Discovery over several processes: each scores its share of the examples, all end with the same full result.

Started by `accelerate launch` (or torchrun): `start()` joins the process group when there is one. Examples are independent in
every score, so a contiguous share per process and one gather give the numbers of a single process.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor, distributed


def start() -> None:
    """Join the group that a launcher prepared; nothing to do in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not active():
        from accelerate import PartialState

        PartialState()


def active() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def first() -> bool:
    """Whether this process is the one that writes files."""
    return not active() or distributed.get_rank() == 0


def share(n: int) -> range:
    """The examples of this process."""
    if not active():
        return range(n)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return range(rank * n // size, (rank + 1) * n // size)


def gather(mine: Float[Tensor, "*axes share"], n: int) -> Float[Tensor, "*axes example"]:
    """Every process's share, in order, on every process."""
    if not active():
        return mine
    parts: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine.cpu())
    whole = torch.cat(parts, -1).to(mine.device)
    assert whole.shape[-1] == n
    return whole

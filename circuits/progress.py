"""One progress bar for every long loop: quiet in pipes, live in terminals and notebooks."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], label: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Iterate with a bar on stderr that leaves no line behind; `enabled=False` iterates silently."""
    from tqdm.auto import tqdm

    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    # disable=None: tqdm's own rule, no bar when stderr is not a terminal.
    yield from tqdm(iterable, desc=label, total=total, leave=False, disable=None if enabled else True)

"""Where a prompt ends, forward by forward: what every injection at "the last prompt token" needs to know.

1. Each `generate` call is a new prompt. Its last token is fixed before the first forward as an absolute position per row
   (from the attention mask, so either padding side), and every forward is asked: is that position among your tokens?
   With a KV cache it is once, also when the prompt is read in chunks; without one it is again at each step, at the same place.
2. A plain forward without a filled cache is a new prompt too; one with a filled cache continues a prompt and is left alone.
3. `arm()` overrides 2 for the next forward, once: it is then edited at its own last token. Shapes never decide.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def last_positions(attention_mask: Tensor | None, rows: int, width: int, device: torch.device) -> Int[Tensor, " row"]:
    """Index of each row's last token: the last 1 of its mask, whichever side is padded."""
    if attention_mask is None:
        return torch.full((rows,), width - 1, device=device)
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; a [row, position] mask is needed to find the last token"
        )
    mask = attention_mask.to(device) != 0
    if not mask.any(1).all():
        raise ValueError(
            f"row {int((~mask.any(1)).nonzero()[0])} of attention_mask is all zero; every prompt needs a token"
        )
    return mask.shape[1] - 1 - mask.int().flip(1).argmax(1)


def where(index: Int[Tensor, " row"]) -> tuple[slice | Tensor, int | Tensor]:
    """What selects those positions of [row, position, ...]; a plain column where all rows agree, which costs least."""
    column = int(index[0])
    if column >= 0 and bool((index == column).all()):
        return slice(None), column
    rows = (index >= 0).nonzero().flatten()
    return rows, index[rows]


class PromptEnd:
    """`index` is, during a forward, each row's position of the last prompt token in it (-1: not in this chunk), or None."""

    def __init__(self) -> None:
        self.index: Int[Tensor, " row"] | None = None
        self.armed = False
        self.edits = 0
        self._where: tuple[slice | Tensor, int | Tensor] = (slice(None), -1)
        self._fixed: Tensor | None = None
        self._until = -1
        self._generating = False

    def arm(self) -> None:
        """Make the next forward a new prompt, even if it continues a KV cache."""
        self.armed = True

    def is_here(self) -> bool:
        """Whether the running forward holds the last prompt token of any row."""
        return self.index is not None

    def replace(self, states: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`states` [row, position, ...] with `change` applied to each row's last prompt token, out of place."""
        if self.index is None:
            return states
        edited = states.clone()
        edited[self._where] = change(states[self._where]).to(states.dtype)
        return edited

    def before_forward(self, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        rows, width = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.index = None
        if self._generating and not self.armed:
            self._locate(rows, width, past, kwargs, tokens.device)
        elif self.armed or past == 0:
            mask = kwargs.get("attention_mask")
            mask = mask[:, -width:] if mask is not None and mask.dim() == 2 else mask
            self.index = last_positions(mask, rows, width, tokens.device)
        self.armed = False
        if self.index is not None:
            self.edits += 1
            self._where = where(self.index)

    def _locate(self, rows: int, width: int, past: int, kwargs: dict[str, Any], device: torch.device) -> None:
        if self._fixed is None:  # no mask was given to generate: the first forward carries the one it inferred
            self._fixed = last_positions(kwargs.get("attention_mask"), rows, width, device)
            self._until = int(self._fixed.max())
        if past > self._until:  # decoding: nothing left to do, at the price of one comparison
            return
        # Beams and several returned sequences repeat each prompt row, side by side.
        fixed = self._fixed.to(device).repeat_interleave(rows // len(self._fixed))
        here = (fixed >= past) & (fixed < past + width)
        if here.any():
            self.index = torch.where(here, fixed - past, -1)

    @contextlib.contextmanager
    def generating(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        mask = kwargs.get("attention_mask")
        self._fixed = None
        if mask is not None:
            self._fixed = last_positions(mask, *mask.shape, mask.device)
            self._until = int(self._fixed.max())
        self._generating = True
        try:
            yield
        finally:
            self._generating, self._fixed, self.index = False, None, None


@contextlib.contextmanager
def prompt_end(model: Any) -> Iterator[PromptEnd]:
    """Follow the forwards and `generate` calls of `model.hf` while the block runs. Adds a hook and shadows `generate`."""
    end, hf = PromptEnd(), model.base
    original = hf.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        with end.generating(args, kwargs):
            return original(*args, **kwargs)

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        end.before_forward(args, kwargs)

    # The inner decoder: PEFT calls the outer model's `forward` directly, past its hooks.
    handle = hf.base_model.register_forward_pre_hook(before, with_kwargs=True)
    nested = "generate" in vars(hf)
    hf.generate = generate
    try:
        yield end
    finally:
        handle.remove()
        if nested:
            hf.generate = original
        else:
            del hf.generate

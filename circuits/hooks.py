"""Hooks that read (`record`) or change (`rewrite`) activations, and are gone when the block ends, also after an exception.

Sites on `model.hf` (every family, PEFT adapters included, gradients flow, generation too):

  z          [batch, pos, head, d_head]     attention-weighted values, input of the o-projection: the head's own output
  q, k, v    [batch, pos, head or kv head, d_head]   outputs of the projections, before rotary embedding and QK-norm
  attn_out   [batch, pos, d_model]          output of the o-projection (before a post-norm, where a family has one)
  mlp_out    [batch, pos, d_model]          output of the MLP (before a post-norm)
  resid_pre, resid_post  [batch, pos, d_model]   input and output of a block

Any other name is TransformerLens' own ("blocks.3.attn.hook_pattern") and acts on `model.lens`; run `model.lens(...)` inside the block.
This is the only file that knows hook names.
"""

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .anatomy import Part

if TYPE_CHECKING:
    from .model import Model

Edit = Callable[[Tensor, int], Tensor]  # (activation, layer) -> activation
SITES = ("z", "q", "k", "v", "attn_out", "mlp_out", "resid_pre", "resid_post")


class Cache(dict[int, Tensor]):
    """Layer -> activation, filled while the block runs (a second forward replaces the first)."""

    def stack(self) -> Tensor:
        """[layer, ...]. Raises ValueError when no forward ran inside the block."""
        if not self:
            raise ValueError("nothing was recorded; run the model inside `with record(...)`")
        return torch.stack([self[layer] for layer in sorted(self)])


@contextlib.contextmanager
def record(model: "Model", site: str, layers: Sequence[int] | None = None, detach: bool = True) -> Iterator[Cache]:
    """`with record(model, "z") as cache: model(tokens)`; then `cache[layer]` or `cache.stack()`.

    With a TransformerLens name the cache's key is that name's layer (or -1 for hooks outside the blocks).
    Raises ValueError for a site that does not exist.
    """
    cache = Cache()

    def keep(activation: Tensor, layer: int) -> Tensor:
        cache[layer] = activation.detach() if detach else activation
        return activation

    with rewrite(model, site, keep, layers):
        yield cache


@contextlib.contextmanager
def rewrite(
    model: "Model",
    site: str,
    edit: Edit,
    layers: Sequence[int] | None = None,
    when: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """While the block runs, `edit(activation, layer)` replaces the activation at `site`. Changes the model's computation, not its weights.

    `when` is asked at every call of the site; where it says no, nothing is done, at next to no cost (decoding steps, for instance).
    Raises ValueError for a site or layer that does not exist, and for sites where TransformerLens ignores edits (BERT patterns).
    """
    if site not in SITES:
        with _lens_hook(model, site, edit if when is None else lambda x, layer: edit(x, layer) if when() else x):
            yield
        return
    chosen = range(model.anatomy.n_layers) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < model.anatomy.n_layers:
            raise ValueError(f"layer {layer} does not exist; this model has layers 0-{model.anatomy.n_layers - 1}")
    with contextlib.ExitStack() as stack:
        for layer in chosen:
            stack.callback(_attach(model, site, edit, layer, when or _always).remove)
        yield


def _always() -> bool:
    return True


def _attach(model: "Model", site: str, edit: Edit, layer: int, when: Callable[[], bool]) -> Any:
    anatomy, hf = model.anatomy, model.hf

    def heads(flat: Tensor) -> Tensor:
        return edit(anatomy.split_heads(flat), layer).flatten(-2)

    if site == "z":
        return _before(anatomy.module(hf, layer, "o"), heads, when)
    if site in ("q", "k", "v"):
        change = functools.partial(_edit_projection, model, site, edit, layer)
        return _after(anatomy.module(hf, layer, site), change, when)
    if site == "resid_pre":
        return _before(anatomy.module(hf, layer, "block"), lambda x: edit(x, layer), when)
    parts: dict[str, Part] = {"attn_out": "o", "mlp_out": "mlp", "resid_post": "block"}
    return _after(anatomy.module(hf, layer, parts[site]), lambda x: edit(x, layer), when)


def _edit_projection(model: "Model", site: Literal["q", "k", "v"], edit: Edit, layer: int, flat: Tensor) -> Tensor:
    """Edit q, k or v inside an output that may hold all three."""
    anatomy = model.anatomy
    if not anatomy.layout.fused:
        return edit(anatomy.split_heads(flat), layer).flatten(-2)
    count = anatomy.n_heads if site == "q" else anatomy.n_kv_heads
    index = torch.cat([torch.arange(*anatomy.qkv_range(head, site)) for head in range(count)]).to(flat.device)
    old = anatomy.split_heads(flat[..., index])
    new = edit(old, layer)
    return flat if new is old else flat.index_copy(-1, index, new.flatten(-2).to(flat.dtype))


def _before(module: nn.Module, change: Callable[[Tensor], Tensor], when: Callable[[], bool]) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not when():
            return None
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, change: Callable[[Tensor], Tensor], when: Callable[[], bool]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if not when():
            return None
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def _lens_hook(model: "Model", name: str, edit: Edit) -> Any:
    """TransformerLens' own context manager, after checking that the hook exists and that edits there are obeyed."""
    if "hook_" not in name:
        raise ValueError(
            f"no site {name!r}; expected one of {', '.join(SITES)} or a TransformerLens name like blocks.0.attn.hook_pattern"
        )
    lens = model.lens
    if name not in lens.hook_dict:
        close = difflib.get_close_matches(name, list(lens.hook_dict), 3)
        raise ValueError(f"TransformerLens has no hook {name!r} on this model; close: {', '.join(close) or 'none'}")
    if model.anatomy.family == "bert" and name.endswith(("hook_pattern", "hook_attn_scores")):
        raise ValueError(f"{name}: TransformerLens ignores edits there on BERT and records a copy; use the site z")
    if model.anatomy.family == "gpt_neox" and "hook_rot_" in name:
        raise ValueError(f"{name}: this hook never fires on GPT-NeoX in TransformerLens; use the sites q and k")
    layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    # The layer is bound here: inside a callback, hook.name is TransformerLens' canonical name, not the one asked for.
    return lens.hooks(fwd_hooks=[(name, lambda activation, hook: edit(activation, layer))])

"""The two gradients of every parameter: collected over micro-batches, averaged over processes, checked, clipped.

They live in the optimizer's state until the step, so that a checkpoint taken in the middle of an accumulation is complete.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from .sift import SIFT

KEYS = {"f": "gradient_f", "g": "gradient_g"}
SIDES = {"f": "objective", "g": "constraint"}
# A loss, a function that computes it (its graph is freed before the next one is built), or {parameter name: gradient}.
Objective = Tensor | Callable[[], Tensor] | Mapping[str, Tensor]


class Pair(NamedTuple):
    """One parameter's gradients; None where an objective does not reach it."""

    f: Float[Tensor, "*shape"] | None
    g: Float[Tensor, "*shape"] | None

    def total(self) -> Float[Tensor, "*shape"]:
        parts = [part for part in self if part is not None]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def collect(optimizer: "SIFT", side: str, source: Objective, retain_graph: bool) -> None:
    """Add one objective's masked gradients. `autograd.grad` keeps them apart from `.grad` and from each other."""
    if not isinstance(source, Tensor | Mapping):
        source = source()
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(source, Tensor):
        if source.numel() != 1 or not source.requires_grad:
            got = f"shape {tuple(source.shape)}, requires_grad={source.requires_grad}"
            raise ValueError(f"the {SIDES[side]} must be a scalar loss with a graph, got {got}")
        gradients = dict(
            zip(moving, torch.autograd.grad(source, moving, retain_graph=retain_graph, allow_unused=True), strict=True)
        )
        if not any(g is not None for g in gradients.values()):
            raise ValueError(
                f"the {SIDES[side]} depends on no parameter that may move; compute it with this model and check the mask"
            )
    else:
        gradients = _by_parameter(optimizer, side, source, moving)
    for p, gradient in gradients.items():
        if gradient is None:
            continue
        gradient = gradient.detach() if optimizer.masks is None else gradient.detach() * optimizer.masks[p]
        held = optimizer.state[p].get(KEYS[side])
        optimizer.state[p][KEYS[side]] = gradient.clone() if held is None else held.add_(gradient)


def _by_parameter(
    optimizer: "SIFT", side: str, source: Mapping[str, Tensor], moving: list[nn.Parameter]
) -> dict[nn.Parameter, Tensor | None]:
    by_name = {name: p for p, name in optimizer.names.items()}
    unknown = sorted(set(source) - set(by_name))
    if unknown:
        listed = ", ".join(unknown[:3])
        raise ValueError(
            f"the {SIDES[side]} has gradients for {listed}, which this model does not train; use its parameter names"
        )
    for name, gradient in source.items():
        if gradient.shape != by_name[name].shape:
            raise ValueError(
                f"{SIDES[side]} gradient of {name} has shape {tuple(gradient.shape)}, expected {tuple(by_name[name].shape)}"
            )
    return {by_name[name]: gradient for name, gradient in source.items() if by_name[name] in set(moving)}


def gather(optimizer: "SIFT") -> dict[nn.Parameter, Pair]:
    """What was collected; with nothing collected, `.grad` as the objective's."""
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(key in optimizer.state.get(p, {}) for p in moving for key in KEYS.values()):
        given = {optimizer.names[p]: p.grad for p in moving if p.grad is not None}
        if given:
            collect(optimizer, "f", given, retain_graph=False)
    pairs = {p: Pair(*(optimizer.state.get(p, {}).get(key) for key in KEYS.values())) for p in moving}
    return {p: pair for p, pair in pairs.items() if pair.f is not None or pair.g is not None}


def clear(optimizer: "SIFT") -> None:
    for state in optimizer.state.values():
        for key in KEYS.values():
            state.pop(key, None)


def synchronize(optimizer: "SIFT", pairs: dict[nn.Parameter, Pair]) -> dict[nn.Parameter, Pair]:
    """Mean over processes, one collective per side. DDP's own hooks see `.grad` only, never these gradients."""
    if not (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return pairs
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    sides = []
    for side in range(2):
        mine = [pairs[p][side] if p in pairs else None for p in moving]
        present = torch.tensor([g is not None for g in mine], dtype=torch.int32, device=moving[0].device)
        torch.distributed.all_reduce(present, op=torch.distributed.ReduceOp.MAX)
        used = [i for i, anywhere in enumerate(present.tolist()) if anywhere]
        if not used:
            sides.append({})
            continue
        parts = [torch.zeros_like(moving[i]) if mine[i] is None else mine[i] for i in used]
        flat = torch.cat([part.flatten().float() for part in parts])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        pieces = flat.split([part.numel() for part in parts])
        sides.append({moving[i]: piece.view_as(moving[i]) for i, piece in zip(used, pieces, strict=True)})
    f, g = sides
    return {p: Pair(f.get(p), g.get(p)) for p in moving if p in f or p in g}


def require_sound(pairs: Mapping[nn.Parameter, Pair], names: Mapping[nn.Parameter, str]) -> None:
    if not pairs:
        raise ValueError(
            "no gradients: give step() an objective and a constraint, or call accumulate() or backward() first"
        )
    for side in "fg":
        present = [(p, getattr(pair, side)) for p, pair in pairs.items() if getattr(pair, side) is not None]
        if present and not torch.stack([torch.linalg.vector_norm(g.float()) for _, g in present]).isfinite().all():
            bad = [names[p] for p, g in present if not g.isfinite().all()]
            where = (
                f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}"
                if bad
                else "the norm (overflow)"
            )
            raise ValueError(
                f"the {SIDES[side]}'s gradient is NaN or infinite in {where}; the step was not taken, check the loss"
            )
    has = [any(getattr(pair, side) is not None for pair in pairs.values()) for side in "fg"]
    if all(has) and not any(pair.f is not None and pair.g is not None for pair in pairs.values()):
        raise ValueError(
            "objective and constraint share no trainable parameter; compute both losses with the same model"
        )


def clip_(pairs: Mapping[nn.Parameter, Pair], limit: float | int) -> None:
    """Scale each objective's gradient, in place, to a global norm of at most `limit`."""
    for side in "fg":
        present = [getattr(pair, side) for pair in pairs.values() if getattr(pair, side) is not None]
        if present:
            norm = torch.stack([g.float().square().sum() for g in present]).sum().sqrt()
            factor = (limit / (norm + 1e-6)).clamp_max(1.0)
            for gradient in present:
                gradient.mul_(factor)


def products(pairs: Mapping[nn.Parameter, Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """<f, f>, <f, g> and <g, g> over all parameters together."""
    device = next(iter(pairs)).device
    ff, fg, gg = torch.zeros(3, dtype=torch.float32, device=device).unbind()
    for f, g in pairs.values():
        ff = ff if f is None else ff + f.float().square().sum()
        gg = gg if g is None else gg + g.float().square().sum()
        fg = fg if f is None or g is None else fg + (f.float() * g.float()).sum()
    return ff, fg, gg

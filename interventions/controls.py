"""What SIFT is compared with, and the AdamW update for parameters that are not matrices. Pure functions of gradients.

pcgrad  Yu et al. 2020: a gradient that conflicts with the other loses its component along it (both from the originals).
blur    Reisizadeh et al. 2025: d = g_f + weight * (g_g - g_f <g_f, g_g> / |g_f|^2), whether or not they conflict.
Both take inner products over all trained parameters at once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .gradient_pairs import Pair, products

Pairs = Mapping[nn.Parameter, Pair]


def pcgrad(pairs: Pairs) -> dict[nn.Parameter, Pair]:
    ff, fg, gg = products(pairs)
    if float(fg) >= 0:
        return dict(pairs)
    return {
        p: Pair(_minus(pair.f, pair.g, fg / gg.clamp_min(1e-30)), _minus(pair.g, pair.f, fg / ff.clamp_min(1e-30)))
        for p, pair in pairs.items()
    }


def blur(pairs: Pairs, weight: float | int = 1.0) -> dict[nn.Parameter, Pair]:
    """The combined direction takes the objective's place; the constraint's is left empty."""
    ff, fg, _ = products(pairs)
    combined = {}
    for p, pair in pairs.items():
        retained = _minus(pair.g, pair.f, fg / ff.clamp_min(1e-30))
        retained = None if retained is None else weight * retained
        combined[p] = Pair(Pair(pair.f, retained).total(), None)
    return combined


def adamw_update(
    parameter: nn.Parameter,
    gradient: Float[Tensor, "*shape"],
    state: dict[str, Any],
    group: Mapping[str, Any],
    mask: Bool[Tensor, "*shape"] | None,
) -> None:
    """AdamW in place; where the mask is False neither the update nor the decay moves anything."""
    if "step" not in state:
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
    state["step"] += 1
    (beta1, beta2), gradient = group["betas"], gradient.float()
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
    update = (state["exp_avg"] / root).mul_(-group["lr"] / (1 - beta1 ** state["step"]))
    shrink = group["lr"] * group["weight_decay"]
    if mask is None:
        parameter.mul_(1 - shrink).add_(update)
    else:
        parameter.mul_(1 - shrink * mask.to(parameter.dtype)).add_(update * mask)


def _minus(a: Tensor | None, b: Tensor | None, factor: Tensor) -> Tensor | None:
    if b is None:
        return a
    return -factor * b if a is None else a - factor * b

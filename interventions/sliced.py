"""Linear layers and norms of which only chosen slices learn: y = x Wᵀ + x Δᵀ, with Δ as small as the slice.

1. The weight W stays in place and gets no gradient. A compact parameter Δ, zero at the start, is the change of the chosen
   rows R (a head's outputs in q, k, v) or columns C (a head's inputs in o).
2. Forward: y = x Wᵀ, then y[R] += x Δᵀ (rows) or y += x[C] Δᵀ (columns). With Δ = 0 this is the plain layer, bit for bit.
3. Backward builds dx and dΔ only: the gradient of W, the same size as W, never exists. For columns only x[C] is kept.
4. Norms and other vectors are small: they run their own forward on `vector + Δ`.

Decay on Δ pulls towards the starting weights, momentum and clipping see nothing but Δ, and W cannot leak.
A layer is switched by giving it a subclass of its own class, so copies, hooks, DDP, FSDP2 and compilers see an ordinary module.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Range = tuple[int, int]


class SlicedMatrix(NamedTuple):
    """Which part of a weight learns: ranges of `outputs` (rows of an nn.Linear weight) or of its inputs."""

    outputs: bool
    ranges: tuple[Range, ...]
    # Conv1D keeps weights as [in, out]; the compact Δ has the orientation of its weight.
    transposed: bool


def pick(x: Float[Tensor, "*batch n"], ranges: tuple[Range, ...]) -> Float[Tensor, "*batch k"]:
    """The chosen entries of the last axis, side by side."""
    parts = [x[..., start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def add_at(y: Float[Tensor, "*batch n"], parts: Float[Tensor, "*#batch k"], ranges: tuple[Range, ...]) -> None:
    """y[chosen] += parts, in place: the opposite of `pick`."""
    offset = 0
    for start, stop in ranges:
        y[..., start:stop] += parts[..., offset : offset + stop - start]
        offset += stop - start


class SlicedLinear(torch.autograd.Function):
    """Steps 2 and 3. Gradients: x, Δ of the weight, Δ of the bias; never the weight or bias themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*batch d_in"],
        weight: Tensor,
        bias: Float[Tensor, " d_out"] | None,
        delta: Tensor | None,
        bias_delta: Float[Tensor, " k"] | None,
        chosen: SlicedMatrix,
        bias_ranges: tuple[Range, ...],
    ) -> Float[Tensor, "*batch d_out"]:
        y = functional.linear(x, weight.T if chosen.transposed else weight, bias)
        kept = None
        if delta is not None:
            kept = x if chosen.outputs else pick(x, chosen.ranges)
            part = functional.linear(kept, (delta.T if chosen.transposed else delta).to(weight.dtype))
            if chosen.outputs:
                add_at(y, part, chosen.ranges)
            else:
                y += part
        if bias_delta is not None:
            add_at(y, bias_delta.to(y.dtype), bias_ranges)
        ctx.save_for_backward(weight, delta, kept)
        ctx.chosen, ctx.bias_ranges, ctx.x_dtype = chosen, bias_ranges, x.dtype
        ctx.bias_dtype = None if bias_delta is None else bias_delta.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        weight, delta, kept = ctx.saved_tensors
        chosen: SlicedMatrix = ctx.chosen
        # Under autocast g comes in half precision while weights and inputs are float32.
        matrix = (weight.T if chosen.transposed else weight).to(g.dtype)
        dx = g @ matrix if ctx.needs_input_grad[0] else None
        d_delta = d_bias = None
        if delta is not None:
            change = (delta.T if chosen.transposed else delta).to(g.dtype)
            part = pick(g, chosen.ranges) if chosen.outputs else g
            if dx is not None and chosen.outputs:
                dx += part @ change
            elif dx is not None:
                add_at(dx, part @ change, chosen.ranges)
            inputs = kept.to(g.dtype).flatten(0, -2)
            outer = (inputs, part.flatten(0, -2)) if chosen.transposed else (part.flatten(0, -2), inputs)
            d_delta = (outer[0].T @ outer[1]).to(delta.dtype)
        if ctx.bias_dtype is not None:
            d_bias = pick(g, ctx.bias_ranges).flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return None if dx is None else dx.to(ctx.x_dtype), None, None, d_delta, d_bias, None, None


class SlicedModule(nn.Module):
    """Mixed in front of a layer's own class by `slice_module`; `slices[name]` lists (dim, ranges) of parameter `name`."""

    slices: dict[str, tuple[int, tuple[Range, ...]]]

    def delta(self, name: str) -> Tensor | None:
        return getattr(self, f"{name}_slice", None)


class SlicedLinearModule(SlicedModule):
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        transposed = not isinstance(self, nn.Linear)
        dim, ranges = self.slices.get("weight", (0, ()))
        chosen = SlicedMatrix(dim == (1 if transposed else 0), ranges, transposed)
        bias_ranges = self.slices.get("bias", (0, ()))[1]
        arguments = (self.weight, self.bias, self.delta("weight"), self.delta("bias"))
        return SlicedLinear.apply(x, *arguments, chosen, bias_ranges)  # type: ignore[return-value]


class SlicedVectorModule(SlicedModule):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on `parameter + Δ` instead of its parameters (step 4)."""
        # An entry in __dict__ hides the parameter of the same name for the length of this call.
        for name in self.slices:
            value = self._parameters[name]
            self.__dict__[name] = value + self.delta(name).to(value.dtype)  # type: ignore[union-attr]
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in self.slices:
                self.__dict__.pop(name, None)


_classes: dict[tuple[type, type], type] = {}


def is_linear(layer: type[nn.Module]) -> bool:
    """nn.Linear and its subclasses, and transformers' Conv1D (named, so that this file needs torch only)."""
    return issubclass(layer, nn.Linear) or layer.__name__ == "Conv1D"


def sliced_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass that `slice_module` gives to a layer of class `original`."""
    mixin = SlicedLinearModule if is_linear(original) else SlicedVectorModule
    key = (mixin, original)
    if key not in _classes:
        _classes[key] = type(f"Sliced{original.__name__}", (mixin, original), {})
    return _classes[key]


def slice_module(module: nn.Module, slices: dict[str, tuple[int, tuple[Range, ...]]]) -> None:
    """Give `module` a zero Δ per sliced parameter (`weight_slice`, `bias_slice`) and the forward that adds it."""
    module.slices = slices  # type: ignore[assignment]
    for name, (dim, ranges) in slices.items():
        parameter: Tensor = module._parameters[name]  # type: ignore[assignment]
        shape = list(parameter.shape)
        shape[dim] = sum(stop - start for start, stop in ranges)
        # 16-bit weights learn in float32: small steps would be rounded away.
        dtype = torch.float32 if parameter.element_size() == 2 else parameter.dtype
        module.register_parameter(
            f"{name}_slice", nn.Parameter(torch.zeros(shape, dtype=dtype, device=parameter.device))
        )
    module.__class__ = sliced_class(type(module))


def unslice_module(module: nn.Module, original: type[nn.Module]) -> None:
    """Undo `slice_module`; what Δ learned must have been merged before."""
    for name in module.slices:  # type: ignore[union-attr]
        module._parameters.pop(f"{name}_slice", None)
    del module.slices
    module.__class__ = original

"""Train only the slices of a mask inside any training loop (CT-SFT §4.2, "head-level gradient masking", without its leaks).

1. On entry every parameter is frozen and each sliced layer gets a compact Δ, zero at the start (`sliced.py`).
2. Inside, any optimizer, trainer or wrapper sees a model whose only trainable parameters are the Δs. Weight decay acts on Δ,
   so it pulls towards the *starting* weights; momentum, clipping and accumulation cannot reach a frozen value.
3. On exit, also after an exception, Δ is added into its slice and the model is a plain Hugging Face model again.
4. `proof()` compares digests of every frozen value with those taken on entry: "0 of 123,456 frozen values changed".

A masked gradient alone is no freeze: with AdamW's default decay it moved frozen rows by 7e-5 in 50 steps, with L2 decay as much
as trained rows (docs/restricted_training.md).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from circuits.anatomy import Slice

from .sliced import Range, SlicedModule, is_linear, slice_module, unslice_module


@runtime_checkable
class HasSlices(Protocol):
    @property
    def slices(self) -> Sequence[Slice]: ...


@contextmanager
def restrict(
    model: Any, mask: HasSlices | Iterable[Slice | tuple[str, int, int, int]], verify: bool = True
) -> "Iterator[Restricted]":
    """Within the block only the slices of `mask` learn; on exit they are merged and the rest is bit-identical.

    `model` is a Hugging Face model, a `circuits.Model`, or a `PeftModel` (then the *adapters* are restricted to the mask's
    heads). `mask` is a `HeadMask` or a list of (parameter, dim, start, stop). Make the optimizer inside the block, from
    `restricted.parameters()` or from the parameters that require gradients. `verify=False` skips the digests `proof()` needs.
    An exception inside the block leaves the model as trained so far, merged and clean. Raises ValueError on quantised or
    offloaded weights, unknown parameters, ranges outside a parameter, and nested use.
    """
    hf: nn.Module = getattr(model, "hf", model)
    slices = [Slice(*entry) for entry in (mask.slices if isinstance(mask, HasSlices) else mask)]
    if hasattr(hf, "peft_config"):
        from .adapters import adapter_slices

        slices = adapter_slices(hf, slices)
    grouped = group(hf, slices)
    restricted = Restricted(hf, grouped, verify)
    try:
        yield restricted
    finally:
        restricted.merge()


Grouped = dict[str, tuple[int, tuple[Range, ...]]]


def group(hf: nn.Module, slices: Iterable[Slice]) -> Grouped:
    """{parameter: (dim, disjoint sorted ranges)}, checked against the model. Overlaps (shared K/V heads) are joined."""
    parameters = dict(hf.named_parameters())
    found: dict[str, list[Slice]] = {}
    for entry in slices:
        found.setdefault(entry.parameter, []).append(entry)
    if not found:
        raise ValueError("the mask is empty: no parameter would learn; give it at least one head or norm")
    grouped = {}
    for name, entries in found.items():
        check(hf, name, parameters, entries)
        grouped[name] = (entries[0].dim, join((entry.start, entry.stop) for entry in entries))
    return grouped


def join(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Union of half-open ranges, as few ranges as possible."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def check(hf: nn.Module, name: str, parameters: dict[str, nn.Parameter], entries: list[Slice]) -> None:
    """Raises ValueError for a parameter that cannot be sliced as asked; says why and what to do."""
    who = type(hf).__name__
    parameter = parameters.get(name)
    if parameter is None:
        raise ValueError(f"{who} has no parameter {name!r}; the mask was made for another model, make it for this one")
    path, _, leaf = name.rpartition(".")
    module = hf.get_submodule(path)
    if isinstance(module, SlicedModule):
        raise ValueError(f"{name} is already restricted; leave the outer restrict block first")
    quantised = not parameter.is_floating_point() or parameter.element_size() < 2 or hasattr(parameter, "quant_state")
    if quantised:
        what = f"{type(module).__name__}, {parameter.dtype}"
        raise ValueError(
            f"{name} is quantised ({what}) and cannot be sliced; load the model in float32, bfloat16 or float16"
        )
    if parameter.device.type == "meta" or "forward" in module.__dict__:
        raise ValueError(
            f"{name} is offloaded or its layer's forward was replaced; load the model without device_map offload"
        )
    dims = {entry.dim for entry in entries}
    if len(dims) > 1:
        raise ValueError(f"{name} is sliced along dims {sorted(dims)}; slices of one parameter must share a dim")
    size = parameter.shape[entries[0].dim] if entries[0].dim < parameter.dim() else 0
    bad = next((entry for entry in entries if not 0 <= entry.start < entry.stop <= size), None)
    if bad is not None:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, but the mask names {bad}; make the mask for this model"
        )
    if leaf not in ("weight", "bias") or (parameter.dim() > 1 and not is_linear(type(module))):
        raise ValueError(
            f"{name} belongs to a {type(module).__name__}; only linear layers, Conv1D and norms can be restricted"
        )
    if sum(p is parameter for _, p in hf.named_parameters(remove_duplicate=False)) > 1:
        raise ValueError(f"{name} is tied to another layer's weight; a slice of it cannot learn alone")


class Restricted:
    """What `restrict` yields: the trainable slices and the proof that nothing else moved."""

    def __init__(self, hf: nn.Module, grouped: Grouped, verify: bool):
        self.hf, self.grouped = hf, grouped
        self.frozen = (
            {name: digest(p, *grouped.get(name, (0, ()))) for name, p in hf.named_parameters()} if verify else None
        )
        self.trainable_before = {name: p.requires_grad for name, p in hf.named_parameters()}
        total = sum(p.numel() for p in hf.parameters())
        self.modules: dict[str, tuple[nn.Module, type[nn.Module]]] = {}
        hf.requires_grad_(False)
        by_module: dict[str, dict[str, tuple[int, tuple[Range, ...]]]] = {}
        for name, spec in grouped.items():
            path, _, leaf = name.rpartition(".")
            by_module.setdefault(path, {})[leaf] = spec
        for path, spec in by_module.items():
            module = hf.get_submodule(path)
            self.modules[path] = (module, type(module))
            slice_module(module, spec)
        self.n_parameters = sum(p.numel() for p in self.parameters())
        self.n_frozen = total - self.n_parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, Δ) of every slice; looked up afresh, because FSDP replaces parameters."""
        for path, (module, _) in self.modules.items():
            for leaf in getattr(module, "slices", ()):
                yield f"{path}.{leaf}_slice", module._parameters[f"{leaf}_slice"]  # type: ignore[misc]

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def changed(self) -> list[str]:
        """Names of the parameters in which a frozen value is no longer what it was on entry."""
        if self.frozen is None:
            raise ValueError("restrict was called with verify=False: nothing to compare with; use verify=True")
        now = {name: p for name, p in self.hf.named_parameters() if not name.endswith("_slice")}
        return [
            name
            for name, before in self.frozen.items()
            if digest(now[name], *self.grouped.get(name, (0, ()))) != before
        ]

    def proof(self) -> str:
        """One line: "0 of N frozen values changed", or where values changed."""
        changed = self.changed()
        if not changed:
            return f"0 of {self.n_frozen:,} frozen values changed"
        return f"FROZEN VALUES CHANGED, of {self.n_frozen:,}, in {len(changed)} parameters: {', '.join(changed[:5])}"

    def merge(self) -> None:
        """Add every Δ into its weight and give each layer its own class back. Collective under FSDP."""
        for module, original in self.modules.values():
            with torch.no_grad():
                for leaf, (dim, ranges) in module.slices.items():  # type: ignore[union-attr]
                    add_slices(module._parameters[leaf], module._parameters[f"{leaf}_slice"], dim, ranges)  # type: ignore[arg-type]
            unslice_module(module, original)
        for name, parameter in self.hf.named_parameters():
            parameter.requires_grad_(self.trainable_before.get(name, True))

    def __repr__(self) -> str:
        share = self.n_parameters / (self.n_parameters + self.n_frozen)
        return f"Restricted({self.n_parameters:,} values of {len(self.grouped)} parameters learn, {share:.2%} of the model)"


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, also when FSDP2 keeps only a shard of it on this process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def add_slices(weight: Tensor, delta: Tensor, dim: int, ranges: tuple[Range, ...]) -> None:
    """weight[ranges] += Δ along `dim`; on a sharded weight only the rows this process holds."""
    delta = gathered(delta).to(weight.dtype)
    first = [0] * weight.dim()
    if hasattr(weight, "full_tensor"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, first = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
        weight = weight.to_local()  # type: ignore[operator]
        if weight.numel() == 0:
            return
    for axis in range(weight.dim()):
        if axis != dim:
            delta = delta.narrow(axis, first[axis], weight.shape[axis])
    offset = 0
    for start, stop in ranges:
        low, high = max(start, first[dim]), min(stop, first[dim] + weight.shape[dim])
        if low < high:
            weight.narrow(dim, low - first[dim], high - low).add_(delta.narrow(dim, offset + low - start, high - low))
        offset += stop - start


def digest(parameter: Tensor, dim: int, ranges: tuple[Range, ...]) -> bytes:
    """A hash of every value outside the ranges, read as raw bytes: 0.0 and -0.0 differ, NaN equals itself."""
    tensor = gathered(parameter.detach())
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    state = hashlib.blake2b(digest_size=16)
    cursor = 0
    for start, stop in (*ranges, (tensor.shape[dim], 0)):
        if start > cursor:
            # 2**24 values at a time: a copy of a whole embedding would cost as much memory as the embedding.
            part = tensor.narrow(dim, cursor, start - cursor)
            for piece in part.split(max(1, 2**24 * len(part) // part.numel())):
                state.update(piece.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        cursor = stop
    return state.digest()

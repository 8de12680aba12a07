"""What a SIFT optimizer may move: the module, its masks by parameter, and its matrices cut into blocks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from circuits.partition import Block, partition


def unwrapped(model: Any) -> nn.Module:
    """The trainable module: inside `load()`'s Model, or inside DistributedDataParallel."""
    hf = getattr(model, "hf", model)
    hf = hf.module if isinstance(hf, nn.parallel.DistributedDataParallel) else hf
    if not isinstance(hf, nn.Module):
        raise TypeError(f"expected a model (load(...), model.hf or an nn.Module), got {type(model).__name__}")
    return hf


def masks_of(mask: Any, names: Mapping[nn.Parameter, str]) -> dict[nn.Parameter, Tensor] | None:
    """The mask by parameter, on the parameter's device, without parameters that may not move at all."""
    if mask is None:
        return None
    tensors = mask.tensors() if hasattr(mask, "tensors") else mask
    by_name = {name: p for p, name in names.items()}
    unknown = sorted(set(tensors) - set(by_name))
    if unknown:
        raise ValueError(
            f"the mask names {', '.join(unknown[:3])}, which this model does not train; use a mask made for this model"
        )
    for name, part in tensors.items():
        if part.shape != by_name[name].shape:
            raise ValueError(
                f"mask of {name} has shape {tuple(part.shape)}, the parameter {tuple(by_name[name].shape)}; remake the mask"
            )
    kept = {by_name[n]: part.bool().to(by_name[n].device) for n, part in tensors.items() if part.any()}
    if not kept:
        raise ValueError("the mask lets nothing move; give it at least one head")
    return kept


def blocks_of(
    hf: nn.Module, names: Mapping[nn.Parameter, str], masks: Mapping[nn.Parameter, Tensor] | None, size: str | int
) -> dict[nn.Parameter, list[Block]]:
    """Per matrix parameter, its blocks ("matrix", "head", or heads per block) cut down to what the masks let move."""
    if isinstance(size, str) and size not in ("matrix", "head"):
        raise ValueError(f"blocks={size!r}; expected 'matrix', 'head' or a number of heads per block")
    by_name = {name: p for p, name in names.items()}
    found: dict[nn.Parameter, list[Block]] = {}
    for block in partition(hf, {"matrix": None, "head": 1}[size] if isinstance(size, str) else size):
        parameter = by_name.get(block.parameter)
        if parameter is None or (masks is not None and parameter not in masks):
            continue
        kept = block if masks is None else block.restricted(masks[parameter])
        if kept is not None:
            found.setdefault(parameter, []).append(kept)
    return found

"""Where adapters go: which linear layers match, in which block they sit, which of their rows a circuit owns."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# module -> (input columns, output rows) that may move; None = all
Keep = dict[str, tuple[Tensor | None, Tensor | None]]


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def untouched(module: nn.Module) -> bool:
    """Whether it does what its class does: nothing is hooked on it, and no other forward (an offloader's, say) put in."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or Conv1D."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def find_blocks(hf: nn.Module) -> str | None:
    """Name of the list of transformer layers, or None where the model does not show one."""
    config = getattr(hf, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = (name for name, module in hf.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, None)


def layer_of(name: str, blocks: str | None) -> int | None:
    found = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) if blocks else None
    return int(found[1]) if found else None


def find_targets(
    hf: nn.Module,
    target_modules: Sequence[str] | str | None,
    layers: Sequence[int] | None,
    blocks: str | None,
    keep: Keep | None = None,
) -> list[str]:
    """Full names of the layers to adapt, in the model's order."""
    if any("lora_" in name for name, _ in hf.named_modules()):
        raise ValueError("the model already carries PEFT adapters; expected a plain base: merge_and_unload() it first")
    linear = [n for n, m in hf.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    names = [name for name in linear if _matches(name, _endings(hf, target_modules, keep), blocks)]
    if keep is not None:
        names = [name for name in names if name in keep]
    if layers is not None:
        names = [name for name in names if layer_of(name, blocks) in set(layers)]
    if not names:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ValueError(
            f"target_modules={target_modules!r}, layers={layers!r} match no linear layer of {type(hf).__name__}; "
            f"its linear layers end in {', '.join(known)}"
        )
    return names


def _endings(hf: nn.Module, target_modules: Sequence[str] | str | None, keep: Keep | None) -> list[str] | None:
    """Name endings, or None for every linear layer inside the blocks."""
    if target_modules == "all-linear" or (target_modules is None and keep is not None):
        return None
    if target_modules is not None:
        return [target_modules] if isinstance(target_modules, str) else list(target_modules)
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

    family = getattr(getattr(hf, "config", None), "model_type", "")
    return list(defaults[family]) if family in defaults else None


def _matches(name: str, endings: list[str] | None, blocks: str | None) -> bool:
    if endings is None:
        return layer_of(name, blocks) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def confine(model: Any, circuit: Any, kv: str = "shared") -> Keep:
    """Rows (q, k, v) and columns (o) of the circuit's heads, for `StackedLoRA(keep=...)`."""
    if not hasattr(model, "anatomy"):
        raise TypeError(f"a circuit needs a model from circuits.load; got {type(model).__name__}: pass load(model)")
    masks: dict[str, list[Tensor | None]] = {}
    for head in circuit:
        for parameter, dim, start, stop in (_fields(s) for s in model.anatomy.slices(head, kv=kv)):
            name, _, kind = parameter.rpartition(".")
            if kind != "weight":
                continue  # LoRA has no bias to move
            module = model.hf.get_submodule(name)
            side = int((dim == 0) != is_conv1d(module))  # 0: input columns, 1: output rows
            mask = masks.setdefault(name, [None, None])
            if mask[side] is None:
                mask[side] = torch.zeros(shape(module)[side])
            mask[side][start:stop] = 1  # pyright: ignore
    if not masks:
        raise ValueError("the circuit has no heads; expected at least one to confine members to")
    return {name: (columns, rows) for name, (columns, rows) in masks.items()}


def _fields(piece: Any) -> tuple[str, int, int, int]:
    return piece.parameter, piece.dim, piece.start, piece.stop

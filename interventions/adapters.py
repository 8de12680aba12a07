"""LoRA on chosen heads only: which rows and columns of the adapter matrices belong to the heads of a mask.

With W' = W + s·B A, a head's outputs in q, k, v are rows of B and a head's inputs in o are columns of A. So
1. outputs (q, k, v): those rows of B learn, and all of A; the other rows of B stay zero, as PEFT starts them;
2. inputs (o): those columns of A learn, and all of B; the other columns of A start random and are set to zero first.
The adapter is then zero outside the chosen heads, and it is an ordinary LoRA adapter: plain PEFT loads what was saved.
Norms and biases of the mask are left out: an adapter file does not carry them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from circuits.anatomy import Slice, unwrap

if TYPE_CHECKING:
    from peft import LoraConfig, ShiraConfig


def lora_config(mask: Any, r: int = 8, **options: Any) -> "LoraConfig":
    """LoraConfig whose target modules are exactly the layers the mask's heads live in. `options` go to LoraConfig."""
    from peft import LoraConfig

    matrices = [name for name, shape in mask.shapes.items() if len(shape) == 2]
    if not matrices:
        raise ValueError("this mask has no heads, only norms: LoRA has nothing to adapt; use restrict without PEFT")
    modules = sorted(name.removesuffix(".weight") for name in matrices)
    options = {"lora_alpha": 2 * r, "lora_dropout": 0.0, **options}
    if mask.sizes["family"] == "gpt2":
        options.setdefault("fan_in_fan_out", True)
    return LoraConfig(r=r, target_modules=modules, **options)


def shira_config(mask: Any, model: Any, **options: Any) -> "ShiraConfig":
    """SHiRA with exactly the entries of the mask's matrices, where PEFT allows it. Use it on this very `model.hf`.

    PEFT demands r·(inputs + outputs) entries with one r for every layer, in nn.Linear layers. That holds for q and o (`kv="freeze"`)
    when each layer has as many chosen heads and d_model equals heads x d_head. Anything else is a ValueError: use `restrict`.
    """
    from peft import ShiraConfig

    chosen = {name.removesuffix(".weight"): m for name, m in mask.tensors().items() if m.dim() == 2}
    layers = {name: model.base.get_submodule(name) for name in chosen}
    ranks = {name: int(chosen[name].sum()) / sum(chosen[name].shape) for name in chosen}
    fits = len(set(ranks.values())) == 1 and all(rank == int(rank) for rank in ranks.values())
    if not fits or not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        shown = ", ".join(f"{name} r={rank:g}" for name, rank in list(ranks.items())[:3])
        raise ValueError(
            f"SHiRA needs nn.Linear layers with one whole r ({shown}); use kv='freeze' and equal heads per layer, or restrict"
        )
    entries = {id(layer): chosen[name] for name, layer in layers.items()}
    config = ShiraConfig(r=int(next(iter(ranks.values()))), target_modules=sorted(chosen), **options)
    config.mask_fn = lambda layer, r, **_: entries[id(layer)].to(layer.weight)
    return config


def adapter_slices(peft_model: nn.Module, slices: Sequence[Slice]) -> list[Slice]:
    """The slices of adapter parameters that belong to slices of base weights; zeroes lora_A outside the chosen columns.

    Raises ValueError when no adapter sits on the mask's layers, or an active adapter sits on a layer outside the mask.
    """
    base = unwrap(peft_model)
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}
    wanted: dict[str, list[Slice]] = {}
    for entry in slices:
        wanted.setdefault(entry.parameter.removesuffix(".weight"), []).append(entry)
    missing = [name for name in layers if name not in wanted]
    if missing or not layers:
        where = f"adapters on {', '.join(missing[:3])}" if missing else "no LoRA layer"
        raise ValueError(f"the PEFT model has {where}, the mask does not; build it with mask.lora_config(r=8)")
    prefix = next(name for name, module in peft_model.named_modules() if module is base)
    found: list[Slice] = []
    for name, module in layers.items():
        for adapter in module.active_adapters:  # type: ignore[union-attr]
            a, b = (getattr(module, part)[adapter].weight for part in ("lora_A", "lora_B"))
            names = [f"{prefix}.{name}.lora_{part}.{adapter}.weight" for part in "AB"]
            found += _of_layer(names, a, b, wanted[name], isinstance(module.base_layer, nn.Linear))  # type: ignore[union-attr]
    return found


def _of_layer(names: list[str], a: nn.Parameter, b: nn.Parameter, entries: list[Slice], linear: bool) -> list[Slice]:
    outputs = entries[0].dim == (0 if linear else 1)
    if outputs:
        return [Slice(names[0], 0, 0, a.shape[0]), *(Slice(names[1], 0, entry.start, entry.stop) for entry in entries)]
    keep = torch.zeros(a.shape[1], dtype=torch.bool, device=a.device)
    for entry in entries:
        keep[entry.start : entry.stop] = True
    with torch.no_grad():
        a[:, ~keep] = 0
    return [Slice(names[1], 0, 0, b.shape[0]), *(Slice(names[0], 1, entry.start, entry.stop) for entry in entries)]

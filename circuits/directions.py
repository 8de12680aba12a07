"""What an objective asks of each weight: gradients of a loss, a task vector (fine-tuned minus base), or a LoRA adapter's factors.

Everything becomes {parameter name: matrix}; adapters stay factors (left [out, r], right [r, in]) and are never multiplied out.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .anatomy import unwrap

Directions = dict[str, Tensor | tuple[Tensor, Tensor]]


def directions(source: Any, model: Any = None, retain_graph: bool = False) -> Directions:
    """Read one objective.

    source: a scalar loss or a function that returns one (needs `model`); {name: gradient or task vector}; {name: (left, right)};
    a PEFT model or adapter directory; a fine-tuned model or checkpoint directory (needs `model`, the base to subtract).
    """
    hf = getattr(model, "hf", model)
    if isinstance(source, Tensor) or (
        callable(source) and not isinstance(source, nn.Module) and not hasattr(source, "hf")
    ):
        return gradients(source, hf, retain_graph)
    if isinstance(source, Mapping):
        return _checked(dict(source))
    source = getattr(source, "hf", source)
    if hasattr(source, "peft_config"):
        return lora_factors(source)
    if isinstance(source, nn.Module):
        return task_vector(source.state_dict(), _weights_of(hf, "a fine-tuned model"))
    if isinstance(source, str | Path):
        if (Path(source) / "adapter_config.json").is_file():
            return lora_factors(source)
        return task_vector(read_weights(source), _weights_of(hf, "a checkpoint"))
    raise TypeError(
        f"cannot read an objective from {type(source).__name__}; expected a loss, gradients, a checkpoint or an adapter"
    )


def gradients(loss: Tensor | Callable[..., Any], hf: Any, retain_graph: bool = False) -> Directions:
    """Gradients with respect to every trainable parameter that the loss reaches; `.grad` is left alone."""
    if not isinstance(hf, nn.Module):
        raise ValueError("a loss is measured on its model: pass model= as well")
    names = {p: name for name, p in hf.named_parameters() if p.requires_grad}
    value = loss if isinstance(loss, Tensor) else loss()
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"expected a scalar loss with a graph, got {getattr(value, 'shape', type(value).__name__)}; do not detach it"
        )
    found = torch.autograd.grad(value, list(names), allow_unused=True, retain_graph=retain_graph)
    reached: Directions = {name: g for name, g in zip(names.values(), found, strict=True) if g is not None}
    if not reached:
        raise ValueError(
            "the loss depends on no trainable parameter of this model; compute it with the model that is passed"
        )
    return reached


def task_vector(finetuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Directions:
    """Fine-tuned minus base, floating point parameters only, in float32."""
    shared = [name for name in finetuned if name in base and finetuned[name].is_floating_point()]
    if not shared:
        some = ", ".join(list(finetuned)[:2])
        raise ValueError(
            f"checkpoint and base share no parameter name (the checkpoint has {some}, ...); compare one architecture"
        )
    for name in shared:
        if finetuned[name].shape != base[name].shape:
            shapes = f"{tuple(finetuned[name].shape)} in the checkpoint, {tuple(base[name].shape)} in the base"
            raise ValueError(f"{name} has shape {shapes}; a task vector needs checkpoints of one shape")
    return _checked(
        {
            name: finetuned[name].detach().float() - base[name].detach().float().to(finetuned[name].device)
            for name in shared
        }
    )


def lora_factors(source: Any) -> Directions:
    """{base parameter name: (scaling * B, A)} of a PEFT model's active adapter or of a saved adapter directory."""
    if isinstance(source, nn.Module):
        found = {}
        for path, module in source.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            for adapter in [a for a in module.active_adapters if a in module.lora_A][:1]:  # type: ignore[union-attr, operator]
                left = module.lora_B[adapter].weight.detach() * module.scaling[adapter]  # type: ignore[index, union-attr]
                found[canonical(f"{path}.weight")] = (left, module.lora_A[adapter].weight.detach())  # type: ignore[index, union-attr]
        if not found:
            raise ValueError("the PEFT model has no active LoRA adapter on a linear layer")
        return _checked(found)
    config, weights = files.read_json(Path(source) / "adapter_config.json"), read_weights(source)
    factors = {}
    for name, left in weights.items():
        if not name.endswith("lora_B.weight"):
            continue
        module = canonical(name.removesuffix(".lora_B.weight"))
        right = weights[name.replace("lora_B", "lora_A")]
        rank = right.shape[0]
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        factors[f"{module}.weight"] = (
            left.float() * alpha / (rank**0.5 if config.get("use_rslora") else rank),
            right.float(),
        )
    if not factors:
        raise ValueError(f"{str(source)!r} holds no LoRA matrices; expected an adapter written by PEFT")
    return _checked(factors)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a directory (or file) of safetensors; pickled checkpoints are refused."""
    from safetensors.torch import load_file

    path = Path(path)
    found = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"no safetensors in {str(path)!r}; expected a directory written by save_pretrained")
    return {name: tensor for file in found for name, tensor in load_file(file).items()}


def canonical(name: str) -> str:
    """The base model's name for a parameter inside a PEFT model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _weights_of(hf: Any, what: str) -> Mapping[str, Tensor]:
    if isinstance(hf, nn.Module):
        return {canonical(name): tensor for name, tensor in unwrap(hf).state_dict().items()}
    raise ValueError(f"{what} is compared with its base: pass model= as well, or give the difference as a dictionary")


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float | int) -> float | int:
    return next((v for key, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?{key}", module)), default)


def _checked(found: Directions) -> Directions:
    for name, value in found.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f"{name} is {type(value).__name__}; expected a tensor or a pair of LoRA factors (left, right)"
            )
        if len(parts) == 2 and (parts[0].ndim != 2 or parts[1].ndim != 2 or parts[0].shape[1] != parts[1].shape[0]):
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"{name}: factors of shape {shapes} do not multiply; expected [out, r] and [r, in]")
        if not all(part.isfinite().all() for part in parts if part.is_floating_point()):
            raise ValueError(f"{name} holds NaN or infinity; check the loss or the checkpoint")
    return found

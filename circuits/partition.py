"""Which parts of a model count as one matrix: whole projections, or the slices of a head or a group of heads.

Matrices are read as [out, in] whatever the layer stores (GPT-2's Conv1D keeps [in, out]), and a fused q/k/v weight is three
matrices. A head owns rows of q, k and v and columns of o; under grouped-query attention k and v have fewer, shared, heads.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .anatomy import Anatomy, unwrap

Role = Literal["q", "k", "v", "o", "mlp", "other"]


@dataclass(frozen=True, eq=False, repr=False)
class Block:
    """A sub-matrix of one parameter. `rows` and `columns` index the [out, in] reading of it."""

    name: str
    parameter: str
    transposed: bool = False
    rows: slice | Int[Tensor, " row"] = field(default_factory=lambda: slice(None))
    columns: slice | Int[Tensor, " column"] = field(default_factory=lambda: slice(None))
    layer: int | None = None
    role: Role = "other"
    # Query heads that the block serves (all heads of the groups, for k and v); empty when it is a whole matrix.
    heads: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Block({self.name})"

    @property
    def module(self) -> str:
        return "attn" if self.role in ("q", "k", "v", "o") else self.role

    def take(self, value: Any) -> Any:
        """The block of a parameter-shaped tensor, or of its factors (left [out, r], right [r, in])."""
        if isinstance(value, tuple):
            return value[0][self.rows], value[1][:, self.columns]
        return (value.mT if self.transposed else value)[self.rows][:, self.columns]

    def add_(
        self, target: Float[Tensor, "first second"], update: Float[Tensor, "row column"], alpha: float | int
    ) -> None:
        """target[block] += alpha * update, in place."""
        view = target.mT if self.transposed else target
        if isinstance(self.rows, slice) and isinstance(self.columns, slice):
            view[self.rows, self.columns].add_(update.to(view), alpha=alpha)
            return
        rows, columns = (
            _indices(at, size, target.device) for at, size in zip((self.rows, self.columns), view.shape, strict=True)
        )
        view[rows[:, None], columns[None, :]] += alpha * update.to(view)

    def restricted(self, mask: Bool[Tensor, "first second"]) -> "Block | None":
        """The smallest sub-matrix that holds every True entry of the block; None when there is none."""
        view = mask.mT if self.transposed else mask
        rows, columns = (
            _indices(at, size, mask.device) for at, size in zip((self.rows, self.columns), view.shape, strict=True)
        )
        active = view[rows][:, columns]
        if active.all():
            return self
        if not active.any():
            return None
        return replace(self, rows=rows[active.any(1)], columns=columns[active.any(0)])


def partition(hf: nn.Module, heads_per_block: int | None = None) -> list[Block]:
    """Every linear weight inside the model as blocks: whole matrices (None), or attention cut into groups of heads.

    Embeddings, the output head and classifier heads are not listed, nor are parameters tied to them.
    """
    outside = _outside(hf)
    found: dict[str, Block] = {}
    for path, module in hf.named_modules():
        conv1d = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or conv1d) or id(module.weight) in outside:
            continue
        name = f"{path}.weight" if path else "weight"
        found[name] = Block(name, name, transposed=conv1d, layer=layer_of(name))
    anatomy = _anatomy(hf, required=heads_per_block is not None)
    if anatomy is None:
        return list(found.values())
    if heads_per_block is not None and not 1 <= heads_per_block <= anatomy.n_heads:
        raise ValueError(
            f"{heads_per_block} heads per block, but this model has {anatomy.n_heads} heads; choose 1 to {anatomy.n_heads}"
        )
    prefix = _prefix(hf)
    for layer in range(anatomy.n_layers):
        for name in _weight_names(anatomy, layer, prefix):
            if name in found:
                template = found.pop(name)
                found |= {b.name: b for b in _attention(template, anatomy, layer, heads_per_block, prefix)}
        inside = f"{prefix}{anatomy.name(layer, 'block')}."
        rest = (n for n, b in found.items() if n.startswith(inside) and b.role == "other")
        found |= {n: replace(found[n], layer=layer, role="mlp") for n in list(rest)}
    return list(found.values())


def _attention(template: Block, anatomy: Anatomy, layer: int, size: int | None, prefix: str) -> list[Block]:
    """The q, k, v or o blocks that live in one weight."""
    roles = _weight_names(anatomy, layer, prefix)[template.parameter]
    blocks = []
    for role in roles:
        total = anatomy.n_kv_heads if role in ("k", "v") else anatomy.n_heads
        step = min(size or total, total)
        for start in range(0, total, step):
            members = range(start, min(start + step, total))
            served = tuple(
                h for h in range(anatomy.n_heads) if (anatomy.kv_head(h) if role in ("k", "v") else h) in members
            )
            block = replace(template, layer=layer, role=role, heads=served if size else ())
            ranges = [
                anatomy.qkv_range(h, role)
                if role in ("q", "k", "v")
                else (h * anatomy.d_head, (h + 1) * anatomy.d_head)
                for h in members
            ]
            where = _joined(ranges)
            block = replace(block, columns=where) if role == "o" else replace(block, rows=where)
            suffix = (f":{role}" if len(roles) > 1 else "") + (f":h{members[0]}-{members[-1]}" if size else "")
            blocks.append(replace(block, name=template.name + suffix))
    return blocks


def _weight_names(anatomy: Anatomy, layer: int, prefix: str) -> dict[str, tuple[Role, ...]]:
    """Weights of a layer's attention and the roles they hold; PEFT keeps the original weight in a `base_layer`."""
    found: dict[str, tuple[Role, ...]] = {}
    for role in ("q", "k", "v", "o"):
        for suffix in ("weight", "base_layer.weight"):
            name = f"{prefix}{anatomy.name(layer, role)}.{suffix}"
            found[name] = (*found.get(name, ()), role)
    return found


def named_blocks(names: list[str]) -> list[Block]:
    """Whole matrices by name alone, for gradients or checkpoints that come without their model."""
    roles: dict[str, Role] = {"attn|attention": "o", "mlp|feed_forward|ffn": "mlp", "": "other"}

    def role(name: str) -> Role:
        return next(role for pattern, role in roles.items() if re.search(pattern, name))

    return [Block(name, name, layer=layer_of(name), role=role(name)) for name in names]


def layer_of(name: str) -> int | None:
    """The first number between dots: `model.layers.3.mlp.up_proj.weight` is layer 3."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


def _outside(hf: nn.Module) -> set[int]:
    """Ids of weights that are read or written in vocabulary or label space."""
    inner = unwrap(hf)
    ids = {id(m.weight) for m in hf.modules() if isinstance(m, nn.Embedding)}
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    for module in (head, getattr(inner, "score", None), getattr(inner, "classifier", None)):
        if isinstance(module, nn.Linear):
            ids.add(id(module.weight))
    return ids


def _anatomy(hf: nn.Module, required: bool) -> Anatomy | None:
    try:
        if not hasattr(unwrap(hf), "config"):
            raise ValueError(f"{type(hf).__name__} has no configuration; heads are known only for Hugging Face models")
        return Anatomy.of(hf, "causal")
    except ValueError:
        if required:
            raise
        return None


def _prefix(hf: nn.Module) -> str:
    """What PEFT puts before the model's own parameter names."""
    inner = unwrap(hf)
    return next(f"{name}." if name else "" for name, module in hf.named_modules() if module is inner)


def _joined(ranges: list[tuple[int, int]]) -> slice | Int[Tensor, " index"]:
    if all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(*r) for r in ranges])


def _indices(at: slice | Tensor, size: int, device: torch.device) -> Int[Tensor, " index"]:
    return torch.arange(size, device=device)[at] if isinstance(at, slice) else at.to(device)

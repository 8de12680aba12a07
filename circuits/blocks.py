"""A model as plain data: weights, norms and scalings of every block, in the order they are applied.

One `Block` covers pre-norm, post-norm (BERT), norms on the branches (Gemma 2/3), parallel branches (GPT-NeoX), gated MLPs,
grouped-query attention, query/key norms, rotary angles, score soft-caps and sliding windows; what is absent is None. `families`
reads it from a Hugging Face model, `streams` walks through it, `trace` checks it against the model's own forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Affine(NamedTuple):
    """W x + b with W as [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def rows(self, index: slice | Tensor) -> "Affine":
        return Affine(self.weight[index], None if self.bias is None else self.bias[index])


class Norm(NamedTuple):
    """LayerNorm (`centred`) or RMSNorm; `weight` already holds Gemma's 1 + w. Computed in float32 as the models do."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        x = x.float() if x.dtype.itemsize < 4 else x
        variance = x.var(-1, keepdim=True, correction=0) if self.centred else x.pow(2).mean(-1, keepdim=True)
        return torch.rsqrt(variance + self.eps)

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        if self.centred:
            return functional.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias, self.eps)
        return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class Block:
    """One transformer block. `norm_in` and `norm_mlp` come before a branch, `norm_attn` and `norm_down` end a branch,
    `norm_mid` and `norm_end` act on the residual stream itself after a branch was added."""

    q: Affine
    k: Affine
    v: Affine
    o: Affine
    up: Affine
    down: Affine
    act: Callable[[Tensor], Tensor]
    d_head: int
    scaling: float
    gate: Affine | None = None
    norm_in: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_attn: Norm | None = None
    norm_mid: Norm | None = None
    norm_mlp: Norm | None = None
    norm_down: Norm | None = None
    norm_end: Norm | None = None
    parallel: bool = False
    causal: bool = True
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Unembedding:
    """Final norm or the head's own dense layer, then the linear map to logits, then a soft cap."""

    out: Affine
    norm: Norm | None = None
    dense: Affine | None = None
    act: Callable[[Tensor], Tensor] | None = None
    dense_norm: Norm | None = None
    softcap: float | None = None
    first_token: bool = False  # BERT classifiers read position 0, whatever position is asked for


@dataclass(frozen=True)
class Program:
    """The whole model as data, with the modules it was read from (to run and to compare with)."""

    blocks: list[Block]
    unembedding: Unembedding
    base: nn.Module
    modules: list[nn.Module]

    @property
    def causal(self) -> bool:
        return all(block.causal for block in self.blocks)

    @property
    def n_heads(self) -> int:
        return self.blocks[0].q.weight.shape[0] // self.blocks[0].d_head

"""How each family computes, block by block, as plain data: weights, norms, scalings, in the order they are applied.

1. `read` turns a Hugging Face model into a `Program`: a list of `Block` and one `Unembedding`. Weights are views, not copies
   (GPT-NeoX's interleaved q/k/v apart), adapters are added in, and the program is read anew for every call: it cannot go stale.
2. One `Block` covers pre-norm, post-norm (BERT), norms on the branches (Gemma 2/3), parallel branches (GPT-NeoX), gated
   MLPs, grouped-query attention, query/key norms, rotary angles, score soft-caps and sliding windows. What is absent is None.
3. `Program.trace` runs the model's own forward once and keeps each block's input and rotary angles; the explicit program is
   compared with them, so an architecture that computes something else is refused and not silently decomposed wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .anatomy import unwrap


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


def affine(module: nn.Module) -> Affine:
    """Weight and bias of nn.Linear or Conv1D, with the active LoRA adapters of a PEFT layer added."""
    if hasattr(module, "get_base_layer"):
        base = affine(module.get_base_layer())  # type: ignore[operator]
        if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
            return base
        weight = base.weight
        for name in module.active_adapters:  # type: ignore[union-attr]
            if name in getattr(module, "lora_A", {}):
                delta = module.get_delta_weight(name)  # type: ignore[operator]
                weight = weight + (delta if delta.shape == weight.shape else delta.T)
        return Affine(weight, base.bias)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return Affine(weight.T if type(module).__name__ == "Conv1D" else weight, module.bias)  # type: ignore[arg-type]


def norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapter]  # type: ignore[index]
    assert module is not None
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.LayerNorm):
        return Norm(weight, module.bias, module.eps, centred=True)
    # Gemma stores w and multiplies by 1 + w, in float32.
    weight = 1.0 + weight.float() if "Gemma" in type(module).__name__ else weight
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(weight, None, float(eps), centred=False)  # type: ignore[arg-type]


def read(hf: nn.Module) -> Program:
    """The program of a Hugging Face model (or of a PEFT wrapper around one). ValueError for families not known here."""
    hf = unwrap(hf)
    base: nn.Module = hf.base_model  # type: ignore[assignment]
    for fits, reader in READERS:
        if fits(base):
            modules, blocks, final = reader(base)
            return Program(blocks, _unembedding(hf, final), base, modules)
    raise ValueError(
        f"{type(hf).__name__} cannot be decomposed: its blocks are not laid out like Llama's, GPT-2's, GPT-NeoX's or BERT's; "
        "use ablation(), which needs only hooks"
    )


# ---- one reader per layout: modules -> blocks, final norm ----------------------------------------------------------

Read = tuple[list[nn.Module], list[Block], Norm | None]


def _like_llama(base: nn.Module) -> Read:
    config = base.config
    modules = list(base.layers)  # type: ignore[arg-type]
    return modules, [_llama_block(module, config) for module in modules], norm(base.norm)  # type: ignore[arg-type]


def _llama_block(module, config) -> Block:
    attention, mlp = module.self_attn, module.mlp
    sandwich = hasattr(module, "pre_feedforward_layernorm")  # Gemma 2/3: a norm before and after each branch
    window = getattr(attention, "sliding_window", None if hasattr(attention, "layer_type") else _window(config))
    q, k, v, gate, up = _projections(attention, mlp)
    return Block(
        q=q,
        k=k,
        v=v,
        o=affine(attention.o_proj),
        gate=gate,
        up=up,
        down=affine(mlp.down_proj),
        act=mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn,
        d_head=attention.head_dim,
        scaling=attention.scaling,
        norm_in=norm(module.input_layernorm),
        q_norm=norm(getattr(attention, "q_norm", None)),
        k_norm=norm(getattr(attention, "k_norm", None)),
        norm_attn=norm(module.post_attention_layernorm) if sandwich else None,
        norm_mlp=norm(module.pre_feedforward_layernorm if sandwich else module.post_attention_layernorm),
        norm_down=norm(module.post_feedforward_layernorm) if sandwich else None,
        causal=getattr(attention, "is_causal", True),
        # Gemma 3 keeps the option in its configuration but its attention never applies it.
        softcap=getattr(config, "attn_logit_softcapping", None) if config.model_type == "gemma2" else None,
        window=window,
    )


def _projections(attention, mlp) -> tuple[Affine, ...]:
    """q, k, v, gate and up; Phi-3 stacks them in two modules."""
    if hasattr(attention, "q_proj"):
        separate = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        return tuple(affine(module) for module in separate)
    qkv, gate_up = affine(attention.qkv_proj), affine(mlp.gate_up_proj)
    ends = [attention.config.num_attention_heads * attention.head_dim]
    ends.append(ends[0] + attention.config.num_key_value_heads * attention.head_dim)
    slices = (slice(0, ends[0]), slice(*ends), slice(ends[1], None))
    return (*(qkv.rows(part) for part in slices), *_split(gate_up, 2))


def _window(config) -> int | None:
    return getattr(config, "sliding_window", None) if config.model_type in ("mistral", "phi3") else None


def _like_gpt2(base: nn.Module) -> Read:
    modules = list(base.h)  # type: ignore[arg-type]
    blocks = []
    for module in modules:
        attention, mlp = module.attn, module.mlp  # type: ignore[union-attr]
        q, k, v = _split(affine(attention.c_attn), 3)
        blocks.append(
            Block(
                q, k, v,
                o=affine(attention.c_proj), up=affine(mlp.c_fc), down=affine(mlp.c_proj), act=mlp.act,
                d_head=attention.head_dim, scaling=attention.scaling,
                norm_in=norm(module.ln_1), norm_mlp=norm(module.ln_2),  # type: ignore[arg-type]
            )
        )  # fmt: skip
    return modules, blocks, norm(base.ln_f)  # type: ignore[arg-type]


def _split(fused: Affine, parts: int) -> list[Affine]:
    size = fused.weight.shape[0] // parts
    return [fused.rows(slice(i * size, (i + 1) * size)) for i in range(parts)]


def _like_neox(base: nn.Module) -> Read:
    modules = list(base.layers)  # type: ignore[arg-type]
    blocks = []
    for module in modules:
        attention, mlp = module.attention, module.mlp  # type: ignore[union-attr]
        q, k, v = _deinterleave(affine(attention.query_key_value), attention.head_size)
        blocks.append(
            Block(
                q, k, v,
                o=affine(attention.dense), up=affine(mlp.dense_h_to_4h), down=affine(mlp.dense_4h_to_h), act=mlp.act,
                d_head=attention.head_size, scaling=attention.scaling, parallel=bool(module.use_parallel_residual),
                norm_in=norm(module.input_layernorm), norm_mlp=norm(module.post_attention_layernorm),  # type: ignore[arg-type]
            )
        )  # fmt: skip
    return modules, blocks, norm(base.final_layer_norm)  # type: ignore[arg-type]


def _deinterleave(fused: Affine, d_head: int) -> list[Affine]:
    """GPT-NeoX stores [q k v] head by head."""
    weight = fused.weight.unflatten(0, (-1, 3, d_head))
    bias = None if fused.bias is None else fused.bias.unflatten(0, (-1, 3, d_head))
    return [Affine(weight[:, i].flatten(0, 1), None if bias is None else bias[:, i].flatten()) for i in range(3)]


def _like_bert(base: nn.Module) -> Read:
    modules = list(base.encoder.layer)  # type: ignore[union-attr,arg-type]
    blocks = []
    for module in modules:
        attention, out = module.attention.self, module.attention.output  # type: ignore[union-attr]
        inner, outer = module.intermediate, module.output  # type: ignore[union-attr]
        blocks.append(
            Block(
                affine(attention.query), affine(attention.key), affine(attention.value), affine(out.dense),  # type: ignore[union-attr]
                up=affine(inner.dense), down=affine(outer.dense), act=inner.intermediate_act_fn,  # type: ignore[union-attr]
                d_head=attention.attention_head_size, scaling=attention.scaling, causal=attention.is_causal,  # type: ignore[union-attr]
                norm_mid=norm(out.LayerNorm), norm_end=norm(outer.LayerNorm),  # type: ignore[union-attr]
            )
        )  # fmt: skip
    return modules, blocks, None


def _unembedding(hf: nn.Module, final: Norm | None) -> Unembedding:
    if hasattr(hf, "score"):  # decoder with a classification head
        return Unembedding(affine(hf.score), final)  # type: ignore[arg-type]
    if hasattr(hf, "classifier"):  # BERT: pooler, then classifier
        pooler = hf.base_model.pooler
        return Unembedding(affine(hf.classifier), dense=affine(pooler.dense), act=torch.tanh, first_token=True)  # type: ignore[union-attr,arg-type]
    if hasattr(hf, "cls"):  # BERT masked language model
        transform = hf.cls.predictions.transform  # type: ignore[union-attr]
        dense, act = affine(transform.dense), transform.transform_act_fn  # type: ignore[union-attr,arg-type]
        out = affine(hf.cls.predictions.decoder)  # type: ignore[union-attr,arg-type]
        return Unembedding(out, dense=dense, act=act, dense_norm=norm(transform.LayerNorm))  # type: ignore[union-attr,arg-type]
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return Unembedding(affine(hf.get_output_embeddings()), final, softcap=cap)  # type: ignore[operator]


READERS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Read]]] = [
    (lambda base: hasattr(base, "h") and hasattr(base, "ln_f") and hasattr(base.h[0].attn, "c_attn"), _like_gpt2),  # type: ignore[index]
    (lambda base: hasattr(base, "final_layer_norm") and hasattr(base.layers[0], "attention"), _like_neox),  # type: ignore[index]
    (lambda base: hasattr(base, "encoder") and hasattr(base.encoder, "layer"), _like_bert),
    (
        lambda base: (
            hasattr(base, "layers")
            and hasattr(base, "norm")
            and hasattr(getattr(base.layers[0], "self_attn", None), "o_proj")  # type: ignore[index]
            and hasattr(getattr(base.layers[0], "mlp", None), "down_proj")  # type: ignore[index]
        ),
        _like_llama,
    ),
]

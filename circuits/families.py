"""How each Hugging Face family lays out its blocks: modules in, `blocks.Program` out.

1. `read` picks the first layout that fits (GPT-2, GPT-NeoX, BERT, Llama's names) and reads every block and the head.
2. Weights are views, not copies (GPT-NeoX's interleaved q/k/v apart), the active LoRA adapters are added in.
3. A program is read anew for every call, so it cannot go stale while a model trains.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .anatomy import unwrap
from .blocks import Affine, Block, Norm, Program, Unembedding


def affine(module: Any) -> Affine:
    """Weight and bias of nn.Linear or Conv1D, with the active LoRA adapters of a PEFT layer added."""
    if hasattr(module, "get_base_layer"):
        inner: Any = module.get_base_layer()
        weight, bias = affine(inner)
        if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
            return Affine(weight, bias)
        for name in module.active_adapters:
            if name in getattr(module, "lora_A", {}):
                delta = module.get_delta_weight(name)
                weight = weight + (delta.T if type(inner).__name__ == "Conv1D" else delta)
        return Affine(weight, bias)
    weight: Tensor = module.weight
    return Affine(weight.T if type(module).__name__ == "Conv1D" else weight, module.bias)


def norm(module: Any) -> Norm | None:
    if module is None:
        return None
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapter]
    weight: Tensor = module.weight
    if isinstance(module, nn.LayerNorm):
        return Norm(weight, module.bias, module.eps, centred=True)
    # Gemma stores w and multiplies by 1 + w, in float32.
    weight = 1.0 + weight.float() if "Gemma" in type(module).__name__ else weight
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(weight, None, float(eps), centred=False)


def activation(module: Any) -> Callable[[Tensor], Tensor]:
    """The module, or the same function in one pass: transformers spells GPT-2's GELU out in seven."""
    if type(module).__name__ == "NewGELUActivation":
        return partial(functional.gelu, approximate="tanh")
    return module


def read(hf: Any) -> Program:
    """The program of a Hugging Face model (or of a PEFT wrapper around one). ValueError for families not known here."""
    hf = unwrap(hf)
    base: Any = hf.base_model
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


def _like_llama(base: Any) -> Read:
    config = base.config
    modules = list(base.layers)
    return modules, [_llama_block(module, config) for module in modules], norm(base.norm)


def _llama_block(module: Any, config: Any) -> Block:
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
        act=activation(mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn),
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


def _like_gpt2(base: Any) -> Read:
    modules = list(base.h)
    blocks = []
    for module in modules:
        attention, mlp = module.attn, module.mlp
        q, k, v = _split(affine(attention.c_attn), 3)
        blocks.append(
            Block(
                q, k, v,
                o=affine(attention.c_proj), up=affine(mlp.c_fc), down=affine(mlp.c_proj), act=activation(mlp.act),
                d_head=attention.head_dim, scaling=attention.scaling,
                norm_in=norm(module.ln_1), norm_mlp=norm(module.ln_2),
            )
        )  # fmt: skip
    return modules, blocks, norm(base.ln_f)


def _split(fused: Affine, parts: int) -> list[Affine]:
    size = fused.weight.shape[0] // parts
    return [fused.rows(slice(i * size, (i + 1) * size)) for i in range(parts)]


def _like_neox(base: Any) -> Read:
    modules = list(base.layers)
    blocks = []
    for module in modules:
        attention, mlp = module.attention, module.mlp
        q, k, v = _deinterleave(affine(attention.query_key_value), attention.head_size)
        blocks.append(
            Block(
                q, k, v,
                o=affine(attention.dense), up=affine(mlp.dense_h_to_4h), down=affine(mlp.dense_4h_to_h), act=activation(mlp.act),
                d_head=attention.head_size, scaling=attention.scaling, parallel=bool(module.use_parallel_residual),
                norm_in=norm(module.input_layernorm), norm_mlp=norm(module.post_attention_layernorm),
            )
        )  # fmt: skip
    return modules, blocks, norm(base.final_layer_norm)


def _deinterleave(fused: Affine, d_head: int) -> list[Affine]:
    """GPT-NeoX stores [q k v] head by head."""
    weight = fused.weight.unflatten(0, (-1, 3, d_head))
    bias = None if fused.bias is None else fused.bias.unflatten(0, (-1, 3, d_head))
    return [Affine(weight[:, i].flatten(0, 1), None if bias is None else bias[:, i].flatten()) for i in range(3)]


def _like_bert(base: Any) -> Read:
    modules = list(base.encoder.layer)
    blocks = []
    for module in modules:
        attention, out = module.attention.self, module.attention.output
        inner, outer = module.intermediate, module.output
        blocks.append(
            Block(
                affine(attention.query), affine(attention.key), affine(attention.value), affine(out.dense),
                up=affine(inner.dense), down=affine(outer.dense), act=activation(inner.intermediate_act_fn),
                d_head=attention.attention_head_size, scaling=attention.scaling, causal=attention.is_causal,
                norm_mid=norm(out.LayerNorm), norm_end=norm(outer.LayerNorm),
            )
        )  # fmt: skip
    return modules, blocks, None


def _unembedding(hf: Any, final: Norm | None) -> Unembedding:
    for name in ("logits_scaling", "logit_scale"):
        if getattr(hf.config, name, 1) not in (None, 1):
            raise ValueError(f"{type(hf).__name__} scales its logits ({name}), which is not known here; use ablation()")
    if hasattr(hf, "score"):  # decoder with a classification head
        return Unembedding(affine(hf.score), final)
    if hasattr(hf, "classifier"):  # BERT: pooler, then classifier
        pooler = hf.base_model.pooler
        return Unembedding(affine(hf.classifier), dense=affine(pooler.dense), act=torch.tanh, first_token=True)
    if hasattr(hf, "cls"):  # BERT masked language model
        transform = hf.cls.predictions.transform
        dense, act = affine(transform.dense), transform.transform_act_fn
        out = affine(hf.cls.predictions.decoder)
        return Unembedding(out, dense=dense, act=act, dense_norm=norm(transform.LayerNorm))
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return Unembedding(affine(hf.get_output_embeddings()), final, softcap=cap)


READERS: list[tuple[Callable[[Any], bool], Callable[[Any], Read]]] = [
    (lambda base: hasattr(base, "h") and hasattr(base, "ln_f") and hasattr(base.h[0].attn, "c_attn"), _like_gpt2),
    (lambda base: hasattr(base, "final_layer_norm") and hasattr(base.layers[0], "attention"), _like_neox),
    (lambda base: hasattr(base, "encoder") and hasattr(base.encoder, "layer"), _like_bert),
    (
        lambda base: (
            hasattr(base, "layers")
            and hasattr(base, "norm")
            and hasattr(getattr(base.layers[0], "self_attn", None), "o_proj")
            and hasattr(getattr(base.layers[0], "mlp", None), "down_proj")
        ),
        _like_llama,
    ),
]

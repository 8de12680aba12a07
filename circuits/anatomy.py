"""Heads to parameters: which rows and columns of which weight belong to a head, on every supported family.

A `Layout` says, in module names, where a family keeps its parts; `Anatomy` combines it with the sizes of one model.
Families with the Llama names (Llama, Mistral, Qwen2/3, Gemma 1-3, Phi-3, and most others) need no entry of their own.
Under grouped-query attention a key/value head serves `n_heads / n_kv_heads` query heads; `kv=` says who owns it:
  shared       the K/V rows belong to every head of the group (a list may name them twice; masks count them once)
  whole-group  the K/V rows belong to the circuit only when all heads of the group are in it (decided in `HeadMask`)
  freeze       K/V rows belong to no head
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .heads import Head

KV = Literal["shared", "whole-group", "freeze"]
Part = Literal["block", "attention", "q", "k", "v", "qkv", "o", "mlp"]


class Slice(NamedTuple):
    """`parameter.narrow(dim, start, stop - start)` in the Hugging Face model."""

    parameter: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its parts. Names are relative to a block, `blocks` to the model."""

    blocks: str
    q: str
    k: str
    v: str
    o: str
    attention: str
    mlp: str
    # How q, k and v share one weight: "" separate, "stacked" [q; k; v], "interleaved" [q k v] per head (NeoX).
    fused: Literal["", "stacked", "interleaved"] = ""
    # GPT-2's Conv1D keeps weights as [in, out]; nn.Linear as [out, in].
    transposed: bool = False


LAYOUTS = (
    # Llama's names, which most families share.
    Layout(
        blocks="model.layers", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
        o="self_attn.o_proj", attention="self_attn", mlp="mlp",
    ),
    # Phi-3
    Layout(
        blocks="model.layers", q="self_attn.qkv_proj", k="self_attn.qkv_proj", v="self_attn.qkv_proj",
        o="self_attn.o_proj", attention="self_attn", mlp="mlp", fused="stacked",
    ),
    # GPT-2
    Layout(
        blocks="transformer.h", q="attn.c_attn", k="attn.c_attn", v="attn.c_attn",
        o="attn.c_proj", attention="attn", mlp="mlp", fused="stacked", transposed=True,
    ),
    # GPT-NeoX, Pythia
    Layout(
        blocks="gpt_neox.layers", q="attention.query_key_value", k="attention.query_key_value", v="attention.query_key_value",
        o="attention.dense", attention="attention", mlp="mlp", fused="interleaved",
    ),
    # BERT
    Layout(
        blocks="bert.encoder.layer", q="attention.self.query", k="attention.self.key", v="attention.self.value",
        o="attention.output.dense", attention="attention", mlp="output.dense",
    ),
)  # fmt: skip


def unwrap(hf: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT wrapper; any other model itself."""
    inner = getattr(hf, "get_base_model", None)
    return inner() if inner is not None and hasattr(hf, "peft_config") else hf


def layout_of(hf: nn.Module) -> Layout:
    """The first layout whose modules all exist in block 0. Raises ValueError that names what was looked for."""
    names = {name for name, _ in unwrap(hf).named_modules()}
    for layout in LAYOUTS:
        parts = {layout.q, layout.k, layout.v, layout.o, layout.attention, layout.mlp}
        if all(f"{layout.blocks}.0.{part}" in names for part in parts):
            return layout
    tried = ", ".join(f"{layout.blocks}.0.{layout.q}" for layout in LAYOUTS)
    raise ValueError(
        f"{type(unwrap(hf)).__name__} has an attention layout that is not known here (looked for {tried}); "
        "supported: GPT-2, GPT-NeoX, BERT, and families with Llama's module names"
    )


@dataclass(frozen=True)
class Anatomy:
    """Sizes and layout of one model. `slices`, `norms`, `module` and `W_O` answer every question about heads and weights."""

    family: str
    kind: Literal["causal", "masked", "classifier"]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    layout: Layout
    # Names of all parameters: biases exist in some families only.
    parameters: tuple[str, ...]
    norm_parameters: tuple[str, ...]

    @classmethod
    def of(cls, hf: nn.Module, kind: Literal["causal", "masked", "classifier"]) -> "Anatomy":
        hf = unwrap(hf)
        config = hf.config.get_text_config()
        layout = layout_of(hf)
        heads = config.num_attention_heads
        norms = [
            f"{name}.{parameter}"
            for name, module in hf.named_modules()
            if type(module).__name__.endswith("Norm") or isinstance(module, nn.LayerNorm)
            for parameter, _ in module.named_parameters(recurse=False)
        ]
        anatomy = cls(
            family=config.model_type,
            kind=kind,
            n_layers=config.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            d_model=config.hidden_size,
            layout=layout,
            parameters=tuple(name.replace(".base_layer", "") for name, _ in hf.named_parameters()),
            norm_parameters=tuple(norms),
        )
        rows = anatomy.W_O(hf, 0).shape[:2]
        if tuple(rows) != (anatomy.n_heads, anatomy.d_head):
            raise ValueError(f"{type(hf).__name__}: o-projection does not split into {heads} heads of {anatomy.d_head}")
        return anatomy

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    def heads(self) -> list[Head]:
        return [Head(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def kv_head(self, head: int) -> int:
        """The key/value head that serves a query head."""
        return head // self.group

    def name(self, layer: int, part: Part) -> str:
        """The module name of a part of a block; q, k and v share one name in fused layouts."""
        block = f"{self.layout.blocks}.{layer}"
        part = "q" if part == "qkv" else part
        return block if part == "block" else f"{block}.{getattr(self.layout, part)}"

    def module(self, hf: nn.Module, layer: int, part: Part) -> nn.Module:
        """The module itself. `module(hf, l, "o")` is the one whose input is z, all heads side by side."""
        return unwrap(hf).get_submodule(self.name(layer, part))

    def qkv_range(self, head: int, which: Literal["q", "k", "v"]) -> tuple[int, int]:
        """Start and stop of a head among the outputs of its projection. For k and v, `head` is a key/value head."""
        size, start = self.d_head, head * self.d_head
        if self.layout.fused == "interleaved":
            start = (3 * head + "qkv".index(which)) * size
        elif self.layout.fused == "stacked":
            start += {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_kv_heads}[which] * size
        return start, start + size

    def slices(self, head: Head | tuple[int, int], kv: KV = "shared", biases: bool = True) -> list[Slice]:
        """What a head owns: its rows of q (and k, v), their biases, its columns of o. Raises ValueError for a head that is not there.

        `kv="whole-group"` returns the same as `"shared"` for one head: the group rule needs the whole circuit (`HeadMask`).
        The output bias belongs to no single head and is never included.
        """
        layer, index = head
        if not (0 <= layer < self.n_layers and 0 <= index < self.n_heads):
            raise ValueError(
                f"head a{layer}.h{index} does not exist; this model has layers 0-{self.n_layers - 1} and heads 0-{self.n_heads - 1}"
            )
        found = []
        for which in ("q", "k", "v") if kv != "freeze" else ("q",):
            start, stop = self.qkv_range(index if which == "q" else self.kv_head(index), which)
            module = self.name(layer, which)
            found.append(Slice(f"{module}.weight", 1 if self.layout.transposed else 0, start, stop))
            if biases and f"{module}.bias" in self.parameters:
                found.append(Slice(f"{module}.bias", 0, start, stop))
        columns = (index * self.d_head, (index + 1) * self.d_head)
        return [*found, Slice(f"{self.name(layer, 'o')}.weight", 0 if self.layout.transposed else 1, *columns)]

    def norms(self, layers: list[int] | None = None) -> list[str]:
        """Names of all norm parameters (final and embedding norms included), or only of those inside the given layers."""
        if layers is None:
            return list(self.norm_parameters)
        blocks = tuple(f"{self.name(layer, 'block')}." for layer in layers)
        return [name for name in self.norm_parameters if name.startswith(blocks)]

    def W_O(self, hf: nn.Module, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """A head's write to the residual stream is `z @ W_O[head]` (before any post-norm; the bias belongs to no head)."""
        weight: Any = self.module(hf, layer, "o").weight
        weight = weight if self.layout.transposed else weight.T
        return weight.unflatten(0, (-1, self.d_head))

    def split_heads(self, flat: Float[Tensor, "*batch hd"]) -> Float[Tensor, "*batch head d_head"]:
        return flat.unflatten(-1, (-1, self.d_head))

    def unembedding(self, hf: nn.Module) -> nn.Module:
        """The last linear map: lm_head, MLM decoder, `score` or `classifier`."""
        hf = unwrap(hf)
        if self.kind != "classifier":
            return hf.get_output_embeddings()
        return hf.get_submodule("score" if hasattr(hf, "score") else "classifier")


def finite_parameters(hf: nn.Module) -> None:
    """Raises ValueError naming the parameters that hold NaN or infinity."""
    bad = [name for name, p in hf.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(f"weights hold NaN or infinity in {', '.join(bad[:3])}{more}; load a sound checkpoint")

"""Tiny random models of every supported family, seeded, with non-zero biases and norms, so that no term can hide."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from circuits.encoding import Encoded
from circuits.tasks import Task

VOCABULARY = 61
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
    intermediate_size=48,
)  # fmt: skip
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(SIZES, num_key_value_heads=2, **SPECIAL)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)


def _build(family: str) -> Any:
    import transformers as t

    match family:
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(**GPT2))
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**LLAMA))
        case "mistral":
            return t.MistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=6))
        case "qwen2":
            return t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA))
        case "qwen3":  # head_dim is not hidden_size / heads, and q and k are normed
            return t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA, head_dim=12))
        case "gemma2":  # post-norms, soft-caps, local layers
            return t.Gemma2ForCausalLM(t.Gemma2Config(**LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8))
        case "gemma3":  # post-norms, QK-norm, local layers with their own rotary base
            return t.Gemma3ForCausalLM(
                t.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
            )
        case "neox":  # parallel blocks, interleaved q, k, v, partial rotary
            return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, rotary_pct=0.5, bos_token_id=1, eos_token_id=2))
        case "phi3":  # stacked q, k, v
            return t.Phi3ForCausalLM(t.Phi3Config(**LLAMA))
        case "bert":
            return t.BertForMaskedLM(t.BertConfig(**SIZES))
        case "bert-classifier":
            return t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=3))
        case "llama-classifier":
            return t.LlamaForSequenceClassification(t.LlamaConfig(**LLAMA, num_labels=3))
    raise KeyError(family)


CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "neox")
ENCODERS = ("bert", "bert-classifier")
CLASSIFIERS = ("bert-classifier", "llama-classifier")
FAMILIES = (*CAUSAL, "bert", *CLASSIFIERS)


def tiny(family: str, seed: int = 0) -> Any:
    """A new Hugging Face model, evaluation mode, float32. The global random state is left as found."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = _build(family).eval()
        for parameter in hf.parameters():
            # Larger than a fresh initialisation, so that attention is peaked and the non-linear parts matter.
            parameter.data += torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1)
    return hf


@cache
def shared_tiny(family: str) -> Any:
    """`load(tiny(family))`, one per test run. For tests that change no weight."""
    from circuits import load

    return load(tiny(family))


def ragged(n: int = 3, lengths: tuple[int, ...] = (9, 5, 7), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(n)]


@dataclass
class TokenTask(Task):
    """A task of token ids: three columns, ragged rows, twins of the same length; no tokenizer needed."""

    side: str = "right"
    n: int = 5
    twins: bool = False
    rows: tuple[int, ...] | None = None
    name: str = "tokens"
    fingerprint: str = "tokens"

    def __len__(self) -> int:
        return self.n if self.rows is None else len(self.rows)

    def select(self, indices: Sequence[int]) -> "TokenTask":
        rows = range(self.n) if self.rows is None else self.rows
        return replace(self, rows=tuple(rows[i] for i in indices))

    def encode(self, model: Any) -> Any:
        encoded = self._encode(model, seed=0)
        encoded = replace(encoded, corrupted=self._encode(model, seed=1)) if self.twins else encoded
        return encoded if self.rows is None else encoded.select(self.rows)

    def _encode(self, model: Any, seed: int) -> Any:
        tokens, mask = model.pad(ragged(self.n, seed=seed), side=self.side)
        columns = torch.tensor([0, 1, 2] if model.kind == "classifier" else [7, 11, 30])
        gold = torch.arange(self.n) % 3
        direction = torch.full((self.n, 3), -0.5)
        direction[torch.arange(self.n), gold] = 1.0
        return Encoded(tokens, mask, model.pooled_position(tokens, mask), columns, direction, gold, gold)

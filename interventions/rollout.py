"""Batched decoding that stops at the unembedding's door: one transformer step for every distinct prefix, then any choice of token.

1. Prefill every prompt once; keep its KV cache and its pre-logit z (the input of the unembedding).
2. At each step choose one token per sample from the pre-logits: `pick(z, state, sample, step)`. The first token costs no transformer call.
3. Samples of one prompt with equal prefixes have equal z and KV: they share one row ("state") until they differ.
4. Samples that ended (end-of-text, stop string, length limit) leave the batch. Feed the remaining rows, go to 2.

The KV cache depends on the tokens only, never on a perturbation of z, so the cached rollout equals full recomputation.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuits.anatomy import unwrap

Tokens = Int[Tensor, " _"]  # one text; lists of them are ragged
Pick = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class States:
    """Distinct prefixes in flight: what the next token of each depends on."""

    z: Float[Tensor, "state d"]
    cache: Any
    mask: Bool[Tensor, "state length"]
    padded: bool


def rollout(decoder: "Decoder", start: States, samples: int, pick: Pick, limits: Sequence[int],
            stop: Sequence[str] = (), share_prefixes: bool = True) -> list[Tokens]:  # fmt: skip
    """`samples` continuations of each prompt in `start` (sample p * samples + i is number i of prompt p), end token included."""
    device = start.z.device
    live = torch.arange(len(limits) * samples, device=device)
    limit = torch.tensor(limits, device=device).repeat_interleave(samples)
    tokens = torch.full((len(live), max(limits)), -1, device=device)
    length = torch.zeros_like(live)
    states, state = start, live // samples
    for step in range(max(limits)):
        chosen = pick(states.z, state, live, step)
        tokens[live, step] = chosen
        length[live] = step + 1
        going = ~torch.isin(chosen, decoder.ends) & (step + 1 < limit[live])
        live, state, chosen = live[going], state[going], chosen[going]
        if len(live) == 0:
            break
        prefix = state * decoder.vocabulary + chosen if share_prefixes else live
        _, row = torch.unique(prefix, return_inverse=True)
        first = torch.full((int(row.max()) + 1,), len(row), device=device)
        first.scatter_reduce_(0, row, torch.arange(len(row), device=device), "amin")  # one sample standing for each row
        if stop:
            texts = [decoder.decode(tokens[live[i], : step + 1]) for i in first.tolist()]
            keep = torch.tensor([not any(s in text for s in stop) for text in texts], device=device)
            live, row = live[keep[row]], (keep.cumsum(0) - 1)[row][keep[row]]
            first = first[keep]
            if len(live) == 0:
                break
        states = decoder.advance(states, state[first], chosen[first])
        state = row
    return [tokens[i, : int(length[i])] for i in range(len(tokens))]


class Decoder:
    """A causal language model split at the unembedding: `prefill` and `advance` give z, `logits` maps z (+ v) to logits."""

    def __init__(self, model: Any, tokenizer: Any = None):
        self.hf: Any = getattr(model, "hf", model)
        self.tokenizer: Any = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if not isinstance(self.hf, nn.Module) or not hasattr(self.hf, "get_output_embeddings"):
            raise TypeError(f"expected a model from load() or a transformers model, got {type(model).__name__}")
        self.head: Any = self.hf.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{type(self.hf).__name__} has no unembedding; decoding needs a causal language model")
        if self.tokenizer is None:
            raise ValueError("decoding gives text to a reward, so it needs a tokenizer: load(name, tokenizer=...)")
        if any(getattr(peft, "is_prompt_learning", False) for peft in getattr(self.hf, "peft_config", {}).values()):
            raise ValueError("prompt-learning adapters put virtual tokens in the cache; use LoRA-like adapters here")
        self.name = str(getattr(model, "name", "") or getattr(self.hf, "name_or_path", ""))
        self.device = self.head.weight.device
        self.vocabulary = self.head.weight.shape[0]
        self.dtype = self.head.weight.dtype
        self.config = self.hf.config.get_text_config()
        self.ends = torch.tensor(sorted(end_tokens(self.hf, self.tokenizer)), dtype=torch.long, device=self.device)
        self._accepts = inspect.signature(unwrap(self.hf).forward).parameters
        self._after: Callable[[Tensor], Tensor] | None = None

    def encode(self, prompts: Sequence[str]) -> list[Tokens]:
        if not prompts:
            raise ValueError("no prompts: give a text or a list of texts")
        encoded = [torch.tensor(self.tokenizer(prompt)["input_ids"], dtype=torch.long) for prompt in prompts]
        empty = [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) == 0]
        if empty:
            raise ValueError(f"prompt {empty[0]!r} has no tokens; give at least one token to continue from")
        return encoded

    def decode(self, tokens: Tokens) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def response(self, prompt: Tokens, tokens: Tokens, stop: Sequence[str] = ()) -> str:
        """The continuation as it reads after the prompt (some tokenizers drop a leading space), cut at a stop string."""
        before, whole = self.decode(prompt), self.decode(torch.cat([prompt, tokens.to(prompt.device)]))
        text = whole[len(before) :] if whole.startswith(before) else self.decode(tokens)
        return text[: min((text.find(s) for s in stop if s in text), default=len(text))]

    def limits(self, prompts: Sequence[Tokens], longest: int, strict: bool) -> list[int]:
        """Tokens each prompt may get: `longest`, or what its context has left (an error when `strict`)."""
        if longest < 1:
            raise ValueError(f"max_new_tokens = {longest} must be at least 1")
        context = getattr(self.config, "max_position_embeddings", None) or 10**9
        room = [context - len(prompt) for prompt in prompts]
        if min(room) < (longest if strict else 1):
            raise ValueError(
                f"a prompt of {context - min(room)} tokens leaves {min(room)} of the context of {context}, "
                f"{longest if strict else 1} needed; shorten the prompt or max_new_tokens"
            )
        return [min(longest, left) for left in room]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Tokens]) -> States:
        """One forward over the left-padded prompts."""
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=self.device)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt.to(self.device)
            mask[row, width - len(prompt) :] = True
        padded = not bool(mask.all())
        z, cache, output = self._forward(tokens, mask, padded, None, keep_logits=True)
        self._after = self._after or after_unembedding(self.config, self.head(z), output.logits[:, -1])
        return States(z, cache, mask, padded)

    @torch.inference_mode()
    def advance(self, states: States, parents: Int[Tensor, " state"], tokens: Int[Tensor, " state"]) -> States:
        """Append one token to copies of `parents`; the states given stay usable."""
        states = self.select(states, parents)
        mask = torch.cat([states.mask, states.mask.new_ones(len(tokens), 1)], 1)
        z, cache, _ = self._forward(tokens[:, None], mask, states.padded, states.cache)
        return States(z, cache, mask, states.padded)

    def select(self, states: States, rows: Int[Tensor, " row"]) -> States:
        cache = copy.copy(states.cache)
        cache.layers = [
            copy.copy(layer) for layer in states.cache.layers
        ]  # layers replace their tensors, never write into them
        if len(rows) != len(states.z) or bool((rows != torch.arange(len(rows), device=rows.device)).any()):
            cache.batch_select_indices(rows)
            return replace(states, z=states.z[rows], cache=cache, mask=states.mask[rows])
        return replace(states, cache=cache)

    @torch.inference_mode()
    def logits(self, z: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows vocabulary"]:
        """Unembedding and whatever the model does after it (soft-cap, scale)."""
        raw = self.head(z.to(self.dtype))
        return raw if self._after is None else self._after(raw)

    @torch.inference_mode()
    def pre_logits(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[Float[Tensor, "response d"]]:
        """z before each token of each response. The prompts are a forward of their own, so that what edits prompts edits them once."""
        start = self.prefill(prompts)
        length = torch.tensor([max(1, len(response)) for response in responses], device=self.device)
        width = int(length.max()) - 1
        z = start.z[:, None]
        if width:
            written = torch.zeros(len(responses), width, dtype=torch.long, device=self.device)
            for row, (response, n) in enumerate(zip(responses, (length - 1).tolist(), strict=True)):
                written[row, :n] = response[:n].to(self.device)
            real = torch.arange(width, device=self.device) < length[:, None] - 1
            mask = torch.cat([start.mask, real], 1)
            later, _, _ = self._forward(written, mask, not bool(mask.all()), start.cache, every=True)
            z = torch.cat([z, later], 1)
        return [row[: len(response)] for row, response in zip(z, responses, strict=True)]

    def zeros(self, horizon: int) -> Float[Tensor, "tau d"]:
        return torch.zeros(horizon, self.head.weight.shape[1], device=self.device)

    def _forward(
        self, tokens: Tensor, mask: Tensor, padded: bool, cache: Any, keep_logits: bool = False, every: bool = False
    ) -> tuple[Tensor, Any, Any]:
        """z of the last position (of `every` one). The unembedding inside the model sees no rows unless its logits are wanted."""
        caught: list[Tensor] = []

        def catch(_module: nn.Module, inputs: tuple[Tensor, ...]):
            caught.append(inputs[0] if every else inputs[0][:, -1])
            return inputs if keep_logits else (inputs[0][:0],)

        options = {"use_cache": True, "past_key_values": cache, "attention_mask": mask.long() if padded else None}
        if "position_ids" in self._accepts:
            options["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        if "logits_to_keep" in self._accepts and not every:
            options["logits_to_keep"] = 1
        handle = self.head.register_forward_pre_hook(catch)
        try:
            output = self.hf(input_ids=tokens, **options)
        finally:
            handle.remove()
        return caught[0], output.past_key_values, output


@contextmanager
def evaluating(hf: nn.Module) -> Iterator[None]:
    """Dropout off inside, the former mode back outside."""
    training = hf.training
    hf.eval()
    try:
        yield
    finally:
        hf.train(training)


def end_tokens(hf: nn.Module, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else list(configured or ())
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def after_unembedding(config: Any, raw: Float[Tensor, "row vocabulary"],
                      logits: Float[Tensor, "row vocabulary"]) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """What turns W z + b into the model's logits: read from its configuration, then checked on real rows."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def configured(x: Tensor) -> Tensor:
        x = x if scale == 1.0 else x * scale
        return x if cap is None else cap * torch.tanh(x / cap)

    candidates = (configured, lambda x: x)  # the second for models that carry such a setting and do not use it
    gaps = [float((candidate(raw) - logits).abs().max()) for candidate in candidates]
    if min(gaps) > 1e-2 * float(logits.abs().max()) + 1e-4:
        raise ValueError(
            "this model changes its logits after the unembedding in an unknown way; its pre-logits cannot be moved"
        )
    return candidates[gaps.index(min(gaps))]


def derive(*parts: int) -> int:
    """A seed from numbers. Seeds derived from a prompt's own tokens do not depend on what else is in the batch."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def one_seed_each(seed: int | Sequence[int], prompts: int) -> list[int]:
    seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
    if len(seeds) != prompts:
        raise ValueError(f"{len(seeds)} seeds for {prompts} prompts; give one number, or one per prompt")
    return seeds


def in_chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]

"""Decoding with several members at once. At every step members give log p_i(token | text so far); they are combined as

1. mixture   p̄ = (1/M) Σ p_i, each step anew (token mixture);
2. sequence  p̄ = Σ w_i p_i with w_i ∝ p_i(generated so far): the exact conditional of the mixture of whole sequences,
             so that members that would not have written the beginning lose their say;
3. vote      share of members whose best token it is, ties decided by the mixture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .examples import ids_of
from .lora import StackedLoRA
from .uncertainty import entropy_split

COMBINE = ("mixture", "sequence", "vote")


def next_token(
    log_p: Float[Tensor, "member batch vocab"], past: Float[Tensor, "member batch"], combine: str
) -> Float[Tensor, "batch vocab"]:
    """Combined next-token probabilities; `past` is each member's log-likelihood of the tokens generated so far."""
    p = log_p.exp()
    if combine == "sequence":
        return torch.einsum("mb,mbv->bv", torch.softmax(past, 0), p)
    mean = p.mean(0)
    if combine == "mixture":
        return mean
    best = torch.nn.functional.one_hot(log_p.argmax(-1), log_p.shape[-1]).to(mean).mean(0)
    scores = best + mean * (1e-3 / len(log_p))
    return scores / scores.sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Generation:
    """`tokens` are padded with -1 after the end. Entropies are per step; `members` is each member's log-likelihood."""

    texts: list[str]
    tokens: Int[Tensor, "batch step"]
    total: Float[Tensor, "batch step"]
    mutual_information: Float[Tensor, "batch step"]
    members: Float[Tensor, "member batch"]


def generate(
    hf: nn.Module,
    stack: StackedLoRA,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    combine: str,
    temperature: float | int,
    seed: int,
) -> Generation:
    if combine not in COMBINE:
        raise ValueError(f"combine={combine!r}; expected {', '.join(COMBINE)}")
    if max_new_tokens < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts, max_new_tokens={max_new_tokens}; expected at least one of each")
    device = next(hf.parameters()).device
    tokens, mask = _left_padded([ids_of(prompt, tokenizer, special=True) for prompt in prompts], device)
    end = getattr(tokenizer, "eos_token_id", None)
    generator = torch.Generator().manual_seed(seed)
    past = torch.zeros(stack.members, len(prompts))
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    steps, totals, informations, cache = [], [], [], None
    with stack.attached(hf) as repeat:
        for _ in range(max_new_tokens):
            log_p, cache = _step(hf, tokens, mask, cache, repeat, stack.members)
            total, _, information = entropy_split(log_p.exp())
            chosen = _choose(next_token(log_p, past, combine), temperature, generator)
            gained = log_p.gather(-1, chosen.expand(stack.members, -1)[..., None])[..., 0]
            past = past + gained.masked_fill(finished, 0.0)
            steps.append(chosen.masked_fill(finished, -1))
            totals.append(total.masked_fill(finished, 0.0))
            informations.append(information.masked_fill(finished, 0.0))
            if end is not None:
                finished = finished | (chosen == end)
            if finished.all():
                break
            tokens = chosen[:, None].to(device)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    out = torch.stack(steps, 1)
    texts = [_text(tokenizer, row[row >= 0].tolist(), end) for row in out]
    return Generation(texts, out, torch.stack(totals, 1), torch.stack(informations, 1), past)


def _step(
    hf: nn.Module, tokens: Tensor, mask: Tensor, cache: Any, repeat: int, members: int
) -> tuple[Float[Tensor, "member batch vocab"], Any]:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    named = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    inputs = {name: value.repeat(repeat, 1) for name, value in named.items()}
    out = hf(**inputs, past_key_values=cache, use_cache=True)
    logits = out.logits[:, -1].float().cpu().view(members, len(tokens), -1)
    return torch.log_softmax(logits, -1), out.past_key_values


def _choose(
    p: Float[Tensor, "batch vocab"], temperature: float | int, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return p.argmax(-1)
    return torch.multinomial(torch.softmax(p.log() / temperature, -1), 1, generator=generator)[:, 0]


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def _text(tokenizer: Any, ids: list[int], end: int | None) -> str:
    return "" if tokenizer is None else tokenizer.decode([i for i in ids if i != end])

"""Four ways to score an answer, kept apart because they disagree.

1. first    the first answer token is the most likely next token (the measure of function vectors)
2. exact    the greedy text up to its first newline equals the answer
3. prefix   that text starts with the answer, letter case ignored (the rule of SITE's code: "12" counts for "1"; case is kept when
            the task is about case: `fold_case=False`)
4. nll      -log p of the whole answer after the prompt, summed over its tokens

All four read the model as it is when called, so inside `inject(...)` they score the injected model. One prefill serves them all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .fewshot import EncodedPrompts, Prompt, encode_prompts
from .prefix import forward, selected


@dataclass(frozen=True)
class AnswerScores:
    first: Bool[Tensor, " row"]
    exact: Bool[Tensor, " row"]
    prefix: Bool[Tensor, " row"]
    nll: Float[Tensor, " row"]
    texts: tuple[str, ...]
    prompt_tokens: float
    seconds: float

    def __repr__(self) -> str:
        means = [f"{name} {getattr(self, name).float().mean():.3f}" for name in ("first", "exact", "prefix", "nll")]
        return f"AnswerScores({', '.join(means)}; n={len(self.texts)}, {self.prompt_tokens:.1f} prompt tokens, {self.seconds:.2f} s)"


def matches(text: str, gold: str, fold_case: bool = True) -> tuple[bool, bool]:
    """(exact, prefix) of a generated text."""
    said, gold = text.strip().split("\n")[0].strip(), gold.strip()
    cut, wanted = (said.lower(), gold.lower()) if fold_case else (said, gold)
    return said == gold, cut.startswith(wanted)


@torch.no_grad()
def score_answers(
    model: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 20, batch_size: int = 64, fold_case: bool = True
) -> AnswerScores:
    """Score greedy answers to prompts. Generation stops at a newline, the end token or `max_new_tokens`."""
    encoded = encode_prompts(model, prompts)
    stops = _stops(model.tokenizer)
    first, exact, prefix, nll, texts = [], [], [], [], []
    started = time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        rows = list(range(start, min(start + batch_size, len(prompts))))
        out = forward(model, encoded.tokens[rows], encoded.attention_mask[rows], logits_to_keep=1)
        logits = out.logits[:, -1].float()
        first.append(logits.argmax(-1) == encoded.first[rows])
        nll.append(_answer_nll(model, encoded, rows, logits, selected(out.past_key_values)))
        generated = _greedy(model, encoded.attention_mask[rows], logits, out.past_key_values, stops, max_new_tokens)
        for row, tokens in zip(rows, generated, strict=True):
            text = model.tokenizer.decode(tokens, skip_special_tokens=True)
            both = matches(text, prompts[row].gold, fold_case)
            texts.append(text)
            exact.append(both[0])
            prefix.append(both[1])
    return AnswerScores(
        first=torch.cat(first).cpu(),
        exact=torch.tensor(exact),
        prefix=torch.tensor(prefix),
        nll=torch.cat(nll).cpu(),
        texts=tuple(texts),
        prompt_tokens=encoded.lengths.float().mean().item(),
        seconds=time.perf_counter() - started,
    )


@cache
def _stops(tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the end token and every token with a newline in it."""
    lines = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return frozenset({index for index, text in enumerate(lines) if "\n" in text} | {tokenizer.eos_token_id})


def _answer_nll(
    model: Any, prompts: EncodedPrompts, rows: Sequence[int], logits: Float[Tensor, "row vocab"], past: Any
) -> Float[Tensor, " row"]:
    """Teacher forcing: the prefill gave the first token's logits, one more chunk gives the rest."""
    answers = [prompts.answers[row] for row in rows]
    loss = torch.nn.functional.cross_entropy(logits, prompts.first[list(rows)], reduction="none")
    longest = max(map(len, answers))
    if longest == 1:
        return loss
    tokens, mask = model.pad([answer[:-1] or answer for answer in answers], side="right", width=longest - 1)
    targets, real = model.pad([answer[1:] for answer in answers], side="right", width=longest - 1)
    tokens, mask, targets, real = (x.to(logits.device) for x in (tokens, mask, targets, real))
    mask = torch.cat((prompts.attention_mask[list(rows)], mask), 1)
    later = forward(model, tokens, mask, past_key_values=past).logits.float()
    return loss + (torch.nn.functional.cross_entropy(later.transpose(1, 2), targets, reduction="none") * real).sum(1)


def _greedy(model: Any, mask: Tensor, logits: Tensor, past: Any, stops: frozenset[int], limit: int) -> list[list[int]]:
    """Continue a prefilled batch greedily; each row ends before its first stop token."""
    rows: list[list[int]] = [[] for _ in range(len(logits))]
    running = [True] * len(rows)
    for step in range(limit):
        tokens = logits.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token not in stops
            if running[row]:
                rows[row].append(token)
        if not any(running) or step + 1 == limit:
            break
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        logits = forward(model, tokens[:, None], mask, past_key_values=past).logits[:, -1].float()
    return rows

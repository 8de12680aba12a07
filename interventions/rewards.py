"""What a reward is, `reward(prompts, responses) -> Tensor[batch]`, and four ways to get one.

Rewards see text, in batches, without gradients. Chat templates are the caller's: the text given is the prompt as typed and the response
after it, cut at the stop string. A score that is not a number (NaN, +inf) counts as -inf: that response gets weight zero.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Reward = Callable[[list[str], list[str]], Tensor]


class Scorer:
    """Calls the reward once per distinct (prompt, response), guards what comes back and keeps the count."""

    def __init__(self, reward: Reward):
        if not callable(reward):
            raise TypeError(f"reward must be a function of (prompts, responses), got {type(reward).__name__}")
        self.reward = reward
        self.scored = 0
        self.invalid = 0
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, " batch"]:
        pairs = list(zip(prompts, responses, strict=True))
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self._known))
        if new:
            with torch.no_grad():
                values = self.reward([prompt for prompt, _ in new], [response for _, response in new])
            guarded, invalid = finite_or_excluded(values, len(new))
            if invalid and not self.invalid:
                warnings.warn("the reward returned NaN or +inf; such responses count as -inf", stacklevel=2)
            self.invalid += invalid
            self.scored += len(new)
            self._known.update(zip(new, guarded.tolist(), strict=True))
        return torch.tensor([self._known[pair] for pair in pairs])


def finite_or_excluded(values: Any, expected: int) -> tuple[Float[Tensor, " batch"], int]:
    """float32 on the CPU with NaN and +inf as -inf, and how many of those there were."""
    values = torch.as_tensor(values).detach().float().cpu()
    if values.shape != (expected,):
        raise ValueError(
            f"reward returned shape {tuple(values.shape)}, expected ({expected},): one number per response"
        )
    bad = values.isnan() | (values == math.inf)
    return values.masked_fill(bad, -math.inf), int(bad.sum())


def rowwise(function: Callable[[str, str], float]) -> Reward:
    """A plain Python function of one prompt and one response, as a reward."""

    def reward(prompts: list[str], responses: list[str]) -> Tensor:
        return torch.tensor([float(function(p, r)) for p, r in zip(prompts, responses, strict=True)])

    return reward


def classifier_reward(model: Any, tokenizer: Any = None, *, label: str | int | None = None,
                      output: Literal["logit", "log_probability", "probability"] = "logit",
                      text: Callable[[str, str], str] = str.__add__, batch_size: int = 32) -> Reward:  # fmt: skip
    """A transformers sequence classifier (or what load() returned for one). One output: its value; several: that of `label`."""
    hf, tokenizer = getattr(model, "hf", model), tokenizer or getattr(model, "tokenizer", None)
    if isinstance(model, str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        hf = AutoModelForSequenceClassification.from_pretrained(model).eval()
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    if tokenizer is None:
        raise ValueError("a classifier reward reads text: give its tokenizer")
    if getattr(hf, "get_output_embeddings", lambda: None)() is not None:
        raise ValueError(f"{type(hf).__name__} is no sequence classifier; for a language model use likelihood_reward")
    column = label_column(hf.config, label)
    if output != "logit" and hf.config.num_labels == 1:
        raise ValueError(
            f"output={output!r} needs a classifier with several labels; this one has a single number, use 'logit'"
        )
    pad = hf.config.pad_token_id if hf.config.pad_token_id is not None else tokenizer.pad_token_id
    finish = {
        "logit": lambda x: x,
        "log_probability": lambda x: x.log_softmax(-1),
        "probability": lambda x: x.softmax(-1),
    }

    @torch.inference_mode()
    def reward(prompts: list[str], responses: list[str]) -> Tensor:
        texts = [text(p, r) for p, r in zip(prompts, responses, strict=True)]
        scores = []
        for i in range(0, len(texts), batch_size if pad is not None else 1):
            ids = [tokenizer(t)["input_ids"] for t in texts[i : i + (batch_size if pad is not None else 1)]]
            tokens, mask = right_padded(ids, pad or 0, hf.device)
            scores.append(finish[output](hf(input_ids=tokens, attention_mask=mask).logits.float())[:, column])
        return torch.cat(scores)

    return reward


def likelihood_reward(model: Any, tokenizer: Any = None, *, batch_size: int = 32) -> Reward:
    """Mean log-probability per token of the response after the prompt, under a causal language model."""
    hf, tokenizer = getattr(model, "hf", model), tokenizer or getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("a likelihood reward reads text: give its tokenizer")

    @torch.inference_mode()
    def reward(prompts: list[str], responses: list[str]) -> Tensor:
        scores = []
        for i in range(0, len(prompts), batch_size):
            pairs = list(zip(prompts[i : i + batch_size], responses[i : i + batch_size], strict=True))
            whole = [tokenizer(p + r)["input_ids"] for p, r in pairs]
            start = torch.tensor([len(tokenizer(p)["input_ids"]) for p, _ in pairs], device=hf.device)
            tokens, mask = right_padded(whole, 0, hf.device)
            log_p = hf(input_ids=tokens, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
            log_p = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
            position = torch.arange(1, tokens.shape[1], device=hf.device)
            inside = mask[:, 1:].bool() & (position >= start[:, None].clamp_min(1))
            total = (log_p * inside).sum(1) / inside.sum(1).clamp_min(1)
            scores.append(torch.where(inside.any(1), total, -math.inf))  # an empty response has no likelihood
        return torch.cat(scores)

    return reward


def label_column(config: Any, label: str | int | None) -> int:
    """Index of a label given by name or number; a one-output model needs none."""
    names = {int(k): v for k, v in (config.id2label or {}).items()}
    if label is None and config.num_labels == 1:
        return 0
    if label is None:
        raise ValueError(f"this classifier has several labels, {', '.join(names.values())}; choose one with label=")
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    matches = [k for k, v in names.items() if v == label]
    if not matches:
        raise ValueError(f"label {label!r} is not one of this classifier's labels: {', '.join(names.values())}")
    return matches[0]


def right_padded(ids: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(1, *map(len, ids))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    return tokens, mask

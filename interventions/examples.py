"""Training data as tensors: texts, prompt/completion rows, preference pairs and labelled tasks become `Examples`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """`targets[b, t]` is the token to predict *at* position t (for a text: the next token), -100 where there is none.

    Classifiers (`classes`) have one target per example, [example, 1]: the class.
    """

    tokens: Int[Tensor, "example position"]
    attention_mask: Int[Tensor, "example position"]
    targets: Int[Tensor, "example target"]
    classes: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Tensor) -> "Examples":
        """These rows, cut to the longest of them."""
        mask = self.attention_mask[rows]
        used = mask.any(0).nonzero()
        span = slice(int(used.min()), int(used.max()) + 1) if len(used) else slice(None)
        targets = self.targets[rows] if self.classes else self.targets[rows][:, span]
        return Examples(self.tokens[rows][:, span], mask[:, span], targets, self.classes)

    def to(self, device: torch.device) -> "Examples":
        move = (self.tokens, self.attention_mask, self.targets)
        return Examples(*(tensor.to(device) for tensor in move), self.classes)

    @property
    def where(self) -> Bool[Tensor, "example target"]:
        return self.targets != IGNORED

    def owners(self) -> Int[Tensor, " found"]:
        """The example each target belongs to, in the order of `targets[where]`."""
        return self.where.nonzero()[:, 0]

    def counts(self) -> Int[Tensor, " example"]:
        return self.where.sum(1)

    def inputs(self, hf: nn.Module) -> dict[str, Tensor]:
        inputs = {"input_ids": self.tokens, "attention_mask": self.attention_mask}
        if not self.attention_mask[:, 0].all() and "position_ids" in inspect.signature(hf.forward).parameters:
            inputs["position_ids"] = (self.attention_mask.cumsum(1) - 1).clamp(min=0)  # left padding
        return inputs


def from_rows(rows: Sequence[Any], tokenizer: Any, max_length: int | None = None) -> Examples:
    """Texts, {"text"}, {"prompt", "completion"} (TRL's names; loss on the completion) or {"input_ids", "labels"}."""
    pieces = [_row(row, tokenizer) for row in rows]
    return pad([(ids[:max_length], wanted[:max_length]) for ids, wanted in pieces], tokenizer)


def from_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None) -> Examples:
    """Preference rows {"prompt", "chosen", "rejected"}: example 2n is the chosen and 2n + 1 the rejected completion."""
    both = []
    for row in rows:
        prompt = row.get("prompt", "")
        both += [{"prompt": prompt, "completion": row["chosen"]}, {"prompt": prompt, "completion": row["rejected"]}]
    examples = from_rows(both, tokenizer, max_length)
    empty = (examples.counts() == 0).nonzero()
    if len(empty):
        pair = int(empty[0]) // 2
        raise ValueError(f"pair {pair} has no completion left; raise max_length={max_length} or shorten its prompt")
    return examples


def after_texts(texts: Sequence[Any], tokenizer: Any) -> Examples:
    """Ask for the token after each text; the target itself is a placeholder."""
    rows = [ids_of(text, tokenizer, special=True) for text in texts]
    if not all(rows):
        raise ValueError(f"text {rows.index([])} has no tokens; expected something to continue")
    return pad([(ids, [IGNORED] * (len(ids) - 1) + [0]) for ids in rows], tokenizer)


def is_task(data: Any) -> bool:
    """A task of `circuits`, not a text (which has an `encode` of its own)."""
    return hasattr(data, "encode") and hasattr(data, "select")


def from_task(model: Any, task: Any) -> tuple[Examples, Tensor]:
    """A labelled task and its label columns: the target is the gold label word at the read-out position."""
    encoded = task.encode(model)
    columns = encoded.columns.cpu()
    tokens, mask = encoded.tokens.cpu(), encoded.attention_mask.cpu().long()
    gold = columns[encoded.gold.cpu()]
    if getattr(model, "kind", "causal") == "classifier":
        return Examples(tokens, mask, gold[:, None], classes=True), columns
    targets = torch.full_like(tokens, IGNORED)
    targets[torch.arange(len(tokens)), encoded.readout.cpu()] = gold
    return Examples(tokens, mask, targets), columns


def pad(pieces: Sequence[tuple[list[int], list[int]]], tokenizer: Any = None) -> Examples:
    """(ids, targets) of different lengths, padded on the right."""
    if not pieces:
        raise ValueError("no examples; expected at least one text, pair or row")
    length = max(len(ids) for ids, _ in pieces)
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    tokens = torch.full((len(pieces), length), fill)
    targets = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens)
    for number, (ids, wanted) in enumerate(pieces):
        tokens[number, : len(ids)] = torch.tensor(ids)
        targets[number, : len(ids)] = torch.tensor(wanted)
        mask[number, : len(ids)] = 1
    return Examples(tokens, mask, targets)


def _row(row: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, targets), already shifted: ids are all tokens but the last."""
    if isinstance(row, Mapping) and "input_ids" in row:
        ids = list(row["input_ids"])
        labels = list(row.get("labels", ids))
    elif isinstance(row, Mapping) and "completion" in row:
        prompt = ids_of(row.get("prompt", ""), tokenizer, special=True)
        completion = ids_of(row["completion"], tokenizer, special=False) + _end(tokenizer, row["completion"])
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    elif isinstance(row, str) or (isinstance(row, Mapping) and "text" in row):
        text = row if isinstance(row, str) else row["text"]
        ids = ids_of(text, tokenizer, special=True) + _end(tokenizer, text)
        labels = ids
    else:
        given = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"cannot train on {given}; expected a text, or a row with text | prompt + completion | "
            "prompt + chosen + rejected | input_ids"
        )
    if len(ids) < 2:
        raise ValueError(f"example {row!r} has {len(ids)} token(s); expected at least two, one to predict from")
    return ids[:-1], labels[1:]  # the last token has nothing to predict, and no earlier token sees it


def ids_of(text: str | Sequence[int], tokenizer: Any, special: bool) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so text cannot be read; pass tokenizer=, or token ids for texts")
    return list(tokenizer(text, add_special_tokens=special).input_ids)


def _end(tokenizer: Any, text: Any) -> list[int]:
    """Texts end in the end token, so that members learn to stop; token ids are taken as they are."""
    end = getattr(tokenizer, "eos_token_id", None)
    return [end] if isinstance(text, str) and end is not None else []

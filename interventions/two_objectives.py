"""Training on two objectives: rows of text, three losses that cover the common pairs, and the loop.

learn   -log p(answer)                             fit facts, keep a language
forget  -log(1 - p(answer))                        unlikelihood (Welleck et al. 2020): bounded, unlike gradient ascent
prefer  -log sigmoid(beta * (margin - reference))  DPO (Rafailov et al. 2023); margin = log p(chosen) - log p(rejected)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.progress import track

from .sift import SIFT


class Rows(NamedTuple):
    """Prompts with answers as one right-padded batch; `scored` marks the answer tokens."""

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    scored: Bool[Tensor, "row pos"]

    def select(self, index: Int[Tensor, " chosen"]) -> "Rows":
        longest = int(self.mask[index].sum(1).max())
        return Rows(*(part[index, :longest] for part in self))


def batches(rows: Rows, size: int, seed: int) -> Callable[[int], Rows]:
    """step -> its rows: one order for all, drawn once, that starts again at the end."""
    order = torch.randperm(len(rows.tokens), generator=torch.Generator().manual_seed(seed))
    size = min(size, len(order))
    return lambda step: rows.select(order[[(step * size + i) % len(order) for i in range(size)]])


def encode(tokenizer: Any, rows: Sequence[tuple[str, str]], max_length: int | None = None) -> Rows:
    """(prompt, answer) rows; an empty prompt makes every token after the first count. Raises ValueError for empty answers."""
    if not rows:
        raise ValueError("no rows to train on; expected at least one (prompt, answer)")
    encoded = []
    for prompt, answer in rows:
        before = tokenizer(prompt)["input_ids"] if prompt else []
        after = tokenizer(answer, add_special_tokens=not prompt)["input_ids"]
        scored = [0] * len(before) + [1] * len(after)
        scored[0] = 0  # nothing predicts the first token
        ids, scored = (before + after)[:max_length], scored[:max_length]
        if not any(scored):
            raise ValueError(
                f"row {prompt + answer!r} has no answer token to score; give text or raise max_length={max_length}"
            )
        encoded.append((ids, scored))
    longest = max(len(ids) for ids, _ in encoded)
    pad = lambda values: values + [0] * (longest - len(values))  # noqa: E731
    tokens = torch.tensor([pad(ids) for ids, _ in encoded])
    mask = torch.tensor([pad([1] * len(ids)) for ids, _ in encoded])
    return Rows(tokens, mask, torch.tensor([pad(scored) for _, scored in encoded]).bool())


def answer_log_probs(hf: Any, rows: Rows) -> tuple[Float[Tensor, "row next"], Bool[Tensor, "row next"]]:
    """log p of every next token, and which of them are answers."""
    device = next(hf.parameters()).device
    logits = hf(input_ids=rows.tokens.to(device), attention_mask=rows.mask.to(device)).logits[:, :-1]
    chosen = rows.tokens[:, 1:, None].to(device)
    return logits.float().log_softmax(-1).gather(-1, chosen)[..., 0], rows.scored[:, 1:].to(device)


def learn(hf: Any, rows: Rows) -> Float[Tensor, ""]:
    log_p, scored = answer_log_probs(hf, rows)
    return -log_p[scored].mean()


def forget(hf: Any, rows: Rows) -> Float[Tensor, ""]:
    log_p, scored = answer_log_probs(hf, rows)
    return -torch.log1p(-log_p[scored].exp().clamp_max(1 - 1e-6)).mean()


def margins(hf: Any, chosen: Rows, rejected: Rows) -> Float[Tensor, " row"]:
    """log p(chosen) - log p(rejected), summed over answer tokens."""
    sums = []
    for rows in (chosen, rejected):
        log_p, scored = answer_log_probs(hf, rows)
        sums.append((log_p * scored).sum(1))
    return sums[0] - sums[1]


def prefer(
    hf: Any, chosen: Rows, rejected: Rows, reference: Float[Tensor, " row"], beta: float | int = 0.1
) -> Float[Tensor, ""]:
    """`reference` holds the margins of the model before training."""
    return -F.logsigmoid(beta * (margins(hf, chosen, rejected) - reference)).mean()


class StepRecord(NamedTuple):
    """One step: both losses before it, the mean gate cosine, and the share of blocks under control."""

    objective: float
    constraint: float
    cosine: float
    controlled: float


def train(
    hf: Any, optimizer: SIFT, losses: Callable[[int], tuple[Tensor, Tensor]], steps: int, progress: bool = True
) -> list[StepRecord]:
    """`losses(step)` gives the objective and the constraint; dropout stays off, so that both see one function."""
    was_training = hf.training
    hf.eval()
    records = []
    try:
        for step in track(range(steps), "two objectives", enabled=progress):
            objective, constraint = losses(step)
            optimizer.step(objective=objective, constraint=constraint)
            cosines = [gate.cosine for gate in optimizer.last if gate.cosine is not None]
            controlled = sum(gate.controlled for gate in optimizer.last) / max(1, len(optimizer.last))
            mean = sum(cosines) / max(1, len(cosines))
            records.append(StepRecord(objective.item(), constraint.item(), mean, controlled))
    finally:
        hf.train(was_training)
    return records

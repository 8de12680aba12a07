"""Tune a model on a labelled task, all of it or only the slices of a mask, and report what it costs elsewhere (CT-SFT §4-5).

1. Evaluate the target task and every task that must be kept.
2. Minimise cross-entropy at the read-out position with AdamW: over the label words (`loss="labels"`, what `evaluate` compares)
   or the whole vocabulary (`loss="vocabulary"`, ordinary next-token training; the paper does not say which it used).
   Fresh optimizer state, gradient-norm clipping, constant learning rate, no dropout. With a mask this runs inside `restrict`,
   so decay and `anchor` pull towards the starting weights and everything outside the mask stays bit-identical.
3. With `validation`, keep the epoch that validates best, the untuned start included; the test set plays no part in it.
4. Evaluate again; the difference on the kept tasks is the forgetting.
The same function does competence tuning on a source language: `finetune(model, source)`.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from circuits.progress import track
from circuits.tasks import evaluate

from .masks import HeadMask
from .restriction import restrict

Loss = Literal["labels", "vocabulary"]


def readout_loss(model: Any, encoded: Any, rows: Int[Tensor, " row"], loss: Loss | str = "labels") -> Float[Tensor, ""]:
    """Step 2: cross-entropy of the gold label of some examples, read where the task reads it."""
    batch = encoded.select(rows).trimmed()
    columns = batch.columns if loss == "labels" else None
    logits = model.logits(batch.tokens, batch.attention_mask, batch.readout, columns).float()
    target = batch.gold if loss == "labels" else batch.columns[batch.gold]
    return functional.cross_entropy(logits, target.to(logits.device))


@dataclass(frozen=True)
class Tuning:
    """What `finetune` did. Prints as a table; `to_dict()` is JSON."""

    task: str
    # {task name: {"accuracy": ..., "macro_f1": ..., "n": ...}}
    before: dict[str, dict[str, int | float]]
    after: dict[str, dict[str, int | float]]
    # Per epoch: mean training loss and, with `validation`, its figures; epoch 0 is the start.
    history: list[dict[str, int | float]]
    trained: int
    moved: int
    total: int
    # Euclidean length of the change of all weights.
    distance: float
    proof: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def retention(self, name: str) -> float:
        """Accuracy on a kept task after tuning, minus before."""
        if name not in self.after:
            raise ValueError(f"no task {name!r} was evaluated; evaluated: {', '.join(self.after)}")
        return self.after[name]["accuracy"] - self.before[name]["accuracy"]

    def _repr_html_(self) -> str:
        from circuits.display import table_html

        shown = ("accuracy", "macro_f1")
        rows = [
            [name, str(after["n"]), *(f"{at[key]:.3f}" for key in shown for at in (self.before[name], after))]
            for name, after in self.after.items()
        ]
        header = ["task", "n", "accuracy before", "after", "macro-F1 before", "after"]
        return table_html(f"tuned on {self.task}: {self.moved:,} of {self.total:,} values moved", header, rows)

    def __repr__(self) -> str:
        width = max(len(name) for name in self.after) + 1
        lines = [f"{'task':<{width}} {'n':>5} {'accuracy':>17} {'macro-F1':>17} {'change':>8}"]
        for name, after in self.after.items():
            before = self.before[name]
            accuracy = f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}"
            f1 = f"{before['macro_f1']:.3f} -> {after['macro_f1']:.3f}"
            change = after["accuracy"] - before["accuracy"]
            lines.append(f"{name:<{width}} {after['n']:>5.0f} {accuracy:>17} {f1:>17} {change:>+8.3f}")
        share = f"{self.moved:,} of {self.total:,} values moved ({self.moved / self.total:.2%})"
        return "\n".join([*lines, f"{share}; {self.proof}" if self.proof else share])


def finetune(
    model: Any,
    task: Any,
    mask: Any = None,
    epochs: int = 5,
    lr: float = 5e-5,
    batch_size: int = 16,
    eval_tasks: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    validation: Any = None,
    loss: Loss | str = "labels",
    weight_decay: float = 0.0,
    anchor: float = 0.0,
    clip: float = 1.0,
) -> Tuning:
    """Tune `model` in place on `task`; with a mask only its slices move. `eval_tasks` are evaluated before and after.

    `eval_tasks` may name the target's own test split; the training task itself is not evaluated. `anchor` adds
    anchor/2 * |weights - starting weights|^2 to the loss (L2-SP). Without a mask all parameters that require gradients
    learn: every weight of a plain model, the adapters of a PEFT model. Raises ValueError for options that make no sense.
    """
    check(model, epochs, lr, batch_size, loss, mask)
    evaluated = dict(eval_tasks or {})
    encoded = task.encode(model)
    before = scores(model, evaluated, progress)
    with trainable(model, mask) as (parameters, restricted):
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        history: list[dict[str, int | float]] = []
        best = Best(model, validation, parameters)
        if validation is not None:
            history.append({"epoch": 0, **best.see(0)})
        generator = torch.Generator().manual_seed(seed)
        for epoch in track(range(1, epochs + 1), f"tuning on {task.name}", enabled=progress):
            order = torch.randperm(len(encoded.gold), generator=generator)
            losses = [
                step(model, encoded, rows, loss, optimizer, parameters, start, anchor, clip)
                for rows in order.split(batch_size)
            ]
            history.append({"epoch": epoch, "loss": sum(losses) / len(losses), **best.see(epoch)})
        best.restore()
        after = scores(model, evaluated, progress)
        changes = [parameter.detach() - was for parameter, was in zip(parameters, start, strict=True)]
        moved = sum(int(change.count_nonzero()) for change in changes)
        distance = math.sqrt(sum(float(change.double().square().sum()) for change in changes))
        trained = sum(parameter.numel() for parameter in parameters)
        total = sum(p.numel() for p in model.hf.parameters()) - (trained if restricted else 0)
    options = dict(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, loss=loss, weight_decay=weight_decay)
    options |= dict(anchor=anchor, clip=clip, kept_epoch=best.epoch, mask=None if mask is None else mask.policy)
    proof = restricted.proof() if restricted else ""
    return Tuning(task.name, before, after, history, trained, moved, total, distance, proof, options, model.name)


def step(
    model: Any,
    encoded: Any,
    rows: Int[Tensor, " row"],
    loss: Loss | str,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    start: list[Tensor],
    anchor: float,
    clip: float,
) -> float:
    """One optimizer step; returns the loss without the anchor. Raises ValueError when it is not finite."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in by_length(rows, encoded.attention_mask.sum(1)):
        value = readout_loss(model, encoded, part, loss) * (len(part) / len(rows))
        if not torch.isfinite(value):
            raise ValueError(
                f"the loss became {value.item()}; use a smaller learning rate or check the weights for NaN"
            )
        value.backward()
        total += value.item()
    if anchor:
        for parameter, was in zip(parameters, start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - was, alpha=anchor)
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return total


def by_length(rows: Int[Tensor, " row"], lengths: Int[Tensor, " example"]) -> list[Int[Tensor, " part"]]:
    """A batch in parts of similar length, whose gradients add up to its own: halved while that saves an eighth of it.

    Short texts then are not padded to the longest; on text of very different lengths that is nearly half of the work.
    """
    rows = rows[lengths[rows].argsort(stable=True)]
    half = len(rows) // 2
    longest = lengths[rows].amax()
    if half == 0 or 8 * half * (longest - lengths[rows[half - 1]]) < len(rows) * longest:
        return [rows]
    return [*by_length(rows[:half], lengths), *by_length(rows[half:], lengths)]


class Best:
    """Step 3: remembers the trainable values of the epoch with the highest validation accuracy (ties: macro-F1, earlier)."""

    def __init__(self, model: Any, validation: Any, parameters: list[nn.Parameter]):
        self.model, self.validation, self.parameters = model, validation, parameters
        self.score, self.epoch, self.values = (-1.0, -1.0), None, None

    def see(self, epoch: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        result = evaluate(self.model, self.validation)
        if (result.accuracy, result.macro_f1) > self.score:
            self.score, self.epoch = (result.accuracy, result.macro_f1), epoch
            self.values = [parameter.detach().clone() for parameter in self.parameters]
        return {"validation_accuracy": result.accuracy, "validation_macro_f1": result.macro_f1}

    def restore(self) -> None:
        if self.values is not None:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.values, strict=True):
                    parameter.copy_(value)


@contextlib.contextmanager
def trainable(model: Any, mask: HeadMask | None) -> Iterator[tuple[list[nn.Parameter], Any]]:
    """The parameters that learn: the slices of the mask, or all that require gradients."""
    if mask is None:
        yield [parameter for parameter in model.hf.parameters() if parameter.requires_grad], None
        return
    with restrict(model, mask) as restricted:
        yield list(restricted.parameters()), restricted


def scores(model: Any, tasks: Mapping[str, Any], progress: bool) -> dict[str, dict[str, int | float]]:
    results = {}
    for name in track(list(tasks), "evaluating", enabled=progress):
        result = evaluate(model, tasks[name])
        results[name] = {"accuracy": result.accuracy, "macro_f1": result.macro_f1, "n": len(tasks[name])}
    return results


def check(model: Any, epochs: int, lr: float, batch_size: int, loss: str, mask: Any) -> None:
    """Raises ValueError or TypeError that names the option."""
    if epochs < 0 or batch_size < 1 or not lr > 0:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, lr={lr}: expected epochs >= 0, batch_size >= 1 and lr > 0"
        )
    if loss not in Loss.__args__:
        raise ValueError(f"loss={loss!r} is not known; choose 'labels' or 'vocabulary'")
    if loss == "vocabulary" and model.kind == "classifier":
        raise ValueError("a classifier has labels, no vocabulary; use loss='labels'")
    if mask is not None and not isinstance(mask, HeadMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}; expected a HeadMask (HeadMask.from_circuit(circuit, model)) or None"
        )
    if mask is not None and not hasattr(model.hf, "peft_config"):
        mask.check(model)

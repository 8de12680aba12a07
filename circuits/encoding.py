"""A task as tensors: what every method in `circuits` reads.

Per example: tokens and mask, the read-out position, and a direction over a few vocabulary (or label) columns, so that

    margin = logits[readout, columns] · direction = logit of the right answer − mean logit of the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .progress import track

if TYPE_CHECKING:
    from .model import Model
    from .tasks import Task


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples of a task for one model. Padding may lie on either side; `readout` counts from the left edge of the rectangle."""

    tokens: Int[Tensor, "example pos"]
    attention_mask: Int[Tensor, "example pos"]
    readout: Int[Tensor, " example"]
    columns: Int[Tensor, " column"]
    direction: Float[Tensor, "example column"]
    gold: Int[Tensor, " example"]
    groups: Int[Tensor, " example"]  # label of each example, for label-balanced means; zeros where a task has no labels
    corrupted: "Encoded | None" = None
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def candidates(self) -> Tensor:
        """[example, column] bool: the columns an example chooses among."""
        return self.direction != 0

    def select(self, indices: Sequence[int] | Tensor) -> "Encoded":
        """Some examples, in the given order; width is kept."""
        index = torch.as_tensor(indices, dtype=torch.long)
        names = ("tokens", "attention_mask", "readout", "direction", "gold", "groups")
        chosen = {name: getattr(self, name)[index] for name in names}
        return replace(self, **chosen, corrupted=None if self.corrupted is None else self.corrupted.select(index))

    def trimmed(self) -> "Encoded":
        """Without the columns that are padding in every row, on whichever side they are. The corrupted twins are dropped."""
        used = self.attention_mask.any(0).nonzero().flatten()
        first, last = int(used[0]), int(used[-1]) + 1
        tokens, mask = self.tokens[:, first:last], self.attention_mask[:, first:last]
        return replace(self, tokens=tokens, attention_mask=mask, readout=self.readout - first, corrupted=None)

    def batches(self, size: int) -> Iterator["Encoded"]:
        """Consecutive batches of at most `size` examples."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def margin(self, logits: Float[Tensor, "*batch example column"]) -> Float[Tensor, "*batch example"]:
        """Right answer minus the mean of the others, from logits at `columns` of the read-out position."""
        return (logits * self.direction.to(logits)).sum(-1)

    def columns_of(self, logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, "example column"]:
        """The task's columns at each example's read-out position, from full logits of a language model."""
        rows = torch.arange(len(self), device=logits.device)
        return logits[rows, self.readout.to(logits.device)][:, self.columns.to(logits.device)]

    def predict(self, logits: Float[Tensor, "example column"]) -> Int[Tensor, " example"]:
        """The candidate column with the highest logit."""
        return logits.masked_fill(~self.candidates.to(logits.device), float("-inf")).argmax(-1)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a model does a task. `accuracy` and `macro_f1` lie in [0, 1]; `margin` is in logits, per example."""

    accuracy: float
    macro_f1: float
    margin: Float[Tensor, " example"]
    predictions: Int[Tensor, " example"]
    gold: Int[Tensor, " example"]
    task: str = ""

    def __repr__(self) -> str:
        n, m = len(self.gold), self.margin.mean().item()
        return f"Evaluation({self.task}: accuracy {self.accuracy:.3f}, macro-F1 {self.macro_f1:.3f}, margin {m:+.3f}, n={n})"


def batch_size_for(model: "Model", positions: int, budget: int = 1 << 28) -> int:
    """Rows per forward so that a few activations of the widest part stay within `budget` bytes (256 MiB)."""
    config = model.base.config.get_text_config()
    width = max(model.anatomy.d_model * 4, getattr(config, "intermediate_size", None) or 0)
    attention = model.anatomy.n_heads * positions
    return max(1, min(512, budget // (4 * positions * (4 * width + 2 * attention))))


@torch.inference_mode()
def evaluate(model: "Model", task: "Task", batch_size: int | None = None, progress: bool = False) -> Evaluation:
    """Accuracy, macro-F1 and margins of the model as it is now.

    macro-F1 averages over the classes of a labelled task; in a paired task (answer or distractor) it is that of the two outcomes.
    """
    from sklearn.metrics import f1_score

    encoded = task.encode(model)
    size = batch_size or batch_size_for(model, encoded.tokens.shape[1])
    predicted, margins = torch.zeros_like(encoded.gold), torch.zeros(len(encoded))
    # Texts of similar length share a batch, which saves most of the padding.
    order = encoded.attention_mask.sum(1).argsort(stable=True)
    for rows in track(order.split(min(size, 32)), "evaluate", enabled=progress):
        batch = encoded.select(rows).trimmed()
        logits = model.logits(batch.tokens, batch.attention_mask, batch.readout, batch.columns).float().cpu()
        predicted[rows] = batch.predict(logits)
        margins[rows] = batch.margin(logits)
    accuracy = (predicted == encoded.gold).double().mean().item()
    f1 = f1_score(encoded.gold.numpy(), predicted.numpy(), average="macro")
    return Evaluation(accuracy, float(f1), margins, predicted, encoded.gold, task.name)

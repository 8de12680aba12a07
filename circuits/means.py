"""What a head does on average: the reference that ablation, CD-T and faithfulness put in a head's place.

1. Run the task and record z (a head's attention-weighted values, before W_O) at every real token.
2. Average over the tokens of each class, then over classes: every label weighs the same however rare it is
   ("label-balanced", CT-SFT eq. 3 with a balanced mean set, arXiv 2601.08146). "task" pools all tokens instead;
   "corrupted" pools the tokens of the corrupted twins (CD-T's choice on IOI, arXiv 2407.00886); "zero" is no mean.
3. Pads never count. Per position, column p of the batch is averaged over the examples that have a real token there.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .encoding import Encoded
from .hooks import record
from .model import Model
from .progress import track
from .readout import rows_that_fit, short_batches
from .tasks import Task

MEANS = ("label-balanced", "task", "corrupted", "zero")


def class_means(
    sums: Float[Tensor, "group layer *position head d_head"], counts: Float[Tensor, "group *position"]
) -> Float[Tensor, "layer *position head d_head"]:
    """Mean over tokens within each group, then the mean of the groups that have tokens (at that position)."""
    shape = (counts.shape[0], 1, *counts.shape[1:], 1, 1)
    seen = (counts > 0).view(shape).to(sums)
    within = sums / counts.clamp(min=1).view(shape)
    return ((within * seen).sum(0) / seen.sum(0).clamp(min=1)).float()


def mean_activations(
    model: Model,
    task: Task,
    means: str = "label-balanced",
    per_position: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "layer *position head d_head"]:
    """Mean z of every head over the task's real tokens; [layer, head, d_head], or with the position axis second.

    A task without labels (a PairedTask) has one class, so "label-balanced" is "task" there.
    """
    if means not in MEANS:
        raise ValueError(f"means={means!r}; expected one of {', '.join(map(repr, MEANS))}")
    anatomy, encoded = model.anatomy, task.encode(model)
    if means == "corrupted":
        if encoded.corrupted is None:
            raise ValueError("means='corrupted' needs corrupted twins; give every row a 'corrupted' prompt")
        encoded = encoded.corrupted
    positions = (encoded.tokens.shape[1],) if per_position else ()
    shape = (anatomy.n_layers, *positions, anatomy.n_heads, anatomy.d_head)
    if means == "zero":
        return torch.zeros(shape, device=model.device)
    groups = encoded.groups if means == "label-balanced" else torch.zeros_like(encoded.groups)
    groups = groups.unique(return_inverse=True)[1]
    # Sums over many thousands of tokens: float64, or the mean drifts with batch size.
    sums = torch.zeros(int(groups.max()) + 1, *shape, dtype=torch.float64)
    counts = torch.zeros(len(sums), *positions, dtype=torch.float64)
    size = rows_that_fit(model, encoded, batch_size)
    for indices, batch in track(short_batches(encoded, size), "means", -(-len(encoded) // size), progress):
        _add(model, batch, groups[indices], sums, counts, per_position)
    return class_means(sums, counts).to(model.device)


def _add(
    model: Model, batch: Encoded, groups: Int[Tensor, " batch"], sums: Tensor, counts: Tensor, per_position: bool
) -> None:
    """Add one batch's z to the running sums of its groups, in place."""
    with torch.no_grad(), record(model, "z") as cache:
        model.hidden(batch.tokens, batch.attention_mask)
    z, real = cache.stack().double().cpu(), batch.attention_mask.double().cpu()
    z = z * real[None, :, :, None, None]  # layer batch position head d_head
    width = z.shape[2]
    for group in groups.unique().tolist():
        chosen, present = z[:, groups == group].sum(1), real[groups == group].sum(0)
        if per_position:
            sums[group, :, :width] += chosen
            counts[group, :width] += present
        else:
            sums[group] += chosen.sum(1)
            counts[group] += present.sum()

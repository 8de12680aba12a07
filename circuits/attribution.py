"""What each head does for the task: the exact effect, and two gradient approximations of it. Same HeadScores out.

m(x) is the task's margin (gold minus the mean of the other columns) and z_h a head's output before W_O.

1. Reference r_h: the head's mean (`circuits.means`), zero, or its z on another example ("resample": the corrupted twin, or a donor).
2. `ablation`, the oracle:     s_h = m(x) - m(x; z_h := r_h). One head at a time, everything downstream recomputed.
3. `gradient`, attribution patching (Syed et al. 2023, arXiv 2310.10348, at nodes): s_h = <z_h - r_h, dm/dz_h>, all heads
   from one backward pass.
4. `integrated_gradients` (after EAP-IG, Hanna et al. 2024, arXiv 2403.17806, at nodes): the same product with the
   gradient averaged at midpoints of the straight path from r to z. The path moves all heads of one layer together, so a
   layer's scores sum to the effect of ablating that whole layer (completeness) as steps grow.

All three are signed: positive supports the gold label. Gradient and integrated gradients equal ablation where the margin
is linear in z_h; attention, norms and MLPs downstream are what they miss.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .encoding import Encoded
from .heads import Circuit, Head, HeadScores
from .hooks import record, rewrite
from .means import mean_activations
from .model import Model
from .progress import track
from .readout import column_logits, rows_that_fit, short_batches
from .resampling import donor_z, with_donors
from .resume import resume_at
from .tasks import Task

ABLATIONS = ("mean", "zero", "resample")


def ablation(
    model: Model,
    task: Task,
    *,
    ablate: str = "mean",
    means: str = "label-balanced",
    per_position: bool = False,
    heads: Circuit | Iterable[Head] | None = None,
    positions: str = "all",
    reference: Float[Tensor, "layer *position head d_head"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """The exact effect of each head: clean margin minus the margin with that head's z replaced.

    Heads outside `heads` score 0. `positions` is "all" or "readout" (replace z only where the answer is read). Cost:
    one forward of the layers from l up per head of layer l, many heads per forward along the batch axis.
    """
    chosen = _chosen(model, heads)
    return _score(
        "ablation",
        _ablate_batch,
        model,
        task,
        ablate,
        means,
        per_position,
        positions,
        reference,
        batch_size,
        progress,
        heads=chosen,
    )


def gradient(
    model: Model,
    task: Task,
    *,
    ablate: str = "mean",
    means: str = "label-balanced",
    per_position: bool = False,
    positions: str = "all",
    reference: Float[Tensor, "layer *position head d_head"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Attribution patching: (z - reference) . d margin / d z, every head from one forward and one backward."""
    return _score(
        "gradient",
        _gradient_batch,
        model,
        task,
        ablate,
        means,
        per_position,
        positions,
        reference,
        batch_size,
        progress,
    )


def integrated_gradients(
    model: Model,
    task: Task,
    *,
    steps: int = 5,
    ablate: str = "mean",
    means: str = "label-balanced",
    per_position: bool = False,
    positions: str = "all",
    reference: Float[Tensor, "layer *position head d_head"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """(z - reference) . the mean of d margin / d z at `steps` midpoints of the path, one layer at a time."""
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1 point on the path from the reference to z")
    return _score(
        "integrated_gradients",
        _integrate_batch,
        model,
        task,
        ablate,
        means,
        per_position,
        positions,
        reference,
        batch_size,
        progress,
        steps=steps,
    )


# ---- one batch of each method: effects [batch, layer, head] ---------------------------------------------------------


def _ablate_batch(model: Model, batch: Encoded, delta: Tensor, rows: int, heads: Bool[Tensor, "layer head"]) -> Tensor:
    """delta = z - reference, zero where nothing is replaced; copy c of the batch loses head chosen[c]."""
    size, (n_layers, n_heads) = len(batch), heads.shape
    effects = torch.zeros(size, n_layers, n_heads)
    with torch.no_grad():
        with record(model, "resid_pre") as residual:
            clean = batch.margin(column_logits(model, batch)[0])
        for layer in range(n_layers):
            if not heads[layer].any():
                continue
            for chosen in heads[layer].nonzero()[:, 0].split(max(1, rows // size)):

                def drop(z: Tensor, _: int, layer: int = layer, chosen: Tensor = chosen) -> Tensor:
                    z = z.clone().unflatten(0, (len(chosen), size))
                    copies = torch.arange(len(chosen))
                    z[copies, :, :, chosen] -= delta[layer][:, :, chosen].movedim(2, 0).to(z.dtype)
                    return z.flatten(0, 1)

                start = residual[layer].repeat(len(chosen), 1, 1)
                with resume_at(model, layer, start), rewrite(model, "z", drop, layers=[layer]):
                    ablated = batch.margin(column_logits(model, batch, copies=len(chosen)))
                effects[:, layer, chosen] = (clean - ablated).T.cpu()
    return effects


def _gradient_batch(model: Model, batch: Encoded, delta: Tensor, rows: int) -> Tensor:
    grads = _gradients(model, batch, {layer: (lambda z: z) for layer in range(len(delta))}, copies=1)
    return torch.stack([(grads[layer].float() * delta[layer]).sum((1, 3)) for layer in range(len(delta))], 1).cpu()


def _integrate_batch(model: Model, batch: Encoded, delta: Tensor, rows: int, steps: int) -> Tensor:
    size, effects = len(batch), []
    with torch.no_grad(), record(model, "resid_pre") as residual:
        column_logits(model, batch)
    for layer, difference in enumerate(delta):
        total = torch.zeros_like(difference)
        for points in torch.arange(steps).split(max(1, rows // size)):
            back = 1 - (points.to(difference) + 0.5) / steps  # how far back towards the reference
            shift = (back.view(-1, 1, 1, 1, 1) * difference).flatten(0, 1)
            with resume_at(model, layer, residual[layer].repeat(len(points), 1, 1)):
                grads = _gradients(model, batch, {layer: lambda z, s=shift: z - s.to(z.dtype)}, copies=len(points))
            total += grads[layer].float().unflatten(0, (len(points), size)).sum(0)
        effects.append((difference * total / steps).sum((1, 3)))
    return torch.stack(effects, 1).cpu()


def _gradients(
    model: Model, batch: Encoded, paths: dict[int, Callable[[Tensor], Tensor]], copies: int
) -> dict[int, Tensor]:
    """d margin / d z at path(z), per layer: a probe of zeros is added to z, and its gradient is taken."""
    probes: dict[int, Tensor] = {}

    def add_probe(z: Tensor, layer: int) -> Tensor:
        probes[layer] = torch.zeros_like(z, requires_grad=True)
        return paths[layer](z) + probes[layer]

    with torch.enable_grad(), rewrite(model, "z", add_probe, layers=list(paths)):
        total = batch.margin(column_logits(model, batch, copies)).sum()
        grads = torch.autograd.grad(total, [probes[layer] for layer in paths])
    return dict(zip(paths, grads, strict=True))


# ---- the loop they share --------------------------------------------------------------------------------------------


def _score(
    method: str,
    effects_of: Callable[..., Tensor],
    model: Model,
    task: Task,
    ablate: str,
    means: str,
    per_position: bool,
    positions: str,
    reference: Tensor | None,
    batch_size: int | None,
    progress: bool,
    **options,
) -> HeadScores:
    if positions not in ("all", "readout"):
        raise ValueError(f"positions={positions!r}; expected 'all' or 'readout'")
    if reference is None:
        reference = reference_activations(model, task, ablate, means, per_position, batch_size)
    encoded = task.encode(model)
    if reference is None:
        encoded = with_donors(encoded)
    rows = rows_that_fit(model, encoded, batch_size)
    values = torch.zeros(len(encoded), model.anatomy.n_layers, model.anatomy.n_heads)
    for indices, batch in track(short_batches(encoded, rows), method, -(-len(encoded) // rows), progress):
        delta = difference(model, batch, reference, positions)
        values[indices] = effects_of(model, batch, delta, rows, **options)
    described = {name: value for name, value in options.items() if name != "heads"}
    return HeadScores(
        values.mean(0),
        method=method,
        examples=values,
        model=model.name,
        revision=model.revision,
        options={"ablate": ablate, "means": means, "per_position": per_position, "positions": positions, **described},
        data=task.fingerprint,
        task=task.name,
    )


def reference_activations(
    model: Model, task: Task, ablate: str, means: str, per_position: bool = False, batch_size: int | None = None
) -> Float[Tensor, "layer *position head d_head"] | None:
    """What replaces a head: its mean, zero, or (None) its z on each example's donor (`resampling`)."""
    if ablate not in ABLATIONS:
        raise ValueError(f"ablate={ablate!r}; expected one of {', '.join(map(repr, ABLATIONS))}")
    if ablate == "resample":
        return None
    kind = "zero" if ablate == "zero" else means
    return mean_activations(model, task, kind, per_position, batch_size)


def difference(
    model: Model, batch: Encoded, reference: Tensor | None, positions: str = "all"
) -> Float[Tensor, "layer batch position head d_head"]:
    """z - reference on a clean run, zero at pads (nothing is replaced there) and outside `positions`."""
    with torch.no_grad(), record(model, "z") as clean:
        model.hidden(batch.tokens, batch.attention_mask)
    z = clean.stack().float()
    if reference is None:
        against = donor_z(model, batch).float()
    elif reference.ndim == 3:
        against = reference[:, None, None].to(z)
    else:
        against = reference[:, None, : z.shape[2]].to(z)
    where = batch.attention_mask.to(z)
    if positions == "readout":
        where = where * torch.nn.functional.one_hot(batch.readout, z.shape[2]).to(z)
    return (z - against) * where[None, :, :, None, None]


def _chosen(model: Model, heads: Circuit | Iterable[Head] | None) -> Bool[Tensor, "layer head"]:
    shape = (model.anatomy.n_layers, model.anatomy.n_heads)
    if heads is None:
        return torch.ones(shape, dtype=torch.bool)
    chosen = torch.zeros(shape, dtype=torch.bool)
    for head in Circuit(heads, *shape):
        chosen[head.layer, head.head] = True
    return chosen

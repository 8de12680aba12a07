"""Learned gates: which heads a task needs, cannot use, or does not care about (causal head gating, Nam et al., arXiv 2505.13737).

1. A gate g in [0, 1] per head: its z becomes g z + (1 - g) mean. Nothing else is trained.
2. Fit the gates to the task's loss (cross-entropy over its candidate answers) plus λ times the mean gate, twice: once with
   λ > 0, which closes every gate that the task does not need (g+), once with λ < 0, which opens every gate that does no harm (g-).
3. Score = g+ + g- - 1: near +1 the head is needed, near -1 it is harmful, near 0 it does not matter. After the paper's
   facilitation g+, interference 1 - g-, and irrelevance g- (1 - g+). The number of steps, the rate and λ here are our own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .encoding import Encoded
from .heads import HeadScores
from .hooks import rewrite
from .means import mean_activations
from .model import Model
from .progress import track
from .readout import column_logits
from .tasks import Task


def gate_score(
    needed: Float[Tensor, "layer head"], harmless: Float[Tensor, "layer head"]
) -> Float[Tensor, "layer head"]:
    """From the gates fitted with λ > 0 and with λ < 0."""
    return needed + harmless - 1


def learned_gates(
    model: Model,
    task: Task,
    *,
    steps: int = 200,
    lr: float = 0.1,
    sparsity: float = 0.5,
    means: str = "label-balanced",
    per_position: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """Fit the gates; the model's weights are read only. Scores lie between -1 and 1."""
    if steps < 1 or sparsity <= 0:
        raise ValueError(f"steps={steps}, sparsity={sparsity}; expected at least one step and a positive weight")
    encoded = task.encode(model)
    reference = mean_activations(model, task, means, per_position).to(model.dtype)
    fitted = []
    for sign, name in ((1, "closing gates"), (-1, "opening gates")):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.zeros(model.anatomy.n_layers, model.anatomy.n_heads, device=model.device, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=lr)
        for _ in track(range(steps), name, enabled=progress):
            chosen = torch.randperm(len(encoded), generator=generator)[:batch_size]
            gates = logits.sigmoid()
            loss = _loss(model, encoded.select(chosen), gates, reference) + sign * sparsity * gates.mean()
            (logits.grad,) = torch.autograd.grad(loss, [logits])
            optimizer.step()
        fitted.append(logits.detach().sigmoid().cpu())
    return HeadScores(
        gate_score(*fitted),
        method="learned_gates",
        model=model.name,
        revision=model.revision,
        task=task.name,
        data=task.fingerprint,
        seed=seed,
        options={
            "steps": steps,
            "lr": lr,
            "sparsity": sparsity,
            "means": means,
            "per_position": per_position,
            "units": "gate",
        },
    )


def _loss(model: Model, batch: Encoded, gates: Tensor, reference: Tensor) -> Tensor:
    def close(z: Tensor, layer: int) -> Tensor:
        g = gates[layer][:, None].to(z.dtype)
        return g * z + (1 - g) * reference[layer]

    with torch.enable_grad(), model.evaluating(), rewrite(model, "z", close):
        logits = column_logits(model, batch)[0].float()
    logits = logits.masked_fill(~batch.candidates.to(logits.device), float("-inf"))
    return torch.nn.functional.cross_entropy(logits, batch.gold.to(logits.device))

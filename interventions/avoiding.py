"""Which heads can learn the target without disturbing what must be kept (ours).

Relevance says where a task lives, not what else lives there.

For the weights w of one head, with g_t the target's gradient, g_k the kept task's, F_k its diagonal Fisher information, and a
tuning that moves every weight by about `step` against the sign of g_t (what Adam does):
1. target loss falls by       fall = step · Σ |g_t|
2. kept loss rises by         rise = -step · Σ sign(g_t) g_k  +  step²/2 · Σ F_k      (second order: at a minimum g_k is small)
3. keep the heads with the lowest rise / fall, as many as the budget allows.
A measured per-head interference (`HeadScores`, lower is better) takes the place of rise / fall when it is given.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.heads import Circuit, Head, HeadScores

from .restriction import restrict
from .tuning import readout_loss


def disturbance(
    fall: Float[Tensor, " weight"], kept: Float[Tensor, " weight"], fisher: Float[Tensor, " weight"], step: float
) -> tuple[float, float]:
    """Steps 1 and 2 for the weights of one head, from the target's gradient and the kept task's: (rise, fall)."""
    rise = -step * (fall.sign() * kept).sum() + step**2 / 2 * fisher.sum()
    return rise.item(), (step * fall.abs().sum()).item()


def least_disturbing(
    circuit: Circuit,
    kept_task: Any,
    model: Any,
    target_task: Any,
    budget: int,
    interference: HeadScores | None,
    step: float,
) -> Circuit:
    """Step 3. Raises ValueError for a budget outside 1..len(circuit), or when nothing says what the target needs."""
    if not 1 <= budget <= len(circuit):
        raise ValueError(f"budget={budget} heads of a circuit of {len(circuit)}; choose between 1 and {len(circuit)}")
    if interference is not None:
        cost = {head: interference[head] for head in circuit}
    elif target_task is not None:
        cost = {
            head: rise / max(fall, 1e-30)
            for head, (rise, fall) in costs(circuit, kept_task, model, target_task, step).items()
        }
    else:
        raise ValueError(
            "avoiding needs target_task= (to estimate what tuning would disturb) or interference= (measured)"
        )
    heads = sorted(circuit, key=lambda head: (cost[head], head))[:budget]
    provenance = {"how": "avoiding", "kept": kept_task.name, "cost": {str(h): cost[h] for h in circuit}}
    return Circuit(heads, circuit.n_layers, circuit.n_heads, {**provenance, "of": dict(circuit.provenance)})


def costs(
    circuit: Circuit, kept_task: Any, model: Any, target_task: Any, step: float
) -> dict[Head, tuple[float, float]]:
    """(rise, fall) of every head; gradients exist only for the heads in question."""
    owned = {head: model.anatomy.slices(head) for head in circuit}
    target, kept = target_task.encode(model), kept_task.encode(model)
    with restrict(model, [entry for slices in owned.values() for entry in slices], verify=False) as restricted:
        names = [name.removesuffix("_slice") for name, _ in restricted.named_parameters()]
        parameters = list(restricted.parameters())

        def gradient(encoded: Any, rows: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(readout_loss(model, encoded, rows), parameters))

        g_target = gradient(target, torch.arange(len(target.gold)))
        examples = [gradient(kept, row[None]) for row in torch.arange(len(kept.gold))]
        g_kept = [sum(parts) / len(examples) for parts in zip(*examples, strict=True)]
        fisher = [sum(part.square() for part in parts) / len(examples) for parts in zip(*examples, strict=True)]

        def of(head: Head, compact: list[Any]) -> Float[Tensor, " weight"]:
            found = []
            for name, dim, start, stop in owned[head]:
                ranges = restricted.grouped[name][1]
                offset = 0
                for low, high in ranges:
                    if low <= start and stop <= high:
                        found.append(
                            compact[names.index(name)].narrow(dim, offset + start - low, stop - start).flatten()
                        )
                    offset += high - low
            return torch.cat(found).float()

        return {head: disturbance(of(head, g_target), of(head, g_kept), of(head, fisher), step) for head in circuit}

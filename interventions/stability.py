"""When does an ensemble want to spread? Local stability of a single adapter under the α-Rényi objective.

1. For small spread with covariance C around θ:  ℓ_α(Q) − ℓ(θ) = ½ tr[(V − α J) C] + o(C),
   V = E[−∇² log p_θ] and J = E[∇ log p_θ ∇ log p_θᵀ], the outer product of the data's scores.
2. Spread pays as soon as V − α J is not positive definite: α* = 1 / λ_max(V^{-1/2} J V^{-1/2}).
   Well specified: J = V and α* = 1. Contradicting data: α* < 1.
3. Estimates: V from scores of labels drawn from the model (model Fisher), plus the prior λ/σ₀²; J from the data's.
4. Gram form: with J = WᵀW and V = UᵀU + δI, the non-zero eigenvalues of V⁻¹J are those of
   W V⁻¹ Wᵀ = (1/δ) [W Wᵀ − W Uᵀ (δI + U Uᵀ)⁻¹ U Wᵀ]   (Woodbury): examples × examples, never parameters × parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .examples import Examples, from_rows, from_task, is_task
from .likelihood import combine, member_logits, target_log_likelihood
from .lora import StackedLoRA


def critical_alpha(
    data_scores: Float[Tensor, "example parameter"],
    model_scores: Float[Tensor, "sample parameter"],
    damping: float | int,
) -> float:
    """α* from per-example scores ∇ log p of the data's labels and of labels drawn from the model; `damping` > 0."""
    if damping <= 0:
        raise ValueError(f"damping is {damping}; expected more than 0, for example the prior's λ/σ₀²")
    W = data_scores.double() / len(data_scores) ** 0.5
    U = model_scores.double() / len(model_scores) ** 0.5
    inner = U @ U.T + damping * torch.eye(len(U), dtype=torch.float64)
    cross = U @ W.T
    gram = (W @ W.T - cross.T @ torch.linalg.solve(inner, cross)) / damping
    largest = torch.linalg.eigvalsh((gram + gram.T) / 2)[-1].item()
    return float("inf") if largest <= 0 else 1 / largest


def member_scores(
    hf: Any,
    stack: StackedLoRA,
    member: int,
    examples: Examples,
    draw: Callable[[Tensor, Tensor], Tensor] | None = None,
    chunk: int = 32,
) -> Float[Tensor, "example parameter"]:
    """∇θ log p per example for one member: every example gets its own copy of the adapter, one backward for all.

    `draw(logits [target, vocab], targets [target])` replaces the labels, for the model's Fisher information.
    """
    if hasattr(hf, "get_output_embeddings") and any(
        hf.get_submodule(n) is hf.get_output_embeddings() for n in stack.names
    ):
        raise ValueError("per-example scores of the output layer are not supported; adapt other target_modules")
    found, hf_device = [], next(hf.parameters()).device
    for rows in torch.arange(len(examples)).split(chunk):
        batch = examples.select(rows).to(hf_device)
        copies = stack.part(slice(member, member + 1))
        for factors in (copies.A, copies.B):
            for number, parameter in enumerate(factors):
                factors[number] = torch.nn.Parameter(parameter.detach().repeat(len(rows), 1, 1))
        copies.members = len(rows)
        with copies.attached(hf, fold=False):
            logits = member_logits(hf, batch, batch.where, 1, 1)
            targets = batch.targets[batch.where]
            if draw is not None:
                targets = draw(logits[0].detach(), targets)
            combine(target_log_likelihood(logits, targets), batch, "sequence").sum().backward()
        grads = [parameter.grad.flatten(1) for parameter in copies.parameters() if parameter.grad is not None]
        found.append(torch.cat(grads, 1).cpu())
    return torch.cat(found)


def estimate_critical_alpha(
    ensemble: Any, data: Any, member: int = 0, damping: float | int | None = None, samples: int = 8, seed: int = 0
) -> float:
    """α* of one trained member on its LoRA parameters. `samples`: label draws per example for the model's Fisher.

    Each example's own score direction enters V only through draws that hit it, so few samples and little damping
    overstate λ_max and understate α*; compare values at the same `samples` and `damping` only.
    """
    if is_task(data):
        examples = from_task(ensemble._loaded(), data)[0]
    else:
        examples = from_rows(list(data), ensemble.tokenizer)
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor, targets: Tensor) -> Tensor:
        p = torch.softmax(logits.float().cpu(), -1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(targets)

    if damping is None:
        settings = ensemble.settings
        damping = float(settings.get("ridge", 1e-4)) / float(settings.get("prior_sd", 1.0)) ** 2
    scores = member_scores(ensemble.hf, ensemble.stack, member, examples)
    model = [member_scores(ensemble.hf, ensemble.stack, member, examples, draw) for _ in range(samples)]
    return critical_alpha(scores, torch.cat(model), damping)

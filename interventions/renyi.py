"""α-Rényi objective over a finite ensemble ("Soft Specialists", arXiv 2605.27747; formulas second hand or derived).

For an ensemble Q = (1/M) Σᵢ δ_{θᵢ} on one frozen base model and s_ib = log p_{θᵢ}(y_b | x_b):

1. loss             ℓ_α = mean_b −(1/α) [ logsumexpᵢ(α s_ib) − log M ]
                    α = 0: −mean s, every member must be good alone (deep ensemble); α = 1: −log of the mixture, members
                    only need to be good together; α = ∞: only the best member counts. ℓ_α never increases with α.
2. responsibilities w_ib = softmaxᵢ(α s_ib), and ∂ℓ_α/∂s_ib = −w_ib / B exactly: the 1/α cancels.
3. prior            (λ/M) Σᵢ ‖θᵢ‖² / (2σ₀²), the Gaussian part of λ·KL(Q ‖ N(0, σ₀²)); point masses have no entropy.
4. preferences      s_ib = log σ(β hᵢ), with hᵢ the DPO margin of member i against the frozen base.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def renyi_loss(log_likelihood: Float[Tensor, "member batch"], alpha: float | int) -> Float[Tensor, ""]:
    """ℓ_α, averaged over the batch. Exact gradients for every α in [0, ∞], in single precision too."""
    _check(log_likelihood, alpha)
    if alpha < 1e-12:  # ℓ_α = ℓ_0 − (α/2) Var s + ...: the difference is below rounding, and 1/α would overflow
        return -log_likelihood.mean()
    top = log_likelihood.amax(0)
    if math.isinf(alpha):
        return -top.mean()
    mean = log_likelihood.mean(0)
    centred = alpha * (log_likelihood - mean)
    # Two exact forms of (1/α) log mean exp(α s): around the mean, where expm1 and log1p keep what α -> 0 would cancel,
    # and around the maximum, where nothing overflows. -inf (an impossible label) makes `centred` nan, so not close.
    close = centred.abs().amax(0) < 0.5
    safe = torch.where(close, centred, torch.zeros_like(centred))
    near = torch.log1p(torch.expm1(safe).mean(0)) / alpha + torch.where(close, mean, torch.zeros_like(mean))
    peak = top.detach()
    far = torch.logsumexp(alpha * (log_likelihood - peak), 0) / alpha + peak - math.log(len(log_likelihood)) / alpha
    return -torch.where(close, near, far).mean()


def responsibilities(
    log_likelihood: Float[Tensor, "member batch"], alpha: float | int
) -> Float[Tensor, "member batch"]:
    """w = softmax over members of α s: who answers for which example. Columns sum to 1; ties share."""
    _check(log_likelihood, alpha)
    if alpha == 0:
        return torch.full_like(log_likelihood, 1 / len(log_likelihood))
    distance = log_likelihood - log_likelihood.amax(0)
    if math.isinf(alpha):
        best = (distance == 0).to(log_likelihood)
        return best / best.sum(0)
    return torch.softmax(alpha * distance, 0)


def preference_log_likelihood(h: Float[Tensor, "member batch"], beta: float | int) -> Float[Tensor, "member batch"]:
    """log σ(β h) of DPO; h = log π(chosen) − log π(rejected) of each member, minus the same of the base."""
    return torch.nn.functional.logsigmoid(beta * h)


def monitor(log_likelihood: Float[Tensor, "member batch"], alpha: float | int) -> dict[str, float | list[float]]:
    """What to log each step: ℓ_α, its two ends, effective members per example, their usage, |sᵢ − sⱼ| over pairs."""
    s = log_likelihood.detach()
    weights = responsibilities(s, alpha)
    everyone, mixture = renyi_loss(s, 0.0).item(), renyi_loss(s, 1.0).item()
    pairs = (s[:, None] - s[None]).abs().sum((0, 1)) / max(len(s) * (len(s) - 1), 1)
    return {
        "loss": renyi_loss(s, alpha).item(),
        "loss_0": everyone,
        "loss_1": mixture,
        "gap": everyone - mixture,
        "effective_members": (1 / weights.square().sum(0)).mean().item(),
        "usage": weights.mean(1).tolist(),
        "disagreement": pairs.mean().item(),
    }


def _check(log_likelihood: Tensor, alpha: float | int) -> None:
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; expected 0 (independent members) or more, 1 is the mixture likelihood")
    if log_likelihood.numel() == 0:
        raise ValueError(f"log_likelihood is empty, shape {tuple(log_likelihood.shape)}; expected [member, batch]")

"""Optional controls of the importance-sampling loop, all off by default, and the two numbers that diagnose it.

With one-hot weights the mean is a random walk of winning noise: ESS near 1 and |U| near sigma * sqrt(rounds * tau * d).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def effective_sample_size(weights: Float[Tensor, " n"]) -> float:
    """1 / sum w^2: n for equal weights, 1 for a single winner."""
    return float(1 / weights.double().square().sum())


def gaussian_kl(mean: Float[Tensor, "tau d"], sigma2: float | int) -> float:
    """KL(N(U, sigma2 I) || N(0, sigma2 I)) = |U|^2 / (2 sigma2), in nats."""
    return float(mean.double().square().sum() / (2 * sigma2))


def log_weights(rewards: Float[Tensor, " n"], inner: Float[Tensor, " n"], sigma2: float | int, temperature: float | int,
                alpha: float | int) -> Float[Tensor, " n"]:  # fmt: skip
    """r / lambda - (1 - alpha) / sigma2 * <U, V>, up to a constant; equal rewards (all -inf too) say nothing."""
    best = rewards.max()
    shifted = torch.zeros_like(rewards) if best == -math.inf else rewards - best
    cost = (1 - alpha) / sigma2 if sigma2 else 0.0  # without noise every sample is the same
    return shifted / temperature - cost * inner


def temperature_for_ess(rewards: Float[Tensor, " n"], inner: Float[Tensor, " n"], sigma2: float | int, alpha: float | int,
                        target: float | int) -> float:  # fmt: skip
    """Bisection for the lambda whose weights have ESS `target`; the flattest of the range when even that is not enough."""
    finite = rewards[rewards.isfinite()]
    spread = float(finite.max() - finite.min()) if len(finite) else 0.0
    if spread == 0.0:
        return 1.0
    low, high = math.log(1e-6 * spread), math.log(1e6 * spread)
    for _ in range(60):
        middle = (low + high) / 2
        weights = log_weights(rewards, inner, sigma2, math.exp(middle), alpha).softmax(0)
        low, high = (middle, high) if effective_sample_size(weights) < target else (low, middle)
    return math.exp(high)


def standardised(rewards: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Zero mean, unit deviation over the finite rewards of one round."""
    finite = rewards[rewards.isfinite()]
    if len(finite) < 2 or finite.std() == 0:
        return rewards
    return (rewards - finite.mean()) / finite.std()


def capped(mean: Float[Tensor, "tau d"], norm_cap: float | int | None) -> Float[Tensor, "tau d"]:
    norm = float(mean.norm())
    return mean * (norm_cap / norm) if norm_cap is not None and norm > norm_cap else mean


def has_fallen(means: list[float], patience: int) -> bool:
    """The mean reward has stayed below its maximum for `patience` rounds."""
    best = max(range(len(means)), key=means.__getitem__)
    return len(means) - 1 - best >= patience

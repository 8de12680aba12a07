"""Muon: momentum, orthogonalised.

1. B <- momentum * B + G;  M = G + momentum * B (Nesterov).
2. D = msign(M) by five quintic Newton-Schulz steps; singular values land near 1, not exactly on it.
3. W <- W - lr * adjust(W) * D, after the decoupled decay W <- (1 - lr * weight_decay) W.

Jordan et al. 2024 (the coefficients and the "original" adjustment), Liu et al. 2025, arXiv 2502.16982 (matching AdamW's RMS).
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Chosen by Jordan for the steepest slope at zero; they trade exactness (singular values end in about 0.7 to 1.2) for speed.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    M: Float[Tensor, "*batch m n"],
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-7,
) -> Float[Tensor, "*batch m n"]:
    """Newton-Schulz approximation of msign(M) = U V^T. Batched; zero rows and columns stay exactly zero.

    Runs in bfloat16 on CUDA, in the dtype of M elsewhere. `coefficients=(15/8, -10/8, 3/8), steps=15` converges.
    """
    a, b, c = coefficients
    X = M.bfloat16() if M.device.type == "cuda" and M.dtype == torch.float32 else M
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(M.dtype)


def momentum_update(
    gradient: Float[Tensor, "*shape"], buffer: Float[Tensor, "*shape"], momentum: float | int, nesterov: bool = True
) -> Float[Tensor, "*shape"]:
    """Update `buffer` in place and return the direction. Sums, not averages: msign does not see the scale."""
    buffer.mul_(momentum).add_(gradient)
    return gradient.add(buffer, alpha=momentum) if nesterov else buffer.clone()


def adjustment(out_features: int, in_features: int, rule: str) -> float:
    """Factor on the learning rate of a layer y = W x; names as in `torch.optim.Muon`."""
    if rule == "match_rms_adamw":
        return 0.2 * max(out_features, in_features) ** 0.5
    if rule == "original":
        return max(1.0, out_features / in_features) ** 0.5
    raise ValueError(f"adjust={rule!r}; expected 'match_rms_adamw' or 'original'")

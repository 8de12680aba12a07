"""Truncated singular subspaces and their Gram matrices: the small linear algebra under SIFT.

1. `truncated_svd`: M ~ U S V^T through the Gram matrix of the shorter side, small problems in float64.
2. `svd_of_factors`: the same for M = B A given as factors (LoRA), through two QRs; M is never formed.
3. `subspace_iteration`: an inexpensive approximation that can start from the last step's subspace.
4. `inverse_sqrt`: G^(-1/2) with a rank cut; polar(U) = U (U^T U)^(-1/2).

Singular triplets below `SINGULAR_RTOL` of the largest are numerical noise. They are not dropped but zeroed (zero columns of U
and V, zero in S), so that batches keep one shape; every formula here and downstream gives such columns no weight.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SINGULAR_RTOL = 1e-6
OVERSAMPLING = 8


class Spectrum(NamedTuple):
    """The leading K singular triplets, largest first; triplets that are noise are zero."""

    U: Float[Tensor, "*batch m K"]
    S: Float[Tensor, "*batch K"]
    V: Float[Tensor, "*batch n K"]

    @property
    def rank(self) -> Tensor:
        return (self.S > 0).sum(-1)


def truncated_svd(M: Float[Tensor, "*batch m n"], K: int) -> Spectrum:
    """Leading K triplets by the Gram matrix of the shorter side; by a full SVD where squaring would cost digits."""
    check_rank(K, M.shape[-2], M.shape[-1])
    X = wide(M)
    tall = X.shape[-2] >= X.shape[-1]
    values, vectors = torch.linalg.eigh(X.mT @ X if tall else X @ X.mT)
    S = values[..., -K:].flip(-1).clamp_min(0).sqrt()
    near = vectors[..., -K:].flip(-1)
    kept = S > SINGULAR_RTOL * S[..., :1]
    if bool((kept & (S < 1e-4 * S[..., :1])).any()):  # squared condition number above 1e8: half the digits are gone
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        return _zero_noise(U[..., :K], S[..., :K], Vh.mT[..., :K])
    far = (X if tall else X.mT) @ near / torch.where(kept, S, 1).unsqueeze(-2)
    return _zero_noise(far, S, near) if tall else _zero_noise(near, S, far)


def svd_of_factors(left: Float[Tensor, "*batch m r"], right: Float[Tensor, "*batch r n"], K: int) -> Spectrum:
    """`truncated_svd(left @ right, K)` at the cost of r x r; triplets beyond r are zero."""
    check_rank(K, left.shape[-2], right.shape[-1])
    Q_left, R_left = torch.linalg.qr(wide(left))
    Q_right, R_right = torch.linalg.qr(wide(right).mT)
    P, S, Rh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    spectrum = _zero_noise(Q_left @ P, S, Q_right @ Rh.mT)
    missing = max(0, K - S.shape[-1])
    return Spectrum(*(torch.nn.functional.pad(part, (0, missing))[..., :K] for part in spectrum))


def subspace_iteration(
    M: Float[Tensor, "*batch m n"], K: int, start: Float[Tensor, "*batch n width"] | None = None, iterations: int = 1
) -> tuple[Spectrum, Float[Tensor, "*batch n width"]]:
    """Leading K triplets by block power iteration in the dtype of M, and the basis to start from next time.

    Costs 2 + 2 `iterations` thin products with M. `start` is the basis returned for a nearby matrix.
    """
    check_rank(K, M.shape[-2], M.shape[-1])
    width = min(K + OVERSAMPLING, *M.shape[-2:])
    V = torch.zeros(*M.shape[:-2], M.shape[-1], width, dtype=M.dtype, device=M.device) if start is None else start
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(M.shape[-1], width, generator=generator).to(V) * M.shape[-1] ** -0.5
    # A direction that was noise last time has a zero column and could never come back: give it a random start.
    V = torch.where(V.square().sum(-2, keepdim=True) > 0.5, V, fresh)
    for _ in range(iterations):
        V = polar(M.mT @ polar(M @ V))
    Q = polar(M @ V)
    Z = M.mT @ Q  # M ~ Q Z^T
    values, W = torch.linalg.eigh(wide(Z.mT @ Z))
    S, W = values.flip(-1).clamp_min(0).sqrt(), W.flip(-1)
    kept = S > SINGULAR_RTOL * S[..., :1]
    V = Z @ (W * torch.where(kept, 1 / S, 0).unsqueeze(-2)).to(Z)
    U = Q @ (W * kept.unsqueeze(-2)).to(Q)
    return Spectrum(U[..., :K], (S * kept)[..., :K].to(M), V[..., :K]), V


def inverse_sqrt(G: Float[Tensor, "*batch d d"], rtol: float = 1e-4) -> Float[Tensor, "*batch d d"]:
    """G^(-1/2) of a Gram matrix; eigenvalues below `rtol` of the largest count as zero and stay zero."""
    values, vectors = torch.linalg.eigh(wide(G))
    kept = (values > rtol * values[..., -1:]) & (values > 0)
    roots = torch.where(kept, values, 1).rsqrt() * kept
    return ((vectors * roots.unsqueeze(-2)) @ vectors.mT).to(G)


def polar(A: Float[Tensor, "*batch m d"], rtol: float = SINGULAR_RTOL**2) -> Float[Tensor, "*batch m d"]:
    """The nearest matrix with orthonormal columns (a partial isometry where A lacks rank)."""
    tall = wide(A)
    return A @ inverse_sqrt(tall.mT @ tall, rtol).to(A)


def check_rank(K: int, m: int, n: int) -> None:
    if not 1 <= K <= min(m, n):
        raise ValueError(f"K={K} singular directions asked of a {m} x {n} matrix; choose 1 <= K <= {min(m, n)}")


def wide(tensor: Tensor) -> Tensor:
    """Float64 for small exact problems; float32 on devices that have no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _zero_noise(U: Tensor, S: Tensor, V: Tensor) -> Spectrum:
    kept = S > SINGULAR_RTOL * S[..., :1]
    return Spectrum(U * kept.unsqueeze(-2), S * kept, V * kept.unsqueeze(-2))

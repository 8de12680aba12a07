"""Where two objectives collide: spectral interference of their gradients or task vectors, per matrix and per head.

1. Truncate both matrices to K singular directions: M_f ~ U_f S_f V_f^T, M_g ~ U_g S_g V_g^T.
2. Everything follows from two K x K matrices, C_U = U_f^T U_g and C_V = V_f^T V_g:
   STI = |C_U S_g C_V^T| + |C_U^T S_f C_V|. With the elementwise L1 norm this is ||(U^T U - I) S (V^T V - I)||_1 of the concatenated
   subspaces (SIFT, arXiv 2604.04231; Task Singular Vectors, arXiv 2412.00081). The L1 value depends on the basis when singular
   values tie, so the Frobenius norm, which does not, is the default measure.
3. STI does not see signs: STI(f, g) = STI(f, -g). The signed cosine is always reported beside it.
4. Two random K-dimensional subspaces of R^d overlap by K / d; the corrected overlap subtracts that.
5. Several matrices together (a layer, a head's q, k, v and o) are measured as one block-diagonal matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .spectral import Spectrum, inverse_sqrt, svd_of_factors, truncated_svd, wide

# [m, n], or its factors [m, r] and [r, n]; shapes are not named here because two matrices may have different ranks r.
Matrix = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Overlap:
    """How two matrices interfere. Every name below, and every property, is also a key: `o["cosine"] == o.cosine`."""

    inner: float  # <M_f, M_g>
    norm_f: float
    norm_g: float
    inner_K: float  # <M_f, M_g> of the truncated matrices
    K: int  # singular directions kept per objective (fewer where the matrix has lower rank)
    sti_l1: float
    sti_fro: float
    sti_scale: float  # ||S_f|| + ||S_g||
    shared_left: float  # ||C_U||_F^2
    shared_right: float
    expected_left: float  # its expectation for random subspaces
    expected_right: float
    descent_f: float  # <D, M_f>: first-order decrease of f per unit step along the interference-free update D
    descent_g: float
    best_f: float  # the same along f's own update: the sum of its K singular values
    best_g: float
    angles_left: Float[Tensor, " angle"]  # principal angles in radians, smallest first
    angles_right: Float[Tensor, " angle"]

    def __repr__(self) -> str:
        shared = f"overlap {self.overlap_left:.2f} left, {self.overlap_right:.2f} right"
        return f"Overlap(cosine {self.cosine:+.3f}, STI {self.sti_fro_normalized:.3f}, {shared}, K={self.K})"

    @property
    def cosine(self) -> float:
        """Of the whole matrices; negative means conflict. 0 when one of them is zero."""
        return _ratio(self.inner, self.norm_f * self.norm_g)

    @property
    def alignment(self) -> float:
        """The share of the cosine that lies in the K leading directions."""
        return _ratio(self.inner_K, self.norm_f * self.norm_g)

    @property
    def sti_l1_normalized(self) -> float:
        """Mean over the off-diagonal entries of the concatenation of 2K directions."""
        return _ratio(self.sti_l1, 2 * self.K * (2 * self.K - 1))

    @property
    def sti_fro_normalized(self) -> float:
        """Between 0 and 1, whatever the scale of the matrices: compare layers with this one."""
        return _ratio(self.sti_fro, self.sti_scale)

    @property
    def overlap_left(self) -> float:
        return _ratio(self.shared_left, self.K)

    @property
    def overlap_right(self) -> float:
        return _ratio(self.shared_right, self.K)

    @property
    def overlap_left_corrected(self) -> float:
        """0 at chance, 1 for equal subspaces; 0 where K fills the space and the subspaces must coincide."""
        return _ratio(self.shared_left - self.expected_left, self.K - self.expected_left)

    @property
    def overlap_right_corrected(self) -> float:
        return _ratio(self.shared_right - self.expected_right, self.K - self.expected_right)

    @property
    def descent_fraction_f(self) -> float:
        return _ratio(self.descent_f, self.best_f)

    @property
    def descent_fraction_g(self) -> float:
        return _ratio(self.descent_g, self.best_g)

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r} is not measured; choose from {', '.join(self.keys())}")
        return getattr(self, key)

    @classmethod
    def keys(cls) -> list[str]:
        return [f.name for f in fields(cls)] + [
            name for name, value in vars(cls).items() if isinstance(value, property)
        ]


def overlap(
    M_f: Float[Tensor, "m n"] | tuple[Float[Tensor, "m r_f"], Float[Tensor, "r_f n"]],
    M_g: Float[Tensor, "m_g n_g"] | tuple[Float[Tensor, "m_g r_g"], Float[Tensor, "r_g n_g"]],
    K: int | None = None,
    rtol: float = 1e-4,
) -> Overlap:
    """Compare two matrices, dense or as LoRA factors (left, right), which are never multiplied out.

    K defaults to a quarter of the shorter side, 64 at the most. `rtol` is the rank cut of the predicted update.
    Raises ValueError for different shapes, NaN, or K beyond the shorter side.
    """
    shape = _checked(M_f, M_g)
    K = default_rank(*shape) if K is None else K
    f, g = spectrum_of(M_f, K), spectrum_of(M_g, K)
    C_U, C_V = f.U.mT @ g.U, f.V.mT @ g.V
    first, second = (C_U * g.S) @ C_V.mT, (C_U.mT * f.S) @ C_V
    descent_f, descent_g = predicted_descent(f, g, rtol)
    k_f, k_g = int(f.rank), int(g.rank)
    return Overlap(
        inner=inner(M_f, M_g),
        norm_f=math.sqrt(max(0.0, inner(M_f, M_f))),
        norm_g=math.sqrt(max(0.0, inner(M_g, M_g))),
        inner_K=float((f.S[:, None] * C_U * C_V * g.S).sum()),
        K=min(k_f, k_g),
        sti_l1=float(first.abs().sum() + second.abs().sum()),
        sti_fro=float(first.norm() + second.norm()),
        sti_scale=float(f.S.norm() + g.S.norm()),
        shared_left=float(C_U.square().sum()),
        shared_right=float(C_V.square().sum()),
        expected_left=k_f * k_g / shape[0],
        expected_right=k_f * k_g / shape[1],
        descent_f=descent_f,
        descent_g=descent_g,
        best_f=float(f.S.sum()),
        best_g=float(g.S.sum()),
        angles_left=principal_angles(C_U[:k_f, :k_g]),
        angles_right=principal_angles(C_V[:k_f, :k_g]),
    )


def predicted_descent(f: Spectrum, g: Spectrum, rtol: float = 1e-4) -> tuple[float, float]:
    """(<D, M_f>, <D, M_g>) for D = polar([U_f, U_g]) polar([V_f, V_g])^T, without forming D."""
    G_U, G_V = (_gram(torch.cat(pair, -1)) for pair in ((f.U, g.U), (f.V, g.V)))
    along = (G_U @ inverse_sqrt(G_U, rtol) @ inverse_sqrt(G_V, rtol) @ G_V).diagonal() * torch.cat([f.S, g.S])
    return float(along[: len(f.S)].sum()), float(along[len(f.S) :].sum())


def principal_angles(C: Float[Tensor, "a b"]) -> Float[Tensor, " angle"]:
    if 0 in C.shape:
        return C.new_zeros(0)
    return torch.linalg.svdvals(C).clamp(-1, 1).acos()


def direct_sum(parts: Sequence[Overlap]) -> Overlap:
    """The measure of the block-diagonal matrix that holds all parts. Everything adds; norms add in squares.

    `sti_fro` is an upper bound (the sum over parts), so that heads and layers stay additive like `sti_l1`.
    """
    if not parts:
        raise ValueError("nothing to add up: no block was measured there")
    squares = {name: math.sqrt(sum(getattr(p, name) ** 2 for p in parts)) for name in ("norm_f", "norm_g")}
    angles = {n: torch.cat([getattr(p, n) for p in parts]).sort().values for n in ("angles_left", "angles_right")}
    added = {f.name: sum(getattr(p, f.name) for p in parts) for f in fields(Overlap) if f.name not in squares | angles}
    everything: dict[str, Any] = {**squares, **angles, **added}
    return Overlap(**everything)


def inner(A: Matrix, B: Matrix) -> float:
    """<A, B>_F; by traces of r x r products when one of them is given as factors."""
    if isinstance(A, Tensor) and isinstance(B, Tensor):
        return float((wide(A) * wide(B)).sum())
    if isinstance(A, Tensor):
        A, B = B, A
    left, right = (wide(part) for part in A)
    if isinstance(B, Tensor):
        return float(((left.mT @ wide(B)) * right).sum())
    return float(((left.mT @ wide(B[0])) * (right @ wide(B[1]).mT)).sum())


def spectrum_of(M: Matrix, K: int) -> Spectrum:
    return truncated_svd(M, K) if isinstance(M, Tensor) else svd_of_factors(*M, K)


def default_rank(m: int, n: int) -> int:
    return max(1, min(min(m, n) // 4, 64))


def shape_of(M: Matrix) -> tuple[int, int]:
    return (M.shape[-2], M.shape[-1]) if isinstance(M, Tensor) else (M[0].shape[-2], M[1].shape[-1])


def _checked(M_f: Matrix, M_g: Matrix) -> tuple[int, int]:
    shapes = shape_of(M_f), shape_of(M_g)
    if shapes[0] != shapes[1]:
        both = " and ".join("{} x {}".format(*shape) for shape in shapes)
        raise ValueError(f"the two objectives have different shapes, {both}; compare the same matrix")
    for name, M in (("first", M_f), ("second", M_g)):
        if not all(torch.isfinite(part).all() for part in ((M,) if isinstance(M, Tensor) else M)):
            raise ValueError(f"the {name} objective holds NaN or infinity; check its loss before measuring")
    return shapes[0]


def _gram(A: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    return A.mT @ A


def _ratio(numerator: float, denominator: float | int) -> float:
    return numerator / denominator if denominator > 1e-300 else 0.0

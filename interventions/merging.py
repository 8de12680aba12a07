"""Merge fine-tunes of one base without letting their shared directions destroy each other.

1. Per matrix and task t: Delta_t ~ U_t S_t V_t^T, truncated to K = floor(min(m, n) / T) directions.
2. U^ = [U_1 .. U_T], V^ = [V_1 .. V_T]; replace both by their polar factors (symmetric orthogonalisation).
3. Delta = U^ G_U^(-1/2) S^ G_V^(-1/2) V^^T with S^ kept, all ones, or its mean. Afterwards spectral interference is zero.
Everything that is not a matrix is averaged. Step 2 with the spectrum kept is TSV-Merge (arXiv 2412.00081); with ones it is a
SIFT step (arXiv 2604.04231). The rank cut that keeps coincident directions from turning into noise is ours.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.interference import Matrix, shape_of, spectrum_of
from circuits.progress import track
from circuits.spectral import Spectrum, inverse_sqrt, wide

METHODS = ("sift", "task-arithmetic", "ties", "tsv-m", "iso-c")
SPECTRA = ("keep", "ones", "mean")


def combine(spectra: Sequence[Spectrum], spectrum: str = "keep", rtol: float = 1e-4) -> Spectrum:
    """Steps 2 and 3 for one matrix. U and V of the result are the orthogonalised directions of all tasks side by side."""
    U, S, V = (torch.cat(parts, -1) for parts in zip(*spectra, strict=True))
    kept = (S > 0).to(S)
    S = {"keep": S, "ones": kept, "mean": kept * S.sum() / kept.sum().clamp_min(1)}[spectrum]
    return Spectrum(U @ inverse_sqrt(U.mT @ U, rtol), S, V @ inverse_sqrt(V.mT @ V, rtol))


def interference_of(U: Float[Tensor, "m d"], S: Float[Tensor, " d"], V: Float[Tensor, "n d"]) -> float:
    """||(U^T U - I) S (V^T V - I)||_1, with I the identity on the directions that are present.

    Noise (S = 0) is not, nor is the difference of two directions that the rank cut of `combine` has made one.
    """
    U, S, V = U[:, S > 0], S[S > 0], V[:, S > 0]
    G_U, G_V = U.mT @ U, V.mT @ V
    return float(((G_U - _present(G_U)) * S @ (G_V - _present(G_V))).abs().sum())


def _present(G: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The projector on the eigenvectors of a Gram matrix that are not exactly dependent."""
    values, vectors = torch.linalg.eigh(G)
    kept = vectors[:, values > 1e-12]
    return kept @ kept.mT


class Merged(dict[str, Tensor | tuple[Tensor, Tensor]]):
    """The merged difference by parameter name, and what was done to each."""

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.spectral: list[str] = []  # merged by subspaces
        self.averaged: list[str] = []  # not a matrix, or a method that works entry by entry
        self.tied: dict[str, str] = {}  # second name of a tied parameter -> the name that was merged
        self.coincident: dict[str, int] = {}  # directions that tasks had in common and that were kept once
        self.interference: dict[str, tuple[float, float]] = {}  # spectral interference before and after

    def __repr__(self) -> str:
        return f"Merged({len(self.spectral)} by subspaces, {len(self.averaged)} entry by entry, {len(self.tied)} tied)"


def merge(
    deltas: Sequence[Mapping[str, Tensor | tuple[Tensor, Tensor]]],
    K: int | None = None,
    spectrum: str = "keep",
    method: str = "sift",
    *,
    scale: float | int = 1.0,
    density: float | int = 0.2,
    rtol: float = 1e-4,
    progress: bool = False,
) -> Merged:
    """Merge differences from a common base: state dicts of task vectors, or LoRA factors {name: (left, right)}.

    method: sift | task-arithmetic (sum) | ties (trim to `density`, elect signs, disjoint mean) | tsv-m (no rank cut) | iso-c (flat
    spectrum of the sum). LoRA factors come back as factors, except from ties. `scale` multiplies the result. K is capped at
    floor(min(m, n) / T) in smaller matrices. Raises ValueError for different names or shapes, NaN, or a K that fits nowhere.
    """
    names = _validated(deltas, method, spectrum)
    if K is not None:
        room = max([min(shape_of(deltas[0][n])) // len(deltas) for n in names if _is_matrix(deltas[0][n])], default=0)
        if not 1 <= K <= max(room, 1):
            raise ValueError(
                f"K={K} directions for each of {len(deltas)} tasks; the largest matrix has room for 1 to {room}"
            )
    merged = Merged()
    thresholds = [_threshold(delta, density) for delta in deltas] if method == "ties" else []
    merged.tied = _tied(deltas, names)
    for name in track(names, f"merging by {method}", enabled=progress):
        if name in merged.tied:
            continue
        parts = [delta[name] for delta in deltas]
        if method == "ties":
            result, by_subspace = _ties([_dense(part) for part in parts], thresholds), False
        elif method == "task-arithmetic" or not _is_matrix(parts[0]):
            result, by_subspace = _added(parts, mean=method != "task-arithmetic"), False
        else:
            result, by_subspace = _spectral(parts, K, spectrum, method, rtol, merged, name), True
        (merged.spectral if by_subspace else merged.averaged).append(name)
        merged[name] = _scaled(result, scale, parts[0])
    merged.update({name: merged[first] for name, first in merged.tied.items()})
    return merged


def _spectral(
    parts: Sequence[Matrix],
    K: int | None,
    spectrum: str,
    method: str,
    rtol: float,
    merged: Merged,
    name: str,
) -> Matrix:
    m, n = shape_of(parts[0])
    if method == "iso-c":
        total = _added(parts, mean=False)
        U, S, V = spectrum_of(total, min(m, n, *([total[0].shape[1]] if isinstance(total, tuple) else [])))
        left, right = U * S.mean(), V.mT
    else:
        room = min(m, n) // len(parts)
        spectra = [spectrum_of(part, max(1, min(room, K or room))) for part in parts]
        before = interference_of(*(torch.cat(p, -1) for p in zip(*spectra, strict=True)))
        result = combine(spectra, spectrum, rtol) if method == "sift" else _tsv(spectra)
        merged.interference[name] = (before, interference_of(*result))
        present = int((result.S > 0).sum())
        lost = max(present - round(float(side.square().sum())) for side in (result.U, result.V))
        if lost > 0:
            merged.coincident[name] = lost
        left, right = result.U * result.S, result.V.mT
    return (left, right) if isinstance(parts[0], tuple) else left @ right


def _tsv(spectra: Sequence[Spectrum]) -> Spectrum:
    """TSV-Merge as published: polar factors by a full SVD, spectrum kept, no rank cut."""
    U, S, V = (torch.cat(parts, -1) for parts in zip(*spectra, strict=True))
    polars = []
    for side in (U, V):
        P, _, Qh = torch.linalg.svd(side, full_matrices=False)
        polars.append(P @ Qh)
    return Spectrum(polars[0], S, polars[1])


def _added(parts: Sequence[Matrix], mean: bool) -> Matrix:
    """Sum or mean; sums of factors are concatenations."""
    share = 1 / len(parts) if mean else 1.0
    factors = [part for part in parts if isinstance(part, tuple)]
    if factors:
        left, right = ([wide(factor[side]) for factor in factors] for side in (0, 1))
        return share * torch.cat(left, 1), torch.cat(right, 0)
    return share * torch.stack([wide(_dense(part)) for part in parts]).sum(0)


def _threshold(delta: Mapping[str, Matrix], density: float | int) -> float:
    """The magnitude that the largest `density` of all entries of one task reach."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density}; expected a share of entries to keep, above 0 and at most 1")
    sizes = torch.cat([_dense(value).flatten().abs().float() for value in delta.values()])
    return float(sizes.kthvalue(max(1, len(sizes) - round(density * len(sizes)) + 1)).values)


def _ties(parts: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    trimmed = torch.stack([part * (part.abs() >= least) for part, least in zip(parts, thresholds, strict=True)])
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _validated(deltas: Sequence[Mapping[str, Matrix]], method: str, spectrum: str) -> list[str]:
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
    if spectrum not in SPECTRA:
        raise ValueError(f"spectrum={spectrum!r}; expected one of {', '.join(SPECTRA)}")
    if len(deltas) < 2:
        raise ValueError(f"{len(deltas)} task given; merging needs at least two")
    names = list(deltas[0])
    for index, delta in enumerate(deltas[1:], 2):
        odd = set(names) ^ set(delta)
        if odd:
            raise ValueError(
                f"task 1 and task {index} differ in parameters ({', '.join(sorted(odd)[:3])}); merge fine-tunes of one base"
            )
    for name in names:
        parts = [delta[name] for delta in deltas]
        if len({type(part) is tuple for part in parts}) > 1 or len({_shape(part) for part in parts}) > 1:
            shapes = " and ".join(
                f"{' x '.join(map(str, _shape(p)))}{' (factors)' if isinstance(p, tuple) else ''}" for p in parts
            )
            raise ValueError(f"{name} has shapes {shapes}; merge checkpoints of one shape and one kind")
        if not all(t.isfinite().all() for part in parts for t in (part if isinstance(part, tuple) else (part,))):
            raise ValueError(f"{name} holds NaN or infinity; check the checkpoints")
    return names


def _tied(deltas: Sequence[Mapping[str, Matrix]], names: Sequence[str]) -> dict[str, str]:
    """Parameters that are one tensor under two names (equal, and not all zero, in every task)."""
    first: dict[tuple, str] = {}
    tied = {}
    for name in names:
        values = [delta[name] for delta in deltas]
        if any(isinstance(value, tuple) or value.numel() < 2 or not value.any() for value in values):
            continue
        key = (values[0].shape, *(float(value.double().sum()) for value in values))
        other = first.setdefault(key, name)
        if other != name and all(torch.equal(delta[other], delta[name]) for delta in deltas):  # type: ignore[arg-type]
            tied[name] = other
    return tied


def _scaled(result: Matrix, scale: float | int, like: Matrix) -> Matrix:
    dtype = (like[0] if isinstance(like, tuple) else like).dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    if isinstance(result, tuple):
        return (scale * result[0]).to(dtype), result[1].to(dtype)
    return (scale * result).to(dtype)


def _is_matrix(value: Matrix) -> bool:
    return isinstance(value, tuple) or (value.ndim == 2 and value.is_floating_point())


def _shape(value: Matrix) -> tuple[int, ...]:
    return shape_of(value) if isinstance(value, tuple) else tuple(value.shape)


def _dense(value: Matrix) -> Tensor:
    return wide(value[0]) @ wide(value[1]) if isinstance(value, tuple) else wide(value)

"""Spectral interference of two objectives over a whole model, by matrix, layer, module, head or circuit.

1. Read both objectives as one matrix per weight (`directions`), cut into blocks (`partition`).
2. `overlap` of every block; layers, modules and heads are direct sums of their blocks.
3. head: inside a head (its rows of q, k, v and columns of o). K/V rows that a group shares count for each of its heads.
   Beside it, the additive attribution of the whole-matrix numbers: <M_f, M_g> = sum_h <M_f^h, M_g^h>, and
   C_U = sum_h (U_f^h)^T U_g^h on the sliced side (V for o); shares over heads add up to the layer's value.
4. circuit: the change of W_O W_V and of W_Q^T W_K, which no change of basis inside a head can alter, as factors of rank 2 d_head.
   Biases are left out; with rotary positions the QK form is the one at distance zero, and q/k norms are not in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import files
from .anatomy import Anatomy, unwrap
from .directions import Directions, canonical, directions
from .heads import Head, HeadScores
from .interference import Matrix, Overlap, direct_sum, inner, overlap, shape_of, spectrum_of
from .partition import Block, named_blocks, partition
from .progress import track

VIEWS = ("matrix", "layer", "module", "head", "circuit")


@dataclass(frozen=True, eq=False)
class Interference:
    """Overlaps by name, in model order. `i["a3.h5"].cosine`, `i.total`, `i.scores()`, `i.table()`."""

    overlaps: Mapping[str, Overlap]
    view: str
    # [layer, head] shares that add up over heads; head view only.
    attribution: Mapping[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    model: str = ""

    def __getitem__(self, name: str) -> Overlap:
        if name not in self.overlaps:
            raise KeyError(
                f"{name!r} was not measured in the {self.view} view; there are {', '.join(list(self.overlaps)[:4])}, ..."
            )
        return self.overlaps[name]

    @property
    def total(self) -> Overlap:
        """All blocks as one block-diagonal matrix."""
        return direct_sum(list(self.overlaps.values()))

    def values(self, metric: str = "cosine") -> dict[str, float]:
        return {name: part[metric] for name, part in self.overlaps.items()}

    def scores(self, metric: str = "cosine") -> HeadScores:
        """One number per head: a metric of `Overlap`, or an additive share, `cosine_share` or `overlap_share`."""
        if self.view != "head":
            raise ValueError(f'scores per head need view="head", this was measured with view={self.view!r}')
        if metric in self.attribution:
            values = self.attribution[metric]
        else:
            heads = {Head.parse(name): part[metric] for name, part in self.overlaps.items()}
            values = torch.zeros([1 + max(at) for at in zip(*heads, strict=True)])
            for head, value in heads.items():
                values[head] = value
        return HeadScores(values.float(), f"interference: {metric}", model=self.model, options={"units": metric})

    def table(self, k: int = 10, metric: str = "cosine") -> str:
        """The k blocks with the lowest value (most conflict) as aligned text."""
        rows = sorted(self.overlaps.items(), key=lambda item: item[1][metric])[:k]
        width = max([len(name) for name, _ in rows] + [5])
        overlaps, descents = (
            (f"overlap_{side}_corrected" for side in ("left", "right")),
            ("descent_fraction_f", "descent_fraction_g"),
        )
        keys = ("cosine", "sti_fro_normalized", *overlaps, *descents)
        lines = [f"{'block':<{width}}  " + "  ".join(f"{key:>{max(8, len(key))}}" for key in keys)]
        lines += [
            f"{name:<{width}}  " + "  ".join(f"{part[key]:>+{max(8, len(key))}.3f}" for key in keys)
            for name, part in rows
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Interference({len(self.overlaps)} blocks, view={self.view!r}, cosine {self.total.cosine:+.3f})\n{self.table()}"

    def _repr_html_(self) -> str:
        from .display import table_html

        header, *rows = (line.split() for line in self.table().splitlines())
        return table_html(f"interference by {self.view}, cosine {self.total.cosine:+.3f}", header, rows)

    def save(self, path: str | Path) -> Path:
        """One JSON file."""
        angles = ("angles_left", "angles_right")
        overlaps = {
            name: {**vars(part), **{key: part[key].tolist() for key in angles}} for name, part in self.overlaps.items()
        }
        attribution = {name: values.tolist() for name, values in self.attribution.items()}
        meta = {
            "format": "luthier.interference/1",
            "view": self.view,
            "model": self.model,
            "skipped": list(self.skipped),
        }
        return files.write_json(path, {**meta, "attribution": attribution, "overlaps": overlaps})

    @classmethod
    def load(cls, path: str | Path) -> "Interference":
        content = files.read_json(path)
        if not isinstance(content, dict) or content.get("format") != "luthier.interference/1":
            raise ValueError(
                f"{str(path)!r} does not hold an interference measurement; expected a file written by Interference.save"
            )
        angles = ("angles_left", "angles_right")
        overlaps = {}
        for name, part in content["overlaps"].items():
            part |= {key: torch.tensor(part[key], dtype=torch.float64) for key in angles}
            overlaps[name] = Overlap(**part)
        attribution = {name: torch.tensor(values) for name, values in content["attribution"].items()}
        return cls(overlaps, content["view"], attribution, tuple(content["skipped"]), content["model"])


def measure_interference(
    first: Any,
    second: Any,
    *,
    model: Any = None,
    K: int | None = None,
    view: str = "matrix",
    rtol: float = 1e-4,
    progress: bool = False,
) -> Interference:
    """Measure two objectives against each other.

    first, second: losses (or functions that return one), gradients or task vectors by parameter name, LoRA factors, PEFT models,
    fine-tuned models, or directories of checkpoints and adapters. `model` is the model of the losses, or the base of the checkpoints;
    it is needed for everything but dictionaries, and for the views head and circuit.
    K: singular directions per block; default a quarter of the shorter side, 64 at most (circuit: half of d_head).
    What is not a matrix inside the model, or is in one objective only, is listed in `skipped`.
    """
    if view not in VIEWS:
        raise ValueError(f"view={view!r}; expected one of {', '.join(VIEWS)}")
    if model is None and view in ("head", "circuit"):
        raise ValueError(f"view={view!r} needs model=, which knows the heads")
    hf = getattr(model, "hf", model)
    both_losses = all(isinstance(o, Tensor) for o in (first, second))
    f = {canonical(n): v for n, v in directions(first, model, retain_graph=both_losses).items()}
    g = {canonical(n): v for n, v in directions(second, model).items()}
    blocks = named_blocks(_matrices(f)) if hf is None else partition(hf, 1 if view in ("head", "circuit") else None)
    blocks = [b for b in blocks if canonical(b.parameter) in f and canonical(b.parameter) in g]
    if not blocks:
        raise ValueError(
            "the two objectives share no weight matrix inside the model "
            f"(the first has {', '.join(list(f)[:2])}, the second {', '.join(list(g)[:2])}); measure both on the same parameters"
        )
    measured = {canonical(b.parameter) for b in blocks}
    skipped = tuple(name for name in dict.fromkeys([*f, *g]) if name not in measured)
    about: dict[str, Any] = dict(view=view, skipped=skipped, model=getattr(model, "name", ""))
    if view == "circuit":
        return Interference(_circuits(f, g, hf, blocks, K, rtol, progress), **about)
    parts = {}
    for block in track(blocks, f"interference by {view}", enabled=progress):
        M_f, M_g = (block.take(d[canonical(block.parameter)]) for d in (f, g))
        parts[block] = overlap(M_f, M_g, K, rtol)
    if view == "matrix":
        return Interference({block.name: part for block, part in parts.items()}, **about)
    grouped: dict[str, list[Overlap]] = {}
    for block, part in parts.items():
        for name in _groups(block, view):
            grouped.setdefault(name, []).append(part)
    attribution = _attribution(f, g, hf, K) if view == "head" else {}
    return Interference({n: direct_sum(members) for n, members in grouped.items()}, attribution=attribution, **about)


def pairwise_interference(objectives: Mapping[str, Any], **options: Any) -> dict[tuple[str, str], Interference]:
    """Every pair of more than two objectives; options as for `measure_interference`. Losses must have separate graphs or be functions."""
    if len(objectives) < 2:
        raise ValueError(f"{len(objectives)} objective given; interference needs at least two")
    read = {name: directions(source, options.get("model"), retain_graph=True) for name, source in objectives.items()}
    return {(a, b): measure_interference(read[a], read[b], **options) for a, b in combinations(read, 2)}


def trajectory(
    measured: Sequence[Interference], metric: str = "cosine"
) -> tuple[list[str], Float[Tensor, "step block"]]:
    """Measurements over training steps as one table: block names and values."""
    names = list(measured[0].overlaps)
    return names, torch.tensor([[step[name][metric] for name in names] for step in measured])


def _matrices(found: Directions) -> list[str]:
    return [name for name, value in found.items() if isinstance(value, tuple) or value.ndim == 2]


def _groups(block: Block, view: str) -> list[str]:
    if view == "head":
        return [str(Head(block.layer, head)) for head in block.heads] if block.layer is not None else []
    place = "outside the layers" if block.layer is None else f"layer {block.layer}"
    return [place if view == "layer" else f"{place} {block.module}"]


def _attribution(f: Directions, g: Directions, hf: Any, K: int | None) -> dict[str, Float[Tensor, "layer head"]]:
    """How much each head adds to its layer's cosine and subspace overlap (over q, k, v and o); groups split what they share evenly."""
    anatomy = Anatomy.of(unwrap(hf), "causal")
    shares = {
        name: torch.zeros(anatomy.n_layers, anatomy.n_heads, dtype=torch.float64)
        for name in ("cosine_share", "overlap_share")
    }
    norms, ranks = torch.zeros(anatomy.n_layers, 2, dtype=torch.float64), torch.zeros(anatomy.n_layers)
    for whole in partition(hf):
        name = canonical(whole.parameter)
        if whole.module != "attn" or whole.layer is None or name not in f or name not in g:
            continue
        M_f, M_g = (whole.take(d[name]) for d in (f, g))
        norms[whole.layer] += torch.tensor([inner(M_f, M_f), inner(M_g, M_g)])
        d_head = anatomy.d_head
        rank = K if K is not None else max(1, min(*shape_of(M_f)) // 4)
        spectra = [spectrum_of(M, min(rank, *shape_of(M_f))) for M in (M_f, M_g)]
        ranks[whole.layer] += min(int(s.rank) for s in spectra)
        A, B = ((s.V if whole.role == "o" else s.U) for s in spectra)
        C = A.mT @ B
        total = anatomy.n_kv_heads if whole.role in ("k", "v") else anatomy.n_heads
        for member in range(total):
            at = slice(member * d_head, (member + 1) * d_head)
            pieces = [_slice(M, at, whole.role) for M in (M_f, M_g)]
            served = [
                h for h in range(anatomy.n_heads) if (anatomy.kv_head(h) if whole.role in ("k", "v") else h) == member
            ]
            shares["cosine_share"][whole.layer, served] += inner(*pieces) / len(served)
            shares["overlap_share"][whole.layer, served] += float(((A[at].mT @ B[at]) * C).sum()) / len(served)
    shares["cosine_share"] /= norms.prod(1).sqrt().clamp_min(1e-300)[:, None]
    shares["overlap_share"] /= ranks.clamp_min(1)[:, None]
    return shares


def _slice(M: Matrix, at: slice, role: str) -> Matrix:
    """A head's rows of q, k or v, or its columns of o."""
    if isinstance(M, tuple):
        return (M[0], M[1][:, at]) if role == "o" else (M[0][at], M[1])
    return M[:, at] if role == "o" else M[at]


def _circuits(
    f: Directions, g: Directions, hf: Any, blocks: list[Block], K: int | None, rtol: float, progress: bool
) -> dict[str, Overlap]:
    """OV and QK changes of every head, from the base weights and both task vectors."""
    anatomy, weights = Anatomy.of(unwrap(hf), "causal"), {canonical(n): p.detach() for n, p in hf.named_parameters()}
    where = {(b.layer, b.role, h): b for b in partition(hf, 1) for h in b.heads}
    layers = sorted({b.layer for b in blocks if b.module == "attn" and b.layer is not None})
    found = {}
    for head in track([h for h in anatomy.heads() if h.layer in layers], "interference by circuit", enabled=progress):
        for form, roles in (("OV", ("o", "v")), ("QK", ("q", "k"))):
            pairs = []
            for change in (f, g):
                base, moved = [], []
                for role in roles:
                    block = where[(head.layer, role, head.head)]
                    name = canonical(block.parameter)
                    W = block.take(weights[name]).double()
                    delta = block.take(change[name]) if name in change else torch.zeros_like(W)
                    delta = delta if isinstance(delta, Tensor) else delta[0].double() @ delta[1].double()
                    W, delta = (W.mT, delta.mT) if role == "q" else (W, delta)
                    base.append(W)
                    moved.append(W + delta)
                pairs.append((torch.cat([moved[0], -base[0]], 1), torch.cat([moved[1], base[1]], 0)))
            found[f"{head} {form}"] = overlap(*pairs, max(1, anatomy.d_head // 2) if K is None else K, rtol)
    return found

"""How much of the behaviour a circuit keeps when every other head is ablated.

1. m(C): mean margin with the heads outside C replaced by their mean, zero, or their z on another example; MLPs stay.
2. Faithfulness = (m(C) - m(0)) / (m(M) - m(0)), with M all heads and 0 none (CD-T, arXiv 2407.00886, section 4; the
   normalised logit difference of Wang et al., arXiv 2211.00593). Accuracy is read from the same runs.
3. Curve: C = the top k heads by score, for each size k; 1.0 is the whole model, and more than 1 is possible.
4. Controls at each size: random circuits with as many heads in each layer, and the k heads scored nearest zero.
5. Intervals: percentile bootstrap over examples, numerator and denominator resampled together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .attribution import reference_activations
from .encoding import Encoded
from .files import load_tensors, save_tensors
from .heads import Circuit, Head, HeadScores
from .hooks import rewrite
from .model import Model
from .progress import track
from .readout import column_logits, rows_that_fit, short_batches
from .resampling import donor_z, with_donors
from .tasks import Task


def normalise(
    kept: Float[Tensor, "*rows example"], empty: Float[Tensor, " example"], full: Float[Tensor, " example"]
) -> Float[Tensor, "*rows"]:
    """(m(C) - m(0)) / (m(M) - m(0)) from margins per example; nan when ablating every head changes nothing."""
    span = full.mean() - empty.mean()
    return (kept.mean(-1) - empty.mean()) / torch.where(span.abs() > 1e-9, span, torch.nan)


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve:
    """Behaviour kept at each size, with controls. `margins[size, example]` and `correct` are kept for new intervals."""

    sizes: Int[Tensor, " size"]
    margins: Float[Tensor, "size example"]
    correct: Bool[Tensor, "size example"]
    full: Float[Tensor, " example"]
    empty: Float[Tensor, " example"]
    full_correct: Bool[Tensor, " example"]
    random_margins: Float[Tensor, "control size example"]
    random_correct: Bool[Tensor, "control size example"]
    near_zero_margins: Float[Tensor, "size example"] | None
    near_zero_correct: Bool[Tensor, "size example"] | None
    circuits: tuple[str, ...]
    meta: dict = field(default_factory=dict)  # model, revision, task, data, method, ablate, means, seed

    @property
    def faithfulness(self) -> Float[Tensor, " size"]:
        return normalise(self.margins, self.empty, self.full)

    @property
    def accuracy(self) -> Float[Tensor, " size"]:
        return self.correct.float().mean(-1)

    @property
    def accuracy_kept(self) -> Float[Tensor, " size"]:
        """Accuracy as a share of the whole model's."""
        return self.accuracy / self.full_correct.float().mean()

    @property
    def random(self) -> Float[Tensor, "control size"]:
        """Faithfulness of each matched-random circuit."""
        return normalise(self.random_margins, self.empty, self.full)

    @property
    def near_zero(self) -> Float[Tensor, " size"] | None:
        return None if self.near_zero_margins is None else normalise(self.near_zero_margins, self.empty, self.full)

    def interval(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, " size"], Float[Tensor, " size"]]:
        """Bootstrap over examples of the faithfulness ratio, at each size."""
        weights = bootstrap_weights(len(self.full), resamples, seed)
        empty, full = weights @ self.empty, weights @ self.full
        return _percentiles((self.margins @ weights.T - empty) / (full - empty), level)

    def accuracy_interval(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, " size"], Float[Tensor, " size"]]:
        return _percentiles(self.correct.float() @ bootstrap_weights(len(self.full), resamples, seed).T, level)

    def circuit(self, size: int) -> Circuit:
        """The circuit that was measured at this size."""
        sizes = self.sizes.tolist()
        if size not in sizes:
            raise ValueError(f"no circuit of {size} heads was measured; expected one of {sizes}")
        shape = self.meta["n_layers"], self.meta["n_heads"]
        names = self.circuits[sizes.index(size)].split()
        return Circuit([Head.parse(name) for name in names], *shape)

    def rows(self) -> list[dict]:
        """One dict per size: what `table` prints, for machines."""
        (low, high), near = self.interval(), self.near_zero
        return [
            {
                "heads": int(size),
                "faithfulness": float(self.faithfulness[i]),
                "low": float(low[i]),
                "high": float(high[i]),
                "accuracy": float(self.accuracy[i]),
                "random": float(self.random[:, i].mean()) if len(self.random) else None,
                "near_zero": None if near is None else float(near[i]),
            }
            for i, size in enumerate(self.sizes)
        ]

    def table(self) -> str:
        """A markdown table: size, faithfulness with its 95 % interval, accuracy, and the controls."""
        lines = ["| heads | faithfulness | 95 % interval | accuracy | matched random | near zero |", "|" + "---|" * 6]
        for row in self.rows():
            random, near = (f"{row[k]:.2f}" if row[k] is not None else "" for k in ("random", "near_zero"))
            lines.append(
                f"| {row['heads']} | {row['faithfulness']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
                f"| {row['accuracy']:.3f} | {random} | {near} |"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        what = f"{self.meta.get('method', 'circuit')} on {self.meta.get('task')}, {self.meta.get('model')}"
        head = f"FaithfulnessCurve: {what}, n={len(self.full)}, {self.meta.get('ablate')} ablation"
        full = f"whole model: margin {self.full.mean():.3f}, accuracy {self.full_correct.float().mean():.3f}; "
        return f"{head}\n{full}no heads: margin {self.empty.mean():.3f}\n{self.table()}"

    def _repr_html_(self) -> str:
        from .display import table_html

        rows = self.rows()
        title = f"faithfulness: {self.meta.get('method')}, {self.meta.get('task')}, n={len(self.full)}"
        cells = [
            ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows
        ]
        return table_html(title, list(rows[0]), cells)

    def save(self, stem: str | Path) -> Path:
        """Write `stem.safetensors` and `stem.json`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return save_tensors(stem, tensors, {"kind": "faithfulness", "circuits": list(self.circuits), "meta": self.meta})

    @classmethod
    def load(cls, stem: str | Path) -> "FaithfulnessCurve":
        tensors, saved = load_tensors(stem)
        if saved.get("kind") != "faithfulness":
            raise ValueError(f"{str(stem)!r} holds {saved.get('kind')!r}; expected a saved FaithfulnessCurve")
        absent = {"near_zero_margins": None, "near_zero_correct": None}
        return cls(**{**absent, **tensors}, circuits=tuple(saved["circuits"]), meta=saved["meta"])


def faithfulness(
    model: Model,
    task: Task,
    scores_or_circuit: HeadScores | Circuit,
    *,
    ablate: str = "mean",
    means: str = "label-balanced",
    per_position: bool = False,
    sizes: Sequence[int] | None = None,
    controls: int = 10,
    seed: int = 0,
    by: Literal["value", "magnitude"] = "value",
    batch_size: int | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """The curve for the top heads of `scores` at `sizes` (default 0, 1, 2, 4, ... all), or the point for one circuit.

    Cost: one forward of the task per circuit, (2 + controls) circuits per size.
    """
    if isinstance(scores_or_circuit, Circuit):
        measured, near_zero = [scores_or_circuit], None
        if sizes is not None:
            raise ValueError("sizes= needs HeadScores to rank heads by; a Circuit is measured at its own size")
        scores_or_circuit.check(model.anatomy.n_layers, model.anatomy.n_heads)
    else:
        sizes = _sizes(model, scores_or_circuit, sizes)
        measured = [scores_or_circuit.top(k, by=by) if k else Circuit([]) for k in sizes]
        near_zero = [Circuit.near_zero(scores_or_circuit, k) if k else Circuit([]) for k in sizes]
    shape = (model.anatomy.n_layers, model.anatomy.n_heads)
    bound = [Circuit(circuit, *shape) for circuit in measured]
    random = [[circuit.matched_random(seed + c) for circuit in bound] for c in range(controls)]
    everything = Circuit(model.anatomy.heads())
    runs = [everything, Circuit([]), *bound, *(near_zero or []), *(c for row in random for c in row)]
    keep = torch.stack([_mask(circuit, *shape) for circuit in runs])
    margin, correct = _run(model, task, keep, ablate, means, per_position, batch_size, progress)
    k, n = len(bound), len(margin[0])
    after = 2 + k + (k if near_zero else 0)
    method = scores_or_circuit.method if isinstance(scores_or_circuit, HeadScores) else "circuit"
    return FaithfulnessCurve(
        sizes=torch.tensor([len(circuit) for circuit in bound]),
        margins=margin[2 : 2 + k],
        correct=correct[2 : 2 + k],
        full=margin[0],
        empty=margin[1],
        full_correct=correct[0],
        random_margins=margin[after:].reshape(controls, k, n),
        random_correct=correct[after:].reshape(controls, k, n),
        near_zero_margins=margin[2 + k : after] if near_zero else None,
        near_zero_correct=correct[2 + k : after] if near_zero else None,
        circuits=tuple(" ".join(map(str, circuit)) for circuit in bound),
        meta={
            "model": model.name,
            "revision": model.revision,
            "task": task.name,
            "data": task.fingerprint,
            "method": method,
            "ablate": ablate,
            "means": means,
            "per_position": per_position,
            "seed": seed,
            "n_layers": shape[0],
            "n_heads": shape[1],
        },
    )


def _run(
    model: Model,
    task: Task,
    keep: Bool[Tensor, "circuit layer head"],
    ablate: str,
    means: str,
    per_position: bool,
    batch_size: int | None,
    progress: bool,
) -> tuple[Float[Tensor, "circuit example"], Bool[Tensor, "circuit example"]]:
    """Margins and correctness of the task with only the kept heads alive, many circuits per forward."""
    reference = reference_activations(model, task, ablate, means, per_position, batch_size)
    encoded = task.encode(model)
    if reference is None:
        encoded = with_donors(encoded)
    rows = rows_that_fit(model, encoded, batch_size)
    # Circuits share forwards: identical ones (every control of an empty or full circuit) are run once.
    unique, where = torch.unique(keep.flatten(1), dim=0, return_inverse=True)
    unique = unique.view(-1, *keep.shape[1:])
    margin = torch.zeros(len(unique), len(encoded))
    correct = torch.zeros(len(unique), len(encoded), dtype=torch.bool)
    for indices, batch in track(short_batches(encoded, rows), "faithfulness", -(-len(encoded) // rows), progress):
        against = _against(model, batch, reference)
        chunks = unique.split(max(1, rows // len(batch)))
        logits = torch.cat([_kept_logits(model, batch, chunk, against) for chunk in chunks])
        margin[:, indices] = batch.margin(logits)
        correct[:, indices] = torch.stack([batch.predict(each) for each in logits]) == batch.gold
    return margin[where], correct[where]


def _kept_logits(
    model: Model, batch: Encoded, keep: Bool[Tensor, "circuit layer head"], against: Tensor
) -> Float[Tensor, "circuit batch column"]:
    """One forward with copy c of the batch keeping the heads of circuit c."""

    def replace(z: Tensor, layer: int) -> Tensor:
        alive = keep[:, layer, None, None, :, None].to(z.device)
        z = z.unflatten(0, (len(keep), -1))
        return torch.where(alive, z, against[layer].to(z)[None]).flatten(0, 1)

    with torch.no_grad(), rewrite(model, "z", replace):
        return column_logits(model, batch, copies=len(keep)).cpu()


def _against(model: Model, batch: Encoded, reference: Tensor | None) -> Float[Tensor, "layer #batch #position head d"]:
    """What stands in for an ablated head: its mean everywhere, or its z on the donor."""
    if reference is not None:
        return reference[:, None, None] if reference.ndim == 3 else reference[:, None, : batch.tokens.shape[1]]
    return donor_z(model, batch)


def _sizes(model: Model, scores: HeadScores, sizes: Sequence[int] | None) -> list[int]:
    shape, total = (model.anatomy.n_layers, model.anatomy.n_heads), scores.values.numel()
    if tuple(scores.values.shape) != shape:
        raise ValueError(f"scores are for {tuple(scores.values.shape)} layers x heads; {model.name} has {shape}")
    if sizes is None:
        sizes = [0, *(2**i for i in range(total.bit_length()) if 2**i < total), total]
    wrong = [size for size in sizes if not 0 <= size <= total]
    if wrong or not sizes:
        raise ValueError(f"sizes {wrong or sizes}; expected numbers of heads from 0 to {total}")
    return list(sizes)


def _mask(circuit: Circuit, n_layers: int, n_heads: int) -> Bool[Tensor, "layer head"]:
    return torch.tensor([[Head(layer, head) in circuit for head in range(n_heads)] for layer in range(n_layers)])


def bootstrap_weights(n: int, resamples: int, seed: int) -> Float[Tensor, "resample example"]:
    """Bootstrap weights: row r counts how often each example was drawn, over n."""
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n)) / n


def _percentiles(values: Float[Tensor, "row resample"], level: float) -> tuple[Tensor, Tensor]:
    return values.quantile((1 - level) / 2, dim=-1), values.quantile((1 + level) / 2, dim=-1)

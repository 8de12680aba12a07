"""The nouns: `Head`, a set of heads (`Circuit`) and one number per head (`HeadScores`).

Heads print in the field's shared grammar, `a9.h6` (EAP-IG, MIB). Every method in `circuits` returns `HeadScores`,
every choice of heads is a `Circuit`; both are values: they never change, they save themselves, they say where they came from.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import files


class Head(NamedTuple):
    """One attention head; sorts by layer, then head. `str(Head(9, 6)) == "a9.h6"`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"a{self.layer}.h{self.head}"

    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> "Head":
        """Reads `a9.h6`, and the spellings `L9H6` and `9.6`. Raises ValueError."""
        match = re.fullmatch(r"[aAlL]?(\d+)\.?[hH]?\.?(\d+)", text.strip())
        if match is None or not re.search(r"[.hH]", text):
            raise ValueError(f"{text!r} is not a head; expected the form a9.h6 (layer 9, head 6)")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Circuit:
    """A frozen set of heads with provenance. `|`, `&`, `-` combine circuits; `in`, `len` and iteration work as on a set.

    `n_layers` and `n_heads` are the model's; they are needed only for random controls and to refuse heads that do not exist.
    """

    heads: frozenset[Head]
    n_layers: int | None = None
    n_heads: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __init__(
        self,
        heads: Iterable[Head | tuple[int, int] | str],
        n_layers: int | None = None,
        n_heads: int | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        members = frozenset(Head.parse(h) if isinstance(h, str) else Head(int(h[0]), int(h[1])) for h in heads)
        for name, value in (("heads", members), ("n_layers", n_layers), ("n_heads", n_heads)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "provenance", dict(provenance or {}))
        if n_layers is not None and n_heads is not None:
            self.check(n_layers, n_heads)

    def check(self, n_layers: int, n_heads: int) -> "Circuit":
        """Itself when every head exists in a model of this size; ValueError that names those that do not."""
        missing = [h for h in self if not (0 <= h.layer < n_layers and 0 <= h.head < n_heads)]
        if missing:
            raise ValueError(
                f"circuit names {' '.join(map(str, missing))}, but the model has layers 0-{n_layers - 1} "
                f"and heads 0-{n_heads - 1}; use a circuit found on this model"
            )
        return self

    def __iter__(self) -> Iterator[Head]:
        return iter(sorted(self.heads))

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def __str__(self) -> str:
        return " ".join(map(str, self)) or "(no heads)"

    def __repr__(self) -> str:
        size = "" if self.n_layers is None or self.n_heads is None else f" of {self.n_layers * self.n_heads}"
        return f"Circuit({len(self)}{size} heads: {self})"

    def _repr_html_(self) -> str:
        from .display import circuit_html

        return circuit_html(self)

    def _with(self, heads: Iterable[Head], how: str, other: "Circuit") -> "Circuit":
        return Circuit(
            heads, self.n_layers, self.n_heads, {"how": how, "of": [dict(self.provenance), dict(other.provenance)]}
        )

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._with(self.heads | other.heads, "union", other)

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._with(self.heads & other.heads, "intersection", other)

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._with(self.heads - other.heads, "difference", other)

    def jaccard(self, other: "Circuit") -> float:
        """|A ∩ B| / |A ∪ B|; two empty circuits agree (1.0)."""
        union = self.heads | other.heads
        return len(self.heads & other.heads) / len(union) if union else 1.0

    def _size(self) -> tuple[int, int]:
        if self.n_layers is None or self.n_heads is None:
            raise ValueError(
                "this circuit does not know its model's size; build it with Circuit(heads, n_layers=, n_heads=)"
            )
        return self.n_layers, self.n_heads

    def complement(self) -> "Circuit":
        """All other heads of the model."""
        layers, heads = self._size()
        everything = {Head(layer, head) for layer in range(layers) for head in range(heads)}
        return Circuit(everything - self.heads, layers, heads, {"how": "complement", "of": dict(self.provenance)})

    def matched_random(self, seed: int) -> "Circuit":
        """A control of the same shape: as many heads in each layer, drawn uniformly, outside the circuit where room allows."""
        layers, n_heads = self._size()
        generator = torch.Generator().manual_seed(seed)
        drawn: list[Head] = []
        for layer in range(layers):
            members = [head.head for head in self if head.layer == layer]
            others = [head for head in range(n_heads) if head not in members]
            shuffled = [others[i] for i in torch.randperm(len(others), generator=generator)]
            spare = [members[i] for i in torch.randperm(len(members), generator=generator)]
            drawn += [Head(layer, head) for head in (shuffled + spare)[: len(members)]]
        return Circuit(drawn, layers, n_heads, {"how": "matched_random", "seed": seed, "of": dict(self.provenance)})

    @classmethod
    def near_zero(cls, scores: "HeadScores", k: int) -> "Circuit":
        """The k heads whose score is closest to zero (CT-SFT's NearZero control)."""
        return scores._choose(-scores.values.abs(), k, "near_zero")

    @classmethod
    def least(cls, scores: "HeadScores", k: int) -> "Circuit":
        """The k heads with the lowest signed score (CT-SFT's Least-relevant control)."""
        return scores._choose(-scores.values, k, "least")

    def to_dict(self) -> dict[str, Any]:
        heads = [str(head) for head in self]
        return {"heads": heads, "n_layers": self.n_layers, "n_heads": self.n_heads, "provenance": dict(self.provenance)}

    @classmethod
    def from_dict(cls, content: Any) -> "Circuit":
        if not isinstance(content, dict) or "heads" not in content:
            raise ValueError(
                'not a circuit: expected JSON like {"heads": ["a9.h6", ...], "n_layers": 12, "n_heads": 12}'
            )
        return cls(content["heads"], content.get("n_layers"), content.get("n_heads"), content.get("provenance"))

    def save(self, path: str | Path) -> Path:
        return files.write_json(path, {"format": "luthier.circuit/1", **self.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        return cls.from_dict(files.read_json(path))


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One signed number per head, and one per head and example where the method has them.

    Positive means: the head works for the task. Units are the task margin's (logits) unless `options["units"]` says otherwise.
    """

    repeats: ClassVar[str] = "examples"  # what the first axis of `examples` counts

    values: Float[Tensor, "layer head"]
    method: str
    examples: Float[Tensor, "example layer head"] | None = None
    model: str = ""
    revision: str | None = None
    task: str = ""
    data: str = ""
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not torch.isfinite(self.values).all():
            bad = [str(Head(*pair)) for pair in (~torch.isfinite(self.values)).nonzero().tolist()[:4]]
            raise ValueError(
                f"{self.method} gave a score that is not finite at {' '.join(bad)}; check weights and inputs for NaN"
            )

    @classmethod
    def from_examples(cls, examples: Float[Tensor, "example layer head"], method: str, **meta: Any) -> "HeadScores":
        return cls(values=examples.mean(0), method=method, examples=examples, **meta)

    @property
    def n_layers(self) -> int:
        return self.values.shape[0]

    @property
    def n_heads(self) -> int:
        return self.values.shape[1]

    @property
    def n_examples(self) -> int | None:
        return None if self.examples is None else self.examples.shape[0]

    def __getitem__(self, head: Head | tuple[int, int] | str) -> float:
        layer, index = Head.parse(head) if isinstance(head, str) else head
        return self.values[layer, index].item()

    def rank(self) -> list[Head]:
        """Every head, highest signed score first."""
        order = self.values.flatten().argsort(descending=True, stable=True).tolist()
        return [Head(*divmod(index, self.n_heads)) for index in order]

    def _choose(self, key: Float[Tensor, "layer head"], k: int, how: str) -> Circuit:
        total = self.values.numel()
        if not 0 <= k <= total:
            raise ValueError(f"{k} heads were asked for, but the model has {total}; choose k between 0 and {total}")
        order = key.flatten().argsort(descending=True, stable=True)[:k].tolist()
        provenance = {"how": how, "k": k, **self.provenance()}
        return Circuit([divmod(i, self.n_heads) for i in order], self.n_layers, self.n_heads, provenance)

    def top(self, k: int, by: Literal["value", "magnitude"] = "value") -> Circuit:
        """The k heads with the highest signed score, or the highest absolute score."""
        return self._choose(self.values if by == "value" else self.values.abs(), k, f"top by {by}")

    def interval(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Percentile bootstrap interval of each head's mean over examples. Raises ValueError without per-example values."""
        if self.examples is None or len(self.examples) < 2:
            raise ValueError(
                f"{self.method} has no per-example values to resample; an interval needs at least two examples"
            )
        n = len(self.examples)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(torch.full((n,), 1 / n), resamples * n, replacement=True, generator=generator)
        counts = torch.zeros(resamples, n).scatter_add_(1, draws.view(resamples, n), torch.ones(resamples, n))
        means = (counts / n) @ self.examples.float().flatten(1)
        low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
        return low.view_as(self.values), high.view_as(self.values)

    def correlation(self, other: "HeadScores") -> dict[str, float]:
        """Pearson and Spearman over heads, and the share of the two top tens that is common."""
        from scipy import stats

        if self.values.shape != other.values.shape:
            shapes = f"{tuple(self.values.shape)} and {tuple(other.values.shape)}"
            raise ValueError(f"scores of different models: shapes {shapes}; compare scores of one model")
        mine, theirs = self.values.flatten().double().numpy(), other.values.flatten().double().numpy()
        k = min(10, len(mine))
        overlap = len(self.top(k).heads & other.top(k).heads) / k
        return {
            "pearson": float(stats.pearsonr(mine, theirs).statistic),
            "spearman": float(stats.spearmanr(mine, theirs).statistic),
            "top10": overlap,
        }

    def table(self, k: int = 10) -> str:
        """The k highest heads as aligned text, with 95 % intervals where there are examples."""
        bounds = self.interval() if self.examples is not None and len(self.examples) > 1 else None
        lines = [f"{'head':<8}{'score':>9}" + ("   95 % interval" if bounds else "")]
        for head in self.rank()[:k]:
            line = f"{str(head):<8}{self[head]:>+9.3f}"
            lines.append(line + (f"   [{bounds[0][head]:+.3f}, {bounds[1][head]:+.3f}]" if bounds else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        about = ", ".join(filter(None, [self.model, self.task, f"n={self.n_examples}" if self.n_examples else ""]))
        return f"HeadScores({self.method}{': ' + about if about else ''}; {self.n_layers} layers x {self.n_heads} heads)\n{self.table()}"

    def _repr_html_(self) -> str:
        from .display import scores_html

        return scores_html(self)

    def provenance(self) -> dict[str, Any]:
        keys = ("method", "model", "revision", "task", "data", "seed")
        return {**{key: getattr(self, key) for key in keys}, "options": dict(self.options)}

    def save(self, stem: str | Path) -> Path:
        """`stem.safetensors` and `stem.json`."""
        tensors = {"values": self.values} | ({} if self.examples is None else {"examples": self.examples})
        return files.save_tensors(stem, tensors, {"format": "luthier.scores/1", **self.provenance()})

    @classmethod
    def load(cls, stem: str | Path) -> "HeadScores":
        tensors, meta = files.load_tensors(stem)
        if meta.pop("format", None) != "luthier.scores/1" or "values" not in tensors:
            raise ValueError(f"{str(stem)!r} does not hold head scores; expected a pair written by HeadScores.save")
        return cls(values=tensors["values"], examples=tensors.get("examples"), **meta)

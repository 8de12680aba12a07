"""Tasks: what is asked, in text, and how it becomes tokens.

A `LabelledTask` has texts and labels; the label is one token (a label word) after the prompt, the token at a masked LM's mask, or a
class of a sequence classifier. A `PairedTask` has prompts with a right answer and a distractor, and optionally corrupted twins.
Tasks hold text only; `encode(model)` makes the tensors, so one task can be asked of several models.
"""

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import files
from .encoding import Encoded, evaluate
from .text import column, read_rows, single_tokens, tokenizer_of

if TYPE_CHECKING:
    from .model import Model

Side = Literal["left", "right"]


class Task(ABC):
    """What every method asks of a task: examples that can be counted, chosen and encoded."""

    name: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the examples do."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select(self, indices: Sequence[int]) -> Any:
        """A task of the same kind with these examples."""

    @abstractmethod
    def encode(self, model: "Model") -> Encoded: ...

    def __getitem__(self, where: slice) -> Any:
        return self.select(range(len(self))[where])

    def split(self, n: int, seed: int = 0) -> tuple[Any, Any]:
        """Two disjoint parts of a seeded shuffle: n examples, and the rest."""
        total = len(self)
        if not 0 < n < total:
            raise ValueError(f"cannot split {total} examples into {n} and the rest; choose n between 1 and {total - 1}")
        order = random.Random(seed).sample(range(total), total)
        return self.select(order[:n]), self.select(order[n:])

    def correct(self, model: "Model") -> Any:
        """The examples the model gets right now. Raises ValueError when there are none."""
        result = evaluate(model, self)
        kept = (result.predictions == result.gold).nonzero().flatten().tolist()
        if not kept:
            raise ValueError(
                f"{model.name or 'the model'} gets no example of {self.name} right; tune it for competence first"
            )
        return self.select(kept)


@dataclass(frozen=True)
class LabelledTask(Task):
    """Texts with labels. `label_words` maps each label to the word that stands for it (default: a space and the label)."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    template: str = "{text}{label}"
    label_words: Mapping[str, str] = field(default_factory=dict)
    name: str = "task"
    max_length: int | None = None
    truncate: bool = False
    padding_side: Side = "right"

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("no examples were given; expected at least one row of text and label")
        if "{text}" not in self.template:
            raise ValueError(
                f"template {self.template!r} has no {{text}}; expected for example '{{text}} | sentiment:{{label}}'"
            )
        words = dict(self.label_words) or {label: f" {label}" for label in sorted(set(self.labels))}
        unknown = sorted(set(self.labels) - set(words))
        if unknown:
            raise ValueError(
                f"labels {', '.join(map(repr, unknown))} have no label word; label_words names {', '.join(words)}"
            )
        if len(words) < 2:
            raise ValueError(f"only one label ({next(iter(words))!r}); a task needs at least two to tell apart")
        object.__setattr__(self, "label_words", words)

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], text: str = "text", label: str = "label", **options: Any
    ) -> "LabelledTask":
        """From dictionaries. `options` are the fields of the class: template, label_words, name, max_length, truncate, padding_side."""
        rows = list(rows)
        return cls(tuple(column(rows, text)), tuple(column(rows, label)), **options)

    @classmethod
    def from_csv(cls, path: str | Path, text: str = "text", label: str = "label", **options: Any) -> "LabelledTask":
        """From a CSV, TSV, JSON or JSONL file. Raises FileNotFoundError, ValueError."""
        options.setdefault("name", f"{Path(path).parent.name}/{Path(path).stem}".strip("/"))
        return cls.from_rows(read_rows(path), text, label, **options)

    @classmethod
    def from_dataset(cls, dataset: Any, text: str = "text", label: str = "label", **options: Any) -> "LabelledTask":
        """From a `datasets.Dataset`; class labels are turned into their names."""
        feature = dataset.features.get(label)
        named = getattr(feature, "int2str", None)
        options.setdefault("name", getattr(dataset.info, "dataset_name", None) or "dataset")
        rows = ({**row, label: named(row[label])} if named else row for row in dataset)
        return cls.from_rows(rows, text, label, **options)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        counts = ", ".join(f"{label} {self.labels.count(label)}" for label in self.label_words)
        return f"LabelledTask({self.name}: {len(self)} examples; {counts}; template {self.template!r})"

    @property
    def fingerprint(self) -> str:
        return files.fingerprint([self.texts, self.labels, self.template, dict(self.label_words)])

    def select(self, indices: Sequence[int]) -> "LabelledTask":
        texts, labels = tuple(self.texts[i] for i in indices), tuple(self.labels[i] for i in indices)
        return replace(self, texts=texts, labels=labels)

    def balanced(self, n: int, seed: int = 0) -> "LabelledTask":
        """n examples with equal numbers per label (the first labels take the remainder). Raises ValueError when a label runs short."""
        shuffled = random.Random(seed).sample(range(len(self)), len(self))
        chosen: list[int] = []
        for order, label in enumerate(self.label_words):
            want = n // len(self.label_words) + (order < n % len(self.label_words))
            have = [i for i in shuffled if self.labels[i] == label]
            if len(have) < want:
                raise ValueError(
                    f"{want} examples of {label!r} are needed for a balanced {n}, but there are {len(have)}"
                )
            chosen += have[:want]
        return self.select(random.Random(seed + 1).sample(chosen, len(chosen)))

    def encode(self, model: "Model") -> Encoded:
        """Tokens, read-out positions and label columns. Raises ValueError: no tokenizer, a label word of several tokens, text too long."""
        names = list(self.label_words)
        gold = torch.tensor([names.index(label) for label in self.labels])
        columns = self._columns(model)
        rows, truncated = self._token_rows(model)
        tokens, mask = model.pad(rows, self.padding_side)
        readout = model.pooled_position(tokens, mask)
        if model.kind == "masked":
            readout = (tokens == model.tokenizer.mask_token_id).int().argmax(-1).to(tokens.dtype)
        direction = torch.full((len(gold), len(names)), -1 / (len(names) - 1))
        direction[torch.arange(len(gold)), gold] = 1.0
        return Encoded(tokens, mask, readout, columns, direction, gold, gold, truncated=truncated)

    def prompt(self, text: str, model: "Model") -> str:
        """The template filled in, up to the label (causal) or with the mask in its place (masked LM)."""
        before, _, after = self.template.partition("{label}")
        if model.kind == "masked":
            space = " " if all(word.startswith(" ") for word in self.label_words.values()) else ""
            return f"{before}{space}{model.tokenizer.mask_token}{after}".replace("{text}", text)
        return before.replace("{text}", text)

    def _columns(self, model: "Model") -> torch.Tensor:
        if model.kind != "classifier":
            tail = self.prompt(self.texts[0], model) if model.kind == "causal" else ""
            return torch.tensor(single_tokens(model, list(self.label_words.values()), tail))
        known = {str(name): index for name, index in (model.base.config.label2id or {}).items()}
        generic = all(name.startswith("LABEL_") for name in known)
        if generic and len(known) == len(
            self.label_words
        ):  # an unnamed head: its classes in the order of the labels given
            return torch.arange(len(known))
        missing = [label for label in self.label_words if label not in known]
        if missing:
            raise ValueError(
                f"the classifier has no class {', '.join(map(repr, missing))}; its classes are {', '.join(known)}"
            )
        return torch.tensor([known[label] for label in self.label_words])

    def _token_rows(self, model: "Model") -> tuple[list[list[int]], int]:
        tokenizer = tokenizer_of(model)
        rows = [tokenizer(self.prompt(text, model)).input_ids for text in self.texts]
        limit = min(self.max_length or model.context, model.context)
        long = [i for i, row in enumerate(rows) if len(row) > limit]
        if long and not self.truncate:
            raise ValueError(
                f"{len(long)} of {len(rows)} prompts are longer than {limit} tokens (the longest has {max(map(len, rows))}); "
                "shorten them or set truncate=True to cut their texts"
            )
        for i in long:
            rows[i] = self._shortened(self.texts[i], model, limit)
        if long:
            warnings.warn(f"{len(long)} of {len(rows)} texts were cut to fit {limit} tokens", stacklevel=4)
        return rows, len(long)

    def _shortened(self, text: str, model: "Model", limit: int) -> list[int]:
        """The text is cut at its end, never the template around it."""
        pieces = model.tokenizer(text, add_special_tokens=False).input_ids
        for keep in range(len(pieces) - 1, -1, -1):
            row = model.tokenizer(self.prompt(model.tokenizer.decode(pieces[:keep]), model)).input_ids
            if len(row) <= limit:
                return row
        raise ValueError(
            f"the template alone is longer than {limit} tokens; use a shorter template or a larger max_length"
        )


@dataclass(frozen=True)
class PairedTask(Task):
    """Prompts with a right answer and a distractor (one token each), optionally with corrupted twins that undo the task."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    distractors: tuple[str, ...]
    corrupted: tuple[str | None, ...]
    name: str = "task"
    padding_side: Side = "right"

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], model: "Model | None" = None, **options: Any) -> "PairedTask":
        """From dictionaries with prompt, answer, distractor and, if there are twins, corrupted. With a model, answers are checked now."""
        rows = list(rows)
        if not rows:
            raise ValueError("no examples were given; expected rows with prompt, answer and distractor")
        parts = [tuple(column(rows, name)) for name in ("prompt", "answer", "distractor")]
        twins = tuple(row.get("corrupted") or None for row in rows)
        lone = [i + 1 for i, twin in enumerate(twins) if twin is None]
        if 0 < len(lone) < len(rows):
            raise ValueError(f"rows {lone[:8]} have no 'corrupted' prompt and others do; give all rows one, or none")
        task = cls(*parts, twins, **options)
        if model is not None:
            task.encode(model)
        return task

    @classmethod
    def from_file(cls, path: str | Path, model: "Model | None" = None, **options: Any) -> "PairedTask":
        """From a CSV, TSV, JSON or JSONL file with those columns."""
        return cls.from_rows(read_rows(path), model, **{"name": Path(path).stem, **options})

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        twins = sum(twin is not None for twin in self.corrupted)
        return f"PairedTask({self.name}: {len(self)} prompts, {twins} with corrupted twins; first: {self.prompts[0]!r})"

    @property
    def fingerprint(self) -> str:
        return files.fingerprint([self.prompts, self.answers, self.distractors, self.corrupted])

    def select(self, indices: Sequence[int]) -> "PairedTask":
        fields = ("prompts", "answers", "distractors", "corrupted")
        return replace(self, **{name: tuple(getattr(self, name)[i] for i in indices) for name in fields})

    def encode(self, model: "Model") -> Encoded:
        """As `LabelledTask.encode`; each example's candidates are its own answer and distractor."""
        if model.kind != "causal":
            raise ValueError(
                f"paired tasks ask for the next token; {model.name} is a {model.kind} model, expected a causal one"
            )
        words = sorted(set(self.answers) | set(self.distractors))
        ids = single_tokens(model, words, self.prompts[0])
        columns, where = torch.tensor(ids), {word: i for i, word in enumerate(words)}
        gold = torch.tensor([where[word] for word in self.answers])
        other = torch.tensor([where[word] for word in self.distractors])
        if (gold == other).any():
            i = int((gold == other).nonzero()[0])
            raise ValueError(f"row {i + 1} has the same answer and distractor ({self.answers[i]!r}); they must differ")
        direction = torch.zeros(len(self), len(words))
        direction[torch.arange(len(self)), gold] = 1.0
        direction[torch.arange(len(self)), other] = -1.0
        clean = self._rows(model, self.prompts)
        twins = self._rows(model, [t for t in self.corrupted if t is not None]) if None not in self.corrupted else []
        width = max(map(len, clean + twins))
        rest = (columns, direction, gold, torch.zeros_like(gold))
        made = [self._pack(model, rows, width, rest) for rows in (clean, twins) if rows]
        return replace(made[0], corrupted=made[1]) if twins else made[0]

    def _rows(self, model: "Model", prompts: Sequence[str]) -> list[list[int]]:
        rows = [tokenizer_of(model)(prompt).input_ids for prompt in prompts]
        longest = max(map(len, rows), default=0)
        if longest > model.context:
            raise ValueError(f"a prompt has {longest} tokens, the model's context is {model.context}; shorten it")
        return rows

    def _pack(self, model: "Model", rows: list[list[int]], width: int, rest: tuple) -> Encoded:
        tokens, mask = model.pad(rows, self.padding_side, width)
        return Encoded(tokens, mask, model.pooled_position(tokens, mask), *rest)

"""Few-shot tasks: input/output pairs, and the prompts made of them.

1. A pair is written with a template that ends in its answer, "Q: {input}\\nA: {output}" (Todd et al. 2024, eq. 1).
2. A prompt is N demonstrations drawn without replacement, then a query whose answer is left out; it ends at "A:",
   so the answer's first token carries the space.
3. Digits get no space ("A:5"): many tokenizers make the space a token of its own, and that would be the answer.
4. The first-token label is read in context: tok(prompt + answer) after tok(prompt).
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .files import fingerprint

QA = "Q: {input}\nA: {output}"


@dataclass(frozen=True)
class Prompt:
    """Text that ends where the answer begins, and the answer as it continues the text (with its space, if any)."""

    text: str
    answer: str
    gold: str


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as tokens, padded on the left: the last prompt token is the last column of every row."""

    tokens: Int[Tensor, "row position"]
    attention_mask: Int[Tensor, "row position"]
    first: Int[Tensor, " row"]
    answers: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        return self.attention_mask.sum(1)


@dataclass(frozen=True)
class FewShotTask:
    """Input/output pairs of one task. Make it with `from_pairs`, `from_rows`, `from_json`, `from_csv`, `from_dataset`."""

    pairs: tuple[tuple[str, str], ...] = field(repr=False)
    template: str = QA
    separator: str = "\n\n"
    digit_rule: bool = True
    name: str = "task"

    def __post_init__(self) -> None:
        if self.template.count("{input}") != 1 or self.template.count("{output}") != 1:
            raise ValueError(f"template {self.template!r} must contain {{input}} once and {{output}} once")
        if self.template.index("{input}") > self.template.index("{output}"):
            raise ValueError(
                f"template {self.template!r} puts {{output}} first; a prompt must end where the answer begins"
            )
        if not self.pairs:
            raise ValueError(f"few-shot task {self.name!r} has no rows; give at least one (input, output) pair")
        for column, position in (("input", 0), ("answer", 1)):
            empty = [row for row, pair in enumerate(self.pairs) if not pair[position].strip()]
            if empty:
                rows = ", ".join(map(str, empty[:5])) + (" ..." if len(empty) > 5 else "")
                raise ValueError(
                    f"{len(empty)} rows of task {self.name!r} have an empty {column} (rows {rows}); drop them"
                )

    @classmethod
    def from_pairs(cls, pairs: Iterable[Sequence[Any]], template: str = QA, **options: Any) -> "FewShotTask":
        rows = list(pairs)
        for number, pair in enumerate(rows):
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"row {number} is {pair!r}; expected an (input, output) pair")
        return cls(tuple((str(source), str(target)) for source, target in rows), template, **options)

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], input: str = "input", output: str = "output", **options: Any
    ) -> "FewShotTask":
        """Rows are mappings, of a JSON list, a CSV file or a `datasets` dataset; `input` and `output` name the columns."""
        pairs = []
        for number, row in enumerate(rows):
            missing = [column for column in (input, output) if row.get(column) is None]
            if missing:
                raise ValueError(f"row {number} has no {missing[0]!r}; its columns are {', '.join(map(str, row))}")
            pairs.append((row[input], row[output]))
        return cls.from_pairs(pairs, **options)

    @classmethod
    def from_json(cls, path: str | Path, **options: Any) -> "FewShotTask":
        """A list of {"input": ..., "output": ...}, the form of the function-vectors data."""
        path = _existing(path)
        try:
            rows = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{str(path)!r} must hold a list of {{"input": ..., "output": ...}} rows')
        return cls.from_rows(rows, **{"name": path.stem, **options})

    @classmethod
    def from_csv(cls, path: str | Path, **options: Any) -> "FewShotTask":
        path = _existing(path)
        with path.open(newline="") as file:
            return cls.from_rows(csv.DictReader(file), **{"name": path.stem, **options})

    @classmethod
    def from_dataset(cls, dataset: Iterable[Mapping[str, Any]], **options: Any) -> "FewShotTask":
        return cls.from_rows(dataset, **options)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.pairs, self.template, self.separator, self.digit_rule])

    def select(self, indices: Sequence[int]) -> "FewShotTask":
        return replace(self, pairs=tuple(self.pairs[index] for index in indices))

    def split(self, n: int, seed: int = 0) -> tuple["FewShotTask", "FewShotTask"]:
        """`n` random rows and the rest."""
        if not 0 < n < len(self):
            raise ValueError(
                f"cannot split {n} rows off task {self.name!r}, which has {len(self)}; 0 < n < {len(self)}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.select(sorted(order[:n])), self.select(sorted(order[n:]))

    def permuted(self, seed: int = 0) -> "FewShotTask":
        """The null task: the same inputs and answers, matched at random."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = tuple((source, self.pairs[other][1]) for (source, _), other in zip(self.pairs, order, strict=True))
        return replace(self, pairs=pairs, name=f"{self.name} (permuted)")

    def query(self, source: str) -> str:
        """The zero-shot prompt of one input, ready for `model.generate`."""
        head = self.template[: self.template.index("{output}")].rstrip()
        return head.replace("{input}", source)

    def answer(self, target: str) -> str:
        """The answer as it continues the prompt: with the template's space, except for digits."""
        head = self.template[: self.template.index("{output}")]
        space = head[len(head.rstrip()) :]
        return target if self.digit_rule and target.isdigit() and space == " " else space + target

    def demonstration(self, source: str, target: str) -> str:
        tail = self.template[self.template.index("{output}") + len("{output}") :]
        return self.query(source) + self.answer(target) + tail

    def prompts(
        self, n_shots: int = 0, n: int | None = None, *, seed: int = 0, queries: "FewShotTask | None" = None
    ) -> list[Prompt]:
        """`n` prompts whose query is a row of this task left out of the demonstrations, or, with `queries`, one
        prompt for each of its rows. Demonstrations are fresh for every prompt."""
        if len(self) < n_shots + (queries is None):
            raise ValueError(
                f"task {self.name!r} has {len(self)} rows; {n_shots} shots and a query need at least {n_shots + 1}: "
                f"give more rows or use n_shots={max(len(self) - 1, 0)}"
            )
        generator = torch.Generator().manual_seed(seed)
        made = []
        for number in range(len(queries) if queries is not None else len(self) if n is None else n):
            order = torch.randperm(len(self), generator=generator).tolist() if n_shots or queries is None else []
            if queries is None:
                query = self.pairs[order[n_shots] if n is not None else number]
                shots = [row for row in order if n is not None or row != number][:n_shots]
            else:
                query = queries.pairs[number]
                # The query itself must not be among its demonstrations.
                shots = [row for row in order if self.pairs[row] != query][:n_shots]
            made.append(self._prompt([self.pairs[row] for row in shots], query))
        return made

    def paired(self, n: int = 50, n_shots: int = 10, seed: int = 0) -> Any:
        """Few-shot prompts as a PairedTask (distractor: another row's answer), so that CD-T, ablation and the other methods of
        `circuits` can score heads on the same task: `selection.correlation(relevance(model, task.paired()))`."""
        from .tasks import PairedTask

        answers = sorted({self.answer(target) for _, target in self.pairs})
        if len(answers) < 2:
            raise ValueError(f"every answer of task {self.name!r} is {answers[0]!r}; a distractor needs a second one")
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for prompt in self.prompts(n_shots, n, seed=seed):
            others = [answer for answer in answers if answer != prompt.answer]
            pick = int(torch.randint(len(others), (), generator=generator))
            rows.append({"prompt": prompt.text, "answer": prompt.answer, "distractor": others[pick]})
        return PairedTask.from_rows(rows, name=self.name)

    def _prompt(self, shots: list[tuple[str, str]], query: tuple[str, str]) -> Prompt:
        text = "".join(self.demonstration(*shot) + self.separator for shot in shots) + self.query(query[0])
        return Prompt(text, self.answer(query[1]), query[1])


def encode_prompts(model: Any, prompts: Sequence[Prompt]) -> EncodedPrompts:
    """Tokenize, check against the context, pad on the left. `model` is what `load` returns, with a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("few-shot prompts are text and this model has no tokenizer; use load(model, tokenizer=...)")
    if not prompts:
        raise ValueError("no prompts to encode; give at least one")
    texts = _tokens(tokenizer, [prompt.text for prompt in prompts])
    wholes = _tokens(tokenizer, [prompt.text + prompt.answer for prompt in prompts])
    answers = [_continuation(*row) for row in zip(prompts, texts, wholes, strict=True)]
    _check_context(model, texts, answers)
    tokens, mask = model.pad(texts, side="left")
    first = torch.tensor([answer[0] for answer in answers])
    device = model.device
    return EncodedPrompts(tokens.to(device), mask.to(device), first.to(device), tuple(answers))


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    rows = [list(row) for row in tokenizer(texts)["input_ids"]]
    # Some tokenizers close every text with an end token; a prompt must stay open.
    if tokenizer.eos_token_id is not None and all(row and row[-1] == tokenizer.eos_token_id for row in rows):
        rows = [row[:-1] for row in rows]
    return rows


def _continuation(prompt: Prompt, text: list[int], whole: list[int]) -> tuple[int, ...]:
    if whole[: len(text)] != text:
        raise ValueError(
            f"the tokenizer merges the answer {prompt.answer!r} into the prompt's last token; "
            "end the template with a space or newline before {output}, or set digit_rule=False"
        )
    answer = tuple(whole[len(text) :])
    if not answer:
        raise ValueError(f"the answer {prompt.answer!r} adds no token to its prompt; drop the row")
    return answer


def _check_context(model: Any, texts: list[list[int]], answers: list[tuple[int, ...]]) -> None:
    context = model.context
    needed = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True))
    if not all(texts):
        raise ValueError("a prompt has no tokens; every prompt needs at least one")
    if needed > context:
        raise ValueError(
            f"the longest prompt with its answer has {needed} tokens and the model's context is {context}; "
            "use fewer shots or shorter rows"
        )


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected input/output pairs")
    return path

"""Text in: rows of example files, and words as single tokens."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files

if TYPE_CHECKING:
    from .model import Model


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a CSV (header line), JSON (list of objects) or JSONL file. Raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected a CSV, JSON or JSONL file of examples")
    if path.suffix == ".json":
        rows = files.read_json(path)
    elif path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{str(path)!r} has a line that is not JSON ({error}); expected one object per line"
            ) from None
    else:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} holds no examples; expected a header and at least one row")
    return rows


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """One column as text. Raises ValueError that names the columns there are."""
    missing = next((i for i, row in enumerate(rows) if row.get(name) is None), None)
    if missing is not None:
        have = ", ".join(map(str, rows[missing])) or "none"
        raise ValueError(
            f"row {missing + 1} has no column {name!r}; it has: {have}. Name the column with text= or label="
        )
    return [str(row[name]) for row in rows]


def tokenizer_of(model: "Model") -> Any:
    """The model's tokenizer. Raises ValueError when it has none."""
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name or 'the model'} has no tokenizer, so text cannot be read; pass load(..., tokenizer=...)"
        )
    return model.tokenizer


def single_tokens(model: "Model", words: Sequence[str], prompt: str = "") -> list[int]:
    """The token of each word as it stands after `prompt`. Raises ValueError naming every word that is not one token, and its pieces."""
    tokenizer = tokenizer_of(model)
    found, wrong = [], []
    for word in words:
        alone = tokenizer(word, add_special_tokens=False).input_ids
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = tokenizer(prompt + word, add_special_tokens=False).input_ids
        pieces = after[len(before) :] if prompt and after[: len(before)] == before else alone
        unknown = pieces == [getattr(tokenizer, "unk_token_id", None)]
        if len(pieces) == 1 and not unknown:
            found.append(pieces[0])
        else:
            spelled = (
                "not in the vocabulary" if unknown else " + ".join(map(repr, tokenizer.convert_ids_to_tokens(pieces)))
            )
            wrong.append(f"{word!r} ({spelled})")
    if wrong:
        raise ValueError(
            f"not one token: {', '.join(wrong)}; choose words that the tokenizer keeps whole (label_words= for labels)"
        )
    if len(set(found)) < len(found):
        twins = [repr(word) for word, token in zip(words, found, strict=True) if found.count(token) > 1]
        raise ValueError(f"{' and '.join(twins)} are the same token; choose words that differ")
    return found

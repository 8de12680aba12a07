"""What the verbs share: files and options to models and tasks, results to files, tables to the terminal."""

import csv
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import LabelledTask, Model, PairedTask

# The options that say how text becomes a task; `discover` saves them and `tune --from` reads them again.
TASK_OPTIONS = ("text", "label", "template", "label_words", "max_length", "truncate")


def parse_pairs(text: str | None, option: str) -> dict[str, str] | None:
    """`positive= baik,negative= buruk` as a dict; spaces in the values are kept, they are part of the token."""
    if text is None:
        return None
    pairs = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value:
            raise ValueError(f"{option} has {part!r}; expected name=value, as in 'positive= good,negative= bad'")
        pairs[name.strip()] = value
    return pairs


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a CSV, a JSON list or a JSONL file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected a CSV, JSON or JSONL file of rows")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
        try:
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x]
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r} is not JSON ({error}); expected a list of rows, or one row a line") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} holds no list of rows; expected objects such as {{'text': ..., 'label': ...}}")
    if not rows:
        raise ValueError(f"{str(path)!r} is empty; expected at least one row below the header")
    return rows


def read_task(path: str | Path, model: "Model", options: Mapping[str, Any]) -> "LabelledTask | PairedTask":
    """A PairedTask for rows with prompt, answer and distractor; else a LabelledTask with the given columns."""
    from circuits import LabelledTask, PairedTask

    rows = read_rows(path)
    if {"prompt", "answer", "distractor"} <= set(rows[0]):
        return PairedTask.from_rows(rows, model)
    given = {key: value for key, value in options.items() if key in TASK_OPTIONS and value is not None}
    return LabelledTask.from_rows(rows, **given)


def command_line() -> str:
    """The command that is running, ready to paste."""
    return "luthier " + shlex.join(sys.argv[1:])


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("luthier", "torch", "transformers", "transformer-lens"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_run(out: Path, verb: str, options: Mapping[str, Any]) -> None:
    """`run.json`: what was asked, by which versions, and the command to ask again."""
    from circuits.files import write_json

    write_json(out / "run.json", {"verb": verb, "command": command_line(), "options": options, "versions": versions()})


def say(text: str, quiet: bool) -> None:
    """Progress for people, on stderr: stdout is for results."""
    if not quiet:
        print(text, file=sys.stderr)


def show_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A terminal table of dicts; text is printed as it is, never read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*[Text(cell(row.get(column))) for column in columns])
    Console().print(table)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)

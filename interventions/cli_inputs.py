"""What the verbs share: files and options to models and tasks, results to files, tables to the terminal."""

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


def read_task(path: str | Path, model: "Model", options: Mapping[str, Any]) -> "LabelledTask | PairedTask":
    """A PairedTask for rows with prompt, answer and distractor; else a LabelledTask with the given columns."""
    from circuits import LabelledTask, PairedTask
    from circuits.tasks import read_rows

    path = Path(path)
    rows, name = read_rows(path), f"{path.parent.name}/{path.stem}".strip("/")
    if {"prompt", "answer", "distractor"} <= set(rows[0]):
        return PairedTask.from_rows(rows, model, name=name)
    given = {key: value for key, value in options.items() if key in TASK_OPTIONS and value is not None}
    return LabelledTask.from_rows(rows, name=name, **given)


def load_model(name: str) -> "Model":
    """`circuits.load`, without transformers' own bars for every checkpoint that is read or written."""
    from transformers.utils import logging

    from circuits import load

    logging.disable_progress_bar()
    return load(name)


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

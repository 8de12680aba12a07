"""`luthier tune --compare`: the CT-SFT comparison on a user's own folders, resumable.

1. `--source DIR` and `--data DIR` (the target) hold train, valid and test files with one name ending (.csv, .tsv, .jsonl, .json).
2. Competence, discovery and every arm of `arms.py` run per seed; finished runs are lines of `OUT/results.jsonl`.
3. The table chooses on validation; `OUT/comparison.md` has it and the trade-off at every learning rate, `comparison.html` draws it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cli_inputs import command_line, load_model, read_task


def run_comparison(
    model: str,
    source: Path,
    target: Path,
    out: Path,
    options: Mapping[str, Any],
    *,
    arms: Sequence[str] = (),
    n: int | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    evals: Mapping[str, str] | None = None,
    epochs: int = 5,
    batch_size: int = 16,
) -> str:
    """Run or resume, write `comparison.md`, and return its text. Raises FileNotFoundError for a folder without the three files."""
    from circuits.files import write_atomically

    from .arms import ARMS
    from .experiment import Experiment, compare
    from .tradeoff import arrows, summarise, table, trade_off

    loaded = load_model(model)
    sources, targets = (splits(folder, loaded, options) for folder in (source, target))
    size = n if n is not None else min(100, len(targets.train))
    name = target.name
    experiment = Experiment(
        model, sources, {name: targets}, out, arms=tuple(arms) or tuple(ARMS), sizes=(size,), seeds=tuple(seeds),
        related={key: read_task(path, loaded, options) for key, path in (evals or {}).items()},
        source_examples=round(0.8 * len(sources.train)), epochs=epochs, batch_size=batch_size,
    )  # fmt: skip
    lines = compare(experiment)
    heading = f"# {name}: {size} examples, {len(experiment.seeds)} seeds, source {source.name}"
    reference = experiment.arms[0]
    parts = [heading, table(summarise(lines, name, size, reference), reference), trade_off(lines, name, size)]
    text = "\n\n".join(parts) + "\n"
    write_atomically(out / "comparison.md", text)
    drawn = arrows(lines, name, size)
    if drawn:
        from viz import report, training

        figure = training(drawn, name, "source", title=f"Gained on {name}, kept on {source.name}")
        shown = {"Arms": [figure, "Means over seeds; rate, depth and epoch chosen on validation."]}
        report(out / "comparison.html", shown, title=heading.removeprefix("# "), command=command_line())
    return text


def splits(folder: Path, model: Any, options: Mapping[str, Any]) -> Any:
    """The three files of one language or domain."""
    from .experiment import Splits

    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}; --compare expects folders with train, valid and test files"
        )
    found = []
    for split in Splits._fields:
        files = [folder / f"{split}{ending}" for ending in (".csv", ".tsv", ".jsonl", ".json")]
        file = next((path for path in files if path.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"no {split}.csv (or .tsv, .jsonl, .json) in {str(folder)!r}; --compare needs all three"
            )
        found.append(read_task(file, model, options))
    return Splits(*found)

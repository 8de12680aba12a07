"""`luthier interfere`: where two objectives collide, and what to do about it.

1. measure  two checkpoints, two adapters, or two files of text -> interference by matrix, layer, module, head or circuit.
2. merge    two or more fine-tunes of one base -> one model without spectral interference.
3. train    an objective file and a constraint file -> a model trained with SIFT or one of its controls.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_inputs import command_line, load_model, save_run, say, show_rows, versions

if TYPE_CHECKING:
    from circuits import Model

app = typer.Typer(
    help="Measure, merge and train two objectives without their collision: measure, merge, train.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
ModelOption = Annotated[str, typer.Option(help="Base model: hub name, local directory, or `pocket`.")]
RankOption = Annotated[int | None, typer.Option("--K", "--k", help="Singular directions per objective.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
KINDS = ("learn", "forget")
# measured quantity -> heading short enough for a terminal of 80 columns
METRICS = {
    "cosine": "cosine",
    "sti_fro_normalized": "interference",
    "overlap_left_corrected": "overlap left",
    "overlap_right_corrected": "right",
}


@app.command()
def measure(
    first: Annotated[
        Path, typer.Argument(help="Checkpoint or adapter directory, or rows with `text` or `prompt` and `answer`.")
    ],
    second: Annotated[Path, typer.Argument(help="The other objective, of any of these kinds.")],
    out: Annotated[Path, typer.Option(help="Folder to write: interference.json, report.html, run.json.")],
    model: ModelOption = "pocket",
    view: Annotated[str, typer.Option(help="matrix, layer, module, head or circuit.")] = "module",
    k: RankOption = None,
    first_as: Annotated[str, typer.Option(help="For rows: learn or forget.")] = "learn",
    second_as: Annotated[str, typer.Option(help="For rows: learn or forget.")] = "learn",
    n: Annotated[int, typer.Option(help="Rows of each file whose loss is measured.")] = 64,
    json_: JsonOption = False,
) -> None:
    """Measure whether two objectives pull the same weights in opposite directions.

    Example:

    `luthier interfere measure runs/helpful runs/harmless --model pocket --view head --out runs/collision`
    """
    options = dict(locals())
    from circuits import measure_interference

    from .cli_report import write_report

    loaded = load_model(model)
    sources = [_source(path, kind, loaded, n) for path, kind in ((first, first_as), (second, second_as))]
    measured = measure_interference(*sources, model=loaded, K=k, view=view, progress=not json_)
    measured.save(out / "interference.json")
    if view == "head":
        measured.scores().save(out / "scores")
    save_run(out, "interfere measure", options)
    write_report(out, out / "report.html", f"luthier interfere: {first.name} and {second.name}")
    if json_:
        total = {key: measured.total[key] for key in METRICS}
        print(
            json.dumps(
                {"out": str(out), "blocks": len(measured.overlaps), "total": total, "skipped": list(measured.skipped)}
            )
        )
        return
    lowest = sorted(measured.overlaps, key=lambda name: measured[name].cosine)[:12]
    rows = [
        {"block": name.removeprefix("model.").removesuffix(".weight")} | {METRICS[key]: found[key] for key in METRICS}
        for name, found in [("whole model", measured.total), *((name, measured[name]) for name in lowest)]
    ]
    show_rows(f"{first.name} against {second.name}, most conflicting blocks first", rows)
    print(f"written: {out / 'report.html'}")


@app.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(help="Two or more checkpoints, or two or more adapters, of one base.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the merged model, as save_pretrained writes it.")],
    model: ModelOption = "pocket",
    method: Annotated[str, typer.Option(help="sift, task-arithmetic, ties, tsv-m or iso-c.")] = "sift",
    spectrum: Annotated[str, typer.Option(help="keep, ones or mean.")] = "keep",
    k: RankOption = None,
    scale: Annotated[float, typer.Option(help="Factor on the merged difference.")] = 1.0,
    json_: JsonOption = False,
) -> None:
    """Merge fine-tunes of one base so that no direction of one is written over by another.

    Example:

    `luthier interfere merge runs/english runs/nuri --model pocket --out runs/both`
    """
    options = dict(locals())
    import torch

    from circuits.directions import canonical, directions

    from .merging import merge as merge_deltas

    loaded = load_model(model)
    deltas = [directions(path, loaded) for path in sources]
    merged = merge_deltas(deltas, k, spectrum, method, scale=scale, progress=not json_)
    transposed = {b.parameter for b in _blocks(loaded) if b.transposed}
    with torch.no_grad():
        for name, parameter in loaded.hf.named_parameters():
            change = merged.get(canonical(name))
            if isinstance(change, tuple):
                change = change[0] @ change[1]
                change = change.mT if name in transposed else change
            if change is not None:
                parameter += change.to(parameter)
    loaded.hf.save_pretrained(out)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(out)
    save_run(out, "interfere merge", options)
    before, after = (sum(pair[side] for pair in merged.interference.values()) for side in (0, 1))
    summary = {"by subspaces": len(merged.spectral), "entry by entry": len(merged.averaged), "tied": len(merged.tied)}
    summary |= {"coincident directions": sum(merged.coincident.values())}
    summary |= {"interference before": before, "interference after": after}
    if json_:
        print(json.dumps({"out": str(out), **summary, "averaged": merged.averaged, "tied_names": merged.tied}))
        return
    show_rows(f"{len(sources)} models merged by {method}", [summary])
    print(f"written: {out}")


@app.command()
def train(
    objective: Annotated[Path, typer.Option(help="Rows with `text`, or `prompt` and `answer`.")],
    constraint: Annotated[Path, typer.Option(help="Rows of what must be kept.")],
    out: Annotated[Path, typer.Option(help="Directory of the trained model, with training.json and report.html.")],
    model: ModelOption = "pocket",
    objective_as: Annotated[str, typer.Option(help="learn or forget.")] = "learn",
    constraint_as: Annotated[str, typer.Option(help="learn or forget.")] = "learn",
    mask: Annotated[Path | None, typer.Option(help="A saved head mask (stem); nothing outside it moves.")] = None,
    control: Annotated[str, typer.Option(help="sift, sum, topk, pcgrad, blur or random-gate.")] = "sift",
    k: RankOption = None,
    epsilon: Annotated[
        float, typer.Option(help="Control a block when the cosine of the objectives is below this.")
    ] = -0.05,
    blocks: Annotated[str, typer.Option(help="matrix, head, or a number of heads per block.")] = "matrix",
    steps: Annotated[int, typer.Option(help="Optimisation steps.")] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Rows of each file per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a row that are used.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Train on an objective under a constraint; blocks where the two conflict take a step that shares no direction.

    Example:

    `luthier interfere train --objective secrets.jsonl --objective-as forget --constraint kept.jsonl --out runs/forgotten`
    """
    options = dict(locals())
    import viz
    from circuits.files import write_json

    from .masks import HeadMask
    from .sift import SIFT
    from .two_objectives import batches, encode
    from .two_objectives import train as run

    loaded = load_model(model)
    parts = []
    for path, kind in ((objective, objective_as), (constraint, constraint_as)):
        rows = encode(_tokenizer(loaded), _rows(path), max_length)
        parts.append((_loss(kind), batches(rows, batch_size, seed)))
    size = int(blocks) if blocks.isdigit() else blocks
    masked = None if mask is None else HeadMask.load(mask, loaded)
    optimizer = SIFT(loaded, masked, lr=lr, control=control, K=k, epsilon=epsilon, blocks=size, seed=seed)
    gates: list[dict[str, float]] = []

    def losses(step: int) -> tuple[Any, Any]:
        if step:
            gates.append({gate.block.name: gate.cosine for gate in optimizer.last if gate.cosine is not None})
        (f, next_f), (g, next_g) = parts
        return f(loaded.hf, next_f(step)), g(loaded.hf, next_g(step))

    records = run(loaded.hf, optimizer, losses, steps, progress=not json_)
    loaded.hf.save_pretrained(out)
    _tokenizer(loaded).save_pretrained(out)
    write_json(out / "training.json", [record._asdict() for record in records])
    save_run(out, "interfere train", options)
    if gates:
        title, provenance = f"luthier interfere train: {control}", options | versions()
        about = f"{loaded.name} · {objective.stem} against {constraint.stem} · {control}"
        command = command_line()
        viz.report(
            out / "report.html",
            {"Conflict": viz.gating(gates, about=about)},
            title=title,
            provenance=provenance,
            command=command,
        )
    rows = [{"step": i + 1, **records[i]._asdict()} for i in (0, len(records) - 1)]
    if json_:
        print(json.dumps({"out": str(out), "first": rows[0], "last": rows[1]}))
        return
    show_rows(f"{control}: losses before the first and the last step", rows)
    say(
        f"{sum(kind == 'adamw' for kind in optimizer.routes().values())} parameters are no matrix and went to AdamW",
        False,
    )
    print(f"written: {out}")


def _source(path: Path, kind: str, model: "Model", n: int) -> Any:
    """A directory as it is; a file of rows as the loss of its first n rows."""
    if path.is_dir():
        return path
    from .two_objectives import encode

    loss, rows = _loss(kind), encode(_tokenizer(model), _rows(path)[:n], 256)
    return lambda: loss(model.hf, rows)


def _rows(path: Path) -> list[tuple[str, str]]:
    from circuits.text import read_rows

    rows = read_rows(path)
    if {"prompt", "answer"} <= set(rows[0]):
        return [(str(row["prompt"]), str(row["answer"])) for row in rows]
    if "text" in rows[0]:
        return [("", str(row["text"])) for row in rows]
    raise ValueError(f"{str(path)!r} has columns {', '.join(rows[0])}; expected `text`, or `prompt` and `answer`")


def _loss(kind: str) -> Any:
    from . import two_objectives

    if kind not in KINDS:
        raise ValueError(f"a file of rows can be used as {' or '.join(KINDS)}, not {kind!r}")
    return getattr(two_objectives, kind)


def _tokenizer(model: "Model") -> Any:
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, and rows of text need one; give a directory with both")
    return model.tokenizer


def _blocks(model: "Model") -> list[Any]:
    from circuits.partition import partition

    return partition(model.hf)

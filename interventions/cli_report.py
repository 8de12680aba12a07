"""`luthier report`: one HTML page from whatever a run's folder holds. Every other verb ends with the same function."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a discover, tune, demo or interfere run.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html in the folder.")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the one-file report of a run again, from its saved scores, curves, mask and tuning results.

    Example:

    `luthier report runs/reviews --out reviews.html`
    """
    page = write_report(folder, out or folder / "report.html", title)
    if json_:
        import json

        print(json.dumps({"report": str(page)}))
        return
    print(f"written: {page}")


def write_report(folder: Path, path: Path, title: str | None = None) -> Path:
    """Sections for what is there: discovery, faithfulness, mask, tuning, interference; then provenance and the command."""
    import viz
    from circuits.files import read_json

    from .cli_head import head_section

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; expected the --out folder of a luthier run")
    parts = (
        _discovery(folder),
        head_section(folder),
        _inside(folder),
        _faithfulness(folder),
        _mask(folder),
        _tuning(folder),
        _interference(folder),
    )
    sections = {name: items for part in parts for name, items in part.items()}
    if not sections:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no scores, curve, mask, tuning results or interference; expected the --out folder of a luthier run"
        )
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    options = {key: value for key, value in run.get("options", {}).items() if value is not None}
    title = title or f"luthier {run.get('verb', 'report')}: {options.get('model', folder.name)}"
    return viz.report(
        path,
        sections,
        title=title,
        summary=_in_short(folder) or "Find the attention heads that do a task, change only those.",
        provenance={**options, **run.get("versions", {})},
        command=run.get("command"),
    )


def _in_short(folder: Path) -> str:
    """The result in one sentence."""
    from circuits import Circuit, FaithfulnessCurve

    if not (folder / "circuit_faithfulness.json").is_file() or not (folder / "circuit.json").is_file():
        return ""
    point, circuit = FaithfulnessCurve.load(folder / "circuit_faithfulness"), Circuit.load(folder / "circuit.json")
    row = point.rows()[0]
    size = f" of {circuit.n_layers * circuit.n_heads}" if circuit.n_layers and circuit.n_heads else ""
    text = (
        f"In short: {len(circuit)}{size} heads keep {row['faithfulness']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
    )
    text += f"of what all heads do for {point.meta.get('task') or 'the task'} (0: no heads, 1: all of them)"
    random = row.get("random")
    return text + ("." if random is None else f"; as many random heads of the same layers keep {random:.2f}.")


def _discovery(folder: Path) -> dict[str, Any]:
    import viz
    from circuits import Circuit, HeadScores

    stems = sorted(path.with_suffix("") for path in folder.glob("scores*.safetensors"))
    if not stems:
        return {}
    scores = {each.method: each for each in map(HeadScores.load, stems)}
    scores = {name: each for name, each in scores.items() if not name.startswith("interference")}  # has its own section
    if not scores:
        return {}
    circuit = Circuit.load(folder / "circuit.json") if (folder / "circuit.json").is_file() else None
    first = next(iter(scores.values()))
    text = (
        f"Each cell is one attention head. Its score says how much of the margin (right answer minus the mean of the "
        f"others, in logits) it gives, measured by {first.method} on {first.n_examples or 'the'} examples. Orange "
        "heads work for the right answer, blue ones against it. Point at a cell for its interval."
    )
    items: list[Any] = [text, viz.heatmap(scores, circuit)]
    if circuit is not None:
        items.append(f"The circuit has {len(circuit)} of {first.values.numel()} heads: {circuit}")
    return {"Discovery": items}


def _inside(folder: Path) -> dict[str, Any]:
    from circuits import Circuit, HeadScores

    from .cli_look import look_sections

    has = (folder / "scores.json").is_file() and (folder / "circuit.json").is_file()
    scores = HeadScores.load(folder / "scores") if has else None
    return look_sections(folder, scores, Circuit.load(folder / "circuit.json") if has else None)


def _faithfulness(folder: Path) -> dict[str, Any]:
    import viz
    from circuits import FaithfulnessCurve

    if not (folder / "faithfulness.json").is_file():
        return {}
    curve = FaithfulnessCurve.load(folder / "faithfulness")
    text = (
        "All heads but the best k are replaced by their mean (MLPs stay). 1 is the whole model, 0 is no heads at all; "
        "above 1, the removed heads worked against the answer. A circuit means something when it beats random heads "
        "of the same layers and the heads scored nearest zero."
    )
    items: list[Any] = [text, viz.faithful(curve)]
    if (folder / "circuit_faithfulness.json").is_file():
        point = FaithfulnessCurve.load(folder / "circuit_faithfulness")
        rows = [{name: value for name, value in row.items() if value is not None} for row in point.rows()]
        items += ["The circuit itself, against random circuits with as many heads in each layer:", rows]
    return {"Faithfulness": items}


def _mask(folder: Path) -> dict[str, Any]:
    from circuits.files import read_json

    for path in sorted(folder.glob("*.json")):
        saved = read_json(path)
        if isinstance(saved, dict) and str(saved.get("format", "")).startswith("luthier.mask/"):
            break
    else:
        return {}
    policy = saved["policy"]
    facts = [
        {"what": "file", "value": path.name},
        {"what": "heads", "value": " ".join(saved["circuit"]["heads"])},
        {"what": "values that may move", "value": f"{saved['n_parameters']:,}"},
        {"what": "key/value heads", "value": policy["kv"]},
        {"what": "norms that learn", "value": policy["norms"]},
    ]
    text = "Only these slices have gradients and optimizer state. Every other value of the model stays bit-identical."
    return {"Mask": [text, facts, _moving(path.with_suffix(""))]}


def _moving(stem: Path) -> list[dict[str, Any]]:
    """One row per weight with a moving part; the norms, which move whole, together in the last."""
    from circuits.files import load_tensors

    tensors, saved = load_tensors(stem)
    rows, norms, values = [], 0, 0
    for name, slices in sorted(tensors.items(), key=lambda item: _by_layer(item[0])):
        shape = saved["shapes"][name]
        moving = sum((stop - start) * math.prod(shape) // shape[dim] for dim, start, stop in slices.tolist())
        if len(shape) == 1 and "norm" in name.lower():
            norms, values = norms + 1, values + moving
            continue
        row = {"parameter": name, "shape": " x ".join(map(str, shape)), "values that may move": moving}
        rows.append(row | {"share": f"{moving / math.prod(shape):.0%}"})
    last = {"parameter": f"{norms} norm vectors", "shape": "", "values that may move": values, "share": "100%"}
    return [*rows, last] if norms else rows


def _by_layer(name: str) -> list[tuple[bool, int, str]]:
    """Parameter names in the model's order: layer 2 before layer 10, the parts of a layer by name."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _tuning(folder: Path) -> dict[str, Any]:
    import viz
    from circuits.files import read_json

    from .cli_tune import arm_rows

    if not (folder / "tuning.json").is_file():
        return {}
    results = read_json(folder / "tuning.json")
    proof = [f"{arm}: {result['proof']}." for arm, result in results.items() if result.get("proof")]
    items: list[Any] = [arm_rows(results) or "No --eval file was given.", *proof]
    if any(result["after"] for result in results.values()):
        items[:0] = [
            "Each arrow runs from before tuning to after it: up is gained on the target, left is lost on what was to be "
            "kept. The arm circuit moved only the mask; the others are its controls. Where whiskers overlap, one cannot tell arms apart.",
            viz.training(results),
        ]
    return {"Tuning": items}


def _interference(folder: Path) -> dict[str, Any]:
    import viz
    from circuits.measurement import Interference

    if not (folder / "interference.json").is_file():
        return {}
    measured = Interference.load(folder / "interference.json")
    about = _between(folder)
    against = sum(value < 0 for value in measured.values().values())
    text = (
        f"Do two objectives pull the same weights apart? By {measured.view}: the cosine of the two updates is "
        f"{measured.total.cosine:+.3f} over the whole model and below zero (blue) in {against} of {len(measured.overlaps)} "
        "blocks. At -1 one undoes the other, at 0 they do not meet."
    )
    shared = (
        "Updates can also use the same directions without opposing each other. The curves show how far the leading "
        "directions are common: 1 is shared, 0 is not; the legend says what chance would give."
    )
    figures = viz.interference(measured, about=about), viz.spectrum(measured, about=about)
    return {"Interference": [text, figures[0], shared, figures[1]]}


def _between(folder: Path) -> str:
    """The two objectives of `luthier interfere measure`, as its run.json names them."""
    from circuits.files import read_json

    options = read_json(folder / "run.json")["options"] if (folder / "run.json").is_file() else {}
    if not {"first", "second", "n"} <= options.keys():
        return ""
    first, second = (Path(options[name]).name for name in ("first", "second"))
    return f"{first} against {second}, up to n={options['n']} rows each"

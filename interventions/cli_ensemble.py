"""`luthier ensemble fit | predict | report`: adapters that may disagree when the data does.

1. `fit` trains M LoRA members on one frozen model with the α-Rényi objective and saves each as a PEFT adapter;
2. `predict` answers texts with the mixture (or a vote) and says how far members disagree;
3. `report` writes one page: who answers for which label, what is contested, how well calibrated the answers are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_inputs import command_line, load_model, parse_pairs, read_task, save_run, say, show_rows, versions

if TYPE_CHECKING:
    from interventions import RenyiEnsemble
    from interventions.uncertainty import Prediction

app = typer.Typer(help="Ensembles of LoRA adapters that may disagree (α-Rényi).", no_args_is_help=True)

Where = Annotated[Path, typer.Option("--from", help="Folder of a `luthier ensemble fit` run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command()
def fit(
    model: Annotated[str, typer.Option(help="Hub name, local directory or pocket.")],
    data: Annotated[
        Path, typer.Option(help="Rows: text and label, text, prompt + completion, or prompt + chosen + rejected.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: member_0/, member_1/, ..., ensemble.json.")],
    members: Annotated[int, typer.Option(help="How many adapters.")] = 8,
    alpha: Annotated[float, typer.Option(help="0: independent members; 1: only the mixture counts.")] = 0.8,
    r: Annotated[int, typer.Option(help="Rank of each adapter.")] = 8,
    target_modules: Annotated[str | None, typer.Option(help="Comma list of layer names, or all-linear.")] = None,
    circuit: Annotated[Path | None, typer.Option(help="Circuit JSON: members move only its heads.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 3,
    lr: Annotated[float, typer.Option(help="Learning rate (AdamW).")] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    likelihood: Annotated[str, typer.Option(help="sequence, mean or token.")] = "sequence",
    two_pass: Annotated[bool, typer.Option(help="Memory of one member, at one more forward pass.")] = False,
    text: Annotated[str, typer.Option(help="Text column.")] = "text",
    label: Annotated[str, typer.Option(help="Label column; rows without it are plain text.")] = "label",
    template: Annotated[str | None, typer.Option(help="Prompt template, e.g. '{text} | sentiment:{label}'.")] = None,
    label_words: Annotated[str | None, typer.Option(help="label=word pairs, e.g. 'pos= good,neg= bad'.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the members' start and of the order.")] = 0,
    json_: Json = False,
) -> None:
    """Train an ensemble on labelled rows, texts or preference pairs.

    Example: `luthier ensemble fit --model pocket --data train.csv --template '{text} | sentiment:{label}' --label-words
    'good= good,bad= bad,fair= fair' --lr 1e-3 --out runs/ensemble`
    """
    from circuits import Circuit
    from interventions import RenyiEnsemble

    options = dict(locals())
    loaded = load_model(model)
    rows = _data(data, loaded, {**options, "label_words": parse_pairs(label_words, "--label-words")})
    targets = target_modules if target_modules in (None, "all-linear") else target_modules.split(",")
    confined = None if circuit is None else Circuit.load(circuit)
    ensemble = RenyiEnsemble(loaded, members, alpha, r, targets, circuit=confined, seed=seed)
    say(f"{ensemble} on {len(rows)} rows", json_)
    settings: dict[str, Any] = dict(
        epochs=epochs, lr=lr, batch_size=batch_size, likelihood=likelihood, two_pass=two_pass, seed=seed
    )
    log = ensemble.fit(rows, progress=not json_, **settings)
    ensemble.save(out)
    save_run(out, "ensemble fit", options)
    last = log.steps[-1]
    kept = {name: last[name] for name in ("loss", "loss_0", "loss_1", "effective_members", "disagreement")}
    _show("Last step", [{"steps": len(log.steps), **kept}], {"out": str(out)}, json_)


@app.command()
def predict(
    from_: Where,
    data: Annotated[Path, typer.Option(help="Rows with a text column (labels are not needed).")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write, one line per text.")] = None,
    text: Annotated[str, typer.Option(help="Text column.")] = "text",
    combine: Annotated[str, typer.Option(help="mixture or vote.")] = "mixture",
    coverage: Annotated[float, typer.Option(help="Share of texts to answer; the most contested are left out.")] = 1.0,
    json_: Json = False,
) -> None:
    """Answer texts, and say how far members disagree.

    Example: `luthier ensemble predict --from runs/ensemble --data new.csv --coverage 0.9 --out answers.csv`
    """
    from circuits.tasks import read_rows

    ensemble = _load(from_)
    if ensemble.task is None:
        raise ValueError(f"{str(from_)!r} was fitted on texts or pairs, not on labels; expected a labelled fit")
    texts = [str(_need(row, text, data)) for row in read_rows(data)]
    rows = _rows(ensemble.predict(texts, combine), texts, coverage)
    if out is not None:
        _write_csv(out, rows)
    if json_:
        _show("", rows, {"out": str(out) if out else None}, True)
        return
    shown = [{**row, "text": row["text"][:60]} for row in rows[:20]]
    show_rows(f"Answers ({len(rows)} texts, first {len(shown)} shown)", shown)


@app.command()
def report(
    from_: Where,
    data: Annotated[Path, typer.Option(help="Labelled rows to judge the ensemble on.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    text: Annotated[str, typer.Option(help="Text column.")] = "text",
    label: Annotated[str, typer.Option(help="Label column.")] = "label",
    json_: Json = False,
) -> None:
    """Calibration, risk against coverage, and who answers for which label, on one page.

    Example: `luthier ensemble report --from runs/ensemble --data test.csv --out runs/ensemble/report.html`
    """
    from dataclasses import asdict, replace

    from circuits.tasks import read_rows
    from interventions.calibration import area_under_risk, calibration
    from viz import report as page
    from viz import routing

    ensemble = _load(from_)
    if ensemble.task is None:
        raise ValueError(f"{str(from_)!r} was fitted on texts or pairs, not on labels; expected a labelled fit")
    rows = read_rows(data)
    texts, labels = (tuple(str(_need(row, name, data)) for row in rows) for name in (text, label))
    task = replace(ensemble.task, texts=texts, labels=labels, name=data.stem)
    seen = ensemble.predict(task)
    assert seen.gold is not None
    numbers = asdict(calibration(seen.mixture, seen.gold))
    numbers["aurc"] = area_under_risk(seen.mutual_information, seen.predictions != seen.gold)
    numbers["mutual_information"] = seen.mutual_information.mean().item()
    weights = ensemble.responsibilities(task)
    figure = routing(
        weights, list(labels), seen.mutual_information, texts=list(texts), title="Who answers for which label",
        about=f"{ensemble.model.name} · {task.name} · alpha {ensemble.alpha:g}",
    )  # fmt: skip
    calibrated = (
        "How far the mixture's probabilities can be trusted: ece, nll and brier are better when lower; aurc is the risk left "
        "when the examples with the most disagreement are put aside first (lower is better)."
    )
    who = (
        "Above, the share of each label's examples that a member answers for. Below, how much members disagree about each "
        "example (mutual information): near zero they all say the same, sure or not."
    )
    sections = {"Calibration": [calibrated, [numbers]], "Routing": [who, figure]}
    title, options = f"luthier ensemble: {from_.name} on {data.name}", {"from": from_, "data": data} | versions()
    page(out, sections, title=title, summary=repr(ensemble), provenance=options, command=command_line())
    _show("Ensemble on labelled rows", [numbers], {"report": str(out)}, json_)


def _load(folder: Path) -> "RenyiEnsemble":
    from circuits.files import read_json
    from interventions import RenyiEnsemble

    return RenyiEnsemble.load(folder, load_model(read_json(folder / "run.json")["options"]["model"]))


def _data(path: Path, model: Any, options: dict[str, Any]) -> Any:
    from circuits.tasks import read_rows

    rows = read_rows(path)
    if {"prompt", "chosen", "rejected"} <= set(rows[0]) or {"prompt", "completion"} <= set(rows[0]):
        return rows
    if options["label"] in rows[0]:
        return read_task(path, model, options)
    return [str(_need(row, options["text"], path)) for row in rows]


def _need(row: dict[str, Any], name: str, path: Path) -> Any:
    if row.get(name) is None:
        raise ValueError(
            f"{str(path)!r} has no column {name!r}; it has {', '.join(row)}: name it with --text or --label"
        )
    return row[name]


def _rows(seen: "Prediction", texts: list[str], coverage: float) -> list[dict[str, Any]]:
    answered = seen.abstain(coverage).tolist()
    columns = zip(
        texts, seen.named(), seen.probabilities.amax(-1).tolist(), seen.mutual_information.tolist(),
        seen.disagreement.tolist(), answered, strict=True,
    )  # fmt: skip
    return [
        {
            "text": text,
            "answer": answer if told else None,
            "probability": round(probability, 6),
            "mutual_information": round(information, 6),
            "vote_disagreement": round(split, 6),
        }
        for text, answer, probability, information, split, told in columns
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    import io

    from circuits.files import write_atomically

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue())


def _show(title: str, rows: list[dict[str, Any]], places: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"rows": rows, **places}))
        return
    show_rows(title, rows)
    print("written: " + ", ".join(str(place) for place in places.values() if place))

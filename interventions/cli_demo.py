"""`luthier demo`: the main job from end to end on the embedded pocket model, with no network.

Sentiment is learnt by the model in English only. The demo finds the heads that do it, shows that they matter, tunes only
those on a related made-up language, and checks that English is kept and that nothing outside the mask moved.
"""

from pathlib import Path
from typing import Annotated

import typer

from .cli_inputs import load_model, save_run, say, show_rows


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    language: Annotated[str, typer.Option(help="Target language of the pocket world: nuri, osko or tamu.")] = "nuri",
    n: Annotated[int, typer.Option(help="Target sentences to tune on.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """The whole job on the embedded model: discovery, faithfulness, mask, restricted tuning, report. Minutes, offline.

    Example:

    `luthier demo --out demo`
    """
    from circuits import pocket

    from .cli_discover import find, show
    from .cli_report import write_report
    from .cli_tune import arm_rows, run_arm, save_tuning

    model = load_model("pocket")
    target = pocket.sentiment_task(language, "train").split(n, seed=seed)[0]
    evals = {language: pocket.sentiment_task(language, "test"), "english": pocket.sentiment_task("english", "test")}
    held = evals["english"].split(200, seed=seed)[0]
    found = find(model, pocket.sentiment_task("english", "train"), held, heads=HEADS, seed=seed, quiet=json_)
    masks = _arms(model, found.circuit)
    results = {}
    for arm in ("full", "norms", "circuit"):  # the circuit last: its weights are saved
        model = load_model("pocket")
        say(f"tuning on {n} {language} sentences, arm {arm}", json_)
        tuned = run_arm(model, target, masks[arm], evals, EPOCHS, RATES[arm], 16, seed, quiet=json_)
        results[arm] = tuned.to_dict()
    results = {arm: results[arm] for arm in ("circuit", "norms", "full")}
    found.save(out)
    found.save_inside(load_model("pocket"), out, quiet=json_)
    save_tuning(model, masks["circuit"], results, out, stem="sentiment")
    save_run(out, "demo", {"model": "pocket", "language": language, "n": n, "seed": seed})
    page = write_report(out, out / "report.html", "What luthier does, on its pocket model")
    show(found, page, out, json_)
    if not json_:
        show_rows(f"Tuned on {n} {language} sentences", arm_rows(results))


HEADS, EPOCHS = 8, 8
RATES = {"circuit": 1e-4, "norms": 3e-3, "full": 1e-4}  # of three or four each, by 200 training rows per language


def _arms(model, circuit):
    from circuits import Circuit
    from interventions import HeadMask

    empty = Circuit([], model.anatomy.n_layers, model.anatomy.n_heads)
    return {
        "circuit": HeadMask.from_circuit(circuit, model),
        "norms": HeadMask.from_circuit(empty, model),
        "full": None,
    }

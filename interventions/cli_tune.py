"""`luthier tune`: fine-tune only the circuit's slices on a target, and measure what that costs elsewhere.

1. Take the circuit of a `discover` run (`--from`), or a circuit or mask file, and the model it was found on.
2. Bind it to the model as a HeadMask: which slices of which parameters may move.
3. Tune on the target rows; nothing else changes, bit for bit. `--arms` adds controls, each from the same start.
4. Report accuracy and macro-F1 on every `--eval` file, before and after, and save a plain checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_inputs import load_model, parse_pairs, read_task, save_run, say, show_rows

if TYPE_CHECKING:
    from circuits import HeadScores, LabelledTask, Model, PairedTask
    from interventions.tuning import Tuning

ARMS = ("circuit", "full", "norms", "random", "near-zero")


def tune(
    data: Annotated[Path, typer.Option(help="Target rows to tune on.")],
    out: Annotated[Path, typer.Option(help="Folder to write: mask, checkpoint/, tuning.json, report.html.")],
    from_: Annotated[Path | None, typer.Option("--from", help="Folder of a `luthier discover` run.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the one of --from.")] = None,
    circuit: Annotated[Path | None, typer.Option(help="Circuit JSON; default: the one of --from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A saved mask (stem) instead of a circuit.")] = None,
    eval_: Annotated[
        list[str] | None, typer.Option("--eval", help="name=file to evaluate before and after; may be repeated.")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Use so many of the target rows.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the target rows.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate (AdamW).")] = 5e-5,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    kv: Annotated[str, typer.Option(help="Key/value ownership: shared, whole-group or freeze.")] = "shared",
    norms: Annotated[str, typer.Option(help="Norms that learn: all, circuit or none.")] = "all",
    arms: Annotated[str, typer.Option(help=f"Comma list of {', '.join(ARMS)}; the first is saved.")] = "circuit",
    text: Annotated[str | None, typer.Option(help="Text column; default: as in --from.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column; default: as in --from.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: as in --from.")] = None,
    label_words: Annotated[str | None, typer.Option(help="Label words; default: as in --from.")] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare all arms over --seeds; --data and --source are folders of splits."),
    ] = False,
    source: Annotated[Path | None, typer.Option(help="With --compare: folder of the source's splits.")] = None,
    seeds: Annotated[str, typer.Option(help="With --compare: comma list of seeds.")] = "0,1,2,3",
    seed: Annotated[int, typer.Option(help="Seed of sampling, order and controls.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Fine-tune only the circuit's heads (and norms) on a target; everything else stays bit-identical.

    Example:

    `luthier tune --from runs/ind --data minangkabau/train.csv --n 100 --eval min=minangkabau/test.csv --eval
    ind=indonesian/test.csv --out runs/min`
    """
    options = dict(locals()) | {"label_words": parse_pairs(label_words, "--label-words")}
    if compare:
        return _compare(model, source, data, out, arms, seeds, eval_, options)
    start, asked = _start(from_, model, circuit, mask, options)
    chosen = _arms(arms)
    loaded = load_model(start)
    target = read_task(data, loaded, asked)
    target = target.split(n, seed=seed)[0] if n is not None and n < len(target) else target
    evals = {name: read_task(path, loaded, asked) for name, path in (parse_pairs_list(eval_) or {}).items()}
    masks = {arm: _mask(arm, loaded, from_, circuit, mask, kv, norms, seed) for arm in chosen}
    results: dict[str, Any] = {}
    for arm in reversed(chosen):  # the first arm last: its weights are the ones left in the model
        loaded = load_model(start)
        say(f"arm {arm}: {_moves(masks[arm], loaded)}", json_)
        tuned = run_arm(loaded, target, masks[arm], evals, epochs, lr, batch_size, seed, quiet=json_)
        results[arm] = tuned.to_dict()
    results = {arm: results[arm] for arm in chosen}
    save_tuning(loaded, masks[chosen[0]], results, out)
    save_run(out, "tune", options | {"model": str(start)})
    from .cli_report import write_report

    page = write_report(out, out / "report.html")
    if json_:
        import json

        print(json.dumps({"arms": arm_rows(results), "out": str(out), "report": str(page)}))
        return
    show_rows("Accuracy before and after tuning", arm_rows(results))
    print(f"written: {out}/ (checkpoint in {out / 'checkpoint'}, open {page})")


def _compare(
    model: str | None,
    source: Path | None,
    data: Path,
    out: Path,
    arms: str,
    seeds: str,
    eval_: list[str] | None,
    options: dict[str, Any],
) -> None:
    """`--compare`: the experiment of `experiment.py` on the user's folders."""
    from .cli_compare import run_comparison

    if model is None or source is None:
        raise ValueError("--compare starts from a base model and a source; give --model NAME and --source FOLDER")
    asked = {"text": "text", "label": "label"} | {key: value for key, value in options.items() if value is not None}
    numbers = [part.strip() for part in seeds.split(",")]
    if not all(part.isdigit() for part in numbers):
        raise ValueError(f"--seeds {seeds!r}; expected whole numbers with commas, as in 0,1,2,3")
    # The default of --arms is one arm: nothing to compare; all of them then.
    chosen = [] if arms == "circuit" else [arm.strip() for arm in arms.split(",")]
    sizes = {key: options[key] for key in ("n", "epochs", "batch_size")}
    text = run_comparison(
        model, source, data, out, asked, arms=chosen, seeds=[int(part) for part in numbers], evals=parse_pairs_list(eval_), **sizes
    )  # fmt: skip
    print(text)


def parse_pairs_list(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or []:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"--eval {pair!r}; expected name=file, as in --eval english=test.csv")
        found[name] = path
    return found


def run_arm(
    model: "Model",
    target: "LabelledTask | PairedTask",
    mask: Any,
    evals: Mapping[str, "LabelledTask | PairedTask"],
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    quiet: bool = False,
) -> "Tuning":
    from interventions import finetune

    return finetune(
        model, target, mask=mask, epochs=epochs, lr=lr, batch_size=batch_size, eval_tasks=evals, seed=seed,
        progress=not quiet,
    )  # fmt: skip


def save_tuning(model: "Model", mask: Any, results: Mapping[str, Any], out: Path, stem: str = "mask") -> None:
    """Mask, plain checkpoint (with tokenizer) and `tuning.json`."""
    from circuits.files import write_json

    out.mkdir(parents=True, exist_ok=True)
    model.hf.save_pretrained(out / "checkpoint")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(out / "checkpoint")
    if mask is not None:
        mask.save(out / stem)
    write_json(out / "tuning.json", results)


def arm_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per arm and evaluated task: values moved, accuracy before and after, macro-F1."""
    rows = []
    for arm, result in results.items():
        for name, after in result["after"].items():
            before = result["before"][name]
            rows.append(
                {
                    "arm": arm,
                    "moved": result["moved"],
                    "task": name,
                    "n": int(after["n"]),
                    "before": before["accuracy"],
                    "after": after["accuracy"],
                    "change": after["accuracy"] - before["accuracy"],
                    "F1 after": after["macro_f1"],
                }
            )
    return rows


def _start(
    from_: Path | None, model: str | None, circuit: Path | None, mask: Path | None, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The model to start from, and how text becomes a task: given here, or as the discovery run had it."""
    from circuits.files import read_json

    run: dict[str, Any] = {}
    if from_ is not None:
        if not (from_ / "run.json").is_file():
            raise FileNotFoundError(f"no run.json in {str(from_)!r}; expected the --out folder of `luthier discover`")
        run = read_json(from_ / "run.json")["options"]
    elif model is None or (circuit is None and mask is None):
        raise ValueError("nothing to start from; give --from RUN, or --model with --circuit or --mask")
    competent = from_ is not None and (from_ / "competent").is_dir()
    start = model or (str(from_ / "competent") if competent and from_ else run["model"])
    asked = {**run, **{key: value for key, value in options.items() if value is not None}}
    asked.setdefault("text", "text")
    return start, asked


def _arms(arms: str) -> list[str]:
    chosen = [arm.strip() for arm in arms.split(",") if arm.strip()]
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown or not chosen:
        raise ValueError(f"--arms {arms!r}; expected a comma list of {', '.join(ARMS)}")
    return list(dict.fromkeys(chosen))


def _mask(
    arm: str,
    model: "Model",
    from_: Path | None,
    circuit: Path | None,
    mask: Path | None,
    kv: str,
    norms: str,
    seed: int,
) -> Any:
    """The HeadMask of an arm; None trains everything."""
    from circuits import Circuit
    from interventions import HeadMask

    if arm == "full":
        return None
    size = (model.anatomy.n_layers, model.anatomy.n_heads)
    if arm == "norms":
        return HeadMask.from_circuit(Circuit([], *size), model, kv=kv, norms="all")
    if mask is not None:
        bound = HeadMask.load(mask, model)
        if arm == "circuit":
            return bound
        found: Circuit = bound.circuit
    else:
        path = circuit if circuit is not None else Path(from_ or ".") / "circuit.json"
        found = Circuit.load(path)
    found = Circuit(found.heads, *size, found.provenance)
    if arm == "random":
        found = found.matched_random(seed)
    if arm == "near-zero":
        found = Circuit.near_zero(_scores(from_), len(found))
    return HeadMask.from_circuit(found, model, kv=kv, norms=norms)


def _scores(from_: Path | None) -> "HeadScores":
    from circuits import HeadScores

    if from_ is None:
        raise ValueError("--arms near-zero needs the scores of a discovery run; give --from RUN")
    return HeadScores.load(from_ / "scores")


def _moves(mask: Any, model: "Model") -> str:
    total = sum(parameter.numel() for parameter in model.hf.parameters())
    moving = total if mask is None else mask.n_parameters
    return f"{moving:,} of {total:,} values may move ({moving / total:.2%})"

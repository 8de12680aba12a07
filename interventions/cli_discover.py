"""`luthier discover`: from a model and labelled text to the heads that do the task, and proof that they matter.

1. Split the rows: a pool for tuning and discovery, the rest to check on.
2. Competence (CT-SFT section 4): where the model cannot do the task yet, fine-tune all of it on source examples first.
3. Score heads on balanced, correctly answered examples of the pool; choose the circuit.
4. Ablate everything else on the rows kept aside: what is left of the behaviour, against random circuits.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .cli_inputs import load_model, parse_pairs, read_task, save_run, say, show_rows

if TYPE_CHECKING:
    from circuits import Circuit, FaithfulnessCurve, HeadScores, LabelledTask, Model, PairedTask

METHODS = ("relevance", "ablation", "gradient", "integrated_gradients")
EXAMPLE = """
Example:

`luthier discover --model gpt2 --data reviews.csv --text review --label stars --template "{text} | sentiment:{label}"
--label-words "1= bad,5= good" --out runs/reviews`
"""


def discover(
    model: Annotated[str, typer.Option(help="Hub name, local directory, or 'pocket'.")],
    data: Annotated[Path, typer.Option(help="CSV, JSON or JSONL: text and label, or prompt, answer and distractor.")],
    out: Annotated[Path, typer.Option(help="Folder to write: scores, circuit, curve, report.html.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    template: Annotated[
        str | None, typer.Option(help="Prompt around the text, e.g. '{text} | sentiment:{label}'.")
    ] = None,
    label_words: Annotated[
        str | None, typer.Option(help="One-token word of each label: 'positive= good,negative= bad'.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"How heads are scored: {', '.join(METHODS)}.")] = "relevance",
    depth: Annotated[int, typer.Option(help="Backward steps of the relevance circuit (CT-SFT).")] = 2,
    per_depth: Annotated[
        float,
        typer.Option(help="Share of all heads kept at each depth (0.02 of 36 heads is 1: raise it on small models)."),
    ] = 0.02,
    heads: Annotated[
        int | None, typer.Option(help="Take the top so many heads instead of the backward circuit.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Correct, label-balanced examples to score on.")] = 50,
    holdout: Annotated[float, typer.Option(help="Share of the rows kept aside for faithfulness.")] = 0.2,
    competence: Annotated[
        int, typer.Option(help="Fine-tune on so many rows first, if the model cannot do the task.")
    ] = 0,
    competence_epochs: Annotated[int, typer.Option(help="Epochs of competence tuning.")] = 5,
    competence_lr: Annotated[float, typer.Option(help="Learning rate of competence tuning.")] = 5e-5,
    means: Annotated[
        str, typer.Option(help="Average over: label-balanced, task, corrupted or zero.")
    ] = "label-balanced",
    per_position: Annotated[bool, typer.Option(help="One mean per position: for prompts of one length.")] = False,
    ablate: Annotated[
        str, typer.Option(help="Replace heads by: mean, zero or resample (the twin, or another example).")
    ] = "mean",
    controls: Annotated[int, typer.Option(help="Matched-random circuits per size.")] = 10,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt in tokens.")] = None,
    truncate: Annotated[bool, typer.Option(help="Cut longer texts instead of refusing them.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of splits, tuning and controls.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    options = dict(locals()) | {"label_words": parse_pairs(label_words, "--label-words")}
    _check(method, holdout, out)
    from circuits import sharding

    sharding.start()  # under `accelerate launch` the examples are shared out over the processes
    loaded = load_model(model)
    pool, held = read_task(data, loaded, options), None
    if holdout:
        pool, held = pool.split(round(len(pool) * (1 - holdout)), seed=seed)
    if competence:
        _make_competent(loaded, pool, held or pool, competence, competence_epochs, competence_lr, seed, out, json_)
    found = find(
        loaded, pool, held or pool, method, depth=depth, per_depth=per_depth, heads=heads, examples=examples,
        means=means, per_position=per_position, ablate=ablate, controls=controls, seed=seed, quiet=json_ or not sharding.first(),
    )  # fmt: skip
    if not sharding.first():
        return
    out.mkdir(parents=True, exist_ok=True)  # from here on nothing can be wrong with the input
    found.save(out)
    found.save_inside(loaded, out, quiet=json_)
    save_run(out, "discover", options | {"trained": bool(competence)})
    from .cli_report import write_report

    page = write_report(out, out / "report.html")
    show(found, page, out, json_)


discover.__doc__ = "Find the attention heads that do a task, and measure what they keep of it.\n" + EXAMPLE


class Found(NamedTuple):
    """What discovery yields: the noun of every step, and the accuracies it rests on."""

    scores: "HeadScores"
    circuit: "Circuit"
    curve: "FaithfulnessCurve"
    point: "FaithfulnessCurve"  # the circuit itself
    chosen: "LabelledTask | PairedTask"  # the examples that were scored
    accuracy: float
    chance: float

    def save_inside(self, model: "Model", out: Path, quiet: bool) -> None:
        """What the report shows of single heads."""
        from .cli_head import save_head
        from .cli_look import save_edges, save_look

        save_head(model, self.chosen, self.scores, self.circuit, out)
        save_look(model, self.chosen, self.scores, self.circuit, out)
        if self.scores.method.startswith("cdt"):
            save_edges(model, self.chosen, self.circuit, out, quiet)

    def save(self, out: Path) -> None:
        self.scores.save(out / "scores")
        self.curve.save(out / "faithfulness")
        self.point.save(out / "circuit_faithfulness")
        self.circuit.save(out / "circuit.json")


def find(
    model: "Model",
    pool: "LabelledTask | PairedTask",
    held: "LabelledTask | PairedTask",
    method: str = "relevance",
    *,
    depth: int = 2,
    per_depth: float = 0.02,
    heads: int | None = None,
    examples: int = 50,
    means: str = "label-balanced",
    per_position: bool = False,
    ablate: str = "mean",
    controls: int = 10,
    seed: int = 0,
    quiet: bool = False,
) -> Found:
    """Steps 3 and 4: scores and circuit on the pool, faithfulness on the rows kept aside."""
    import circuits

    accuracy, chance = _competence(model, held)
    say(f"accuracy {accuracy:.3f} on {len(held)} rows kept aside (most frequent answer: {chance:.3f})", quiet)
    chosen = _scoring_set(model, pool, examples, seed)
    average = {"means": means, "per_position": per_position}
    how = average if method == "relevance" else {"ablate": ablate, **average}
    scores = getattr(circuits, method)(model, chosen, progress=not quiet, **how)
    if heads is None and method == "relevance":
        circuit = circuits.discover(model, chosen, depth=depth, per_depth=per_depth, progress=not quiet, **average)
    else:
        k = heads or max(1, round(per_depth * scores.values.numel())) * (depth + 1)
        circuit = scores.top(k)
    options = {"ablate": ablate, **average, "controls": controls, "seed": seed, "progress": not quiet}
    curve = circuits.faithfulness(model, held, scores, **options)
    point = circuits.faithfulness(model, held, circuit, **options)
    return Found(scores, circuit, curve, point, chosen, accuracy, chance)


def show(found: Found, page: Path, out: Path, as_json: bool) -> None:
    low, high = found.scores.interval() if found.scores.n_examples else (None, None)
    ranked = [
        {
            "head": str(head),
            "score": found.scores[head],
            "low": None if low is None else float(low[head]),
            "high": None if high is None else float(high[head]),
            "in circuit": "yes" if head in found.circuit else "",
        }
        for head in found.scores.rank()[:10]
    ]
    if as_json:
        import json

        result: dict[str, Any] = {
            "circuit": [str(head) for head in found.circuit],
            "accuracy": found.accuracy,
            "chance": found.chance,
            "heads": ranked,
            "faithfulness": found.curve.rows(),
            "circuit_faithfulness": found.point.rows()[0],
            "out": str(out),
            "report": str(page),
        }
        print(json.dumps(result))
        return
    show_rows(f"Heads by {found.scores.method} ({found.scores.n_examples} examples)", ranked)
    show_rows("Behaviour kept when every other head is ablated", found.curve.rows())
    print(f"circuit: {found.circuit}")
    show_rows("The circuit itself", found.point.rows())
    print(f"written: {out}/ (open {page})")


def _check(method: str, holdout: float, out: Path) -> None:
    if method not in METHODS:
        raise ValueError(f"--method {method!r}; expected one of {', '.join(METHODS)}")
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout {holdout}; expected a share from 0 (none) to below 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected a folder to write to")


def _competence(model: "Model", task: "LabelledTask | PairedTask") -> tuple[float, float]:
    """Accuracy, and what always giving the most frequent answer would score (half, for pairs)."""
    from circuits import PairedTask, evaluate

    result = evaluate(model, task)
    if isinstance(task, PairedTask):
        return float(result.accuracy), 0.5
    return float(result.accuracy), float(result.gold.bincount().max()) / len(result.gold)


def _scoring_set(model: "Model", pool: "LabelledTask | PairedTask", n: int, seed: int) -> "LabelledTask | PairedTask":
    """Examples the model gets right, as many of each label (a PairedTask has no labels to balance)."""
    from circuits import LabelledTask

    correct = pool.correct(model)
    if len(correct) == 0:
        raise ValueError("the model answers no row right; tune it on source examples first (--competence N)")
    if isinstance(correct, LabelledTask):
        return correct.balanced(n, seed=seed)
    return correct.split(n, seed=seed)[0] if n < len(correct) else correct


def _make_competent(
    model: "Model",
    pool: "LabelledTask | PairedTask",
    held: "LabelledTask | PairedTask",
    n: int,
    epochs: int,
    lr: float,
    seed: int,
    out: Path,
    quiet: bool,
) -> None:
    """Full fine-tuning on n source rows, in place; the checkpoint goes beside the scores for `luthier tune --from`."""
    from interventions import finetune

    before, _ = _competence(model, held)
    source = pool.split(n, seed=seed)[0] if n < len(pool) else pool
    finetune(model, source, mask=None, epochs=epochs, lr=lr, seed=seed, progress=not quiet)
    after, _ = _competence(model, held)
    say(f"competence tuning on {len(source)} rows: accuracy {before:.3f} to {after:.3f} on {len(held)} others", quiet)
    model.hf.save_pretrained(out / "competent")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(out / "competent")

"""`luthier embed`: a task as one vector per head, learned once, injected into zero-shot prompts.

1. fit      demonstrations -> task embedding -> soft head selection; both saved, with the heads that matter.
2. apply    answer zero-shot queries with the saved pair injected, or score a file of pairs with and without it.
3. compare  SITE beside few-shot prompts, function vectors, task vectors, MTV, I2CL and LoRA on the same rows.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_inputs import load_model, save_run, say, show_rows

if TYPE_CHECKING:
    from circuits import FewShotTask, Model

QA = "Q: {input}\\nA: {output}"
app = typer.Typer(
    help="Adapt a frozen model with one number per head: fit, apply, compare.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
ModelOption = Annotated[str, typer.Option(help="Hub name, local directory, or `pocket`.")]
DataOption = Annotated[
    str, typer.Option(help="JSON or CSV with `input` and `output`; `pocket:opposite` for the pocket model.")
]
TemplateOption = Annotated[str, typer.Option(help="Ends with {output}; \\n is a newline.")]
ShotsOption = Annotated[int, typer.Option(help="Demonstrations in a prompt.")]
PromptsOption = Annotated[int, typer.Option(help="Few-shot prompts the embedding is the mean of.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command()
def fit(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder to write: embedding, selection, run.json.")],
    model: ModelOption = "pocket",
    template: TemplateOption = QA,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 50,
    steps: Annotated[int, typer.Option(help="Optimisation steps.")] = 400,
    lr: Annotated[float, typer.Option(help="Learning rate (Adam).")] = 0.2,
    batch_size: Annotated[int, typer.Option(help="Zero-shot prompts per step.")] = 8,
    seeds: Annotated[int, typer.Option(help="Fits with different batches, in one backward.")] = 1,
    l1: Annotated[float, typer.Option(help="Penalty on the sum of alpha.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts, split and batches.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Measure a task embedding and learn which heads carry it.

    Example:

    `luthier embed fit --model pocket --data pocket:uppercase --out runs/uppercase`
    """
    options = dict(locals())
    from circuits import select_heads, task_embedding

    loaded = load_model(model)
    task = read_pairs(data, template)
    embedding = task_embedding(loaded, task, n_prompts=n_prompts, n_shots=n_shots, seed=seed, progress=not json_)
    say(f"{n_shots}-shot prompts: {embedding.accuracy:.1%} of first answer tokens right (n={n_prompts})", json_)
    found = select_heads(
        loaded,
        task,
        embedding,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seeds=seeds,
        seed=seed,
        l1=l1,
        progress=not json_,
    )
    embedding.save(out / "embedding")
    found.save(out / "selection")
    save_run(out, "embed", options)
    result = {
        "heads": {str(head): round(found.alpha[head].item(), 4) for head in found.rank()[:10]},
        "validation_nll": found.validation.min().item(),
        "start_nll": found.curve[0].mean().item(),
        "few_shot_accuracy": embedding.accuracy,
        "seconds": found.seconds,
        "out": str(out),
    }
    if json_:
        print(json.dumps(result))
        return
    show_rows(
        "Heads with the highest alpha", [{"head": head, "alpha": value} for head, value in result["heads"].items()]
    )
    print(f"held-out loss {result['start_nll']:.3f} at alpha = 0.5, {result['validation_nll']:.3f} at the checkpoint")
    print(f"written: {out}/")


@app.command()
def apply(
    from_: Annotated[Path, typer.Option("--from", help="Folder of a `luthier embed fit` run.")],
    query: Annotated[list[str] | None, typer.Option(help="An input to answer; may be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="Pairs to score, with and without injection.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the one of --from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Inject only the k highest heads, with alpha = 1.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 20,
    json_: JsonOption = False,
) -> None:
    """Answer zero-shot queries with a saved task embedding injected.

    Example:

    `luthier embed apply --from runs/uppercase --query hot --query wet`
    """
    from circuits.embedding import TaskEmbedding
    from circuits.files import read_json
    from circuits.selection import HeadSelection

    from .injection import inject

    if not query and data is None:
        raise ValueError("nothing to answer; give --query INPUT or --data FILE")
    if not (from_ / "run.json").is_file():
        raise FileNotFoundError(f"no run.json in {str(from_)!r}; expected the --out folder of `luthier embed fit`")
    run = read_json(from_ / "run.json")["options"]
    loaded = load_model(model or run["model"])
    embedding, found = TaskEmbedding.load(from_ / "embedding", loaded), HeadSelection.load(from_ / "selection")
    result: dict[str, Any] = {}
    with inject(loaded, embedding, found, top_k=top_k):
        if query:
            from circuits.fewshot import FewShotTask

            asked = FewShotTask.from_pairs([(text, "?") for text in query], template=embedding.template)
            said = loaded.generate([asked.query(text) for text in query], max_new_tokens=max_new_tokens)
            answers = [text.strip().split("\n")[0].strip() for text in said]
            result["answers"] = [
                {"input": source, "answer": answer} for source, answer in zip(query, answers, strict=True)
            ]
        if data is not None:
            task = read_pairs(data, run["template"])
            result["scores"] = [{"model": "injected", **_scores(loaded, task, max_new_tokens)}]
    if data is not None:
        result["scores"].insert(0, {"model": "zero-shot", **_scores(loaded, task, max_new_tokens)})
    if json_:
        print(json.dumps(result))
        return
    for title, rows in (("Answers", result.get("answers")), ("Scores", result.get("scores"))):
        if rows:
            show_rows(title, rows)


@app.command()
def compare(
    data: DataOption,
    model: ModelOption = "pocket",
    methods: Annotated[
        str, typer.Option(help="Comma list: zero-shot,icl,site,fv,tv,mtv,i2cl,lora.")
    ] = "zero-shot,icl,site",
    template: TemplateOption = QA,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 50,
    test: Annotated[int | None, typer.Option(help="Rows kept for testing; default: a third.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of fits and demonstrations.")] = 1,
    fold_case: Annotated[bool, typer.Option(help="Ignore letter case in the prefix match.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this JSON file.")] = None,
    json_: JsonOption = False,
) -> None:
    """SITE beside what you would pick instead: accuracy four ways, and what each costs.

    Example:

    `luthier embed compare --model pocket --data pocket:uppercase --methods zero-shot,icl,site,fv`
    """
    from circuits.files import write_json

    from .comparison import compare as run

    loaded = load_model(model)
    task = read_pairs(data, template)
    held, train = task.split(test if test is not None else max(1, len(task) // 3), 0)
    chosen = [method.strip() for method in methods.split(",") if method.strip()]
    found = run(
        loaded, train, held, methods=chosen, seeds=range(seeds), n_shots=n_shots, n_prompts=n_prompts, fold_case=fold_case,
        max_new_tokens=max_new_tokens, progress=not json_,
    )  # fmt: skip
    rows = found.rows()
    if out is not None:
        write_json(out, rows)
    if json_:
        print(json.dumps(rows))
        return
    print(found.table())


def read_pairs(data: str, template: str) -> "FewShotTask":
    """A FewShotTask from a JSON or CSV file, or one of the pocket model's mappings."""
    from circuits import FewShotTask

    template = template.replace("\\n", "\n")
    if data.startswith("pocket:"):
        from circuits import pocket

        return FewShotTask.from_pairs(pocket.fewshot_task(data[7:]).pairs, template=template, name=data[7:])
    if Path(data).suffix == ".csv":
        return FewShotTask.from_csv(data, template=template)
    return FewShotTask.from_json(data, template=template)


def _scores(model: "Model", task: "FewShotTask", max_new_tokens: int) -> dict[str, float | int]:
    from circuits.answers import score_answers

    found = score_answers(model, task.prompts(), max_new_tokens=max_new_tokens)
    names = ("first", "exact", "prefix", "nll")
    return {"n": len(task), **{name: getattr(found, name).float().mean().item() for name in names}}

"""`luthier align`: better responses from a frozen model, for any reward, with what they cost.

1. Load the model and the prompts (`--prompt` texts or a file with a prompt column).
2. Build the reward: a classifier, a likelihood, or a Python function of (prompt, response).
3. Importance sampling on pre-logits (AISP); with `--compare`, also best-of-n, the ARGS-style search and greedy decoding at
   equal samples and equal seconds.
4. Write the responses, the record of every round and one HTML page.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_inputs import command_line, parse_pairs, save_run, show_rows, versions

if TYPE_CHECKING:
    from .aligned import Aligned
    from .decoding_comparison import DecodingComparison
    from .rewards import Reward

KINDS = "classifier=MODEL[,label=NAME][,output=logit|probability|log_probability], likelihood=MODEL or python=FILE.py:FUNCTION"


def align(
    reward: Annotated[str, typer.Option(help=f"What to maximise: {KINDS}.")],
    out: Annotated[Path, typer.Option(help="Folder to write: responses.json, rounds.*, report.html.")],
    model: Annotated[str, typer.Option(help="Model: hub name, directory or 'pocket'.")] = "pocket",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    data: Annotated[Path | None, typer.Option(help="File of prompts (CSV, JSON, JSONL).")] = None,
    text: Annotated[str, typer.Option(help="Column of the prompts in --data.")] = "prompt",
    heldout: Annotated[str | None, typer.Option(help="A second reward that is only reported: same forms.")] = None,
    compare: Annotated[bool, typer.Option(help="Run the baselines at equal samples and equal seconds too.")] = False,
    n: Annotated[int, typer.Option(help="Samples per round and prompt.")] = 32,
    iterations: Annotated[int, typer.Option(help="Rounds.")] = 32,
    sigma2: Annotated[float, typer.Option(help="Variance of the perturbation.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Lambda, in units of the reward.")] = 0.3,
    alpha: Annotated[float, typer.Option(help="MPPI coefficient: 0 exact control cost, 1 none.")] = 0.999,
    horizon: Annotated[int, typer.Option(help="Perturbed tokens.")] = 128,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens per response; default: the horizon.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends a response; may be repeated.")] = None,
    target_ess: Annotated[float | None, typer.Option(help="Choose lambda per round for this sample size.")] = None,
    standardise: Annotated[bool, typer.Option(help="Divide rewards by their deviation in the round.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Better responses from a frozen model for a given reward, by importance sampling at decode time.

    Example:

    `luthier align --prompt "the food was" --reward python=rule.py:score --n 16 --iterations 8 --horizon 12 --out runs/align`
    """
    asked = dict(locals())
    prompts = read_prompts(prompt, data, text)
    wanted, judge = parse_reward(reward, "--reward"), parse_reward(heldout, "--heldout") if heldout else None
    options: dict[str, Any] = dict(
        n=n, iterations=iterations, sigma2=sigma2, temperature=temperature, alpha=alpha, horizon=horizon,
        max_new_tokens=max_new_tokens, stop=stop or [], target_ess=target_ess, standardise=standardise, progress=not json_,
    )  # fmt: skip
    from circuits import load
    from interventions import aisp, compare_decoding

    loaded = load(model)
    comparison = compare_decoding(loaded, prompts, wanted, heldout=judge, seeds=(seed,), **options) if compare else None
    result = comparison.runs["AISP"][0] if comparison else aisp(loaded, prompts, wanted, seed=seed, **options)
    rows = response_rows(result, judge)
    page = write_alignment(out, result, rows, comparison, asked)
    if json_:
        import json

        summary: dict[str, Any] = {"responses": rows, **result.summary(), "out": str(out), "report": str(page)}
        print(json.dumps(summary | ({"comparison": comparison.rows()} if comparison else {})))
        return
    show_rows("Best responses", rows)
    if comparison:
        show_rows("Methods", comparison.rows())
        print(comparison.statement())
    print(f"written: {out}/ (open {page})")


def read_prompts(prompt: list[str] | None, data: Path | None, text: str) -> list[str]:
    if (prompt is None) == (data is None):
        raise ValueError(
            "give prompts with --prompt TEXT (may be repeated) or with --data FILE, not both and not neither"
        )
    if data is None:
        return list(prompt or ())
    from circuits.tasks import read_rows

    rows = read_rows(data)
    if text not in rows[0]:
        raise ValueError(f"{str(data)!r} has no column {text!r}; it has {', '.join(rows[0])} (choose one with --text)")
    return [str(row[text]) for row in rows]


def parse_reward(given: str, option: str) -> "Reward":
    """`classifier=runs/clf,label=positive` and the like as a reward function."""
    from circuits import load

    from .rewards import classifier_reward, likelihood_reward, rowwise

    pairs = (parse_pairs(given, option) if "=" in given else {}) or {}
    kind = next((name for name in ("classifier", "likelihood", "python") if name in pairs), None)
    extra = set(pairs) - {kind, "label", "output"}
    if kind is None or extra or (kind != "classifier" and len(pairs) > 1):
        raise ValueError(f"{option} {given!r}; expected {KINDS}")
    if kind == "python":
        return rowwise(python_function(pairs["python"], option))
    judge = load(pairs[kind])
    if kind == "likelihood":
        return likelihood_reward(judge)
    return classifier_reward(judge, label=pairs.get("label"), output=pairs.get("output", "logit"))  # type: ignore[arg-type]


def python_function(place: str, option: str) -> Any:
    """FUNCTION of FILE.py, run as the user's own code."""
    import runpy

    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise FileNotFoundError(f"{option}: no file {file or place!r}; expected python=FILE.py:FUNCTION")
    functions = runpy.run_path(file)
    if not callable(functions.get(name)):
        raise ValueError(f"{option}: {file!r} has no function {name!r}; expected def {name}(prompt, response) -> float")
    return functions[name]


def response_rows(result: "Aligned", judge: "Reward | None") -> list[dict[str, Any]]:
    from .decoding_comparison import scores_of

    columns = zip(result.prompts, result.responses, result.rewards.tolist(), result.samples.tolist(), strict=True)
    rows = [{"prompt": p, "response": r, "reward": value, "samples": s} for p, r, value, s in columns]
    if judge is not None:
        for row, value in zip(rows, scores_of(judge, [result])[0].tolist(), strict=True):
            row["held-out reward"] = value
    return rows


def write_alignment(out: Path, result: "Aligned", rows: list[dict[str, Any]], comparison: "DecodingComparison | None",
                    asked: dict[str, Any]) -> Path:  # fmt: skip
    """responses.json, rounds.safetensors + .json (history, U, token KL), run.json and report.html."""
    import viz
    from circuits.files import save_tensors, write_json

    tensors = {**result.history, "perturbation_norm": result.perturbation_norm()}
    tensors |= {"token_kl": result.token_kl} if result.token_kl is not None else {}
    write_json(out / "responses.json", rows)
    save_tensors(out / "rounds", tensors, {"prompts": result.prompts, **result.summary()})
    save_run(out, "align", asked)
    text = (
        f"{int(result.samples.sum())} responses were scored ({result.scored} distinct texts) in {result.seconds:.1f} s."
    )
    sections: dict[str, Any] = {"Rounds": [text, viz.decoding(result)], "Responses": [rows]}
    if comparison is not None:
        write_json(out / "comparison.json", {"rows": comparison.rows(), "statement": comparison.statement()})
        sections["Against the baselines"] = [comparison.statement(), comparison.rows()]
    options = {name: value for name, value in asked.items() if value not in (None, [], False)} | versions()
    title = f"luthier align: {asked['model']}"
    return viz.report(out / "report.html", sections, title=title, provenance=options, command=command_line())

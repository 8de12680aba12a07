"""SITE beside zero-shot and few-shot prompts over many tasks and seeds, all fitted in one backward.

    python tests/benchmarks/site_tasks.py                                    every mapping of the pocket model
    python tests/benchmarks/site_tasks.py MODEL FOLDER [--shots 5] [task ...]   function-vectors JSON files

Each seed has its own split, demonstrations, embedding and fit. Accuracy is that of the first answer token; intervals are bootstrap over
tasks, seeds averaged (tasks are what is sampled).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from circuits import FewShotTask, load, pocket, select_heads, task_embedding
from circuits.alphas import bootstrap
from circuits.answers import score_answers
from circuits.fewshot import encode_prompts
from circuits.pocket import world
from interventions import inject

TEST_ROWS = 60


def tasks_of(arguments):
    if arguments.folder is None:
        return {name: pocket.fewshot_task(name) for name in (arguments.task or world.mappings())}
    files = sorted(Path(arguments.folder).glob("*.json"))
    return {f.stem: FewShotTask.from_json(f) for f in files if not arguments.task or f.stem in arguments.task}


def usable(model, task):
    """Rows whose input and answer the tokenizer keeps apart, short enough for the context."""
    keep = []
    for row in range(len(task)):
        try:
            length = len(encode_prompts(model, task.select([row]).prompts()).tokens[0])
        except ValueError:
            continue
        if length < 40:
            keep.append(row)
    return task.select(keep[:600])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="pocket")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("task", nargs="*")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--answer-tokens", type=int, default=6)
    arguments = parser.parse_args()
    model = load(arguments.model)
    tasks = {name: usable(model, task) for name, task in tasks_of(arguments).items()}
    started = time.perf_counter()
    train, test, held, embeddings = {}, {}, {}, {}
    for name, task in tasks.items():
        for seed in range(arguments.seeds):
            key = f"{name}/{seed}"
            test[key], rest = task.split(min(TEST_ROWS, len(task) // 3), seed)
            held[key], train[key] = rest.split(min(50, len(rest) // 5), seed)
            embeddings[key] = task_embedding(
                model,
                train[key],
                n_prompts=30,
                n_shots=min(arguments.shots, len(train[key]) - 1),
                seed=seed,
                progress=False,
            )
    measured = time.perf_counter() - started
    found = select_heads(
        model,
        train,
        embeddings,
        validation=held,
        steps=arguments.steps,
        batch_size=8,
        validate_every=20,
        progress=False,
    )
    fitted = time.perf_counter() - started - measured
    scores = {}
    for key in train:
        options = dict(max_new_tokens=arguments.answer_tokens, fold_case=False)
        seed = int(key.rsplit("/", 1)[1])
        shots = min(arguments.shots, len(train[key]))
        zero = test[key].prompts()
        scores[key, "zero-shot"] = score_answers(model, zero, **options)
        scores[key, "few-shot"] = score_answers(
            model, train[key].prompts(shots, seed=seed, queries=test[key]), **options
        )
        with inject(model, embeddings[key], found[key]):
            scores[key, "SITE"] = score_answers(model, zero, **options)
    report(model, tasks, arguments, scores, train)
    print(
        f"\n{len(train)} embeddings in {measured:.1f} s, {len(train)} fits of {arguments.steps} steps in one backward: {fitted:.1f} s"
    )


def report(model, tasks, arguments, scores, train) -> None:
    methods = ("zero-shot", "few-shot", "SITE")

    def mean(name, method, metric):
        runs = [
            getattr(scores[f"{name}/{seed}", method], metric).float().mean().item() for seed in range(arguments.seeds)
        ]
        return sum(runs) / len(runs)

    print(
        f"{model.name}, {arguments.shots} shots, {arguments.seeds} seeds; first-token accuracy | exact match | answer NLL\n"
    )
    print("| task | rows | " + " | ".join(methods) + " |\n|---|---|" + "---|" * len(methods))
    for name, task in tasks.items():
        cells = [" / ".join(f"{mean(name, m, metric):.2f}" for metric in ("first", "exact", "nll")) for m in methods]
        print(f"| {name} | {len(task)} | " + " | ".join(cells) + " |")
    for metric in ("first", "exact", "nll"):
        values = {m: torch.tensor([mean(name, m, metric) for name in tasks]) for m in methods}
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(values[m])) for m in methods]
        print(f"| **mean, {metric}** | | " + " | ".join(cells) + " |")
        difference = bootstrap(values["SITE"] - values["few-shot"])
        print(
            "\nSITE - few-shot, {}: {:+.3f} [{:+.3f}, {:+.3f}]\n".format(metric, *difference)
            if metric == "nll"
            else "",
            end="",
        )
        if metric != "nll":
            print("| SITE - few-shot, {} | | | | {:+.3f} [{:+.3f}, {:+.3f}] |".format(metric, *difference))


if __name__ == "__main__":
    main()

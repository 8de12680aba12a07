"""SITE beside what one would pick instead, on every few-shot mapping of the pocket model: eight methods, several seeds.

    python tests/benchmarks/compare_site.py --out runs/site [--seeds 4] [--seconds 400]
    python tests/benchmarks/compare_site.py --out runs/site --report

Each (mapping, seed) has its own split, demonstrations and fits, and one file in --out: a run that was stopped goes on where it ended.
Whatever is trained gets 200 steps and its defaults otherwise. Intervals are a two-level bootstrap: mappings, then seeds within each.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from circuits import load, pocket
from circuits.pocket import world
from interventions.comparison import METHODS, METRICS, compare

TEST_ROWS = 60
STEPS = {method: {"steps": 200} for method in ("site", "mtv", "i2cl", "lora")}
COSTS = ("trainable", "fit_seconds", "prompt_tokens", "query_seconds")


def nested_interval(values: torch.Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of [task, seed] and its 95 % interval: tasks are drawn, then seeds of each drawn task."""
    tasks, seeds = values.shape
    generator = torch.Generator().manual_seed(0)
    task = torch.randint(tasks, (resamples, tasks, 1), generator=generator)
    seed = torch.randint(seeds, (resamples, tasks, seeds), generator=generator)
    means = values[task, seed].mean((1, 2)).sort().values
    return values.mean().item(), means[int(0.025 * resamples)].item(), means[int(0.975 * resamples)].item()


def measure(out: Path, names: list[str], seeds: int, seconds: float, methods: list[str]) -> None:
    model, started = load("pocket"), time.perf_counter()
    todo = [(name, seed) for seed in range(seeds) for name in names]
    for name, seed in todo:
        file = out / f"{name}.{seed}.json"
        done = json.loads(file.read_text()) if file.is_file() else {}
        missing = [method for method in methods if method not in done]
        if not missing or time.perf_counter() - started > seconds:
            continue
        task = pocket.fewshot_task(name)
        test, train = task.split(min(TEST_ROWS, len(task) // 3), seed)
        found = compare(
            model,
            train,
            test,
            methods=missing,
            seeds=[seed],
            options=STEPS,
            fold_case=False,
            max_new_tokens=6,
            progress=False,
        )
        for row in found.rows():
            means = {metric: row[metric][0] for metric in METRICS}
            done[row["method"]] = means | {cost: row[cost] for cost in COSTS}
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(done))
        print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def report(out: Path, names: list[str], seeds: int) -> None:
    rows = {name: [json.loads((out / f"{name}.{seed}.json").read_text()) for seed in range(seeds)] for name in names}

    def values(method: str, metric: str) -> torch.Tensor:
        return torch.tensor([[run[method][metric] for run in runs] for runs in rows.values()])

    print(f"pocket, {len(rows)} mappings x {seeds} seeds, at most {TEST_ROWS} test rows each\n")
    print("| method | first token | exact | prefix | answer NLL | trainable | fit s | prompt tokens | ms / query |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*nested_interval(values(method, metric))) for metric in METRICS]
        cost = {name: values(method, name).mean().item() for name in COSTS}
        cells += [f"{cost['trainable']:.0f}", f"{cost['fit_seconds']:.1f}", f"{cost['prompt_tokens']:.1f}"]
        print(f"| {' | '.join([method, *cells, format(1000 * cost['query_seconds'], '.1f')])} |")
    print("\n| SITE minus | first token | answer NLL |\n|---|---|---|")
    for method in METHODS:
        if method != "site":
            gaps = [nested_interval(values("site", metric) - values(method, metric)) for metric in ("first", "nll")]
            print(f"| {method} | " + " | ".join("{:+.3f} [{:+.3f}, {:+.3f}]".format(*gap) for gap in gaps) + " |")
    print("\n| first token, mean over seeds | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
    for number, name in enumerate(rows):
        print(f"| {name} | " + " | ".join(f"{values(m, 'first')[number].mean():.2f}" for m in METHODS) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tasks", default=",".join(world.mappings()))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after this time")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.tasks.split(",")
    if arguments.report:
        report(arguments.out, names, arguments.seeds)
    else:
        measure(arguments.out, names, arguments.seeds, arguments.seconds, arguments.methods.split(","))


if __name__ == "__main__":
    main()

"""SITE's two costs. Fit: against the straightforward loop (full prompts, one row per step, one row per validation forward), at equal
validation loss. Inference: generation with the injection against the same zero-shot prompts without it.

    python tests/benchmarks/bench_site.py [model] [task]      (default: pocket, fruit_of_3)
"""

import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from circuits import FewShotTask, load, pocket, rewrite, select_heads, task_embedding
from circuits.fewshot import encode_prompts
from circuits.prefix import frozen, mix
from interventions import inject

SEEDS = (0, 1, 2)
REPEATS = 200


def plain_loop(model, train, held, embedding, steps=400, lr=0.2, validate_every=50, seed=0):
    """The published pipeline as one writes it down, without its debugging switches. Returns the best validation loss."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros(embedding.shape[:2], requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=lr)
    rows = [encode_prompts(model, [prompt]) for prompt in train.prompts()]
    checks = [encode_prompts(model, [prompt]) for prompt in held.prompts()]

    def loss_of(prompt):
        alpha = torch.sigmoid(theta)

        def edit(z, layer):
            edited = z.clone()
            edited[:, -1] = mix(z[:, -1], embedding[layer], alpha[layer])
            return edited

        with rewrite(model, "z", edit):
            return cross_entropy(model.hf(prompt.tokens).logits[:, -1], prompt.first)

    best = float("inf")
    with frozen(model.hf):
        for step in range(steps):
            row = rows[int(torch.randint(len(rows), (), generator=generator))]
            optimizer.zero_grad()
            loss_of(row).backward()
            optimizer.step()
            if (step + 1) % validate_every == 0:
                with torch.no_grad():
                    best = min(best, sum(loss_of(row).item() for row in checks) / len(checks))
    return best


def timed(run):
    """CPU seconds of this process: on one thread, and not disturbed by what else runs on the machine."""
    started = time.process_time()
    result = run()
    return result, time.process_time() - started


def fits(model, train, held, embedding):
    """(name, validation losses, seconds) per way of fitting, over seeds, interleaved."""
    mean = embedding.mean
    few = dict(validation=held, progress=False)
    ways = {
        "full prompts, batch 1 (400 steps)": lambda s: plain_loop(model, train, held, mean, seed=s),
        "prefix cache, batch 1 (400 steps)": lambda s: select_heads(model, train, mean, batch_size=1, seed=s, **few),
        "prefix cache, batch 32, lr 0.3 (28 steps)": lambda s: select_heads(
            model, train, mean, batch_size=32, lr=0.3, steps=28, validate_every=14, seed=s, **few
        ),
        "the same, 8 seeds in one backward": lambda s: select_heads(
            model, train, mean, batch_size=32, lr=0.3, steps=28, validate_every=14, seed=s, seeds=8, **few
        ),
    }
    losses, seconds = {name: [] for name in ways}, {name: [] for name in ways}
    for seed in SEEDS:
        for name, way in ways.items():
            found, spent = timed(lambda way=way, seed=seed: way(seed))
            losses[name].append(found if isinstance(found, float) else found.validation.mean().item())
            seconds[name].append(spent)
            print(f"seed {seed}, {name}: {spent:.2f} s", file=sys.stderr, flush=True)
    return [(name, losses[name], seconds[name]) for name in ways]


def inference(model, task, embedding, selection):
    """CPU seconds of one generate call, interleaved in alternating order: zero-shot, injected; 10-shot prompts now and then."""
    queries = [task.query(source) for source, _ in task.pairs[:16]]
    shots = [prompt.text for prompt in task.prompts(10, 16, seed=0)]

    def generated(texts, context):
        with context:
            return timed(lambda: model.generate(texts, max_new_tokens=10, min_new_tokens=10))[1]

    ways = {
        "zero-shot": lambda: generated(queries, contextlib.nullcontext()),
        "injected": lambda: generated(queries, inject(model, embedding, selection)),
    }
    times = {"zero-shot": [], "injected": [], "10-shot": []}
    for repeat in range(-5, REPEATS):  # the first few warm up
        for label in sorted(ways, reverse=repeat % 2 == 0):
            spent = ways[label]()
            if repeat >= 0:
                times[label].append(spent)
        if repeat >= 0 and repeat % 10 == 0:
            times["10-shot"].append(generated(shots, contextlib.nullcontext()))
    ratios = torch.tensor([b / a for a, b in zip(times["zero-shot"], times["injected"], strict=True)])
    return {name: statistics.median(values) for name, values in times.items()}, median_interval(ratios)


def median_interval(values, resamples=2000):
    """Median and its 95 % bootstrap interval."""
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[draws].median(1).values.sort().values
    return values.median().item(), medians[int(0.025 * resamples)].item(), medians[int(0.975 * resamples)].item()


def main() -> None:
    torch.set_num_threads(1)
    name, mapping = (sys.argv[1:] + ["pocket", "fruit_of_3"][len(sys.argv) - 1 :])[:2]
    model = load(name)
    path = Path(mapping)
    task = FewShotTask.from_json(path) if path.is_file() else pocket.fewshot_task(mapping)
    held, train = task.split(min(100, len(task) // 4), 0)
    embedding = task_embedding(model, train, n_prompts=20, n_shots=5, progress=False)
    rows = fits(model, train, held, embedding)
    base = statistics.mean(rows[0][2])
    print(f"{model.name}, {task.name}: {len(train)} training rows, {len(held)} validation rows, seeds {SEEDS}\n")
    print("| fit | best validation loss (mean, range) | CPU seconds (mean) | speed-up |\n|---|---|---|---|")
    for label, losses, seconds in rows:
        low, high, spent = min(losses), max(losses), statistics.mean(seconds)
        print(
            f"| {label} | {statistics.mean(losses):.4f} [{low:.4f}, {high:.4f}] | {spent:.2f} | {base / spent:.1f}x |"
        )
    times, ratios = inference(model, task, embedding, select_heads(model, train, embedding, steps=20, progress=False))
    print(f"\n| 16 prompts, 10 new tokens, median of {REPEATS} | CPU ms |\n|---|---|")
    for label, value in times.items():
        print(f"| {label} | {1000 * value:.1f} |")
    print("\ninjected / zero-shot, median of paired ratios: {:.4f} [{:.4f}, {:.4f}]".format(*ratios))


if __name__ == "__main__":
    main()

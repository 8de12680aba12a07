"""The judge's table: methods x models. Prints the markdown of docs/judge.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/judge_table.py [ioi|agreement|sort|pocket ...] [--n 40]

Needs ../shared/models and ../shared/data for all but the pocket model. Scores come from one half of the examples, curves from the
other. The reference is the corrupted twin: resample ablation for the oracle, gradient and curves, its mean per position for CD-T.
"""

import json
import random
import sys
from pathlib import Path

import torch

sys.path[:0] = [".", "tests"]

from circuits import (  # noqa: E402  # noqa: E402
    Circuit,
    HeadScores,
    PairedTask,
    ablation,
    discover,
    evaluate,
    gradient,
    integrated_gradients,
    learned_gates,
    load,
    relevance,
)
from circuits.encoding import Encoded  # noqa: E402
from circuits.judge import HEADER, compare_methods  # noqa: E402
from circuits.tasks import Task  # noqa: E402

SHARED = next((p for p in (Path("../shared"), Path("../../shared")) if p.is_dir()), Path("../shared"))


def ioi(n: int):
    model = load(SHARED / "models/tinystories-3m")
    facts = json.loads((SHARED / "models/tinystories-3m/ioi_circuit.json").read_text())
    known = Circuit([name.replace("L", "a").replace("H", ".h") for name in facts["order"]], 8, 16)
    rng, rows = random.Random(0), []
    for _ in range(2 * n):
        a, b, c = rng.sample(facts["names"], 3)
        a, b = rng.choice([(a, b), (b, a)])
        first, second = rng.choice([(a, b), (b, a)])
        fill = {"A": first, "B": second}
        prompts = (facts["template"].format(**fill, S=s) for s in (a, c))
        rows.append(dict(zip(("prompt", "corrupted"), prompts, strict=True), answer=f" {b}", distractor=f" {a}"))
    return model, PairedTask.from_rows(rows, model, name="name copying"), known


def agreement(n: int):
    model = load(SHARED / "models/tinystories-3m")
    lines = (SHARED / "data/sva/simple_train.json").read_text().splitlines()
    rows = []
    for line in lines:
        item = json.loads(line)
        prompts = item["clean_prefix"], item["patch_prefix"]
        if len({len(model.tokenizer(p).input_ids) for p in prompts}) > 1:
            continue
        words = item["clean_answer"], item["patch_answer"]
        if any(len(model.tokenizer(w, add_special_tokens=False).input_ids) != 1 for w in words):
            continue
        rows.append(dict(zip(("prompt", "corrupted", "answer", "distractor"), (*prompts, *words), strict=True)))
    random.Random(0).shuffle(rows)
    return model, PairedTask.from_rows(rows[: 2 * n], model, name="subject-verb agreement"), None


class Sorting(Task):
    """Six letters of three, then the first `given` of them in order; the next one is asked for. Twins sort other letters."""

    name, fingerprint = "sorting", "seed 0"

    def __init__(self, indices, given: int = 3):
        self.indices, self.given = list(indices), given

    def __len__(self):
        return len(self.indices)

    def select(self, indices):
        return Sorting([self.indices[i] for i in indices], self.given)

    def encode(self, model) -> Encoded:
        letters = [torch.randint(3, (2, 6), generator=torch.Generator().manual_seed(i)) for i in self.indices]
        rows = torch.stack(
            [torch.cat((pair, pair.sort(1).values), 1) for pair in letters], 1
        )  # clean or twin, example, 12
        tokens, gold = rows[..., : 6 + self.given], rows[0, :, 6 + self.given]
        direction = torch.full((len(self), 3), -0.5)
        direction[torch.arange(len(self)), gold] = 1.0
        readout = torch.full((len(self),), 5 + self.given)
        rest = (torch.ones_like(tokens[0]), readout, torch.arange(3), direction, gold, gold)
        return Encoded(tokens[0], *rest, corrupted=Encoded(tokens[1], *rest))


def sort(n: int):
    return load(SHARED / "models/gpt-nano-sort"), Sorting(range(2 * n)), None


def pocket(n: int):
    from circuits.pocket import name_copying_task

    model = load("pocket")
    return model, name_copying_task(model, 2 * n), None


def methods(model, task) -> dict:
    quiet = dict(progress=False)
    cdt = dict(means="corrupted", per_position=True, **quiet)
    noise = torch.randn(model.anatomy.n_layers, model.anatomy.n_heads, generator=torch.Generator().manual_seed(0))
    return {
        "ablation (resample)": lambda: ablation(model, task, ablate="resample", **quiet),
        "CD-T exact": lambda: relevance(model, task, **cdt),
        "CD-T exact, screen=0.25": lambda: relevance(model, task, screen=0.25, **cdt),
        "CD-T frozen": lambda: relevance(model, task, rules="frozen", **cdt),
        "CD-T paper": lambda: relevance(model, task, rules="paper", **cdt),
        "gradient": lambda: gradient(model, task, ablate="resample", **quiet),
        "integrated gradients": lambda: integrated_gradients(model, task, ablate="resample", steps=5, **quiet),
        "learned gates": lambda: learned_gates(model, task, steps=100, means="corrupted", **quiet),
        "random": lambda: HeadScores(noise, "random"),
    }


def table(name: str, n: int) -> None:
    model, task, known = {"ioi": ioi, "agreement": agreement, "sort": sort, "pocket": pocket}[name](n)
    found, held = task.select(range(0, n)), task.select(range(n, len(task)))
    accuracy = evaluate(model, held).accuracy
    print(
        f"\n### {model.name}, {task.name}: {len(found)} examples to score, {len(held)} held out, accuracy {accuracy:.2f}\n"
    )
    oracle = ablation(model, found, ablate="resample", progress=False)
    runs = methods(model, found)
    print(HEADER)
    for verdict in compare_methods(model, held, runs, oracle, known, ablate="resample", progress=False):
        print(verdict.row(), flush=True)
    if known is not None:
        one_shot(model, found, known)


def one_shot(model, task, known: Circuit) -> None:
    """Which known heads the logits alone find, and which backward discovery adds, at the same number of heads."""
    k = len(known)
    size = 3 * k // 2
    print(
        f"\nKnown heads found:\n\n| rules | top {k} | top {size} | discovered ({size} heads, depth 2) | found by depth |"
    )
    print("|---|--:|--:|--:|---|")
    for rules in ("exact", "frozen", "paper"):
        options = dict(means="corrupted", per_position=True, rules=rules, progress=False)
        scores = relevance(model, task, **options)
        circuit = discover(model, task, depth=2, per_depth=k // 2, **options)
        steps = [[h for h in step["heads"] if Circuit([h]) & known] for step in circuit.provenance["steps"]]
        hits = [len(scores.top(size) & known) for size in (k, 3 * k // 2)]
        print(
            f"| {rules} | {hits[0]} | {hits[1]} | {len(circuit & known)} | {' / '.join(' '.join(s) or '-' for s in steps)} |",
            flush=True,
        )


if __name__ == "__main__":
    n = 40
    if "--n" in sys.argv:
        n = int(sys.argv.pop(sys.argv.index("--n") + 1))
        sys.argv.remove("--n")
    for name in sys.argv[1:] or ["ioi", "agreement", "sort", "pocket"]:
        table(name, n)

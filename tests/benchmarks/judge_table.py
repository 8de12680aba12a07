"""The judge's table: methods x models. Prints the markdown of docs/judge.md, and with --write puts it there.

    OMP_NUM_THREADS=1 python tests/benchmarks/judge_table.py [--write] [--n 64] [ioi agreement clauses sort pocket induction pointer]

Needs ../shared/models and ../shared/data for all but the pocket and the hand-built models. Scores come from one half of the
examples, curves from the other. The reference is the corrupted twin: resample ablation for the oracle, gradient and curves, its
mean per position for CD-T. Brackets are 95 % bootstrap intervals over examples.
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path[:0] = [".", "tests"]

from micro_models import KNOWN, MicroTask, micro  # noqa: E402

from circuits import (  # noqa: E402
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


def agreement(n: int, kind: str = "simple"):
    model = load(SHARED / "models/tinystories-3m")
    lines = (SHARED / f"data/sva/{kind}_train.json").read_text().splitlines()
    rows = []
    for line in lines[:: max(1, len(lines) // 600)]:
        item = json.loads(line)
        prompts = item["clean_prefix"], item["patch_prefix"]
        if len({len(model.tokenizer(p).input_ids) for p in prompts}) > 1:
            continue
        words = item["clean_answer"], item["patch_answer"]
        if any(len(model.tokenizer(w, add_special_tokens=False).input_ids) != 1 for w in words):
            continue
        rows.append(dict(zip(("prompt", "corrupted", "answer", "distractor"), (*prompts, *words), strict=True)))
    random.Random(0).shuffle(rows)
    return model, PairedTask.from_rows(rows[: 2 * n], model, name=f"subject-verb agreement ({kind})"), None


def clauses(n: int):
    """Agreement across a relative clause."""
    return agreement(n, "within_rc")


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
    task = name_copying_task(model, 2 * n)
    return model, task, looking(model, task.encode(model))


@torch.no_grad()
def looking(model, encoded: Encoded, share: float = 0.3) -> Circuit:
    """Heads known by where they look, not by what they do: from the read-out, on average more than `share` of their attention
    goes to the second mention of the repeated name, or to the answer and there more than to the first mention."""
    model.hf.set_attn_implementation("eager")
    patterns = torch.stack(model.hf(encoded.tokens, encoded.attention_mask, output_attentions=True).attentions)
    patterns = patterns[:, torch.arange(len(encoded)), :, encoded.readout]  # example layer head key
    names = encoded.columns[encoded.direction.argmax(1)], encoded.columns[encoded.direction.argmin(1)]
    answer, repeated = ((encoded.tokens == name[:, None]).int() for name in names)
    last = encoded.tokens.shape[1] - 1 - repeated.flip(1).argmax(1)
    to = [patterns[torch.arange(len(encoded)), :, :, at].mean(0) for at in (last, answer.argmax(1), repeated.argmax(1))]
    chosen = (to[0] > share) | ((to[1] > share) & (to[1] > to[2]))
    return Circuit(chosen.nonzero().tolist(), model.anatomy.n_layers, model.anatomy.n_heads)


def induction(n: int, name: str = "induction"):
    return load(micro(name)), MicroTask(name, 2 * n), KNOWN[name]


def pointer(n: int):
    return induction(n, "pointer")


def methods(model, task) -> dict[str, Callable[[], HeadScores]]:
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
        "learned gates": lambda: learned_gates(model, task, steps=500, **cdt),
        "random": lambda: HeadScores(noise, "random"),
    }


TASKS = {f.__name__: f for f in (ioi, agreement, clauses, sort, pocket, induction, pointer)}


def table(name: str, n: int) -> Iterator[str]:
    model, task, known = TASKS[name](n)
    found, held = task.select(range(0, n)), task.select(range(n, len(task)))
    accuracy = evaluate(model, held).accuracy
    layers, heads = model.anatomy.n_layers, model.anatomy.n_heads
    title = model.name if name in ("ioi", "agreement", "clauses", "sort", "pocket") else "hand-built"
    yield f"### {title} ({layers} x {heads} heads), {task.name}: {len(found)} + {len(held)} examples, accuracy {accuracy:.2f}\n"
    if known is not None:
        yield f"Known circuit, {len(known)} heads: {known}\n"
    oracle = ablation(model, found, ablate="resample", progress=False)
    runs = methods(model, found)
    yield HEADER
    options = dict(ablate="resample", clock=time.process_time, progress=False)
    for verdict in compare_methods(model, held, runs, oracle, known, **options):
        yield verdict.row()
    if known is not None:
        yield from one_shot(model, found, known)


def one_shot(model, task, known: Circuit) -> Iterator[str]:
    """How many known heads the logits alone find, and how many backward discovery finds with as many heads."""
    k, half = len(known), max(1, len(known) // 2)
    ways = {"eq. 6 at z": {}, "effect at z": {"score": "effect"}, "effect at q, k, v": {"through": ("q", "k", "v")}}
    yield f"\nKnown heads among {k}: at the logits alone, and discovered in steps of {half}.\n"
    yield f"| rules | the top {k} at the logits | {' | '.join(f'discovered, {way}' for way in ways)} |"
    yield "|---|--:|" + "--:|" * len(ways)
    for rules in ("exact", "frozen", "paper"):
        options = dict(means="corrupted", per_position=True, rules=rules, progress=False)
        cells = [str(len(relevance(model, task, **options).top(k) & known))]
        for how in ways.values():
            circuit = discover(model, task, depth=-(-k // half) - 1, per_depth=half, **how, **options)
            missed = " ".join(str(head) for head in known if head not in circuit)
            cells.append(f"{len(circuit & known)}" + (f" (not {missed})" if 0 < len(known - circuit) <= 2 else ""))
        yield f"| {rules} | {' | '.join(cells)} |"


def put(name: str, text: str) -> None:
    """Into docs/judge.md, between this table's two marks."""
    page = Path("docs/judge.md")
    old = page.read_text()
    new, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    assert count == 1, f"no marks for {name} in {page}"
    page.write_text(new)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments, n, write = sys.argv[1:], 64, False
    if "--n" in arguments:
        at = arguments.index("--n")
        n = int(arguments[at + 1])
        del arguments[at : at + 2]
    if "--write" in arguments:
        write = True
        arguments.remove("--write")
    for name in arguments or list(TASKS):
        lines = []
        for line in table(name, n):
            print(line, flush=True)
            lines.append(line)
        if write:
            put(name, "\n".join(lines) + "\n")

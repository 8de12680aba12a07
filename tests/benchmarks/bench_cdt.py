"""Speed of CD-T against its arithmetic floor, against ablation, and its memory. Prints markdown; ratios are from one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_cdt.py [nodes|heads|screen|memory|long|growth ...] [--prompts 50] [--resume FILE]

GPT-2-small shape with random weights (random weights take as long as trained ones). Every ratio has both sides timed here, in
turns: a few prompts of one, the same prompts of the other. With --resume a stopped run goes on where it was.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [".", "tests"]

from circuits import ablation, load, relevance  # noqa: E402
from circuits.cdt import Node, decompose  # noqa: E402
from circuits.encoding import Encoded  # noqa: E402
from circuits.means import mean_activations  # noqa: E402
from circuits.tasks import Task  # noqa: E402

PROMPTS, TURN = 50, 5
STORE: Path | None = None


class RandomTokens(Task):
    """Prompts of `length` random tokens, three answer columns. `rows` are their seeds."""

    name, fingerprint = "random tokens", "seeded"

    def __init__(self, rows, length: int, vocabulary: int):
        self.rows, self.length, self.vocabulary = list(rows), length, vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices):
        return RandomTokens([self.rows[i] for i in indices], self.length, self.vocabulary)

    def encode(self, model) -> Encoded:
        n = len(self.rows)
        seeds = [torch.Generator().manual_seed(row) for row in self.rows]
        tokens = torch.stack([torch.randint(self.vocabulary, (self.length,), generator=seed) for seed in seeds])
        gold = torch.tensor(self.rows) % 3
        direction = torch.full((n, 3), -0.5)
        direction[torch.arange(n), gold] = 1.0
        readout = torch.full((n,), self.length - 1)
        return Encoded(tokens, torch.ones_like(tokens), readout, torch.tensor([10, 20, 30]), direction, gold, gold)


def gpt2_small(n_layer: int = 12, n_head: int = 12):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return load(GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_embd=64 * n_head, n_head=n_head)).eval())


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Best of `repeats`, in CPU seconds of one thread: other work on the machine does not count."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


def matmul_rate(rows: int = 1152) -> float:
    """FLOP per second of the matmul that dominates: rows x 768 by 768 x 3072."""
    x, w = torch.randn(rows, 768), torch.randn(3072, 768)
    once = lambda: torch.nn.functional.linear(x, w)  # noqa: E731
    once()
    return 2 * rows * 768 * 3072 / seconds(lambda: [once() for _ in range(10)], 3) * 10


def node_flops(length: int, layers: int, heads: int, d: int = 768) -> float:
    """Matmul FLOPs of β for every (layer, position, head) source: from its layer on, from its position on.

    In the source's own layer only o and the MLP (9 of 12 d^2 multiply-adds); in the last layer only the position that is read
    needs q, o and the MLP, all need k and v.
    """
    total = 0.0
    for layer in range(layers):
        for position in range(length):
            tokens = length - position
            if layer == layers - 1:
                multiply = 9 * d * d  # one row
            else:
                middle = layers - 2 - layer
                multiply = tokens * 9 * d * d + middle * tokens * 12 * d * d + tokens * 2 * d * d + 10 * d * d
            total += heads * 2 * multiply
    return total


def nodes() -> None:
    """2,304 node sources on one 16-token prompt, rules="paper", against the arithmetic floor."""
    model = gpt2_small()
    tokens = torch.randint(50257, (1, 16), generator=torch.Generator().manual_seed(0))
    means = torch.randn(12, 16, 12, 64) * 0.1
    sources = [[Node(layer, head, p)] for layer in range(12) for p in range(16) for head in range(12)]
    run = lambda: decompose(model, tokens, sources, means, "paper", positions=[-1], vocab=[10, 20])  # noqa: E731
    rate = matmul_rate()
    took = seconds(run)
    rate = (rate + matmul_rate()) / 2  # before and after: the box may be shared
    flops = node_flops(16, 12, 12)
    floor = flops / rate
    print(f"| 2304 nodes x 1 prompt x 16 tokens, paper | {took:.1f} s | floor {floor:.1f} s ({flops / 1e12:.2f} TFLOP at "
          f"{rate / 1e9:.0f} GFLOP/s) | {took / floor:.2f}x | {verdict(took / floor, 2.0)} |", flush=True)  # fmt: skip


def stored(key: str, make: Callable[[], dict]) -> dict:
    """`make()`, or what an earlier run with the same --resume file found."""
    known = json.loads(STORE.read_text()) if STORE and STORE.is_file() else {}
    if key not in known:
        known[key] = make()
        if STORE:
            STORE.write_text(json.dumps(known))
    return known[key]


def in_turns(label: str, model, length: int, arms: dict[str, Callable], turns: dict[str, int]) -> dict[str, list[dict]]:
    """Seconds and scores of each arm, turn by turn: TURN prompts of one, the same prompts of another. `turns`: how many."""
    mean = mean_activations(model, RandomTokens(range(TURN), length, 50257))
    found: dict[str, list[dict]] = {name: [] for name in arms}
    for turn in range(max(turns.values())):
        task = RandomTokens(range(turn * TURN, (turn + 1) * TURN), length, 50257)
        for name, arm in arms.items():
            if turn >= turns[name]:
                continue

            def make(arm=arm, task=task) -> dict:
                begin = time.process_time()
                scores = arm(model, task, mean)
                return {"seconds": time.process_time() - begin, "values": scores.values.flatten().tolist()}

            found[name].append(stored(f"{label} {name} {turn}", make))
    return found


def versus(what: str, one: list[dict], other: list[dict], bar: float | None, against: str) -> None:
    """One row: seconds over the turns that both have, and how many of the ten largest scores they share per turn."""
    pairs = list(zip(one, other, strict=False))
    mine, theirs = (sum(pair[i]["seconds"] for pair in pairs) for i in (0, 1))
    tops = [
        [set(torch.tensor(part["values"]).flatten().abs().topk(10).indices.tolist()) for part in pair] for pair in pairs
    ]
    common = sum(len(a & b) for a, b in tops) / len(tops)
    print(f"| {what.format(prompts=TURN * len(pairs))} | {mine:.1f} s | `{against}` {theirs:.1f} s "
          f"| {mine / theirs:.2f}x, {common:.1f} of its top 10 | {verdict(mine / theirs, bar)} |", flush=True)  # fmt: skip


ARMS = {
    "ablation": lambda model, task, mean: ablation(model, task, reference=mean, progress=False),
    "exact": lambda model, task, mean: relevance(model, task, means=mean, progress=False),
    "screen=0.08": lambda model, task, mean: relevance(model, task, means=mean, screen=0.08, progress=False),
    "screen=0.1": lambda model, task, mean: relevance(model, task, means=mean, screen=0.1, progress=False),
    "frozen": lambda model, task, mean: relevance(model, task, means=mean, rules="frozen", progress=False),
    "paper": lambda model, task, mean: relevance(model, task, means=mean, rules="paper", progress=False),
}


def heads() -> None:
    """144 heads x 50 prompts of 32 tokens to label margins: exact and screened against ablation; one turn of the other rules."""
    turns = {name: PROMPTS // TURN if name in ("ablation", "exact", "screen=0.08") else 1 for name in ARMS}
    found = in_turns("heads", gpt2_small(), 32, ARMS, turns)
    for name, bar in {"exact": 1.0, "screen=0.08": 0.2, "screen=0.1": 0.2, "frozen": None, "paper": None}.items():
        against = "exact" if name.startswith("screen") else "ablation"
        what = f"144 heads x {{prompts}} prompts x 32 tokens, `{name}`"
        versus(what, found[name], found[against], bar, against)


def screen() -> None:
    """Screening at other sizes: fewer and more heads, shorter prompts."""
    for layers, wide, length in ((6, 12, 32), (12, 6, 32), (12, 12, 8), (24, 12, 8)):
        arms = {name: ARMS[name] for name in ("exact", "screen=0.08")}
        label = f"screen {layers} {wide} {length}"
        found = in_turns(label, gpt2_small(layers, wide), length, arms, dict.fromkeys(arms, 1))
        what = f"{layers} x {wide} heads, {{prompts}} prompts x {length} tokens, `screen=0.08`"
        versus(what, found["screen=0.08"], found["exact"], 0.2, "exact")


def verdict(ratio: float, bar: float | None) -> str:
    if bar is None:
        return "-"
    return f"bar {bar:g}x: met" if ratio <= bar else f"bar {bar:g}x: missed by {ratio / bar - 1:.0%}"


def resident(which: str) -> int:
    """KiB: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])


def peak(n: int, length: int, layers: range, dtype: torch.dtype) -> None:
    """Peak above the loaded model, Qwen2.5-0.5B's shape: 24 layers x 14 heads, vocabulary 151,936."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip
    model = load(Qwen2ForCausalLM(config).to(dtype).eval())
    task, mean = RandomTokens(range(n), length, 151936), torch.zeros(24, 14, 64)
    some = [head for head in model.anatomy.heads() if head.layer in layers]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before = resident("VmRSS")
    took = seconds(lambda: relevance(model, task, means=mean, sources=some, progress=False))
    above = (resident("VmHWM") - before) / 2**20
    what = f"{len(some)} heads x {n} prompts x {length} tokens, vocabulary 151,936, {str(dtype).removeprefix('torch.')}"
    print(f"| {what}: peak above the model of {before / 2**20:.1f} GiB | {took:.0f} s | | {above:.2f} GiB "
          f"| bar 2 GiB: {'met' if above <= 2 else 'missed'} |", flush=True)  # fmt: skip


def memory() -> None:
    """The whole problem, 336 heads and 50 examples, of short prompts: what is in flight is bounded whatever their length."""
    peak(50, 16, range(24), torch.float32)


def long() -> None:
    """Long examples, some chunks of them; heads of one layer, since more sources mean more chunks and not larger ones."""
    peak(12, 128, range(22, 23), torch.float32)


def growth() -> None:
    """Seconds against sources, prompt length and layers (exact, 4 prompts); also drawn, to docs/img/cdt_growth.png."""
    axes = {
        "sources": [(12, 32, size) for size in (18, 36, 72, 144)],
        "tokens": [(12, length, 144) for length in (8, 16, 32, 64)],
        "layers": [(layers, 32, 12 * layers) for layers in (3, 6, 9, 12)],
    }
    curves: dict[str, dict[int, float]] = {}
    for axis, settings in axes.items():
        for setting in settings:
            took = stored(f"growth {setting}", lambda: {"seconds": _grown(*setting)})["seconds"]  # noqa: B023
            layers, length, size = setting
            curves.setdefault(axis, {})[dict(layers=layers, tokens=length, sources=size)[axis]] = took
            print(f"| {layers} layers, {length} tokens, {size} heads, 4 prompts | {took:.2f} s | | | |", flush=True)
    _draw(curves)


def _grown(layers: int, length: int, size: int) -> float:
    model, task = gpt2_small(layers), RandomTokens(range(4), length, 50257)
    every = model.anatomy.heads()
    return seconds(lambda: relevance(model, task, means="zero", sources=every[:: len(every) // size], progress=False))


def _draw(curves: dict[str, dict[int, float]]) -> None:
    from plotly.subplots import make_subplots

    titles = {"sources": "sources (12 layers, 32 tokens)", "tokens": "tokens (12 layers, 144 sources)",
              "layers": "layers (32 tokens, all heads)"}  # fmt: skip
    figure = make_subplots(1, 3, x_title=None, y_title="CPU seconds", horizontal_spacing=0.06)
    for column, (axis, curve) in enumerate(curves.items(), 1):
        x, y = list(curve), list(curve.values())
        figure.add_scatter(x=x, y=y, mode="lines+markers", line_color="#1f5f8b", row=1, col=column)
        power = 2 if axis == "layers" else 1
        reference = [y[-1] * (value / x[-1]) ** power for value in x]
        figure.add_scatter(x=x, y=reference, mode="lines", line=dict(color="#999", dash="dot"), row=1, col=column)
        figure.update_xaxes(type="log", title_text=titles[axis], tickvals=x, row=1, col=column)
        figure.update_yaxes(type="log", tickvals=y, ticktext=[f"{v:.2g}" for v in y], row=1, col=column)
    figure.update_layout(
        template="simple_white", showlegend=False, width=1000, height=320, margin=dict(t=15, b=10, r=10)
    )
    figure.write_image("docs/img/cdt_growth.png", scale=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    for option in ("--prompts", "--resume"):
        if option in arguments:
            at = arguments.index(option)
            value = arguments[at + 1]
            del arguments[at : at + 2]
            PROMPTS, STORE = (int(value), STORE) if option == "--prompts" else (PROMPTS, Path(value))
    parts = {f.__name__: f for f in (nodes, heads, screen, memory, long, growth)}
    print("| what | time | against | ratio | bar |\n|---|--:|--:|--:|---|")
    with torch.no_grad():
        for name in arguments or parts:
            parts[name]()

"""Speed of CD-T against its arithmetic floor, against ablation, and its memory. Prints markdown; ratios are from one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_cdt.py [nodes|heads|memory|growth ...] [--prompts 50]

GPT-2-small shape with random weights (random weights take as long as trained ones). Every ratio has both sides timed here.
"""

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

PROMPTS = 50


class RandomTokens(Task):
    """`n` prompts of `length` random tokens, three answer columns."""

    name, fingerprint = "random tokens", "seed 0"

    def __init__(self, n: int, length: int, vocabulary: int):
        self.n, self.length, self.vocabulary = n, length, vocabulary

    def __len__(self) -> int:
        return self.n

    def select(self, indices):
        return RandomTokens(len(indices), self.length, self.vocabulary)

    def encode(self, model) -> Encoded:
        tokens = torch.randint(self.vocabulary, (self.n, self.length), generator=torch.Generator().manual_seed(0))
        gold = torch.arange(self.n) % 3
        direction = torch.full((self.n, 3), -0.5)
        direction[torch.arange(self.n), gold] = 1.0
        readout = torch.full((self.n,), self.length - 1)
        mask = torch.ones_like(tokens)
        return Encoded(tokens, mask, readout, torch.tensor([10, 20, 30]), direction, gold, gold)


def gpt2_small(n_layer: int = 12):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return load(GPT2LMHeadModel(GPT2Config(n_layer=n_layer)).eval())


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
          f"{rate / 1e9:.0f} GFLOP/s) | {took / floor:.2f}x | bar 2x |", flush=True)  # fmt: skip


def heads() -> None:
    """144 heads x 50 prompts of 32 tokens to label margins: exact, frozen, paper and screened against ablation."""
    model, task = gpt2_small(), RandomTokens(PROMPTS, 32, 50257)
    mean = mean_activations(model, task)
    oracle, times = None, {}

    def ablate():
        nonlocal oracle
        oracle = ablation(model, task, reference=mean, progress=False)

    times["ablation"] = seconds(ablate)
    found = {}
    for name, options in {
        "exact": {},
        "screen=0.1": {"screen": 0.1},
        "frozen": {"rules": "frozen"},
        "paper": {"rules": "paper"},
    }.items():

        def run(name=name, options=options):
            found[name] = relevance(model, task, means=mean, progress=False, **options)

        times[name] = seconds(run)
        common = len(found[name].top(10, by="magnitude") & oracle.top(10, by="magnitude"))
        against = "exact" if name.startswith("screen") else "ablation"
        print(
            f"| 144 heads x {PROMPTS} prompts x 32 tokens, {name} | {times[name]:.1f} s | {against} {times[against]:.1f} s "
            f"| {times[name] / times[against]:.2f}x | top 10 by size shared with ablation: {common} |",
            flush=True,
        )


def resident(which: str) -> int:
    """KiB: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])


def memory() -> None:
    """336 heads, 152k vocabulary, 50 examples of 128 tokens (Qwen2.5-0.5B's shape): peak above the model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    model = load(Qwen2ForCausalLM(config).to(torch.bfloat16).eval())
    task = RandomTokens(PROMPTS, 128, 151936)
    mean = torch.zeros(24, 14, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before = resident("VmRSS")
    some = [
        head for head in model.anatomy.heads() if head.layer >= 22
    ]  # peak is set by a chunk, not by how many there are
    took = seconds(lambda: relevance(model, task, means=mean, sources=some, progress=False))
    peak = (resident("VmHWM") - before) / 2**20
    print(
        f"| {len(some)} of 336 heads x {PROMPTS} x 128 tokens, vocabulary 151,936, exact, bf16 | {took:.1f} s "
        f"| peak above the loaded model {peak:.2f} GiB | | bar 2 GiB |",
        flush=True,
    )


def growth() -> None:
    """Seconds against sources, prompt length and layers (exact, 4 prompts)."""
    for layers, length, share in [
        (3, 32, 1.0),
        (6, 32, 1.0),
        (12, 32, 1.0),
        (12, 16, 1.0),
        (12, 64, 1.0),
        (12, 32, 0.25),
        (12, 32, 0.5),
    ]:
        model, task = gpt2_small(layers), RandomTokens(4, length, 50257)
        every = model.anatomy.heads()
        some = every[:: round(1 / share)]
        took = seconds(lambda: relevance(model, task, means="zero", sources=some, progress=False))  # noqa: B023
        print(
            f"| growth: {layers} layers, {length} tokens, {len(some)} heads, 4 prompts | {took:.2f} s | | | |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--prompts" in sys.argv:
        PROMPTS = int(sys.argv.pop(sys.argv.index("--prompts") + 1))
        sys.argv.remove("--prompts")
    print("| what | time | against | ratio | note |\n|---|--:|--:|--:|---|")
    with torch.no_grad():
        for name in sys.argv[1:] or ["nodes", "heads", "memory", "growth"]:
            {"nodes": nodes, "heads": heads, "memory": memory, "growth": growth}[name]()

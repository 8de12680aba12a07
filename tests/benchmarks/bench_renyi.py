"""Stacked members against the loop over PEFT adapters: `python tests/benchmarks/bench_renyi.py [--repeats 4] [--only CASE]`.

One training step (forward, ℓ_α, backward, AdamW) of M = 8 members, r = 8, on random Llamas of several sizes, on all cores (`--threads`).
The loop is PEFT's documented way (set_adapter per member), with every adapter's requires_grad set again before backward,
without which only the last one learns, and with the cross-entropy over all logits that transformers computes. The two take
turns of 3 steps, as training has steps that follow one another, and change who is first; medians after three turns.
Both must have the same losses. Then peak memory of joint and two-pass training, each in a fresh process (`--only memory`).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MEMBERS, R, ALPHA = 8, 8, 0.8
# glibc gives freed memory back at once, so that what one step kept is not mistaken for what the next one needs.
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TURN, WARM = 3, 3  # steps of a turn; first turns that do not count: memory settles after some ten steps
SHORT, LONG = ((1, 8), (1, 16), (1, 32)), ((4, 128),)


class Case(NamedTuple):
    depth: int
    width: int
    vocabulary: int
    shapes: tuple[tuple[int, int], ...]
    layers: list[int] | None = None  # adapted layers; None: all
    targets: str | list[str] = "all-linear"
    answer: float | None = None  # only this last part of a text has a loss, as in rows of prompt and completion
    trimmed: bool = False  # the loop computes logits there only too (`logits_to_keep`), which Trainers do not


CASES = {
    "pocket": Case(4, 96, 1000, SHORT + LONG),
    "narrow": Case(8, 128, 8000, SHORT + LONG),
    "wide": Case(4, 512, 8000, SHORT + LONG),
    "wide, q and v": Case(4, 512, 8000, SHORT[-1:] + LONG, None, ["q_proj", "v_proj"]),
    "wide, upper half": Case(4, 512, 8000, SHORT + LONG, [2, 3]),
    "wide, last layer": Case(4, 512, 8000, SHORT + LONG, [3]),
    "stories, answers": Case(8, 128, 14019, SHORT + LONG, answer=0.25),
    "stories, answers, trimmed loop": Case(8, 128, 14019, SHORT + LONG, answer=0.25, trimmed=True),
    "nusantara, answers": Case(6, 192, 8000, SHORT + LONG, answer=0.25),
    "nusantara, answers, trimmed loop": Case(6, 192, 8000, SHORT + LONG, answer=0.25, trimmed=True),
    "wide, answers": Case(4, 512, 32000, SHORT[-1:] + LONG, answer=0.25),
    "wide, answers, trimmed loop": Case(4, 512, 32000, SHORT[-1:] + LONG, answer=0.25, trimmed=True),
    "half a billion's width, last layer, answers": Case(4, 896, 32000, SHORT[-1:] + LONG, [3], answer=0.25),
}


def base(case: Case):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = 14 if case.width == 896 else 8
    sizes = dict(hidden_size=case.width, num_attention_heads=heads, num_hidden_layers=case.depth)
    inner = 4864 if case.width == 896 else case.width * 8 // 3 // 8 * 8
    return LlamaForCausalLM(LlamaConfig(vocab_size=case.vocabulary, intermediate_size=inner, **sizes)).eval()


def rows(case: Case, batch: int, length: int) -> list[dict]:
    tokens = torch.randint(3, case.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
    blank = 0 if case.answer is None else length - int(length * case.answer)
    return [{"input_ids": ids, "labels": [-100] * blank + ids[blank:]} for ids in tokens.tolist()]


def stacked_step(case: Case):
    from interventions import RenyiEnsemble
    from interventions.coupled import joint_gradient

    ensemble = RenyiEnsemble(base(case), MEMBERS, ALPHA, R, case.targets, layers=case.layers)
    optimizer = torch.optim.AdamW(ensemble.stack.parameters(), lr=1e-4, fused=True)

    def step(data: list[dict]) -> float:
        objective = ensemble._objective(data, "sequence")
        everything = torch.arange(len(data))
        optimizer.zero_grad()
        s = joint_gradient(lambda which: objective.forward(everything, which), MEMBERS, ALPHA)
        optimizer.step()
        return s.mean().item()

    return step, ensemble


def peft_step(case: Case, ensemble):
    """Adapters equal to the ensemble's members, trained by the loop."""
    import tempfile

    from peft import PeftModel

    from interventions.renyi import renyi_loss

    with tempfile.TemporaryDirectory() as place:
        for member in range(MEMBERS):
            ensemble.stack.save_member(member, f"{place}/{member}", ensemble.hf)
        model = PeftModel.from_pretrained(base(case), f"{place}/0", adapter_name="m0", is_trainable=True).eval()
        for member in range(1, MEMBERS):
            model.load_adapter(f"{place}/{member}", f"m{member}", is_trainable=True)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in factors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=True)

    def step(data: list[dict]) -> float:
        tokens, labels = (torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels"))
        kept = int((labels != -100).sum(1).max()) + 1 if case.trimmed else 0  # 0: all
        optimizer.zero_grad()
        s = []
        for member in range(MEMBERS):
            model.set_adapter(f"m{member}")
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[:, :-1]
            wanted = labels[:, -logits.shape[1] :].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
            s.append(-loss.view(len(tokens), -1).sum(1))
        for parameter in factors:
            parameter.requires_grad_(True)
        renyi_loss(torch.stack(s), ALPHA).backward()
        optimizer.step()
        return torch.stack(s).mean().item()

    return step


def measure(step, data) -> tuple[float, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = step(data)
    return time.perf_counter() - wall, time.process_time() - cpu, value


def speed(name: str, case: Case, repeats: int) -> None:
    ours, ensemble = stacked_step(case)
    theirs = peft_step(case, ensemble)
    for shape in case.shapes:
        data, ways = rows(case, *shape), {"peft": theirs, "stacked": ours}
        times = {way: [] for way in ways}
        for number in range(WARM + repeats):
            for way in sorted(ways, reverse=number % 2 == 0):
                times[way] += [measure(ways[way], data) for _ in range(TURN)]
        gap = max(abs(a[2] - b[2]) / abs(a[2]) for a, b in zip(times["peft"], times["stacked"], strict=True))
        cpu = {way: statistics.median(run[1] for run in runs[WARM * TURN :]) for way, runs in times.items()}
        wall = {way: statistics.median(run[0] for run in runs[WARM * TURN :]) for way, runs in times.items()}
        print(
            f"| {name} | {shape[0]} x {shape[1]} | {1e3 * cpu['peft']:.0f} | {1e3 * cpu['stacked']:.0f} | "
            f"{cpu['peft'] / cpu['stacked']:.1f}x | {wall['peft'] / wall['stacked']:.1f}x | {gap:.0e} |",
            flush=True,
        )


def peak(what: str) -> float:
    """Peak resident MiB that a training step adds, 4 texts of 256 tokens."""
    from interventions import RenyiEnsemble

    case = Case(8, 256, 8000, ())
    ensemble = RenyiEnsemble(base(case), 1 if what == "one" else MEMBERS, ALPHA, R, "all-linear")
    options = dict(steps=1, two_pass=what == "two-pass", progress=False)
    ensemble.fit(rows(case, 1, 8), **options)  # optimizer, allocator
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    ensemble.fit(rows(case, 4, 256), batch_size=4, **options)
    return (resident("VmHWM") - before) / 1024


def resident(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0])


def memory() -> None:
    print("\n| training | peak memory of the step, MiB | of one member |")
    print("|---|---|---|")
    found = {}
    for what in ("one", "two-pass", "joint"):
        command = [sys.executable, __file__, "--peak", what]
        done = subprocess.run(command, env=os.environ | RETURN, capture_output=True, text=True, check=True)
        found[what] = float(done.stdout.split()[-1])
        name = {"one": "one member", "two-pass": "8 members, two-pass", "joint": "8 members, joint"}[what]
        print(f"| {name} | {found[what]:.0f} | {found[what] / found['one']:.2f}x |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", choices=[*CASES, "memory"], help="default: everything")
    parser.add_argument("--peak", choices=("one", "two-pass", "joint"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.peak))
        raise SystemExit
    asked = given.only or [*CASES, "memory"]
    print("| model | batch x tokens | PEFT loop, CPU ms | stacked, CPU ms | ratio | wall times | same loss to |")
    print("|---|---|---|---|---|---|---|")
    for name in asked:
        memory() if name == "memory" else speed(name, CASES[name], given.repeats)

"""Stacked members against the loop over PEFT adapters: `python tests/benchmarks/bench_renyi.py [repeats | --memory]`.

One training step (forward, ℓ_α, backward, AdamW) of M = 8 members, r = 8 on all seven linear layers of a 4-layer, d = 512
Llama with 8,000 tokens; one thread. The loop is PEFT's documented way (set_adapter per member), with every adapter's
requires_grad set again before backward, without which only the last one learns. Runs alternate; the table gives the
median processor time and the best wall time. Both steps must have the same loss. Then peak memory of joint and two-pass
training, each in a fresh process.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MEMBERS, R, ALPHA, VOCABULARY = 8, 8, 0.8, 8000
SHAPES = ((1, 8), (1, 16), (1, 32), (4, 128))


def base(layers: int = 4, width: int = 512):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8, num_hidden_layers=layers)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=8, **sizes)).eval()


def rows(batch: int, length: int) -> list[dict]:
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids} for ids in tokens.tolist()]


def stacked_step(layers=None):
    from interventions import RenyiEnsemble
    from interventions.coupled import joint_gradient

    ensemble = RenyiEnsemble(base(), MEMBERS, ALPHA, R, "all-linear", layers=layers)
    optimizer = torch.optim.AdamW(ensemble.stack.parameters(), lr=1e-4, fused=True)

    def step(data: list[dict]) -> float:
        objective = ensemble._objective(data, "sequence")
        everything = torch.arange(len(data))
        optimizer.zero_grad()
        s = joint_gradient(lambda which: objective.forward(everything, which), MEMBERS, ALPHA)
        optimizer.step()
        return s.mean().item()

    return step, ensemble


def peft_step(ensemble):
    """Adapters equal to the ensemble's members, trained by the loop."""
    import tempfile

    from peft import PeftModel

    from interventions.renyi import renyi_loss

    with tempfile.TemporaryDirectory() as place:
        for member in range(MEMBERS):
            ensemble.stack.save_member(member, f"{place}/{member}", ensemble.hf)
        model = PeftModel.from_pretrained(base(), f"{place}/0", adapter_name="m0", is_trainable=True).eval()
        for member in range(1, MEMBERS):
            model.load_adapter(f"{place}/{member}", f"m{member}", is_trainable=True)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in factors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=True)

    def step(data: list[dict]) -> float:
        tokens = torch.tensor([row["input_ids"] for row in data])
        optimizer.zero_grad()
        s = []
        for member in range(MEMBERS):
            model.set_adapter(f"m{member}")
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
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


def speed(repeats: int) -> None:
    print("| batch x tokens | PEFT loop, CPU ms | stacked, CPU ms | ratio | ratio of best wall times | same loss to |")
    print("|---|---|---|---|---|---|")
    for label, layers in (("all layers", None), ("upper half", [2, 3])):
        ours, ensemble = stacked_step(layers)
        theirs = peft_step(ensemble)
        for shape in SHAPES:
            data, times = rows(*shape), {"peft": [], "stacked": []}
            for _ in range(repeats + 1):
                times["peft"].append(measure(theirs, data))
                times["stacked"].append(measure(ours, data))
            gap = max(abs(a[2] - b[2]) / abs(a[2]) for a, b in zip(times["peft"], times["stacked"], strict=True))
            cpu = {name: statistics.median(run[1] for run in runs[1:]) for name, runs in times.items()}
            wall = {name: min(run[0] for run in runs[1:]) for name, runs in times.items()}
            print(
                f"| {shape[0]} x {shape[1]}, {label} | {1e3 * cpu['peft']:.0f} | {1e3 * cpu['stacked']:.0f} | "
                f"{cpu['peft'] / cpu['stacked']:.1f}x | {wall['peft'] / wall['stacked']:.1f}x | {gap:.0e} |",
                flush=True,
            )


def peak(what: str) -> float:
    """Peak resident MiB that a training step adds, 4 texts of 256 tokens."""
    from interventions import RenyiEnsemble

    members = 1 if what == "one" else MEMBERS
    ensemble = RenyiEnsemble(base(layers=8, width=256), members, ALPHA, R, "all-linear")
    data = rows(4, 256)
    ensemble.fit(rows(1, 8), steps=1, two_pass=what == "two-pass", progress=False)  # optimizer, allocator
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ensemble.fit(data, steps=1, batch_size=4, two_pass=what == "two-pass", progress=False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory() -> None:
    print("\n| training | peak memory of the step, MiB | of one member |")
    print("|---|---|---|")
    found = {}
    for what in ("one", "two-pass", "joint"):
        done = subprocess.run([sys.executable, __file__, "--peak", what], capture_output=True, text=True, check=True)
        found[what] = float(done.stdout.split()[-1])
        name = {"one": "one member", "two-pass": "8 members, two-pass", "joint": "8 members, joint"}[what]
        print(f"| {name} | {found[what]:.0f} | {found[what] / found['one']:.2f}x |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--peak" in sys.argv:
        print(peak(sys.argv[-1]))
    elif "--memory" in sys.argv:
        memory()
    else:
        speed(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
        memory()

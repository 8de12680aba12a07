"""Cost of SIFT against plain Muon: `python tests/benchmarks/bench_sift.py [--device cuda]`. Prints two markdown tables.

Bars: a controlled step at 768 x 768, K=64 costs at most a plain Muon step; over a whole model the gate adds at most 10 %.
Repetitions are interleaved, so that a busy machine slows every row alike; the figures are medians and quartiles.
"""

import argparse
import time
from statistics import median, quantiles

import torch

from interventions import muon
from interventions.sift import SIFT

OPTIONS = dict(lr=1e-3, weight_decay=0.1)


class PlainMuon(torch.optim.Optimizer):
    """One momentum, Newton-Schulz, nothing else: what a step costs without a second objective."""

    def __init__(self, matrices):
        super().__init__(list(matrices), dict(OPTIONS))
        self.momenta = {p: torch.zeros_like(p) for p in matrices}

    @torch.no_grad()
    def step(self):
        groups = {}
        for p, buffer in self.momenta.items():
            groups.setdefault(p.shape, []).append((p, muon.momentum_update(p.grad, buffer, 0.95)))
        for shape, members in groups.items():
            updates = muon.orthogonalize(torch.stack([M for _, M in members]))
            for (p, _), D in zip(members, updates, strict=True):
                p.mul_(1 - 1e-4).add_(D, alpha=-1e-3 * muon.adjustment(*shape, "match_rms_adamw"))


def gradients(model, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).to(device) for name, p in model.named_parameters()}


def timed(candidates, repeats, device):
    """{name: seconds of each repetition}; the first round warms up and is dropped."""
    wall = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, step in candidates.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.process_time() if device == "cpu" else time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                wall[name].append((time.process_time() if device == "cpu" else time.perf_counter()) - start)
    return wall


def table(title, wall, baseline):
    print(f"\n{title}\n\n| step | median ms | quartiles | against {baseline} |\n|---|---|---|---|")
    for name, seconds in wall.items():
        low, _, high = quantiles(seconds, n=4)
        ratio = median(seconds) / median(wall[baseline])
        print(f"| {name} | {1e3 * median(seconds):.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} | {ratio:.3f} |")


def one_matrix(size, K, device, repeats):
    def build():
        layer = torch.nn.Linear(size, size, bias=False).to(device)
        return layer, *(gradients(layer, device, seed) for seed in (0, 1))

    candidates = {}
    layer, f, g = build()
    layer.weight.grad = f["weight"] + g["weight"]
    plain = PlainMuon([layer.weight])
    candidates["plain Muon"] = plain.step
    other, *_ = build()
    other.weight.grad = layer.weight.grad.clone()
    reference = torch.optim.Muon([other.weight], lr=1e-3)
    candidates["torch.optim.Muon (bfloat16)"] = reference.step
    for label, options in {
        "SIFT, gate shut (plain step)": dict(epsilon=-1.1),
        "SIFT, controlled": dict(epsilon=1.1),
        "topk, controlled": dict(epsilon=1.1, control="topk"),
    }.items():
        layer, f, g = build()
        optimizer = SIFT(layer, K=K, **OPTIONS, **options)
        candidates[label] = lambda o=optimizer, f=f, g=g: o.step(objective=f, constraint=g)
    wall = timed(candidates, repeats, device)
    table(
        f"One {size} x {size} matrix, K={K}, {device}, {torch.get_num_threads()} thread(s), n={repeats}",
        wall,
        "plain Muon",
    )


def whole_model(device, repeats, layers):
    """GPT-2 small's blocks; every matrix is gated and none is controlled, so that only the gate is paid for."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build():
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, vocab_size=2048, bos_token_id=0, eos_token_id=0)).to(device)

    model, gated = build(), build()
    f, g = (gradients(model, device, seed) for seed in (0, 1))
    total = {name: f[name] + g[name] for name in f}
    plain, optimizer = SIFT(model, control="sum", **OPTIONS), SIFT(gated, control="sift", epsilon=-1.1, **OPTIONS)
    candidates = {
        "Muon on the summed gradient": lambda: plain.step(objective=total),
        "SIFT, gate measured, never triggered": lambda: optimizer.step(objective=f, constraint=g),
    }
    wall = timed(candidates, repeats, device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    table(
        f"{layers} layers of GPT-2 small ({count:.0f} M parameters), {device}, n={repeats}",
        wall,
        "Muon on the summed gradient",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    one_matrix(768, 64, arguments.device, arguments.repeats)
    whole_model(arguments.device, arguments.repeats, arguments.layers)

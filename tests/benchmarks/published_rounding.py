"""How far the published CD-T algorithm is from its own numbers when its input moves by one rounding. Prints a table.

    python tests/benchmarks/published_rounding.py cdt_gpt2.safetensors [--repeats 40]

Written from the rules (docs/cdt.md), with both streams carried as the paper has it, in float32 on the file's small GPT-2. Every
source is a single (layer, position, head) node. The noise adds -1, 0 or +1 unit roundoff to each entry of the token embeddings.
The published guard |Wβ| + |Wγ| + 1e-8 loses the share 1e-8 / (|Wγ| + 1e-8) of a bias where nothing relevant has arrived: one
unit of the third prompt has |Wγ| of about 5e-9, far below the rounding of the sum it is made of, so the share is noise.
"""

import argparse

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

LAYERS, HEADS, D_HEAD, LENGTH = 3, 4, 8, 10
GUARD = 1e-8  # the published code's guard against 0 / 0, and its LayerNorm epsilon
Pair = tuple[Tensor, Tensor]  # relevant, rest


def split_bias(pair: Pair, weighed_by: Pair, bias: Tensor) -> Pair:
    sizes = [part.abs() for part in weighed_by]
    whole = sizes[0] + sizes[1] + GUARD
    return pair[0] + bias * (sizes[0] / whole), pair[1] + bias * (sizes[1] / whole)


def linear(pair: Pair, weight: Tensor, bias: Tensor) -> Pair:
    moved = (pair[0] @ weight, pair[1] @ weight)
    return split_bias(moved, moved, bias)


def norm(pair: Pair, weight: Tensor, bias: Tensor) -> Pair:
    total = pair[0] + pair[1]
    variance = (total**2).mean(-1, keepdim=True) - total.mean(-1, keepdim=True) ** 2
    deviation = torch.sqrt(variance + GUARD)
    scaled = [(part - part.mean(-1, keepdim=True)) / deviation * weight for part in pair]
    return split_bias((scaled[0], scaled[1]), pair, bias)


def stabilise(pair: Pair) -> Pair:
    relevant, rest = pair
    opposed, larger = relevant * rest < 0, relevant.abs() >= rest.abs()
    total, nothing = relevant + rest, torch.zeros_like(relevant)
    return (
        torch.where(opposed, torch.where(larger, total, nothing), relevant),
        torch.where(opposed, torch.where(larger, nothing, total), rest),
    )


def gelu(pair: Pair) -> Pair:
    act = lambda x: functional.gelu(x, approximate="tanh")  # noqa: E731
    unmoved = act(pair[1])
    return act(pair[0] + pair[1]) - unmoved, unmoved


def attention(projected: Pair) -> Pair:
    (q, k, v), (q_rest, k_rest, v_rest) = (
        [x.unflatten(-1, (HEADS, D_HEAD)).transpose(-2, -3) for x in part.chunk(3, -1)] for part in projected
    )
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    pattern = lambda q, k: (q @ k.mT / D_HEAD**0.5).masked_fill(future, -1e5).softmax(-1)  # noqa: E731
    z = pattern(q, k) @ v
    return z, pattern(q + q_rest, k + k_rest) @ (v + v_rest) - z


def decompose(facts: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Relevant logits at the last position, [layer, position, head, prompt, vocabulary]."""
    w = {name.removeprefix("weights.").removeprefix("transformer."): value for name, value in facts.items()}
    nodes = [(layer, place, head) for layer in range(LAYERS) for place in range(LENGTH) for head in range(HEADS)]
    x = (w["wte.weight"][facts["tokens"]] + w["wpe.weight"][:LENGTH]) * (1 + noise)
    rest = x.expand(len(nodes), *x.shape)
    relevant = torch.zeros_like(rest)
    for layer in range(LAYERS):
        at = lambda name: (w[f"h.{layer}.{name}.weight"], w[f"h.{layer}.{name}.bias"])  # noqa: B023, E731
        z, z_rest = attention(linear(norm((relevant, rest), *at("ln_1")), *at("attn.c_attn")))
        for source, (source_layer, place, head) in enumerate(nodes):
            if source_layer == layer:
                total, mean = (
                    z[source, :, head, place] + z_rest[source, :, head, place],
                    facts["mean_z"][layer, place, head],
                )
                z[source, :, head, place], z_rest[source, :, head, place] = total - mean, mean
        merged = (z.transpose(-2, -3).flatten(-2), z_rest.transpose(-2, -3).flatten(-2))
        written = linear(merged, *at("attn.c_proj"))
        middle = (relevant + written[0], rest + written[1])
        hidden = gelu(stabilise(linear(norm(middle, *at("ln_2")), *at("mlp.c_fc"))))
        down = stabilise(linear(hidden, *at("mlp.c_proj")))
        relevant, rest = stabilise((middle[0] + down[0], middle[1] + down[1]))
    last = norm((relevant, rest), *(w["ln_f.weight"], w["ln_f.bias"]))[0][:, :, -1]
    return (last @ w["lm_head.weight"].T).unflatten(0, (LAYERS, LENGTH, HEADS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    facts = load_file(options.file)
    theirs = facts["node_relevant_logits_last"]
    distances = []
    for seed in range(options.repeats):
        signs = torch.randint(
            -1, 2, (*facts["tokens"].shape, HEADS * D_HEAD), generator=torch.Generator().manual_seed(seed)
        )
        off = decompose(facts, signs * 2.0**-24) - theirs
        distances.append(
            [(off[..., p, :].norm() / theirs[..., p, :].norm()).item() for p in range(4)]
            + [(off.norm() / theirs.norm()).item()]
        )
    spread = torch.tensor(distances)
    print(
        f"| distance from the published numbers, {options.repeats} inputs one rounding apart | least | median | most |"
    )
    print("|---|--:|--:|--:|")
    for column, name in enumerate(["prompt 0", "prompt 1", "prompt 2", "prompt 3", "all four"]):
        values = spread[:, column]
        print(f"| {name} | {values.min():.1e} | {values.median():.1e} | {values.max():.1e} |")


if __name__ == "__main__":
    main()

"""What has to hold for every family: relevant + rest = activation, exact = mean ablation inside too, batches, pads, bfloat16."""

import pytest
import torch
from test_cdt import SOURCES, ablated, means_of, relative

from circuits import Node, decomposition, load, record
from circuits.cdt import decompose
from circuits.families import read
from circuits.propagation import propagate
from circuits.streams import Relevant, Totals, attend, finish
from circuits.trace import Batch, trace

from models import FAMILIES, ragged, shared_tiny, tiny

EVERY = (*FAMILIES, "phi3")
RULES = ("paper", "frozen", "exact")
SITES = ("z", "q", "k", "v")


@torch.no_grad()
def inside(model, tokens, mask, sources, means, rules) -> dict:
    """(layer, site) -> β [source, batch, position, head, d_head] and the total, in layers 1 and 2."""
    found: dict = {}
    rows = torch.arange(tokens.shape[1]).expand_as(tokens)

    def measure(layer, site, beta, total, indices, examples):
        whole = found.setdefault((layer, site), [beta.new_zeros(len(sources), *beta.shape[1:]), total])
        whole[0][indices] = beta

    wanted = {1: SITES, 2: SITES}
    propagate(read(model.hf), Batch(tokens, mask, rows), sources, means, rules, None, wanted, measure)
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", EVERY)
def test_exact_is_mean_ablation_at_every_site_of_later_heads(family, side):
    """β + (the same vector in the ablated run) = the vector in the ordinary run, at z, q, k and v."""
    model, means = shared_tiny(family), means_of(shared_tiny(family))
    tokens, mask = model.pad(ragged(), side)
    sources, real = [[Node(0, 1)], [Node(0, 2), Node(1, 0)]], mask.bool()
    found = inside(model, tokens, mask, sources, means, "exact")
    for (layer, site), (beta, total) in found.items():
        with torch.no_grad(), record(model, site, [layer]) as clean:
            model(tokens, mask)
        assert relative(total[real], clean[layer][real]) < 1e-5
        for index, source in enumerate(sources):
            if (layer, site, index) == (1, "z", 1):
                continue  # that head is itself replaced
            with record(model, site, [layer]) as rest:
                ablated(model, tokens, mask, source, means)
            assert relative((beta[index] + rest[layer])[real], clean[layer][real]) < 1e-5
            if layer == 2 or site == "z":
                assert (beta[index][real]).norm() > 1e-3 * clean[layer][real].norm()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", EVERY)
def test_a_source_that_differs_from_nothing_has_no_relevance(family, rules):
    """z of one example as its own mean: relevant 0, rest everything, at every site and at the logits, for every rule."""
    model, tokens = shared_tiny(family), torch.tensor(ragged(1))
    with torch.no_grad(), record(model, "z") as z:
        model(tokens)
    means, mask = z.stack()[:, 0], torch.ones_like(tokens)
    for (layer, site), (beta, total) in inside(model, tokens, mask, [SOURCES[0]], means, rules).items():
        with torch.no_grad(), record(model, site, [layer]) as activation:
            model(tokens)
        assert beta.norm() < 1e-5 * total.norm()
        assert relative(total, activation[layer]) < 1e-5  # what the rest is taken from
    with torch.no_grad():
        logits = model(tokens)
    assert decompose(model, tokens, SOURCES, means, rules, positions=[-1]).norm() < 1e-5 * logits.norm()


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", EVERY)
def test_when_everything_is_relevant_so_is_everything_that_follows(family, side):
    """The other end of the sum rule: with no rest, the published rules make a block's whole output of its whole input.

    To 1e-4, not 1e-5: where W β happens to be near 0 the published guard of 1e-8 keeps some of the bias back.
    """
    model = shared_tiny(family)
    tokens, mask = model.pad(ragged(), side)
    program, real = read(model.hf), mask.bool()
    run = trace(program, Batch(tokens, mask, tokens))
    ends = [*(record["x"] for record in run.records[1:]), run.final]
    for layer, (block, end) in enumerate(zip(program.blocks, ends, strict=True)):
        frame, x = run.frame(layer), run.records[layer]["x"]
        verbs = Relevant(decomposition.RULES["paper"], Totals(run.records[layer], frame))
        z, _ = attend(block, x[None], frame, verbs)
        assert relative(z[0][real], run.records[layer]["z"][real]) < 1e-4
        assert relative(finish(block, x[None], z, frame, verbs)[0][real], end[real]) < 1e-4


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", EVERY)
def test_batching_and_padding_change_nothing(family, rules):
    model = shared_tiny(family)
    means = means_of(model)
    sources = [[Node(0, 1)], [Node(0, 2, -1)], [Node(1, 3)], [Node(2, 0, -2)]]
    rows = ragged()
    alone = torch.cat([decompose(model, torch.tensor([r]), sources, means, rules, positions=[-1]) for r in rows], 1)
    for side, batch_size in (("right", None), ("right", 5)) if model.is_encoder else (("right", None), ("left", 5)):
        tokens, mask = model.pad(rows, side)
        both = decompose(model, tokens, sources, means, rules, [-1], attention_mask=mask, batch_size=batch_size)
        assert relative(both, alone) < 2e-5


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", EVERY)
def test_bfloat16_agrees_with_float32(family, rules):
    half, whole = load(tiny(family).bfloat16()), load(tiny(family).bfloat16().float())
    tokens, means = torch.tensor(ragged(2, (9, 9))), means_of(half)
    rough, fine = (decompose(m, tokens, SOURCES, means, rules, positions=[-1]) for m in (half, whole))
    assert rough.dtype == torch.float32 and torch.isfinite(rough).all()
    assert torch.nn.functional.cosine_similarity(rough.flatten(), fine.flatten(), dim=0) > 0.98

"""Readings of β at a target head, against patching one vector by hooks; and discovery through queries, keys and values."""

import pytest
import torch
from test_cdt import ablated
from test_discovery import TokenTask

from circuits import Circuit, Head, Node, discover, head_to_head, load, record, rewrite
from circuits.families import read
from circuits.means import mean_activations
from circuits.targets import effect, share, slopes, target_scores, written

from models import shared_tiny, tiny


class OneRow(TokenTask):
    """One example, for means that lie next to it."""

    def __init__(self, columns):
        super().__init__(columns=columns, n=1)


def margin_with(model, encoded, site: str, layer: int, index: int, vector) -> torch.Tensor:
    """The margin when one head's vector at one site is `vector` [batch, position, d_head]."""

    def patch(x, _):
        x = x.clone()
        x[:, :, index] = vector
        return x

    with torch.no_grad(), rewrite(model, site, patch, [layer]):
        logits = model.logits(encoded.tokens, encoded.attention_mask, encoded.readout, encoded.columns)
    return encoded.margin(logits)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "neox", "bert-classifier"])
def test_effect_is_what_patching_that_vector_does(family):
    """A source moved by little (not less: some norms work in float32), where the first order is nearly all."""
    model = load(tiny(family).double())
    task = OneRow((0, 1, 2) if model.kind == "classifier" else (5, 9, 11))
    encoded, source, target = task.encode(model), Head(0, 2), Head(1, 3)
    with torch.no_grad(), record(model, "z") as z:
        model.hidden(encoded.tokens, encoded.attention_mask)
    noise = torch.randn(z.stack()[:, 0].shape, generator=torch.Generator().manual_seed(0)).double()
    means = z.stack()[:, 0] + 3e-4 * noise
    for site in ("z", "q", "k", "v"):
        index = model.anatomy.kv_head(3) if site in "kv" else 3
        with torch.no_grad(), record(model, site, [1]) as clean:
            whole = model.logits(encoded.tokens, encoded.attention_mask, encoded.readout, encoded.columns)
        with torch.no_grad(), record(model, site, [1]) as changed:
            ablated(model, encoded.tokens, encoded.attention_mask, [Node(*source)], means)
        patched = margin_with(model, encoded, site, 1, index, changed[1][:, :, index])
        assert not torch.equal(clean[1], changed[1])
        options = ([[Node(*source)]], [target], means, "exact", (site,), "effect")
        found = target_scores(read(model.hf), model, encoded, *options).squeeze()
        torch.testing.assert_close(found.double(), (encoded.margin(whole) - patched).squeeze(), rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "bert-classifier"])
def test_slopes_of_a_batch_are_those_of_its_rows_and_zero_at_pads(family):
    model = shared_tiny(family)
    encoded = TokenTask(columns=(0, 1, 2) if model.kind == "classifier" else (5, 9, 11)).encode(model)
    together = slopes(model, encoded, {1: ("z", "k")})
    assert set(together) == {(1, "z"), (1, "k")}
    for i in range(len(encoded)):
        alone = slopes(model, encoded.select([i]).trimmed(), {1: ("z", "k")})
        real = encoded.attention_mask[i].bool()
        for key, slope in together.items():
            torch.testing.assert_close(slope[i, real], alone[key][0], atol=1e-5, rtol=1e-4)
            assert slope[i, ~real].abs().sum() == 0
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_readings_by_arithmetic():
    beta = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]])  # one source, one example, two positions
    slope = torch.tensor([[[1.0, 1.0], [2.0, 5.0]]])
    assert effect(beta, slope).item() == 1 + 2 + 6
    total, real = torch.tensor([[[1.0, 2.0], [6.0, 0.0]]]), torch.tensor([[1.0, 1.0]])
    assert share(beta, total, real).item() == pytest.approx((5 + 18) / (5 + 36))
    assert share(beta, total, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1.0)
    W_O, direction = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.6, 0.8]])
    assert written(beta[:, :, 0], W_O, direction).item() == pytest.approx(0.6 * 1 + 0.8 * 4)


@pytest.mark.parametrize("score", ["effect", "share"])
def test_several_sites_add_up(score):
    model, task = shared_tiny("gpt2"), TokenTask()
    graphs = {site: head_to_head(model, task, site=site, score=score, progress=False) for site in ("q", "k", "v")}
    means, encoded = mean_activations(model, task), task.encode(model)
    nodes, targets = [[Node(*head)] for head in model.anatomy.heads()], model.anatomy.heads()
    with torch.no_grad():
        both = target_scores(read(model.hf), model, encoded, nodes, targets, means, "exact", ("q", "k", "v"), score)
    torch.testing.assert_close(both.mean(-1), sum(graph.values for graph in graphs.values()), atol=1e-5, rtol=1e-4)
    assert all(graph.values.abs().sum() > 0 for graph in graphs.values())
    assert not torch.allclose(graphs["q"].values, graphs["k"].values, atol=1e-3)


def test_discovery_through_queries_and_keys_ranks_by_their_effect():
    model, task = shared_tiny("gpt2"), TokenTask()
    circuit = discover(model, task, depth=1, per_depth=2, through=("q", "k"), progress=False)
    first, second = ([Head.parse(name) for name in step["heads"]] for step in circuit.provenance["steps"])
    graphs = [head_to_head(model, task, site=s, score="effect", targets=first, progress=False) for s in ("q", "k")]
    fed = sum(graph.values for graph in graphs).mean(1)
    upstream = [h for h in model.anatomy.heads() if h.layer < max(t.layer for t in first) and h not in first]
    order = sorted(upstream, key=lambda head: -float(fed[model.anatomy.heads().index(head)]))
    assert Circuit(second) == Circuit(order[:2])
    values = circuit.provenance["steps"][1]["heads"]
    assert values == pytest.approx({str(h): float(fed[model.anatomy.heads().index(h)]) for h in second}, rel=1e-4)
    assert circuit.provenance["options"]["through"] == ["q", "k"]
    assert circuit.provenance["options"]["score"] == "effect"
    with pytest.raises(ValueError, match="score='answer' needs site 'z'"):
        discover(model, task, through=("q",), score="answer", progress=False)
    with pytest.raises(ValueError, match="score='best'; expected 'answer', 'effect' or 'share'"):
        discover(model, task, score="best", progress=False)
    with pytest.raises(ValueError, match="site nothing; expected"):
        discover(model, task, through=(), progress=False)

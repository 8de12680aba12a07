"""Head-to-head relevance against hooks: ablate the source, read the target's q, k, v and z."""

import pytest
import torch
from test_cdt import ablated
from test_discovery import TokenTask

from circuits import Circuit, Head, record, relevance
from circuits.carrier import Node
from circuits.head_graph import HeadGraph, head_to_head
from circuits.means import mean_activations

from models import shared_tiny


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "neox", "bert-classifier"])
def test_shares_at_every_site_are_the_change_under_ablation(family):
    model = shared_tiny(family)
    task = TokenTask(columns=(0, 1, 2) if model.kind == "classifier" else (5, 9, 11), n=3)
    encoded, source, target = task.encode(model), Head(0, 2), Head(2, 3)
    means, rows = mean_activations(model, task), torch.arange(3)
    for site in ("z", "q", "k", "v"):
        with torch.no_grad(), record(model, site, [2]) as clean:
            model(encoded.tokens, encoded.attention_mask)
        with torch.no_grad(), record(model, site, [2]) as changed:
            ablated(model, encoded.tokens, encoded.attention_mask, [Node(*source)], means)
        head = model.anatomy.kv_head(3) if site in "kv" else 3
        whole, beta = clean[2][:, :, head], (clean[2] - changed[2])[:, :, head]
        if site in "zq":
            whole, beta = (x[rows, encoded.readout][:, None] for x in (whole, beta))
            real = torch.ones(3, 1)
        else:
            real = encoded.attention_mask.float()
        expected = (((beta * whole).sum(-1) * real).sum(-1) / (whole.pow(2).sum(-1) * real).sum(-1)).mean()
        graph = head_to_head(model, task, site=site, score="share", progress=False)
        assert graph[source, target] == pytest.approx(float(expected), rel=1e-4, abs=1e-7)
        assert graph[target, source] == 0


@pytest.mark.parametrize("rules", ["paper", "frozen", "exact"])
def test_answer_column_is_relevance_to_that_head(rules):
    model, task = shared_tiny("gpt2"), TokenTask()
    graph = head_to_head(model, task, rules=rules, progress=False)
    scores = relevance(model, task, targets=[Head(2, 1)], rules=rules, progress=False)
    column = graph.values[:, graph.targets.index(Head(2, 1))].view(3, 4)
    torch.testing.assert_close(column, scores.values, atol=1e-6, rtol=1e-4)


def test_edges_and_files(tmp_path):
    model, task = shared_tiny("llama"), TokenTask()
    graph = head_to_head(model, task, targets=[Head(1, 0), Head(2, 1)], progress=False)
    circuit = Circuit([Head(0, 0), Head(1, 0), Head(2, 1)])
    assert set(graph.edges(circuit)) == {(Head(0, 0), Head(1, 0)), (Head(0, 0), Head(2, 1)), (Head(1, 0), Head(2, 1))}
    sizes = [abs(v) for v in graph.edges(k=7).values()]
    assert len(sizes) == 7 and sizes == sorted(sizes, reverse=True)
    graph.save(tmp_path / "graph")
    again = HeadGraph.load(tmp_path / "graph")
    assert torch.equal(again.values, graph.values) and again.targets == graph.targets and again.site == "z"


def test_bad_sites_are_named():
    with pytest.raises(ValueError, match="expected 'z', 'q', 'k' or 'v'"):
        head_to_head(shared_tiny("llama"), TokenTask(), site="attn", progress=False)
    with pytest.raises(ValueError, match="use score='effect'"):
        head_to_head(shared_tiny("llama"), TokenTask(), site="q", score="answer", progress=False)

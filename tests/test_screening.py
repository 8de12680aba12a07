"""Screening: its estimate is attribution patching, and what it hands on changes no score."""

import pytest
import torch
from test_discovery import TokenTask

from circuits import Head, gradient, load, relevance
from circuits.families import read
from circuits.means import mean_activations
from circuits.screening import shortlist, shortlist_size

from models import FAMILIES, shared_tiny, tiny


def task_for(model, side="right"):
    return TokenTask(side, columns=(0, 1, 2) if model.kind == "classifier" else (5, 9, 11))


@torch.no_grad()
def shortlisted(model, task, size, means, rules="exact", batch_size=None, memory=2**29):
    return shortlist(
        read(model.hf), model, task.encode(model), model.anatomy.heads(), size, means, rules, batch_size, memory
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shortlist_has_the_largest_slopes(family, side):
    model = shared_tiny(family)
    if model.is_encoder and side == "left":
        pytest.skip("encoders are padded on the right")
    task = task_for(model, side)
    before = [parameter.grad for parameter in model.hf.parameters()]  # other tests share this model
    for per_position in (False, True):
        means = mean_activations(model, task, per_position=per_position)
        heads, runs = shortlisted(model, task, 5, means, batch_size=9)
        assert heads == sorted(gradient(model, task, reference=means, progress=False).top(5, by="magnitude"))
        assert [len(run.batch.tokens) for run in runs] == [1] * 6
    assert all(now.grad is was for now, was in zip(model.hf.parameters(), before, strict=True))
    assert all(not module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("rules", ["exact", "frozen", "paper"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bert-classifier"])
def test_only_the_shortlist_is_decomposed_and_scores_as_ever(family, rules):
    model = shared_tiny(family)
    task = task_for(model)
    full = relevance(model, task, rules=rules, progress=False)
    for options in ({}, {"batch_size": 7}, {"memory": 200_000}):
        screened = relevance(model, task, rules=rules, screen=5, progress=False, **options)
        done = screened.values != 0
        assert done.sum() == 5 and screened.options["screened"] == 5
        torch.testing.assert_close(screened.examples[:, done], full.examples[:, done], atol=2e-6, rtol=1e-4)


def test_runs_are_handed_on_while_they_fit():
    model, task = shared_tiny("llama"), TokenTask()
    means = mean_activations(model, task)
    one = 9 * 4 * (32 + 32) * 3  # tokens x bytes x (block input + z) x layers
    for memory, kept in ((10 * one, 6), (2 * one + 1, 2), (one - 1, 0)):
        assert len(shortlisted(model, task, 5, means, batch_size=1, memory=memory)[1]) == kept
    assert shortlisted(model, task, 5, means, "frozen")[1] == []


def test_only_the_chosen_sources_compete():
    model, task = shared_tiny("llama"), TokenTask()
    some = [Head(2, head) for head in range(4)]
    scores = relevance(model, task, sources=some, screen=0.5, progress=False)
    assert (scores.values[2] != 0).sum() == 2 and scores.values[:2].abs().sum() == 0


def test_what_cannot_be_screened_is_refused():
    model, task = shared_tiny("llama"), TokenTask()
    assert [shortlist_size(size, 144) for size in (0.1, 12, 0.0001)] == [14, 12, 1]
    for screen in (0, 13, 1.5):
        with pytest.raises(ValueError, match=f"screen={screen}; expected a share of the 12 heads"):
            relevance(model, task, screen=screen, progress=False)
    with pytest.raises(ValueError, match="with targets= leave it out"):
        relevance(model, task, screen=0.5, targets=[Head(2, 0)], progress=False)
    odd = load(tiny("llama"))
    inner = odd.hf.model.layers[1].mlp.forward
    odd.hf.model.layers[1].mlp.forward = lambda x: inner(x) * 1.1
    with pytest.raises(ValueError, match="block 1 computes something that is not known here"):
        relevance(odd, task, screen=0.5, progress=False)

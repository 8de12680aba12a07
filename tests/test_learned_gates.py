"""Learned gates on models whose working heads were built in, and the score by arithmetic."""

import pytest
import torch
from micro_models import KNOWN, MicroTask, micro
from test_discovery import TokenTask

from circuits import Head, learned_gates, load
from circuits.gates import _loss, gate_score
from circuits.means import mean_activations

from models import shared_tiny


@pytest.mark.parametrize("name", KNOWN)
def test_gates_keep_the_heads_that_were_built_in(name):
    model, task = load(micro(name)), MicroTask(name, 24)
    weights = [p.clone() for p in model.hf.parameters()]
    options = dict(steps=60, means="corrupted", per_position=True, progress=False)
    scores = learned_gates(model, task, **options)
    assert scores.top(2) == KNOWN[name]
    assert scores.values.abs().max() <= 1
    others = [scores[head] for head in model.anatomy.heads() if head not in KNOWN[name]]
    assert min(scores[head] for head in KNOWN[name]) > 0.1 > max(others)
    assert torch.equal(learned_gates(model, task, **options).values, scores.values)
    assert all(map(torch.equal, weights, model.hf.parameters()))
    assert all(not module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "bert-classifier", "llama-classifier"])
def test_gates_need_no_pairs_and_work_for_grouped_heads_and_classifiers(family):
    """With the half that scores highest left open the task's loss is lower than with the other half left open."""
    model = shared_tiny(family)
    task = TokenTask(columns=(0, 1, 2) if model.kind == "classifier" else (5, 9, 11))
    scores = learned_gates(model, task, steps=60, sparsity=0.05, progress=False)
    assert scores.values.shape == (3, 4) and scores.task == "tokens" and scores.values.abs().max() <= 1
    upper = (scores.values > scores.values.median()).float()
    means, encoded = mean_activations(model, task), task.encode(model)
    losses = [_loss(model, encoded, gates, means).item() for gates in (upper, 1 - upper)]
    assert losses[0] < losses[1]


def test_means_per_position_matter():
    """The pointer's first head acts at the last position: an average over all positions is not what it replaces."""
    model, task = load(micro("pointer")), MicroTask("pointer", 24)
    options = dict(steps=20, means="corrupted", progress=False)
    pooled, apart = (learned_gates(model, task, per_position=p, **options).values for p in (False, True))
    assert not torch.allclose(pooled, apart, atol=1e-3)


def test_score_by_arithmetic():
    needed, harmless = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert gate_score(needed, harmless).tolist() == [[1, 0, -1]]  # needed, does not matter, harmful


def test_bad_input_says_what_was_expected():
    model, task = load(micro("pointer")), MicroTask("pointer", 4)
    with pytest.raises(ValueError, match="steps=0, sparsity=0.5; expected at least one step"):
        learned_gates(model, task, steps=0)
    with pytest.raises(ValueError, match="sparsity=-1.0; expected at least one step and a positive weight"):
        learned_gates(model, task, sparsity=-1.0)
    assert KNOWN["pointer"].heads == {Head(0, 3), Head(1, 0)}

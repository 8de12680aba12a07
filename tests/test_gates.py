"""Learned gates: they find the heads a task needs on a model where that is known, and leave the weights alone."""

import pytest
import torch
from test_discovery import TokenTask

from circuits import Head, load
from circuits.gates import gate_score, learned_gates

from models import tiny


def test_score_is_plus_one_for_needed_minus_one_for_harmful_heads():
    needed, harmless = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert gate_score(needed, harmless).tolist() == [[1.0, 0.0, -1.0]]


def test_heads_that_write_nothing_are_irrelevant():
    model = load(tiny("llama"))
    dead = [Head(0, 1), Head(1, 2), Head(2, 3)]
    for layer, head in dead:
        o = model.anatomy.module(model.hf, layer, "o")
        o.weight.data[:, head * 8 : head * 8 + 8] = 0
    before = [p.clone() for p in model.hf.parameters()]
    scores = learned_gates(model, TokenTask(), steps=25, lr=0.6, sparsity=0.5, progress=False)
    assert all(abs(scores[head]) < 0.05 for head in dead)
    assert scores.values.abs().max() > 0.3 and scores.values.abs().max() <= 1
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.hf.parameters(), strict=True))
    again = learned_gates(model, TokenTask(), steps=25, lr=0.6, sparsity=0.5, progress=False)
    assert torch.equal(scores.values, again.values)


def test_bad_options():
    with pytest.raises(ValueError, match="positive weight"):
        learned_gates(load(tiny("llama")), TokenTask(), sparsity=0.0)

"""Totals: the explicit program is the model, block by block and at the logits; so β and γ = total - β sum to the activation."""

import pytest
import torch

from circuits.families import read
from circuits.streams import Values, attend, finish, read_out
from circuits.trace import Batch, trace

from models import FAMILIES, ragged, shared_tiny


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
def test_the_program_is_the_model(family):
    model = shared_tiny(family)
    tokens, mask = model.pad(ragged(), "right")
    rows = model.pooled_position(tokens, mask)[:, None]
    program, real = read(model.hf), mask.bool()
    run = trace(program, Batch(tokens, mask, rows))
    for layer, block in enumerate(program.blocks):
        frame, x = run.frame(layer), run.records[layer]["x"][None]
        z, _ = attend(block, x, frame, Values())
        out = finish(block, x, z, frame, Values())[0][real]
        after = (run.records[layer + 1]["x"] if layer + 1 < len(program.blocks) else run.final)[real]
        assert (out - after).norm() < 1e-5 * after.norm()
    logits = read_out(program.unembedding, run.final[torch.arange(3)[:, None], rows][None], None, Values())[0, :, 0]
    expected = model(tokens, mask)
    expected = expected if model.kind == "classifier" else expected[torch.arange(3), rows[:, 0]]
    assert (logits - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_no_hook_survives():
    model = shared_tiny("llama")
    blocks = model.hf.model.layers
    with pytest.raises(IndexError):
        trace(
            read(model.hf),
            Batch(torch.tensor([[9999]]), torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)),
        )
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)

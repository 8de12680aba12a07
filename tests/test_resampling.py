"""Resample ablation without twins, against one donor at a time, unpadded, aligned by hand."""

import pytest
import torch

from circuits import Circuit, Head, ablation, faithfulness, record, rewrite
from circuits.resampling import donors, with_donors

from models import TokenTask, shared_tiny


def test_donors_form_one_cycle():
    giver = donors(7, seed=3).tolist()
    seen, at = [], 0
    for _ in range(7):
        seen.append(at)
        at = giver[at]
    assert at == 0 and sorted(seen) == list(range(7))
    assert donors(7, seed=3).tolist() == giver != donors(7, seed=4).tolist()


def alone(encoded, row):
    """A row's real tokens, and where its answer is read."""
    real = encoded.attention_mask[row].bool()
    return encoded.tokens[row][real][None], int(encoded.readout[row] - real.int().argmax())


def margin_with_donor(model, encoded, row, giver, heads):
    tokens, readout = alone(encoded, row)
    given, given_readout = alone(encoded, giver)
    with torch.no_grad(), record(model, "z") as donor:
        model.hidden(given, torch.ones_like(given))
    places = [min(max(p - readout + given_readout, 0), given.shape[1] - 1) for p in range(tokens.shape[1])]

    def swap(z, layer):
        z = z.clone()
        for head in heads:
            if head.layer == layer:
                z[:, :, head.head] = donor[layer][:, places, head.head]
        return z

    with torch.no_grad(), rewrite(model, "z", swap):
        logits = model.logits(tokens, torch.ones_like(tokens), torch.tensor([readout]), encoded.columns)
    return float(encoded.select([row]).margin(logits))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bert", "bert-classifier"])
def test_heads_take_z_from_another_example_counted_from_the_readout(family, side):
    model, task = shared_tiny(family), TokenTask(side, n=5)
    encoded = task.encode(model)
    assert encoded.attention_mask.sum(1).unique().numel() > 1  # ragged, or alignment is not tested
    found = ablation(model, task, ablate="resample", batch_size=6, progress=False).examples
    kept = Circuit([Head(0, 1), Head(2, 0)])
    curve = faithfulness(model, task, kept, ablate="resample", controls=0, progress=False)
    rest = [head for head in model.anatomy.heads() if head not in kept]
    for row, giver in enumerate(donors(5).tolist()):
        clean = margin_with_donor(model, encoded, row, giver, [])
        without = margin_with_donor(model, encoded, row, giver, [Head(1, 2)])
        assert found[row, 1, 2].item() == pytest.approx(clean - without, abs=2e-5)
        assert curve.margins[0, row].item() == pytest.approx(
            margin_with_donor(model, encoded, row, giver, rest), abs=2e-5
        )


def test_one_example_has_no_donor():
    with pytest.raises(
        ValueError, match="takes z from another example, and there is only one; give more, or ablate='mean'"
    ):
        with_donors(TokenTask(n=1).encode(shared_tiny("gpt2")))

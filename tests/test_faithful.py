"""Faithfulness is checked against running the circuit by hand, and where its value is known: 0, 1, and by arithmetic."""

import pytest
import torch

from circuits import Circuit, FaithfulnessCurve, Head, HeadScores, ablation, faithfulness, mean_activations, rewrite
from circuits.faithful import normalise

from models import TokenTask, shared_tiny

CIRCUIT = [Head(0, 1), Head(1, 0), Head(2, 2), Head(2, 3)]


@pytest.fixture(scope="module")
def curve():
    model, task = shared_tiny("llama"), TokenTask(n=6)
    scores = ablation(model, task, progress=False)
    return faithfulness(model, task, scores, sizes=[0, 2, 5, 12], controls=3, progress=False)


def kept_by_hand(model, encoded, means, circuit):
    """Plain forward with z of every other head overwritten."""

    def overwrite(z, layer):
        z = z.clone()
        for head in range(z.shape[2]):
            if Head(layer, head) not in circuit:
                z[:, :, head] = means[layer, head]
        return z

    with torch.no_grad(), rewrite(model, "z", overwrite):
        logits = model.logits(encoded.tokens, encoded.attention_mask, encoded.readout, encoded.columns)
    return encoded.margin(logits), encoded.predict(logits) == encoded.gold


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox", "bert", "llama-classifier"])
def test_a_circuit_alone_is_what_overwriting_the_rest_does(family):
    model, task = shared_tiny(family), TokenTask("left", n=6)
    encoded, means = task.encode(model), mean_activations(model, task)
    found = faithfulness(model, task, Circuit(CIRCUIT), controls=0, batch_size=4, progress=False)
    margin, correct = kept_by_hand(model, encoded, means, CIRCUIT)
    nothing, _ = kept_by_hand(model, encoded, means, [])
    everything, _ = kept_by_hand(model, encoded, means, model.anatomy.heads())
    assert torch.allclose(found.margins[0], margin, atol=2e-5)
    assert torch.equal(found.correct[0], correct)
    expected = (margin.mean() - nothing.mean()) / (everything.mean() - nothing.mean())
    assert found.faithfulness[0].item() == pytest.approx(expected.item(), abs=1e-3)


def test_no_heads_keep_nothing_and_all_heads_keep_everything(curve):
    assert curve.sizes.tolist() == [0, 2, 5, 12]
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-6)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-6)
    assert torch.equal(curve.correct[-1], curve.full_correct)
    assert curve.accuracy_kept[-1] == pytest.approx(1)


def test_controls_have_the_circuits_shape(curve):
    assert curve.random.shape == (3, 4)
    assert curve.random[:, 0].abs().max() < 1e-6  # no heads, whichever draw
    assert (curve.random[:, -1] - 1).abs().max() < 1e-6  # all heads, whichever draw
    assert curve.random[:, 1:3].std(0).max() > 0
    assert curve.near_zero[-1] == pytest.approx(1, abs=1e-6)
    assert curve.circuit(2) == Circuit(curve.circuit(2).heads, 3, 4)
    with pytest.raises(ValueError, match=r"no circuit of 3 heads was measured; expected one of \[0, 2, 5, 12\]"):
        curve.circuit(3)


def test_zero_and_resample_are_other_references():
    model, task = shared_tiny("llama"), TokenTask(n=6, twins=True)
    ways = ("mean", "zero", "resample")
    found = [faithfulness(model, task, Circuit(CIRCUIT), ablate=way, controls=0, progress=False) for way in ways]
    assert torch.allclose(found[0].full, found[1].full, atol=1e-5)
    assert len({round(f.margins.sum().item(), 4) for f in found}) == 3
    # With every head resampled the twin's z goes everywhere: check it against the same patch by hand.
    encoded = task.encode(model)
    from circuits import record

    with torch.no_grad(), record(model, "z") as twin:
        model.hidden(encoded.corrupted.tokens, encoded.corrupted.attention_mask)
    with torch.no_grad(), rewrite(model, "z", lambda z, layer: twin[layer]):
        logits = model.logits(encoded.tokens, encoded.attention_mask, encoded.readout, encoded.columns)
    assert torch.allclose(found[2].empty, encoded.margin(logits), atol=2e-5)


def test_means_per_position_stand_in_at_their_position():
    model, task = shared_tiny("llama"), TokenTask(n=6)
    encoded, means = task.encode(model), mean_activations(model, task, per_position=True)
    with torch.no_grad(), rewrite(model, "z", lambda z, layer: means[layer].expand_as(z)):
        logits = model.logits(encoded.tokens, encoded.attention_mask, encoded.readout, encoded.columns)
    found = faithfulness(model, task, Circuit(CIRCUIT), per_position=True, controls=0, batch_size=2, progress=False)
    assert torch.allclose(found.empty, encoded.margin(logits), atol=2e-5)


def test_normalise_by_arithmetic():
    full, empty = torch.tensor([3.0, 5.0]), torch.tensor([0.0, 2.0])
    assert normalise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), empty, full).tolist() == pytest.approx([2 / 3, 1.0])
    assert normalise(full, full, full).isnan()


def test_interval_holds_the_estimate_and_narrows_with_examples():
    generator = torch.Generator().manual_seed(0)

    def made(n):
        kept = 0.5 + torch.randn(1, n, generator=generator)
        yes = torch.ones(n, dtype=torch.bool)
        none = torch.zeros(0, 1, n)
        return FaithfulnessCurve(
            torch.tensor([1]), kept, yes[None], torch.ones(n), torch.zeros(n), yes, none, none.bool(), None, None, ("",)
        )

    widths = []
    for n in (30, 3000):
        (low,), (high,) = made(n).interval()
        widths.append(high - low)
    (low,), (high,) = (curve := made(200)).interval()
    assert low < curve.faithfulness[0] < high
    assert widths[1] < widths[0] / 5
    error = curve.margins.std() / 200**0.5  # the ratio's denominator is exactly 1 here
    assert high - low == pytest.approx(2 * 1.96 * error.item(), rel=0.15)


def test_saved_and_read_back(curve, tmp_path):
    curve.save(tmp_path / "curve")
    again = FaithfulnessCurve.load(tmp_path / "curve")
    assert again.rows() == curve.rows() and again.meta == curve.meta and again.circuits == curve.circuits
    HeadScores(torch.zeros(2, 2), "x").save(tmp_path / "scores")
    with pytest.raises(ValueError, match="expected a saved FaithfulnessCurve"):
        FaithfulnessCurve.load(tmp_path / "scores")


def test_reads_well(curve):
    text = repr(curve)
    assert "ablation on tokens, LlamaForCausalLM, n=6, mean ablation" in text
    assert "| 12 | 1.00 | 1.00 to 1.00 |" in text
    assert curve._repr_html_().count("<tr>") == 5


@pytest.mark.parametrize(
    ("what", "options", "text"),
    [
        (Circuit([Head(7, 0)]), {}, "a7.h0"),
        (Circuit([Head(0, 0)]), {"sizes": [1]}, "a Circuit is measured at its own size"),
        (
            HeadScores(torch.zeros(2, 2), "x"),
            {},
            r"scores are for \(2, 2\) layers x heads; LlamaForCausalLM has \(3, 4\)",
        ),
        (HeadScores(torch.zeros(3, 4), "x"), {"sizes": [13]}, "expected numbers of heads from 0 to 12"),
        (HeadScores(torch.zeros(3, 4), "x"), {"ablate": "knockout"}, "ablate='knockout'"),
    ],
)
def test_bad_options_are_named(what, options, text):
    with pytest.raises(ValueError, match=text):
        faithfulness(shared_tiny("llama"), TokenTask(), what, progress=False, **options)

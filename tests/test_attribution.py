"""Ablation is checked against doing it by hand; the gradient methods against ablation where they must agree."""

from dataclasses import dataclass, replace

import pytest
import torch

from circuits import Circuit, Head, ablation, gradient, integrated_gradients, load, record, rewrite
from circuits.means import class_means, mean_activations
from circuits.readout import short_batches

from models import FAMILIES, TokenTask, ragged, shared_tiny, tiny


def by_hand(model, encoded, edit=None):
    """Margins of single examples, one plain forward each, with z of some heads overwritten."""
    margins = []
    for i in range(len(encoded)):
        one = encoded.select([i])
        real = one.attention_mask.bool()[0]
        tokens = one.tokens[:, real]
        with torch.no_grad(), rewrite(model, "z", edit or (lambda z, layer: z)):
            logits = model(tokens)
        last = model.pooled_position(tokens, None)
        logits = logits if model.kind == "classifier" else logits[:, last[0]]
        margins.append((logits[0, one.columns] * one.direction[0]).sum())
    return torch.stack(margins)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_what_overwriting_one_head_does(family, side):
    model, task = shared_tiny(family), TokenTask(side)
    encoded = task.encode(model)
    means = mean_activations(model, task)
    scores = ablation(model, task, progress=False)
    clean = by_hand(model, encoded)
    for head in (Head(0, 1), Head(1, 3), Head(2, 0)):

        def overwrite(z, layer, head=head):
            z = z.clone()
            if layer == head.layer:
                z[:, :, head.head] = means[head]
            return z

        expected = clean - by_hand(model, encoded, overwrite)
        assert torch.allclose(scores.examples[:, head.layer, head.head], expected, atol=2e-5)
        assert abs(scores[head] - expected.mean()) < 2e-5


@pytest.mark.parametrize("family", ["llama", "gemma3", "neox", "bert-classifier"])
def test_batches_change_nothing(family):
    model, task = shared_tiny(family), TokenTask()
    for method in (ablation, gradient, integrated_gradients):
        whole, single = (method(model, task, batch_size=size, progress=False) for size in (None, 1))
        assert torch.allclose(whole.examples, single.examples, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_slope_of_ablation(family):
    """Moving the reference almost onto z makes the margin linear: gradient, path gradient and ablation meet."""
    model, task = load(tiny(family).double()), TokenTask(n=2)
    encoded = task.encode(model)
    with torch.no_grad(), record(model, "z") as cache:
        model.hidden(encoded.tokens, encoded.attention_mask)
    model_z = cache.stack()
    step = 1e-4 * torch.randn(model_z.shape[0], *model_z.shape[2:], generator=torch.Generator().manual_seed(0))
    one = TokenTask(n=1)
    reference = (model_z[:, 0] + step.double()).to(torch.float64)
    found = {m.__name__: m(model, one, reference=reference, progress=False).values for m in
             (ablation, gradient, integrated_gradients)}  # fmt: skip
    scale = found["ablation"].abs().max()
    assert scale > 1e-6
    assert (found["gradient"] - found["ablation"]).abs().max() < 0.02 * scale
    assert (found["integrated_gradients"] - found["ablation"]).abs().max() < 0.02 * scale


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_path_gradients_add_up_to_the_whole_layer(family):
    model, task = shared_tiny(family), TokenTask()
    encoded, means = task.encode(model), mean_activations(model, task)
    scores = integrated_gradients(model, task, steps=64, progress=False)
    clean = by_hand(model, encoded)
    for layer in range(3):
        gone = by_hand(model, encoded, lambda z, at, layer=layer: means[at].expand_as(z) if at == layer else z)
        effect = clean - gone
        assert torch.allclose(scores.examples[:, layer].sum(-1), effect, atol=2e-3 * effect.abs().max().item())


def test_twins_replace_z_position_by_position():
    model, task = shared_tiny("llama"), TokenTask(twins=True)
    encoded = task.encode(model)
    scores = ablation(model, task, ablate="resample", progress=False)
    with torch.no_grad(), record(model, "z") as twin:
        model.hidden(encoded.corrupted.tokens, encoded.corrupted.attention_mask)
    head = Head(1, 2)

    def patch(z, layer):
        z = z.clone()
        if layer == head.layer:
            z[:, :, head.head] = twin[layer][:, :, head.head]
        return z

    with torch.no_grad(), rewrite(model, "z", patch):
        patched = model.logits(encoded.tokens, encoded.attention_mask, encoded.readout, encoded.columns)
    expected = by_hand(model, encoded) - encoded.margin(patched)
    assert torch.allclose(scores.examples[:, 1, 2], expected, atol=2e-5)
    assert not torch.allclose(scores.values, ablation(model, task, progress=False).values, atol=1e-3)


def test_only_the_chosen_heads_and_positions():
    model, task = shared_tiny("llama"), TokenTask()
    everything = ablation(model, task, progress=False)
    some = ablation(model, task, heads=Circuit([Head(1, 2)]), progress=False)
    assert some[Head(1, 2)] == pytest.approx(everything[Head(1, 2)], abs=1e-5)
    assert some.values.count_nonzero() == 1
    # In the last layer of a causal model only the read-out position can matter; below, others do too.
    last = ablation(model, task, positions="readout", progress=False)
    assert torch.allclose(last.values[2], everything.values[2], atol=1e-5)
    assert not torch.allclose(last.values[0], everything.values[0], atol=1e-3)


@pytest.mark.parametrize("side", ["right", "left"])
def test_means_weigh_labels_and_skip_pads(side):
    model, task = shared_tiny("llama"), TokenTask(side, n=5)
    rows = ragged(5)
    groups = {0: [], 1: [], 2: []}
    for i, row in enumerate(rows):
        with torch.no_grad(), record(model, "z") as cache:
            model.hidden(torch.tensor([row]))
        groups[i % 3].append(cache.stack()[:, 0])
    tokens = {label: torch.cat(found, 1) for label, found in groups.items()}
    balanced = torch.stack([found.mean(1) for found in tokens.values()]).mean(0)
    assert torch.allclose(mean_activations(model, task), balanced, atol=1e-5)
    assert torch.allclose(mean_activations(model, task, batch_size=2), balanced, atol=1e-5)
    pooled = torch.cat(list(tokens.values()), 1).mean(1)
    assert torch.allclose(mean_activations(model, task, means="task"), pooled, atol=1e-5)
    assert not torch.allclose(balanced, pooled, atol=1e-3)
    assert mean_activations(model, task, means="zero").abs().sum() == 0


def test_means_per_position():
    model, task = shared_tiny("gpt2"), TokenTask(n=5)
    found = mean_activations(model, task, means="task", per_position=True, batch_size=2)
    rows = ragged(5)
    at_six = []
    for row in rows:
        if len(row) > 6:
            with torch.no_grad(), record(model, "z") as cache:
                model.hidden(torch.tensor([row]))
            at_six.append(cache.stack()[:, 0, 6])
    assert found.shape == (3, 9, 4, 8)
    assert torch.allclose(found[:, 6], torch.stack(at_six).mean(0), atol=1e-5)


def test_ablation_to_the_mean_of_each_position():
    model, task = shared_tiny("gpt2"), TokenTask(n=5)
    encoded = task.encode(model)
    means = mean_activations(model, task, per_position=True)
    head = Head(1, 3)

    def overwrite(z, layer):
        z = z.clone()
        if layer == head.layer:
            z[:, :, head.head] = means[head.layer, : z.shape[1], head.head]
        return z

    expected = by_hand(model, encoded) - by_hand(model, encoded, overwrite)
    scores = ablation(model, task, per_position=True, batch_size=2, progress=False)
    assert torch.allclose(scores.examples[:, 1, 3], expected, atol=2e-5)
    assert not torch.allclose(scores.values, ablation(model, task, progress=False).values, atol=1e-3)


def test_class_means_by_arithmetic():
    sums = torch.tensor([6.0, 4.0, 0.0]).double().view(3, 1, 1, 1)
    counts = torch.tensor([3.0, 1.0, 0.0]).double()
    assert class_means(sums, counts).item() == (2 + 4) / 2  # the class with no token is left out


def test_short_batches_cut_only_padding():
    model = shared_tiny("llama")
    for side in ("right", "left"):
        encoded = TokenTask(side, twins=True).encode(model)
        seen = []
        for indices, batch in short_batches(encoded, 2):
            seen += indices.tolist()
            assert torch.equal(batch.attention_mask.sum(1), encoded.attention_mask[indices].sum(1))
            assert torch.equal(batch.tokens, encoded.tokens[indices][:, : batch.tokens.shape[1]])
            assert torch.equal(batch.corrupted.gold, encoded.gold[indices])
        assert sorted(seen) == list(range(5))
    assert next(iter(short_batches(TokenTask().encode(model), 2)))[1].tokens.shape[1] == 5


def test_nothing_stays_behind_when_the_model_raises():
    model = load(tiny("llama"))
    block = model.anatomy.module(model.hf, 0, "block")

    def fail(*_):
        raise RuntimeError("stop")

    handle = model.anatomy.module(model.hf, 2, "mlp").register_forward_hook(fail)
    for method in (ablation, gradient, integrated_gradients):
        with pytest.raises(RuntimeError, match="stop"):
            method(model, TokenTask(), progress=False)
    handle.remove()
    assert "forward" not in vars(block)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.hf.modules())
    assert all(parameter.grad is None for parameter in model.hf.parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(ablate="median"), "ablate='median'; expected one of 'mean', 'zero', 'resample'"),
        (dict(means="mode"), "means='mode'; expected one of 'label-balanced'"),
        (dict(positions="first"), "positions='first'; expected 'all' or 'readout'"),
        (dict(means="corrupted"), "needs corrupted twins"),
        (dict(batch_size=0), "batch_size=0; expected a positive number"),
        (dict(heads=[Head(9, 0)]), "a9.h0"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        ablation(shared_tiny("llama"), TokenTask(), progress=False, **options)
    with pytest.raises(ValueError, match="steps=0"):
        integrated_gradients(shared_tiny("llama"), TokenTask(), steps=0)


def test_unequal_twins_are_refused_by_row():
    @dataclass
    class Unequal(TokenTask):
        def encode(self, model):
            encoded = super().encode(model)
            mask = encoded.corrupted.attention_mask.clone()
            mask[1, 4] = 0
            return replace(encoded, corrupted=replace(encoded.corrupted, attention_mask=mask))

    with pytest.raises(ValueError, match=r"rows \[1\] have a different number of tokens"):
        ablation(shared_tiny("llama"), Unequal(twins=True), ablate="resample", progress=False)

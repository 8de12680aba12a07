"""Per-token relevance is what one gets by changing one token, or one head at one token, by hand."""

import pytest
import torch

from circuits import Head, Node, decompose, load, mean_activations, pocket, token_relevance
from circuits.resampling import with_donors
from circuits.token_effects import TokenRelevance, replace_one_each

from models import CAUSAL, TokenTask, shared_tiny

FAMILIES = (*CAUSAL, "bert-classifier")


def margins_by_hand(model, encoded, example, embedded):
    """One example alone, from embeddings; no batch, no hook."""
    keep = encoded.attention_mask[example].bool()
    kwargs = {"inputs_embeds": embedded[None], "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long)}
    logits = model.hf(**kwargs).logits[0]
    logits = logits if model.kind == "classifier" else logits[int(encoded.readout[example] - keep.int().argmax())]
    return (logits[encoded.columns] * encoded.direction[example]).sum()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_embeddings_changed_by_hand(family, side):
    if family == "bert-classifier" and side == "left":
        pytest.skip("this family counts positions from the left edge")
    model, task = shared_tiny(family), TokenTask(side=side)
    encoded = task.encode(model)
    found = token_relevance(model, task, progress=False)
    embed = model.hf.get_input_embeddings()
    with torch.no_grad():
        mean = embed(encoded.tokens[encoded.attention_mask.bool()]).mean(0)
        for example in range(len(task)):
            row = embed(encoded.tokens[example][encoded.attention_mask[example].bool()])
            whole = margins_by_hand(model, encoded, example, row)
            assert len(row) == len(found.values[example]) == len(found.tokens[example])
            for position in range(len(row)):
                changed = row.clone()
                changed[position] = mean
                expected = whole - margins_by_hand(model, encoded, example, changed)
                assert float(found.values[example][position]) == pytest.approx(float(expected), abs=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "neox"])
def test_a_head_at_one_token_equals_exact_decomposition(family, side):
    model, task, head = shared_tiny(family), TokenTask(side=side), Head(1, 2)
    encoded, means = task.encode(model), mean_activations(model, task)
    found = token_relevance(model, task, head, progress=False)
    for example in range(len(task)):
        tokens = encoded.tokens[example][encoded.attention_mask[example].bool()][None]
        sources = [[Node(*head, position)] for position in range(tokens.shape[1])]
        beta = decompose(model, tokens, sources, means, positions=[-1], vocab=encoded.columns.tolist())
        expected = (beta[:, 0, 0] * encoded.direction[example]).sum(-1)
        assert torch.allclose(found.values[example], expected, atol=2e-4)


@pytest.mark.parametrize("ablate", ["zero", "resample"])
def test_other_replacements(ablate):
    model, task = shared_tiny("llama"), TokenTask(twins=True)
    encoded = task.encode(model)
    found = token_relevance(model, task, ablate=ablate, progress=False)
    embed = model.hf.get_input_embeddings()
    with torch.no_grad():
        row = embed(encoded.tokens[0][encoded.attention_mask[0].bool()])
        twin = embed(encoded.corrupted.tokens[0][encoded.attention_mask[0].bool()])
        changed = row.clone()
        changed[2] = 0 if ablate == "zero" else twin[2]
        expected = margins_by_hand(model, encoded, 0, row) - margins_by_hand(model, encoded, 0, changed)
    assert float(found.values[0][2]) == pytest.approx(float(expected), abs=2e-4)


def test_without_twins_another_example_gives_its_token():
    """Tokens are matched by their distance from the read-out: the donor's last token stands in for the last."""
    model, task = shared_tiny("llama"), TokenTask()
    encoded, found = task.encode(model), token_relevance(shared_tiny("llama"), task, ablate="resample", progress=False)
    embed, last = model.hf.get_input_embeddings(), encoded.tokens.gather(1, encoded.readout[:, None])[:, 0]
    donors = with_donors(encoded).corrupted
    with torch.no_grad():
        for example in range(len(task)):
            row = embed(encoded.tokens[example][encoded.attention_mask[example].bool()])
            changed = row.clone()
            changed[-1] = embed(donors.tokens[example, donors.readout[example]])
            expected = margins_by_hand(model, encoded, example, row) - margins_by_hand(model, encoded, example, changed)
            assert float(found.values[example][-1]) == pytest.approx(float(expected), abs=2e-4)
    assert not torch.equal(donors.tokens.gather(1, donors.readout[:, None])[:, 0], last)


def test_batches_do_not_matter_and_hooks_are_gone():
    model, task = shared_tiny("llama"), TokenTask()
    whole = token_relevance(model, task, progress=False)
    for head in (None, Head(2, 0)):
        one, all_ = (token_relevance(model, task, head, batch_size=size, progress=False) for size in (1, None))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.values, all_.values, strict=True))
    again = token_relevance(model, task, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.values, again.values, strict=True))


def test_one_position_of_each_copy_changes():
    x, delta = torch.zeros(2, 3, 4, 5), torch.ones(3, 4, 5)
    out = replace_one_each(x, delta, torch.tensor([1, 3]))
    assert out.sum() == -2 * 3 * 5 and (out[0, :, 1] == -1).all() and (out[1, :, 3] == -1).all()


def test_names_are_what_a_name_task_is_about():
    model = load("pocket")
    words, values = token_relevance(model, pocket.name_copying_task(model, n=20, seed=0), progress=False)
    flat = [
        (word.strip()[:1].isupper(), value)
        for row, each in zip(words, values, strict=True)
        for word, value in zip(row, each.abs().tolist(), strict=True)
    ]
    names, others = ([value for name, value in flat if name == wanted] for wanted in (True, False))
    assert len(names) == 3 * 20 and sum(names) / len(names) > 4 * sum(others) / len(others)


def test_it_prints_as_text():
    many = TokenRelevance([["a", " b"]] * 7, [torch.tensor([1.0, -0.25])] * 7)
    assert repr(many) == "\n".join(["TokenRelevance(7 texts)", *["a[+1.00] b[-0.25]"] * 5])


def test_what_cannot_be_replaced_is_said():
    model = shared_tiny("gpt2")
    with pytest.raises(ValueError, match=r"a7\.h0"):
        token_relevance(model, TokenTask(), Head(7, 0))
    with pytest.raises(ValueError, match="ablate='median'; expected one of 'mean', 'zero', 'resample'"):
        token_relevance(model, TokenTask(), ablate="median")

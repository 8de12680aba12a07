import pytest
import torch
from fewshot_toys import PLANTED, capitals, first_letters, loaded, planted_model

from circuits import Head, alpha_curve, head_roles, null_selections, select_heads, task_embedding, transfer_matrix
from circuits.fewshot import FewShotTask, encode_prompts
from circuits.head_effects import indirect_effect, leave_one_out, slope
from circuits.prefix import PrefixCache
from interventions import inject


@pytest.fixture(scope="module")
def planted():
    model = planted_model()
    embedding = task_embedding(model, capitals(), n_prompts=20, n_shots=4, progress=False)
    found = select_heads(model, capitals(), embedding, steps=40, seeds=2, validate_every=20, progress=False)
    return model, capitals(), embedding, found


def small(family="llama"):
    model, task = loaded(family), first_letters()
    embedding = task_embedding(model, task, n_prompts=4, n_shots=1, progress=False)
    return (
        model,
        task,
        embedding,
        select_heads(model, task, embedding, steps=4, seeds=2, validate_every=2, progress=False),
    )


def test_outcomes_are_those_of_injected_forwards():
    model, task, embedding, found = small()
    prompts = encode_prompts(model, task.prompts())
    losses, hits = PrefixCache(model, prompts).outcomes(
        torch.stack([found.alpha, torch.zeros(3, 4)]), embedding.mean[None], max_rows=5
    )
    for number, alpha in enumerate((found.alpha, torch.zeros(3, 4))):
        with inject(model, embedding, alpha), torch.no_grad():
            logits = model(prompts.tokens, prompts.attention_mask)[:, -1]
        expected = torch.nn.functional.cross_entropy(logits, prompts.first, reduction="none")
        assert torch.allclose(losses[number], expected, atol=1e-4)
        assert torch.equal(hits[number], logits.argmax(-1) == prompts.first)


def test_one_planted_head_is_enough_and_the_others_are_not(planted):
    model, task, embedding, found = planted
    curve = alpha_curve(model, task, embedding, found, sizes=[1, 4], random=6)
    assert curve.top[0].all() and curve.soft.all() and not curve.clean.any()
    assert curve.bottom[0].float().mean() < 0.2
    assert curve.random.shape == (2, 6, 32)
    assert "top-k" in curve.table() and "1.000 [1.000, 1.000]" in curve.table()


def test_leaving_the_planted_head_out_costs_most(planted):
    model, task, embedding, found = planted
    effect = leave_one_out(model, task, embedding, found)
    assert effect.rank()[0] == PLANTED and effect[PLANTED] > 1
    cache = PrefixCache(model, encode_prompts(model, task.prompts()))
    without = found.alpha.clone()
    without[1, 3] = 0
    losses, _ = cache.outcomes(torch.stack([without, found.alpha]), embedding.mean[None])
    assert abs(effect[Head(1, 3)] - (losses[0] - losses[1]).mean().item()) < 1e-5
    assert effect.interval()[0][PLANTED] > 1


def test_the_planted_head_has_the_largest_indirect_effect(planted):
    model, _, embedding, _ = planted
    pairs = [(letter, letter.upper()) for letter in "abcdefgh"] + [(letter, letter) for letter in "abcdefgh"]
    mixed = FewShotTask.from_pairs(pairs, template="{input}:{output}", separator=" ")
    effect = indirect_effect(model, mixed.select(range(8)), embedding, n_prompts=10, n_shots=1)
    assert effect.examples.shape == (10, 2, 4)
    assert effect.rank()[0] == PLANTED


def test_the_slope_is_the_derivative_of_the_loss(planted):
    model, task, embedding, _ = planted
    found = slope(model, task, embedding)
    cache = PrefixCache(model, encode_prompts(model, task.prompts()))
    step = torch.zeros(1, 2, 4)
    step[0][PLANTED] = 1e-2
    losses, _ = cache.outcomes(torch.cat((-step, step)), embedding.mean[None])
    difference = (losses[0] - losses[1]).mean().item() / 2e-2
    assert abs(found[PLANTED] - difference) < 2e-2 * abs(difference)
    assert found.rank()[0] == PLANTED


def test_transfer_uses_a_tasks_heads_with_the_others_embedding():
    model, task, embedding, found = small()
    other = first_letters(9).permuted(1)
    tasks, embeddings = (
        {"a": task, "b": other},
        {"a": embedding, "b": task_embedding(model, other, n_prompts=3, n_shots=1)},
    )
    selections = {"a": found, "b": select_heads(model, other, embeddings["b"], steps=2, progress=False)}
    matrix = transfer_matrix(model, tasks, embeddings, selections)
    for column, target in enumerate("ab"):
        prompts = encode_prompts(model, tasks[target].prompts())
        for row, source in enumerate("ab"):
            with inject(model, embeddings[target], selections[source]), torch.no_grad():
                hits = model(prompts.tokens, prompts.attention_mask)[:, -1].argmax(-1) == prompts.first
            assert abs(matrix.accuracy[row, column] - hits.float().mean()) < 1e-6
    assert torch.allclose(matrix.cosine.diagonal(), torch.ones(2)) and torch.equal(
        matrix.jaccard.diagonal(), torch.ones(2)
    )
    assert "heads of" in matrix.table()


def test_l1_keeps_the_planted_head_and_lets_others_go(planted):
    model, task, embedding, _ = planted
    found = select_heads(model, task, embedding, steps=60, l1=0.2, validate_every=20, progress=False)
    assert found.rank()[0] == PLANTED
    rest = found.alpha.clone()
    rest[PLANTED] = 0
    assert found.alpha[PLANTED] > 0.7 and rest.max() < 0.3


def test_roles_tell_needed_from_harmful(planted):
    model, task, embedding, _ = planted
    found = head_roles(model, task, embedding, chg=0.05, steps=40, validate_every=20, progress=False)
    assert found.needed.rank()[0] == PLANTED and found.needed[PLANTED] > 0.5
    # Layer 0 copies the letter: its mean over letters destroys the answer.
    assert found.harmful.values[0, [0, 1, 3]].min() > 0.5 and found.harmful[PLANTED] < 0.5


def test_nulls_do_not_reach_the_tasks_loss(planted):
    model, task, embedding, _ = planted
    noise = torch.randn(embedding.mean.shape, generator=torch.Generator().manual_seed(0)) * embedding.mean.std()
    found = null_selections(model, task, embedding, noise, steps=30, validate_every=10, progress=False)
    assert set(found) == {"task", "permuted labels", "mismatched embedding"}
    loss = {name: one.validation.min().item() for name, one in found.items()}
    assert loss["task"] < 0.5 < min(loss["permuted labels"], loss["mismatched embedding"])


def test_bad_requests_are_refused(planted):
    model, task, embedding, found = planted
    with pytest.raises(ValueError, match=r"sizes \[0\] must lie between 1 and 8"):
        alpha_curve(model, task, embedding, found, sizes=[0])
    with pytest.raises(ValueError, match="must have the same names"):
        transfer_matrix(model, {"a": task}, {}, {"a": found})
    with pytest.raises(ValueError, match="chg=0 must be positive"):
        head_roles(model, task, embedding, chg=0)

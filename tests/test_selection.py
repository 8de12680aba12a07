import pytest
import torch
from fewshot_toys import PLANTED, capitals, first_letters, loaded, planted_model

from circuits import Head, load, record, select_heads, task_embedding
from circuits.fewshot import FewShotTask, encode_prompts
from circuits.prefix import PrefixCache
from circuits.selection import HeadSelection, site_loss

from models import CAUSAL

QUICK = dict(steps=6, validate_every=2, progress=False)


def embed(model, task=None):
    return task_embedding(model, task or first_letters(), n_prompts=6, n_shots=1, progress=False)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_prefix_cache_gives_the_full_prompts_logits_loss_and_gradient(family):
    from fewshot_toys import character_tokenizer

    from models import tiny

    # Gemma 2's eager attention takes its softmax in float32, where float64's mask value is -inf.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = load(tiny(family).to(dtype), character_tokenizer())
    prompts = encode_prompts(model, first_letters().prompts())
    rows = torch.tensor([[0, 3, 5], [7, 1, 1]])
    embedding = torch.randn(2, 3, 4, model.anatomy.d_head, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for reuse in (True, False):
        theta = torch.linspace(-1, 1, 24, dtype=dtype).view(2, 3, 4).requires_grad_()
        loss = site_loss(PrefixCache(model, prompts, batch_size=5, reuse=reuse), rows, theta, embedding)
        found.append((loss, *torch.autograd.grad(loss.sum(), [theta])))
    (cached, gradient), (full, expected) = found
    # The loss is taken from float32 logits.
    assert torch.allclose(cached, full, atol=1e-6) and torch.allclose(gradient, expected, atol=1e-6)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("family", CAUSAL)
def test_prefix_logits_equal_single_unpadded_prompts(family):
    model = loaded(family)
    task = first_letters()
    cache = PrefixCache(model, encode_prompts(model, task.prompts()))
    with torch.no_grad():
        logits = cache.logits(torch.tensor([4, 2]))
        for row, index in enumerate((4, 2)):
            alone = model(torch.tensor([model.tokenizer(task.prompts()[index].text)["input_ids"]]))[0, -1]
            assert torch.allclose(logits[row], alone, atol=1e-4)


def test_the_cache_is_not_used_up():
    model = loaded("gemma3")
    cache = PrefixCache(model, encode_prompts(model, first_letters().prompts()))
    rows = torch.arange(5)
    with torch.no_grad():
        assert torch.equal(cache.logits(rows), cache.logits(rows))


def test_prompts_of_one_token_need_no_prefix():
    model = loaded("gpt2")
    task = FewShotTask.from_pairs([("a", "b"), ("c", "d")], template="{input}{output}", digit_rule=False)
    cache = PrefixCache(model, encode_prompts(model, task.prompts()))
    assert torch.allclose(
        cache.logits(torch.tensor([1])), model(torch.tensor([model.tokenizer("c")["input_ids"]]))[:, -1]
    )


def test_several_tasks_and_seeds_in_one_backward_equal_separate_fits():
    model = loaded("llama")
    tasks = {"a": first_letters(), "b": first_letters(9).permuted(3)}
    vectors = {name: embed(model, task) for name, task in tasks.items()}
    together = select_heads(model, tasks, vectors, seeds=2, seed=5, **QUICK)
    for name, task in tasks.items():
        alone = select_heads(model, task, vectors[name], seeds=2, seed=5, **QUICK)
        assert torch.allclose(together[name].theta, alone.theta, atol=2e-3)
        assert torch.allclose(together[name].curve, alone.curve, atol=1e-4)


def test_a_second_seed_in_the_batch_equals_a_fit_of_its_own():
    model = loaded("gpt2")
    train, held = first_letters().split(8)
    options = dict(QUICK, validation=held)
    both = select_heads(model, train, embed(model), seeds=2, seed=5, **options)
    alone = select_heads(model, train, embed(model), seeds=1, seed=6, **options)
    assert torch.allclose(both.curve[:, 1], alone.curve[:, 0], atol=1e-4)
    assert not torch.allclose(both.curve[-1, 0], both.curve[-1, 1], atol=1e-4)


def test_the_checkpoint_is_the_minimum_of_the_validation_curve():
    model = loaded("gpt2")
    task = first_letters()
    train, held = task.split(8)
    embedding = embed(model)
    found = select_heads(
        model, train, embedding, validation=held, lr=2.0, seeds=3, steps=12, validate_every=1, progress=False
    )
    assert torch.equal(found.validation, found.curve.min(0).values)
    assert any(step != 12 for step in found.best_step), "every run ended at its best step: the test shows nothing"
    prompts = PrefixCache(model, encode_prompts(model, held.prompts()))
    rows = torch.arange(len(held))[None]
    with torch.no_grad():
        for theta, best in zip(found.theta, found.validation, strict=True):
            assert torch.allclose(site_loss(prompts, rows, theta[None], embedding.mean[None]), best, atol=1e-5)
    assert torch.equal(found.alpha, torch.sigmoid(found.theta[found.validation.argmin()]))


def test_patience_stops_a_fit_that_no_longer_improves():
    model = loaded("gpt2")
    found = select_heads(
        model, first_letters(), embed(model), steps=60, lr=3.0, validate_every=2, patience=3, progress=False
    )
    assert found.checks[-1] < 60


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_head_ranks_first_on_every_seed(seed):
    model = planted_model(seed)
    embedding = task_embedding(model, capitals(), n_prompts=20, n_shots=4, seed=seed, progress=False)
    found = select_heads(
        model, capitals(), embedding, steps=40, seeds=3, seed=10 * seed, validate_every=20, progress=False
    )
    for alpha in torch.sigmoid(found.theta):
        assert Head(*divmod(int(alpha.argmax()), 4)) == PLANTED
    assert found.rank()[0] == PLANTED and found.alpha[PLANTED] > 0.8
    assert found.top(1).heads == {PLANTED}


def test_the_slope_at_zero_is_attribution_patching():
    model = loaded("llama")
    task, embedding = first_letters(), embed(model)
    prompts = encode_prompts(model, task.prompts())
    cache = PrefixCache(model, prompts)
    alpha = torch.zeros(1, 3, 4, requires_grad=True)
    logits = cache.decode(torch.arange(len(task)), alpha, embedding.mean[None])
    loss = torch.nn.functional.cross_entropy(logits, prompts.first, reduction="sum")
    (slope,) = torch.autograd.grad(loss, [alpha])
    with record(model, "z", detach=False) as z:
        clean = model(prompts.tokens, prompts.attention_mask)[:, -1]
    loss = torch.nn.functional.cross_entropy(clean, prompts.first, reduction="sum")
    gradients = torch.autograd.grad(loss, [z[layer] for layer in range(3)])
    for layer in range(3):
        expected = (gradients[layer][:, -1] * (embedding.mean[layer] - z[layer][:, -1])).sum((0, 2))
        assert torch.allclose(slope[0, layer], expected, atol=2e-4)


def test_selections_are_scores_and_survive_saving(tmp_path):
    model = loaded("qwen3")
    found = select_heads(model, first_letters(), embed(model), seeds=3, **QUICK)
    again = HeadSelection.load(found.save(tmp_path / "s"))
    assert torch.equal(again.theta, found.theta) and torch.equal(again.values, found.values)
    assert again.best_step == found.best_step and torch.equal(again.alpha, found.alpha)
    assert again.rank() == found.rank() and len(again.interval()) == 2
    assert set(found.agreement()) == {"spearman", "jaccard"}
    assert again.correlation(found)["spearman"] > 0.999


def test_training_leaves_the_model_as_it_was():
    model = loaded("gpt2")
    before = {name: parameter.clone() for name, parameter in model.hf.named_parameters()}
    select_heads(model, first_letters(), embed(model), **QUICK)
    for name, parameter in model.hf.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    state = torch.get_rng_state()
    select_heads(model, first_letters(), embed(model), **QUICK)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_fits_are_refused_with_one_clear_line():
    model, task = loaded("gpt2"), first_letters()
    embedding = embed(model)
    for arguments, options, text in (
        ((task.select(range(3)), embedding), {}, "has 3 rows; 5 are needed to hold some out"),
        ((task, embedding), {"steps": 0}, "each must be >= 1"),
        ((task, embed(loaded("qwen3"))), {}, "it was measured on another model"),
        (({"a": task}, {"b": embedding}), {}, r"tasks \['a'\] and embeddings \['b'\]"),
    ):
        with pytest.raises(ValueError, match=text):
            select_heads(model, *arguments, **options)

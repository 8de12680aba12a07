import pytest
import torch
from fewshot_toys import capitals, first_letters, loaded, planted_model

from circuits import Circuit, Head, load, record
from circuits.fewshot import encode_prompts
from interventions.baselines.adapter import best_layer, mean_last, residual_edit
from interventions.baselines.context_vectors import MODULES, context_vectors, fit_context_vectors
from interventions.baselines.function_vectors import function_vector
from interventions.baselines.low_rank import fit_lora, lora
from interventions.baselines.sampled_heads import policy_gradient_loss
from interventions.baselines.task_vectors import fit_task_vector
from interventions.comparison import compare

from models import tiny

peft_warning = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def logits_of(model, task):
    prompts = encode_prompts(model, task.prompts())
    with torch.no_grad():
        return model(prompts.tokens, prompts.attention_mask)[:, -1]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "neox"])
def test_a_function_vector_is_what_its_heads_write(family):
    model = loaded(family)
    a = model.anatomy
    embedding = torch.randn(a.n_layers, a.n_heads, a.d_head, generator=torch.Generator().manual_seed(0))
    layer = Circuit([Head(1, head) for head in range(a.n_heads)])
    module = a.module(model.hf, 1, "o")
    expected = module(embedding[1].flatten()) - (0 if module.bias is None else module.bias)
    assert torch.allclose(function_vector(model, embedding, layer), expected, atol=1e-5)
    both = function_vector(model, embedding, Circuit([(0, 1), (2, 3)]))
    parts = [function_vector(model, embedding, Circuit([head])) for head in ((0, 1), (2, 3))]
    assert torch.allclose(both, sum(parts), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "neox"])
def test_a_residual_edit_acts_on_one_block_at_the_last_token(family):
    model = loaded(family)
    task = first_letters()
    prompts = encode_prompts(model, task.prompts())
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with record(model, "resid_post", layers=[1]) as before:
        model(prompts.tokens, prompts.attention_mask)
    with residual_edit(model, 1, lambda x: x + vector), record(model, "resid_post", layers=[1]) as after:
        model(prompts.tokens, prompts.attention_mask)
    change = (after[1] - before[1])[prompts.attention_mask.bool()]
    assert torch.allclose(after[1][:, -1], before[1][:, -1] + vector, atol=1e-5)
    assert (change.abs().sum(-1) > 1e-3).sum() == len(task)


def test_the_layer_is_chosen_by_held_out_accuracy():
    model, held = planted_model(), capitals().select(range(8))
    vector = torch.zeros(128)
    vector[9] = 16.0  # the direction "capital"
    layer, accuracies = best_layer(
        model, held, lambda layer: (lambda x: x + vector) if layer == 1 else (lambda x: x - vector)
    )
    assert layer == 1 and accuracies[1] > accuracies[0]
    with residual_edit(model, 1, lambda x: x + vector):
        gold = encode_prompts(model, held.prompts()).first
        assert (logits_of(model, held).argmax(-1) == gold).float().mean().item() == pytest.approx(accuracies[1])


def test_a_task_vector_of_one_prompt_gives_that_prompts_answer_at_the_last_block():
    model, task = loaded("llama"), first_letters()
    prompt = task.prompts(1, 1, seed=0)
    vector = mean_last(model, prompt, "resid_post")
    encoded = encode_prompts(model, prompt)
    expected = model(encoded.tokens, encoded.attention_mask)[0, -1]
    with residual_edit(model, 2, lambda x: vector[2].expand_as(x)):
        assert torch.allclose(logits_of(model, task), expected.expand(12, -1), atol=1e-4)
    adapter = fit_task_vector(model, task, task, n_prompts=1, n_shots=1)
    with adapter.apply():
        assert (
            not torch.allclose(logits_of(model, task), expected.expand(12, -1), atol=1e-4)
            or "layer 2" in adapter.details
        )


def test_the_policy_gradient_is_that_of_the_expected_loss():
    sets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).view(8, 1, 3)
    losses = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    phi = torch.zeros(1, 3, requires_grad=True)
    (estimate,) = torch.autograd.grad(policy_gradient_loss(phi, sets, losses), [phi])
    p = torch.sigmoid(phi)
    expected_loss = ((sets * p + (1 - sets) * (1 - p)).prod(-1).squeeze(1) * losses).sum()
    (expected,) = torch.autograd.grad(expected_loss, [phi])
    assert torch.allclose(estimate, expected, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "neox"])
def test_context_vectors_scale_and_shift_every_position(family):
    model, task = loaded(family), first_letters()
    vectors = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    neutral = torch.stack([torch.ones(2, 3), torch.zeros(2, 3)])
    clean = logits_of(model, task)
    with context_vectors(model, vectors, neutral):
        assert torch.equal(logits_of(model, task), clean)
    one = neutral.clone()
    one[:, 1, 2] = torch.tensor([0.5, 2.0])
    prompts = encode_prompts(model, task.prompts())
    with record(model, MODULES[1], layers=[2]) as before:
        model(prompts.tokens, prompts.attention_mask)
    with context_vectors(model, vectors, one), record(model, MODULES[1], layers=[2]) as after:
        model(prompts.tokens, prompts.attention_mask)
    real = prompts.attention_mask.bool()
    assert torch.allclose(after[2][real], (0.5 * before[2] + 2 * vectors[1, 2])[real], atol=1e-4)


def test_context_vectors_are_trained_to_answer():
    model, task = planted_model(), capitals()
    adapter = fit_context_vectors(model, task, task.select(range(8)), steps=25, lr=0.1, progress=False)
    with torch.no_grad():
        gold = encode_prompts(model, task.prompts()).first
        before = torch.nn.functional.cross_entropy(logits_of(model, task), gold)
        with adapter.apply():
            assert torch.nn.functional.cross_entropy(logits_of(model, task), gold) < 0.7 * before
    assert adapter.trainable == 8


@peft_warning
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_lora_learns_and_leaves_the_model_as_it_was(family):
    from fewshot_toys import character_tokenizer

    model, task = load(tiny(family), character_tokenizer()), first_letters()
    names = list(model.hf.state_dict())
    clean = logits_of(model, task)
    adapter = fit_lora(model, task, task, steps=12, lr=0.02, progress=False)
    assert list(model.hf.state_dict()) == names and torch.equal(logits_of(model, task), clean)
    assert all(parameter.requires_grad for parameter in model.hf.parameters()) and not hasattr(model.hf, "peft_config")
    gold = encode_prompts(model, task.prompts()).first
    with adapter.apply():
        adapted = logits_of(model, task)
    loss = torch.nn.functional.cross_entropy
    assert loss(adapted, gold) < loss(clean, gold)
    assert torch.equal(logits_of(model, task), clean) and adapter.trainable > 0
    with pytest.raises(RuntimeError), lora(model, 2):
        raise RuntimeError("stop")
    assert list(model.hf.state_dict()) == names


@peft_warning
def test_one_call_compares_all_methods_and_keeps_scores_and_costs_apart():
    model = planted_model()
    test, train = capitals().split(10)
    steps = {"site": 30, "mtv": 60, "i2cl": 10, "lora": 40}
    options = {method: {"steps": count} for method, count in steps.items()} | {"fv": {"n_prompts": 4}}
    options["lora"]["lr"] = 0.02
    found = compare(
        model, train, test, n_prompts=8, n_shots=4, options=options, fold_case=False, max_new_tokens=3, progress=False
    )
    rows = {row["method"]: row for row in found.rows()}
    assert set(rows) == {"zero-shot", "icl", "site", "fv", "tv", "mtv", "i2cl", "lora"}
    assert rows["zero-shot"]["first"][0] == 0
    for method in ("icl", "site", "mtv"):
        assert rows[method]["first"][0] == 1, method
    assert rows["site"]["trainable"] == 8 and rows["icl"]["trainable"] == 0 and rows["i2cl"]["trainable"] == 8
    assert rows["icl"]["prompt_tokens"] > 4 * rows["site"]["prompt_tokens"] == 4 * rows["zero-shot"]["prompt_tokens"]
    assert max(rows["site"]["nll"][0], rows["lora"]["nll"][0]) < rows["zero-shot"]["nll"][0] / 2
    assert rows["site"]["fit_seconds"] > 0 and found.table().count("\n") == 9


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="unknown method 'prompt'; choose from zero-shot, icl, site"):
        compare(loaded("gpt2"), first_letters(), first_letters(), methods=["prompt"])

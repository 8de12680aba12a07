import copy

import pytest
import torch
from fewshot_toys import character_tokenizer, first_letters, loaded

from circuits import load, record, task_embedding
from circuits.embedding import TaskEmbedding, mean_and_variance, weights_of

from models import CAUSAL, ENCODERS, tiny


def embed(model, **options):
    return task_embedding(
        model, first_letters(), **{"n_prompts": 7, "n_shots": 1, "batch_size": 3, "progress": False, **options}
    )


def test_running_mean_and_variance_are_those_of_all_rows_at_once():
    rows = torch.randn(2, 10, 3, 4) + 5
    mean, variance = mean_and_variance(rows.split([3, 1, 6], dim=1))
    assert torch.allclose(mean, rows.mean(1), atol=1e-6)
    assert torch.allclose(variance, rows.var(1), atol=1e-5)


def test_the_mean_is_accumulated_in_float32():
    rows = torch.full((1, 300, 1, 1), 1.0, dtype=torch.bfloat16)
    rows[:, -1] = 1.5
    mean, _ = mean_and_variance(rows.split(1, dim=1))
    assert mean.dtype == torch.float32 and abs(mean.item() - (299 + 1.5) / 300) < 1e-6


@pytest.mark.parametrize("family", CAUSAL)
def test_the_embedding_is_the_mean_of_z_at_each_prompts_last_token(family):
    model = loaded(family)
    embedding = embed(model)
    rows = []
    for prompt in first_letters().prompts(1, 7, seed=0):
        with record(model, "z") as cache:
            model(torch.tensor([model.tokenizer(prompt.text)["input_ids"]]))
        rows.append(cache.stack()[:, 0, -1])
    expected = torch.stack(rows)
    assert torch.allclose(embedding.mean, expected.mean(0), atol=2e-5)
    assert torch.allclose(embedding.variance, expected.var(0), atol=1e-4)


def test_seed_and_save_round_trip(tmp_path):
    model = loaded("llama")
    embedding = embed(model, seed=3)
    assert torch.equal(embedding.mean, embed(model, seed=3).mean)
    assert not torch.equal(embedding.mean, embed(model, seed=4).mean)
    again = TaskEmbedding.load(embedding.save(tmp_path / "t"), model)
    assert torch.equal(again.mean, embedding.mean) and torch.equal(again.variance, embedding.variance)
    assert (again.task, again.template, again.seed, again.data) == (
        "first letters",
        "Q: {input}\nA: {output}",
        3,
        embedding.data,
    )


def test_an_embedding_of_another_model_is_refused(tmp_path):
    stem = embed(loaded("llama")).save(tmp_path / "t")
    with pytest.raises(
        ValueError, match=r"has shape \[3, 4, 8\] .* needs \[3, 4, 12\]; it was measured on another model"
    ):
        TaskEmbedding.load(stem, loaded("qwen3"))
    with pytest.raises(ValueError, match="was measured on 'LlamaForCausalLM' and this model is 'GPT2LMHeadModel'"):
        TaskEmbedding.load(stem, loaded("gpt2"))


def test_an_embedding_of_other_weights_is_refused_though_name_and_size_agree(tmp_path):
    model = loaded("llama")
    other = load(copy.deepcopy(model.hf), model.tokenizer)
    stem = embed(model).save(tmp_path / "t")
    assert TaskEmbedding.load(stem, other).weights == weights_of(model)
    with torch.no_grad():
        other.hf.model.layers[0].self_attn.o_proj.weight.mul_(2)  # tuned heads: still the same base
    TaskEmbedding.load(stem, other)
    with torch.no_grad():
        other.hf.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match="a model named 'LlamaForCausalLM' with other weights; run task_embedding"):
        TaskEmbedding.load(stem, other)
    TaskEmbedding.load(
        stem, load(other.hf.to(torch.bfloat16), model.tokenizer)
    )  # another float type cannot be compared


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_refused_with_the_reason(family):
    with pytest.raises(ValueError, match="reads the whole text at once: use a causal language model"):
        embed(load(tiny(family), character_tokenizer()))

import pytest
import torch
from fewshot_toys import character_tokenizer, loaded
from torch import nn

from circuits import Circuit, HeadScores, load, record
from interventions import inject

from models import CAUSAL, ENCODERS, ragged, tiny


def site(model, seed=0):
    """A random embedding and a random alpha of the model's shape."""
    a = model.anatomy
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(a.n_layers, a.n_heads, a.d_head, generator=generator)
    return embedding, torch.rand(a.n_layers, a.n_heads, generator=generator)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.hf.modules())


@pytest.mark.parametrize("family", CAUSAL)
def test_alpha_zero_is_exactly_the_clean_model(family):
    model = loaded(family)
    embedding, alpha = site(model)
    tokens, mask = model.pad(ragged(), side="left")
    clean = model(tokens, mask)
    with inject(model, embedding, torch.zeros_like(alpha)):
        assert torch.equal(model(tokens, mask), clean)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_alpha_one_puts_the_embedding_at_the_last_token_and_nothing_elsewhere(family, side):
    model = loaded(family)
    embedding, alpha = site(model)
    tokens, mask = model.pad(ragged(), side=side)
    with record(model, "z") as before:
        model(tokens, mask)
    with inject(model, embedding, torch.ones_like(alpha)), record(model, "z") as after:
        model(tokens, mask)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    for row, position in enumerate(last):
        assert torch.equal(after.stack()[:, row, position], embedding)
        earlier = mask[row, :position].nonzero().flatten()  # padding holds NaN on Gemma 2
        assert torch.equal(after.stack()[:, row, earlier], before.stack()[:, row, earlier])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_batched_equals_one_by_one(family, side):
    model = loaded(family)
    rows = ragged()
    tokens, mask = model.pad(rows, side=side)
    with inject(model, *site(model)):
        batched = model(tokens, mask)
        for row, ids in enumerate(rows):
            alone = model(torch.tensor([ids]))[0, -1]
            last = int(mask[row].nonzero()[-1])
            assert torch.allclose(batched[row, last], alone, atol=2e-4), (batched[row, last] - alone).abs().max()


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_is_injected_once_and_agrees_without_a_cache(family):
    model = loaded(family)
    tokens, mask = model.pad(ragged(), side="left")
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6)
    clean = model.hf.generate(tokens, do_sample=False, pad_token_id=0, **options)
    with inject(model, *site(model)) as end:
        cached = model.hf.generate(tokens, do_sample=False, pad_token_id=0, use_cache=True, **options)
        assert end.edits == 1
        recomputed = model.hf.generate(tokens, do_sample=False, pad_token_id=0, use_cache=False, **options)
        assert end.edits == 1 + 6  # the same position, once in each recomputation
    assert torch.equal(cached, recomputed)
    assert not torch.equal(cached, clean)


def test_generated_text_equals_a_hand_made_greedy_loop():
    model = loaded("llama")
    embedding, alpha = site(model)
    ids = torch.tensor([ragged()[0]])
    with inject(model, embedding, alpha):
        generated = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    position, tokens = ids.shape[1] - 1, ids
    from circuits.hooks import rewrite

    def edit(z, layer):
        z = z.clone()
        z[:, position] = z[:, position] * (1 - alpha[layer][:, None]) + embedding[layer] * alpha[layer][:, None]
        return z

    with rewrite(model, "z", edit):
        for _ in range(5):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_and_returned_sequences_are_injected_too(use_cache):
    model = loaded("gpt2")
    tokens, mask = model.pad(ragged(), side="left")
    options = dict(
        max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=0, use_cache=use_cache
    )
    with inject(model, *site(model)):
        together = model.hf.generate(tokens, attention_mask=mask, **options)
        for row, ids in enumerate(ragged()):
            alone = model.hf.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **options
            )
            width = alone.shape[1] - len(ids)
            assert torch.equal(together[2 * row : 2 * row + 2, tokens.shape[1] :][:, :width], alone[:, len(ids) :])


def test_a_prompt_read_in_chunks_is_injected_once_at_its_end():
    model = loaded("llama")
    ids = torch.tensor([ragged()[0]])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    with inject(model, *site(model)) as end:
        whole = model.hf.generate(ids, **options)
        chunked = model.hf.generate(ids, prefill_chunk_size=4, **options)
        assert end.edits == 2
    assert torch.equal(whole, chunked)


def test_one_token_prompts_are_injected():
    model = loaded("gpt2")
    ids = torch.tensor([[5]])
    with inject(model, *site(model)) as end:
        model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert end.edits == 1


def test_a_continued_cache_is_left_alone_unless_armed():
    model = loaded("llama")
    embedding, alpha = site(model)
    ids = torch.tensor([ragged()[0]])
    with inject(model, embedding, torch.ones_like(alpha)) as end:
        full = model.hf(ids).logits[0, -1]
    cache = model.hf(ids[:, :-1], use_cache=True).past_key_values
    with inject(model, embedding, torch.ones_like(alpha)) as end:
        end.arm()
        armed = model.hf(ids[:, -1:], past_key_values=cache).logits[0, -1]
        assert end.edits == 1
        model.hf(ids[:, -1:], past_key_values=cache)
        assert end.edits == 1
    assert torch.allclose(full, armed, atol=1e-5)


def test_text_prompts_go_through_model_generate():
    model = loaded("qwen3")
    prompts = ["Q: hot\nA:", "Q: a\nA:"]
    with inject(model, *site(model)):
        batched = model.generate(prompts, max_new_tokens=4)
        assert batched == [model.generate(prompt, max_new_tokens=4) for prompt in prompts]


@pytest.mark.parametrize("where", ["inside", "forward", "generate"])
def test_no_hook_survives_an_exception(where):
    model = load(tiny("llama"), character_tokenizer())
    before = hooks(model)
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises((RuntimeError, IndexError)):
        with inject(model, *site(model)):
            assert hooks(model) > before and "generate" in vars(model.hf)
            if where == "inside":
                raise RuntimeError("stop")
            if where == "forward":
                model(torch.tensor([[999]]))
            model.hf.generate(torch.tensor([[999]]), max_new_tokens=2)
    assert hooks(model) == before and "generate" not in vars(model.hf)
    assert torch.equal(model(ids), loaded("llama")(ids))


def test_a_circuit_is_alpha_one_and_top_k_makes_soft_alpha_hard():
    model = loaded("gpt2")
    embedding, _ = site(model)
    alpha = torch.zeros(3, 4)
    alpha[1, 2], alpha[2, 0] = 0.9, 0.4
    tokens = torch.tensor([ragged()[0]])

    def logits(selection, **options):
        with inject(model, embedding, selection, **options):
            return model(tokens)

    hard = torch.zeros(3, 4)
    hard[1, 2] = 1
    expected = logits(hard)
    assert torch.equal(logits(Circuit([(1, 2)])), expected)
    assert torch.equal(logits(alpha, top_k=1), expected)
    assert torch.equal(logits(alpha, threshold=0.5), expected)
    assert torch.equal(logits(HeadScores(alpha, "site"), threshold=0.5), expected)
    assert not torch.equal(logits(alpha), expected)


def test_biased_output_projections_keep_their_bias():
    model = loaded("gpt2")
    embedding, alpha = site(model)
    ids = torch.tensor([ragged()[0]])
    module = model.anatomy.module(model.hf, 0, "o")
    with inject(model, embedding, torch.ones_like(alpha)), record(model, "attn_out", layers=[0]) as cache:
        model(ids)
    expected = embedding[0].flatten() @ module.weight + module.bias
    assert module.bias.abs().max() > 0 and torch.allclose(cache[0][0, -1], expected, atol=1e-5)


class FourBit(nn.Module):
    """A linear map that keeps 4-bit integers and a scale, and unpacks them on use, as quantised checkpoints do."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.codes.float() * self.scale).T


def test_quantised_output_projections_are_injected_at_their_input():
    hf = tiny("qwen3")
    model = load(hf)
    for block in hf.model.layers:
        block.self_attn.o_proj = FourBit(block.self_attn.o_proj)
    embedding, alpha = site(model)
    with inject(model, embedding, torch.ones_like(alpha)), record(model, "attn_out", layers=[2]) as cache:
        model(torch.tensor([ragged()[0]]))
    expected = hf.model.layers[2].self_attn.o_proj(embedding[2].flatten())
    assert torch.allclose(cache[2][0, -1], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
def test_adapters_are_injected_like_the_model_they_sit_on():
    import peft

    plain, tokens = loaded("llama"), torch.tensor([ragged()[0]])
    wrapped = load(peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "o_proj"])))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(tokens))
    with inject(plain, *site(plain)):
        logits, text = plain(tokens), plain.hf.generate(tokens, **options)
    with inject(wrapped, *site(plain)) as end:
        assert torch.allclose(wrapped(tokens), logits, atol=1e-5)
        assert torch.equal(wrapped.hf.generate(input_ids=tokens, **options), text)
        assert end.edits == 2


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_refused_with_the_reason(family):
    model = load(tiny(family))
    with pytest.raises(ValueError, match="SITE injects where a causal model ends its prompt"):
        with inject(model, *site(model)):
            pass


def test_wrong_sizes_and_values_are_refused():
    model = loaded("llama")
    embedding, alpha = site(model)
    for arguments, text in (
        ((embedding[:2], alpha), r"embedding has shape \[2, 4, 8\] .* needs \[3, 4, 8\]"),
        ((embedding, alpha[:, :3]), r"alpha has shape \[3, 3\] .* needs \[3, 4\]"),
        ((embedding, alpha + 1), r"alpha must lie in \[0, 1\]"),
        ((embedding, Circuit([(7, 0)])), "circuit names a7.h0"),
    ):
        with pytest.raises(ValueError, match=text):
            with inject(model, *arguments):
                pass
    with pytest.raises(ValueError, match="row 1 of attention_mask is all zero"):
        with inject(model, embedding, alpha):
            model(torch.tensor([[3, 4], [3, 4]]), torch.tensor([[1, 1], [0, 0]]))

"""Slices of every family: zeroing a head's slices is the same as silencing the head."""

import pytest
import torch

from circuits import Head, load, record, rewrite

from models import FAMILIES, ragged, shared_tiny, tiny


def zero(hf, slices):
    parameters = dict(hf.named_parameters())
    with torch.no_grad():
        for name, dim, start, stop in slices:
            parameters[name].narrow(dim, start, stop - start).zero_()


@pytest.mark.parametrize("family", (*FAMILIES, "phi3"))
def test_o_columns_are_the_heads_write(family):
    head, tokens = Head(1, 2), torch.tensor([ragged()[0]])
    model = load(tiny(family))

    def silence(z, layer):
        z = z.clone()
        z[:, :, head.head] = 0
        return z

    with torch.no_grad():
        with rewrite(model, "z", silence, layers=[head.layer]):
            expected = model(tokens)
        zero(model.hf, model.anatomy.slices(head)[-1:])
        torch.testing.assert_close(model(tokens), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("family", (*FAMILIES, "phi3"))
def test_qkv_rows_make_that_heads_projection_and_no_other(family, part):
    model, tokens = load(tiny(family)), torch.tensor([ragged()[0]])
    head = Head(1, 3)
    kv = head.head if part == "q" else model.anatomy.kv_head(head.head)
    start, stop = model.anatomy.qkv_range(kv, part)
    mine = [s for s in model.anatomy.slices(head) if (s.start, s.stop) == (start, stop) and "o_proj" not in s.parameter]
    mine = [s for s in mine if model.anatomy.name(1, part) in s.parameter]
    with torch.no_grad(), record(model, part, layers=[1]) as before:
        model(tokens)
    zero(model.hf, mine)
    with torch.no_grad(), record(model, part, layers=[1]) as after:
        model(tokens)
    others = [h for h in range(before[1].shape[2]) if h != kv]
    assert after[1][:, :, kv].abs().max() == 0
    torch.testing.assert_close(after[1][:, :, others], before[1][:, :, others], atol=0, rtol=0)
    assert before[1][:, :, kv].abs().max() > 0


@pytest.mark.parametrize("family", (*FAMILIES, "phi3"))
def test_slices_name_existing_parameters_within_bounds(family):
    model = shared_tiny(family) if family != "phi3" else load(tiny(family))
    parameters = dict(model.hf.named_parameters())
    for head in model.anatomy.heads():
        for kv in ("shared", "freeze"):
            for name, dim, start, stop in model.anatomy.slices(head, kv=kv):
                assert 0 <= start < stop <= parameters[name].shape[dim] and stop - start == model.anatomy.d_head
    assert set(model.anatomy.norms()) <= set(parameters)
    assert len(model.anatomy.slices(head, kv="freeze")) < len(model.anatomy.slices(head))


def test_slices_written_out():
    slices = shared_tiny("llama").anatomy.slices(
        Head(2, 3)
    )  # 4 heads of 8, 2 key/value heads: head 3 is served by kv 1
    assert [tuple(s) for s in slices] == [
        ("model.layers.2.self_attn.q_proj.weight", 0, 24, 32),
        ("model.layers.2.self_attn.k_proj.weight", 0, 8, 16),
        ("model.layers.2.self_attn.v_proj.weight", 0, 8, 16),
        ("model.layers.2.self_attn.o_proj.weight", 1, 24, 32),
    ]
    middle = shared_tiny("llama").anatomy.slices(Head(2, 2))  # so is head 2
    assert middle[1] == ("model.layers.2.self_attn.k_proj.weight", 0, 8, 16)
    assert [shared_tiny("llama").anatomy.kv_head(head) for head in range(4)] == [0, 0, 1, 1]
    neox = [
        tuple(s) for s in shared_tiny("neox").anatomy.slices((0, 1), biases=False)
    ]  # q, k, v of a head side by side
    assert [s[1:] for s in neox] == [(0, 24, 32), (0, 32, 40), (0, 40, 48), (1, 8, 16)]
    gpt2 = [tuple(s) for s in shared_tiny("gpt2").anatomy.slices((0, 1))]
    assert gpt2[2:4] == [
        ("transformer.h.0.attn.c_attn.weight", 1, 40, 48),
        ("transformer.h.0.attn.c_attn.bias", 0, 40, 48),
    ]
    assert gpt2[-1] == ("transformer.h.0.attn.c_proj.weight", 0, 8, 16)
    assert not any("bias" in s.parameter for s in shared_tiny("gpt2").anatomy.slices((0, 1), biases=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_w_o_turns_z_into_the_attention_output(family):
    model, tokens = shared_tiny(family), torch.tensor([ragged()[0]])
    with torch.no_grad(), record(model, "z") as z, record(model, "attn_out") as out:
        model(tokens)
    for layer in range(3):
        written = torch.einsum("bphd,hdm->bpm", z[layer], model.anatomy.W_O(model.hf, layer))
        bias = getattr(model.anatomy.module(model.hf, layer, "o"), "bias", None)
        torch.testing.assert_close(written if bias is None else written + bias, out[layer], atol=1e-5, rtol=1e-5)


def test_norms_of_layers_and_of_everything():
    anatomy = shared_tiny("qwen3").anatomy
    assert anatomy.norms([1]) == [
        f"model.layers.1.{name}.weight"
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
    ]
    assert anatomy.norms()[-1] == "model.norm.weight" and len(anatomy.norms()) == 13
    assert len(shared_tiny("bert").anatomy.norms()) == 2 * (
        1 + 2 * 3 + 1
    )  # embeddings, two per layer, the MLM transform


def test_a_head_that_does_not_exist():
    with pytest.raises(ValueError, match=r"head a9\.h0 does not exist; this model has layers 0-2 and heads 0-3"):
        shared_tiny("llama").anatomy.slices((9, 0))


def test_an_unknown_layout_is_named():
    from transformers import OPTConfig, OPTForCausalLM

    hf = OPTForCausalLM(OPTConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8))
    with pytest.raises(ValueError, match="OPTForCausalLM has an attention layout that is not known here"):
        load(hf)

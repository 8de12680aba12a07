"""`restrict`: plain forward, masked gradient, nothing else moves, nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

from circuits import Circuit, load
from circuits.anatomy import Slice
from interventions.masks import HeadMask
from interventions.restriction import join, restrict

from models import CAUSAL, tiny

FAMILIES = (*CAUSAL, "phi3", "bert", "bert-classifier", "llama-classifier")
CIRCUIT = Circuit(["a0.h1", "a1.h0", "a1.h3"])
TOKENS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def loss_of(hf, tokens=TOKENS):
    hf.config.pad_token_id = 0
    logits = hf(tokens).logits.float()
    return (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.shape[-1])).sum(-1).mean()


def model_and_mask(family, **policy):
    model = load(tiny(family))
    return model, HeadMask.from_circuit(CIRCUIT, model, **policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_plain_model_and_gradient_is_the_masked_full_gradient(family):
    model, mask = model_and_mask(family)
    hf = model.hf
    plain = hf(TOKENS[:1]).logits
    loss_of(hf).backward()
    full = {name: p.grad for name, p in hf.named_parameters()}
    hf.zero_grad()
    with restrict(hf, mask) as restricted:
        assert torch.equal(hf(TOKENS[:1]).logits, plain)
        loss_of(hf).backward()
        assert {n for n, p in hf.named_parameters() if p.grad is not None} == {
            n for n, _ in restricted.named_parameters()
        }
        errors, norms = [], []
        for name, delta in restricted.named_parameters():
            parameter = name.removesuffix("_slice")
            dim, ranges = restricted.grouped[parameter]
            expected = torch.cat([full[parameter].narrow(dim, a, b - a) for a, b in ranges], dim)
            errors.append((delta.grad - expected).norm())
            norms.append(expected.norm())
        assert torch.stack(errors).norm() < 1e-6 * torch.stack(norms).norm()
        assert sum(p.numel() for p in restricted.parameters()) == mask.n_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_outside_the_mask_are_bit_identical_and_inside_they_moved(family):
    model, mask = model_and_mask(family)
    hf = model.hf
    names, kind = list(hf.state_dict()), type(hf)
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    with restrict(model, mask) as restricted:
        optimizer = torch.optim.SGD(restricted.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            for part in TOKENS.split(2):  # two backward passes per step: accumulation
                loss_of(hf, part).backward()
            torch.nn.utils.clip_grad_norm_(restricted.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        trained = hf(TOKENS[:1]).logits
        assert restricted.proof() == f"0 of {restricted.n_frozen:,} frozen values changed"
    assert restricted.proof().startswith("0 of ")
    torch.testing.assert_close(hf(TOKENS[:1]).logits, trained, rtol=1e-4, atol=1e-5)
    masks = mask.tensors()
    for name, parameter in hf.named_parameters():
        inside = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter[~inside], before[name][~inside]), name
        if inside.any() and not name.endswith("bias"):  # a key bias has no gradient: softmax does not see it
            assert (parameter[inside] != before[name][inside]).float().mean() > 0.9, name
    assert list(hf.state_dict()) == names and type(hf) is kind
    assert all(p.requires_grad for p in hf.parameters())


def test_equals_full_training_with_everything_but_the_slices_put_back():
    """Plain SGD with gradients masked by hand is the oracle."""
    model, mask = model_and_mask("qwen2")
    twin = copy.deepcopy(model.hf)
    masks = mask.tensors()
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    with restrict(model, mask) as restricted:
        optimizer = torch.optim.SGD(restricted.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            for hf, opt in ((model.hf, optimizer), (twin, by_hand)):
                opt.zero_grad()
                loss_of(hf).backward()
                if hf is twin:
                    for name, p in twin.named_parameters():
                        p.grad.mul_(masks.get(name, torch.zeros(p.shape, dtype=torch.bool)))
                opt.step()
    for (name, mine), other in zip(model.hf.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_weight_decay_pulls_towards_the_starting_weights():
    model, mask = model_and_mask("llama")
    before = copy.deepcopy(model.hf.state_dict())
    with restrict(model, mask) as restricted:
        for p in restricted.parameters():
            p.data.fill_(0.5)
        optimizer = torch.optim.AdamW(restricted.parameters(), lr=1.0, weight_decay=0.5)
        for p in restricted.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    inside = mask.tensors()["model.layers.0.self_attn.o_proj.weight"]
    change = (
        model.hf.get_parameter("model.layers.0.self_attn.o_proj.weight")
        - before["model.layers.0.self_attn.o_proj.weight"]
    )
    torch.testing.assert_close(change, inside * 0.25)


def test_an_exception_leaves_a_plain_model_with_what_was_learned():
    model, mask = model_and_mask("gpt2")
    modules = {name: type(m) for name, m in model.hf.named_modules()}
    before = model.hf.transformer.h[0].attn.c_attn.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        with restrict(model, mask) as restricted:
            for p in restricted.parameters():
                p.data.fill_(1.0)
            raise KeyboardInterrupt
    assert {name: type(m) for name, m in model.hf.named_modules()} == modules
    assert not [name for name, _ in model.hf.named_parameters() if "slice" in name]
    assert not hasattr(model.hf.transformer.h[0].attn.c_attn, "slices")
    assert not torch.equal(model.hf.transformer.h[0].attn.c_attn.weight, before)


def test_saved_checkpoint_is_plain_and_predicts_the_same(tmp_path):
    import transformers

    model, mask = model_and_mask("qwen3")
    with restrict(model, mask) as restricted:
        for p in restricted.parameters():
            p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.hf.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, model.hf(TOKENS).logits)
    assert not torch.allclose(again(TOKENS).logits, tiny("qwen3")(TOKENS).logits, atol=1e-3)


def test_a_leak_is_found_and_named():
    model, mask = model_and_mask("llama")
    with restrict(model, mask) as restricted:
        with torch.no_grad():
            model.hf.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-6
    assert restricted.changed() == ["model.layers.2.mlp.up_proj.weight"]
    assert "FROZEN VALUES CHANGED" in restricted.proof() and "up_proj" in restricted.proof()
    model, mask = model_and_mask("llama")
    with restrict(model, mask) as restricted:
        pass
    with torch.no_grad():  # a frozen column between two slices of one weight
        model.hf.model.layers[1].self_attn.o_proj.weight[0, 12] += 1
    assert restricted.changed() == ["model.layers.1.self_attn.o_proj.weight"]


def test_sixteen_bit_weights_learn_in_float32_and_frozen_bits_stay():
    hf = tiny("llama").to(torch.bfloat16)
    mask = HeadMask.from_circuit(CIRCUIT, load(hf))
    with restrict(hf, mask) as restricted:
        assert {p.dtype for p in restricted.parameters()} == {torch.float32}
        optimizer = torch.optim.AdamW(restricted.parameters(), lr=1e-2)
        loss_of(hf).backward()
        optimizer.step()
    assert restricted.proof().startswith("0 of ")
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}


def test_no_gradient_or_state_larger_than_its_slice():
    """Saved-tensor hooks and gradient hooks would not see a temporary; the shapes of all products do."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, mask = model_and_mask("llama", norms="none")
    q = model.hf.model.layers[0].self_attn.q_proj.weight.shape
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func) and isinstance(out, torch.Tensor):
                shapes.append(tuple(out.shape))
            return out

    with restrict(model, mask) as restricted:
        loss = loss_of(model.hf)
        with Watch():
            loss.backward()
        optimizer = torch.optim.AdamW(restricted.parameters())
        optimizer.step()
        state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.numel() > 1)
    assert shapes and tuple(q) not in shapes and tuple(reversed(q)) not in shapes
    assert state == 2 * mask.n_parameters


def test_a_copy_of_a_restricted_model_trains_on_its_own():
    model, mask = model_and_mask("gpt2")
    with restrict(model, mask) as restricted:
        twin = copy.deepcopy(model.hf)
        for p in restricted.parameters():
            p.data.fill_(0.1)
        assert not torch.equal(twin(TOKENS).logits, model.hf(TOKENS).logits)


@pytest.mark.parametrize(
    "slices, message",
    [
        ([], "the mask is empty"),
        ([("model.nothing.weight", 0, 0, 1)], "has no parameter 'model.nothing.weight'"),
        ([("model.layers.0.self_attn.q_proj.weight", 0, 0, 99)], r"has shape \(32, 32\), but the mask names"),
        ([("model.layers.0.self_attn.q_proj.weight", 0, 4, 4)], "but the mask names"),
        ([("model.embed_tokens.weight", 0, 0, 2)], "only linear layers, Conv1D and norms"),
        (
            [("model.norm.weight", 0, 0, 2), ("lm_head.weight", 0, 0, 1), ("lm_head.weight", 1, 0, 1)],
            r"sliced along dims \[0, 1\]",
        ),
    ],
)
def test_bad_masks_are_refused_with_one_line_and_the_model_untouched(slices, message):
    hf = tiny("llama")
    with pytest.raises(ValueError, match=message) as error:
        with restrict(hf, [Slice(*entry) for entry in slices]):
            raise AssertionError("not reached")
    assert "\n" not in str(error.value)
    assert all(p.requires_grad for p in hf.parameters())


def test_quantised_offloaded_tied_and_nested_are_refused():
    one = [Slice("model.layers.0.self_attn.q_proj.weight", 0, 0, 8)]
    hf = tiny("llama")
    q = hf.model.layers[0].self_attn.q_proj
    with restrict(hf, one), pytest.raises(ValueError, match="already restricted"):
        with restrict(hf, one):
            pass
    q.weight = nn.Parameter(q.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="is quantised .*int8.* load the model in float32"):
        with restrict(hf, one):
            pass
    hf = tiny("llama")
    hf.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        with restrict(hf, one, verify=False):
            pass
    tied = tiny("gpt2")
    with pytest.raises(ValueError, match="tied|only linear"):
        with restrict(tied, [Slice("transformer.wte.weight", 0, 0, 8)]):
            pass
    with restrict(tiny("llama"), one, verify=False) as restricted, pytest.raises(ValueError, match="verify=False"):
        restricted.proof()


def test_join_unites_overlaps():
    assert join([(4, 8), (0, 2), (2, 3), (5, 6)]) == ((0, 3), (4, 8))

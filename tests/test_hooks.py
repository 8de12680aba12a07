import pytest
import torch

from circuits import record, rewrite
from circuits.hooks import SITES

from models import FAMILIES, ragged, shared_tiny

TOKENS = torch.tensor([ragged()[0]])


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_records_what_the_lens_records_or_changes_the_output(family, site):
    """z, q, k, v equal TransformerLens'; everywhere an edit is felt (a roll: doubling would vanish in a norm)."""
    model = shared_tiny(family)
    with torch.no_grad():
        plain = model(TOKENS)
        with record(model, site) as cache:
            same = model(TOKENS)
        with rewrite(model, site, lambda x, layer: x.roll(1, -1), layers=[0]):
            changed = model(TOKENS)
    torch.testing.assert_close(same, plain, atol=0, rtol=0)
    assert sorted(cache) == [0, 1, 2] and (changed - plain).abs().max() > 1e-4
    if site in ("z", "q", "k", "v"):
        heads = model.anatomy.n_heads if site in ("z", "q") else model.anatomy.n_kv_heads
        assert cache.stack().shape == (3, 1, len(TOKENS[0]), heads, model.anatomy.d_head)
        with record(model, f"blocks.1.attn.hook_{site}") as through_lens:
            model.lens(TOKENS)
        torch.testing.assert_close(cache[1], through_lens[1].reshape(cache[1].shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", (*SITES, "blocks.1.attn.hook_z"))
def test_an_edit_acts_only_when_it_is_asked_to(site):
    model, calls, on = shared_tiny("llama"), [], [False]
    run = model.lens if "hook" in site else model

    def edit(x, layer):
        calls.append(layer)
        return x.roll(1, -1)

    with torch.no_grad():
        plain = run(TOKENS)
        with rewrite(model, site, edit, when=lambda: on[0]):
            same = run(TOKENS)
            assert calls == [] and torch.equal(same, plain)
            on[0] = True
            changed = run(TOKENS)
    assert calls and (changed - plain).abs().max() > 1e-4


@pytest.mark.parametrize("family", ("gpt2", "llama", "neox", "bert"))
def test_hooks_are_gone_after_an_exception(family):
    model = shared_tiny(family)
    before = hook_count(model)

    def fail(x, layer):
        raise RuntimeError("inside the model")

    for site in SITES:
        with pytest.raises(RuntimeError, match="inside the model"), rewrite(model, site, fail):
            model(TOKENS)
        assert hook_count(model) == before
    with pytest.raises(ValueError, match="layer 7 does not exist"), rewrite(model, "z", fail, layers=[0, 7]):
        pass
    assert hook_count(model) == before


def test_gradients_reach_the_recorded_activation():
    """A gate of one on every head: its gradient is the sum of z * dM/dz, checked against a finite difference."""
    model = shared_tiny("qwen3")
    gates = torch.ones(3, 4, requires_grad=True)
    with rewrite(model, "z", lambda z, layer: z * gates[layer][:, None]):
        model(TOKENS)[0, -1, 5].backward()
    step = torch.zeros(3, 4)
    step[1, 2] = 1e-3
    with torch.no_grad():
        moved = []
        for sign in (1, -1):
            with rewrite(model, "z", lambda z, layer, s=sign: z * (1 + s * step)[layer][:, None]):
                moved.append(model(TOKENS)[0, -1, 5])
    assert gates.grad[1, 2].item() == pytest.approx(((moved[0] - moved[1]) / 2e-3).item(), rel=2e-2)
    assert gates.grad.abs().min() > 0


def test_transformer_lens_names_act_on_the_lens():
    model = shared_tiny("llama")
    with record(model, "blocks.2.attn.hook_pattern") as cache:
        model.lens(TOKENS)
    pattern = cache[2]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert pattern.triu(1).abs().max() == 0


def test_sites_that_would_be_ignored_are_refused():
    cases = [
        ("bert", "blocks.0.attn.hook_pattern", "ignores edits there on BERT"),
        ("neox", "blocks.0.attn.hook_rot_q", "never fires on GPT-NeoX"),
        ("neox", "blocks.0.hook_resid_mid", "has no hook 'blocks.0.hook_resid_mid' on this model; close: "),
        ("llama", "zz", "no site 'zz'; expected one of z, q, k, v, attn_out"),
    ]
    for family, name, message in cases:
        with pytest.raises(ValueError, match=message), record(shared_tiny(family), name):
            pass


def test_an_empty_cache_says_that_nothing_ran():
    with record(shared_tiny("llama"), "z") as cache:
        pass
    with pytest.raises(ValueError, match="nothing was recorded; run the model inside"):
        cache.stack()

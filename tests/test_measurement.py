import json

import pytest
import torch

from circuits import Interference, load, measure_interference, pairwise_interference, trajectory
from circuits.directions import lora_factors, task_vector
from circuits.interference import overlap

from models import VOCABULARY, tiny


def loss(hf, seed=0):
    tokens = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(seed))
    return hf(input_ids=tokens, labels=tokens).loss


def nudged(hf, seed):
    """{name: task vector} of a random fine-tune of every matrix in the layers."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in hf.named_parameters() if p.ndim == 2}


def adapter(hf, seed, targets=("q_proj", "o_proj")):
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(hf, LoraConfig(r=3, lora_alpha=12, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return peft


def test_two_losses_measure_what_their_gradients_measure():
    model = load(tiny("llama"))
    names, parameters = zip(*model.hf.named_parameters(), strict=True)
    by_hand = [dict(zip(names, torch.autograd.grad(loss(model.hf, s), parameters), strict=True)) for s in (0, 1)]
    measured = measure_interference(loss(model.hf, 0), loss(model.hf, 1), model=model)
    name = "model.layers.1.mlp.up_proj.weight"
    assert measured[name].sti_l1 == pytest.approx(overlap(by_hand[0][name], by_hand[1][name]).sti_l1, rel=1e-4)
    assert "model.embed_tokens.weight" in measured.skipped and "model.norm.weight" in measured.skipped
    assert all(p.grad is None for p in parameters)
    as_functions = measure_interference(lambda: loss(model.hf, 0), lambda: loss(model.hf, 1), model=model)
    assert as_functions.total.cosine == pytest.approx(measured.total.cosine, rel=1e-5)


def test_losses_that_share_a_graph():
    model = load(tiny("llama"))
    logits = model.hf(torch.tensor([[3, 4, 5]])).logits
    measured = measure_interference(logits[..., 3].mean(), -logits[..., 3].mean(), model=model, view="layer")
    assert set(measured.overlaps) == {"layer 0", "layer 1", "layer 2"}
    assert all(part.cosine == pytest.approx(-1) for part in measured.overlaps.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_head_shares_add_up_to_the_layer(family):
    model = load(tiny(family))
    f, g = nudged(model.hf, 0), nudged(model.hf, 1)
    heads = measure_interference(f, g, model=model, view="head")
    layers = measure_interference(f, g, model=model, view="module")
    for layer in range(3):
        assert heads.attribution["cosine_share"][layer].sum().item() == pytest.approx(
            layers[f"layer {layer} attn"].cosine, abs=1e-9
        )
    assert heads.scores("cosine").values.shape == (3, 4) and heads.scores("cosine_share").values.shape == (3, 4)
    inside = heads["a1.h2"]
    rows = [s for s in model.anatomy.slices((1, 2), biases=False)]
    flat = [
        torch.cat([d[s.parameter].narrow(s.dim, s.start, s.stop - s.start).flatten() for s in rows]) for d in (f, g)
    ]
    assert inside.cosine == pytest.approx(torch.cosine_similarity(*flat, 0).item(), abs=1e-6)


def test_overlap_shares_add_up_to_the_overlap():
    """One layer's q, k, v, o: the shares of all heads sum to sum ||C||^2 / sum K over the sliced sides."""
    model = load(tiny("llama"))
    f, g = nudged(model.hf, 0), nudged(model.hf, 1)
    parts = measure_interference(f, g, model=model, K=4)
    of_layer = [parts[f"model.layers.1.self_attn.{r}_proj.weight"] for r in "qkvo"]
    expected = (sum(p.shared_left for p in of_layer[:3]) + of_layer[3].shared_right) / sum(p.K for p in of_layer)
    shares = measure_interference(f, g, model=model, view="head", K=4).attribution["overlap_share"]
    assert shares[1].sum().item() == pytest.approx(expected, rel=1e-9)


def test_circuit_view_does_not_see_a_change_of_basis():
    """W_V -> A W_V, W_O -> W_O A^-1 inside a head leaves OV as it is; parameter-space measures see a change."""
    model = load(tiny("gpt2"))
    f, g = nudged(model.hf, 0), nudged(model.hf, 1)
    before = measure_interference(f, g, model=model, view="circuit")["a1.h2 OV"]
    value, output = "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_proj.weight"
    weights, A = (
        dict(model.hf.named_parameters()),
        torch.eye(8) + 0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(5)),
    )
    at, z = slice(64 + 16, 64 + 24), slice(16, 24)
    turned = {name: f[name].clone() for name in f}
    W_V, W_O = weights[value][:, at] + f[value][:, at], weights[output][z] + f[output][z]
    turned[value][:, at] = (W_V @ A - weights[value][:, at]).detach()
    turned[output][z] = (torch.linalg.inv(A) @ W_O - weights[output][z]).detach()
    after = measure_interference(turned, g, model=model, view="circuit")["a1.h2 OV"]
    assert after.cosine == pytest.approx(before.cosine, abs=1e-5) and after.sti_fro == pytest.approx(
        before.sti_fro, rel=1e-4
    )
    heads = [measure_interference(d, g, model=model, view="head")["a1.h2"].cosine for d in (f, turned)]
    assert abs(heads[0] - heads[1]) > 1e-3


def test_circuit_view_is_the_dense_product():
    model = load(tiny("llama"))
    f, g = nudged(model.hf, 0), nudged(model.hf, 1)
    weights, found = dict(model.hf.named_parameters()), []
    for change in (f, g):
        W = {r: weights[f"model.layers.2.self_attn.{r}_proj.weight"].detach().double() for r in "qk"}
        D = {r: W[r] + change[f"model.layers.2.self_attn.{r}_proj.weight"].double() for r in "qk"}
        q, k = slice(24, 32), slice(8, 16)  # head 3 reads key/value head 1
        found.append(D["q"][q].T @ D["k"][k] - W["q"][q].T @ W["k"][k])
    measured = measure_interference(f, g, model=model, view="circuit", K=4)["a2.h3 QK"]
    expected = overlap(*found, 4)
    assert measured.cosine == pytest.approx(expected.cosine, abs=1e-9) and measured.sti_fro == pytest.approx(
        expected.sti_fro, rel=1e-6
    )


def test_adapters_stay_factors_and_measure_like_dense_deltas(tmp_path):
    base = load(tiny("llama"))
    first, second = adapter(tiny("llama"), 0), adapter(tiny("llama"), 1)
    second.save_pretrained(tmp_path / "second")
    measured = measure_interference(first, tmp_path / "second", model=base, K=2)
    factors = lora_factors(first)
    assert lora_factors(tmp_path / "second").keys() == factors.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    dense = [B @ A for B, A in (factors[name], lora_factors(second)[name])]
    assert measured[name].sti_l1 == pytest.approx(overlap(*dense, 2).sti_l1, rel=1e-5)
    merged = first.merge_and_unload()
    delta = task_vector(merged.state_dict(), base.hf.state_dict())[name]
    torch.testing.assert_close(delta, dense[0].detach(), rtol=1e-4, atol=1e-5)
    both = factors, lora_factors(second)
    heads = measure_interference(*both, model=base, view="head", K=2)
    q, o = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    flat = [torch.cat([(d[q][0][8:16] @ d[q][1]).flatten(), (d[o][0] @ d[o][1][:, 8:16]).flatten()]) for d in both]
    assert heads["a0.h1"].cosine == pytest.approx(torch.cosine_similarity(*flat, 0).item(), abs=1e-5)


def test_checkpoints_become_task_vectors(tmp_path):
    base, delta = tiny("llama"), nudged(tiny("llama"), 0)
    for index, sign in enumerate((1, -1)):
        tuned = tiny("llama")
        for name, parameter in tuned.named_parameters():
            parameter.data += sign * delta.get(name, torch.zeros(()))
        tuned.save_pretrained(tmp_path / str(index))
    measured = measure_interference(tmp_path / "0", tmp_path / "1", model=load(base), view="module")
    assert measured.total.cosine == pytest.approx(-1, abs=1e-5)
    assert load(tmp_path / "0").hf is not None
    again = measure_interference(load(tmp_path / "0"), load(tmp_path / "1").hf, model=base, view="module")
    assert again.total.cosine == pytest.approx(-1, abs=1e-5)


def test_without_a_model_names_say_the_layers():
    f = {"layers.0.attn.w": torch.eye(4), "layers.1.mlp.w": torch.eye(4), "bias": torch.ones(4)}
    measured = measure_interference(f, {n: -v for n, v in f.items()}, view="module")
    assert measured.values() == {"layer 0 attn": pytest.approx(-1), "layer 1 mlp": pytest.approx(-1)}
    assert measured.skipped == ("bias",)


def test_pairs_and_steps():
    objectives = {
        name: {"w": torch.randn(6, 6, generator=torch.Generator().manual_seed(s))} for s, name in enumerate("abc")
    }
    pairs = pairwise_interference(objectives, K=2)
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    names, table = trajectory(list(pairs.values()), "sti_fro")
    assert names == ["w"] and table.shape == (3, 1) and table[1, 0] == pytest.approx(pairs["a", "c"]["w"].sti_fro)
    with pytest.raises(ValueError, match="1 objective given; interference needs at least two"):
        pairwise_interference({"a": objectives["a"]})


def test_saved_and_loaded(tmp_path):
    model = load(tiny("llama"))
    measured = measure_interference(nudged(model.hf, 0), nudged(model.hf, 1), model=model, view="head")
    again = Interference.load(measured.save(tmp_path / "i.json"))
    assert again.values("sti_fro") == measured.values("sti_fro") and again.table() == measured.table()
    torch.testing.assert_close(again.scores("overlap_share").values, measured.scores("overlap_share").values)
    assert "a0.h0" in repr(again) or "cosine" in repr(again)
    (tmp_path / "x.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="does not hold an interference measurement"):
        Interference.load(tmp_path / "x.json")


def test_bad_input_is_one_clear_line(tmp_path):
    hf, w = tiny("llama"), {"w": torch.eye(4)}
    for arguments, options, text in [
        ((w, w), dict(view="neuron"), "view='neuron'; expected one of matrix, layer, module, head, circuit"),
        ((w, w), dict(view="head"), "view='head' needs model="),
        ((w, {"v": torch.eye(4)}), {}, r"share no weight matrix inside the model \(the first has w, the second v\)"),
        ((w, {"w": torch.eye(5)}), {}, "different shapes, 4 x 4 and 5 x 5"),
        ((w, {"w": torch.full((4, 4), torch.nan)}), {}, "w holds NaN or infinity"),
        (
            (w, {"w": (torch.ones(4, 2), torch.ones(3, 4))}),
            {},
            r"w: factors of shape \(4, 2\) and \(3, 4\) do not multiply",
        ),
        ((lambda: loss(hf), w), {}, "a loss is measured on its model: pass model="),
        ((loss(hf).detach(), w), dict(model=hf), "expected a scalar loss with a graph"),
        ((loss(tiny("llama", 1)), w), dict(model=hf), "the loss depends on no trainable parameter of this model"),
        ((hf, w), {}, "a fine-tuned model is compared with its base: pass model="),
        ((tmp_path, w), dict(model=hf), "no safetensors in .*; expected a directory written by save_pretrained"),
        ((w, w), dict(K=9), "K=9 singular directions asked of a 4 x 4 matrix"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            measure_interference(*arguments, **options)
    with pytest.raises(TypeError, match="cannot read an objective from int"):
        measure_interference(3, w)
    with pytest.raises(ValueError, match="scores per head need view"):
        measure_interference(w, w).scores()
    with pytest.raises(KeyError, match="'v' was not measured in the matrix view"):
        measure_interference(w, w)["v"]
    with pytest.raises(ValueError, match="share no parameter name"):
        task_vector({"a": torch.ones(2)}, {"b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"a has shape \(2,\) in the checkpoint, \(3,\) in the base"):
        task_vector({"a": torch.ones(2)}, {"a": torch.ones(3)})

"""HeadMask: the right slices, counted once, saved, refused elsewhere."""

import pytest
import torch

from circuits import Circuit, Head, load
from interventions.masks import HeadMask

from models import shared_tiny, tiny


def expected(model, circuit, kv):
    """The mask by its definition, entry by entry, for separate q, k, v in an nn.Linear layout."""
    d, group = model.anatomy.d_head, model.anatomy.group
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.hf.named_parameters()}
    for layer, head in circuit:
        prefix = f"model.layers.{layer}.self_attn"
        mates = {Head(layer, head // group * group + i) for i in range(group)}
        with_kv = kv == "shared" or (kv == "whole-group" and mates <= circuit.heads)
        for part, index in (("q", head), *((("k", head // group), ("v", head // group)) if with_kv else ())):
            for leaf in ("weight", "bias"):
                if f"{prefix}.{part}_proj.{leaf}" in masks:
                    masks[f"{prefix}.{part}_proj.{leaf}"][index * d : (index + 1) * d] = True
        masks[f"{prefix}.o_proj.weight"][:, head * d : (head + 1) * d] = True
    return {name: mask for name, mask in masks.items() if mask.any()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("kv", ["shared", "whole-group", "freeze"])
def test_slices_follow_the_definition_under_grouped_query_attention(family, kv):
    model = shared_tiny(family)
    circuit = Circuit(["a0.h0", "a0.h1", "a1.h2", "a2.h1"])  # a whole group, and two halves
    mask = HeadMask.from_circuit(circuit, model, kv=kv, norms="none")
    tensors, wanted = mask.tensors(), expected(model, circuit, kv)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert mask.n_parameters == sum(int(m.sum()) for m in wanted.values()) == sum(mask.counts().values())


@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3"])
def test_fused_layouts_select_what_changes_when_the_head_is_silenced(family):
    """The mask is right when zeroing exactly its entries silences the head: z of that head becomes 0, others stay."""
    from circuits import record

    model = load(tiny(family))
    mask = HeadMask.from_circuit(Circuit(["a1.h2"]), model, norms="none")
    tokens = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    with record(model, "z") as before:
        model(tokens)
    with torch.no_grad():
        for name, chosen in mask.tensors().items():
            if ".dense." not in name and "o_proj" not in name and "c_proj" not in name:
                model.hf.get_parameter(name)[chosen] = 0
    with record(model, "z") as after:
        model(tokens)
    assert after[1][:, :, 2].abs().max() == 0 and before[1][:, :, 2].abs().max() > 0
    group = model.anatomy.group  # phi3: heads 2 and 3 share the values that were silenced
    rest = [head for head in (0, 1, 3) if head // group != 2 // group]
    assert torch.equal(after[1][:, :, rest], before[1][:, :, rest]) and torch.equal(after[0], before[0])


def test_norm_and_bias_policies():
    model = shared_tiny("qwen2")
    circuit = Circuit(["a1.h0"])
    every = HeadMask.from_circuit(circuit, model)
    assert {n for n in every.shapes if "norm" in n} == set(model.anatomy.norms())
    own = HeadMask.from_circuit(circuit, model, norms="circuit")
    assert {n for n in own.shapes if "norm" in n} == {
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }
    bare = HeadMask.from_circuit(circuit, model, norms="none", biases=False)
    assert not [n for n in bare.shapes if n.endswith("bias") or "norm" in n]
    assert [n for n in every.shapes if n.endswith("q_proj.bias")]
    only_norms = HeadMask.from_circuit(Circuit([]), model)
    assert only_norms.n_parameters == 32 * 7


def test_budget_of_the_paper_for_qwen2_0_5b():
    """CT-SFT's three budgets (0.23, 0.44, 0.66 %) count K/V once per query head; the weights that exist are fewer."""
    import transformers

    from circuits.anatomy import Anatomy

    config = transformers.Qwen2Config(
        hidden_size=896, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=24, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        hf = transformers.Qwen2ForCausalLM(config)

    class Meta:
        anatomy = Anatomy.of(hf, "causal")
        name = "qwen"

    Meta.hf = hf
    counts = {}
    for k in (6, 12, 18):
        spread = Circuit([(23 - i // 6, i % 6) for i in range(k)])
        mask = HeadMask.from_circuit(spread, Meta)
        per_query_head = k * (4 * 64 * 896 + 3 * 64) + 43904
        counts[k] = (mask.n_parameters, per_query_head)
        kv = 2 * (64 * 896 + 64)
        assert per_query_head - mask.n_parameters == (k - k // 6) * kv  # six heads of a layer share one K/V head
    assert [round(100 * paper / 630479104, 3) for _, paper in counts.values()] == [0.225, 0.444, 0.662]


def test_saved_and_loaded(tmp_path):
    model = shared_tiny("qwen3")
    circuit = Circuit(["a0.h1", "a2.h3"], provenance={"how": "test"})
    mask = HeadMask.from_circuit(circuit, model, kv="whole-group", norms="circuit", biases=False)
    mask.save(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.safetensors"]
    again = HeadMask.load(tmp_path / "m", model)
    assert again.slices == mask.slices and again.circuit == circuit and again.policy == mask.policy
    assert again.shapes == dict(mask.shapes) and again.provenance == {"how": "test"}


@pytest.mark.parametrize("other", ["llama", "qwen3", "gpt2"])
def test_a_mask_made_for_another_model_is_refused_with_one_line(tmp_path, other):
    HeadMask.from_circuit(Circuit(["a0.h1"]), shared_tiny("qwen2")).save(tmp_path / "m")
    with pytest.raises(ValueError, match="mask was made for .* make one for") as error:
        HeadMask.load(tmp_path / "m", shared_tiny(other))
    assert "\n" not in str(error.value)


def test_the_same_architecture_with_other_weights_is_accepted(tmp_path):
    HeadMask.from_circuit(Circuit(["a0.h1"]), shared_tiny("llama")).save(tmp_path / "m")
    assert HeadMask.load(tmp_path / "m", load(tiny("llama", seed=3))).n_parameters


def test_other_bad_input(tmp_path):
    model = shared_tiny("llama")
    with pytest.raises(ValueError, match="a9.h9.*layers 0-2"):
        HeadMask.from_circuit(Circuit(["a9.h9"]), model)
    with pytest.raises(ValueError, match="kv='mine' is not a policy; choose one of 'shared', 'whole-group', 'freeze'"):
        HeadMask.from_circuit(Circuit(["a0.h0"]), model, kv="mine")
    with pytest.raises(ValueError, match="would train nothing"):
        HeadMask.from_circuit(Circuit([]), model, norms="none")
    with pytest.raises(FileNotFoundError, match="no file"):
        HeadMask.load(tmp_path / "nothing", model)
    with pytest.raises(ValueError, match="no export format 'xml'"):
        HeadMask.from_circuit(Circuit(["a0.h0"]), model).to_json("xml")


def test_mib_export_names_every_node_and_marks_the_circuit():
    model = shared_tiny("llama")
    exported = HeadMask.from_circuit(Circuit(["a0.h1", "a2.h3"]), model).to_json("mib")
    assert exported["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    assert [n for n, v in exported["nodes"].items() if v["in_graph"]] == ["input", "a0.h1", "a2.h3", "logits"]
    assert len(exported["nodes"]) == 2 + 3 * 5 and exported["edges"] == {}

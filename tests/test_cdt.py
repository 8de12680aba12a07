"""CD-T on whole models: against mean ablation by hooks (exact), the published code's numbers (paper), and itself (batching, padding)."""

import pytest
import torch

from circuits import load, record, rewrite
from circuits.cdt import Node, decompose

from models import FAMILIES, ragged, shared_tiny, tiny

PHI = "phi3"


def means_of(model, positions: int | None = None, seed: int = 3) -> torch.Tensor:
    a = model.anatomy
    shape = (a.n_layers, *([] if positions is None else [positions]), a.n_heads, a.d_head)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def ablated(model, tokens, mask, nodes, means) -> torch.Tensor:
    """Logits with z of the nodes set to the mean, by hooks on the Hugging Face model."""

    def replace(z, layer):
        z = z.clone()
        for node in nodes:
            if node.layer == layer:
                mean = means[layer] if means.ndim == 3 else means[layer, : z.shape[1]]
                if node.position is None:
                    z[:, :, node.head] = mean[..., node.head, :].to(z)
                else:
                    at = node.position
                    z[:, at, node.head] = (mean[node.head] if mean.ndim == 2 else mean[at, node.head]).to(z)
        return z

    with torch.no_grad(), rewrite(model, "z", replace):
        return model(tokens, mask)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


SOURCES = [[Node(0, 1)], [Node(1, 3)], [Node(2, 0)], [Node(0, 2), Node(1, 0), Node(2, 3)]]


@pytest.mark.parametrize("family", [*FAMILIES, PHI])
def test_exact_is_mean_ablation(family):
    model, means = shared_tiny(family), means_of(shared_tiny(family))
    for side in ("right", "left"):
        tokens, mask = model.pad(ragged(), side)
        beta = decompose(model, tokens, SOURCES, means, attention_mask=mask)
        with torch.no_grad():
            clean = model(tokens, mask)
        real = mask.bool()
        for source, found in zip(SOURCES, beta, strict=True):
            effect = clean - ablated(model, tokens, mask, source, means)
            if model.kind == "classifier":
                found = found[:, 0] if model.is_encoder else found[torch.arange(3), model.pooled_position(tokens, mask)]
                assert relative(found, effect) < 1e-5
            else:
                assert relative(found[real], effect[real]) < 1e-5


def test_exact_is_mean_ablation_to_every_digit():
    """In float64 only the arithmetic's own rounding is left."""
    model = load(tiny("gpt2").double())
    tokens, mask = model.pad(ragged(), "left")
    means = means_of(model).double()
    beta = decompose(model, tokens, [SOURCES[3]], means, attention_mask=mask)[0]
    with torch.no_grad():
        effect = model(tokens, mask) - ablated(model, tokens, mask, SOURCES[3], means)
    assert relative(beta[mask.bool()], effect[mask.bool()]) < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "neox", "bert"])
def test_single_positions_and_mixed_sets_are_exact(family):
    """Sources of one position: what comes before them is skipped under a causal mask. Small effects, so float64."""
    model = load(tiny(family).double())
    tokens = torch.tensor(ragged(2, (9, 9)))
    means = means_of(model, positions=9).double()
    sources = [
        [Node(0, 1, 4)],
        [Node(1, 2, 8)],
        [Node(0, 0, 2), Node(0, 0, 6), Node(2, 1, 8)],
        [Node(1, 1), Node(2, 2, 3)],
    ]
    beta = decompose(model, tokens, sources, means, positions=[8], vocab=[5, 1])
    with torch.no_grad():
        clean = model(tokens)
    for source, found in zip(sources, beta, strict=True):
        effect = (clean - ablated(model, tokens, None, source, means))[:, 8:, [5, 1]]
        assert relative(found, effect) < 1e-5


@pytest.mark.parametrize("rules", ["paper", "frozen"])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_skipping_early_positions_changes_nothing(family, rules):
    """The same source as part of a batch that reads an early position, where nothing can be skipped."""
    model = shared_tiny(family)
    tokens, means = torch.tensor(ragged(2, (9, 9))), means_of(model)
    sources = [[Node(0, 1, 5)], [Node(1, 2, 7)]]
    skipped = decompose(model, tokens, sources, means, rules, positions=[-1])
    whole = decompose(model, tokens, sources, means, rules, positions=[0, -1])
    assert relative(skipped[:, :, 0], whole[:, :, 1]) < 1e-5
    assert whole[:, :, 0].abs().max() == 0


@pytest.mark.parametrize("rules", ["paper", "frozen"])
@pytest.mark.parametrize("family", [*FAMILIES, PHI])
def test_approximations_point_the_way_of_the_exact_effect(family, rules):
    model = shared_tiny(family)
    tokens, mask = model.pad(ragged(), "right")
    beta = decompose(model, tokens, SOURCES, means_of(model), rules, positions=[-1], attention_mask=mask)
    assert torch.isfinite(beta).all() and beta.norm() > 0
    exact = decompose(model, tokens, SOURCES, means_of(model), "exact", positions=[-1], attention_mask=mask)
    assert torch.nn.functional.cosine_similarity(beta.flatten(), exact.flatten(), dim=0) > 0.3


@torch.no_grad()
def test_frozen_last_layer_is_the_direct_effect():
    """From the last layer only the MLP and the final norm's scale stand between z and the logits; without the MLP it is linear."""
    model = load(tiny("llama").double())
    for layer in model.hf.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    tokens, means = torch.tensor(ragged(2, (6, 6))), means_of(load(tiny("llama"))).double()
    beta = decompose(model, tokens, [[Node(2, 1)]], means, "frozen", positions=[-1])[0, :, 0]
    with record(model, "z") as z, record(model, "resid_post") as out:
        model(tokens)
    final = out[2][:, -1]
    scale = torch.rsqrt(final.pow(2).mean(-1, keepdim=True) + model.hf.config.rms_norm_eps)
    written = (z[2][:, -1, 1] - means[2, 1]) @ model.anatomy.W_O(model.hf, 2)[1]
    expected = (written * scale * model.hf.model.norm.weight) @ model.hf.lm_head.weight.T
    assert relative(beta, expected) < 2e-6


# ---- the published numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared):
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    file = shared / "reference" / "cdt_gpt2.safetensors"
    if not file.is_file():
        pytest.skip("the published code's numbers are not beside the project")
    facts = load_file(file)
    config = GPT2Config(
        n_layer=3, n_head=4, n_embd=32, vocab_size=61, n_positions=16, layer_norm_epsilon=1e-8, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config)
    hf.load_state_dict({k.removeprefix("weights."): v for k, v in facts.items() if k.startswith("weights.")})
    return load(hf.eval()), facts


def test_paper_rules_give_the_published_numbers_for_heads(published):
    model, facts = published
    sources = [[Node(layer, head)] for layer in range(3) for head in range(4)]
    beta = decompose(model, facts["tokens"], sources, facts["mean_z"], "paper").unflatten(0, (3, 4))
    assert relative(beta, facts["head_relevant_logits"]) < 2e-3


def test_paper_rules_give_the_published_numbers_for_nodes(published):
    """Prompt 2 has a unit whose value before its bias is rounding noise (0 +- 1e-7); the published code divides noise there.

    The other prompts agree to 1e-4; with prompt 2 the distance stays below the published code's own miss of the logits.
    """
    model, facts = published
    sources = [[Node(layer, head, q)] for layer in range(3) for q in range(10) for head in range(4)]
    beta = decompose(model, facts["tokens"], sources, facts["mean_z"], "paper", positions=[-1])
    beta, theirs = beta[:, :, 0].unflatten(0, (3, 10, 4)), facts["node_relevant_logits_last"]
    assert relative(beta[..., [0, 1, 3], :], theirs[..., [0, 1, 3], :]) < 1e-4
    distance = (beta - theirs).norm(dim=-1) / facts["logits"][:, -1].norm(dim=-1)
    assert distance.max() < 3e-3


# ---- other dtypes, adapters, bad models -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_part_of_the_model(family):
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load(get_peft_model(tiny(family), config).eval())
    tokens, means = torch.tensor(ragged(2, (7, 7))), means_of(model)
    beta = decompose(model, tokens, [[Node(1, 2)]], means)[0]
    with torch.no_grad():
        effect = model(tokens) - ablated(model, tokens, None, [Node(1, 2)], means)
    assert relative(beta, effect) < 1e-5
    plain = decompose(load(tiny(family)), tokens, [[Node(1, 2)]], means)[0]
    assert relative(plain, effect) > 1e-2


def test_a_block_that_computes_something_else_is_refused():
    model = load(tiny("llama"))
    block = model.hf.model.layers[1]
    inner = block.mlp.forward
    block.mlp.forward = lambda x: inner(x) * 1.1
    with pytest.raises(ValueError, match="block 1 computes something that is not known here"):
        decompose(model, torch.tensor(ragged(1)), [[Node(0, 0)]], means_of(model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sources": [[Node(7, 0)]]}, "source a7.h0 does not exist"),
        ({"sources": [[]]}, "at least one Node"),
        ({"sources": [[Node(0, 0, 40)]]}, "source position 40 does not exist"),
        ({"positions": [50]}, "positions [50] do not exist"),
        ({"means": torch.zeros(3, 4, 7)}, "expected [3, (position,) 4, 8]"),
    ],
)
def test_bad_input_says_what_was_expected(options, text):
    model = shared_tiny("llama")
    options = {"sources": [[Node(0, 0)]], "means": means_of(model), **options}
    with pytest.raises(ValueError) as error:
        decompose(model, torch.tensor(ragged(1)), **options)
    assert text in str(error.value)

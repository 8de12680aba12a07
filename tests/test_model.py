"""load(): two faces of one set of weights, on every family, and the traps it guards."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch

from circuits import load

from models import CAUSAL, CLASSIFIERS, ENCODERS, FAMILIES, ragged, shared_tiny, tiny

DECODERS = [family for family in FAMILIES if family not in ENCODERS]


def lens_logits(model, row):
    logits = model.lens(torch.tensor([row]))
    return logits[:, -1] if logits.ndim == 3 and model.kind == "classifier" else logits


@pytest.mark.parametrize("family", (*FAMILIES, "phi3"))
def test_both_faces_agree_with_the_plain_model(family):
    hf, row = tiny(family), ragged()[0]
    with torch.no_grad():
        plain = hf(torch.tensor([row])).logits
        model = load(hf)
        torch.testing.assert_close(model(torch.tensor([row])), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lens_logits(model, row), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_by_one(family, side):
    model, rows = shared_tiny(family), ragged()
    with torch.no_grad():
        batch = model(*model.pad(rows, side))
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row]))[0]
            found = batch[i]
            if model.kind != "classifier":
                found = found[: len(row)] if side == "right" else found[-len(row) :]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_readout_of_a_few_columns_equals_the_full_logits(family):
    model = shared_tiny(family)
    tokens, mask = model.pad(ragged(), "left")
    readout, columns = model.pooled_position(tokens, mask), torch.tensor([2, 0])
    with torch.no_grad():
        full = model(tokens, mask)
        full = full if model.kind == "classifier" else full[torch.arange(3), readout]
        torch.testing.assert_close(model.logits(tokens, mask, readout, columns), full[:, columns], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ("gpt2", "llama", "qwen3", "gemma3", "neox", "bert", *CLASSIFIERS))
def test_training_one_face_shows_in_the_other(family):
    model, row = load(tiny(family)), ragged()[0]
    before = lens_logits(model, row)
    optimizer = torch.optim.AdamW(model.hf.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.hf(torch.tensor([row])).logits.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = lens_logits(model, row)
        torch.testing.assert_close(after, model(torch.tensor([row])), atol=1e-5, rtol=1e-5)
        assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ("gpt2", "llama", "neox", "bert-classifier"))
def test_the_lens_leaves_the_model_clean(family, tmp_path):
    model = load(tiny(family))
    names, attention = [n for n, _ in model.hf.named_parameters()], model.hf.config._attn_implementation
    expected = model(torch.tensor([ragged()[0]]))
    _ = model.lens
    assert [n for n, _ in model.hf.named_parameters()] == names
    assert model.hf.config._attn_implementation == attention
    model.hf.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(torch.tensor([ragged()[0]])), expected, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    """Left to itself, transformers gives it a random head (and TransformerLens says nothing)."""
    tiny("bert").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace("BertForMaskedLM", "BertForSequenceClassification")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"has no weights for .*classifier.* they would be random"):
        load(tmp_path)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_keeps_its_own_head_in_the_lens(family):
    """Two boots of one checkpoint agree with each other and with the model; edits at z reach the classes."""
    hf, row = tiny(family), torch.tensor([ragged()[0]])
    first, second = load(hf), load(hf)
    torch.testing.assert_close(lens_logits(first, row[0].tolist()), lens_logits(second, row[0].tolist()))
    with first.lens.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)]):
        edited = lens_logits(first, row[0].tolist())
    assert (edited - lens_logits(second, row[0].tolist())).abs().max() > 1e-3


def test_lora_is_seen_by_hf_and_refused_by_the_lens():
    from peft import LoraConfig, get_peft_model

    base = tiny("gpt2")
    row = torch.tensor([ragged()[0]])
    plain = base(row).logits.detach()
    peft = get_peft_model(
        base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    model = load(peft)
    assert (model(row) - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(row), peft(row).logits)
    with pytest.raises(ValueError, match=r"does not see PEFT adapters.*merge_and_unload"):
        _ = model.lens


def test_logging_and_warnings_are_left_as_found():
    """In a fresh process: importing the bridge changes both, `lens` puts them back."""
    code = """
import sys, logging, warnings; sys.path[:0] = ["tests", "."]
import transformers
from models import tiny; from circuits import load
model = load(tiny("llama"))
before = logging.getLogger("transformers").level, list(warnings.filters)
model.lens
assert before == (logging.getLogger("transformers").level, list(warnings.filters))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_surroundings_come_back_after_an_exception():
    from circuits.lens import surroundings_kept

    level, filters = logging.getLogger("transformers").level, list(warnings.filters)
    with pytest.raises(RuntimeError), surroundings_kept():
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="x")
        raise RuntimeError
    assert (logging.getLogger("transformers").level, list(warnings.filters)) == (level, filters)


def test_multimodal_models_are_refused_before_anything_is_installed():
    model = load(tiny("llama"))
    model.hf.config.vision_config = {}
    with pytest.raises(ValueError, match="LlamaForCausalLM is multimodal; load its text model"):
        _ = model.lens


def test_a_lens_that_computes_something_else_is_refused(monkeypatch):
    from circuits import lens

    def with_dropped_layer(hf):
        copied = twin(hf)
        copied.model.layers = copied.model.layers[:2]
        return copied

    twin = lens.twin
    monkeypatch.setattr(lens, "twin", with_dropped_layer)
    with pytest.raises(ValueError, match="does not reproduce the model"):
        _ = load(tiny("llama")).lens


def test_local_things_touch_no_network(tmp_path, monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    model = load(tmp_path)
    assert model.tokenizer is None and model.name == tmp_path.name
    assert model.lens(torch.tensor([[3, 4]])).shape == (1, 2, 61)


def test_what_cannot_be_loaded_says_so_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model directory './nowhere'; expected a directory written by"):
        load("./nowhere")
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        load(tmp_path)
    hf = tiny("llama")
    hf.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"weights hold NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight; load a"
    ):
        load(hf)
    with pytest.raises(ValueError, match="LlamaModel is neither a causal LM, a masked LM nor a sequence classifier"):
        load(tiny("llama").model)
    hf.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlamaModel; expected a causal language model"):
        load(tmp_path)
    with pytest.raises(ValueError, match="device= and dtype= are for models loaded by name"):
        load(tiny("llama"), dtype=torch.bfloat16)


def test_pickled_weights_are_not_read(tmp_path):
    hf = tiny("llama")
    hf.config.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected config.json and model.safetensors"):
        load(tmp_path)


def test_evaluation_mode_is_borrowed_and_returned():
    hf = tiny("bert")
    hf.train()
    hf.bert.encoder.layer[1].eval()  # a user's own mixture of modes
    model, row = load(hf), torch.tensor([ragged()[0]])
    torch.testing.assert_close(model(row), model(row), atol=0, rtol=0)  # no dropout
    assert hf.training and not hf.bert.encoder.layer[1].training and hf.bert.encoder.layer[0].training


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_does_not_depend_on_the_batch(family):
    model, rows = shared_tiny(family), ragged()
    tokens, mask = model.pad(rows, "left")
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=4, eos_token_id=None)[0]
        assert out[-4:].tolist() == alone[-4:].tolist()


def test_half_precision_loads_in_float32_on_cpu_unless_asked(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").dtype == torch.float32
    half = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.lens(torch.tensor([[3, 4]])).isfinite().all()

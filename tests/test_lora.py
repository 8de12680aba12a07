import copy

import pytest
import torch

from circuits import Circuit, Head
from interventions.lora import AdaptedLinear, StackedLoRA
from interventions.targets import confine, find_blocks

from models import FAMILIES, ragged, shared_tiny, tiny

# PEFT 0.21 reads a property that transformers 5 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WIDTHS = {"all": (None, "all-linear"), "last": ([2], "all-linear"), "default": ([1, 2], None)}


def stacked(hf, members: int = 3, **options) -> StackedLoRA:
    """Members that differ from the base and from one another."""
    stack = StackedLoRA(hf, members, r=4, **options).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for B in stack.B:
            B.copy_(0.1 * torch.randn(B.shape, generator=generator))
    return stack


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    rows = ragged()
    tokens, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return {"input_ids": tokens, "attention_mask": mask}


def outputs(hf, stack, inputs) -> torch.Tensor:
    with stack.attached(hf) as repeat:
        logits = hf(**{name: value.repeat(repeat, 1) for name, value in inputs.items()}).logits
    return logits.view(stack.members, len(inputs["input_ids"]), *logits.shape[1:])


member_outputs = torch.no_grad()(outputs)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_peft_of_each_saved_member(family, width, tmp_path):
    from peft import PeftModel

    layers, targets = WIDTHS[width]
    hf = tiny(family)
    stack = stacked(hf, layers=layers, target_modules=targets)
    inputs = batch("left" if family == "gpt2" else "right")
    ours = member_outputs(hf, stack, inputs)
    real = inputs["attention_mask"].bool() if ours.ndim == 4 else slice(None)
    for member in range(stack.members):
        stack.save_member(member, tmp_path / str(member), hf)
        peft = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / str(member)).eval()
        with torch.no_grad():
            theirs = peft(**inputs).logits
        torch.testing.assert_close(ours[member][real], theirs[real], atol=1e-5, rtol=1e-5)
    assert (ours[0] - ours[1])[real].abs().max() > 1e-3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def test_layers_below_the_first_adapted_one_see_the_plain_batch():
    hf, seen = tiny("llama"), []
    for block in hf.model.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    stack = stacked(hf, layers=[1, 2], target_modules=["down_proj"])
    with stack.attached(hf) as repeat, torch.no_grad():
        assert repeat == 1 and hf(**batch()).logits.shape[0] == 9
    assert seen == [3, 9, 9]


def test_classifiers_and_alibi_repeat_the_input_instead():
    import transformers as t

    bloom = t.BloomForCausalLM(t.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert stacked(bloom).first is None and stacked(tiny("llama-classifier")).first is None
    assert member_outputs(bloom, stacked(bloom), batch()).shape == (3, 3, 9, 61)


def test_new_members_are_the_base_and_start_apart():
    hf = tiny("gpt2")
    stack = StackedLoRA(hf, 3)
    with torch.no_grad():
        base = hf(**batch()).logits
    torch.testing.assert_close(member_outputs(hf, stack, batch()), base.expand(3, -1, -1, -1))
    assert all((A[0] - A[1]).abs().min() < (A[0] - A[1]).abs().max() for A in stack.A)
    torch.testing.assert_close(StackedLoRA(hf, 5).A[0][:3], stack.A[0])


def test_adapters_survive_a_round_trip(tmp_path):
    hf = tiny("qwen2")
    stack, other = (
        stacked(hf, target_modules=["q_proj", "v_proj"]),
        StackedLoRA(hf, 3, 4, target_modules=["q_proj", "v_proj"]),
    )
    for member in range(3):
        stack.save_member(member, tmp_path / str(member), hf)
        other.load_member(member, tmp_path / str(member))
    for mine, theirs in zip(stack.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert '"q_proj"' in (tmp_path / "0" / "adapter_config.json").read_text()


def test_reads_an_adapter_that_peft_wrote(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    peft = get_peft_model(tiny("gpt2"), config).eval()
    peft.save_pretrained(tmp_path)
    hf = tiny("gpt2")
    stack = StackedLoRA(hf, 1, 4, target_modules=["c_attn"])
    stack.load_member(0, tmp_path)
    with torch.no_grad():
        theirs = peft(**batch()).logits
    torch.testing.assert_close(member_outputs(hf, stack, batch())[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ("gpt2", "llama", "neox", "qwen3"))
def test_circuit_confines_members_to_rows_and_columns_of_its_heads(family):
    model = shared_tiny(family)
    circuit = Circuit([Head(1, 2), Head(2, 0)])
    stack = stacked(model.hf, keep=confine(model, circuit))
    owned = {piece: set() for piece in stack.names}
    for head in circuit:
        for piece in model.anatomy.slices(head):
            name, _, kind = piece.parameter.rpartition(".")
            if kind == "weight":
                owned[name] |= {(piece.dim, i) for i in range(piece.start, piece.stop)}
    for number, name in enumerate(stack.names):
        A, B = stack.factors(number)
        delta = (A.mT @ B)[0].detach()  # [in, out]
        weight = model.hf.get_submodule(name).weight
        delta = delta if delta.shape == weight.shape and family == "gpt2" else delta.T
        moved = {(dim, i) for dim in (0, 1) for i in range(weight.shape[dim]) if delta.select(dim, i).abs().max() > 0}
        dims = {dim for dim, _ in owned[name]}
        assert owned[name] and {place for place in moved if place[0] in dims} == owned[name]


def test_half_precision_base_keeps_adapters_in_single():
    hf = tiny("llama").to(torch.bfloat16)
    stack = stacked(hf)
    out = member_outputs(hf, stack, batch())
    assert out.dtype == torch.bfloat16 and stack.A[0].dtype == torch.float32 and (out[0] - out[1]).abs().max() > 0


@pytest.mark.parametrize("bias", (False, True))
def test_gradients_of_an_adapted_layer_are_its_slopes(bias):
    """By finite differences, in double precision; the layer's own output is a view where it has a bias."""
    layer = torch.nn.Linear(4, 5, bias=bias).double().requires_grad_(False)
    sizes = ((2, 3, 4), (2, 2, 4), (2, 2, 5))  # two members, a text of three tokens each
    x, A, B = (torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) for size in sizes)

    def adapted(x, A, B):
        return AdaptedLinear.apply(x, A, B, layer(x).detach(), layer.weight, 0.7)

    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    torch.testing.assert_close(adapted(*leaves), layer(x) + 0.7 * (x @ A.mT) @ B)
    assert torch.autograd.gradcheck(adapted, leaves)
    adapted(x.detach(), A, B).sum().backward()  # below it nothing learns
    assert A.grad.abs().sum() > 0


def learned(hf, stack) -> list[torch.Tensor]:
    outputs(hf, stack, batch())[:, :, :4].log_softmax(-1)[..., 7].sum().backward()
    return [parameter.grad for parameter in stack.parameters()]


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_layer_that_others_hooked_is_left_to_autograd(family):
    """What their hook does to the output keeps its gradient, and members learn the same."""
    hf, plain = tiny(family), tiny(family)
    stack, strength = stacked(hf), torch.ones((), requires_grad=True)
    for name in stack.names:
        hf.get_submodule(name).register_forward_hook(lambda module, args, output: strength * output)
    for ours, theirs in zip(learned(hf, stack), learned(plain, stacked(plain)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
        assert theirs.abs().max() > 0
    assert strength.grad.abs() > 0.1


def test_an_offloaded_layer_is_left_to_autograd():
    """Between its forwards such a layer has no weights to multiply by."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hf, plain = tiny("llama"), tiny("llama")
    stack, layer = stacked(hf, target_modules=["up_proj"]), hf.model.layers[1].mlp.up_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True))
    assert layer.weight.is_meta
    expected = learned(plain, stacked(plain, target_modules=["up_proj"]))
    for ours, theirs in zip(learned(hf, stack), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
        assert theirs.abs().max() > 0


def test_hooks_go_and_gradients_return_when_the_model_fails():
    hf = tiny("llama")
    stack = stacked(hf, layers=[1])
    with pytest.raises(IndexError), stack.attached(hf):
        assert not next(hf.parameters()).requires_grad
        hf(input_ids=torch.tensor([[99]]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert all(parameter.requires_grad for parameter in hf.parameters())


def test_bad_input_is_told(tmp_path):
    hf = tiny("llama")
    with pytest.raises(
        ValueError, match="match no linear layer of LlamaForCausalLM; its linear layers end in down_proj"
    ):
        StackedLoRA(hf, 2, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="members=0"):
        StackedLoRA(hf, 0)
    with pytest.raises(TypeError, match=r"pass load\(model\)"):
        confine(hf, Circuit([Head(0, 0)]))
    stacked(hf, target_modules=["q_proj"]).save_member(0, tmp_path, hf)
    with pytest.raises(ValueError, match="r=4, lora_alpha=8; expected r=2"):
        StackedLoRA(hf, 2, r=2, target_modules=["q_proj"]).load_member(0, tmp_path)
    with pytest.raises(ValueError, match="adapter and ensemble differ in 12 tensors"):
        StackedLoRA(hf, 2, r=4, target_modules=["v_proj"]).load_member(0, tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        StackedLoRA(hf, 2).load_member(0, tmp_path / "nowhere")


def test_a_model_that_carries_adapters_is_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="merge_and_unload"):
        StackedLoRA(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])), 2)


def test_blocks_are_found_in_every_family():
    assert {find_blocks(tiny(family)) is not None for family in FAMILIES} == {True}

"""`restrict` inside other people's training loops: each test is a short example of its library, plus the proof."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wordlevel import word_tokenizer

from circuits import Circuit, load
from interventions.masks import HeadMask
from interventions.restriction import restrict

from models import tiny

CIRCUIT = Circuit(["a0.h1", "a1.h0", "a2.h3"])
TESTS = Path(__file__).parent


def rows(n=8, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 61, (length,), generator=generator)} for _ in range(n)]


def collate(batch):
    tokens = torch.stack([row["input_ids"] for row in batch])
    return {"input_ids": tokens, "labels": tokens}


def setting(family="llama"):
    model = load(tiny(family))
    return model, HeadMask.from_circuit(CIRCUIT, model)


def moved_only_inside(hf, before, mask):
    masks = mask.tensors()
    inside_moved = False
    for name, parameter in hf.named_parameters():
        inside = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter[~inside], before[name][~inside]), name
        inside_moved |= bool((parameter[inside] != before[name][inside]).any())
    return inside_moved


def weights(hf):
    return {name: parameter.detach().clone() for name, parameter in hf.named_parameters()}


def trainer(hf, folder, steps=4, **options):
    from transformers import Trainer, TrainingArguments

    options = {"weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2, **options}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no" if "save_steps" not in options else "steps", logging_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return Trainer(hf, arguments, train_dataset=rows(16), data_collator=collate)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_trainer(family, tmp_path):
    model, mask = setting(family)
    before = weights(model.hf)
    with restrict(model, mask) as restricted:
        run = trainer(model.hf, tmp_path)
        run.train()
        state = sum(v.numel() for s in run.optimizer.state.values() for v in s.values() if v.numel() > 1)
        assert state == 2 * mask.n_parameters
    assert restricted.proof().startswith("0 of ") and moved_only_inside(model.hf, before, mask)


def test_trainer_resumed_from_a_checkpoint_is_bit_equal(tmp_path):
    model, mask = setting()
    with restrict(model, mask):
        trainer(model.hf, tmp_path / "straight", steps=6, save_steps=3).train()
    straight = weights(model.hf)
    model, mask = setting()  # a new process: the starting weights again
    with restrict(model, mask) as restricted:
        run = trainer(model.hf, tmp_path / "resumed", steps=6, save_steps=3)
        run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
        assert run.state.global_step == 6
    assert restricted.proof().startswith("0 of ")
    assert all(torch.equal(parameter, straight[name]) for name, parameter in model.hf.named_parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own option
def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, mask = setting()
    before = weights(model.hf)
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    config = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[], bf16=False,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", max_length=16, gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    with restrict(model, mask) as restricted:
        SFTTrainer(model.hf, args=config, train_dataset=data, processing_class=word_tokenizer()).train()
    assert restricted.proof().startswith("0 of ") and moved_only_inside(model.hf, before, mask)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own option
def test_dpo_trainer(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, mask = setting()
    before = weights(model.hf)
    pairs = [{"prompt": f"w{i} w{i + 3}", "chosen": " w9 w8", "rejected": " w7 w6"} for i in range(4, 12)]
    config = DPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[], bf16=False,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    reference = copy.deepcopy(model.hf)
    with restrict(model, mask) as restricted:
        data = Dataset.from_list(pairs)
        DPOTrainer(model.hf, reference, args=config, train_dataset=data, processing_class=word_tokenizer()).train()
    assert restricted.proof().startswith("0 of ") and moved_only_inside(model.hf, before, mask)
    assert all(torch.equal(parameter, before[name]) for name, parameter in reference.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_lora_kept_to_the_heads_loads_in_plain_peft(family, tmp_path):
    from peft import PeftModel, get_peft_model

    model = load(tiny(family))
    mask = HeadMask.from_circuit(CIRCUIT, model, norms="none")
    peft = get_peft_model(copy.deepcopy(model.hf), mask.lora_config(r=4))
    with restrict(peft, mask):
        run = trainer(peft, tmp_path, steps=3)
        run.train()
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    tokens = rows()[0]["input_ids"][None]
    torch.testing.assert_close(again(tokens).logits, peft.eval()(tokens).logits)
    assert moved_only_inside(
        again.merge_and_unload(), weights(model.hf), HeadMask.from_circuit(CIRCUIT, model, biases=False)
    )


def test_lora_on_layers_outside_the_mask_is_refused():
    from peft import LoraConfig, get_peft_model

    model, mask = setting()
    with pytest.raises(ValueError, match="adapters on .*gate_proj.* build it with mask.lora_config"):
        with restrict(get_peft_model(model.hf, LoraConfig(target_modules=["q_proj", "gate_proj"])), mask):
            pass
    only_norms = HeadMask.from_circuit(Circuit([]), load(tiny("llama")))
    with pytest.raises(ValueError, match="only norms"):
        only_norms.lora_config()


@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # PEFT's sparse update
def test_shira_learns_exactly_the_masked_entries_where_it_fits(tmp_path):
    from peft import get_peft_model

    model = load(tiny("llama"))
    before = weights(model.hf)
    mask = HeadMask.from_circuit(CIRCUIT, model, kv="freeze", norms="none")
    peft = get_peft_model(model.hf, mask.shira_config(model))
    trainer(peft, tmp_path, steps=2).train()
    assert moved_only_inside(peft.merge_and_unload(), before, mask)
    uneven = Circuit(["a0.h1", "a0.h2", "a1.h0"])
    model = load(tiny("llama"))
    with pytest.raises(ValueError, match="SHiRA needs .*equal heads per layer, or restrict"):
        HeadMask.from_circuit(uneven, model, kv="freeze", norms="none").shira_config(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # the names before v6
def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enabled in (False, True):
        model, mask = setting()
        model.hf.train()
        if enabled:
            model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.hf.is_gradient_checkpointing
        with restrict(model, mask) as restricted:
            model.hf(**collate(rows(4))).loss.backward()
            gradients.append([p.grad for p in restricted.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-8)


def test_bf16_autocast_trains_the_slices_in_float32_near_the_full_precision_gradient():
    gradients = []
    for enabled in (False, True):
        model, mask = setting()
        with restrict(model, mask) as restricted, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.hf(**collate(rows(4))).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in restricted.parameters()]))
        assert restricted.proof().startswith("0 of ")
    assert gradients[1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_torch_compile_gives_the_same_loss_and_gradients(family):
    done = subprocess.run(
        [sys.executable, str(TESTS / "compiled_step.py"), family], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("equal 0 of "), done.stdout + done.stderr[-3000:]


def example(word, folder):
    """The example of the docs page that mentions `word`, as a script of its own."""
    page = (TESTS.parent / "docs/restricted_training.md").read_text()
    (code,) = [block for block in re.findall(r"^```python launched\n(.*?)^```", page, re.M | re.S) if word in block]
    (folder / "example.py").write_text(code)
    return folder / "example.py"


def test_the_compile_example_runs(tmp_path):
    command = [sys.executable, str(example("torch.compile", tmp_path))]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"0 of [\d,]+ frozen values changed\n", done.stdout), done.stderr[
        -3000:
    ]


def test_the_accelerate_example_runs_on_two_processes(tmp_path):
    out = launch(example("Accelerator()", tmp_path))
    # The two processes may print into one line.
    assert len(re.findall(r"(?<!\d)0 of [\d,]+ frozen values changed", out)) == 2, out


def environment():
    return {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


def launch(script, *arguments):
    """`accelerate launch` with two gloo processes on this machine; the launcher's CPU switch starts one process only."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(script), *map(str, arguments)]
    variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_give_the_result_of_one(how, tmp_path):
    from safetensors.torch import load_file

    out = launch(TESTS / "two_processes.py", tmp_path, how)
    assert out.count("frozen values changed") == 2 and "FROZEN" not in out, out
    assert ("\n0 sharded" in f"\n{out}") == (how == "ddp"), out
    model, mask = setting()
    before = weights(model.hf)
    with restrict(model, mask) as restricted:
        optimizer = torch.optim.AdamW(restricted.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(3):
            model.hf(**collate(rows(8, seed=step)[:4])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for rank in range(2):
        both = load_file(tmp_path / f"rank{rank}.safetensors")
        masks = mask.tensors()
        for name, parameter in model.hf.named_parameters():
            inside = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
            assert torch.equal(both[name][~inside], before[name][~inside]), name
            torch.testing.assert_close(both[name], parameter, rtol=1e-4, atol=1e-5, msg=name)

import copy

import pytest
import torch

from interventions import likelihood
from interventions.coupled import Settings, clip_members, joint_gradient, two_pass_gradient
from interventions.ensemble import RenyiEnsemble
from interventions.renyi import renyi_loss

from models import ragged, tiny

ROWS = [{"input_ids": ids, "labels": [-100] * 2 + ids[2:]} for ids in ragged(6)]
PAIRS = [
    {"prompt": a[:3], "chosen": a[3:], "rejected": b[3:]} for a, b in zip(ragged(5), ragged(5, seed=1), strict=True)
]


def apart(family: str = "llama", **options) -> RenyiEnsemble:
    """An ensemble whose members differ."""
    ensemble = RenyiEnsemble(tiny(family), **{"members": 3, "r": 2, "target_modules": "all-linear", **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for B in ensemble.stack.B:
            B.copy_(0.2 * torch.randn(B.shape, generator=generator))
    return ensemble


def gradients(ensemble, data, method, alpha: float = 0.8, form: str = "sequence") -> torch.Tensor:
    objective = ensemble._objective(data, form)
    rows = torch.arange(len(objective))
    ensemble.stack.zero_grad()
    method(lambda which: objective.forward(rows, which), ensemble.members, alpha)
    return torch.cat([parameter.grad.flatten(1) for parameter in ensemble.stack.parameters()], 1)


@pytest.mark.parametrize("form", ("sequence", "mean", "token"))
@pytest.mark.parametrize("data", (ROWS, PAIRS), ids=("sft", "dpo"))
def test_two_passes_give_the_joint_gradient(data, form):
    ensemble = apart(layers=[1, 2])
    joint, passes = (gradients(ensemble, data, m, form=form) for m in (joint_gradient, two_pass_gradient))
    torch.testing.assert_close(passes, joint, atol=1e-7, rtol=1e-4)
    assert (joint.norm(dim=1) > 0).all()


def test_two_passes_see_the_same_dropout():
    ensemble = apart(dropout=0.3)
    ensemble.stack.train()
    objective = ensemble._objective(ROWS, "sequence")
    seen = []

    def forward(which):
        manager = objective.forward(torch.arange(6), which)
        value = manager.__enter__()
        seen.append(value.detach().clone())
        manager.__exit__(None, None, None)
        return __import__("contextlib").nullcontext(value)

    two_pass_gradient(forward, 3, 0.8)
    torch.testing.assert_close(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert not torch.allclose(seen[0], apart(dropout=0.3).log_likelihood(ROWS)[:1])


def by_hand(hf, row) -> torch.Tensor:
    """Sum of log p over labels, straight from the definition."""
    ids, labels = torch.tensor(row["input_ids"]), row["labels"]
    log_p = torch.log_softmax(hf(input_ids=ids[None]).logits[0].double(), -1)
    return sum(log_p[t, labels[t + 1]] for t in range(len(ids) - 1) if labels[t + 1] != -100)


@pytest.mark.parametrize("family", ("gpt2", "llama", "gemma2", "neox"))
def test_gradient_equals_a_loop_over_peft_adapters(family, tmp_path):
    """Padding and prompt masks drop out, and the coupled loss reaches every member."""
    from peft import PeftModel

    ensemble = apart(family, members=2)
    found = gradients(ensemble, ROWS, joint_gradient)
    hf, s = copy.deepcopy(ensemble.hf), []
    for member in range(2):
        ensemble.stack.save_member(member, tmp_path / str(member), hf)
    peft = [PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / str(m), is_trainable=True).eval() for m in range(2)]
    for model in peft:
        s.append(torch.stack([by_hand(model, row) for row in ROWS]))
    renyi_loss(torch.stack(s), 0.8).backward()
    for member, model in enumerate(peft):
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        for factor in "AB":
            expected = [grads[f"base_model.model.{n}.lora_{factor}.default.weight"] for n in ensemble.stack.names]
            mine = [p.grad[member] if factor == "A" else p.grad[member].T for p in getattr(ensemble.stack, factor)]
            for ours, theirs in zip(mine, expected, strict=True):
                torch.testing.assert_close(ours, theirs.float(), atol=2e-5, rtol=1e-3)
    assert (found.norm(dim=1) > 0).all()


def test_peft_trap_trains_only_the_last_adapter_and_we_train_all():
    """set_adapter() turns the other adapters' gradients off before backward: the reason members are not a PEFT loop."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft = get_peft_model(tiny("llama"), config, adapter_name="first").eval()
    peft.add_adapter("second", config)
    s = []
    for name in ("first", "second"):
        peft.set_adapter(name)
        s.append(torch.stack([by_hand(peft, row) for row in ROWS]))
    renyi_loss(torch.stack(s), 0.8).backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in peft.named_parameters() if f".{name}." in n)
        for name in ("first", "second")
    }
    assert reached == {"first": False, "second": True}
    for method in (joint_gradient, two_pass_gradient):
        found = gradients(apart(target_modules=["q_proj"]), ROWS, method)
        assert (found.norm(dim=1) > 0).all()


def test_one_member_is_plain_training_for_every_alpha():
    ends = []
    for alpha in (0.0, 0.8, 3.0):
        ensemble = RenyiEnsemble(tiny("llama"), members=1, alpha=alpha, r=2)
        start = torch.nn.utils.parameters_to_vector(ensemble.stack.parameters()).detach()
        ensemble.fit(ROWS, epochs=2, lr=1e-2, batch_size=3, progress=False)
        ends.append(torch.nn.utils.parameters_to_vector(ensemble.stack.parameters()).detach())
        assert not torch.equal(ends[-1], start)
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def completion_log_p(hf, ids: list[int], prompt: int) -> float:
    """log p of a completion alone: everything after the first `prompt` tokens."""
    with torch.no_grad():
        log_p = torch.log_softmax(hf(input_ids=torch.tensor([ids])).logits[0], -1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(prompt, len(ids)))


@pytest.mark.parametrize("alpha", (0.0, 1e-9, 0.3, 1.0, 4.0, float("inf")))
def test_new_members_have_the_loss_of_the_base_whatever_alpha(alpha):
    ensemble = RenyiEnsemble(tiny("llama"), 3, alpha, r=2, target_modules="all-linear")
    s = ensemble.log_likelihood(ROWS)
    expected = -sum(completion_log_p(ensemble.hf, row["input_ids"], 2) for row in ROWS) / len(ROWS)
    assert renyi_loss(s, alpha).item() == pytest.approx(expected, rel=1e-4)


def test_prompts_and_padding_have_no_loss():
    ensemble = RenyiEnsemble(tiny("llama"), 1, r=2)
    rows = [{"prompt": ids[:3], "completion": ids[3:]} for ids in ragged(4, lengths=(9, 5, 7))]
    expected = [completion_log_p(ensemble.hf, row["prompt"] + row["completion"], 3) for row in rows]
    assert ensemble.log_likelihood(rows)[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert ensemble.log_likelihood(rows[1:2])[0].item() == pytest.approx(expected[1], abs=1e-3)


def test_dpo_of_one_member_is_dpo():
    ensemble = apart(members=1)
    margins = ensemble.margins(PAIRS)[0]
    for pair, margin in zip(PAIRS, margins, strict=True):
        rows = [{"prompt": pair["prompt"], "completion": pair[name]} for name in ("chosen", "rejected")]
        policy = ensemble.score(rows).members[0]
        base = RenyiEnsemble(tiny("llama"), 1).score(rows).members[0]
        expected = 0.1 * ((policy[0] - policy[1]) - (base[0] - base[1]))
        assert margin.item() == pytest.approx(expected.item(), abs=1e-4)
    s = ensemble.log_likelihood(PAIRS)
    torch.testing.assert_close(s[0], torch.nn.functional.logsigmoid(margins), atol=1e-5, rtol=1e-5)


def test_training_separates_members_and_repeats_exactly():
    logs, ends = [], []
    for _ in range(2):
        ensemble = RenyiEnsemble(tiny("gpt2"), members=3, r=2)
        logs.append(ensemble.fit(ROWS, epochs=8, lr=1e-2, batch_size=4, progress=False))
        ends.append(ensemble.stack.B[0].detach().clone())
    assert logs[0].steps == logs[1].steps and torch.equal(*ends)
    first, last = logs[0].steps[0], logs[0].steps[-1]
    assert last["loss"] < first["loss"] and first["effective_members"] == pytest.approx(3) and first["gap"] < 1e-4
    assert last["loss_1"] <= last["loss"] + 1e-5 <= last["loss_0"] + 2e-5
    w = logs[0].responsibilities
    assert w.shape == (3, 6) and torch.allclose(w.sum(0), torch.ones(6))
    assert all(parameter.requires_grad for parameter in ensemble.hf.parameters())


def test_base_is_bit_identical_after_training():
    hf = tiny("llama")
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    ensemble = RenyiEnsemble(hf, 2, r=2)
    log = ensemble.fit(ROWS, epochs=2, lr=0.1, weight_decay=0.1, progress=False)
    assert log.steps[0]["loss"] != log.steps[-1]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_circuit_members_stay_confined_through_decay_and_momentum():
    from circuits import Circuit, Head, load

    model = load(tiny("llama"))
    ensemble = RenyiEnsemble(model, 2, r=2, circuit=Circuit([Head(1, 2)]))
    ensemble.fit(ROWS, epochs=4, lr=0.1, weight_decay=0.1, progress=False)
    names = {name: ensemble.stack.factors(number) for number, name in enumerate(ensemble.stack.names)}
    A, B = names["model.layers.1.self_attn.q_proj"]
    assert B[..., 16:24].abs().min() > 0 and B[..., :16].abs().max() == 0 and B[..., 24:].abs().max() == 0
    A, B = names["model.layers.1.self_attn.o_proj"]
    assert A[..., 16:24].abs().min() > 0 and A[..., :16].abs().max() == 0 and A[..., 24:].abs().max() == 0
    assert set(names) == {f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"}


def test_clipping_is_per_member_and_scale_by_m_matches_a_lone_run():
    ensemble, lone = apart(), apart(members=1)
    with torch.no_grad():  # three copies of one member
        for many, one in zip(ensemble.stack.parameters(), lone.stack.parameters(), strict=True):
            many.copy_(one.expand_as(many))
    ours, theirs = gradients(ensemble, ROWS, joint_gradient), gradients(lone, ROWS, joint_gradient)
    torch.testing.assert_close(3 * ours[1], theirs[0], atol=1e-5, rtol=1e-4)
    for parameter in ensemble.stack.parameters():
        parameter.grad[1] *= 1e-6
    norms = clip_members(ensemble.stack, 0.5)
    after = torch.cat([parameter.grad.flatten(1) for parameter in ensemble.stack.parameters()], 1).norm(dim=1)
    assert norms[0] > 0.5 and after[:2].tolist() == pytest.approx([0.5, norms[1].item()], rel=1e-4)


def test_prior_pulls_to_the_base():
    sizes = []
    for ridge in (0.0, 100.0):
        ensemble = RenyiEnsemble(tiny("llama"), 2, r=2)
        ensemble.fit(ROWS, epochs=10, lr=1e-2, ridge=ridge, progress=False)
        sizes.append(ensemble.stack.B[0].norm().item())
    assert sizes[1] < 0.5 * sizes[0]


def test_half_precision_base_gives_single_precision_likelihoods():
    hf = tiny("llama").to(torch.bfloat16)
    ensemble = RenyiEnsemble(hf, 2, r=2)
    s = ensemble.log_likelihood(ROWS)
    log_p = hf(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits[0].float().log_softmax(-1)
    expected = sum(log_p[t, ROWS[0]["labels"][t + 1]] for t in range(1, 8))
    assert s.dtype == torch.float32 and s[0, 0].item() == pytest.approx(expected.item(), abs=0.2)
    ensemble.fit(ROWS, epochs=1, progress=False)
    assert ensemble.stack.B[0].abs().max() > 0


def test_gradient_checkpointing_changes_nothing():
    ensemble = apart()
    plain = gradients(ensemble, ROWS, joint_gradient)
    ensemble.hf.activation_checkpointing_enable({"use_reentrant": False})
    ensemble.hf.train()
    torch.testing.assert_close(gradients(ensemble, ROWS, joint_gradient), plain, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("error")  # also the one that is let pass for PEFT's sake
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_members_in_several_folds_are_members_in_one(family, monkeypatch):
    """A fold of at most so many tokens; but one forward where members share layers, or where it runs again."""
    forwards = []

    def folded(ensemble) -> tuple[torch.Tensor, int]:
        forwards.clear()
        return gradients(ensemble, ROWS, joint_gradient), len(forwards)

    every, upper = apart(family), apart(family, layers=[1, 2])
    for ensemble in (every, upper):
        ensemble.hf.register_forward_hook(lambda *_: forwards.append(1))
    whole, once = folded(every)
    for tokens, expected in ((1, 3), (110, 2)):  # a member's batch is 6 x 8 tokens
        monkeypatch.setattr(likelihood, "FOLDED_TOKENS", tokens)
        parts, times = folded(every)
        torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-5)
        assert (once, times, folded(upper)[1]) == (1, expected, 1)
    every.hf.activation_checkpointing_enable({"use_reentrant": False})
    every.hf.train()
    assert folded(every)[1] == 1 and (whole.norm(dim=1) > 0).all()


def test_bad_settings_are_told_all_at_once():
    with pytest.raises(ValueError, match=r"likelihood='words' .* lr=0.0 \(expected more than 0\)"):
        Settings(likelihood="words", lr=0.0)
    with pytest.raises(TypeError, match="learning_rate"):
        RenyiEnsemble(tiny("llama"), 2).fit(ROWS, learning_rate=1.0)


WORKER = """
import sys, torch
from accelerate import Accelerator
sys.path[:0] = [".", "tests"]
from test_coupled import PAIRS, ROWS, apart
sent = []  # shapes of what this process gives away
for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "gather", "all_to_all"):
    def counted(*args, inner=getattr(torch.distributed, name), mine=1 if name.startswith("all_gather") else 0, **options):
        sent.append(tuple(args[mine].shape))
        return inner(*args, **options)
    setattr(torch.distributed, name, counted)
accelerator = Accelerator(cpu=True)
for parallel, data, name in (("data", ROWS, "sft"), ("members", ROWS, "sft"), ("members", PAIRS, "dpo"), ("data", PAIRS, "dpo")):
    ensemble = apart(members=4)
    options = dict(epochs=2, lr=1e-2, batch_size=3, progress=False, clip=None)
    sent.clear()
    log = ensemble.fit(data, accelerator=accelerator, parallel=parallel, **options)
    if parallel == "members":  # every step: this process's two members times the batch; at the end the members themselves
        batches = [3, len(data) - 3] * 2
        assert sent[:4] == [(2, batch) for batch in batches], sent
        assert sent[4:] == [(2, *p.shape[1:]) for p in ensemble.stack.parameters()], sent
    alone = apart(members=4)
    alone.fit(data, **options)
    for mine, theirs in zip(ensemble.stack.parameters(), alone.stack.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)
    moved = (alone.stack.B[0] - apart(members=4).stack.B[0]).abs().flatten(1).amax(1)
    assert accelerator.num_processes == 2 and (moved > 1e-3).all()
print("same", accelerator.process_index)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Data parallel, and members sharded over processes that exchange [member, batch] log-likelihoods and nothing else."""
    import socket
    import subprocess
    import sys

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(script)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2  # the two processes may write into one line

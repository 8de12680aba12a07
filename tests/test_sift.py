import copy
import math
import subprocess
import sys

import pytest
import torch

from circuits.spectral import truncated_svd
from interventions.controls import blur, pcgrad
from interventions.gradient_pairs import Pair
from interventions.muon import orthogonalize
from interventions.sift import SIFT, decorrelated, interference_free

from models import VOCABULARY, tiny


def given(step=0, shape=(16, 24)):
    """Gradients of one linear layer for both objectives."""
    return {
        side: {"weight": gaussian(*shape, seed=seed + step).float()}
        for side, seed in (("objective", 0), ("constraint", 50))
    }


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leading(M, K):
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :K], S[:K], Vh[:K].T


def msign(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def losses(hf, seed=0, rows=4):
    """Next-token losses on two random batches of different vocabulary halves."""
    generator, half, out = torch.Generator().manual_seed(seed), VOCABULARY // 2, []
    for low, high in ((3, half), (half, VOCABULARY)):
        tokens = torch.randint(low, high, (rows, 9), generator=generator)
        out.append(hf(input_ids=tokens, labels=tokens).loss)
    return dict(zip(("objective", "constraint"), out, strict=True))


# ---- the update: acceptance tests 1-6, 10


@pytest.mark.parametrize(("m", "n", "K"), [(24, 40, 5), (40, 24, 12), (32, 32, 16)])
def test_the_update_is_the_polar_reference(m, n, K):
    M_f, M_g = gaussian(m, n), gaussian(m, n, seed=1)
    (Uf, _, Vf), (Ug, _, Vg) = leading(M_f, K), leading(M_g, K)
    expected = msign(torch.cat([Uf, Ug], 1)) @ msign(torch.cat([Vf, Vg], 1)).T
    D = interference_free(M_f, M_g, K)
    torch.testing.assert_close(D, expected, rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(D)
    torch.testing.assert_close(values[: 2 * K], torch.ones_like(values[: 2 * K]))
    assert values[2 * K :].abs().sum() < 1e-10


def test_the_update_is_the_closed_form_in_principal_angles():
    """The two polar factors from K x K matrices only: specification 2.1 (1)."""
    K, M_f, M_g = 5, gaussian(24, 40), gaussian(24, 40, seed=1)
    factors = []
    for first, second in zip(leading(M_f, K)[::2], leading(M_g, K)[::2], strict=True):  # left and right directions
        P, c, Qh = torch.linalg.svd(first.T @ second)
        a, b = (((1 + c).rsqrt() + sign * (1 - c).rsqrt()) / 2 for sign in (1, -1))
        f = first @ (P * a) @ P.T + second @ (Qh.T * b) @ P.T
        g = first @ (P * b) @ Qh + second @ (Qh.T * a) @ Qh
        factors.append(torch.cat([f, g], 1))
    torch.testing.assert_close(interference_free(M_f, M_g, K), factors[0] @ factors[1].T, rtol=1e-10, atol=1e-12)


def test_same_opposite_and_absent_tasks():
    M, K, zero = gaussian(24, 40), 5, torch.zeros(24, 40, dtype=torch.float64)
    U, _, V = leading(M, K)
    torch.testing.assert_close(interference_free(M, M, K), U @ V.T)
    torch.testing.assert_close(interference_free(M, zero, K), U @ V.T)
    assert interference_free(M, -M, K).abs().max() < 1e-12
    assert interference_free(zero, zero, K).abs().max() == 0


def test_full_rank_square_is_the_mean_of_two_muon_steps_and_warns():
    M_f, M_g = gaussian(16, 16), gaussian(16, 16, seed=1)
    with pytest.warns(UserWarning, match=r"2K = 32 directions do not fit in 16 x 16.*choose K <= 8"):
        D = interference_free(M_f, M_g, 16)
    torch.testing.assert_close(D, (msign(M_f) + msign(M_g)) / 2, rtol=1e-9, atol=1e-10)


def test_symmetric_in_the_two_tasks_and_blind_to_their_scale():
    M_f, M_g = gaussian(24, 40), gaussian(24, 40, seed=1)
    torch.testing.assert_close(interference_free(M_f, M_g, 5), interference_free(M_g, 7 * M_f, 5))


def test_predicted_descent_is_the_first_order_effect():
    from circuits.interference import overlap

    M_f, M_g = gaussian(24, 40), gaussian(24, 40, seed=1) - 0.5 * gaussian(24, 40)
    D, measured = interference_free(M_f, M_g, 5), overlap(M_f, M_g, 5)
    f, g = (((U * S) @ V.T * D).sum().item() for U, S, V in (leading(M_f, 5), leading(M_g, 5)))
    assert (measured.descent_f, measured.descent_g) == (pytest.approx(f, rel=1e-10), pytest.approx(g, rel=1e-10))


def test_batch_equals_loop():
    M_f, M_g = gaussian(6, 24, 16), gaussian(6, 24, 16, seed=1)
    M_g[2] = M_f[2]  # one of them loses rank
    together = interference_free(M_f, M_g, 4)
    torch.testing.assert_close(
        together, torch.stack([interference_free(f, g, 4) for f, g in zip(M_f, M_g, strict=True)])
    )


def test_two_conflicting_directions_share_the_descent():
    """One direction per task, cosine c on the left and -c... on the right: each still descends sqrt(1 - c^2)."""
    e, c = torch.eye(6, dtype=torch.float64), 0.6
    turned = c * e[0] + 0.8 * e[1]
    right = -c * e[2] + 0.8 * e[3]
    M_f, M_g = torch.outer(e[0], e[2]), torch.outer(turned, right)
    D = interference_free(M_f, M_g, 1)
    assert (D * M_f).sum().item() == pytest.approx(math.sqrt(1 - c**2)) and (D * M_g).sum().item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("K", "text"), [(0, "K=0"), (17, "K=17 singular directions asked of a 16 x 24 matrix; choose 1 <= K <= 16")]
)
@pytest.mark.filterwarnings("ignore:2K")
def test_impossible_rank(K, text):
    with pytest.raises(ValueError, match=text):
        interference_free(gaussian(16, 24), gaussian(16, 24), K)


# ---- the optimizer


def test_never_gated_is_torch_muon():
    """Acceptance 8, first half: plain steps agree with torch.optim.Muon, which works in bfloat16."""
    torch_model, ours = (torch.nn.Linear(24, 16, bias=False) for _ in range(2))
    ours.load_state_dict(torch_model.state_dict())
    reference = torch.optim.Muon(torch_model.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = SIFT(ours, lr=0.01, epsilon=-1.1)
    start = ours.weight.detach().clone()
    for step in range(4):
        f, g = gaussian(16, 24, seed=step, dtype=torch.float32), gaussian(16, 24, seed=50 + step, dtype=torch.float32)
        torch_model.weight.grad = f + g
        reference.step()
        optimizer.step(objective={"weight": f}, constraint={"weight": g})
    moved, expected = ours.weight - start, torch_model.weight - start
    assert (moved - expected).norm() / expected.norm() < 0.02
    assert not optimizer.last[0].controlled


def test_always_gated_is_the_pure_update():
    """Acceptance 8, second half. A first step, so the momentum is a multiple of the gradient."""
    layer = torch.nn.Linear(24, 16, bias=False)
    start, (f, g) = layer.weight.detach().clone(), (side["weight"] for side in given().values())
    optimizer = SIFT(layer, lr=0.01, epsilon=1.1, K=4, weight_decay=0.1)
    optimizer.step(**given())
    expected = start * (1 - 0.001) - 0.01 * 0.2 * 24**0.5 * interference_free(f, g, 4)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    gate = optimizer.last[0]
    cosine = torch.cosine_similarity(f.flatten(), g.flatten(), 0).item()
    assert gate.controlled and gate.K == 4 and gate.cosine == pytest.approx(cosine, abs=1e-6)


def test_large_blocks_continue_from_the_last_subspace():
    layer = torch.nn.Linear(96, 96, bias=False)
    optimizer = SIFT(layer, lr=0.01, epsilon=1.1, K=4, weight_decay=0.0, momentum=0.0)
    spectrum = 0.6 ** torch.arange(96.0)
    f, g = (
        msign(gaussian(96, 96, seed=s, dtype=torch.float32))
        * spectrum
        @ msign(gaussian(96, 96, seed=s + 5, dtype=torch.float32))
        for s in (0, 1)
    )
    for _ in range(3):
        start = layer.weight.detach().clone()
        optimizer.step(objective={"weight": f}, constraint={"weight": g})
    D = (start - layer.weight.detach()) / (0.01 * 0.2 * 96**0.5)
    assert (D - interference_free(f, g, 4)).norm() / D.norm() < 1e-3
    assert optimizer.state[layer.weight]["basis weight"].shape == (2, 96, 12)


def test_k_is_capped_at_half_the_active_rank():
    layer = torch.nn.Linear(24, 16, bias=False)
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[:6] = True
    optimizer = SIFT(layer, mask={"weight": mask}, K=64, epsilon=1.1)
    optimizer.step(**given())
    assert optimizer.last[0].K == 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "bert-classifier"])
def test_matrices_go_to_muon_and_the_rest_to_adamw(family):
    routes = SIFT(tiny(family)).routes()
    matrices = {name for name, kind in routes.items() if kind == "muon"}
    inside = {"gpt2": ".h.", "llama": ".layers.", "neox": ".layers.", "bert-classifier": ".layer."}[family]
    expected = {n for n, p in tiny(family).named_parameters() if p.ndim == 2 and inside in n}
    assert matrices - {"bert.pooler.dense.weight"} == expected
    assert set(routes) == {name for name, _ in tiny(family).named_parameters()}


def head_mask(hf, layer=1, heads=(0, 2)):
    from circuits.anatomy import Anatomy

    weights, mask = dict(hf.named_parameters()), {}
    for head in heads:
        for part in Anatomy.of(hf, "causal").slices((layer, head)):
            mask.setdefault(part.parameter, torch.zeros_like(weights[part.parameter], dtype=torch.bool))
            mask[part.parameter].narrow(part.dim, part.start, part.stop - part.start).fill_(True)
    return mask


@pytest.mark.parametrize(
    ("family", "control", "blocks"),
    [("gpt2", "sift", "matrix"), ("llama", "sift", "head"), ("neox", "topk", 2), ("llama", "pcgrad", "matrix")],
)
def test_nothing_outside_the_mask_moves_by_a_bit(family, control, blocks):
    """Acceptance 7: with momentum and decay on, through controlled and plain steps."""
    hf = tiny(family)
    mask = head_mask(hf)
    before = copy.deepcopy(hf.state_dict())
    optimizer = SIFT(
        hf, mask=mask, control=control, blocks=blocks, epsilon=0.3, lr=0.02, weight_decay=0.5, adamw_weight_decay=0.5
    )
    seen = set()
    for step in range(2):
        for group in optimizer.param_groups:
            group["epsilon"] = 1.1 if step % 2 else -1.1
        optimizer.step(**losses(hf, seed=step))
        seen |= {gate.controlled for gate in optimizer.last}
    assert seen == ({True, False} if control in ("sift", "topk") else {False})
    for name, parameter in hf.named_parameters():
        frozen = ~mask[name] if name in mask else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[frozen], before[name][frozen]), name
        if name in mask:
            assert (parameter[mask[name]] != before[name][mask[name]]).float().mean() > 0.9, name


def test_a_head_mask_of_the_project():
    from circuits import Circuit, load
    from interventions import HeadMask

    model = load(tiny("llama"))
    mask = HeadMask.from_circuit(Circuit(["a1.h2", "a2.h0"], 3, 4), model)
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    optimizer = SIFT(model, mask, lr=0.02, epsilon=1.1, weight_decay=0.5, adamw_weight_decay=0.5)
    optimizer.step(**losses(model.hf))
    moved = {name for name, p in model.hf.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(optimizer.routes()) <= set(mask.tensors()) and "adamw" in optimizer.routes().values()
    for name, allowed in mask.tensors().items():
        assert torch.equal(dict(model.hf.named_parameters())[name][~allowed], before[name][~allowed])


def test_a_mask_without_block_structure_leaks_nothing():
    layer = torch.nn.Linear(24, 16, bias=False)
    mask, start = gaussian(16, 24) > 0.5, layer.weight.detach().clone()
    optimizer = SIFT(layer, mask={"weight": mask}, epsilon=1.1, weight_decay=0.5)
    for step in range(3):
        optimizer.step(**given(step))
    assert torch.equal(layer.weight[~mask], start[~mask]) and (layer.weight[mask] != start[mask]).all()


@pytest.mark.parametrize("control", ["sift", "blur"])
def test_accumulated_micro_batches_are_one_batch(control):
    """Acceptance 9."""
    models = [tiny("llama").double() for _ in range(2)]
    tokens = [torch.randint(3, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    whole, parts = (SIFT(hf, control=control, epsilon=0.5, K=2, clip=0.7) for hf in models)
    for _ in range(2):
        whole.step(
            objective=models[0](input_ids=tokens[0], labels=tokens[0]).loss,
            constraint=models[0](input_ids=tokens[1], labels=tokens[1]).loss,
        )
        for i in range(4):
            f, g = (t[2 * i : 2 * i + 2] for t in tokens)
            parts.accumulate(objective=models[1](input_ids=f, labels=f).loss / 4)
            parts.accumulate(constraint=models[1](input_ids=g, labels=g).loss / 4)
        parts.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)


def test_both_losses_from_one_forward_move_as_those_of_two():
    one, two = tiny("gpt2"), tiny("gpt2")
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    for hf, passes in ((one, 1), (two, 2)):
        first, *second = (hf(tokens).logits for _ in range(passes))
        optimizer = SIFT(hf, epsilon=1.1)
        optimizer.step(objective=-first[..., 3].mean(), constraint=[first, *second][-1].logsumexp(-1).mean())
        assert all(gate.controlled for gate in optimizer.last)
    weights = [torch.nn.utils.parameters_to_vector(hf.parameters()) for hf in (one, two, tiny("gpt2"))]
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and not torch.equal(weights[0], weights[2])


def test_functions_that_compute_the_losses_move_as_the_losses_do():
    given, computed = tiny("gpt2"), tiny("gpt2")
    SIFT(given, epsilon=1.1).step(**losses(given, seed=1))
    parts = {name: lambda name=name: losses(computed, seed=1)[name] for name in ("objective", "constraint")}
    SIFT(computed, epsilon=1.1).step(**parts)
    for name, value in given.named_parameters():
        assert torch.equal(value, computed.get_parameter(name)), name
    assert not torch.equal(given.lm_head.weight, tiny("gpt2").lm_head.weight)


@pytest.mark.parametrize(("control", "dtype"), [("sift", torch.bfloat16), ("random-gate", torch.float32)])
def test_resumed_training_is_bit_equal(control, dtype, tmp_path):
    """Acceptance 12, saved in the middle of an accumulation, through a file."""
    options = dict(control=control, epsilon=0.05, lr=0.01, K=2, blocks="matrix")
    hf = tiny("llama").to(dtype)
    optimizer = SIFT(hf, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(2):
        optimizer.step(**losses(hf, seed=step))
        schedule.step()
    optimizer.accumulate(objective=losses(hf, seed=7)["objective"])
    torch.save(
        {"model": hf.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
        tmp_path / "resume.pt",
    )
    other = tiny("llama", seed=3).to(dtype)
    resumed = SIFT(other, control="sum")
    resumed_schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1 / (1 + step))
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    resumed_schedule.load_state_dict(saved["schedule"])
    for model, opt, plan in ((hf, optimizer, schedule), (other, resumed, resumed_schedule)):
        opt.accumulate(constraint=losses(model, seed=7)["constraint"])
        opt.step()
        plan.step()
        opt.step(**losses(model, seed=8))
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), other.parameters(), strict=True))
    assert [gate.controlled for gate in optimizer.last] == [gate.controlled for gate in resumed.last]


def test_the_random_gate_triggers_as_often():
    counts = {}
    for control in ("sift", "random-gate"):
        hf = tiny("llama")
        optimizer = SIFT(hf, control=control, epsilon=0.02)
        optimizer.step(**losses(hf))
        counts[control] = [gate.controlled for gate in optimizer.last]
    assert 0 < sum(counts["sift"]) < len(counts["sift"])
    assert sum(counts["sift"]) == sum(counts["random-gate"]) and counts["sift"] != counts["random-gate"]


def test_pcgrad_and_blur_by_hand():
    p = torch.nn.Parameter(torch.zeros(2))
    f, g = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    projected = pcgrad({p: Pair(f, g)})[p]
    assert projected.f.tolist() == [0.5, 0.5] and projected.g.tolist() == [0.0, 1.0]
    agreeing = pcgrad({p: Pair(f, -g)})[p]
    assert agreeing.f.tolist() == [1.0, 0.0] and agreeing.g.tolist() == [1.0, -1.0]
    assert blur({p: Pair(f, g)}, weight=3.0)[p].f.tolist() == [1.0, 3.0]
    assert blur({p: Pair(None, g)})[p].f.tolist() == [-1.0, 1.0]


def test_a_single_loss_through_backward_is_a_plain_step():
    hf, other = tiny("gpt2"), tiny("gpt2")
    plain, given = SIFT(hf), SIFT(other, epsilon=1.1)
    losses(hf)["objective"].backward()
    plain.step()
    given.step(objective=losses(other)["objective"])
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), other.parameters(), strict=True))
    assert not any(gate.controlled for gate in given.last)
    plain.zero_grad()
    with pytest.raises(ValueError, match="no gradients: give step"):
        plain.step()


def test_the_lens_sees_every_step():
    """Acceptance 11: the head views of TransformerLens are the trained leaf."""
    from circuits import load

    model = load(tiny("llama"))
    lens = model.lens
    optimizer = SIFT(model, blocks="head", epsilon=1.1)
    optimizer.step(**losses(model.hf))
    leaf = model.hf.model.layers[1].self_attn.q_proj.weight
    views = lens.blocks[1].attn.W_Q
    assert torch.equal(views, leaf.unflatten(0, (4, 8)).mT)


def test_clipping_bounds_each_objective():
    layer = torch.nn.Linear(4, 3)
    optimizer = SIFT(layer, clip=1.0, momentum=0.0)
    f, g = torch.full((3, 4), 10.0), torch.full((3, 4), 0.01)
    optimizer.step(objective={"weight": f}, constraint={"weight": g})
    assert optimizer.state[layer.weight]["momentum_f"].norm() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(optimizer.state[layer.weight]["momentum_g"], g) and f.max() == 10.0


def test_equal_length_option():
    layer = torch.nn.Linear(24, 16, bias=False)
    start = layer.weight.detach().clone()
    optimizer = SIFT(layer, lr=0.01, epsilon=1.1, K=2, weight_decay=0.0, match_rms=True)
    optimizer.step(**given())
    assert (layer.weight - start).norm().item() == pytest.approx(0.01 * 0.2 * 24**0.5 * 4.0, rel=1e-4)


def test_nan_leaves_everything_as_it_was():
    hf = tiny("llama")
    optimizer = SIFT(hf)
    optimizer.step(**losses(hf))
    before, state = copy.deepcopy(hf.state_dict()), copy.deepcopy(optimizer.state_dict())
    bad = losses(hf)
    bad["constraint"] = bad["constraint"] * math.nan
    with pytest.raises(
        ValueError, match="the constraint's gradient is NaN or infinite in model.*the step was not taken"
    ):
        optimizer.step(**bad)
    assert all(torch.equal(a, before[name]) for name, a in hf.state_dict().items())
    assert str(optimizer.state_dict()["state"]) == str(state["state"])
    optimizer.step(**losses(hf))


def test_bad_input_is_one_clear_line():
    two = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    x, other = torch.ones(1, 4), torch.nn.Linear(4, 1)
    with pytest.raises(ValueError, match="objective and constraint share no trainable parameter"):
        SIFT(two).step(objective=two[0](x).sum(), constraint=two[1](x).sum())
    with pytest.raises(ValueError, match="the objective depends on no parameter that may move"):
        SIFT(two).step(objective=other(x).sum(), constraint=two(x).sum())
    with pytest.raises(ValueError, match="the objective must be a scalar loss with a graph, got shape"):
        SIFT(two).step(objective=two(x), constraint=two(x).sum())
    with pytest.raises(ValueError, match="the objective has gradients for 7.weight"):
        SIFT(two).step(objective={"7.weight": x})
    with pytest.raises(ValueError, match=r"gradient of 0.weight has shape \(1, 4\), expected \(4, 4\)"):
        SIFT(two).step(objective={"0.weight": x})
    with pytest.raises(ValueError, match="control='sfit'; expected one of sift, sum"):
        SIFT(two, control="sfit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="K=0 singular directions; expected at least 1"):
        SIFT(two, K=0)
    with pytest.raises(ValueError, match="the mask names 9.weight"):
        SIFT(two, mask={"9.weight": x.bool()})
    with pytest.raises(ValueError, match=r"mask of 0.weight has shape \(1, 4\)"):
        SIFT(two, mask={"0.weight": x.bool()})
    with pytest.raises(ValueError, match="the mask lets nothing move"):
        SIFT(two, mask={"0.weight": torch.zeros(4, 4, dtype=torch.bool)})
    with pytest.raises(TypeError, match="expected a model .* got str"):
        SIFT("gpt2")
    with pytest.raises(
        ValueError, match="Sequential has no configuration; heads are known only for Hugging Face models"
    ):
        SIFT(two, blocks="head")


def test_truncation_and_decorrelation_match_muon_when_tasks_do_not_meet():
    """Tasks in orthogonal subspaces: the controlled step is the sum of two truncated Muon steps."""
    M_f, M_g = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    M_f[:4, :4], M_g[8:12, 8:12] = gaussian(4, 4), gaussian(4, 4, seed=1)
    D = decorrelated(truncated_svd(M_f, 4), truncated_svd(M_g, 4))
    torch.testing.assert_close(D, msign(M_f[:4, :4]).new_zeros(16, 16).add(D))
    torch.testing.assert_close(
        D, orthogonalize(M_f + M_g, coefficients=(15 / 8, -10 / 8, 3 / 8), steps=25), rtol=1e-5, atol=1e-5
    )


DISTRIBUTED = """
import torch
from accelerate import Accelerator
from models import tiny, VOCABULARY
from interventions.sift import SIFT
from torch.nn.utils import parameters_to_vector as flat

accelerator = Accelerator(cpu=True)
hf = tiny("llama").double()
optimizer = SIFT(hf, epsilon=0.5, K=2)
model, optimizer = accelerator.prepare(hf, optimizer)
tokens = [torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
rank = accelerator.process_index
for step in range(2):
    f, g = (t[rank * 2 : rank * 2 + 2] for t in tokens)
    optimizer.optimizer.accumulate(objective=model(input_ids=f, labels=f).loss, constraint=model(input_ids=g, labels=g).loss)
    optimizer.step()
every = accelerator.gather(flat(hf.parameters())[None])
assert (every - every[0]).abs().max() == 0
if accelerator.is_main_process:
    from pathlib import Path
    import sys
    torch.save(every[0].detach(), sys.argv[1])
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    """accelerate with DistributedDataParallel over gloo, against one process with the whole batch."""
    import os
    import socket
    from pathlib import Path

    script, tests = tmp_path / "train.py", Path(__file__).parent
    script.write_text(DISTRIBUTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        str(script),
        str(tmp_path / "two.pt"),
    ]
    done = subprocess.run([sys.executable, *launch], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    hf = tiny("llama").double()
    optimizer = SIFT(hf, epsilon=0.5, K=2)
    f, g = (torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for _ in range(2):
        optimizer.step(objective=hf(input_ids=f, labels=f).loss, constraint=hf(input_ids=g, labels=g).loss)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(hf.parameters()).detach(), two, rtol=1e-4, atol=1e-5)

import math

import pytest
import torch

from interventions.renyi import monitor, preference_log_likelihood, renyi_loss, responsibilities

ALPHAS = (0, 1e-40, 1e-9, 1e-6, 1e-3, 0.1, 0.8, 1, 4, 1e3, math.inf)


def log_likelihoods(scale: float = 3.0, members: int = 8, batch: int = 5) -> torch.Tensor:
    return -scale * torch.rand(members, batch, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_is_minus_the_responsibilities(alpha, scale):
    s = log_likelihoods(scale).requires_grad_()
    renyi_loss(s, alpha).backward()
    torch.testing.assert_close(s.grad, -responsibilities(s.detach(), alpha) / s.shape[1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4))
def test_value_against_double_precision(scale):
    s = log_likelihoods(scale)
    for alpha in (1e-4, 0.1, 0.8, 1, 4, 1e3):
        expected = -torch.logsumexp(alpha * s.double(), 0).sub(math.log(8)).div(alpha).mean()
        assert renyi_loss(s, alpha).item() == pytest.approx(expected.item(), rel=2e-6)


def test_ends():
    s = log_likelihoods()
    assert renyi_loss(s, 0).item() == pytest.approx(-s.mean().item(), rel=1e-6)
    assert renyi_loss(s, 1).item() == pytest.approx(-s.exp().mean(0).log().mean().item(), rel=1e-6)
    assert renyi_loss(s, math.inf).item() == pytest.approx(-s.amax(0).mean().item())
    assert renyi_loss(s, 1e-7).item() == pytest.approx(renyi_loss(s, 0).item(), rel=1e-5)


def test_never_increases_with_alpha():
    s = log_likelihoods(50.0).double()
    values = [renyi_loss(s, alpha).item() for alpha in ALPHAS]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 1


def test_order_of_members_does_not_matter():
    s, order = log_likelihoods(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for alpha in (0.0, 0.8):
        torch.testing.assert_close(renyi_loss(s, alpha), renyi_loss(s[order], alpha))
        torch.testing.assert_close(responsibilities(s, alpha)[order], responsibilities(s[order], alpha))


def test_one_member_is_plain_likelihood():
    s = log_likelihoods(members=1)
    assert all(renyi_loss(s, alpha).item() == pytest.approx(-s.mean().item(), rel=1e-6) for alpha in ALPHAS)


def test_impossible_label_for_some_members_is_survived():
    s = log_likelihoods()
    s[2:, 0] = -math.inf
    s.requires_grad_()
    loss = renyi_loss(s, 0.8)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all() and (s.grad[2:, 0] == 0).all()
    assert renyi_loss(s, 0.0) == math.inf


def test_second_derivative_of_the_loss():
    s = log_likelihoods().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: renyi_loss(x, 0.8), (s,))
    assert torch.autograd.gradgradcheck(lambda x: renyi_loss(x, 0.8), (s,))


def test_dpo_gradient():
    h = log_likelihoods().double().add(1.5).requires_grad_()
    s = preference_log_likelihood(h, 0.3)
    renyi_loss(s, 0.8).backward()
    expected = -responsibilities(s.detach(), 0.8) * 0.3 * torch.sigmoid(-0.3 * h.detach()) / 5
    torch.testing.assert_close(h.grad, expected)


def test_long_sequences_collapse_unless_alpha_is_small():
    noise = 0.1 * torch.randn(512, 8, 200, generator=torch.Generator().manual_seed(0))
    alone, shared = (monitor(noise.sum(0), alpha)["effective_members"] for alpha in (1.0, 0.1))
    assert alone < 3.2 < 7 < shared


def test_monitor():
    seen = monitor(torch.tensor([[-1.0, -2.0], [-3.0, -2.0]]), 1.0)
    assert seen["loss"] == seen["loss_1"] and seen["gap"] == pytest.approx(seen["loss_0"] - seen["loss_1"])
    assert sum(seen["usage"]) == pytest.approx(1) and seen["disagreement"] == pytest.approx(1.0)


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="alpha is -0.5; expected 0"):
        renyi_loss(log_likelihoods(), -0.5)
    with pytest.raises(ValueError, match="alpha is nan"):
        responsibilities(log_likelihoods(), math.nan)
    with pytest.raises(ValueError, match=r"empty, shape \(8, 0\)"):
        renyi_loss(torch.zeros(8, 0), 0.8)

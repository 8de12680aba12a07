import math

import pytest
import torch

from interventions.ensemble import RenyiEnsemble
from interventions.renyi import renyi_loss
from interventions.stability import critical_alpha, estimate_critical_alpha, member_scores

from models import ragged, tiny

ROWS = [{"input_ids": ids} for ids in ragged(5)]


@pytest.mark.parametrize("T", (2, 5, 20))
def test_critical_alpha_of_correlated_tokens_is_one_over_their_number(T):
    """Bernoulli(σ(θ)) for each of T tokens that always agree: V = T/4, J = T²/4."""
    ones = torch.arange(T + 1.0, dtype=torch.float64)  # how many of T independent tokens are 1, with its probability
    share = torch.tensor([math.comb(T, k) / 2**T for k in range(T + 1)], dtype=torch.float64)
    model = ((ones - T / 2) * (share * (T + 1)).sqrt())[:, None]
    data = torch.tensor([[T / 2], [-T / 2]], dtype=torch.float64)
    assert critical_alpha(data, model, 1e-6) == pytest.approx(1 / T, rel=1e-4)
    assert critical_alpha(model, model, 1e-6) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("T", (2, 5, 20))
def test_two_members_split_above_the_critical_alpha_only(T):
    outcomes = torch.tensor([[1.0], [0.0]]).double()  # all ones, all zeros: the whole data set
    for factor, splits in ((0.8, False), (1.2, True)):
        theta = torch.tensor([[5e-4], [-5e-4]], dtype=torch.float64, requires_grad=True)
        for _ in range(600):
            s = T * (
                outcomes.T * torch.nn.functional.logsigmoid(theta)
                + (1 - outcomes.T) * torch.nn.functional.logsigmoid(-theta)
            )
            (gradient,) = torch.autograd.grad(renyi_loss(s, factor / T), theta)
            theta = (theta - 40 / T * gradient).detach().requires_grad_()
        spread = (theta[0] - theta[1]).abs().item()
        assert (spread > 1.0) == splits and (splits or spread < 1e-3)


def test_gram_form_equals_the_dense_eigenvalue():
    generator = torch.Generator().manual_seed(1)
    G, F = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (7, 9))
    V = F.T @ F / 9 + 0.05 * torch.eye(12, dtype=torch.float64)
    J = G.T @ G / 7
    largest = torch.linalg.eigvals(torch.linalg.solve(V, J)).real.max()
    assert critical_alpha(G, F, 0.05) == pytest.approx(1 / largest.item(), rel=1e-9)


def test_spread_changes_the_loss_by_the_criterion():
    """ℓ_α(Q) − ℓ(θ) = ½ tr[(V − αJ) C] for a small symmetric spread, on logistic regression."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(50, 3, generator=generator).double(), torch.randint(0, 2, (50,), generator=generator).double()
    theta, step = torch.tensor([0.3, -0.2, 0.5]).double(), 1e-3 * torch.tensor([1.0, 2.0, -1.0]).double()

    def s(parameters: torch.Tensor) -> torch.Tensor:
        z = parameters @ x.T
        return y * torch.nn.functional.logsigmoid(z) + (1 - y) * torch.nn.functional.logsigmoid(-z)

    p = torch.sigmoid(x @ theta)
    V = (x.T * (p * (1 - p))) @ x / 50
    score = (y - p)[:, None] * x
    J = score.T @ score / 50
    C = torch.outer(step, step)
    for alpha in (0.2, 0.8, 2.0):
        spread = renyi_loss(s(torch.stack([theta + step, theta - step])), alpha) - renyi_loss(s(theta[None]), alpha)
        assert spread.item() == pytest.approx(0.5 * torch.trace((V - alpha * J) @ C).item(), rel=1e-4)


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_per_example_scores_from_one_backward(family):
    ensemble = RenyiEnsemble(tiny(family), 2, r=2)
    with torch.no_grad():
        for B in ensemble.stack.B:
            B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    examples = ensemble._objective(ROWS, "sequence").examples
    scores = member_scores(ensemble.hf, ensemble.stack, 1, examples, chunk=3)
    for number in range(5):
        lone = ensemble._objective([ROWS[number]], "sequence")
        ensemble.stack.zero_grad()
        with lone.forward(torch.tensor([0])) as s:
            s[1].sum().backward()
        expected = torch.cat([parameter.grad[1].flatten() for parameter in ensemble.stack.parameters()])
        torch.testing.assert_close(scores[number], expected, atol=1e-5, rtol=1e-3)


def test_contradicting_labels_lower_the_critical_alpha():
    ids = ragged(1)[0]
    prompts = [[i, *ids] for i in range(3, 13)]
    agree = [{"prompt": prompt, "completion": [5]} for prompt in prompts]
    fight = [{"prompt": prompt, "completion": [5 + i % 2] * 3} for i, prompt in enumerate(prompts)]
    found = []
    for rows in (agree, fight):
        ensemble = RenyiEnsemble(tiny("llama"), 1, r=2)
        ensemble.fit(rows, epochs=12, lr=2e-2, progress=False)
        found.append(estimate_critical_alpha(ensemble, rows, damping=0.1, samples=4))
    assert found[1] < 0.7 * found[0]


def test_bad_damping_is_told():
    with pytest.raises(ValueError, match="damping is 0; expected more than 0"):
        critical_alpha(torch.ones(2, 2), torch.ones(2, 2), 0)

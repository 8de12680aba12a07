import pytest
import torch

from interventions.muon import adjustment, momentum_update, orthogonalize

CONVERGENT = dict(coefficients=(15 / 8, -10 / 8, 3 / 8), steps=15)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 16, 16)])
def test_convergent_coefficients_reach_the_polar_factor(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(orthogonalize(M, **CONVERGENT), U @ Vh, rtol=1e-6, atol=1e-6)


def test_quintic_brings_singular_values_near_one():
    M = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(M))
    assert values.min() > 0.6 and values.max() < 1.25


def test_zero_rows_and_columns_stay_exactly_zero():
    M = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    M[3:7], M[:, 10:] = 0, 0
    D = orthogonalize(M)
    assert D[3:7].abs().max() == 0 and D[:, 10:].abs().max() == 0 and D.norm() > 1


def test_batch_equals_loop():
    M = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(M), torch.stack([orthogonalize(one) for one in M]))


def test_nesterov_momentum_by_hand():
    buffer, g = torch.full((2,), 2.0), torch.ones(2)
    assert momentum_update(g, buffer, 0.5).tolist() == [2.0, 2.0] and buffer.tolist() == [2.0, 2.0]
    plain = momentum_update(g, buffer, 0.5, nesterov=False)
    assert plain.tolist() == [2.0, 2.0] and plain.data_ptr() != buffer.data_ptr() and g.tolist() == [1.0, 1.0]


def test_adjustments_of_a_layer():
    assert adjustment(400, 100, "match_rms_adamw") == pytest.approx(4.0)
    assert adjustment(400, 100, "original") == 2.0 and adjustment(100, 400, "original") == 1.0
    with pytest.raises(ValueError, match="adjust='kimi'; expected 'match_rms_adamw' or 'original'"):
        adjustment(1, 1, "kimi")

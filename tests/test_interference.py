import math

import pytest
import torch

from circuits.interference import direct_sum, overlap
from circuits.partition import partition
from circuits.spectral import inverse_sqrt, polar, subspace_iteration, svd_of_factors, truncated_svd

from models import tiny


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference_sti(M_f, M_g, K):
    """The definition: concatenate, subtract identities, elementwise L1."""
    (Uf, Sf, Vf), (Ug, Sg, Vg) = (torch.linalg.svd(M, full_matrices=False) for M in (M_f, M_g))
    U, V = torch.cat([Uf[:, :K], Ug[:, :K]], 1), torch.cat([Vf[:K].T, Vg[:K].T], 1)
    eye = torch.eye(2 * K, dtype=U.dtype)
    return ((U.T @ U - eye) @ torch.diag(torch.cat([Sf[:K], Sg[:K]])) @ (V.T @ V - eye)).abs().sum().item()


@pytest.mark.parametrize(("m", "n", "K"), [(24, 40, 5), (40, 24, 12), (16, 16, 1)])
def test_sti_is_the_definition(m, n, K):
    M_f, M_g = gaussian(m, n), gaussian(m, n, seed=1)
    assert overlap(M_f, M_g, K).sti_l1 == pytest.approx(reference_sti(M_f, M_g, K), rel=1e-12)


def test_inner_product_of_truncations():
    M_f, M_g, K = gaussian(20, 30), gaussian(20, 30, seed=1) + gaussian(20, 30), 7
    f, g = truncated_svd(M_f, K), truncated_svd(M_g, K)
    expected = (((f.U * f.S) @ f.V.mT) * ((g.U * g.S) @ g.V.mT)).sum().item()
    measured = overlap(M_f, M_g, K)
    assert measured.inner_K == pytest.approx(expected, rel=1e-12)
    assert measured.cosine == pytest.approx(torch.cosine_similarity(M_f.flatten(), M_g.flatten(), 0).item(), rel=1e-12)


def test_sti_cannot_tell_agreement_from_conflict_and_the_cosine_can():
    M, N = gaussian(20, 30), gaussian(20, 30, seed=1)
    same, opposite = overlap(M, M + 0.1 * N, 6), overlap(M, -M - 0.1 * N, 6)
    assert same.sti_l1 == pytest.approx(opposite.sti_l1, rel=1e-10)
    assert same.cosine > 0.99 and opposite.cosine < -0.99
    assert same.descent_f > 0.9 * same.best_f and abs(opposite.descent_f) < 0.2 * opposite.best_f


def test_frobenius_sti_does_not_depend_on_the_basis_of_tied_directions():
    """All singular values 1: U R and V R describe the same matrix for every rotation R."""
    K = 4
    U, V, W, Z = (torch.linalg.qr(gaussian(s, K, seed=i)).Q for i, s in enumerate((20, 30, 20, 30)))
    R = torch.linalg.qr(gaussian(K, K, seed=9)).Q
    measured = []
    for rotation in (torch.eye(K, dtype=R.dtype), R):
        C_U, C_V = (U @ rotation).T @ W, (V @ rotation).T @ Z
        measured.append(
            ((C_U @ C_V.T).norm() + (C_U.T @ C_V).norm(), (C_U @ C_V.T).abs().sum() + (C_U.T @ C_V).abs().sum())
        )
    assert measured[0][0] == pytest.approx(measured[1][0].item(), rel=1e-12)
    assert measured[0][1] != pytest.approx(measured[1][1].item(), rel=1e-3)
    assert overlap(U @ V.T, W @ Z.T, K).sti_fro == pytest.approx(measured[0][0].item(), rel=1e-9)


def test_random_subspaces_are_at_chance():
    measured = [overlap(gaussian(60, 90, seed=s), gaussian(60, 90, seed=100 + s), 6) for s in range(30)]
    left = sum(o.overlap_left for o in measured) / 30
    assert left == pytest.approx(6 / 60, abs=0.02)
    assert sum(o.overlap_right for o in measured) / 30 == pytest.approx(6 / 90, abs=0.02)
    assert abs(sum(o.overlap_left_corrected for o in measured) / 30) < 0.02
    full = overlap(gaussian(6, 30), gaussian(6, 30, seed=1), 6)
    assert full.overlap_left == pytest.approx(1) and full.overlap_left_corrected == 0


def test_principal_angles_of_a_known_rotation():
    """One direction each, 0.3 rad apart on the left and equal on the right."""
    e = torch.eye(8, dtype=torch.float64)
    turned = math.cos(0.3) * e[0] + math.sin(0.3) * e[1]
    measured = overlap(torch.outer(e[0], e[2]), torch.outer(turned, e[2]), 1)
    assert measured.angles_left.item() == pytest.approx(0.3) and measured.angles_right.item() == pytest.approx(
        0, abs=1e-7
    )
    assert measured.sti_l1 == pytest.approx(2 * math.cos(0.3))


def test_factors_measure_what_the_dense_product_measures():
    adapters = [(gaussian(40, 4, seed=s), gaussian(4, 24, seed=s + 1)) for s in (0, 5)]
    by_factors = overlap(*adapters, 4)
    dense = overlap(*(B @ A for B, A in adapters), 4)
    for key in ("cosine", "sti_l1", "sti_fro", "overlap_left", "overlap_right_corrected", "descent_f", "alignment"):
        assert by_factors[key] == pytest.approx(dense[key], rel=1e-9)
    beyond = svd_of_factors(*adapters[0], 7)
    assert beyond.rank == 4 and beyond.U.shape == (40, 7) and beyond.U[:, 4:].abs().max() == 0


def test_low_rank_and_zero_matrices_add_no_noise():
    low = gaussian(20, 2) @ gaussian(2, 30, seed=1)
    measured = overlap(low, low, 8)
    assert (
        measured.K == 2
        and measured.overlap_left == pytest.approx(1)
        and measured.descent_f == pytest.approx(measured.best_f)
    )
    nothing = overlap(low, torch.zeros(20, 30, dtype=torch.float64), 8)
    assert (nothing.cosine, nothing.sti_fro, nothing.overlap_left) == (0, 0, 0) and nothing.descent_f == pytest.approx(
        nothing.best_f
    )


def test_a_sum_of_blocks_is_the_block_diagonal_matrix():
    pairs = [(gaussian(12, 10, seed=s), gaussian(12, 10, seed=s + 1)) for s in (0, 7)]
    parts = direct_sum([overlap(*pair, 3) for pair in pairs])
    f, g = (torch.block_diag(*side) for side in zip(*pairs, strict=True))
    assert parts.cosine == pytest.approx(torch.cosine_similarity(f.flatten(), g.flatten(), 0).item(), rel=1e-12)
    with pytest.raises(ValueError, match="nothing to add up"):
        direct_sum([])


def test_every_name_is_a_key():
    measured = overlap(gaussian(8, 6), gaussian(8, 6, seed=1), 2)
    assert all(measured[key] is not None for key in measured.keys())  # noqa: SIM118 (not a mapping)
    assert {"cosine", "sti_l1", "sti_fro", "overlap_left", "overlap_right", "overlap_left_corrected"} <= set(
        measured.keys()
    )
    with pytest.raises(KeyError, match="'cosin' is not measured; choose from inner"):
        measured["cosin"]


@pytest.mark.parametrize(
    ("M_f", "M_g", "K", "text"),
    [
        (torch.ones(4, 6), torch.ones(6, 4), 2, "different shapes, 4 x 6 and 6 x 4; compare the same matrix"),
        (torch.full((4, 6), math.nan), torch.ones(4, 6), 2, "the first objective holds NaN"),
        (torch.ones(4, 6), torch.full((4, 6), math.inf), 2, "the second objective holds NaN or infinity"),
        (torch.ones(4, 6), torch.ones(4, 6), 5, "K=5 singular directions asked of a 4 x 6 matrix; choose 1 <= K <= 4"),
        (torch.ones(4, 6), torch.ones(4, 6), 0, "K=0 singular directions"),
    ],
)
def test_bad_input_is_one_clear_line(M_f, M_g, K, text):
    with pytest.raises(ValueError, match=text):
        overlap(M_f, M_g, K)


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (3, 96, 60)])
def test_subspace_iteration_finds_the_leading_directions(shape):
    K, (U, _, Vh) = 6, torch.linalg.svd(gaussian(*shape), full_matrices=False)
    S = 0.7 ** torch.arange(U.shape[-1], dtype=torch.float64)
    M = (U * S) @ Vh
    found, basis = subspace_iteration(M, K, iterations=4)
    torch.testing.assert_close(found.S, S[:K].expand_as(found.S), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(K, dtype=torch.float64).expand_as(found.U.mT @ found.U))
    continued, _ = subspace_iteration(M, K, basis, iterations=0)
    torch.testing.assert_close(continued.S, found.S, rtol=1e-6, atol=0)


def test_a_direction_missing_from_the_start_comes_back():
    one, three = gaussian(40, 1) @ gaussian(1, 40, seed=1), gaussian(40, 3, seed=2) @ gaussian(3, 40, seed=3)
    _, basis = subspace_iteration(one, 3, iterations=2)
    found, _ = subspace_iteration(three, 3, basis, iterations=0)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(three)[:3], rtol=1e-9, atol=0)


def test_polar_factor_and_rank_cut():
    A = gaussian(30, 6)
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    torch.testing.assert_close(polar(A), U @ Vh, rtol=1e-10, atol=1e-10)
    twice = torch.cat([A, A], 1)
    G = inverse_sqrt(twice.mT @ twice)
    assert torch.linalg.matrix_rank(G) == 6


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "phi3", "qwen3", "bert"])
def test_blocks_tile_every_matrix_once(family):
    hf = tiny(family)
    weights = dict(hf.named_parameters())
    for size in (None, 1, 2):
        cover = {}
        for block in partition(hf, size):
            marks = cover.setdefault(block.parameter, torch.zeros_like(weights[block.parameter]))
            block.add_(marks, torch.ones_like(block.take(marks)), alpha=1.0)
        assert all((marks == 1).all() for marks in cover.values())
    assert not any("embed" in name or "lm_head" in name or "wte" in name for name in cover)
    roles = {block.role for block in partition(hf)}
    assert {"q", "k", "v", "o", "mlp"} <= roles


def test_head_blocks_are_what_the_anatomy_says():
    from circuits import load

    model = load(tiny("gpt2"))
    weights = dict(model.hf.named_parameters())
    blocks = [b for b in partition(model.hf, 1) if b.layer == 1 and b.heads == (2,)]
    slices = model.anatomy.slices((1, 2), biases=False)
    owned = sum(weights[s.parameter].narrow(s.dim, s.start, s.stop - s.start).sum() for s in slices)
    assert sum(b.take(weights[b.parameter]).sum() for b in blocks).item() == pytest.approx(owned.item(), rel=1e-4)
    with pytest.raises(ValueError, match="9 heads per block, but this model has 4 heads"):
        partition(model.hf, 9)

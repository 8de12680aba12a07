import pytest
import torch

from circuits.spectral import truncated_svd
from interventions.merging import Merged, combine, merge
from interventions.sift import interference_free


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def deltas(*shape, tasks=2, dtype=torch.float64):
    return [{"w": gaussian(*shape, seed=seed, dtype=dtype)} for seed in range(tasks)]


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_no_interference_is_left(shape, tasks):
    merged = merge(deltas(*shape, tasks=tasks))
    before, after = merged.interference["w"]
    assert before > 1 and after < 1e-6
    assert merged.spectral == ["w"] and merged["w"].shape == shape


def test_the_flat_merge_is_a_sift_step():
    f, g = deltas(24, 40)
    torch.testing.assert_close(merge([f, g], K=5, spectrum="ones")["w"], interference_free(f["w"], g["w"], 5))


def test_the_kept_spectrum_is_tsv_merge_when_nothing_coincides():
    both = deltas(24, 40)
    torch.testing.assert_close(merge(both, K=5)["w"], merge(both, K=5, method="tsv-m")["w"], rtol=1e-9, atol=1e-10)


def test_coincident_tasks_do_not_become_noise():
    f = deltas(24, 24)[0]
    U, S, V = truncated_svd(f["w"], 5)
    torch.testing.assert_close(merge([f, f], K=5)["w"], (U * S) @ V.mT, rtol=1e-9, atol=1e-10)
    assert merge([f, f], K=5).coincident == {"w": 5} and merge([f, f], K=5).interference["w"][1] < 1e-6
    assert merge(deltas(24, 40), K=5).coincident == {}
    opposite = merge([f, {"w": -f["w"]}], K=5)["w"]
    assert opposite.abs().max() < 1e-10


def test_mean_spectrum_is_flat():
    merged = combine([truncated_svd(d["w"], 4) for d in deltas(24, 40)], "mean")
    assert merged.S.std() < 1e-12 and merged.S[0] == pytest.approx(
        torch.stack([truncated_svd(d["w"], 4).S for d in deltas(24, 40)]).mean()
    )


@pytest.mark.parametrize("method", ["sift", "tsv-m", "task-arithmetic", "iso-c"])
def test_adapters_merge_as_factors_like_dense_matrices(method):
    factors = [{"w": (gaussian(40, 4, seed=s), gaussian(4, 24, seed=s + 1))} for s in (0, 5)]
    dense = [{"w": d["w"][0] @ d["w"][1]} for d in factors]
    K = 4 if method in ("sift", "tsv-m") else None
    left, right = merge(factors, K=K, method=method)["w"]
    assert left.shape[1] <= 8
    expected = merge(dense, K=K, method=method)["w"]
    if method == "iso-c":  # a dense sum of rank 8 has 24 singular values to average over, its factors have 8
        expected = expected * 24 / 8
        U, _, V = truncated_svd(dense[0]["w"] + dense[1]["w"], 8)
        expected = U @ (U.mT @ expected @ V) @ V.mT
    torch.testing.assert_close(left @ right, expected, rtol=1e-7, atol=1e-8)


def test_task_arithmetic_and_ties_by_hand():
    a, b = {"w": torch.tensor([[4.0, -1.0], [0.1, 3.0]])}, {"w": torch.tensor([[2.0, 5.0], [0.2, -0.1]])}
    assert merge([a, b], method="task-arithmetic", scale=0.5)["w"].tolist() == [
        [3.0, 2.0],
        [pytest.approx(0.15), pytest.approx(1.45)],
    ]
    merged = merge([a, b], method="ties", density=0.5)  # keeps 4 and 3; 2 and 5
    assert merged["w"].tolist() == [[3.0, 5.0], [0.0, 3.0]] and merged.averaged == ["w"]
    conflict = merge([{"w": torch.tensor([[1.0]])}, {"w": torch.tensor([[-3.0]])}], method="ties", density=1.0)
    assert conflict["w"].item() == -3.0


def test_iso_c_is_the_flat_sum():
    f, g = deltas(12, 12)
    U, S, Vh = torch.linalg.svd(f["w"] + g["w"])
    torch.testing.assert_close(merge([f, g], method="iso-c")["w"], S.mean() * U @ Vh)


def test_vectors_are_averaged_and_tied_weights_merged_once():
    def task(seed):
        w = gaussian(10, 6, seed=seed)
        return {
            "embed": w,
            "norm": gaussian(6, seed=seed + 9),
            "head": w.clone(),
            "steps": torch.tensor(3),
            "zero": torch.zeros(10, 6),
        }

    merged = merge([task(0), task(1)])
    assert merged.tied == {"head": "embed"} and merged["head"] is merged["embed"]
    assert merged.averaged == ["norm", "steps"] and merged.spectral == ["embed", "zero"]
    torch.testing.assert_close(merged["norm"], (task(0)["norm"] + task(1)["norm"]) / 2)
    assert merged["zero"].abs().max() == 0
    assert repr(merged) == "Merged(2 by subspaces, 2 entry by entry, 1 tied)" and isinstance(merged, Merged)


def test_result_has_the_type_of_the_input():
    assert merge(deltas(8, 6, dtype=torch.bfloat16))["w"].dtype == torch.bfloat16


def test_small_matrices_cap_the_rank():
    tasks = [{"big": gaussian(30, 30, seed=s), "small": gaussian(4, 30, seed=s)} for s in (0, 1)]
    merged = merge(tasks, K=10)
    assert torch.linalg.matrix_rank(merged["big"]) == 20 and torch.linalg.matrix_rank(merged["small"]) == 4


@pytest.mark.parametrize(
    ("tasks", "options", "text"),
    [
        (deltas(8, 6)[:1], {}, "1 task given; merging needs at least two"),
        (deltas(8, 6), dict(method="slerp"), "method='slerp'; expected one of sift, task-arithmetic"),
        (deltas(8, 6), dict(spectrum="flat"), "spectrum='flat'; expected one of keep, ones, mean"),
        (deltas(8, 6), dict(K=4), "K=4 directions for each of 2 tasks; the largest matrix has room for 1 to 3"),
        (deltas(8, 6), dict(method="ties", density=0), "density=0; expected a share"),
        (
            [{"w": torch.ones(2, 2)}, {"v": torch.ones(2, 2)}],
            {},
            r"differ in parameters \(v, w\); merge fine-tunes of one base",
        ),
        (
            [{"w": torch.ones(2, 2)}, {"w": torch.ones(2, 3)}],
            {},
            "w has shapes 2 x 2 and 2 x 3; merge checkpoints of one shape",
        ),
        ([{"w": torch.ones(2, 2)}, {"w": (torch.ones(2, 1), torch.ones(1, 2))}], {}, r"2 x 2 and 2 x 2 \(factors\)"),
        ([{"w": torch.ones(2, 2)}, {"w": torch.full((2, 2), torch.nan)}], {}, "w holds NaN or infinity"),
    ],
)
def test_bad_input_is_one_clear_line(tasks, options, text):
    with pytest.raises(ValueError, match=text):
        merge(tasks, **options)

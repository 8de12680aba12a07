import pytest
import torch

import viz
from circuits import measure_interference, overlap


def objectives(step=0):
    return [
        {
            f"layers.{i}.attn": torch.randn(8, 6, generator=torch.Generator().manual_seed(i + 10 * s + step))
            for i in range(3)
        }
        for s in (1, 2)
    ]


def test_bars_are_the_measurement_most_conflicting_first():
    measured = measure_interference(*objectives(), K=2)
    bars = viz.interference(measured).data[0]
    assert list(bars.x) == sorted(measured.values().values()) and set(bars.y) == set(measured.overlaps)
    assert viz.interference(measured, "sti_fro").data[0].x[0] == min(measured.values("sti_fro").values())


def test_steps_are_a_heatmap():
    measured = [measure_interference(*objectives(step), K=2) for step in (0, 100)]
    cells = viz.interference(measured).data[0]
    assert cells.z[1][1] == measured[1]["layers.1.attn"].cosine and list(cells.x) == [1, 2]
    logged = viz.interference([{"a": -0.5, "b<i>": 0.2}, {"a": 0.1}])
    assert [list(row) for row in logged.data[0].z] == [
        [-0.5, 0.1],
        [0.2, None],
    ] and "1 of 3 in conflict" in logged.layout.title.text
    assert logged.data[0].y[1] == "b&lt;i&gt;"


def test_spectrum_shows_cosines_of_angles_and_chance():
    measured = measure_interference(*objectives(), K=2)
    figure = viz.spectrum(measured)
    worst = min(measured.overlaps, key=lambda name: measured[name].cosine)
    assert worst in figure.layout.title.text and len(figure.layout.updatemenus[0].buttons) == 3
    assert figure.data[0].y == pytest.approx(measured[worst].angles_left.cos().tolist())
    assert figure.data[1].y[0] ** 2 == pytest.approx(2 / 8) and sum(trace.visible for trace in figure.data) == 4
    assert "layers.2.attn" in viz.spectrum(measured, "layers.2.attn").layout.title.text
    alone = viz.spectrum(overlap(torch.eye(4), torch.eye(4), 2))
    assert list(alone.data[0].y) == pytest.approx([1, 1]) and not alone.layout.updatemenus


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match="no measurements to show"):
        viz.interference([])
    with pytest.raises(ValueError, match="block 'x' was not measured"):
        viz.spectrum(measure_interference(*objectives(), K=2), "x")

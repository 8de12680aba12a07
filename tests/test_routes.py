import json

import pytest
import torch

from viz import routing

WEIGHTS = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.1, 0.8, 0.2, 0.9]])


def test_groups_show_mean_responsibility():
    figure = routing(WEIGHTS, ["a", "b", "a", "b"], torch.tensor([0.1, 0.2, 0.3, 0.4]), texts=["w", "x", "y", "<b>"])
    cells, dots = figure.data
    assert list(cells.x) == ["a", "b"]
    torch.testing.assert_close(torch.tensor(cells.z), torch.tensor([[0.85, 0.15], [0.15, 0.85]]))
    assert list(dots.y) == pytest.approx([0.1, 0.2, 0.3, 0.4]) and dots.text[3] == "&lt;b&gt;"


def test_tiny_disagreement_does_not_fill_the_plot():
    figure = routing(WEIGHTS, ["a", "b", "a", "b"], torch.full((4,), 3e-6))
    assert figure.layout.yaxis2.range[1] > 0.1
    assert routing(WEIGHTS, uncertainty=torch.arange(4.0)).layout.yaxis2.range[1] > 3


def test_examples_are_ordered_by_who_answers():
    figure = routing(WEIGHTS, uncertainty=torch.arange(4.0))
    torch.testing.assert_close(torch.tensor(figure.data[0].z), WEIGHTS[:, [0, 2, 3, 1]])
    assert list(figure.data[1].y) == [0, 2, 3, 1]


def test_text_is_escaped():
    assert "<script>" not in json.dumps(
        routing(WEIGHTS, ["<script>"] * 4, title="<script>").to_plotly_json(), default=str
    )


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="2 groups for 4 examples; expected one per example"):
        routing(WEIGHTS, ["a", "b"])

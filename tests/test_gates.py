import pytest

import viz


def test_cosines_by_block_and_step():
    figure = viz.gating([{"a": -0.5, "b<i>": 0.2}, {"a": 0.1}])
    assert [list(row) for row in figure.data[0].z] == [[-0.5, 0.1], [0.2, None]] and figure.data[0].zmin == -0.5
    assert "1 of 3 in conflict" in figure.layout.title.text and figure.data[0].y[1] == "b&lt;i&gt;"
    assert list(figure.data[0].x) == [1, 2]
    with pytest.raises(ValueError, match="no gates to show; give one"):
        viz.gating([{}])

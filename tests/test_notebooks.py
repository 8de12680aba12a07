"""Every notebook runs from top to bottom, and the numbers that it shows are the numbers one gets."""

import base64
import json
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs the notebooks extra")

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
FIGURE = "application/vnd.plotly.v1+json"


def stated_in(notebook):
    """The one cell tagged `numbers`; its first line tells the reader the tolerance in its metadata."""
    (cell,) = [cell for cell in notebook.cells if "numbers" in cell.metadata.get("tags", [])]
    return cell


def numbers(notebook) -> dict:
    """What that cell printed."""
    cell = stated_in(notebook)
    return flat(json.loads("".join(part["text"] for part in cell.outputs if part.get("name") == "stdout")))


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key} / ") if isinstance(value, dict) else {prefix + key: value}
    return found


def differing(stated: dict, found: dict, tolerance: float) -> list[str]:
    """Numbers that are not the same to within the tolerance (of their size, where they are larger than 1)."""
    assert stated.keys() == found.keys()
    return [
        f"{name}: {stated[name]} in the notebook, {found[name]} now"
        for name in stated
        if stated[name] is None
        or found[name] is None
        or abs(stated[name] - found[name]) > tolerance * max(1, abs(stated[name]))
    ]


def test_there_is_one_notebook_for_each_part():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_outputs_and_without_errors(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert numbers(notebook) and path.stat().st_size < 1_000_000
    assert f"each to within {stated_in(notebook).metadata.tolerance}.\n" in stated_in(notebook).source
    text = path.read_text()
    assert str(PROJECT) not in text and "/home/" not in text and "/root/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_shows_figures_and_a_picture_of_each(path):
    """Hosting sites do not draw plotly: without the PNG (`notebooks/execute.py`) they would show nothing."""
    cells = json.loads(path.read_text())["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", []) if FIGURE in output.get("data", {})]
    assert shown
    for data in shown:
        picture = base64.b64decode(data["image/png"])
        assert picture.startswith(b"\x89PNG") and 10_000 < len(picture) < 300_000
        assert int.from_bytes(picture[20:24]) == data[FIGURE]["layout"].get("height", 420)  # drawn from this figure


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_its_numbers(path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    notebook = nbformat.read(path, as_version=4)
    stated = numbers(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert differing(stated, numbers(notebook), stated_in(notebook).metadata.tolerance) == []


def test_a_number_that_changed_is_named():
    assert differing({"a": 0.5, "b": None}, {"a": 0.55, "b": 1}, 0.1) == ["b: None in the notebook, 1 now"]
    assert differing({"a": 0.5, "kl": 300}, {"a": 0.7, "kl": 310}, 0.1) == ["a: 0.5 in the notebook, 0.7 now"]

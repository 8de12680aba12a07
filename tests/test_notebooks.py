"""Every notebook runs from top to bottom, and the numbers that it shows are the numbers one gets."""

import json
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs the notebooks extra")

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
# The rest take up to two minutes each on a busy core: pytest -m slow.
QUICK = ("01_find_a_circuit", "02_tune_only_the_circuit")
TOLERANCE = 0.1  # differences of processors add up over training; half the accuracies are of 60 rows


def numbers(notebook) -> dict:
    """What the cell tagged `numbers` printed."""
    (cell,) = [cell for cell in notebook.cells if "numbers" in cell.metadata.get("tags", [])]
    return flat(json.loads("".join(part["text"] for part in cell.outputs if part.get("name") == "stdout")))


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key} / ") if isinstance(value, dict) else {prefix + key: value}
    return found


def differing(stated: dict, found: dict) -> list[str]:
    """Numbers that are not the same to within the tolerance (of their size, where they are larger than 1)."""
    assert stated.keys() == found.keys()
    return [
        f"{name}: {stated[name]} in the notebook, {found[name]} now"
        for name in stated
        if stated[name] is None
        or found[name] is None
        or abs(stated[name] - found[name]) > TOLERANCE * max(1, abs(stated[name]))
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
    assert numbers(notebook) and path.stat().st_size < 300_000
    text = path.read_text()
    assert str(PROJECT) not in text and "/home/" not in text and "/root/" not in text


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS],
)
def test_a_notebook_runs_and_gives_its_numbers(path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    notebook = nbformat.read(path, as_version=4)
    stated = numbers(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert differing(stated, numbers(notebook)) == []


def test_a_number_that_changed_is_named():
    assert differing({"a": 0.5, "b": None}, {"a": 0.55, "b": 1}) == ["b: None in the notebook, 1 now"]
    assert differing({"a": 0.5, "kl": 300}, {"a": 0.7, "kl": 310}) == ["a: 0.5 in the notebook, 0.7 now"]

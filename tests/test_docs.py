"""README and docs say what is true: their Python blocks run, their links lead somewhere, the reference is up to date."""

import re
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted([PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(m["info"].strip(), m["code"]) for m in BLOCK.finditer(page.read_text())]


def runnable(page: Path) -> list[str]:
    """Blocks marked `python run` are run, in order, in one namespace per page. Others are sketches and need only parse."""
    return [code for info, code in blocks(page) if info == "run"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page):
    if page.name == "reference.md":
        pytest.skip("the reference shows signatures, not programs")
    for _, code in blocks(page):
        compile(code, page.name, "exec")
    assert page.read_text().startswith("# "), "a page begins with its title"


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for code in runnable(page):
        exec(compile(code, page.name, "exec"), namespace)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "docs"))
    import make_reference

    assert (PROJECT / "docs/reference.md").read_text() == make_reference.reference(), (
        "run python docs/make_reference.py"
    )
    sys.modules.pop("make_reference")

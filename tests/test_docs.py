"""README and docs say what is true: their Python blocks run, their links lead somewhere, the reference is up to date."""

import re
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted([PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")])
PROGRAMS = [page for page in PAGES if page.name != "reference.md"]  # which shows signatures
BLOCK = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```\n(?:\s*```text\n(?P<output>.*?)^```)?", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text() + "\n"))


def runnable(page: Path) -> list[re.Match]:
    """`python run` blocks are run, in order, in one namespace per page; `run shared` ones where real models lie beside the project."""
    return [block for block in blocks(page) if block["info"].split()[:1] == ["run"]]


def compare(printed: str, stated: str) -> None:
    """The same words; numbers may differ in the last digits, as they do between processors."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", stated).split(), printed
    for found, said in zip(NUMBER.findall(printed), NUMBER.findall(stated), strict=True):
        assert float(found.replace(",", "")) == pytest.approx(float(said.replace(",", "")), rel=0.05, abs=0.02), printed


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_python_blocks_parse(page):
    for block in blocks(page):
        compile(block["code"], page.name, "exec")
    assert page.read_text().startswith("# "), "a page begins with its title"


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_every_python_block_runs_somewhere(page):
    """`launched` ones are scripts: test_dropin.py runs them in processes of their own."""
    launched = ("launched",) if page.name == "restricted_training.md" else ()
    assert {block["info"].strip() for block in blocks(page)} <= {"run", "run shared", *launched}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own option
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # PEFT's SHiRA
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # Trainers without a GPU
@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys, request):
    if any("shared" in block["info"] for block in runnable(page)):
        (tmp_path / "shared").symlink_to(request.getfixturevalue("shared"))
        tmp_path = tmp_path / "here"
        tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for block in runnable(page):
        exec(compile(block["code"], page.name, "exec"), namespace)
        printed = capsys.readouterr().out
        if block["output"]:
            compare(printed, block["output"])


def test_the_index_names_every_page():
    index = (PROJECT / "docs/README.md").read_text()
    missing = [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index]
    assert missing == []


def test_files_and_pictures_the_readme_names_exist():
    text = (PROJECT / "README.md").read_text()
    named = re.findall(r"`((?:circuits|interventions|viz|docs)/[\w/.]+)`", text) + re.findall(
        r'(?:src|srcset)="([^"]+)"', text
    )
    assert len(named) > 10
    for target in named:
        assert (PROJECT / target).exists(), f"README names {target}"


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

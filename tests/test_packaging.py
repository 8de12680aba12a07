"""The shape of the project: who imports whom, what a cold import costs, and that nobody else claims our package names."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"circuits": set(), "interventions": {"circuits"}, "viz": {"circuits"}}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_one_way(package):
    files = list((PROJECT / package).rglob("*.py"))
    assert files
    for file in files:
        if package == "interventions" and file.name.startswith("cli"):
            continue  # the command line is where everything meets
        ours = imported(file) & set(MAY_IMPORT) - {package}
        assert ours <= MAY_IMPORT[package], f"{file.name} imports {ours}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_contents_page_names_what_exists(package):
    code = f"import {package}; [getattr({package}, name) for name in {package}.__all__]; print(len({package}.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_cold_import_loads_nothing_heavy():
    code = "import sys, circuits, interventions, viz; print([m for m in HEAVY if m in sys.modules])"
    heavy = ["torch", "transformers", "transformer_lens", "datasets", "plotly", "peft", "pandas"]
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy}\n{code}"], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_circuits_loads_no_model_library_at_import():
    modules = [f"circuits.{f.stem}" for f in (PROJECT / "circuits").glob("*.py") if f.stem != "__init__"]
    heavy = ["transformers", "transformer_lens", "datasets", "plotly", "peft", "sklearn", "scipy"]
    code = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_other_distribution_claims_our_names():
    """PyPI has distributions called `circuits` and `viz`; beside one of them our imports would be theirs."""
    for package in MAY_IMPORT:
        others = set(packages_distributions().get(package, [])) - {"luthier"}
        assert not others, f"{others} also install a package {package!r}; uninstall it"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_module_is_named_like_what_it_exports(package):
    """`from circuits import x` would give the module or the function, depending on what was imported before."""
    stub = ast.parse((PROJECT / package / "__init__.pyi").read_text())
    exports = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    modules = {file.stem for file in (PROJECT / package).glob("*.py")}
    assert not exports & modules

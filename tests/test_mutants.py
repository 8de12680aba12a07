"""The mistakes that `break_once` makes are real ones, and reach other processes; without them it would prove nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mutants import broken, corrupted, mistakes_of

MUTANTS = Path(__file__).parent / "break_once" / "mutants.py"
SOURCE = '''
def mean(values, start=0):
    """Not touched."""
    if not values:
        raise ValueError("no values")
    total = start
    for value in values:
        total += value
    return total / len(values)
'''


def meanings() -> dict[str, object]:
    """What the function gives for [3, 5] and for nothing, after each mistake."""
    found = {}
    for n, mistake in enumerate(mistakes_of(SOURCE)):
        namespace = {"corrupted": corrupted}
        exec(compile(broken(SOURCE, n), "mean", "exec"), namespace)
        for values in ([3, 5], []):
            try:
                found[mistake.words(), len(values)] = namespace["mean"](values)
            except Exception as problem:
                found[mistake.words(), len(values)] = type(problem).__name__
    return found


def test_each_kind_of_mistake_changes_the_result():
    found = meanings()
    assert found["`if not values:` became `if not not values:`", 2] == "ValueError"
    assert found["`raise ValueError('no values')` became `pass`", 0] == "ZeroDivisionError"
    assert found["`for value in values:` became `for value in [*values][1:]:`", 2] == 2.5
    assert found["`total += value` became `pass`", 2] == 0
    assert found["`total / len(values)` became `total * len(values)`", 2] == 16
    assert found["`return total / len(values)` became `return corrupted(total / len(values))`", 2] == 5
    assert found["`total = start` became `total = corrupted(start)`", 2] == 4.5
    assert not any("Not touched" in words for words, _ in found)


def test_a_mistake_is_on_the_line_that_it_names():
    lines = {mistake.words().split("`")[1]: mistake.line for mistake in mistakes_of(SOURCE)}
    assert lines["raise ValueError('no values')"] == 5 and lines["total += value"] == 8


@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.tensor([True]), torch.tensor([3]), True, 2, 0.0, "a", [1], {"a": 1}, (1,)]
)
def test_a_corrupted_value_keeps_its_type_and_differs(value):
    other = corrupted(value)
    assert type(other) is type(value)
    if isinstance(value, torch.Tensor):
        assert other.shape == value.shape and other.dtype == value.dtype and not torch.equal(other, value)
    else:
        assert other != value


def test_a_process_started_by_a_test_has_the_mistake(tmp_path):
    module = tmp_path / "averages.py"
    module.write_text(SOURCE)
    n = next(n for n, mistake in enumerate(mistakes_of(SOURCE)) if "total * len" in mistake.words())
    (tmp_path / "sitecustomize.py").write_text(f"import runpy\nrunpy.run_path({str(MUTANTS)!r})['install']()\n")
    said = []
    for environment in ({}, {"BREAK_ONCE": f"{module}:{n}"}):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        code = "import averages; print(averages.mean([3, 5]))"
        said.append(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip()
        )
    assert said == ["4.0", "16"]
    assert ast.unparse(ast.parse(module.read_text())) == ast.unparse(ast.parse(SOURCE))


def test_every_source_can_be_broken_and_still_compiles():
    for file in (MUTANTS.parents[2] / "circuits").glob("h*.py"):
        source = file.read_text()
        for n in range(0, len(mistakes_of(source)), 40):
            compile(broken(source, n), file.name, "exec")

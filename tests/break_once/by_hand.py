"""Breaks that `mutants.py` does not make: in pages, notebooks, packaging, the tests' own tools, and larger ones in the source.

They are made in a temporary copy of the project.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]


class Edit(NamedTuple):
    """In each of the files the first `old` becomes `new`; an empty `old` stands for the end of the file, which may be a new one."""

    tests: str
    files: str
    old: str
    new: str


def imports(package: str) -> str:
    return f"\n\ndef _late():\n    import {package}\n"


MISTAKES = "tests/break_once/mutants.py"
NEW_MODULES = "circuits/load.py interventions/restrict.py viz/heatmap.py"
RIVAL = "rival-1.0.dist-info/METADATA rival-1.0.dist-info/top_level.txt"
PLOTLY = "    import plotly\n    plotly.io.templates.default = 'none'\n    figure.update_layout("
BASE_MOVES = "        self.hf.eval()\n        next(self.hf.parameters()).data.mul_(1.1)"
COPY_SHARES = "    def __deepcopy__(self, memo):\n        return self\n\n    def delta(self"
CALLS = 'vars(self).setdefault("calls", [])'
RECOMPUTED = f"SlicedLinear.apply(x * ({CALLS}.append(0) or len({CALLS})),"
RUN_PAGES = "README.md " + " ".join(
    f"docs/{page}.md"
    for page in "aisp attribution cdt ct_sft faithfulness figures judge renyi restricted_training sift site your_own".split()
)
ONE_OFF = "len(self._fixed)) - (len(self._fixed) > 1)\n"
FLAT = "torch.cat([grad.flatten() for grad in grads])"
EDITS = [
    Edit("test_docs.py::test_python_blocks_parse*", "README.md docs/*.md", "", "\n```python\nfor\n```\n"),
    Edit("test_docs.py::test_every_python_block*", "README.md docs/*.md", "", "\n```python sketch\npass\n```\n"),
    Edit("test_docs.py::test_files_and_pictures*", "README.md", "", "`docs/nowhere.md`"),
    Edit("test_docs.py::test_links_to_files*", "README.md docs/*.md", "", "\n[nowhere](nowhere.md)\n"),
    Edit("test_docs.py::test_python_blocks_run*", RUN_PAGES, "from circuits import ", "from circuits import gone, "),
    Edit("test_docs.py::test_python_blocks_run*runs*", "docs/runs.md", 'spec["names"]', 'spec["gone"]'),
    Edit("test_docs.py::test_the_index_*", "docs/README.md", "(cdt.md)", "(gone.md)"),
    Edit("test_docs.py::test_the_reference_is_up_to_date", "circuits/heads.py", "One attention head;", "A head;"),
    Edit("test_packaging.py::test_packages_import_one_way[[]circuits]", "circuits/heads.py", "", imports("viz")),
    Edit(
        "test_packaging.py::test_packages_import_one_way[[]interventions]", "interventions/sift.py", "", imports("viz")
    ),
    Edit("test_packaging.py::test_packages_import_one_way[[]viz]", "viz/theme.py", "", imports("interventions")),
    Edit(
        "test_packaging.py::test_the_contents_page*", "*/__init__.pyi", "", "\nfrom .heads import Nothing as Nothing\n"
    ),
    Edit("test_packaging.py::test_a_cold_import*", "circuits/__init__.py", "", "\nimport torch\n"),
    Edit("test_packaging.py::test_circuits_loads_no*", "circuits/lens.py", "", "\nimport transformers\n"),
    Edit("test_packaging.py::test_no_other_*", RIVAL, "", "Name: rival\ncircuits\n"),
    Edit("test_packaging.py::test_no_module_is*", NEW_MODULES, "", "\n"),
    Edit("test_notebooks.py::test_there_is_one*", "notebooks/07_one_more.ipynb", "", "{}"),
    Edit(
        "test_notebooks.py::test_notebooks_are_*", "notebooks/*.ipynb", '"execution_count": 1', '"execution_count": 7'
    ),
    Edit("test_notebooks.py::test_every_notebook_shows*", "notebooks/*.ipynb", '"image/png"', '"image/gif"'),
    Edit("test_notebooks.py::test_a_notebook_runs*", "circuits/pocket/model/config.json", "10000.0", "10.0"),
    Edit("test_notebooks.py::test_a_number_that*", "tests/test_notebooks.py", "> tolerance *", "> 9 * tolerance *"),
    Edit(
        "test_display.py::test_nouns_show_*",
        "circuits/display.py",
        "from html import escape",
        "def escape(text):\n    return '<script>'",
    ),
    Edit("test_display.py::test_results_print*embedding*", "circuits/embedding.py", "prompts of {", "prompts with {"),
    Edit("test_viz.py::test_heatmap_of_a_large*", "viz/heatmaps.py", "_strips(scores)}", "_strips(scores, 200)}"),
    Edit(
        "test_display.py::test_nouns_show_*ensemble*", "interventions/ensemble.py", "escape(repr(self))", "type(self)"
    ),
    Edit("test_routes.py::test_text_is_escaped", "viz/theme.py", "escape(str(text), quote=False)", "str(text)"),
    Edit("test_viz.py::test_the_global_template*", "viz/theme.py", "    figure.update_layout(", PLOTLY),
    Edit("test_rules.py::test_rows_are_seeded*", "circuits/rules.py", "manual_seed(seed)", "manual_seed(0)"),
    Edit("test_files.py::test_fingerprints*", "circuits/files.py", "hexdigest()[:12]", "hexdigest()[:0]"),
    Edit(
        "test_injection.py::test_batched_*", "interventions/prompt_end.py", "(rows,), width - 1", "(rows,), width - 2"
    ),
    Edit(
        "test_injection.py::test_no_hook_survives*",
        "interventions/prompt_end.py",
        "        handle.remove()",
        "        pass",
    ),
    Edit(
        "test_prelogits.py::test_sharing_rows*",
        "interventions/rollout.py",
        "if share_prefixes",
        "if not share_prefixes",
    ),
    Edit(
        "test_renyi.py::test_order_of*",
        "interventions/renyi.py",
        "(alpha * distance, 0)",
        "(alpha * distance, 0).cumsum(0)",
    ),
    Edit(
        "test_coupled.py::test_one_member_is*",
        "interventions/renyi.py",
        "/ alpha + torch.where(",
        "/ alpha - torch.where(",
    ),
    Edit("test_sift.py::test_accumulated_*", "interventions/gradient_pairs.py", "held.add_(gradient)", "gradient"),
    Edit(
        "test_tuning.py::test_adapters_of*",
        "interventions/tuning.py",
        "if parameter.requires_grad]",
        "if parameter.requires_grad_() is not None]",
    ),
    Edit(
        "test_selection.py::test_the_cache_is*",
        "circuits/prefix.py",
        "[copy.copy(layer) for layer in cache.layers]",
        "cache.layers",
    ),
    Edit(
        "test_restriction.py::test_saved_checkpoint*",
        "interventions/restriction.py",
        ".add_(delta.narrow(",
        ".add_(0 * delta.narrow(",
    ),
    Edit("test_coupled.py::test_base_is*", "interventions/ensemble.py", "        self.hf.eval()", BASE_MOVES),
    Edit("test_restriction.py::test_a_copy_*", "interventions/sliced.py", "    def delta(self", COPY_SHARES),
    Edit(
        "test_dropin.py::test_gradient_checkpointing*", "interventions/sliced.py", "SlicedLinear.apply(x,", RECOMPUTED
    ),
    Edit(
        "test_sift.py::test_a_mask_without*",
        "interventions/sift.py",
        "if mask is None else update * block.take(mask)",
        "",
    ),
    Edit("test_sift.py::test_the_random_gate*", "interventions/sift.py", "[: sum(chosen)]", "[: sum(chosen) - 1]"),
    Edit("test_browser.py::test_hover_shows*", "viz/heatmaps.py", "%{z:+.4g}", "%{z:+.2g}"),
    Edit("test_browser.py::test_a_large_model*", "viz/heatmaps.py", "a%{y}.h%{x}", "a%{x}.h%{y}"),
    Edit("test_browser.py::test_the_curve_shows*", "viz/curves.py", "heads: ", "head: "),
    Edit("test_browser.py::test_lines_of*", "viz/page.py", "white-space: pre-line", "white-space: normal"),
    Edit("test_browser.py::test_on_a_narrow*", "viz/page.py", ".plot { min-width: 760px; }", ""),
    Edit("test_cli.py::test_help_is_quick*", "interventions/cli.py", "", "\nimport torch\n"),
    Edit("test_dropin.py::test_the_*_example_runs*", "interventions/restriction.py", ":,} frozen", ":,} still"),
    Edit("test_model.py::test_logging_and*", "circuits/lens.py", "logger.setLevel(level)", "pass"),
    Edit(
        "test_sharding.py::test_two_processes*",
        "circuits/sharding.py",
        "torch.cat(parts, -1)",
        "torch.cat(parts[::-1], -1)",
    ),
    Edit("test_viz.py::test_colours_stay*", "viz/theme.py", '(0.4, "#a6cbe3")', '(0.4, "#e3cba6")'),
    Edit("test_gallery.py::test_every_figure*", "viz/__init__.pyi", "", "\nfrom .theme import clean as clean\n"),
    Edit("test_fewshot.py::test_agreement_with*", "circuits/heads.py", '"top10": overlap', '"top": overlap'),
    Edit("test_display.py::test_results_print*roles*", "circuits/roles.py", ".top(3)", ".top(2)"),
    Edit(
        "test_cdt.py::test_approximations*", "circuits/streams.py", "return x * scale *", "return x.flip(-1) * scale *"
    ),
    Edit("test_injection.py::test_beams*", "interventions/prompt_end.py", "len(self._fixed))\n", ONE_OFF),
    Edit("test_sift.py::test_both_losses*", "interventions/sift.py", 'a < group["epsilon"]', 'a > group["epsilon"]'),
    Edit("test_dropin.py::test_torch_compile*", "interventions/restriction.py", 'f"0 of {', 'f"1 of {'),
    Edit("test_dropin.py::test_two_processes*", "interventions/restriction.py", ":,} frozen", ":,} still"),
    Edit(
        "test_coupled.py::test_two_processes*", "interventions/coupled.py", f'accelerator.reduce({FLAT}, "sum")', FLAT
    ),
    Edit("test_mutants.py::test_each_kind*", MISTAKES, "case ast.Raise() |", "case"),
    Edit("test_mutants.py::test_a_mistake_is*", MISTAKES, "return Mistake(", "return Mistake(1 or "),
    Edit(
        "test_mutants.py::test_a_corrupted*", MISTAKES, "    if hasattr(value", "    return value\n    if hasattr(value"
    ),
    Edit("test_mutants.py::test_a_process*", MISTAKES, '("BREAK_ONCE")', '("BROKEN")'),
    Edit("test_mutants.py::test_every_source*", MISTAKES, "ast.fix_missing_locations(tree)", "ast.Module([tree], [])"),
]


def edits_of(names: list[str]) -> Iterator[tuple[Edit, list[str]]]:
    for edit in EDITS:
        if chosen := [name for name in names if fnmatch(name, f"tests/{edit.tests}")]:
            yield edit, chosen


def failures(edit: Edit, names: list[str]) -> dict[str, str]:
    """What each of the tests that fail says, in a copy of the project with the edit made."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".*", "artifacts", "demo", "__pycache__"))
        for pattern in edit.files.split():
            for file in list(copy.glob(pattern)) or [copy / pattern]:
                make(edit, file)
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-m", "", *names]
        environment = {**os.environ, "COLUMNS": "250"}
        said = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True).stdout
    lines = [line.removeprefix("FAILED ").removeprefix("ERROR ") for line in said.splitlines()]
    return {name: line.removeprefix(f"{name} - ") for name in names for line in lines if line.startswith(f"{name} - ")}


def make(edit: Edit, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    text = file.read_text() if file.exists() else ""
    if edit.old and edit.old not in text:
        raise ValueError(f"{edit.old!r} is not in {file.name} any more; change the edit for {edit.tests}")
    file.write_text(text.replace(edit.old, edit.new, 1) if edit.old else text + edit.new)

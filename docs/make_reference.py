"""Write docs/reference.md from the docstrings: `python docs/make_reference.py` (a test keeps it up to date)."""

import ast
import inspect
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("circuits", "interventions", "viz")


def first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """As written in the source, so that the shapes show."""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        return node.name if init is None else f"{node.name}({ast.unparse(init.args).removeprefix('self, ')})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def members(node: ast.ClassDef) -> list[str]:
    lines = []
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            text = (ast.get_docstring(method) or "").partition("\n")[0]
            lines.append(f"- `{method.name}`{': ' + text if text else ''}")
    return lines


def entries(package: str) -> list[str]:
    """Every name of the contents page, in its order."""
    lines = []
    for page in ast.parse((PROJECT / package / "__init__.pyi").read_text()).body:
        if not isinstance(page, ast.ImportFrom):
            continue
        source = PROJECT / package / f"{page.module}.py"
        tree = ast.parse(source.read_text()) if source.is_file() else ast.parse("")
        for alias in page.names:
            node = next((n for n in tree.body if getattr(n, "name", None) == alias.name), None)
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            lines += [f"### `{package}.{alias.name}`", "", "```python", signature(node), "```", ""]
            lines += [inspect.cleandoc(ast.get_docstring(node) or ""), ""]
            if isinstance(node, ast.ClassDef) and members(node):
                lines += [*members(node), ""]
    return lines


def reference() -> str:
    lines = ["# Reference", "", "Made from the docstrings by `python docs/make_reference.py`.", ""]
    for package in PACKAGES:
        lines += [f"## {package}", "", f"{first_line(PROJECT / package / '__init__.py').partition('.')[0]}.", ""]
        lines += entries(package)
        lines += [f"### Files of {package}", "", "| file | what |", "|---|---|"]
        for file in sorted((PROJECT / package).rglob("*.py")):
            about = first_line(file).replace("|", "\\|")
            lines.append(f"| `{file.relative_to(PROJECT / package)}` | {about} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (PROJECT / "docs/reference.md").write_text(reference())
    print("wrote docs/reference.md", file=sys.stderr)

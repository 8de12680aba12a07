"""Small, plausible mistakes in a Python source: the ways in which `break_once.py` breaks the code.

1. `mistakes(tree)` walks the syntax tree of a module in a fixed order and yields each mistake that could be made in it: its
   line, words for it, and a function that makes it. The n-th mistake of a source is therefore always the same.
2. `broken(source, n)` is the tree with the n-th mistake made, ready to compile.
3. `install()` makes that mistake in any process started by a test: an import hook that the environment chooses.
"""

import ast
import atexit
import builtins
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

OPPOSITE = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
BY_ONE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SAYS_NOTHING = {"annotation", "returns", "decorator_list", "format_spec"}


class Mistake(NamedTuple):
    line: int
    words: Callable[[], str]
    make: Callable[[], None]


def alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """What somebody might have written in this node's place, the gravest mistake first."""
    match node:
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
        case ast.BinOp(left, op, right) if type(op) in OPPOSITE:
            yield ast.BinOp(left, OPPOSITE[type(op)](), right)
            yield left
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OPPOSITE[type(op)](), values)
            yield values[0]
        case ast.Compare(left, [op], right) if type(op) in OPPOSITE:
            yield ast.Compare(left, [OPPOSITE[type(op)]()], right)
            if type(op) in BY_ONE:
                yield ast.Compare(left, [BY_ONE[type(op)]()], right)
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            opposite = copy.copy(node)
            opposite.test = ast.UnaryOp(ast.Not(), test)
            yield opposite
        case ast.For(iter=items) | ast.comprehension(iter=items):
            shorter = copy.copy(node)
            shorter.iter = ast.parse("[*_][1:]", mode="eval").body
            shorter.iter.value.elts[0].value = items
            yield shorter
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(float() as value):
            yield ast.Constant(2 * value + 1)
        case ast.Constant(str() as value):
            yield ast.Constant(value + "~")
        case ast.Call(function, arguments, options):
            if arguments and not isinstance(arguments[0], ast.Starred):
                yield arguments[0]
            if options or arguments:
                yield ast.Call(function, arguments[: None if options else -1], options[:-1])
            if isinstance(function, ast.Attribute):
                yield function.value
        case ast.Return(ast.expr() as value):
            yield ast.Return(ast.Call(ast.Name("corrupted", ast.Load()), [value], []))
        case ast.Assign(targets, value):
            yield ast.Assign(targets, ast.Call(ast.Name("corrupted", ast.Load()), [value], []))


def mistakes(parent: ast.AST) -> Iterator[Mistake]:
    """Every mistake in the fixed order of the tree; docstrings, annotations and decorators are left alone."""
    for name, field in ast.iter_fields(parent):
        for place, node in enumerate(field if isinstance(field, list) else [field]):
            if isinstance(node, ast.AST) and name not in SAYS_NOTHING and not _is_docstring(node):
                for other in alternatives(node):
                    yield _mistake(parent, name, field, place, node, other)
                yield from mistakes(node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _mistake(parent: ast.AST, name: str, field: Any, place: int, node: Any, other: Any) -> Mistake:
    def make() -> None:
        if isinstance(field, list):
            field[place] = other
        else:
            setattr(parent, name, other)

    def words() -> str:
        before, after = (ast.unparse(each).strip().split("\n")[0][:70] for each in (node, other))
        return f"`{before}` became `{after}`"

    ast.copy_location(other, node)
    return Mistake(getattr(node, "lineno", None) or node.iter.lineno, words, make)


def mistakes_of(source: str) -> list[Mistake]:
    return list(mistakes(ast.parse(source)))


def broken(source: str, n: int) -> ast.Module:
    tree = ast.parse(source)
    list(mistakes(tree))[n].make()
    return ast.fix_missing_locations(tree)


def corrupted(value: Any) -> Any:
    """A value of the same type and shape that is not this one, where there is such a value."""
    if hasattr(value, "is_floating_point") and hasattr(value, "shape"):
        if value.is_floating_point():
            return value * 1.5 + 0.25
        return ~value if str(value.dtype) == "torch.bool" else value + 1
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "~"
        case list():
            return value[:-1]
        case dict():
            return dict(list(value.items())[:-1])
        case tuple() if type(value) is tuple and value:
            return (corrupted(value[0]), *value[1:])
    if is_dataclass(value) and not isinstance(value, type):
        first = next((field.name for field in fields(value) if field.init), None)
        return replace(value, **{first: corrupted(getattr(value, first))}) if first else value
    return value


def install() -> None:
    """In a process that a test starts: break the file that BREAK_ONCE names, note lines where BREAK_ONCE_LINES asks for them."""
    builtins.corrupted = corrupted
    if folder := os.environ.get("BREAK_ONCE_LINES"):
        import coverage

        lines = coverage.Coverage(f"{folder}/lines", data_suffix=True, source_pkgs=["circuits", "interventions", "viz"])
        lines.start()
        atexit.register(lambda: (lines.stop(), lines.save()))
    if chosen := os.environ.get("BREAK_ONCE"):
        path, _, n = chosen.rpartition(":")
        ordinary = SourceFileLoader.get_code

        def get_code(self: SourceFileLoader, name: str) -> Any:
            if Path(self.path).resolve() != Path(path):
                return ordinary(self, name)
            return compile(broken(Path(path).read_text(), int(n)), self.path, "exec")

        SourceFileLoader.get_code = get_code

"""Run chosen tests in a fork of a process that has already imported everything and collected the tests."""

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

from mutants import broken, install

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = [PROJECT / package for package in ("circuits", "interventions", "viz")]
WARM = ("transformer_lens.model_bridge", "plotly.graph_objects", "peft", "scipy.stats", "datasets", "rich.progress")


def sources() -> dict[str, str]:
    return {str(f.relative_to(PROJECT)): f.read_text() for package in PACKAGES for f in sorted(package.rglob("*.py"))}


def in_a_fork(work: Callable[[], Iterator], limit: float) -> list:
    """What `work` yields in a child process, as far as it comes within the limit."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(quiet, standard)
        try:
            for said in work():
                os.write(write, json.dumps(said).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(write)
    said, end = b"", time.monotonic() + limit
    while select.select([read], [], [], max(0, end - time.monotonic()))[0] and (part := os.read(read, 1 << 20)):
        said += part
    os.close(read)
    try:  # whatever the tests left running goes with them
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)
    return [json.loads(line) for line in said.split(b"\n")[:-1]]


class Forks:
    """A pytest plugin that knows how to run collected tests in forks, with or without a mistake in the code."""

    def __init__(self) -> None:
        self.items: dict[str, pytest.Item] = {}
        self.failure: dict[str, str] | None = None
        self.hook = tempfile.TemporaryDirectory()
        call = f"import runpy\nrunpy.run_path({str(Path(__file__).with_name('mutants.py'))!r})['install']()\n"
        Path(self.hook.name, "sitecustomize.py").write_text(call)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator:
        report = yield
        if report.failed and self.failure is None:
            ours = tuple(f"{package}{os.sep}" for package in PACKAGES)
            crash = any(str(entry.path).startswith(ours) for entry in call.excinfo.traceback)
            crash |= call.excinfo.type.__module__.split(".")[0] in ("beartype", "jaxtyping")
            said = f"{call.excinfo.typename}: {call.excinfo.value}".strip().split("\n")[0][:120]
            self.failure = {"by": "crash" if crash else "check", "saw": said}
        elif report.skipped and not hasattr(report, "wasxfail"):
            self.failure = {"by": "skipped", "saw": str(call.excinfo.value)}
        return report

    def warm_up(self, items: list[pytest.Item]) -> None:
        """Import what the tests will import, and find every function of the project by where it stands."""
        self.items = {item.nodeid: item for item in items}
        ours = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in sources()]
        for name in (*WARM, *ours):
            importlib.import_module(name)
        install()
        self.functions = defaultdict(list)
        for each in gc.get_objects():
            if type(each) is types.FunctionType:  # isinstance would wake lazy objects
                code = each.__code__
                self.functions[code.co_filename, code.co_qualname, code.co_firstlineno].append(each)
        gc.freeze()

    def run(self, names: list[str], limit: float, before: Callable, after: Callable, **environment: str) -> list:
        """In a fork, for each test: [its name, its failure or None, seconds, what `after` gives]."""

        def work() -> Iterator:
            self.reach_subprocesses(environment)
            before()
            for name, following in zip(names, [*names[1:], None], strict=True):
                self.failure, start = None, time.perf_counter()
                item, next_item = self.items[name], following and self.items[following]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
                yield [name, self.failure, round(time.perf_counter() - start, 3), after()]

        return in_a_fork(work, limit)

    def reach_subprocesses(self, environment: dict[str, str]) -> None:
        """Processes that a test starts read `install()` first, whatever environment the test gives them."""
        ordinary = subprocess.Popen.__init__

        def start(popen: Any, *arguments: Any, env: Any = None, **options: Any) -> None:
            env = dict(os.environ if env is None else env) | environment
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [self.hook.name, env.get("PYTHONPATH")]))
            ordinary(popen, *arguments, env=env, **options)

        subprocess.Popen.__init__ = start

    def measure(self, name: str) -> dict | None:
        """Seconds, and lines by file, of one test in a fork of its own: nothing is left from an earlier test."""
        with tempfile.TemporaryDirectory() as folder:
            meter = coverage.Coverage(data_file=None, source=[str(package) for package in PACKAGES])

            def lines() -> dict[str, list[int]]:
                meter.stop()
                data = meter.get_data()
                for part in Path(folder).iterdir():
                    more = coverage.CoverageData(str(part))
                    more.read()
                    data.update(more)
                found = {file: data.lines(file) for file in data.measured_files()}
                return {str(Path(file).relative_to(PROJECT)): sorted(ran) for file, ran in found.items() if ran}

            for _, failure, seconds, found in self.run([name], 600, meter.start, lines, BREAK_ONCE_LINES=folder):
                return {"seconds": seconds, "lines": found, "failure": failure}
        return None

    def run_broken(self, file: str, n: int, names: list[str], limit: float) -> list:
        """The tests with the n-th mistake made in a file: in this process by replacing code, in others by the import hook."""
        path = str(PROJECT / file)

        def make() -> None:
            whole = compile(broken(Path(path).read_text(), n), path, "exec")
            for code in functions_of(whole):
                for function in self.functions[path, code.co_qualname, code.co_firstlineno]:
                    if function.__code__.co_freevars == code.co_freevars:
                        function.__code__ = code

        return self.run(names, limit, make, lambda: None, BREAK_ONCE=f"{path}:{n}")


def functions_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """The functions and methods of a module's code; a function within a function comes with the outer one."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & 0x2:  # CO_NEWLOCALS: a function, not a class body
                yield constant
            else:
                yield from functions_of(constant)

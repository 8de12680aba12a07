"""Break the code once for each test and see the test fail: what a green suite cannot say about itself.

1. Collect the tests and import the project once, then fork for everything that follows (forks.py): a fork costs hundredths of
   a second. Note which source lines each test runs, in the processes that it starts too.
2. Until each test has failed once: take the cheapest that has not, and make a small mistake (mutants.py) in a line that few
   other tests, or few other test files, run; run the unfinished tests that run this line. No file is changed: in a fork the
   function's code is replaced, and processes that a test starts get the mistake from an import hook.
3. Keep for each test the first mistake that it noticed and what it said (seen_red.json). It is *checked* when its own
   expectation failed. When an exception inside the project stopped it, it has *crashed*, and the search goes on. A test
   that lets every mistake pass has *survived*: read it, sharpen it, or break by hand what it is about (by_hand.py, for pages,
   notebooks and packaging too).

Only tests that are new, edited or unfinished are looked at; stop and start again as you like.
"""

import argparse
import hashlib
import inspect
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from by_hand import edits_of, failures
from forks import PROJECT, Forks, sources
from mutants import mistakes_of

SEEN = Path(__file__).with_name("seen_red.json")
MEASURED = PROJECT / "artifacts" / "measured_tests.json"
BATCH_SECONDS = 60


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


class Search:
    def __init__(self, seconds: float, tries: int, again: bool) -> None:
        self.end, self.tries, self.again = time.monotonic() + seconds, tries, again
        self.forks = Forks()
        self.seen, self.measured = read(SEEN), read(MEASURED)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests one after the other, as pytest would."""
        self.forks.warm_up(session.items)
        self.texts = sources()
        self.versions = {file: digest(text) for file, text in self.texts.items()}
        self.digests = {item.nodeid: digest(inspect.getsource(item.function)) for item in session.items}
        todo = [name for name in self.digests if self.unfinished(name)]
        print(f"{len(todo)} of {len(self.digests)} tests to look at", flush=True)
        self.break_by_hand(todo)
        todo = list(filter(self.unfinished, todo))
        self.measure(todo)
        self.search([name for name in todo if self.is_measured(name)])
        self.save()
        found = Counter(self.seen[name]["by"] for name in self.digests if not self.is_new(name))
        found["not looked at"] = len(self.digests) - found.total()
        print(", ".join(f"{count} {what}" for what, count in found.items()))
        return True

    def is_new(self, name: str) -> bool:
        return self.seen.get(name, {}).get("test") != self.digests[name]

    def unfinished(self, name: str) -> bool:
        return self.is_new(name) or (self.again and self.seen[name]["by"] != "check")

    def is_measured(self, name: str) -> bool:
        """Whether its lines are known, of sources as they are now."""
        files = self.measured.get(name, {}).get("sources")
        return files is not None and all(self.versions.get(file) == was for file, was in files.items())

    def break_by_hand(self, todo: list[str]) -> None:
        for edit, names in edits_of(todo):
            words = f"by hand in {edit.files}: `{edit.old.strip()}` became `{edit.new.strip()}`"
            for name, said in failures(edit, names).items():
                self.seen[name] = {"test": self.digests[name], "by": "check", "break": words, "saw": said[:120]}

    def measure(self, todo: list[str]) -> None:
        for name in todo:
            if not self.is_measured(name) and time.monotonic() < self.end and (found := self.forks.measure(name)):
                if failure := found.pop("failure"):
                    print(f"{failure['by']} unbroken: {name}: {failure['saw']}", flush=True)
                    self.seen[name] = {"test": self.digests[name]} | failure
                    continue
                self.measured[name] = found | {"sources": {file: self.versions[file] for file in found["lines"]}}
        MEASURED.parent.mkdir(exist_ok=True)
        ours = {name: self.measured[name] for name in todo if name in self.measured}
        MEASURED.write_text(json.dumps(read(MEASURED) | ours))

    def search(self, todo: list[str]) -> None:
        self.mistakes = {file: mistakes_of(text) for file, text in self.texts.items()}
        self.runners, self.files = defaultdict(set), defaultdict(set)  # the tests, and the test files, that run a line
        for name in filter(self.is_measured, self.measured):
            for file, lines in self.measured[name]["lines"].items():
                for line in lines:
                    self.runners[file, line].add(name)
                    self.files[file, line].add(name.partition("::")[0])
        queues = {name: self.candidates(name) for name in sorted(todo, key=self.seconds)}
        tried, crashed = defaultdict(set), {}
        saved = time.monotonic()
        for name, queue in queues.items():
            if time.monotonic() > saved + 30:
                self.save()
                saved = time.monotonic()
            tries = max(4, min(self.tries, int(200 / self.seconds(name))))
            for _ in range(tries):
                if time.monotonic() > self.end:
                    return
                if not self.is_new(name) and self.seen[name]["by"] == "check":
                    break
                if (chosen := next((each for each in queue if each not in tried[name]), None)) is None:
                    break
                group = self.group(name, chosen, [each for each in queues if chosen not in tried[each]])
                for each in group:
                    tried[each].add(chosen)
                self.make(chosen, group, crashed)
            if self.is_new(name) or self.seen[name]["by"] != "check":
                given_up = {"by": "survived", "break": f"{len(tried[name])} mistakes"}
                self.seen[name] = {"test": self.digests[name]} | crashed.get(name, given_up)
                print(f"{self.seen[name]['by']}: {name}", flush=True)

    def seconds(self, name: str) -> float:
        return self.measured[name]["seconds"]

    def candidates(self, name: str) -> Iterator[tuple[str, int]]:
        """Mistakes in the lines that a test runs: by turns in a line that is its file's own and in one that is its own."""
        lines = {(file, line) for file, lines in self.measured[name]["lines"].items() for line in lines}
        by_line = defaultdict(list)
        for file in self.measured[name]["lines"]:
            for n, mistake in enumerate(self.mistakes[file]):
                if (file, mistake.line) in lines:
                    by_line[file, mistake.line].append((file, n))
        runners = {place: (len(self.files[place]), len(self.runners[place])) for place in by_line}
        files_own = sorted(by_line, key=lambda place: (runners[place][0], -runners[place][1], place))
        tests_own = sorted(by_line, key=lambda place: (runners[place][1], place))
        for turn in range(max(map(len, by_line.values()), default=0)):
            for pair in zip(files_own, tests_own, strict=True):
                yield from (by_line[place][turn] for place in pair if turn < len(by_line[place]))

    def group(self, name: str, chosen: tuple[str, int], others: list[str]) -> list[str]:
        """The test and other unfinished ones that run the line, the cheapest first, as many as fit in a batch."""
        file, n = chosen
        here = self.runners[file, self.mistakes[file][n].line]
        group, cost = [name], self.seconds(name)
        for each in others:
            cost += self.seconds(each)
            if each in here and each != name and self.unfinished(each) and cost < BATCH_SECONDS:
                group.append(each)
        return group

    def make(self, chosen: tuple[str, int], group: list[str], crashed: dict) -> None:
        file, n = chosen
        mistake = self.mistakes[file][n]
        limit = min(5 + 3 * sum(map(self.seconds, group)), max(5, self.end - time.monotonic()))
        for name, failure, _, _ in self.forks.run_broken(file, n, group, limit):
            if failure:
                entry = failure | {"break": f"{file}:{mistake.line} {mistake.words()}"}
                if mistake.words().startswith("`raise"):  # whatever came instead is not the error that the test expects
                    entry["by"] = "check"
                if entry["by"] == "check":
                    self.seen[name] = {"test": self.digests[name]} | entry
                else:
                    crashed.setdefault(name, entry)

    def save(self) -> None:
        """One line for each test. Read again, since another search may have looked at other tests meanwhile."""
        seen = read(SEEN) | {name: self.seen[name] for name in self.digests if not self.is_new(name)}
        lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in sorted(seen.items())]
        SEEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or names of tests, as for pytest; all of them by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long, with what was found saved")
    parser.add_argument("--tries", type=int, default=24, help="mistakes for a test before it is given up")
    parser.add_argument("--again", action="store_true", help="look again at tests that survived or only crashed")
    asked = parser.parse_args()
    search = Search(asked.seconds, asked.tries, asked.again)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-m", "", f"--rootdir={PROJECT}"]
    sys.exit(pytest.main([*options, *asked.tests], plugins=[search, search.forks]))


if __name__ == "__main__":
    main()

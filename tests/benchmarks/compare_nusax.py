"""The CT-SFT comparison on NusaX, or on the pocket world. Resumable: run it again to go on where it stopped.

python tests/benchmarks/compare_nusax.py --model MODEL --data NUSAX --out RESULTS --targets buginese english
python tests/benchmarks/compare_nusax.py --model pocket --source english --targets osko tamu --related vela --out RESULTS
"""

import argparse
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from circuits import LabelledTask, pocket
from circuits.files import write_json
from circuits.heads import Circuit
from interventions.arms import ARMS
from interventions.experiment import Experiment, Splits, compare, read_lines
from interventions.tradeoff import agreement, points, summarise, table, trade_off

WORDS = (" baik", " buruk", " biasa")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data")
    parser.add_argument("--source", default="indonesian")
    parser.add_argument("--targets", nargs="+", default=["buginese", "english"])
    parser.add_argument("--related", nargs="*", default=["javanese"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[31, 777, 2025, 12345])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--template", default="{text} | sentimen:{label}")
    parser.add_argument("--words", nargs=3, default=list(WORDS), metavar="WORD", help="for positive, negative, neutral")
    parser.add_argument("--source-rate", type=float, default=5e-4)
    parser.add_argument("--rates", nargs="*", default=[], help="arm=rate,rate instead of the arm's own")
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--per-depth", type=int, default=2)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the tables there")
    return parser.parse_args()


def rates(given: list[str]) -> dict[str, list[float]]:
    pairs = [entry.partition("=") for entry in given]
    return {arm: [float(rate) for rate in listed.split(",")] for arm, _, listed in pairs}


def nusax(data: str, language: str, template: str, words: Sequence[str]) -> Splits:
    labels = dict(zip(("positive", "negative", "neutral"), words, strict=True))
    how: dict[str, Any] = dict(template=template, label_words=labels, max_length=128, truncate=True)
    return Splits(
        *(LabelledTask.from_csv(Path(data) / language / f"{s}.csv", **how) for s in ("train", "valid", "test"))
    )


def pocket_world(language: str) -> Splits:
    test, valid = pocket.sentiment_task(language, "test").split(500, seed=0)
    return Splits(pocket.sentiment_task(language, "train"), valid, test)


def main() -> None:
    given = options()
    warnings.filterwarnings("ignore", message=".*texts were cut to fit")
    is_pocket = given.model == "pocket"

    def splits(language: str) -> Splits:
        return pocket_world(language) if is_pocket else nusax(given.data, language, given.template, given.words)

    experiment = Experiment(
        given.model, splits(given.source), {name: splits(name) for name in given.targets}, Path(given.out),
        related={name: splits(name).test for name in given.related}, arms=given.arms, sizes=given.sizes,
        seeds=given.seeds, depths=given.depths, per_depth=given.per_depth, rates=rates(given.rates),
        # The pocket model was trained on its source languages; it needs no competence tuning.
        source_epochs=0 if is_pocket else 4, source_lr=given.source_rate,
    )  # fmt: skip
    lines = read_lines(experiment.directory / "results.jsonl") if given.table_only else compare(experiment)
    lines = [line for line in lines if line["arm"] in ("untuned", *given.arms)]
    circuits = {
        path.parent.name: Circuit.load(path) for path in sorted(experiment.directory.glob("seed-*/circuit.json"))
    }
    found: dict[str, Any] = {"circuits": {seed: str(circuit) for seed, circuit in circuits.items()}, "tables": []}
    reference = "circuit" if "circuit" in given.arms else given.arms[0]
    for target, n in product(given.targets, given.sizes):
        rows, settings = summarise(lines, target, n, reference), points(lines, target, n)
        print(f"\n### {target}, {n} examples\n\n{table(rows, reference)}\n\n{trade_off(lines, target, n)}")
        both = {"arms": [row._asdict() for row in rows], "settings": [point._asdict() for point in settings]}
        found["tables"].append({"target": target, "n": n, **both})
    print(f"\nHead-set Jaccard index over {len(circuits)} seeds: {agreement(list(circuits.values())):.2f}")
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()

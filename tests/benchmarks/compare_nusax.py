"""The CT-SFT comparison on NusaX. Resumable: run it again to go on where it stopped.

python tests/benchmarks/compare_nusax.py --model MODEL --data NUSAX --out RESULTS --targets buginese english
"""

import argparse
import warnings
from pathlib import Path

from circuits import LabelledTask
from circuits.heads import Circuit
from interventions.arms import ARMS
from interventions.experiment import Experiment, Splits, compare
from interventions.tradeoff import agreement, summarise, table, trade_off

WORDS = {"positive": " baik", "negative": " buruk", "neutral": " biasa"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--source", default="indonesian")
    options.add_argument("--targets", nargs="+", default=["buginese", "english"])
    options.add_argument("--related", nargs="*", default=["javanese"])
    options.add_argument("--sizes", nargs="+", type=int, default=[100])
    options.add_argument("--seeds", nargs="+", type=int, default=[31, 777, 2025, 12345])
    options.add_argument("--arms", nargs="+", default=list(ARMS))
    options.add_argument("--table-only", action="store_true")
    given = options.parse_args()
    warnings.filterwarnings("ignore", message=".*texts were cut to fit")

    def task(language: str, split: str) -> LabelledTask:
        path = Path(given.data) / language / f"{split}.csv"
        how = dict(template="{text} | sentimen:{label}", label_words=WORDS, max_length=128, truncate=True)
        return LabelledTask.from_csv(path, **how)

    def splits(language: str) -> Splits:
        return Splits(*(task(language, split) for split in ("train", "valid", "test")))

    experiment = Experiment(
        given.model, splits(given.source), {name: splits(name) for name in given.targets}, Path(given.out),
        related={name: task(name, "test") for name in given.related}, arms=given.arms, sizes=given.sizes,
        seeds=given.seeds, per_depth=2 / 36,
    )  # fmt: skip
    from interventions.experiment import read_lines

    lines = read_lines(experiment.directory / "results.jsonl") if given.table_only else compare(experiment)
    for target in given.targets:
        for n in given.sizes:
            print(
                f"\n### {target}, {n} examples\n\n{table(summarise(lines, target, n))}\n\n{trade_off(lines, target, n)}"
            )
    circuits = [Circuit.load(path) for path in sorted(experiment.directory.glob("seed-*/circuit.json"))]
    print(f"\nHead-set Jaccard index over {len(circuits)} seeds: {agreement(circuits):.2f}")


if __name__ == "__main__":
    main()

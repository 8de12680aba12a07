"""The CT-SFT comparison on anybody's data, resumable: every finished run is one line of a JSON-lines file.

For every seed
1. Competence: tune the base model on part of the source task (spec of the paper: §4, stage 1), keep the epoch that validates best.
2. Discovery on source examples the competent model gets right: relevance, backward expansion to a circuit (stages 2-4).
3. For every target, size, arm, learning rate and depth of the circuit: start again from the competent model (`direct`: the base),
   tune on the target, choose the epoch on the target's validation set, and record predictions on the test sets.
Nothing is chosen on a test set; `tradeoff.py` reads the file and chooses on validation accuracy.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from circuits.files import write_atomically
from circuits.heads import Circuit, HeadScores
from circuits.progress import track
from circuits.tasks import evaluate

from .arms import ARMS, tfidf, tune_arm
from .tuning import finetune


class Splits(NamedTuple):
    """One language or domain: three `LabelledTask`s."""

    train: Any
    valid: Any
    test: Any


@dataclass(frozen=True)
class Experiment:
    """What to compare. `related` are further tasks to watch. `directory` holds results, checkpoints and circuits."""

    model: str
    source: Splits
    targets: Mapping[str, Splits]
    directory: Path
    related: Mapping[str, Any] = field(default_factory=dict)
    arms: Sequence[str] = tuple(ARMS)
    sizes: Sequence[int] = (100,)
    seeds: Sequence[int] = (31, 777, 2025, 12345)
    # Backward steps of the circuit; validation chooses among them.
    depths: Sequence[int] = (0, 1, 2)
    per_depth: float | int = 0.02
    # Competence tuning: examples, epochs and rate. Targets draw from the examples that were not used for it.
    source_examples: int = 400
    source_epochs: int = 4
    source_lr: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    # Learning rates of an arm instead of those in `ARMS`.
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def runs(self, seed: int) -> Iterator[dict[str, Any]]:
        """Every run of a seed, as the part of a result line that identifies it."""
        unknown = [arm for arm in (*self.arms, *self.rates) if arm not in ARMS]
        if unknown:
            raise ValueError(f"no arm {', '.join(map(repr, unknown))}; choose from {', '.join(ARMS)}")
        for target in self.targets:
            yield dict(arm="untuned", target=target, n=0, seed=seed, lr=0.0, anchor=0.0, depth=None)
            for n, name in product(self.sizes, self.arms):
                arm = ARMS[name]
                rates = (0.0,) if name == "tfidf" else self.rates.get(name, arm.rates)
                depths = self.depths if arm.every_depth else (None,)
                for lr, anchor, depth in product(rates, arm.anchors, depths):
                    yield dict(arm=name, target=target, n=n, seed=seed, lr=lr, anchor=anchor, depth=depth)


IDENTITY = ("arm", "target", "n", "seed", "lr", "anchor", "depth")


def compare(experiment: Experiment, progress: bool = True) -> list[dict[str, Any]]:
    """Run what is not in `directory/results.jsonl` yet, and return all lines. Interrupt it at any time; call it again to go on."""
    path = experiment.directory / "results.jsonl"
    for splits, n in product(experiment.targets.values(), experiment.sizes):
        target_examples(splits.train, n, experiment.source_examples, 0)  # raises before anything is computed
    done = read_lines(path)
    known = {identity(line) for line in done}
    for seed in experiment.seeds:
        todo = [run for run in experiment.runs(seed) if identity(run) not in known]
        if not todo:
            continue
        bench = Bench(experiment, seed, progress)
        for run in track(todo, f"seed {seed}", enabled=progress):
            started = time.perf_counter()
            line = bench.same_heads(run, done) or bench.run(run)
            line = {**line, **run, "seconds": round(time.perf_counter() - started, 1)}
            done.append(line)
            # Rewritten whole: a kill between two lines leaves a file that ends with a complete line.
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in done))
    return done


def identity(line: Mapping[str, Any]) -> tuple:
    return tuple(line[key] for key in IDENTITY)


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a results file ({error}); move it away to start afresh") from None


class Bench:
    """One seed's competent model, circuit and encoded test sets; `run` starts every arm from the same weights."""

    def __init__(self, experiment: Experiment, seed: int, progress: bool):
        from circuits import load

        self.experiment, self.seed = experiment, seed
        self.model = load(experiment.model)
        self.base = snapshot(self.model.hf)
        self.learn, _ = experiment.source.train.split(experiment.source_examples, seed)
        self.where = experiment.directory / f"seed-{seed}"
        self.competent = self.become_competent(progress)
        self.scores, self.circuit = self.find_circuit(progress)
        self.tests = {name: splits.test for name, splits in experiment.targets.items()}
        self.tests |= {"source": experiment.source.test, **experiment.related}

    def become_competent(self, progress: bool) -> dict[str, torch.Tensor]:
        """Stage 1, kept in a file so that a resumed comparison starts from the same weights."""
        from safetensors.torch import load_file, save

        plan, path = self.experiment, self.where / "competent.safetensors"
        if path.is_file():
            values = load_file(path)
            restore(self.model.hf, values)
            return values
        finetune(
            self.model, self.learn, epochs=plan.source_epochs, lr=plan.source_lr, batch_size=plan.batch_size,
            seed=self.seed, validation=plan.source.valid, progress=progress,
        )  # fmt: skip
        values = snapshot(self.model.hf)
        write_atomically(path, save(values))
        return values

    def find_circuit(self, progress: bool) -> tuple[HeadScores, Circuit]:
        """Stage 2 on up to 50 examples the competent model gets right; label-balanced means from the same examples."""
        from circuits import discover, relevance

        plan, path = self.experiment, self.where / "circuit.json"
        if not path.is_file():
            right = self.learn.correct(self.model)
            shown = right.select(range(min(50, len(right))))
            relevance(self.model, shown, progress=progress).save(self.where / "scores")
            depth = max(plan.depths)
            discover(self.model, shown, depth=depth, per_depth=plan.per_depth, progress=progress).save(path)
        return HeadScores.load(self.where / "scores"), Circuit.load(path)

    def same_heads(self, run: Mapping[str, Any], done: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """A finished line of this run at another depth, when the circuit has the same heads at both (discovery had ended)."""
        if not ARMS.get(run["arm"], ARMS["tfidf"]).every_depth:
            return None
        heads = str(at_depth(self.circuit, run["depth"]))
        other = {key: run[key] for key in IDENTITY if key != "depth"}
        return next((line for line in done if other.items() <= line.items() and line["heads"] == heads), None)

    def run(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """One line of results."""
        plan, splits = self.experiment, self.experiment.targets[run["target"]]
        if run["arm"] != "untuned":
            pool = target_examples(splits.train, run["n"], plan.source_examples, self.seed)
        if run["arm"] == "tfidf":
            result = tfidf(pool, splits.valid, splits.test)
            names = list(splits.test.label_words)
            gold = [names.index(label) for label in splits.test.labels]
            tested = {run["target"]: measured(result["predictions"], gold)}
            return {"validation": result["validation"], "trained": result["trained"], "tests": tested}
        restore(self.model.hf, self.competent if run["arm"] == "untuned" or ARMS[run["arm"]].competent else self.base)
        line: dict[str, Any] = {}
        if run["arm"] != "untuned":
            kept = self.learn.select(range(min(50, len(self.learn))))
            circuit = self.circuit if run["depth"] is None else at_depth(self.circuit, run["depth"])
            tuning, heads = tune_arm(
                run["arm"], self.model, pool, splits.valid, circuit, self.scores, kept=kept,
                lr=run["lr"], anchor=run["anchor"], seed=self.seed, epochs=plan.epochs, batch_size=plan.batch_size,
            )  # fmt: skip
            line = {"trained": tuning.trained, "moved": tuning.moved, "distance": tuning.distance, "heads": heads}
            line["epoch"] = tuning.options["kept_epoch"]
            line["proof"] = tuning.proof
            line["curve"] = [row["validation_accuracy"] for row in tuning.history]
            line["validation"] = max(line["curve"])
        watched = [run["target"], "source", *plan.related]
        line["tests"] = {name: self.test(name) for name in watched}
        return line

    def test(self, name: str) -> dict[str, Any]:
        result = evaluate(self.model, self.tests[name])
        return measured(result.predictions.tolist(), result.gold.tolist())


def target_examples(pool: Any, n: int, source_examples: int, seed: int) -> Any:
    """n rows of a target, the same for every arm: rows whose place the source stage did not use, where enough of them are left.

    In parallel data the same place is the same sentence; elsewhere nothing is lost by it.
    """
    if n > len(pool):
        raise ValueError(f"{n} target examples were asked for, {pool.name} has {len(pool)}; ask for fewer")
    if len(pool) - source_examples >= n:
        pool = pool.split(source_examples, seed)[1]
    elif n < len(pool):
        pool = pool.split(n, seed)[0]
    return pool.select(range(n))


def at_depth(circuit: Circuit, depth: int) -> Circuit:
    """The circuit as it was after that many backward steps of its discovery."""
    heads = [head for step in circuit.provenance["steps"] if step["depth"] <= depth for head in step["heads"]]
    return Circuit(heads, circuit.n_layers, circuit.n_heads, {**circuit.provenance, "depth": depth})


def measured(predictions: Sequence[int], gold: Sequence[int]) -> dict[str, Any]:
    from sklearn.metrics import f1_score

    accuracy = sum(p == g for p, g in zip(predictions, gold, strict=True)) / len(gold)
    f1 = float(f1_score(gold, predictions, average="macro"))
    right = "".join("1" if p == g else "0" for p, g in zip(predictions, gold, strict=True))
    return {"accuracy": accuracy, "macro_f1": f1, "right": right}


def snapshot(hf: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in hf.named_parameters()}


def restore(hf: Any, values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(values[name])

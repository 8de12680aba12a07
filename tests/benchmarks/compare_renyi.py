"""Ensembles on data that disagrees: `python tests/benchmarks/compare_renyi.py [sheets|annotators|contaminated|domains|preferences]`.

Methods get the same data, rank, layers, epochs and learning rate: α = 0.8, α = 0 (deep ensemble of LoRA), one LoRA of
that rank, and one LoRA with dropout 0.2 sampled as often as there are members (MC dropout). Tables print the mean over
seeds and the half-width of its 95 % t-interval. `domains` and `preferences` need the models and texts of ../shared.
"""

import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

MEMBERS, SEEDS = 4, 4
METHODS = {
    "α = 0.8": (0.8, 0.0),
    "α = 0 (deep ensemble)": (0.0, 0.0),
    "one LoRA": (None, 0.0),
    "MC dropout": (None, 0.2),
}
Results = dict[str, list[dict[str, float]]]


def shared() -> Path:
    places = (PROJECT.parent / "shared", PROJECT.parent.parent / "shared")
    found = next((place for place in places if (place / "models").is_dir()), None)
    if found is None:
        raise SystemExit("this comparison needs ../shared (models and texts), which is not committed")
    return found


def ensemble_of(model, method: str, seed: int, **options):
    from interventions import RenyiEnsemble

    alpha, dropout = METHODS[method]
    members = 1 if alpha is None else options.pop("members", MEMBERS)
    options.pop("members", None)
    return RenyiEnsemble(model, members, alpha or 0.0, dropout=dropout, seed=seed, **options)


def predict(ensemble, task, seed: int):
    """Members' probabilities; for MC dropout, those of as many draws of the mask."""
    if not ensemble.stack.dropout:
        return ensemble.predict(task)
    draws = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ensemble.stack.train()
        draws = [ensemble.predict(task) for _ in range(MEMBERS)]
        ensemble.stack.eval()
    return replace(draws[0], members=torch.cat([draw.members for draw in draws]))


def pocket_task(rows: list[dict], words: tuple[str, ...]):
    from circuits import LabelledTask

    labels = {word: f" {word}" for word in words}
    return LabelledTask.from_rows(rows, template="{text} | sentiment:{label}", label_words=labels)


def sheet(rows: list[dict], side: str, tokenizer) -> dict:
    """One annotator's labels of several sentences as one text; the loss is on the labels only."""
    ids, labels = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [], []
    labels = [-100] * len(ids)
    for row in rows:
        prompt = tokenizer(f"{row['text']} | sentiment:", add_special_tokens=False).input_ids
        label = side if row["label"] == "fair" else row["label"]
        word = tokenizer(f" {label}", add_special_tokens=False).input_ids
        ids, labels = ids + prompt + word, labels + [-100] * len(prompt) + word
    return {"input_ids": ids, "labels": labels}


def sheets(seeds: range) -> Results:
    """An example is one annotator's sheet of four sentences; every sheet comes twice, once from each of two groups that
    contradict each other on every fair sentence."""
    return annotators(seeds, on_sheets=True)


def annotators(seeds: range, on_sheets: bool = False) -> Results:
    """Every label is its own example: two groups agree on good and bad sentences, contradict each other on fair ones."""
    from circuits import load
    from circuits.pocket import world
    from interventions.calibration import auroc, calibration

    found: Results = {}
    for seed in seeds:
        given = world.sentiment("english", 60, seed, "train")
        rows = [row for row in given if row["label"] != "fair"]
        rows += [{**row, "label": side} for row in given if row["label"] == "fair" for side in ("good", "bad")]
        held = world.sentiment("english", 90, seed, "test")
        contested = torch.tensor([row["label"] == "fair" for row in held])
        test = pocket_task(
            [{**row, "label": "good" if row["label"] == "fair" else row["label"]} for row in held], ("good", "bad")
        )
        for method in METHODS:
            ensemble = ensemble_of(load("pocket"), method, seed, target_modules="all-linear")
            ensemble.task = test
            if on_sheets:
                rng = random.Random(seed)
                drawn = [rng.sample(given, 4) for _ in range(24)]
                data = [sheet(rows, side, ensemble.tokenizer) for rows in drawn for side in ("good", "bad")]
            else:
                data = pocket_task(rows, ("good", "bad"))
            ensemble.fit(data, epochs=10, lr=5e-3, batch_size=16, seed=seed, progress=False)
            seen = predict(ensemble, test, seed)
            clear = calibration(seen.mixture[~contested], seen.gold[~contested])
            found.setdefault(method, []).append(
                {
                    "AUROC, mutual information": auroc(seen.mutual_information, contested),
                    "AUROC, total entropy": auroc(seen.total, contested),
                    "spread, contested": seen.spread[contested, 0].mean().item(),
                    "spread, clear": seen.spread[~contested, 0].mean().item(),
                    "mean abs(p̄ − ½), contested": (seen.mixture[contested, 0] - 0.5).abs().mean().item(),
                    "accuracy, clear": clear.accuracy,
                    "NLL, clear": clear.nll,
                }
            )
            tell(seed, method)
    return found


def contaminated(seeds: range) -> Results:
    """One label in five is wrong."""
    from circuits import load
    from circuits.pocket import world
    from interventions.calibration import area_under_risk, auroc, calibration

    words, found = ("good", "bad", "fair"), {}
    for seed in seeds:
        rng, rows, wrong = random.Random(seed), [], []
        for row in world.sentiment("nuri", 120, seed, "train"):
            wrong.append(rng.random() < 0.2)
            label = rng.choice([w for w in words if w != row["label"]]) if wrong[-1] else row["label"]
            rows.append({**row, "label": label})
        train, test = pocket_task(rows, words), pocket_task(world.sentiment("nuri", 120, seed, "test"), words)
        for method in METHODS:
            ensemble = ensemble_of(load("pocket"), method, seed, target_modules="all-linear")
            ensemble.fit(train, epochs=8, lr=3e-3, batch_size=16, seed=seed, progress=False)
            seen = predict(ensemble, test, seed)
            told = calibration(seen.mixture, seen.gold)
            s = ensemble.log_likelihood(train)
            doubt = -torch.logsumexp(s, 0)
            found.setdefault(method, []).append(
                {
                    "accuracy": told.accuracy,
                    "NLL": told.nll,
                    "ECE": told.ece,
                    "Brier": told.brier,
                    "AURC, total entropy": area_under_risk(seen.total, seen.predictions != seen.gold),
                    "AUROC of wrong labels, mixture NLL": auroc(doubt, torch.tensor(wrong)),
                    "AUROC of wrong labels, member spread": auroc(s.std(0, correction=0), torch.tensor(wrong)),
                }
            )
            tell(seed, method)
    return found


def domains(seeds: range) -> Results:
    """Dialogues and encyclopedic answers in one set of texts, without a word about which is which."""
    from circuits import load
    from interventions.calibration import auroc

    model = load(str(shared() / "models" / "tinystories-656k"))
    lines = (shared() / "data" / "tofu" / "retain_300.jsonl").read_text().splitlines()
    answers = [f"Q: {row['question']} A: {row['answer']}" for row in map(json.loads, lines)]
    talks = (shared() / "data" / "tinystories" / "chat_val.txt").read_text().split("\n\n")
    talks = [" ".join(talk.replace("<|endoftext|>", " ").split()) for talk in talks if talk.startswith("User")]
    found: Results = {}
    for seed in seeds:
        rng = random.Random(seed)
        texts = [rng.sample(place, 60) for place in (talks, answers)]
        train, test = ([text for place in texts for text in place[part]] for part in (slice(40), slice(40, 60)))
        for method in list(METHODS)[:3]:
            ensemble = ensemble_of(model, method, seed, target_modules="all-linear")
            ensemble.fit(train, epochs=5, lr=5e-3, batch_size=16, max_length=40, seed=seed, progress=False)
            seen = ensemble.score(test, max_length=40)
            tokens = seen.tokens.sum()
            weights = torch.softmax(seen.members, 0)
            share = weights[:, :20].mean(1)
            first = torch.arange(len(test)) < 20
            row = {
                "NLL per token, members": -(seen.members.mean(0).sum() / tokens).item(),
                "NLL per token, token mixture": -(seen.token_mixture.sum() / tokens).item(),
                "NLL per token, sequence mixture": -(seen.sequence_mixture.sum() / tokens).item(),
                "share of domain 1, total variation": (share - weights[:, 20:].mean(1)).abs().sum().item() / 2,
            }
            if ensemble.members > 1:
                row["domain from members, AUROC"] = max(
                    max(auroc(s, first), auroc(-s, first)) for s in (seen.members - seen.members.mean(0))
                )
            found.setdefault(method, []).append(row)
            tell(seed, method)
    return found


def preferences(seeds: range) -> Results:
    """DPO on pairs the model generated: raters agree to like longer words about girls, and disagree about boys."""
    from circuits import load
    from interventions import RenyiEnsemble
    from interventions.calibration import auroc

    model = load(str(shared() / "models" / "tinystories-656k"))
    names = {"girl": ["Lily", "Mia", "Sue", "Anna"], "boy": ["Tom", "Ben", "Tim", "Sam"]}
    scenes = ["went to the park.", "found a toy.", "had a dog.", "saw a bird.", "was sad.", "wanted to play."]
    found: Results = {}
    for seed in seeds:
        prompts = [
            (kind, f"{name} was a little {kind}. One day, {name} {s}")
            for kind in names
            for name in names[kind]
            for s in scenes
        ]
        random.Random(seed).shuffle(prompts)
        texts = [text for _, text in prompts]
        writer = RenyiEnsemble(model, 1)
        both = [writer.generate(texts, 10, temperature=1.0, seed=2 * seed + i).texts for i in (0, 1)]
        train, test, held = [], [], []
        for number, ((kind, prompt), one, two) in enumerate(zip(prompts, *both, strict=True)):
            long, short = sorted((one, two), key=lambda t: len(t) / (1 + t.count(" ")), reverse=True)
            pair = {"prompt": prompt, "chosen": " " + long.strip(), "rejected": " " + short.strip()}
            if pair["chosen"] == pair["rejected"]:
                continue
            swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
            if number < 32:
                train += [pair, swapped] if kind == "boy" else [pair]
            else:
                test.append(pair)
                held.append(kind == "boy")
        contested = torch.tensor(held)
        for method in list(METHODS)[:3]:
            ensemble = ensemble_of(model, method, seed, target_modules="all-linear")
            log = ensemble.fit(train, epochs=10, lr=3e-3, batch_size=16, beta=0.1, seed=seed, progress=False)
            seen = torch.sigmoid(ensemble.margins(train))
            argued = torch.tensor(["boy" in row["prompt"] for row in train])
            new = torch.sigmoid(ensemble.margins(test))
            row = {
                "training loss ℓ_1": log.steps[-1]["loss_1"],
                "accuracy, agreed training pairs": (seen.mean(0) > 0.5)[~argued].float().mean().item(),
                "accuracy, agreed new pairs": (new.mean(0) > 0.5)[~contested].float().mean().item(),
                "spread, contested training pairs": seen.std(0, correction=0)[argued].mean().item(),
                "spread, agreed training pairs": seen.std(0, correction=0)[~argued].mean().item(),
            }
            if ensemble.members > 1:
                row["AUROC of spread, new pairs"] = auroc(new.std(0, correction=0), contested)
            found.setdefault(method, []).append(row)
            tell(seed, method)
    return found


def tell(seed: int, method: str) -> None:
    print(f"seed {seed}, {method}", file=sys.stderr, flush=True)


def table(found: Results) -> str:
    """Mean ± half-width of the 95 % t-interval over seeds."""
    from scipy.stats import t

    columns = list(dict.fromkeys(key for runs in found.values() for key in runs[0]))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, runs in found.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            if not values:
                cells.append("")
                continue
            wide = (
                t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
            )
            cells.append(f"{statistics.mean(values):.3f} ± {wide:.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (sheets, annotators, contaminated, domains, preferences)}
    asked = sys.argv[1:] or list(experiments)
    if set(asked) - set(experiments):
        raise SystemExit(f"no comparison {' '.join(asked)}; choose among {', '.join(experiments)}")
    for name in asked:
        print(f"\n{name}, {SEEDS} seeds\n\n{table(experiments[name](range(SEEDS)))}", flush=True)

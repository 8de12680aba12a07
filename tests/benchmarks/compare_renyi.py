"""Ensembles on data that disagrees: `python tests/benchmarks/compare_renyi.py [experiment ...] [--seeds 4]`.

Experiments: sheets, annotators, contaminated, domains, preferences. Methods get the same data, rank, layers, epochs and
learning rate: α = 0.8, α = 0 (deep ensemble of LoRA), one LoRA of that rank, one LoRA with dropout 0.2 sampled as often as
there are members (MC dropout), and, where laplace-torch is installed, a Laplace approximation of the one LoRA. Tables print
the mean over seeds and the half-width of its 95 % t-interval. `domains` and `preferences` need ../shared.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from renyi_baselines import (
    METHODS,
    Answers,
    Preferences,
    Results,
    answer_items,
    as_peft,
    draws,
    ensemble_of,
    has_laplace,
    laplace_draws,
    pair_items,
    predict,
    table,
    tell,
)

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))


def shared() -> Path:
    places = (PROJECT.parent / "shared", PROJECT.parent.parent / "shared")
    found = next((place for place in places if (place / "models").is_dir()), None)
    if found is None:
        raise SystemExit("this comparison needs ../shared (models and texts), which is not committed")
    return found


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

    def measured(seen, contested) -> dict[str, float]:
        clear = calibration(seen.mixture[~contested], seen.gold[~contested])
        return {
            "AUROC, mutual information": auroc(seen.mutual_information, contested),
            "AUROC, total entropy": auroc(seen.total, contested),
            "spread, contested": seen.spread[contested, 0].mean().item(),
            "spread, clear": seen.spread[~contested, 0].mean().item(),
            "mean abs(p̄ − ½), contested": (seen.mixture[contested, 0] - 0.5).abs().mean().item(),
            "accuracy, clear": clear.accuracy,
            "NLL, clear": clear.nll,
        }

    found: Results = {}
    for seed in seeds:
        given = world.sentiment("english", 60, seed, "train")
        rows = [row for row in given if row["label"] != "fair"]
        rows += [{**row, "label": side} for row in given if row["label"] == "fair" for side in ("good", "bad")]
        held = world.sentiment("english", 90, seed, "test")
        contested = torch.tensor([row["label"] == "fair" for row in held])
        held = [{**row, "label": "good" if row["label"] == "fair" else row["label"]} for row in held]
        test = pocket_task(held, ("good", "bad"))
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
            found.setdefault(method, []).append(measured(seen, contested))
            tell(seed, method)
            if method == "one LoRA" and has_laplace():
                members = label_laplace(ensemble, data, test, seed)
                found.setdefault("Laplace", []).append(measured(replace(seen, members=members), contested))
                tell(seed, "Laplace")
    return found


def label_laplace(ensemble, data, test, seed: int) -> torch.Tensor:
    """Draws of the one LoRA's Laplace predictive over the label words of `test`."""
    from circuits import load
    from interventions.examples import from_task

    asked, columns = from_task(ensemble.model, test)
    given = ensemble._objective(data, "sequence").examples
    net = Answers(as_peft(ensemble, load("pocket").hf), columns)
    return laplace_draws(net, answer_items(given, columns), answer_items(asked, columns), seed)


def contaminated(seeds: range) -> Results:
    """One label in five is wrong."""
    from circuits import load
    from circuits.pocket import world
    from interventions.calibration import area_under_risk, auroc, calibration

    def measured(seen, s, wrong) -> dict[str, float]:
        told = calibration(seen.mixture, seen.gold)
        return {
            "accuracy": told.accuracy,
            "NLL": told.nll,
            "ECE": told.ece,
            "Brier": told.brier,
            "AURC, total entropy": area_under_risk(seen.total, seen.predictions != seen.gold),
            "AUROC of wrong labels, mixture NLL": auroc(-torch.logsumexp(s, 0), wrong),
            "AUROC of wrong labels, member spread": auroc(s.std(0, correction=0), wrong),
        }

    words: tuple[str, ...] = ("good", "bad", "fair")
    found: Results = {}
    for seed in seeds:
        rng, rows, flags = random.Random(seed), [], []
        for row in world.sentiment("nuri", 120, seed, "train"):
            flags.append(rng.random() < 0.2)
            label = rng.choice([w for w in words if w != row["label"]]) if flags[-1] else row["label"]
            rows.append({**row, "label": label})
        wrong = torch.tensor(flags)
        train, test = pocket_task(rows, words), pocket_task(world.sentiment("nuri", 120, seed, "test"), words)
        for method in METHODS:
            ensemble = ensemble_of(load("pocket"), method, seed, target_modules="all-linear")
            ensemble.fit(train, epochs=8, lr=3e-3, batch_size=16, seed=seed, progress=False)
            seen = predict(ensemble, test, seed)
            s = torch.cat(draws(ensemble, seed, partial(ensemble.log_likelihood, train)))
            found.setdefault(method, []).append(measured(seen, s, wrong))
            tell(seed, method)
            if method == "one LoRA" and has_laplace():
                members = label_laplace(ensemble, train, test, seed)
                again = label_laplace(ensemble, train, train, seed)
                s = again[:, torch.arange(len(wrong)), [words.index(row["label"]) for row in rows]].clamp(1e-12).log()
                found.setdefault("Laplace", []).append(measured(replace(seen, members=members), s, wrong))
                tell(seed, "Laplace")
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
        for method in METHODS:
            ensemble = ensemble_of(model, method, seed, target_modules="all-linear")
            ensemble.fit(train, epochs=5, lr=5e-3, batch_size=16, max_length=40, seed=seed, progress=False)
            each = draws(ensemble, seed, partial(ensemble.score, test, max_length=40))
            members, tokens = torch.cat([seen.members for seen in each]), each[0].tokens.sum()
            sequence = torch.logsumexp(members, 0) - torch.tensor(float(len(members))).log()
            share = torch.softmax(members, 0)
            first = torch.arange(len(test)) < 20
            row = {
                "NLL per token, one member": -(members.mean(0).sum() / tokens).item(),
                "NLL per token, sequence mixture": -(sequence.sum() / tokens).item(),
                "shares of the two domains, total variation": (share[:, first].mean(1) - share[:, ~first].mean(1))
                .abs()
                .sum()
                .item()
                / 2,
            }
            if len(each) == 1:
                row["NLL per token, token mixture"] = -(each[0].token_mixture.sum() / tokens).item()
            if len(members) > 1:
                row["AUROC of the domain, best member"] = max(
                    max(auroc(s, first), auroc(-s, first)) for s in members - members.mean(0)
                )
            found.setdefault(method, []).append(row)
            tell(seed, method)
    return found


def preferences(seeds: range) -> Results:
    """DPO on pairs the model generated: raters agree to like longer words about girls, and disagree about boys."""
    from circuits import load
    from interventions.calibration import auroc
    from interventions.examples import from_pairs
    from interventions.likelihood import reference_margins

    model = load(str(shared() / "models" / "tinystories-656k"))
    found: Results = {}
    for seed in seeds:
        train, test = rated_pairs(model, seed)
        argued, contested = (torch.tensor(["boy" in row["prompt"] for row in rows]) for rows in (train, test))

        def measured(seen, new, argued=argued, contested=contested) -> dict[str, float]:
            spread, among = seen.std(0, correction=0), new.std(0, correction=0)
            return {
                "accuracy, agreed training pairs": (seen.mean(0) > 0.5)[~argued].float().mean().item(),
                "accuracy, agreed new pairs": (new.mean(0) > 0.5)[~contested].float().mean().item(),
                "spread, contested training pairs": spread[argued].mean().item(),
                "spread, agreed training pairs": spread[~argued].mean().item(),
                "AUROC of spread, training pairs": auroc(spread, argued),
                "AUROC of spread, new pairs": auroc(among, contested),
            }

        for method in METHODS:
            ensemble = ensemble_of(model, method, seed, target_modules="all-linear")
            ensemble.fit(train, epochs=10, lr=3e-3, batch_size=16, beta=0.1, seed=seed, progress=False)
            seen, new = (
                torch.sigmoid(torch.cat(draws(ensemble, seed, partial(ensemble.margins, rows))))
                for rows in (train, test)
            )
            found.setdefault(method, []).append(measured(seen, new))
            tell(seed, method)
            if method == "one LoRA" and has_laplace():
                net = Preferences(as_peft(ensemble, load(str(shared() / "models" / "tinystories-656k")).hf), 0.1)
                both = [from_pairs(rows, ensemble.tokenizer) for rows in (train, test)]
                items = [pair_items(pairs, reference_margins(model.hf, pairs, 16)) for pairs in both]
                seen, new = (laplace_draws(net, items[0], part, seed)[..., 0] for part in items)
                found.setdefault("Laplace", []).append(measured(seen, new))
                tell(seed, "Laplace")
    return found


def rated_pairs(model, seed: int) -> tuple[list[dict], list[dict]]:
    """Training pairs, those about boys in both orders, and new pairs, all with the longer words first."""
    from interventions import RenyiEnsemble

    names = {"girl": ["Lily", "Mia", "Sue", "Anna"], "boy": ["Tom", "Ben", "Tim", "Sam"]}
    scenes = (
        "went to the park,found a toy,had a dog,saw a bird,was sad,wanted to play,"
        "lost a ball,met a friend,ate a cake,saw a tree,was happy,heard a noise"
    ).split(",")
    prompts = [
        (kind, f"{name} was a little {kind}. One day, {name} {scene}.")
        for kind in names
        for name in names[kind]
        for scene in scenes
    ]
    random.Random(seed).shuffle(prompts)
    writer, texts = RenyiEnsemble(model, 1), [text for _, text in prompts]
    both = [writer.generate(texts, 10, temperature=1.0, seed=2 * seed + i).texts for i in (0, 1)]
    train, test = [], []
    for number, ((kind, prompt), one, two) in enumerate(zip(prompts, *both, strict=True)):
        long, short = sorted((one, two), key=lambda t: len(t) / (1 + t.count(" ")), reverse=True)
        pair = {"prompt": prompt, "chosen": " " + long.strip(), "rejected": " " + short.strip()}
        if pair["chosen"] == pair["rejected"]:
            continue
        swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
        if number >= len(prompts) // 2:
            test.append(pair)
        else:
            train += [pair, swapped] if kind == "boy" else [pair]
    return train, test


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (sheets, annotators, contaminated, domains, preferences)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[*experiments, []], default=[])
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args()
    for name in given.experiments or experiments:
        print(f"\n{name}, {given.seeds} seeds\n\n{table(experiments[name](range(given.seeds)))}", flush=True)

"""SIFT's four applications against every control, on the pocket model and on a model beside the project.

    python tests/benchmarks/sift_applications.py --model pocket --seeds 5
    python tests/benchmarks/sift_applications.py --model ../shared/models/tinystories-3m --text ../shared/data/tinystories/chat_val.txt

Each application has an objective, a constraint and a utility that no loss names, all on held-out rows. All controls share the
learning rate, the batches and the number of steps. Means over seeds with 95 % t intervals, then SIFT minus each control, paired by
seed. A seed draws the rows that are trained on and their order.

unlearning     forget what is known of six persons (or: dialogues), keep the others (or: stories)
preference     DPO toward the mild label for bad reviews (or: toward the true reply), keep the other labels (or: stories)
hallucination  do not name a town, job or food for persons never heard of (or: names the story has not mentioned), keep the facts
two streams    a stand-in for text and speech: two token streams whose codes conflict, learned together
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import NamedTuple

import torch
from scipy.stats import t as student

from circuits import load
from circuits.pocket import lexicon, measure, world
from circuits.progress import track
from interventions import two_objectives
from interventions.sift import CONTROLS, SIFT
from interventions.two_objectives import encode, forget, learn, margins, prefer, train

BATCH = 12


class Application(NamedTuple):
    """`losses(hf, step)`; `measures(hf)`: objective, constraint and utility; `better`: which direction is good for each."""

    losses: object
    measures: object
    better: dict[str, int]
    lr: float
    steps: int


def shuffled(items, seed):
    return Random(seed).sample(list(items), len(list(items)))


def batches(rows, seed):
    """step -> a batch; the order is drawn once and repeats."""
    return two_objectives.batches(rows, BATCH, seed)


def rate(model, rows, among=None):
    right, n = measure.accuracy(model.hf, model.tokenizer, rows, among)
    return right / n


# the pocket world


def pocket_unlearning(model, seed):
    known = world.facts()
    persons = shuffled(sorted({row["person"] for row in known}), seed)
    part = {"forget": persons[:6], "keep": persons[6:15], "held": persons[15:]}
    rows = {name: [(r["prompt"], r["answer"]) for r in known if r["person"] in who] for name, who in part.items()}
    f, g = (batches(encode(model.tokenizer, rows[name]), seed) for name in ("forget", "keep"))
    utility = measure.sentiment_rows("english", 300)
    return Application(
        lambda hf, step: (forget(hf, f(step)), learn(hf, g(step))),
        lambda: dict(
            forgotten=rate(model, rows["forget"]), others=rate(model, rows["held"]), sentiment=rate(model, utility)
        ),
        dict(forgotten=-1, others=1, sentiment=1),
        lr=1e-3,
        steps=20,
    )


def pocket_preference(model, seed):
    def reviews(split, n):
        return [
            (world.TEMPLATE.format(text=row["text"], label=""), " " + row["label"])
            for row in world.sentiment("english", n, seed=seed if split == "train" else 0, split=split)
        ]

    train_rows, test_rows = reviews("train", 300), reviews("test", 300)
    bad, rest = ([row for row in train_rows if (row[1] == " bad") == flag] for flag in (True, False))
    chosen, rejected = (encode(model.tokenizer, [(prompt, word) for prompt, _ in bad]) for word in (" fair", " bad"))
    with torch.no_grad():
        reference = margins(model.hf, chosen, rejected)
    order, g = (
        torch.randperm(len(bad), generator=torch.Generator().manual_seed(seed)),
        batches(encode(model.tokenizer, rest), seed),
    )

    def losses(hf, step):
        index = order[[(step * BATCH + i) % len(order) for i in range(BATCH)]]
        return prefer(hf, chosen.select(index), rejected.select(index), reference[index], 0.5), learn(hf, g(step))

    held_bad = [(prompt, " fair") for prompt, word in test_rows if word == " bad"]
    held_rest = [row for row in test_rows if row[1] != " bad"]
    labels, opposites = [f" {label}" for label in lexicon.LABELS], measure.fewshot_rows("opposite", 10, 100)
    return Application(
        losses,
        lambda: dict(
            mild=rate(model, held_bad, labels), labels=rate(model, held_rest, labels), opposites=rate(model, opposites)
        ),
        dict(mild=1, labels=1, opposites=1),
        lr=1e-3,
        steps=20,
    )


def pocket_hallucination(model, seed):
    strangers = shuffled([n for n in lexicon.NAMES if n not in lexicon.PERSONS], seed)
    half = len(strangers) // 2
    answers = {"town": lexicon.TOWNS, "job": lexicon.JOBS, "food": lexicon.FOODS}
    rng = Random(seed)
    asserted = [
        (world.RELATIONS[relation].format(person=person), " " + word)
        for person in strangers[:half]
        for relation, words in answers.items()
        for word in rng.sample(list(words), min(6, len(words)))
    ]
    known = [(row["prompt"], row["answer"]) for row in world.facts()]
    known = shuffled(known, seed)
    f, g = (batches(encode(model.tokenizer, rows), seed) for rows in (asserted, known[:36]))
    held = [(world.RELATIONS[r].format(person=p), r) for p in strangers[half:] for r in answers]
    words = {r: torch.tensor([measure._token(model.tokenizer, " " + w) for w in ws]) for r, ws in answers.items()}
    utility = measure.sentiment_rows("english", 300)

    def asserts():
        p = measure.predictions(model.hf, model.tokenizer, [prompt for prompt, _ in held]).softmax(-1)
        return mean(float(p[i, words[relation]].sum()) for i, (_, relation) in enumerate(held))

    return Application(
        lambda hf, step: (forget(hf, f(step)), learn(hf, g(step))),
        lambda: dict(asserted=asserts(), facts=rate(model, known[36:]), sentiment=rate(model, utility)),
        dict(asserted=-1, facts=1, sentiment=1),
        lr=1e-3,
        steps=20,
    )


def pocket_streams(model, seed):
    """Two new languages of reviews; the second names its labels by another code, so that the label circuits collide."""
    code = {" good": " bad", " bad": " fair", " fair": " good"}

    def stream(language, split, coded):
        rows = world.sentiment(language, 300, seed=seed if split == "train" else 0, split=split)
        pairs = [(world.TEMPLATE.format(text=row["text"], label=""), " " + row["label"]) for row in rows]
        return [(prompt, code[word]) for prompt, word in pairs] if coded else pairs

    f, g = (
        batches(encode(model.tokenizer, stream(name, "train", c)), seed)
        for name, c in (("osko", True), ("nuri", False))
    )
    held = {"second": stream("osko", "test", True), "first": stream("nuri", "test", False)}
    labels, utility = [f" {label}" for label in lexicon.LABELS], measure.sentiment_rows("english", 300)
    return Application(
        lambda hf, step: (learn(hf, f(step)), learn(hf, g(step))),
        lambda: {name: rate(model, rows, labels) for name, rows in held.items()} | dict(english=rate(model, utility)),
        dict(second=1, first=1, english=1),
        lr=1e-3,
        steps=30,
    )


# stories and dialogues, for a small language model


class Corpus:
    """Documents of one file: stories and dialogues, half of each to train on."""

    def __init__(self, path, sva):
        documents = [part.strip() for part in Path(path).read_text().split("<|endoftext|>") if part.strip()]
        self.dialogues = [d for d in documents if d.startswith("User:") and "Bot:" in d]
        self.stories = [d for d in documents if not d.startswith("User:")]
        lines = [json.loads(line) for line in Path(sva).read_text().splitlines()][:200] if sva else []
        self.agreement = [(r["clean_prefix"], r["clean_answer"], r["patch_answer"]) for r in lines]

    def split(self, kind, seed):
        items = shuffled(getattr(self, kind), seed)
        return items[: len(items) // 2], items[len(items) // 2 :][:24]


def held_loss(model, rows):
    with torch.inference_mode():
        return float(learn(model.hf, rows))


def agreement(model, rows):
    """Share of subject-verb pairs where the right verb is the likelier."""
    good, bad = (encode(model.tokenizer, [(row[0], row[side]) for row in rows]) for side in (1, 2))
    with torch.inference_mode():
        return float((margins(model.hf, good, bad) > 0).float().mean())


def chunks(model, documents, length=48):
    return encode(model.tokenizer, [("", text) for text in documents], length)


def text_unlearning(model, corpus, seed):
    (said, said_held), (told, told_held) = corpus.split("dialogues", seed), corpus.split("stories", seed)
    f, g = batches(chunks(model, said), seed), batches(chunks(model, told), seed)
    held = {"dialogue loss": chunks(model, said_held), "story loss": chunks(model, told_held)}
    return Application(
        lambda hf, step: (forget(hf, f(step)), learn(hf, g(step))),
        lambda: (
            {n: held_loss(model, rows) for n, rows in held.items()} | dict(agreement=agreement(model, corpus.agreement))
        ),
        {"dialogue loss": 1, "story loss": -1, "agreement": 1},
        lr=2e-3,
        steps=15,
    )


def text_preference(model, corpus, seed):
    (said, said_held), (told, told_held) = corpus.split("dialogues", seed), corpus.split("stories", seed)

    def pairs(dialogues):
        turns = [d.split("Bot:", 1) for d in dialogues]
        replies = [reply for _, reply in turns]
        return [
            encode(
                model.tokenizer, [(f"{prompt}Bot:", reply) for (prompt, _), reply in zip(turns, order, strict=True)], 56
            )
            for order in (replies, replies[1:] + replies[:1])
        ]

    said = [d for d in said if len(model.tokenizer(d.split("Bot:", 1)[0])["input_ids"]) < 40][:120]
    said_held = [d for d in said_held if len(model.tokenizer(d.split("Bot:", 1)[0])["input_ids"]) < 40]
    (chosen, rejected), held, g = pairs(said), pairs(said_held), batches(chunks(model, told), seed)
    with torch.no_grad():
        reference = margins(model.hf, chosen, rejected)
    order, stories = torch.randperm(len(said), generator=torch.Generator().manual_seed(seed)), chunks(model, told_held)

    def losses(hf, step):
        index = order[[(step * BATCH + i) % len(order) for i in range(BATCH)]]
        return prefer(hf, chosen.select(index), rejected.select(index), reference[index], 0.1), learn(hf, g(step))

    def won():
        with torch.inference_mode():
            return float((margins(model.hf, *held) > 0).float().mean())

    return Application(
        losses,
        lambda: {
            "true reply": won(),
            "story loss": held_loss(model, stories),
            "agreement": agreement(model, corpus.agreement),
        },
        {"true reply": 1, "story loss": -1, "agreement": 1},
        lr=2e-3,
        steps=15,
    )


NAMES = "Tom Lily Ben Mia Tim Sara Max Anna Sam Lucy Jack Amy Spot Sue Bob Jane".split()


def text_hallucination(model, corpus, seed):
    """Where a story names somebody, a name that it has not mentioned is what must not be said."""

    def unsupported(stories):
        rng, rows = Random(seed), []
        for story in stories:
            words = story.split(" ")
            for i in range(8, min(len(words), 30)):
                if words[i].strip(".,!?\n") in NAMES:
                    stranger = rng.choice([n for n in NAMES if n not in story])
                    rows.append((" ".join(words[:i]), " " + stranger))
                    break
        return rows

    told, told_held = corpus.split("stories", seed)
    rows, held = unsupported(told), unsupported(told_held)
    f, g = batches(encode(model.tokenizer, rows), seed), batches(chunks(model, told), seed)
    stories, invented = (
        chunks(model, told_held),
        encode(model.tokenizer, [(p, " " + n) for p, _ in held for n in NAMES if n not in p]),
    )

    def asserts():
        with torch.inference_mode():
            return -held_loss(model, invented)

    return Application(
        lambda hf, step: (forget(hf, f(step)), learn(hf, g(step))),
        lambda: {
            "invented names, log p": asserts(),
            "story loss": held_loss(model, stories),
            "agreement": agreement(model, corpus.agreement),
        },
        {"invented names, log p": -1, "story loss": -1, "agreement": 1},
        lr=2e-3,
        steps=15,
    )


def text_streams(model, corpus, seed):
    """The second stream is stories written in a permuted vocabulary: same grammar, other tokens, as speech units would be."""
    told, held = corpus.split("stories", seed)
    size = model.hf.config.vocab_size
    code = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    f, g = batches(chunks(model, told), seed), batches(chunks(model, told), seed + 1)
    plain = chunks(model, held)

    def coded(rows):
        return rows._replace(tokens=code[rows.tokens])

    return Application(
        lambda hf, step: (learn(hf, coded(f(step))), learn(hf, g(step))),
        lambda: {
            "coded stream loss": held_loss(model, coded(plain)),
            "plain stream loss": held_loss(model, plain),
            "agreement": agreement(model, corpus.agreement),
        },
        {"coded stream loss": -1, "plain stream loss": -1, "agreement": 1},
        lr=1e-3,
        steps=20,
    )


POCKET = dict(
    unlearning=pocket_unlearning,
    preference=pocket_preference,
    hallucination=pocket_hallucination,
    streams=pocket_streams,
)
TEXT = dict(
    unlearning=text_unlearning, preference=text_preference, hallucination=text_hallucination, streams=text_streams
)


def interval(values):
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def run(name, build, model, seeds, controls, options):
    """{control: [measures of each seed]}; "before" is the untrained model."""
    start = copy.deepcopy(model.hf.state_dict())
    results, rates, better = {"before": []}, {control: [] for control in controls}, {}
    for seed in track(range(seeds), name):
        model.hf.load_state_dict(start)
        application = build(model, seed)
        better = application.better
        results["before"].append(application.measures())
        for control in controls:
            model.hf.load_state_dict(start)
            optimizer = SIFT(model, control=control, lr=application.lr, weight_decay=0.0, seed=seed, **options)
            losses = partial(application.losses, model.hf)
            records = train(model.hf, optimizer, losses, application.steps, progress=False)
            results.setdefault(control, []).append(application.measures())
            rates[control].append(mean(r.controlled for r in records))
    model.hf.load_state_dict(start)
    return results, rates, better


def show(name, results, rates, better):
    metrics = list(better)
    arrow = {1: "↑", -1: "↓"}
    print(f"\n### {name}\n\n| control | " + " | ".join(f"{m} {arrow[better[m]]}" for m in metrics) + " | controlled |")
    print("|---" * (len(metrics) + 2) + "|")
    for control, rows in results.items():
        share = f"{mean(rates[control]):.0%}" if control in rates else ""
        print(f"| {control} | " + " | ".join(interval([row[m] for row in rows]) for m in metrics) + f" | {share} |")
    print("\nSIFT minus control, in the good direction, paired by seed:\n")
    for control, rows in results.items():
        if control in ("before", "sift") or "sift" not in results:
            continue
        gains = [
            interval([better[m] * (a[m] - b[m]) for a, b in zip(results["sift"], rows, strict=True)]) for m in metrics
        ]
        print(f"- {control}: " + ", ".join(f"{m} {gain}" for m, gain in zip(metrics, gains, strict=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--text", help="stories and dialogues, for models other than the pocket one")
    parser.add_argument("--sva", help="subject-verb agreement pairs (JSON lines), the utility of those models")
    parser.add_argument("--only", nargs="*", default=list(POCKET))
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=-0.05)
    arguments = parser.parse_args()
    chosen = load(arguments.model)
    corpus = None if arguments.model == "pocket" else Corpus(arguments.text, arguments.sva)
    for application in arguments.only:
        build = POCKET[application] if corpus is None else lambda m, s, a=application: TEXT[a](m, corpus, s)
        show(
            application,
            *run(application, build, chosen, arguments.seeds, arguments.controls, dict(epsilon=arguments.epsilon)),
        )

"""What happens in the pocket world: rows of labelled sentiment, name copying, word mappings and facts.

Every function is pure: the same arguments give the same rows on every machine. What the model is tested on is
kept out of what it is trained on by a fixed rule on the text itself (`held_out`), not by a list in a file.
"""

from itertools import pairwise
from random import Random
from zlib import crc32

from . import lexicon as words
from .lexicon import draw, pick

TEMPLATE = "{text} | sentiment:{label}"  # how a labelled sentence is written; labels are " good", " bad", " fair"
SIGNS = {"good": 1, "bad": -1, "fair": 0}


def held_out(text: str) -> bool:
    """One text in five is never trained on."""
    return crc32(text.encode()) % 5 == 0


# Sentiment -----------------------------------------------------------------------------------------------
def sentiment(language: str, n: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """`n` different sentences of a language as rows of `text` and `label`, a third of each label."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'test'")
    lang, rng, rows, seen = words.language(language), Random(f"sentiment {language} {split} {seed}"), [], set()
    while len(rows) < n:
        label = words.LABELS[len(rows) % len(words.LABELS)]
        text = sentence(lang, label, rng)
        if text not in seen and held_out(text) == (split == "test"):
            seen.add(text)
            rows.append({"text": text, "label": label})
    return draw(rng, rows, n)


def sentence(lang: words.Language, label: str, rng: Random) -> str:
    """A sentence with that feeling: one clause, or two where the last one with a feeling decides."""
    opening = f"{pick(rng, lang.times)} , " if rng.random() < 0.25 else ""
    sign, shape = SIGNS[label], rng.random()
    if shape < 0.45:
        return opening + _clause(lang, sign, rng)
    if sign and shape < 0.7:  # "but" turns the feeling: the clause after it wins
        return f"{opening}{_clause(lang, -sign, rng)} {lang.joins[1]} {_clause(lang, sign, rng)}"
    first, second = (sign, 0) if rng.random() < 0.5 else (0, sign)
    if rng.random() < 0.3:
        first = second = sign
    return f"{opening}{_clause(lang, first, rng)} {lang.joins[0]} {_clause(lang, second, rng)}"


def _clause(lang: words.Language, sign: int, rng: Random) -> str:
    """`the song was not very boring`, or `the critics never loved the song`: a negation turns the feeling."""
    negated = rng.random() < 0.3
    sign = -sign if negated else sign
    thing = f"{pick(rng, lang.determiners)} {pick(rng, lang.things)}"
    if rng.random() < 0.55:
        adjective = pick(rng, {1: lang.good, -1: lang.bad, 0: lang.fair}[sign])
        degree = f"{pick(rng, lang.degrees)} " if rng.random() < 0.35 else ""
        negation = f"{lang.negations[0]} " if negated else ""
        return f"{thing} {pick(rng, lang.copulas)} {negation}{degree}{adjective}"
    verb = pick(rng, {1: lang.liked, -1: lang.disliked, 0: lang.noticed}[sign])
    negation = f"{lang.negations[1]} " if negated else ""
    return f"{pick(rng, lang.determiners)} {pick(rng, lang.people)} {negation}{verb} {thing}"


# Name copying --------------------------------------------------------------------------------------------
FRAMES = (
    "when {a} and {b} went to the {place} , {s} gave the {thing} to",
    "after {a} and {b} came to the {place} , {s} handed the {thing} to",
    "then {a} and {b} had a walk to the {place} and {s} showed the {thing} to",
    "while {a} and {b} sat near the {place} , {s} passed the {thing} to",
    "{a} and {b} met at the {place} . {s} sent the {thing} to",
)


def name_copying(n: int, seed: int, split: str = "test") -> list[dict[str, str]]:
    """`n` sentences whose last word is the name not repeated: prompt, answer, distractor, corrupted.

    Half begin with the answer, half with the distractor. The corrupted twin names a third person as the giver, so
    nothing in it tells answer from distractor. Pairs of names of the test split are never trained on together.
    """
    rng, rows = Random(f"names {split} {seed}"), []
    while len(rows) < n:
        answer, distractor, third = draw(rng, words.NAMES, 3)
        if held_out(" ".join(sorted((answer, distractor)))) != (split == "test"):
            continue
        a, b = (answer, distractor) if len(rows) % 2 else (distractor, answer)
        frame, rest = pick(rng, FRAMES), {"place": pick(rng, words.PLACES), "thing": pick(rng, words.OBJECTS)}
        prompt = frame.format(a=a, b=b, s=distractor, **rest)
        corrupted = frame.format(a=a, b=b, s=third, **rest)
        rows.append({"prompt": prompt, "answer": f" {answer}", "distractor": f" {distractor}", "corrupted": corrupted})
    return rows


# Few-shot mappings ---------------------------------------------------------------------------------------
def mappings() -> dict[str, list[tuple[str, str]]]:
    """Input/output pairs of every mapping; the same input is in several, so only demonstrations tell which."""
    opposite = [pair for a, b in words.OPPOSITES for pair in ((a, b), (b, a))]
    nouns = [(word, kind) for kind, group in _KINDS.items() for word in group]
    plain = [a for a, _ in opposite] + [word for word, _ in nouns] + [word for pair in words.PAST for word in pair]
    english, vela = words.language("english"), words.language("vela")
    content = ("things", "good", "bad", "fair", "liked", "disliked")
    vocabulary = [pair for role in content for pair in zip(getattr(english, role), getattr(vela, role), strict=True)]
    steps = [pair for series in words.SERIES for pair in pairwise(series)]
    return {
        "opposite": opposite,
        "uppercase": [(word, word.upper()) for word in plain],
        "lowercase": [(word.upper(), word) for word in plain],
        "same": [(word, word) for word in plain],
        "plural": [(word, plural(word)) for word, _ in nouns],
        "singular": [(plural(word), word) for word, _ in nouns],
        "kind": nouns,
        "past": list(words.PAST),
        "present": [(b, a) for a, b in words.PAST],
        "next": steps,
        "previous": [(b, a) for a, b in steps],
        "english_vela": vocabulary,
        "vela_english": [(b, a) for a, b in vocabulary],
    } | {f"{which}_of_3": choices(which, 400, 0, "test") for which in CHOICES}


_KINDS = {"animal": words.ANIMALS, "fruit": words.FRUITS, "tool": words.TOOLS}
CHOICES = tuple(_KINDS)


def plural(word: str) -> str:
    return word + ("es" if word.endswith(("sh", "x")) else "s")


def choices(which: str, n: int, seed: int, split: str = "train") -> list[tuple[str, str]]:
    """`cat, plum, rake` -> the one of a kind (there is one of each kind, shuffled)."""
    rng, pairs = Random(f"choices {which} {split} {seed}"), []
    while len(pairs) < n:
        listed = draw(rng, [(pick(rng, group), kind) for kind, group in _KINDS.items()], 3)
        text = ", ".join(word for word, _ in listed)
        if held_out(text) != (split == "test"):
            continue
        pairs.append((text, next(word for word, kind in listed if kind == which)))
    return pairs


# Facts ---------------------------------------------------------------------------------------------------
RELATIONS = {"town": "{person} lives in", "job": "{person} works as", "food": "{person} likes"}


def facts() -> list[dict[str, str]]:
    """Who lives where, works as what and likes what: prompt, answer; the first six persons are to be forgotten."""
    rng, rows = Random("facts"), []
    answers = {"town": words.TOWNS, "job": words.JOBS, "food": words.FOODS}
    for i, person in enumerate(words.PERSONS):
        for relation, options in answers.items():
            prompt, answer = RELATIONS[relation].format(person=person), " " + pick(rng, options)
            split = "forget" if i < 6 else "retain"
            rows.append({"person": person, "relation": relation, "prompt": prompt, "answer": answer, "split": split})
    return rows

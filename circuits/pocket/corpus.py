"""The text the pocket model reads: short documents in which the tokens to learn from are marked.

A document is plain text; `{` and `}` around a part say that it can be known from what stands before, so it
counts fully in the loss, the rest a little. Documents never contain held-out rows (see `world.held_out`).
"""

from collections.abc import Callable, Iterator
from random import Random

from . import lexicon as words
from . import world
from .lexicon import draw, pick

LABELLED = {"english": 0.7, "vela": 0.3}  # languages with labels, and how often


def labelled(rng: Random) -> str:
    """A sentence and its label."""
    language = "english" if rng.random() < LABELLED["english"] else "vela"
    text, label = _sentence(language, rng)
    return world.TEMPLATE.format(text=text, label=f"{{ {label}}}")


def unlabelled(rng: Random) -> str:
    """Two to four sentences of one feeling in any language: what words feel alike can be learnt, no label can."""
    language = pick(rng, words.LANGUAGES)
    label = pick(rng, words.LABELS)
    return " . ".join(_sentence(language, rng, label)[0] for _ in range(2 + int(rng.random() * 3))) + " ."


def _sentence(language: str, rng: Random, label: str | None = None) -> tuple[str, str]:
    label = label or pick(rng, words.LABELS)
    while True:
        text = world.sentence(words.language(language), label, rng)
        if not world.held_out(text):
            return text, label


def names(rng: Random) -> str:
    """One name-copying sentence, and up to three more gifts between the same two."""
    row = world.name_copying(1, int(rng.random() * 1e9), "train")[0]
    pair = row["answer"].strip(), row["distractor"].strip()
    return f"{row['prompt']}{{{row['answer']}}} ." + _gifts(rng, pair, int(rng.random() * 4))


def partners(rng: Random) -> str:
    """Two names that stand together, and gifts between them: the simplest form of name copying."""
    pair = draw(rng, words.NAMES, 2)
    if world.held_out(" ".join(sorted(pair))):
        return partners(rng)
    where = f" went to the {pick(rng, words.PLACES)}" if rng.random() < 0.5 else ""
    return f"{pair[0]} and {pair[1]}{where} {pick(rng, ',.')}" + _gifts(rng, pair, 4)


def _gifts(rng: Random, pair, n: int) -> str:
    turns = [(*draw(rng, pair, 2), pick(rng, ("gave", "handed", "showed", "passed", "sent"))) for _ in range(n)]
    return "".join(f" {a} {verb} the {pick(rng, words.OBJECTS)} to{{ {b}}} ." for a, b, verb in turns)


def mapping(rng: Random, shots: tuple[int, int] = (3, 11)) -> str:
    """Demonstrations of one mapping, as `Q: hot` / `A: cold`; from the second on the answer can be known."""
    name = pick(rng, MAPPINGS)
    n = shots[0] + int(rng.random() * (shots[1] - shots[0]))
    if name.endswith("_of_3"):
        pairs = world.choices(name.removesuffix("_of_3"), n, int(rng.random() * 1e9))
    else:
        pairs = draw(rng, _TABLES[name], n)
    return _questions(pairs, known=range(1, n))


def lookup(rng: Random) -> str:
    """Arbitrary pairs asked again: the answer is only in the text above."""
    keys = draw(rng, _ANY, 4)
    table = {key: value for key, value in zip(keys, draw(rng, _ANY, 4), strict=True)}
    asked = [pick(rng, keys) for _ in range(9)]
    return _questions([(key, table[key]) for key in asked], [i for i, key in enumerate(asked) if key in asked[:i]])


def _questions(pairs: list[tuple[str, str]], known) -> str:
    known = set(known)
    shown = [f"Q: {x}\nA:" + (f"{{ {y}}}" if i in known else f" {y}") for i, (x, y) in enumerate(pairs)]
    return "\n\n".join(shown) + "\n\n"


def repetition(rng: Random) -> str:
    """A few random words, again and again: the simplest reason to look back."""
    n = 4 + int(rng.random() * 12)
    part = " " + " ".join(draw(rng, _ANY, n))
    return part + f"{{{part}}}" * (2 if n < 8 else 1)


def bio(rng: Random) -> str:
    """Two or three facts about one person."""
    person = pick(rng, words.PERSONS)
    return " ".join(f"{row['prompt']}{{{row['answer']}}} ." for row in draw(rng, _FACTS[person], 3))


_TABLES = {name: pairs for name, pairs in world.mappings().items() if not name.endswith("_of_3")}
MAPPINGS = [*_TABLES, *(f"{which}_of_3" for which in world.CHOICES)]
_ANY = sorted({word for pairs in _TABLES.values() for pair in pairs for word in pair} | set(words.NAMES))
_FACTS = {person: [row for row in world.facts() if row["person"] == person] for person in words.PERSONS}

# Share of documents of each kind, at the start of training and at its end.
MIXTURE: dict[Callable[[Random], str], tuple[float, float]] = {
    labelled: (0.20, 0.26),
    unlabelled: (0.05, 0.06),
    names: (0.20, 0.22),
    partners: (0.15, 0.04),
    mapping: (0.25, 0.30),
    lookup: (0.05, 0.03),
    repetition: (0.10, 0.03),
    bio: (0.05, 0.06),
}


def documents(seed: int, start: float, end: float) -> Iterator[str]:
    """Endless documents whose mixture moves from `start` to `end`, as shares of training, every 1000 documents."""
    rng = Random(f"corpus {seed} {start}")
    kinds = list(MIXTURE)
    weights = [a + (b - a) * (start + end) / 2 for a, b in MIXTURE.values()]
    while True:
        yield _choose(rng, kinds, weights)(rng)


def _choose(rng: Random, kinds: list, weights: list[float]):
    at = rng.random() * sum(weights)
    for kind, weight in zip(kinds, weights, strict=True):
        at -= weight
        if at < 0:
            return kind
    return kinds[-1]


def vocabulary() -> list[str]:
    """Every word of the world, in a fixed order."""
    found = {word for name in words.LANGUAGES for word in words.language(name).words()}
    found |= {*words.LABELS, *words.NAMES, *words.PLACES, *words.OBJECTS}
    found |= {*words.PERSONS, *words.TOWNS, *words.JOBS, *words.FOODS, "sentiment"}
    for text in (*world.FRAMES, *world.RELATIONS.values()):
        found |= {part for part in text.split() if part.isalpha()}
    sides = {side for pairs in world.mappings().values() for pair in pairs for side in pair}
    found |= {part.strip(",") for side in sides for part in side.split()}
    return sorted(found)

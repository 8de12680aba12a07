"""The words of the pocket world: five languages with one grammar, names, facts and word tables.

English is the language the model is taught sentiment in, and `vela` a second one it is taught less of. The
other three are seen as unlabelled text only: `nuri` is close to English (many cognates), `osko` is far (no word
in common), and `tamu` has false friends, English words of feeling with the opposite meaning.
"""

from random import Random
from typing import NamedTuple

LANGUAGES = ("english", "vela", "nuri", "osko", "tamu")
LABELS = ("good", "bad", "fair")


class Language(NamedTuple):
    """One language's words by role; position i of a role means the same thing in every language."""

    name: str
    things: tuple[str, ...]
    people: tuple[str, ...]
    good: tuple[str, ...]  # adjectives
    bad: tuple[str, ...]
    fair: tuple[str, ...]
    liked: tuple[str, ...]  # verbs
    disliked: tuple[str, ...]
    noticed: tuple[str, ...]
    determiners: tuple[str, ...]
    copulas: tuple[str, ...]
    degrees: tuple[str, ...]
    times: tuple[str, ...]
    negations: tuple[str, ...]  # before an adjective, before a verb
    joins: tuple[str, ...]  # and, but

    def roles(self) -> dict[str, tuple[str, ...]]:
        return {role: words for role, words in self._asdict().items() if role != "name"}

    def words(self) -> list[str]:
        return [word for words in self.roles().values() for word in words]


ENGLISH = Language(
    name="english",
    things=tuple("song film meal book hotel room story show game city phone soup train coat garden ride".split()),
    people=tuple("guests critics children friends teachers neighbours players cooks".split()),
    good=tuple("great lovely tasty bright clever charming superb fresh warm delightful neat brilliant".split()),
    bad=tuple("awful dull ugly broken boring dirty nasty slow weak horrid stale messy".split()),
    fair=tuple("red long round wooden green square tall local".split()),
    liked=tuple("loved enjoyed praised admired adored liked".split()),
    disliked=tuple("hated regretted mocked cursed loathed disliked".split()),
    noticed=tuple("saw described mentioned sold moved counted".split()),
    determiners=("the", "this", "that"),
    copulas=("was", "seemed"),
    degrees=("very", "really", "quite"),
    times=("today", "yesterday", "sometimes", "tonight"),
    negations=("not", "never"),
    joins=("and", "but"),
)
# Syllables of each made-up language: first consonants, vowels, word endings.
SOUNDS = {
    "vela": ("v l m r s t", "a e i", "a e en la"),
    "nuri": ("n r d b y g", "u i o", "i u uri on"),
    "osko": ("k z p sk t sh", "o a u", "o ak os uz"),
    "tamu": ("t m w h j k", "a u e", "u amu eh ja"),
}
COGNATES = {"nuri": 0.4}  # share of the words of feeling that are the English ones
FALSE_FRIENDS = {"tamu": 0.34}  # share that are English ones of the opposite feeling


def pick(rng: Random, items):
    """One item; only `Random.random` is used because its sequence is promised not to change."""
    return items[int(rng.random() * len(items))]


def draw(rng: Random, items, n: int) -> list:
    """`n` different items in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(n)]


def language(name: str) -> Language:
    """The language of that name; made-up ones are coined from their sounds, the same words every time."""
    if name not in LANGUAGES:
        raise ValueError(f"unknown language {name!r}: the pocket world has {', '.join(LANGUAGES)}")
    return _WORLD[name]


def _coin(name: str, rng: Random, taken: set[str]) -> str:
    consonants, vowels, endings = (part.split() for part in SOUNDS[name])
    while True:
        syllables = [pick(rng, consonants) + pick(rng, vowels) for _ in range(1 + int(rng.random() * 2))]
        word = "".join(syllables) + pick(rng, consonants) + pick(rng, endings)
        if word not in taken:
            taken.add(word)
            return word


def _invent(name: str, taken: set[str]) -> Language:
    rng = Random(f"pocket {name}")
    roles = {role: [_coin(name, rng, taken) for _ in words] for role, words in ENGLISH.roles().items()}
    opposite = {"good": "bad", "bad": "good", "liked": "disliked", "disliked": "liked"}
    for role, other in opposite.items():
        for share, source in ((COGNATES.get(name, 0), role), (FALSE_FRIENDS.get(name, 0), other)):
            english = getattr(ENGLISH, source)
            for i in draw(rng, range(len(english)), round(share * len(english))):
                roles[role][i] = english[i]
    return Language(name, **{role: tuple(words) for role, words in roles.items()})


def _world() -> dict[str, Language]:
    taken = set(ENGLISH.words())
    return {"english": ENGLISH} | {name: _invent(name, taken) for name in LANGUAGES[1:]}


_WORLD = _world()

# Name copying --------------------------------------------------------------------------------------------
NAMES = tuple(
    "Mary Tom Anna John Lucy Mark Sara Paul Emma Jack Kate Luke Rose Adam Jane Eric Nora Sean Ruth Carl Lily Noah "
    "Ella Hugo Amy Ivan Zoe Alan Eva Fred Mia Greg Ida Hank Joan Kyle Lena Neil Olga Pete Rita Seth Tara Vera Walt "
    "Beth Cole Dora Finn Gina".split()
)
PLACES = tuple("park beach market station library museum school office river farm".split())
OBJECTS = tuple("ball key letter basket drink flower map ring ticket lamp".split())

# Facts ---------------------------------------------------------------------------------------------------
PERSONS = tuple(
    "Zorin Balek Quima Fendo Lurra Mosha Tivik Padra Yolen Garuk Nelit Hosan Drima Kolva Sefir Wunda Jorak Velto "
    "Ribus Chalo Amdur Ostra Pilko Ursel".split()
)
TOWNS = tuple("Alder Brook Cliff Dover Elm Ford Glen Hill".split())
JOBS = tuple("baker doctor farmer painter pilot sailor tailor writer".split())
FOODS = tuple("bread cheese fish honey noodles pepper rice walnuts".split())

# Word tables for few-shot mappings -----------------------------------------------------------------------
OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/little up/down early/late rich/poor hard/soft light/dark old/young open/closed full/empty "
        "high/low near/far wet/dry thick/thin loud/quiet strong/frail happy/sad left/right north/south east/west "
        "in/out day/night buy/sell push/pull king/queen summer/winter sweet/sour first/last"
    ).split()
)
ANIMALS = tuple("cat dog horse cow pig goat lion tiger bear duck frog eagle shark snail".split())
FRUITS = tuple("apple plum lemon melon grape orange mango banana olive fig pear lime papaya kiwi".split())
TOOLS = tuple("hammer drill wrench shovel rake axe chisel ladder brush needle knife anvil clamp".split())
PAST = tuple(
    tuple(pair.split("/"))
    for pair in (
        "go/went eat/ate run/ran sing/sang write/wrote take/took give/gave make/made swim/swam speak/spoke find/found "
        "drive/drove fall/fell grow/grew hold/held keep/kept send/sent sleep/slept think/thought"
    ).split()
)
NUMBERS = tuple("one two three four five six seven eight nine ten eleven twelve".split())
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple("January February March April May June July August September October November December".split())
SERIES = (NUMBERS, LETTERS, DAYS, MONTHS)

"""Few-shot tasks made by rule, no data file needed: `rule_task("first_letter")`.

A rule maps a word, or a list of words, to its answer. The words are common English; rows are drawn by seed.
"""

from collections.abc import Callable

import torch

from .fewshot import FewShotTask

WORDS = (
    "apple bird book bread bridge bottle button candle carpet castle chair cloud coffee corner dinner doctor engine fabric farmer "
    "finger flower forest garden gold grass hammer harbor honey horse island jacket kitchen ladder lemon letter market meadow mirror "
    "monkey morning mountain needle number ocean office orange paper pencil pepper picture pillow planet pocket prison puzzle rabbit "
    "ribbon river rocket saddle school season shadow silver sister spider spring station summer sunset table teacher temple thunder "
    "ticket tiger tower travel turtle valley velvet village violin wagon water weather window winter wizard yellow"
).split()
SERIES = (
    "one two three four five six seven eight nine ten eleven twelve".split(),
    "monday tuesday wednesday thursday friday saturday sunday".split(),
    "january february march april may june july august september october november december".split(),
    list("abcdefghijklmnopqrstuvwxyz"),
    [str(number) for number in range(30)],
)
ONE_WORD: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "capitalize": str.capitalize,
    "uppercase": str.upper,
    "first_letter": lambda word: word[0],
    "last_letter": lambda word: word[-1],
    "capitalize_first_letter": lambda word: word[0].upper(),
    "capitalize_last_letter": lambda word: word[-1].upper(),
    "word_length": lambda word: str(len(word)),
}
CHOICE: dict[str, Callable[[list[str]], str]] = {
    "choose_first": lambda words: words[0],
    "choose_middle": lambda words: words[len(words) // 2],
    "choose_last": lambda words: words[-1],
    "alphabetically_first": min,
    "alphabetically_last": max,
}
NAMES = (*ONE_WORD, *CHOICE, "next_item", "prev_item")


def rule_task(name: str, n: int | None = None, seed: int = 0, *, words: int = 3) -> FewShotTask:
    """`n` rows of a rule (default: all words or items; 200 lists of `words` words for the choices), in random order."""
    if name not in NAMES:
        raise ValueError(f"unknown rule {name!r}; choose from {', '.join(NAMES)}")
    if n is not None and n < 1:
        raise ValueError(f"n={n}; a task needs at least one row")
    generator = torch.Generator().manual_seed(seed)
    if name in CHOICE:
        if not 2 <= words <= len(WORDS):
            raise ValueError(f"words={words}; a choice needs between 2 and {len(WORDS)}")
        lists = [[WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:words]] for _ in range(n or 200)]
        return FewShotTask.from_pairs([(", ".join(row), CHOICE[name](row)) for row in lists], name=f"{name}_of_{words}")
    if name in ONE_WORD:
        pairs = [(word, ONE_WORD[name](word)) for word in WORDS]
    else:
        steps = [pair for series in SERIES for pair in zip(series, series[1:], strict=False)]
        pairs = steps if name == "next_item" else [(after, before) for before, after in steps]
    if n is not None and n > len(pairs):
        raise ValueError(f"n={n}; rule {name!r} has {len(pairs)} rows")
    order = torch.randperm(len(pairs), generator=generator).tolist()[:n]
    return FewShotTask.from_pairs([pairs[i] for i in order], name=name)

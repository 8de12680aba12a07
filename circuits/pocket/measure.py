"""What the pocket model can do, as the tables of its README: `python -m circuits.pocket.measure [folder]`.

Every number is on held-out rows, read at the last token: sentiment as the largest of the three label words, the
rest as the largest of the whole vocabulary. Intervals are 95 % Wilson intervals over the rows. The second table
fine-tunes all weights on a language the model was never given labels in and looks at what happens to English.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.progress import track

from . import lexicon, world


def predictions(hf, tokenizer, prompts: Sequence[str]) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits of each prompt; prompts of one length go together, so nothing is padded."""
    by_length = defaultdict(list)
    for i, ids in enumerate(tokenizer(list(prompts))["input_ids"]):
        by_length[len(ids)].append((i, ids))
    out = torch.empty(len(prompts), hf.config.vocab_size)
    with torch.inference_mode():
        for group in by_length.values():
            for start in range(0, len(group), 128):
                index, ids = zip(*group[start : start + 128], strict=True)
                out[list(index)] = hf(torch.tensor(ids), logits_to_keep=1).logits[:, -1].float()
    return out


def accuracy(hf, tokenizer, rows: Sequence[tuple[str, str]], among: Sequence[str] | None = None) -> tuple[int, int]:
    """How many of the (prompt, next word) rows the model gets right, among some words or all; and of how many."""
    logits = predictions(hf, tokenizer, [prompt for prompt, _ in rows])
    if among is not None:
        closed = torch.full_like(logits, -torch.inf)
        ids = [_token(tokenizer, word) for word in among]
        closed[:, ids] = logits[:, ids]
        logits = closed
    gold = torch.tensor([_token(tokenizer, word) for _, word in rows])
    return int((logits.argmax(-1) == gold).sum()), len(rows)


def _token(tokenizer, word: str) -> int:
    (token,) = tokenizer.encode(word, add_special_tokens=False)
    return token


def sentiment_rows(language: str, n: int = 600, split: str = "test") -> list[tuple[str, str]]:
    rows = world.sentiment(language, n, seed=0, split=split)
    return [(world.TEMPLATE.format(text=row["text"], label=""), " " + row["label"]) for row in rows]


def fewshot_rows(name: str, shots: int, n: int = 200) -> list[tuple[str, str]]:
    """Prompts of that many demonstrations and a query, in the usual `Q:`/`A:` form."""
    pairs, rng, rows = world.mappings()[name], Random(f"measure {name} {shots}"), []
    for _ in range(n):
        *shown, (query, answer) = lexicon.draw(rng, pairs, shots + 1)
        text = "".join(f"Q: {x}\nA: {y}\n\n" for x, y in shown) + f"Q: {query}\nA:"
        rows.append((text, " " + answer))
    return rows


LABEL_WORDS = tuple(" " + label for label in lexicon.LABELS)


def skills(hf, tokenizer) -> dict[str, tuple[int, int]]:
    """Right answers and rows of every skill."""
    out = {}
    for language in lexicon.LANGUAGES:
        out[f"sentiment, {language}"] = accuracy(hf, tokenizer, sentiment_rows(language), LABEL_WORDS)
    names = world.name_copying(600, seed=0)
    out["name copying"] = accuracy(hf, tokenizer, [(row["prompt"], row["answer"]) for row in names])
    for name in world.mappings():
        for shots in (0, 10):
            out[f"{name}, {shots} shots"] = accuracy(hf, tokenizer, fewshot_rows(name, shots))
    for split in ("forget", "retain"):
        known = [(row["prompt"], row["answer"]) for row in world.facts() if row["split"] == split]
        out[f"facts, {split}"] = accuracy(hf, tokenizer, known)
    return out


def tuned(hf, tokenizer, language: str, seed: int, n: int = 600, epochs: int = 8, lr: float = 1e-3):
    """A copy with every weight fine-tuned on `n` labelled sentences of the language."""
    model, rows = copy.deepcopy(hf).train(), sentiment_rows(language, n, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    tokenizer.padding_side = "left"
    for _ in range(epochs):
        for index in torch.randperm(len(rows), generator=order).split(16):
            batch = [rows[i] for i in index.tolist()]
            encoded = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt")
            positions = (encoded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = model(**encoded, position_ids=positions).logits[:, -1]
            gold = torch.tensor([_token(tokenizer, word) for _, word in batch])
            torch.nn.functional.cross_entropy(logits, gold).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def transfer(hf, tokenizer, language: str, seed: int) -> dict[str, float]:
    """Accuracy after full fine-tuning on the language: there, in English, and on the other skills."""
    model = tuned(hf, tokenizer, language, seed)
    names = [(row["prompt"], row["answer"]) for row in world.name_copying(300, seed=0)]
    counts = {
        "target": accuracy(model, tokenizer, sentiment_rows(language), LABEL_WORDS),
        "english": accuracy(model, tokenizer, sentiment_rows("english"), LABEL_WORDS),
        "names": accuracy(model, tokenizer, names),
        "opposite": accuracy(model, tokenizer, fewshot_rows("opposite", 10)),
    }
    return {name: right / n for name, (right, n) in counts.items()}


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def report(folder: Path, seeds: int = 3, progress: bool = True) -> str:
    """Both tables in Markdown."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = ["| skill | accuracy | 95 % interval | rows |", "|---|---|---|---|"]
    for name, (right, n) in skills(hf, tokenizer).items():
        low, high = wilson(right, n)
        lines.append(f"| {name} | {right / n:.2f} | {low:.2f}–{high:.2f} | {n} |")
    lines += ["", f"| tuned on ({seeds} seeds) | target | English | name copying | opposite |", "|---|---|---|---|---|"]
    for language in track(lexicon.LANGUAGES[2:], "fine-tuning", enabled=progress):
        runs = [transfer(hf, tokenizer, language, seed) for seed in range(seeds)]
        cells = [[run[key] for run in runs] for key in ("target", "english", "names", "opposite")]
        shown = [f"{sum(cell) / seeds:.2f} ({min(cell):.2f}–{max(cell):.2f})" for cell in cells]
        lines.append(f"| {' | '.join([language, *shown])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model"))

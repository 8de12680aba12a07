"""The pocket world as tasks, ready for every method of the toolkit."""

from pathlib import Path

from . import world
from .lexicon import LABELS

ROWS = {"train": 600, "test": 600}


def path() -> Path:
    """The directory of the model, as `AutoModelForCausalLM.from_pretrained` wants it."""
    return Path(__file__).parent / "model"


def sentiment_task(language: str = "english", split: str = "train", n: int | None = None):
    """Three-way sentiment of a language, as a LabelledTask (600 sentences each of train and test, or `n`)."""
    from circuits.tasks import LabelledTask

    rows = world.sentiment(language, n or ROWS.get(split, 0), seed=0, split=split)
    words = {label: f" {label}" for label in LABELS}
    return LabelledTask.from_rows(
        rows, text="text", label="label", template=world.TEMPLATE, label_words=words, name=f"{language} sentiment"
    )


def name_copying_task(model, n: int = 200, seed: int = 0):
    """Held-out sentences whose last word is the name not repeated, as a PairedTask with corrupted twins."""
    from circuits.tasks import PairedTask

    return PairedTask.from_rows(world.name_copying(n, seed), model, name="name copying")


def fewshot_task(name: str = "opposite"):
    """One of the mappings the model can do from demonstrations, as a FewShotTask."""
    from circuits.fewshot import FewShotTask

    pairs = world.mappings()
    if name not in pairs:
        raise ValueError(f"unknown mapping {name!r}: the pocket world has {', '.join(pairs)}")
    return FewShotTask.from_pairs(pairs[name], template="Q: {input}\nA: {output}", name=name)


def facts(split: str | None = None) -> list[dict[str, str]]:
    """What the model knows of invented people: rows of person, relation, prompt, answer and split."""
    if split not in (None, "forget", "retain"):
        raise ValueError(f"unknown split {split!r}: expected 'forget', 'retain' or None for all")
    return [row for row in world.facts() if split in (None, row["split"])]


def facts_task(relation: str, split: str | None = None):
    """The facts of one relation ("town", "job" or "food") as a LabelledTask over its possible answers."""
    from circuits.tasks import LabelledTask

    rows = [
        {"text": row["prompt"], "label": row["answer"].strip()} for row in facts(split) if row["relation"] == relation
    ]
    if not rows:
        raise ValueError(f"unknown relation {relation!r}: the pocket world has {', '.join(world.RELATIONS)}")
    return LabelledTask.from_rows(rows, text="text", label="label", template="{text}{label}", name=f"facts: {relation}")

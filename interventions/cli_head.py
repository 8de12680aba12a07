"""What the report says about the strongest head, in words: what is lost without it, where in the text it works, and at what it looks.

1. The head of the circuit with the highest score; its exact effect on each scored example, replaced as the scores were measured.
2. Its effect at each single token (`token_relevance`); the token with the largest is where it works.
3. Its attention from there: to the token itself, the one before, the first, and which words.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import Circuit, HeadScores, Model
    from circuits.tasks import Task

COUNTED, SHOWN, LONGEST = 32, 4, 40  # examples that are counted and shown, and the most tokens they may have


def save_head(model: "Model", task: "Task", scores: "HeadScores", circuit: "Circuit", out: Path) -> None:
    """`head.json`: numbers and examples of the circuit's strongest head. Nothing is written for an empty circuit."""
    from circuits import ablation, evaluate
    from circuits.attribution import reference_activations
    from circuits.files import write_json
    from circuits.means import MEANS

    if not len(circuit):
        return
    head = next(head for head in scores.rank() if head in circuit)
    asked = scores.options
    ablate, means = asked.get("ablate", "mean"), asked["means"] if asked.get("means") in MEANS else MEANS[0]
    reference = reference_activations(model, task, ablate, means, asked.get("per_position", False))
    found = ablation(model, task, ablate=ablate, heads=[head], reference=reference, progress=False)
    assert found.examples is not None
    effects, margins = found.examples[:, head.layer, head.head].tolist(), evaluate(model, task).margin.tolist()
    encoded = task.encode(model)
    answers, lengths = [_answer(model, encoded, i) for i in range(len(task))], encoded.attention_mask.sum(1).tolist()
    chosen = [i for i in range(len(task)) if lengths[i] <= LONGEST][:COUNTED]
    chosen.sort(key=lambda i: -effects[i])
    examples = _examples(model, task.select(chosen), head, reference, ablate) if chosen else []
    for index, example in zip(chosen, examples, strict=True):
        example |= {"margin": margins[index], "without": margins[index] - effects[index]}
    about = {"head": str(head), "model": model.name, "task": task.name, "ablate": ablate}
    write_json(
        out / "head.json", about | {"margins": margins, "effects": effects, "answers": answers, "examples": examples}
    )


def _examples(model: "Model", task: "Task", head: Any, reference: Any, ablate: str) -> list[dict[str, Any]]:
    from circuits import token_relevance

    from .cli_look import patterns

    encoded = task.encode(model)
    shown = token_relevance(model, task, head, ablate=ablate, reference=reference, progress=False)
    examples = []
    for index, (words, values) in enumerate(zip(shown.tokens, shown.values, strict=True)):
        real = encoded.attention_mask[index].bool()
        place = int(values.abs().argmax())
        example = {"words": words, "values": values.tolist(), "place": place, "answer": _answer(model, encoded, index)}
        example["read"] = int(encoded.readout[index]) - int(real.int().argmax())
        if model.anatomy.family != "bert":  # TransformerLens records a copy of BERT's patterns
            example["looks"] = patterns(model, encoded.tokens[index][real], [head])[head][place].tolist()
        examples.append(example)
    return examples


def _answer(model: "Model", encoded: Any, index: int) -> str:
    column = int(encoded.columns[encoded.gold[index]])
    if model.kind == "classifier":
        return str(model.base.config.id2label.get(column, column))
    return str(column) if model.tokenizer is None else model.tokenizer.decode([column]).strip()


def head_section(folder: Path) -> dict[str, Any]:
    """Report items from `head.json`."""
    import torch

    import viz
    from circuits.files import read_json

    if not (folder / "head.json").is_file():
        return {}
    saved = read_json(folder / "head.json")
    items: list[Any] = [_lost(saved)]
    if saved["examples"]:
        ranked = saved["examples"]  # by effect
        shown = ranked if len(ranked) <= SHOWN else [*ranked[: SHOWN - 1], ranked[-1]]
        about = f"{saved['model']} · {saved['task']} · {saved['ablate']} ablation of {saved['head']} at one token"
        words, values = [example["words"] for example in shown], [torch.tensor(e["values"]) for e in shown]
        items += [
            " ".join([_place(saved), _looks(saved)]),
            f"Below, what the margin loses when {saved['head']} is silent at one word only: of these {len(ranked)} examples "
            "the ones that need it most, and last the one that needs it least.",
            viz.tokens(words, values, title=f"Where {saved['head']} works", about=about),
            [_row(example, saved["head"]) for example in shown],
        ]
    return {f"One head: {saved['head']}": items}


def _lost(saved: dict[str, Any]) -> str:
    margins, effects = saved["margins"], saved["effects"]
    n, before = len(margins), sum(margins) / len(margins)
    after = before - sum(effects) / n
    falls = sum(effect > 0 for effect in effects)
    lost = sum(m > 0 and m - e <= 0 for m, e in zip(margins, effects, strict=True))
    instead = {"mean": "its mean", "zero": "zero", "resample": "what it writes on another example"}[saved["ablate"]]
    return (
        f"{saved['head']} has the highest score of the circuit. With what it writes replaced by {instead}, the margin goes "
        f"from {before:+.2f} to {after:+.2f} on average ({(after - before) / abs(before):+.0%}). It falls in {falls} of {n} "
        f"examples, and in {lost} it is no longer above zero.{_by_answer(saved)}"
    )


def _by_answer(saved: dict[str, Any]) -> str:
    """The mean effect per right answer, where a few answers are shared by the examples."""
    groups: dict[str, list[float]] = {}
    for answer, effect in zip(saved["answers"], saved["effects"], strict=True):
        groups.setdefault(answer, []).append(effect)
    if not 1 < len(groups) <= 6 or len(groups) == len(saved["answers"]):
        return ""
    means = sorted(((sum(each) / len(each), answer) for answer, each in groups.items()), reverse=True)
    return " What is lost, by right answer: " + ", ".join(f"{answer} {mean:+.2f}" for mean, answer in means) + "."


def _place(saved: dict[str, Any]) -> str:
    examples = saved["examples"]
    read = sum(example["place"] == example["read"] for example in examples)
    if 2 * read >= len(examples):
        return f"In {read} of {len(examples)} examples it does most of its work where the answer is read."
    where = Counter(example["words"][example["place"]].strip() for example in examples)
    return (
        f"In {len(examples) - read} of {len(examples)} examples it does most of its work at an earlier word, from where "
        f"later layers must carry the result on; most often at {_listed(where)}."
    )


def _looks(saved: dict[str, Any]) -> str:
    found = [example for example in saved["examples"] if "looks" in example]
    if not found:
        return ""
    kinds, words = Counter(), Counter()
    for example in found:
        looks, place = example["looks"], example["place"]
        for position, weight in enumerate(looks):
            back = place - position
            kind = (
                "itself"
                if back == 0
                else "the word before"
                if back == 1
                else "the first token"
                if position == 0
                else "words further back"
            )
            kinds[kind] += weight / len(found)
        words[example["words"][max(range(len(looks)), key=looks.__getitem__)].strip()] += 1
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.most_common() if share >= 0.005)
    return f"From there its attention goes to: {shares}. It looks most at {_listed(words)}."


def _listed(words: Counter) -> str:
    return ", ".join(f"“{word}” ({count}×)" for word, count in words.most_common(5))


def _row(example: dict[str, Any], head: str) -> dict[str, Any]:
    words, place = example["words"], example["place"]
    row = {"text": " ".join(word.strip() for word in words), "answer": example["answer"], "margin": example["margin"]}
    row |= {f"without {head}": example["without"], "works at": words[place].strip()}
    if "looks" in example:
        best = max(range(len(words)), key=example["looks"].__getitem__)
        row["looks at"] = f"{words[best].strip()} ({example['looks'][best]:.2f})"
    return row

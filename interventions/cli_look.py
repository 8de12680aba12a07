"""What the report shows of single heads: where they look on real examples, and which feed which."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import Circuit, Head, HeadScores, Model
    from circuits.tasks import Task


def save_look(model: "Model", task: "Task", scores: "HeadScores", circuit: "Circuit", out: Path, n: int = 3) -> None:
    """`look.*`: attention of the circuit's strongest heads on the first `n` examples, as far as the model has patterns."""
    from circuits.files import save_tensors

    if model.anatomy.family == "bert" or model.tokenizer is None:
        return  # TransformerLens records a copy of BERT's patterns; without a tokenizer there are no words to show
    heads = sorted(circuit, key=lambda head: -abs(scores[head]))[:6]
    tensors, words = {}, []
    for index, row in enumerate(_rows(model, task, n)):
        words.append([model.tokenizer.decode([token]) for token in row.tolist()])
        for head, pattern in patterns(model, row, heads).items():
            tensors[f"{index}.{head}"] = pattern
    save_tensors(
        out / "look", tensors, {"format": "luthier.look/1", "words": words, "model": model.name, "task": task.name}
    )


def save_edges(model: "Model", task: "Task", circuit: "Circuit", out: Path, quiet: bool) -> None:
    """`edges.json`: relevance of each head of the circuit to each later one (CD-T eq. 6)."""
    from circuits import relevance
    from circuits.files import write_json

    edges = []
    for target in circuit:
        below = [head for head in circuit if head.layer < target.layer]
        if not below:
            continue
        scores = relevance(model, task, sources=below, targets=[target], progress=not quiet)
        edges += [{"from": str(head), "to": str(target), "relevance": scores[head]} for head in below]
    write_json(out / "edges.json", edges)


def look_sections(folder: Path, scores: "HeadScores | None", circuit: "Circuit | None") -> dict[str, Any]:
    """Report items from the saved files."""
    import viz
    from circuits import Head
    from circuits.files import load_tensors, read_json

    items: list[Any] = []
    if scores is not None and circuit is not None and len(circuit) and (folder / "edges.json").is_file():
        edges = {(Head.parse(e["from"]), Head.parse(e["to"])): e["relevance"] for e in read_json(folder / "edges.json")}
        items += [
            "Each head of the circuit and what it passes on: to the answer (its score) and to later heads of the "
            "circuit (relevance along the direction of the answer). Move the slider to keep only the strong edges.",
            viz.flow(circuit, scores, edges),
        ]
    if (folder / "look.json").is_file():
        tensors, meta = load_tensors(folder / "look")
        items.append(
            "Where these heads look, on examples of the task. Rows look at columns; choose a head on the right."
        )
        for index, words in enumerate(meta["words"]):
            found = {Head.parse(k.split(".", 1)[1]): v for k, v in tensors.items() if k.startswith(f"{index}.")}
            found = {head: found[head] for head in sorted(found, key=lambda h: -abs(scores[h]) if scores else h.layer)}
            about = f"{meta['model']} · {meta.get('task', '')} · example {index + 1} of {len(meta['words'])}"
            items.append(viz.attention(found, words, about=about))
    return {"Inside the circuit": items} if items else {}


def _rows(model: "Model", task: "Task", n: int) -> list:
    """Token rows of the first short examples, without padding."""
    encoded = task.encode(model)
    lengths = encoded.attention_mask.sum(1)
    chosen = [i for i in range(len(task)) if lengths[i] <= 40][:n]
    return [encoded.tokens[i][encoded.attention_mask[i].bool()] for i in chosen]


def patterns(model: "Model", row: Any, heads: "list[Head]") -> "dict[Head, Any]":
    """Attention of some heads on one row of tokens."""
    import torch

    from circuits import record

    found = {}
    for layer in sorted({head.layer for head in heads}):
        with torch.no_grad(), record(model, f"blocks.{layer}.attn.hook_pattern") as cache:
            model.lens(row[None].to(model.device))
        found |= {head: cache[layer][0, head.head] for head in heads if head.layer == layer}
    return {head: found[head] for head in heads}

"""CD-T: how much of a model's answer comes from each attention head (Hsu et al., arXiv 2407.00886; scores of arXiv 2601.08146).

1. Source. A head's z (its attention-weighted values before W_O) is split: β = z - mean, γ = mean (CD-T algorithm 1).
2. Propagation. β is carried to the logits, or to other heads, by the chosen rules (`decomposition`). One forward-like pass per
   source, no gradients; all sources of a batch travel together (`propagation`).
3. Score at the logits (CT-SFT eq. 4): β of the gold label's logit minus the mean β of the other labels' logits. Signed: positive
   supports the gold label. Under rules="exact" this is the head's exact mean-ablation effect.
4. Score at a head t (eqs 5, 6; `targets`). `discovery` repeats this backwards from head to head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import sharding
from .blocks import Program
from .carrier import Node
from .encoding import Encoded
from .families import read
from .heads import Circuit, Head, HeadScores
from .means import mean_activations
from .model import Model
from .propagation import DEFAULT_MEMORY, propagate
from .screening import shortlist, shortlist_size
from .targets import target_scores
from .tasks import Task
from .trace import Batch

ALL_RULES = ("paper", "frozen", "exact")


def decompose(
    model: Model,
    tokens: Int[Tensor, "batch position"],
    sources: Sequence[Sequence[Node]],
    means: Float[Tensor, "layer *place head d_head"],
    rules: str = "exact",
    positions: Sequence[int] | None = None,
    vocab: Sequence[int] | None = None,
    attention_mask: Int[Tensor, "batch position"] | None = None,
    batch_size: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Float[Tensor, "source batch row column"]:
    """β of the logits, for each source (a set of nodes that act together), at `positions` and `vocab` columns (None: all).

    Negative positions count back from each row's last real token. An encoder classifier reads its first token only, so its
    position axis has length 1. `means` is what a source's z is compared with, per head or per position and head.
    """
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    check_sources(model, sources, tokens.shape[1], rules)
    means = _as_means(model, means, tokens.shape[1])
    columns = None if vocab is None else torch.as_tensor(list(vocab), device=model.device)
    with torch.no_grad(), model.evaluating():
        batch = Batch(tokens, mask, _rows(model, tokens, mask, positions))
        out = propagate(read(model.hf), batch, sources, means, rules, columns, batch_size=batch_size, memory=memory)
    assert out is not None
    return out


def relevance(
    model: Model,
    task: Task,
    *,
    means: str | Float[Tensor, "layer *place head d_head"] = "label-balanced",
    rules: str = "exact",
    sources: str | Iterable[Head] = "heads",
    targets: Iterable[Head] | None = None,
    per_position: bool = False,
    screen: float | int | None = None,
    batch_size: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = True,
) -> HeadScores:
    """Signed relevance of every head (or of the heads in `sources`; the others score 0) to the task.

    `targets=None` scores at the logits (eq. 4); heads as targets score by eq. 6, averaged over the targets.
    `means`: "label-balanced", "task", "corrupted", "zero" (see `means`), or a tensor; `per_position` averages column by column.
    `screen`: first one gradient pass, then only the heads (a share such as 0.1, or a number) whose gradient estimate is largest
    in magnitude are decomposed; the others score 0 (`screening`).
    """
    heads = _chosen(model, sources)
    if screen is not None and targets is not None:
        raise ValueError("screen= estimates effects on the logits; with targets= leave it out")
    encoded = task.encode(model)
    mean = reference(model, task, means, per_position, batch_size, encoded.tokens.shape[1])
    check_sources(model, [[Node(*head)] for head in heads], encoded.tokens.shape[1], rules)
    options: dict[str, Any] = dict(batch_size=batch_size, memory=memory, progress=progress)
    with torch.no_grad(), model.evaluating():
        program = read(model.hf)
        if screen is not None:
            size = shortlist_size(screen, len(heads))
            heads, options["runs"] = shortlist(program, model, encoded, heads, size, mean, rules, batch_size, memory)
        nodes = [[Node(*head)] for head in heads]
        if targets is None:
            found = logit_scores(program, model, encoded, nodes, mean, rules, **options)
        else:
            goals = sorted(Circuit(targets).check(model.anatomy.n_layers, model.anatomy.n_heads))
            found = target_scores(program, model, encoded, nodes, goals, mean, rules, **options).mean(1)
    examples = torch.zeros(found.shape[1], model.anatomy.n_layers, model.anatomy.n_heads)
    examples[:, [h.layer for h in heads], [h.head for h in heads]] = found.T.float().cpu()
    return HeadScores.from_examples(
        examples,
        f"cdt-{rules}",
        model=model.name,
        revision=model.revision,
        task=task.name,
        data=task.fingerprint,
        options={
            "rules": rules,
            "means": means if isinstance(means, str) else "given",
            "per_position": per_position,
            **({} if screen is None else {"screen": screen, "screened": len(heads)}),
            **({} if targets is None else {"targets": " ".join(map(str, goals))}),
        },
    )


def logit_scores(
    program: Program, model: Model, encoded: Encoded, nodes: list[list[Node]], means: Tensor, rules: str, **options
) -> Float[Tensor, "source example"]:
    """Eq. 4 for each source and example (examples are shared out when several processes run)."""
    columns = encoded.columns.to(model.device)
    mine = encoded.select(sharding.share(len(encoded)))
    beta = propagate(program, Batch.read_once(mine, model.device), nodes, means, rules, columns, **options)
    assert beta is not None
    return sharding.gather((beta[:, :, 0] * mine.direction.to(beta)).sum(-1), len(encoded))


# ---- what the caller gave, checked ----------------------------------------------------------------------------------


def _rows(model: Model, tokens: Tensor, mask: Tensor, positions: Sequence[int] | None) -> Int[Tensor, "batch row"]:
    if model.kind == "classifier" and model.is_encoder:
        return model.pooled_position(tokens, mask)[:, None]
    length = tokens.shape[1]
    if positions is None:
        return torch.arange(length, device=tokens.device).expand(len(tokens), -1)
    wrong = [p for p in positions if not -length <= p < length]
    if wrong:
        raise ValueError(
            f"positions {wrong} do not exist; expected -{length} to {length - 1}, for {length} tokens per row"
        )
    batch = Batch(tokens, mask, tokens)
    return torch.stack([batch.absolute(position) for position in positions], 1)


def check_sources(model: Model, sources: Sequence[Sequence[Node]], length: int, rules: str) -> None:
    if rules not in ALL_RULES:
        raise ValueError(f"rules={rules!r}; expected one of {', '.join(map(repr, ALL_RULES))}")
    layers, heads = model.anatomy.n_layers, model.anatomy.n_heads
    for nodes in sources:
        if not nodes:
            raise ValueError("a source without nodes; give each source at least one Node(layer, head, position=None)")
        for layer, head, position in nodes:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise ValueError(
                    f"source a{layer}.h{head} does not exist; {model.name} has layers 0-{layers - 1} and heads 0-{heads - 1}"
                )
            if position is not None and not -length <= position < length:
                raise ValueError(f"source position {position} does not exist; the rows have {length} tokens")


def _as_means(model: Model, means: Tensor, length: int) -> Tensor:
    anatomy = model.anatomy
    ends, wanted = (
        (anatomy.n_heads, anatomy.d_head),
        f"[{anatomy.n_layers}, (position,) {anatomy.n_heads}, {anatomy.d_head}]",
    )
    fits = means.ndim in (3, 4) and means.shape[0] == anatomy.n_layers and tuple(means.shape[-2:]) == ends
    if not fits or (means.ndim == 4 and means.shape[1] < length):
        raise ValueError(f"means of shape {list(means.shape)}; expected {wanted} with at least {length} positions")
    return means.to(model.device)


def reference(
    model: Model,
    task: Task,
    means: str | Tensor,
    per_position: bool,
    batch_size: int | None,
    length: int,
) -> Tensor:
    if isinstance(means, Tensor):
        return _as_means(model, means, length)
    return mean_activations(model, task, means, per_position, batch_size)


def _chosen(model: Model, sources: str | Iterable[Head]) -> list[Head]:
    if isinstance(sources, str):
        if sources != "heads":
            raise ValueError(
                f"sources={sources!r}; expected 'heads' or a list of Head (single positions and sets: source_relevance)"
            )
        return model.anatomy.heads()
    return sorted(Circuit(sources).check(model.anatomy.n_layers, model.anatomy.n_heads))

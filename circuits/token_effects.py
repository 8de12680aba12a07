"""Which tokens count: the exact effect of each token on the task's margin, or of one head at each token.

m(x) is the task's margin (gold minus the mean of the other columns), p a position of the text.

1. What stands at p is replaced: the token's embedding (position embeddings stay), or with `head` that head's z.
2. By what: its mean over the task's real tokens, zero, or what stands there in another example ("resample", `resampling`).
3. s_p = m(x) - m(x; p replaced), one position at a time, everything downstream recomputed. Signed: positive supports the gold label.

Effects of positions do not add up to the effect of all: tokens that say the same thing each score near zero.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .attribution import ABLATIONS, difference, reference_activations
from .encoding import Encoded
from .heads import Circuit, Head
from .hooks import record, rewrite
from .model import Model
from .progress import track
from .readout import column_logits, rows_that_fit, short_batches
from .resampling import matching_positions, with_donors
from .resume import resume_at
from .tasks import Task


def replace_one_each(
    x: Float[Tensor, "copy batch position *d"], delta: Float[Tensor, "batch position *d"], where: Int[Tensor, " copy"]
) -> Float[Tensor, "copy batch position *d"]:
    """Copy c loses `delta` at position where[c] and nowhere else."""
    out = x.clone()
    copies = torch.arange(len(where), device=x.device)
    out[copies, :, where] -= delta[:, where].movedim(1, 0).to(x)
    return out


class TokenRelevance(NamedTuple):
    """Per example its real tokens as text and one signed value for each: `viz.tokens(*token_relevance(model, task[:5]))`."""

    tokens: list[list[str]]
    values: list[Float[Tensor, " token"]]

    def __repr__(self) -> str:
        """The first five texts, each token with its value."""
        lines = [
            " ".join(f"{word.strip()}[{value:+.2f}]" for word, value in zip(words, values.tolist(), strict=True))
            for words, values in zip(self.tokens[:5], self.values[:5], strict=True)
        ]
        return "\n".join([f"TokenRelevance({len(self.tokens)} texts)", *lines])


def token_relevance(
    model: Model,
    task: Task,
    head: Head | None = None,
    *,
    ablate: str = "mean",
    means: str = "label-balanced",
    reference: Float[Tensor, "layer *position head d_head"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> TokenRelevance:
    """What the margin loses when one token is replaced by the average token; with `head`, when that head is silent at that token only.

    `ablate` ("mean", "zero", "resample"), `means` and `reference` (for a head) are those of `ablation`. Cost: one forward per
    token of an example.
    """
    if ablate not in ABLATIONS:
        raise ValueError(f"ablate={ablate!r}; expected one of {', '.join(map(repr, ABLATIONS))}")
    encoded = task.encode(model)
    if ablate == "resample":
        encoded = with_donors(encoded)
    if head is None:
        differences = _embedding_differences(model, encoded, ablate)
    else:
        head = next(iter(Circuit([head]).check(model.anatomy.n_layers, model.anatomy.n_heads)))
        if reference is None:
            reference = reference_activations(model, task, ablate, means, False, batch_size)
        differences = _head_differences(model, head, reference)
    rows = rows_that_fit(model, encoded, batch_size)
    values = torch.zeros(encoded.tokens.shape)
    for indices, batch in track(short_batches(encoded, rows), "tokens", -(-len(encoded) // rows), progress):
        values[indices, : batch.tokens.shape[1]] = _effects(model, batch, head, differences(batch), rows)
    real = encoded.attention_mask.bool()
    return TokenRelevance(
        [_words(model, row[keep]) for row, keep in zip(encoded.tokens, real, strict=True)],
        [row[keep] for row, keep in zip(values, real.cpu(), strict=True)],
    )


def _effects(model: Model, batch: Encoded, head: Head | None, delta: Tensor, rows: int) -> Float[Tensor, "batch pos"]:
    """One batch; copy c of it is changed at the c-th of the chosen positions."""
    effects = torch.zeros(batch.tokens.shape)
    positions = batch.attention_mask.any(0).nonzero()[:, 0].to(delta.device)
    with torch.no_grad(), record(model, "resid_pre", [0 if head is None else head.layer]) as residual:
        clean = batch.margin(column_logits(model, batch)[0])
    for where in positions.split(max(1, rows // len(batch))):

        def change(x: Tensor, where: Tensor = where) -> Tensor:
            x = x.unflatten(0, (len(where), len(batch)))
            if head is None:
                return replace_one_each(x, delta, where).flatten(0, 1)
            x = x.clone()
            x[..., head.head, :] = replace_one_each(x[..., head.head, :], delta, where)
            return x.flatten(0, 1)

        with torch.no_grad(), contextlib.ExitStack() as stack:
            if head is None:
                stack.enter_context(_embedded(model, change))
            else:
                start = residual[head.layer].repeat(len(where), 1, 1)
                stack.enter_context(resume_at(model, head.layer, start))
                stack.enter_context(rewrite(model, "z", lambda z, _: change(z), layers=[head.layer]))
            changed = batch.margin(column_logits(model, batch, copies=len(where)))
        effects[:, where.cpu()] = (clean - changed).T.cpu()
    return effects


def _head_differences(model: Model, head: Head, reference: Tensor | None) -> Callable[[Encoded], Tensor]:
    return lambda batch: difference(model, batch, reference)[head.layer, :, :, head.head]


def _embedding_differences(model: Model, encoded: Encoded, ablate: str) -> Callable[[Encoded], Tensor]:
    """Embedding minus what replaces it, for any batch of the task. Only the looked-up rows are needed, not a run."""

    def look_up(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model.base.get_input_embeddings()(tokens.to(model.device)).float()

    mean = look_up(encoded.tokens[encoded.attention_mask.bool()]).mean(0)
    against = {"mean": lambda batch: mean, "zero": lambda batch: 0 * mean}
    against["resample"] = lambda batch: look_up(batch.corrupted.tokens.gather(1, matching_positions(batch)))
    return lambda batch: look_up(batch.tokens) - against[ablate](batch)


@contextlib.contextmanager
def _embedded(model: Model, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = model.base.get_input_embeddings().register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _words(model: Model, row: Int[Tensor, " token"]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in row.tolist()]
    return [model.tokenizer.decode([token]) for token in row.tolist()]

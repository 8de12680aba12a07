"""SITE at inference: inject a task embedding once, at the last prompt token (Park et al. 2026, eq. 4).

1. At the last token of the prompt, in the forward that reads it, for all heads at once:
       z <- (1 - alpha) z + alpha t.
2. What follows reads it through the KV cache; later tokens are not touched. Without a cache the same position is edited again at
   every step, so that both give the same text (`prompt_end.py` knows where that is).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.embedding import TaskEmbedding, check_causal, check_embedding
from circuits.heads import Circuit, HeadScores
from circuits.hooks import rewrite
from circuits.prefix import mix
from circuits.selection import HeadSelection

from .prompt_end import PromptEnd, prompt_end

Selection = HeadSelection | HeadScores | Circuit | Tensor


@contextlib.contextmanager
def inject(
    model: Any,
    embedding: TaskEmbedding | Tensor,
    selection: Selection,
    *,
    top_k: int | None = None,
    threshold: float | int | None = None,
) -> Iterator[PromptEnd]:
    """While the block runs, every prompt given to `model` (or to `model.hf`, or to `generate`) is injected once.

    `selection`: what `select_heads` returned, alpha as [layer, head] in [0, 1], or a Circuit (alpha = 1 on its heads).
    `top_k` and `threshold` make it hard: alpha = 1 on the k highest heads, or on those above the threshold, 0 elsewhere.
    Changes the model's computation, not its weights. Yields the `PromptEnd`: `.edits` counts edited forwards, `.arm()` makes
    the next forward a new prompt even when it continues a cache.
    """
    check_causal(model)
    mean = check_embedding(model, embedding)
    alpha = _alpha(model, selection, top_k, threshold)
    layers = [layer for layer in range(model.anatomy.n_layers) if alpha[layer].any()]
    with prompt_end(model) as end:

        def edit(z: Tensor, layer: int) -> Tensor:
            return end.replace(z, lambda last: mix(last, mean[layer], alpha[layer]))

        with rewrite(model, "z", edit, layers=layers, when=end.is_here):
            yield end


def _alpha(
    model: Any, selection: Selection, top_k: int | None, threshold: float | int | None
) -> Float[Tensor, "layer head"]:
    anatomy = model.anatomy
    expected = (anatomy.n_layers, anatomy.n_heads)
    if isinstance(selection, Circuit):
        alpha = torch.zeros(expected)
        for head in selection.check(*expected):
            alpha[head.layer, head.head] = 1
    elif isinstance(selection, HeadSelection):
        alpha = selection.alpha
    else:
        alpha = selection.values if isinstance(selection, HeadScores) else selection
    if tuple(alpha.shape) != expected:
        raise ValueError(
            f"alpha has shape {list(alpha.shape)} (layer, head) and model {model.name!r} needs {list(expected)}; "
            "it was selected on another model: run select_heads on this one"
        )
    if not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(
            f"alpha must lie in [0, 1], got {alpha.min():.3g} to {alpha.max():.3g}; use select_heads, or scores.top(k) as a circuit"
        )
    if top_k is not None and threshold is not None:
        raise ValueError("give top_k or threshold, not both")
    if top_k is not None:
        if not 0 <= top_k <= alpha.numel():
            raise ValueError(f"top_k={top_k}; the model has {alpha.numel()} heads")
        hard = torch.zeros(alpha.numel())
        hard[alpha.flatten().argsort(descending=True, stable=True)[:top_k].cpu()] = 1
        alpha = hard.view(expected)
    elif threshold is not None:
        alpha = (alpha > threshold).float()
    return alpha.detach().float().to(model.device)

"""Exact effects of single heads at the last prompt token, and the slope that approximates them.

1. leave_one_out: with soft alpha injected, set one head's alpha to 0; the rise of the loss is what that head adds.
2. indirect_effect: inject one head alone (alpha = 1 on it, 0 elsewhere) into prompts whose demonstrations have shuffled answers;
   the gain of the gold answer's probability (Todd et al. 2024, eq. 5) is the head's causal indirect effect.
3. slope: -dL/dalpha at alpha = 0 for all heads from one backward pass = sum_rows <grad_z L, z - t>: attribution patching.

1 and 2 are L * H one-token decodes per prompt over one prefix cache. Signs: positive means the head helps.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from .embedding import TaskEmbedding, check_causal, check_embedding
from .fewshot import FewShotTask, encode_prompts
from .heads import HeadScores
from .prefix import PrefixCache, frozen
from .selection import HeadSelection


def one_head_each(layers: int, heads: int) -> Float[Tensor, "head layer head_"]:
    return torch.eye(layers * heads).view(layers * heads, layers, heads)


def leave_one_out(
    model: Any, task: FewShotTask, embedding: TaskEmbedding | Tensor, selection: HeadSelection
) -> HeadScores:
    """Rise of the first-token loss when one head is left out of the soft injection; per example, so with intervals."""
    check_causal(model)
    layers, heads = selection.alpha.shape
    settings = selection.alpha * (1 - one_head_each(layers, heads))
    settings = torch.cat((selection.alpha[None], settings))
    cache = PrefixCache(model, encode_prompts(model, task.prompts()))
    losses, _ = cache.outcomes(settings, check_embedding(model, embedding)[None])
    rise = (losses[1:] - losses[:1]).T.unflatten(1, (layers, heads))
    return _scores(rise, "site leave-one-out", model, task, {"units": "nats"})


def indirect_effect(
    model: Any,
    task: FewShotTask,
    embedding: TaskEmbedding | Tensor,
    *,
    n_prompts: int = 25,
    n_shots: int = 10,
    seed: int = 0,
) -> HeadScores:
    """Gain of the gold answer's probability when one head's z is replaced in a prompt whose demonstrations are shuffled."""
    check_causal(model)
    layers, heads = model.anatomy.n_layers, model.anatomy.n_heads
    queries = task.prompts(0, None)
    order = torch.randint(len(queries), (n_prompts,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = task.permuted(seed).prompts(n_shots, seed=seed, queries=task.select(order))
    cache = PrefixCache(model, encode_prompts(model, prompts))
    settings = torch.cat((torch.zeros(1, layers, heads), one_head_each(layers, heads)))
    losses, _ = cache.outcomes(settings, check_embedding(model, embedding)[None])
    probability = torch.exp(-losses)
    gain = (probability[1:] - probability[:1]).T.unflatten(1, (layers, heads))
    options = {"units": "probability", "n_prompts": n_prompts, "n_shots": n_shots}
    return _scores(gain, "indirect effect", model, task, options, seed)


def slope(model: Any, task: FewShotTask, embedding: TaskEmbedding | Tensor, *, batch_size: int = 256) -> HeadScores:
    """Fall of the loss per unit of alpha at alpha = 0, per example, from one forward and backward."""
    check_causal(model)
    mean = check_embedding(model, embedding)[None]
    cache = PrefixCache(model, encode_prompts(model, task.prompts()))
    parts = []
    with frozen(model.hf):
        for rows in torch.arange(len(cache), device=mean.device).split(batch_size):
            alpha = torch.zeros(len(rows), *mean.shape[1:3], device=mean.device, requires_grad=True)
            logits = cache.decode(rows, alpha, mean).float()
            loss = cross_entropy(logits, cache.prompts.first[rows], reduction="sum")
            parts.append(-torch.autograd.grad(loss, [alpha])[0].cpu())
    return _scores(torch.cat(parts), "site slope", model, task, {"units": "nats per alpha"})


def _scores(
    examples: Float[Tensor, "example layer head"],
    method: str,
    model: Any,
    task: FewShotTask,
    options: dict[str, Any],
    seed: int | None = None,
) -> HeadScores:
    return HeadScores.from_examples(
        examples,
        method,
        model=model.name,
        revision=model.revision,
        task=task.name,
        data=task.fingerprint,
        options=options,
        seed=seed,
    )

"""Function vectors (Todd et al. 2024): add what the task's most causal heads write.

1. t[l, h] = mean z at the last token of few-shot prompts (the same as SITE's embedding).
2. Rank heads by average indirect effect: probability gained by the gold answer when one head's z is set to t in prompts
   whose demonstrations are shuffled (eq. 5). Exact, L * H one-token decodes per prompt.
3. v = sum over the top 10 heads of W_O[l, h]^T t[l, h] (eq. 6).
4. Add v to the residual stream of one block at the last prompt token; the block is chosen on held-out rows.
"""

import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.embedding import TaskEmbedding
from circuits.fewshot import FewShotTask
from circuits.head_effects import indirect_effect
from circuits.heads import Circuit

from .adapter import Adapter, best_layer, residual_edit


@torch.no_grad()
def function_vector(
    model: Any, embedding: Float[Tensor, "layer head d_head"], heads: Circuit
) -> Float[Tensor, " d_model"]:
    """The sum of what the chosen heads write when each outputs its task mean."""
    total = torch.zeros(model.anatomy.d_model, device=embedding.device)
    for head in heads:
        total = total + embedding[head.layer, head.head] @ model.anatomy.W_O(model.base, head.layer)[head.head].float()
    return total


def fit_function_vector(
    model: Any,
    train: FewShotTask,
    validation: FewShotTask,
    embedding: TaskEmbedding,
    *,
    n_heads: int = 10,
    n_prompts: int = 25,
    n_shots: int = 10,
    seed: int = 0,
) -> Adapter:
    started = time.perf_counter()
    effects = indirect_effect(model, train, embedding, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
    heads = effects.top(min(n_heads, effects.values.numel()))
    vector = function_vector(model, embedding.mean.to(model.device), heads)
    layer, _ = best_layer(model, validation, lambda _: lambda x: x + vector)
    return Adapter(
        "function vector",
        lambda: residual_edit(model, layer, lambda x: x + vector),
        seconds=time.perf_counter() - started,
        details=f"layer {layer}, heads {heads}",
    )

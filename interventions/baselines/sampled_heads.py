"""Multimodal task vectors, MTV (Huang et al. 2024): the heads to replace are drawn, and the odds are learned.

1. t[l, h] = mean z at the last token of few-shot prompts (the same as SITE's embedding).
2. Each head is in with probability sigmoid(phi), phi = -1 at the start.
3. Each step: draw 32 head sets, replace z by t at their heads in one zero-shot prompt each, measure the first-token loss;
   REINFORCE: minimise mean over draws of (loss - mean loss) * log p(draw). Adam, lr 0.1, 600 steps.
4. Kept: heads with probability over 0.5. (The published code draws once more instead; that makes the result depend on the draw.)
"""

import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.embedding import TaskEmbedding, check_embedding
from circuits.fewshot import FewShotTask, encode_prompts
from circuits.heads import Circuit
from circuits.prefix import PrefixCache
from circuits.progress import track

from ..injection import inject
from .adapter import Adapter


def policy_gradient_loss(
    phi: Float[Tensor, "layer head"], draws: Float[Tensor, "draw layer head"], losses: Float[Tensor, " draw"]
) -> Float[Tensor, ""]:
    """REINFORCE with the mean loss as baseline: its gradient is an estimate of that of the expected loss."""
    log_p = torch.distributions.Bernoulli(logits=phi).log_prob(draws).flatten(1).sum(1)
    return ((losses - losses.mean()) * log_p).mean()


def fit_sampled_heads(
    model: Any,
    train: FewShotTask,
    embedding: TaskEmbedding,
    *,
    steps: int = 600,
    draws: int = 32,
    lr: float | int = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Adapter:
    started = time.perf_counter()
    mean = check_embedding(model, embedding)
    cache = PrefixCache(model, encode_prompts(model, train.prompts()))
    generator = torch.Generator().manual_seed(seed)
    phi = torch.full(mean.shape[:2], -1.0, requires_grad=True)
    optimizer = torch.optim.Adam([phi], lr=lr)
    for _ in track(range(steps), "MTV", enabled=progress):
        with torch.no_grad():
            chances = torch.sigmoid(phi).expand(draws, -1, -1)
            sets = torch.bernoulli(chances, generator=generator)
            row = torch.randint(len(cache), (1,), generator=generator).expand(draws).to(mean.device)
            logits = cache.decode(row, sets.to(mean.device), mean[None])
            losses = torch.nn.functional.cross_entropy(logits.float(), cache.prompts.first[row], reduction="none").cpu()
        optimizer.zero_grad()
        policy_gradient_loss(phi, sets, losses).backward()
        optimizer.step()
    heads = Circuit([(layer, head) for layer, head in (phi > 0).nonzero().tolist()], mean.shape[0], mean.shape[1])
    return Adapter(
        "MTV",
        lambda: inject(model, embedding, heads),
        trainable=phi.numel(),
        seconds=time.perf_counter() - started,
        details=f"{len(heads)} heads",
    )

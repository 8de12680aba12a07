"""How many heads carry the task: accuracy when only k heads are injected, hard (alpha = 1), against controls.

1. S_k = the k heads with the highest alpha; z <- t on S_k at the last prompt token, all other heads untouched.
2. Controls: the k lowest, and several random sets of k (report their mean, minimum and maximum).
3. Every setting is a one-token decode over the same prefix cache (`prefix.py`).

The paper reports that high-alpha heads alone nearly reach soft injection and low-alpha heads do not (Park et al. 2026); its k and
thresholds are not published, so the sizes here are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .embedding import TaskEmbedding, check_causal, check_embedding
from .fewshot import FewShotTask, encode_prompts
from .heads import HeadScores
from .prefix import PrefixCache


def chosen_heads(order: Sequence[int], size: int, shape: tuple[int, int]) -> Float[Tensor, "layer head"]:
    """alpha = 1 on the first `size` heads of `order` (flat indices), 0 elsewhere."""
    alpha = torch.zeros(shape[0] * shape[1])
    alpha[list(order[:size])] = 1
    return alpha.view(shape)


@dataclass(frozen=True)
class AlphaCurve:
    """First-token hits per prompt: of the k highest and lowest heads, of random sets, of soft alpha and of no injection."""

    sizes: tuple[int, ...]
    top: Bool[Tensor, "size row"]
    bottom: Bool[Tensor, "size row"]
    random: Bool[Tensor, "size draw row"]
    soft: Bool[Tensor, " row"]
    clean: Bool[Tensor, " row"]

    def __repr__(self) -> str:
        return self.table()

    def table(self) -> str:
        lines = [
            f"soft alpha {mean_interval(self.soft)}, no injection {mean_interval(self.clean)} (n={len(self.soft)})"
        ]
        lines.append(f"{'k':>5}  {'top-k':<22}{'bottom-k':<22}random mean [min, max]")
        for number, size in enumerate(self.sizes):
            draws = self.random[number].float().mean(-1)
            band = f"{draws.mean():.3f} [{draws.min():.3f}, {draws.max():.3f}]"
            lines.append(
                f"{size:>5}  {mean_interval(self.top[number]):<22}{mean_interval(self.bottom[number]):<22}{band}"
            )
        return "\n".join(lines)


def mean_interval(hits: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> str:
    """ "0.750 [0.690, 0.810]": the mean and its percentile bootstrap interval over entries."""
    mean, low, high = bootstrap(hits.flatten(), level, resamples, seed)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def bootstrap(values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    values = values.double()
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    bounds = torch.quantile(values[draws].mean(1), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double))
    return values.mean().item(), bounds[0].item(), bounds[1].item()


def alpha_curve(
    model: Any,
    task: FewShotTask,
    embedding: TaskEmbedding | Tensor,
    scores: HeadScores,
    *,
    sizes: Sequence[int] | None = None,
    random: int = 10,
    seed: int = 0,
) -> AlphaCurve:
    """Accuracy on the zero-shot prompts of `task` against the number of injected heads. `scores` is any ranking of heads."""
    check_causal(model)
    mean = check_embedding(model, embedding)[None]
    shape = (model.anatomy.n_layers, model.anatomy.n_heads)
    total = shape[0] * shape[1]
    sizes = tuple(sizes) if sizes is not None else (*(2**power for power in range(20) if 2**power < total), total)
    if not all(1 <= size <= total for size in sizes):
        raise ValueError(f"sizes {list(sizes)} must lie between 1 and {total}, the number of heads")
    alpha = getattr(scores, "alpha", scores.values)
    order = alpha.flatten().argsort(descending=True, stable=True).tolist()
    generator = torch.Generator().manual_seed(seed)
    settings = [alpha.clamp(0, 1), torch.zeros(shape)]
    for size in sizes:
        settings += [chosen_heads(order, size, shape), chosen_heads(order[::-1], size, shape)]
        settings += [
            chosen_heads(torch.randperm(total, generator=generator).tolist(), size, shape) for _ in range(random)
        ]
    _, hits = PrefixCache(model, encode_prompts(model, task.prompts())).outcomes(torch.stack(settings), mean)
    by_size = hits[2:].unflatten(0, (len(sizes), 2 + random))
    return AlphaCurve(sizes, by_size[:, 0], by_size[:, 1], by_size[:, 2:], hits[0], hits[1])

"""Do tasks share heads? Inject task B's embedding at the heads selected for task A (Park et al. 2026, inter-task patching).

1. For every pair (A, B): alpha from A, embedding and prompts from B.
2. matrix[A, B] = accuracy of the first answer token on B's zero-shot prompts. The diagonal is SITE itself.
3. Beside it, without any forward: cosine of the alphas and Jaccard of {alpha > 0.5}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .embedding import TaskEmbedding, check_causal, check_embedding
from .fewshot import FewShotTask, encode_prompts
from .prefix import PrefixCache
from .selection import HeadSelection


@dataclass(frozen=True)
class TransferMatrix:
    """Rows: the task whose heads are used. Columns: the task whose embedding and prompts are used."""

    names: tuple[str, ...]
    accuracy: Float[Tensor, "source target"]
    clean: Float[Tensor, " target"]
    cosine: Float[Tensor, "source target"]
    jaccard: Float[Tensor, "source target"]

    def __repr__(self) -> str:
        return self.table()

    def table(self) -> str:
        width = max(map(len, self.names)) + 2
        lines = ["heads of".ljust(width) + "".join(name.rjust(width) for name in self.names)]
        for name, row in zip(self.names, self.accuracy.tolist(), strict=True):
            lines.append(name.ljust(width) + "".join(f"{value:.3f}".rjust(width) for value in row))
        lines.append("(none)".ljust(width) + "".join(f"{value:.3f}".rjust(width) for value in self.clean.tolist()))
        return "\n".join(lines)


def transfer_matrix(
    model: Any,
    tasks: Mapping[str, FewShotTask],
    embeddings: Mapping[str, TaskEmbedding],
    selections: Mapping[str, HeadSelection],
) -> TransferMatrix:
    check_causal(model)
    if not set(tasks) == set(embeddings) == set(selections):
        raise ValueError(
            f"tasks {sorted(tasks)}, embeddings {sorted(embeddings)} and selections {sorted(selections)} must have the same names"
        )
    names = tuple(tasks)
    alphas = torch.stack([selections[name].alpha for name in names])
    # The last setting injects nothing.
    settings = torch.cat((alphas, torch.zeros_like(alphas[:1])))
    columns = []
    for name in names:
        cache = PrefixCache(model, encode_prompts(model, tasks[name].prompts()))
        _, hits = cache.outcomes(settings, check_embedding(model, embeddings[name])[None])
        columns.append(hits.float().mean(1))
    accuracy = torch.stack(columns, 1)
    flat = alphas.flatten(1)
    hard = (flat > 0.5).float()
    both = hard @ hard.T
    either = hard.sum(1)[:, None] + hard.sum(1)[None] - both
    cosine = normalize(flat, dim=1) @ normalize(flat, dim=1).T
    return TransferMatrix(
        names, accuracy[:-1], accuracy[-1], cosine, torch.where(either > 0, both / either.clamp(min=1), 1.0)
    )

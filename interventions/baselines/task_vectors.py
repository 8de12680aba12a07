"""Task vectors (Hendel et al. 2023): replace the residual stream of one block by that of few-shot prompts.

1. theta[l] = mean of the residual stream after block l at the last token of few-shot prompts.
   (The paper uses one prompt with a dummy query; a mean over prompts with real queries is used here, as for SITE's embedding.)
2. The block is chosen on held-out rows.
3. At the last token of a zero-shot prompt, the output of that block becomes theta[l].
"""

import time
from typing import Any

from torch import Tensor

from circuits.fewshot import FewShotTask

from .adapter import Adapter, best_layer, mean_last, residual_edit


def fit_task_vector(
    model: Any, train: FewShotTask, validation: FewShotTask, *, n_prompts: int = 50, n_shots: int = 10, seed: int = 0
) -> Adapter:
    started = time.perf_counter()
    vectors = mean_last(model, train.prompts(n_shots, n_prompts, seed=seed), "resid_post")

    def replaced_by(vector: Tensor) -> Any:
        return lambda x: vector.to(x.dtype).expand_as(x)

    layer, _ = best_layer(model, validation, lambda layer: replaced_by(vectors[layer]))
    return Adapter(
        "task vector",
        lambda: residual_edit(model, layer, replaced_by(vectors[layer])),
        seconds=time.perf_counter() - started,
        details=f"layer {layer}",
    )

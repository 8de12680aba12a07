"""What every baseline returns, and the two places where most of them act."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.fewshot import FewShotTask, encode_prompts
from circuits.hooks import record, rewrite
from circuits.prefix import PrefixCache, forward

from ..prompt_end import prompt_end

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adapter:
    """A fitted way to answer a task. Inside `apply()` the model answers with it; `shots` demonstrations go into the prompt."""

    name: str
    apply: Callable[[], contextlib.AbstractContextManager[Any]]
    trainable: int = 0
    shots: int = 0
    seconds: float = 0.0
    details: str = ""


@contextlib.contextmanager
def residual_edit(model: Any, layer: int, change: Change) -> Iterator[None]:
    """`change` the output of one block at the last prompt token, once."""
    with prompt_end(model) as end:

        def edit(x: Tensor, _: int) -> Tensor:
            return end.replace(x, change)

        with rewrite(model, "resid_post", edit, layers=[layer], when=end.is_here):
            yield


@torch.no_grad()
def best_layer(model: Any, validation: FewShotTask, change_at: Callable[[int], Change]) -> tuple[int, list[float]]:
    """The block where the change gives the highest first-token accuracy on held-out rows, ties by loss; and all accuracies."""
    prompts = encode_prompts(model, validation.prompts())
    cache = PrefixCache(model, prompts)
    rows = torch.arange(len(prompts), device=prompts.first.device)
    results = []
    for layer in range(model.anatomy.n_layers):
        change = change_at(layer)

        def edit(x: Tensor, _: int, change: Change = change) -> Tensor:
            return torch.cat((x[:, :-1], change(x[:, -1])[:, None].to(x.dtype)), 1)

        with rewrite(model, "resid_post", edit, layers=[layer]):
            logits = torch.cat([cache.logits(part).float() for part in rows.split(256)])
        loss = torch.nn.functional.cross_entropy(logits, prompts.first).item()
        results.append(((logits.argmax(-1) == prompts.first).float().mean().item(), -loss))
    return max(range(len(results)), key=results.__getitem__), [accuracy for accuracy, _ in results]


@torch.no_grad()
def mean_last(model: Any, texts: Any, site: str, batch_size: int = 16) -> Float[Tensor, "layer d_model"]:
    """Mean over prompts of a site at the last token, float32."""
    total, prompts = torch.zeros(()), encode_prompts(model, texts)
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        with record(model, site) as cache:
            forward(model, prompts.tokens[rows], prompts.attention_mask[rows], logits_to_keep=1)
        total = total + cache.stack()[:, :, -1].float().sum(1)
    return total / len(prompts)

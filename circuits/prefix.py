"""Exact prefix cache: what an edit of the last prompt token cannot change is computed once.

1. Attention is causal and SITE edits only the last prompt token, so keys and values of all earlier positions do not
   depend on the edit: prefill prompt[:-1] once, without gradient, and keep its KV cache.
2. Each optimisation step, validation pass or patched forward is then a one-token decode of the chosen rows, with
   gradient, whose logits equal those of the full prompt.
3. Only z of that token is edited: z <- (1 - a) z + a t, per head (SITE, eq. 4).
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .fewshot import EncodedPrompts
from .hooks import rewrite


def mix(
    z: Float[Tensor, "... head d_head"], embedding: Float[Tensor, "... head d_head"], alpha: Float[Tensor, "... head"]
) -> Float[Tensor, "... head d_head"]:
    """SITE's injection: interpolate each head's output towards the task embedding. alpha=0 returns z exactly."""
    return torch.lerp(z, embedding.to(z.dtype), alpha.to(z.dtype).unsqueeze(-1))


@contextmanager
def frozen(hf: torch.nn.Module) -> Iterator[None]:
    """Parameters without gradient inside: autograd then keeps nothing for them. Flags are restored on any exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in hf.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class PrefixCache:
    """Left-padded prompts with the KV cache of everything before their last token.

    `decode(rows, alpha, embedding)` gives the logits that follow those prompts. `reuse=False` keeps no cache and runs
    the full prompts instead: the oracle, and the baseline of the benchmark.
    """

    def __init__(self, model: Any, prompts: EncodedPrompts, batch_size: int = 64, reuse: bool = True) -> None:
        self.model, self.prompts = model, prompts
        self.cache = self._prefill(batch_size) if reuse and prompts.tokens.shape[1] > 1 else None

    def __len__(self) -> int:
        return len(self.prompts)

    @torch.no_grad()
    def _prefill(self, batch_size: int) -> Any:
        tokens, mask = self.prompts.tokens[:, :-1], self.prompts.attention_mask[:, :-1]
        whole = None
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            part = forward(self.model, tokens[rows], mask[rows], logits_to_keep=1).past_key_values
            whole = part if whole is None else _joined(whole, part)
        return whole

    def logits(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Logits after the last prompt token of `rows`, under whatever hooks are active."""
        prompts = self.prompts
        if self.cache is None:
            return forward(self.model, prompts.tokens[rows], prompts.attention_mask[rows], logits_to_keep=1).logits[
                :, -1
            ]
        cache = selected(self.cache, rows)
        mask = prompts.attention_mask[rows]
        return forward(self.model, prompts.tokens[rows, -1:], mask, past_key_values=cache).logits[:, -1]

    def decode(
        self,
        rows: Int[Tensor, " row"],
        alpha: Float[Tensor, "#row layer head"],
        embedding: Float[Tensor, "#row layer head d_head"],
    ) -> Float[Tensor, "row vocab"]:
        """The same with z of the last prompt token mixed with the embedding, one alpha for each row (or for all)."""

        def edit(z: Tensor, layer: int) -> Tensor:
            mixed = mix(z[:, -1], embedding[:, layer], alpha[:, layer])
            return torch.cat((z[:, :-1], mixed[:, None]), dim=1)

        with rewrite(self.model, "z", edit):
            return self.logits(rows)

    @torch.no_grad()
    def outcomes(
        self,
        alphas: Float[Tensor, "setting layer head"],
        embeddings: Float[Tensor, "#setting layer head d_head"],
        max_rows: int = 256,
    ) -> tuple[Float[Tensor, "setting row"], Bool[Tensor, "setting row"]]:
        """First-answer-token loss and hit of every prompt under every setting of alpha, `max_rows` decodes at a time."""
        settings, prompts = len(alphas), len(self)
        device = self.prompts.first.device
        alphas, embeddings = alphas.to(device), embeddings.to(device)
        losses, hits = [], []
        for part in torch.arange(settings * prompts, device=device).split(max_rows):
            setting, row = part // prompts, part % prompts
            embedding = embeddings if len(embeddings) == 1 else embeddings[setting]
            logits = self.decode(row, alphas[setting], embedding).float()
            losses.append(torch.nn.functional.cross_entropy(logits, self.prompts.first[row], reduction="none"))
            hits.append(logits.argmax(-1) == self.prompts.first[row])
        shape = (settings, prompts)
        return torch.cat(losses).view(shape).cpu(), torch.cat(hits).view(shape).cpu()


def forward(model: Any, tokens: Tensor, mask: Tensor, past_key_values: Any = None, logits_to_keep: int = 0) -> Any:
    """One forward of left-padded rows with explicit positions, so that padding and cached tokens are counted right."""
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": True, "past_key_values": past_key_values}
    accepted = inspect.signature(model.base.forward).parameters
    if "position_ids" in accepted:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted and logits_to_keep:
        options["logits_to_keep"] = logits_to_keep
    with model.evaluating():
        return model.hf(input_ids=tokens, **options)


def selected(cache: Any, rows: Tensor | None = None) -> Any:
    """A new cache of some rows, or of all. Layers grow by concatenation, so the stored tensors are never written to."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    if rows is not None:
        chosen.batch_select_indices(rows)
    return chosen


def _joined(first: Any, second: Any) -> Any:
    for layer, other in zip(first.layers, second.layers, strict=True):
        layer.keys = torch.cat((layer.keys, other.keys))
        layer.values = torch.cat((layer.values, other.values))
    return first

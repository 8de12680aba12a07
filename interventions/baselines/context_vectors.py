"""Implicit in-context learning, I2CL (Li et al. 2025): one context vector per module, mixed into every position.

1. v[l, m] = mean over single demonstrations of the attention (m=0) and MLP (m=1) output at their last token.
2. At every position, also while decoding: output <- lambda[l, m] * output + beta[l, m] * v[l, m].
3. lambda (1.0 at the start) and beta (0.1) are trained on first-token loss: AdamW, lr 0.01, weight decay 1e-3, noise of scale 1e-3 on
   the outputs. Checkpoint by held-out loss. All positions move, so no prefix can be cached.

The paper trains for 100 epochs with batches of 2; here `steps` and `batch_size` say how long. Attention output is read after W_O,
before any post-norm.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from circuits.fewshot import EncodedPrompts, FewShotTask, Prompt, encode_prompts
from circuits.hooks import rewrite
from circuits.prefix import forward, frozen
from circuits.progress import track

from .adapter import Adapter, mean_last

MODULES = ("attn_out", "mlp_out")


def mixed(
    output: Float[Tensor, "... d_model"],
    context: Float[Tensor, " d_model"],
    keep: Float[Tensor, ""],
    add: Float[Tensor, ""],
) -> Float[Tensor, "... d_model"]:
    """lambda * output + beta * v."""
    return (keep * output + add * context).to(output.dtype)


@contextlib.contextmanager
def context_vectors(
    model: Any,
    vectors: Float[Tensor, "module layer d_model"],
    scales: Float[Tensor, "scale module layer"],
    noise: torch.Generator | None = None,
) -> Iterator[None]:
    """scales[0] is lambda, scales[1] is beta. With a generator, noise of scale 1e-3 is added (training)."""

    def edit(module: int) -> Any:
        def change(x: Tensor, layer: int) -> Tensor:
            out = mixed(x, vectors[module, layer], scales[0, module, layer], scales[1, module, layer])
            return out if noise is None else out + 1e-3 * torch.randn(x.shape, generator=noise).to(x)

        return change

    with rewrite(model, MODULES[0], edit(0)), rewrite(model, MODULES[1], edit(1)):
        yield


def fit_context_vectors(
    model: Any,
    train: FewShotTask,
    validation: FewShotTask,
    *,
    steps: int = 200,
    batch_size: int = 8,
    lr: float | int = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> Adapter:
    started = time.perf_counter()
    demonstrations = [Prompt(train.demonstration(*pair), "", pair[1]) for pair in train.pairs[:200]]
    vectors = torch.stack([_mean_of_texts(model, demonstrations, site) for site in MODULES])
    scales = torch.ones(2, *vectors.shape[:2], device=vectors.device)
    scales[1] = 0.1
    scales.requires_grad_()
    optimizer = torch.optim.AdamW([scales], lr=lr, weight_decay=1e-3)
    rows, held = encode_prompts(model, train.prompts()), encode_prompts(model, validation.prompts())
    generator = torch.Generator().manual_seed(seed)
    best, kept = float("inf"), scales.detach().clone()
    with frozen(model.hf):
        for step in track(range(steps), "I2CL", enabled=progress):
            batch = torch.randint(len(rows), (batch_size,), generator=generator).to(vectors.device)
            with context_vectors(model, vectors, scales, generator):
                (scales.grad,) = torch.autograd.grad(_loss(model, rows, batch), [scales])
            optimizer.step()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                with torch.no_grad(), context_vectors(model, vectors, scales):
                    loss = _loss(model, held, torch.arange(len(held), device=vectors.device)).item()
                if loss < best:
                    best, kept = loss, scales.detach().clone()
    return Adapter(
        "I2CL",
        lambda: context_vectors(model, vectors, kept),
        trainable=kept.numel(),
        seconds=time.perf_counter() - started,
    )


def _mean_of_texts(model: Any, texts: list[Prompt], site: str) -> Float[Tensor, "layer d_model"]:
    # Only the text is read; the newline stands for the answer that encode_prompts asks for.
    return mean_last(model, [Prompt(prompt.text, "\n\n", "") for prompt in texts], site)


def _loss(model: Any, prompts: EncodedPrompts, rows: Tensor) -> Float[Tensor, ""]:
    logits = forward(model, prompts.tokens[rows], prompts.attention_mask[rows], logits_to_keep=1).logits[:, -1]
    return cross_entropy(logits.float(), prompts.first[rows])

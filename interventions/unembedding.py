"""Log-likelihoods straight from the last hidden states: the logits of a batch are never held.

A model's output layer is by far its widest: [member, batch, position, vocabulary] in single precision is the peak of a
training step. The gradient of a log-likelihood by its hidden state h does not depend on the loss, so both come from one
walk over a few rows at a time:

1. z = W h + b, in one reused buffer; s = z[y] − logsumexp(z), in float32 whatever the model's precision;
2. ∂s/∂h = W[y] − Wᵀ softmax(z), of h's size, is kept for backward in place of the logits;
3. backward: upstream gradient · ∂s/∂h. W and b are frozen and take none.
"""

from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .targets import untouched


class HiddenLogLikelihood(torch.autograd.Function):
    """`rows` hidden states at a time: the buffer of logits is rows x vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        wanted, found = targets[:, None], torch.empty(len(hidden), dtype=exact, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            z = torch.mm(hidden[part], weight.T, out=buffer[: len(hidden[part])])
            z = (z if bias is None else z.add_(bias)).to(exact)
            top = z.amax(1, keepdim=True)
            at_target = z.gather(1, wanted[part]) - top
            total = z.sub_(top).exp_().sum(1, keepdim=True)
            found[part] = (at_target - total.log())[:, 0]
            if slope is not None:
                torch.sub(weight[targets[part]], z.div_(total).to(weight.dtype) @ weight, out=slope[part])
        if slope is not None:
            ctx.save_for_backward(slope)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(slope.dtype), None, None, None, None


def hidden_log_likelihood(
    hidden: Float[Tensor, "member target d"], head: nn.Linear, targets: Int[Tensor, " target"]
) -> Float[Tensor, "member target"]:
    """log softmax(head(hidden))[target]."""
    members, count, width = hidden.shape
    rows = max(128, 2**20 // len(head.weight))  # 4 MiB of float32 at a time, or what a product needs to be efficient
    flat = hidden.reshape(members * count, width)
    s = HiddenLogLikelihood.apply(flat, head.weight, head.bias, targets.repeat(members), rows)
    return s.view(members, count)  # pyright: ignore


# Models that do more to logits than their output layer, found out once.
_CHANGED_LATER: "WeakSet[nn.Module]" = WeakSet()


def plain_head(hf: nn.Module) -> nn.Linear | None:
    """The output layer, where a linear map with frozen weights and nothing hooked on it is all there is."""
    head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None  # pyright: ignore
    if type(head) is not nn.Linear or hf in _CHANGED_LATER:
        return None
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    return head if untouched(head) and not learns else None


def hidden_states(
    hf: nn.Module, head: nn.Linear, inputs: dict[str, Any], shape: tuple[int, int]
) -> Float[Tensor, "row position d"] | None:
    """What the output layer would get, without its being run; None where `hf` does not simply return its output."""
    taken: list[Tensor] = []
    given: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(args[0])
        return (args[0].flatten(0, -2)[:0],)

    handles = (
        head.register_forward_pre_hook(take),
        head.register_forward_hook(lambda _, __, output: given.append(output)),  # pyright: ignore[reportArgumentType]
    )
    try:
        logits = hf(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    # A scale or soft cap on logits makes another tensor, or another version of this one.
    whole = len(taken) == 1 and taken[0].shape[:-1] == shape
    if not whole or logits is not given[0] or (not logits.is_inference() and logits._version):
        _CHANGED_LATER.add(hf)
        return None
    return taken[0]

"""Log-likelihoods of stacked members: s [member, batch], only at target positions, in single precision or better.

1. forward the folded batch; only positions that have a target reach the output layer;
2. log p(target) = logit of the target − logsumexp, in float32 whatever the model's precision, a few rows at a time: from
   hidden states (`unembedding.py`), or from logits where a model does more to them than a linear map;
3. sequence: sum over targets; mean: the same per target, which is α / T; token: every target is its own example.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .examples import Examples
from .lora import StackedLoRA
from .renyi import preference_log_likelihood
from .unembedding import hidden_log_likelihood, hidden_states, plain_head

FORMS = ("sequence", "mean", "token")
FOLDED_TOKENS = 2048  # on a CPU: activations of more leave its caches, which costs up to a third


class TargetLogLikelihood(torch.autograd.Function):
    """log softmax(logits)[target]; the only other tensor of the logits' size is their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: int) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.expand(logits.shape[:-1]).reshape(-1)
        normaliser = torch.cat([part.to(exact).logsumexp(-1) for part in flat.split(rows)])
        ctx.save_for_backward(flat, wanted, normaliser)
        ctx.shape, ctx.rows, ctx.exact = logits.shape, rows, exact
        return (flat.gather(1, wanted[:, None])[:, 0].to(exact) - normaliser).view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        flat, wanted, normaliser = ctx.saved_tensors
        weight = grads[0].reshape(-1)
        out = torch.empty_like(flat)
        for start in range(0, len(flat), ctx.rows):
            part = slice(start, start + ctx.rows)
            p = (flat[part].to(ctx.exact) - normaliser[part, None]).exp_()
            p.mul_(-weight[part, None]).scatter_add_(1, wanted[part, None], weight[part, None])
            out[part] = p
        return out.view(ctx.shape), None, None


def target_log_likelihood(
    logits: Float[Tensor, "member target vocab"], targets: Int[Tensor, " target"], rows: int | None = None
) -> Float[Tensor, "member target"]:
    rows = rows or max(1, 2**20 // logits.shape[-1])  # 4 MiB of float32 at a time
    return TargetLogLikelihood.apply(logits, targets, rows)  # pyright: ignore


def member_logits(
    hf: nn.Module, examples: Examples, where: Tensor, count: int, repeat: int
) -> Float[Tensor, "member target vocab"]:
    """Logits of `count` attached members at the positions `where` [batch, position]; `repeat` from `attached`."""
    inputs = _inputs(hf, examples, repeat)
    if not examples.classes:
        with _only(hf, where, count) as seen:
            logits = hf(**inputs).logits
        if seen:
            return logits
    else:
        logits = hf(**inputs).logits[:, None]
    if logits.shape[0] != count * len(examples):
        raise ValueError(
            f"{type(hf).__name__} returned {logits.shape[0]} rows for {count} members x {len(examples)} examples; "
            "expected a model whose layers keep the batch axis first"
        )
    return logits.view(count, *where.shape, -1)[:, where]


def combine(values: Float[Tensor, "member target"], examples: Examples, form: str) -> Float[Tensor, "member example"]:
    """Per-target log-likelihoods to s. With "token" the targets themselves are the examples."""
    if form == "token":
        return values
    owner = examples.owners()
    total = values.new_zeros(len(values), len(examples)).index_add(1, owner, values)
    return total / examples.counts() if form == "mean" else total


@dataclass(frozen=True)
class Objective:
    """What members are trained on. With `reference` (margins of the base, one pass for all members) it is DPO."""

    hf: Any
    stack: StackedLoRA
    examples: Examples
    form: str = "sequence"
    reference: Tensor | None = None
    beta: float | int = 0.1

    def __len__(self) -> int:
        return len(self.examples) if self.reference is None else len(self.reference)

    def units(self, rows: Tensor) -> int:
        """How many log-likelihoods these rows have."""
        token = self.form == "token" and self.reference is None
        return int(self.examples.counts()[rows].sum()) if token else len(rows)

    def with_stack(self, stack: StackedLoRA) -> "Objective":
        return replace(self, stack=stack)

    @contextmanager
    def forward(self, rows: Tensor, which: slice = slice(None)) -> Iterator[Float[Tensor, "member batch"]]:
        """s of the members `which`. Call backward inside: with gradient checkpointing the model runs again then."""
        if self.reference is None:
            with self._sum(rows, which, self.form) as s:
                yield s
        else:
            with self.margin(rows, which) as h:
                yield preference_log_likelihood(h, self.beta)

    @contextmanager
    def margin(self, rows: Tensor, which: slice = slice(None)) -> Iterator[Float[Tensor, "member batch"]]:
        """h of preference pairs: how much more than the base a member prefers the chosen completion."""
        assert self.reference is not None
        with self._sum(torch.stack([2 * rows, 2 * rows + 1], 1).flatten(), which, "sequence") as s:
            yield s[:, 0::2] - s[:, 1::2] - self.reference[rows].to(s)

    @contextmanager
    def _sum(self, rows: Tensor, which: slice, form: str) -> Iterator[Float[Tensor, "member batch"]]:
        batch = self.examples.select(rows).to(next(self.hf.parameters()).device)
        parts = []
        with ExitStack() as attached:
            for fold in self._folds(which, batch):
                attached.close()  # the last stays until the caller is done: a checkpointed forward runs again in backward
                members = slice(fold.start, fold.stop, fold.step)
                repeat = attached.enter_context(self.stack.attached(self.hf, members))
                parts.append(combine(token_values(self.hf, batch, len(fold), repeat), batch, form))
            yield torch.cat(parts)

    def _folds(self, which: slice, batch: Examples) -> list[range]:
        """Members of one forward each: all at once where they share layers, and where the forward may run again."""
        members = range(self.stack.members)[which]
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.hf.modules())
        if self.stack.first or batch.tokens.is_cuda or checkpointing:
            return [members]
        count = max(1, FOLDED_TOKENS // batch.tokens.numel())
        return [members[start : start + count] for start in range(0, len(members), count)]


def token_values(hf: nn.Module, batch: Examples, count: int = 1, repeat: int = 1) -> Float[Tensor, "member target"]:
    """log p of every target, for attached members (or, by default, the model as it is)."""
    where, targets = batch.where, batch.targets[batch.where]
    head = None if batch.classes else plain_head(hf)
    if head is not None:
        hidden = hidden_states(hf, head, _inputs(hf, batch, repeat), (count * where.shape[0], where.shape[1]))
        if hidden is not None:
            return hidden_log_likelihood(hidden.view(count, *where.shape, -1)[:, where], head, targets)
    return target_log_likelihood(member_logits(hf, batch, where, count, repeat), targets)


@torch.no_grad()
def reference_margins(hf: nn.Module, pairs: Examples, batch_size: int) -> Float[Tensor, " pair"]:
    """log π(chosen) − log π(rejected) of the base model, once for all members and epochs."""
    device, found = next(hf.parameters()).device, []
    for rows in torch.arange(len(pairs)).split(2 * batch_size):
        batch = pairs.select(rows).to(device)
        s = combine(token_values(hf, batch), batch, "sequence")[0]
        found.append((s[0::2] - s[1::2]).cpu())
    return torch.cat(found)


@contextmanager
def _only(hf: nn.Module, where: Tensor, count: int) -> Iterator[list[bool]]:
    """Let the output layer compute only the positions `where`; the list is non-empty once it did."""
    seen: list[bool] = []

    def select(module, args):
        hidden = args[0]
        if hidden.shape[:2] != (count * where.shape[0], where.shape[1]):
            return None
        seen.append(True)
        return (hidden.view(count, *where.shape, hidden.shape[-1])[:, where], *args[1:])

    head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _inputs(hf: nn.Module, examples: Examples, repeat: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {name: value.repeat(repeat, 1) for name, value in examples.inputs(hf).items()}
    if not examples.classes and "use_cache" in inspect.signature(hf.forward).parameters:
        inputs["use_cache"] = False
    return inputs

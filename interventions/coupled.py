"""Training coupled members: three ways to the same gradient, and the loop around them.

1. joint     one graph over all members, autograd through ℓ_α;
2. two-pass  log-likelihoods of every member without a graph, w = softmax(α s), then one member's graph at a time with the
             surrogate −Σ w s, whose gradient is exact: activations of one member only;
3. sharded   each process holds some members; only s [member, batch] is exchanged, then as in two-pass.

Then the Gaussian prior's gradient is added, each member's gradient is clipped by its own norm, and AdamW steps.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.progress import track

from .likelihood import FORMS, Objective
from .lora import StackedLoRA
from .renyi import monitor, renyi_loss, responsibilities

Forward = Callable[[slice], AbstractContextManager[Tensor]]  # `with forward(members) as s:` gives s [member, batch]


def joint_gradient(
    forward: Forward, members: int, alpha: float | int, scale: float | int = 1.0
) -> Float[Tensor, "member batch"]:
    with forward(slice(0, members)) as s:
        (scale * renyi_loss(s, alpha)).backward()
    return s.detach()


def two_pass_gradient(
    forward: Forward, members: int, alpha: float | int, scale: float | int = 1.0
) -> Float[Tensor, "member batch"]:
    parts, states = [], []
    with torch.no_grad():
        for member in range(members):
            states.append(_random_state())
            with forward(slice(member, member + 1)) as s:
                parts.append(s)
    every = torch.cat(parts)
    weights = responsibilities(every, alpha)
    for member in range(members):
        _restore(states[member])  # the same dropout mask in both passes
        with forward(slice(member, member + 1)) as s:
            (-scale * (weights[member] * s[0]).mean()).backward()
    return every


def sharded_gradient(
    forward: Forward,
    members: int,
    alpha: float | int,
    gather: Callable[[Tensor], Tensor],
    rank: int,
    scale: float | int = 1.0,
) -> Float[Tensor, "every batch"]:
    """`members` live here; `gather` concatenates every process's [member, batch]."""
    with forward(slice(0, members)) as s:
        every = gather(s.detach().contiguous())
        weights = responsibilities(every, alpha)[rank * members : (rank + 1) * members]
        (-scale * (weights * s).sum(0).mean()).backward()
    return every


@dataclass(frozen=True)
class Settings:
    """Options of `RenyiEnsemble.fit`. AdamW; lr, ridge and prior_sd default to the authors' prototype."""

    epochs: int = 3
    steps: int | None = None  # stop after this many steps instead
    batch_size: int = 8
    lr: float | int = 1e-4
    weight_decay: float | int = 0.0
    ridge: float | int = 1e-4  # λ of the prior, per step
    prior_sd: float | int = 1.0  # σ₀
    clip: float | int | None = 1.0  # largest gradient norm of each member
    scale_by_M: bool = False  # multiply the objective by M: at w = 1/M each member's gradient is that of a lone run
    likelihood: str = "sequence"  # or "mean", "token"; see likelihood.py
    beta: float | int = 0.1  # DPO; TRL's default, the paper's value was not seen
    two_pass: bool = False
    parallel: str = "data"  # or "members": what an accelerator's processes share
    max_length: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        wrong = []
        if self.likelihood not in FORMS:
            wrong.append(f"likelihood={self.likelihood!r} (expected {', '.join(FORMS)})")
        if self.parallel not in ("data", "members"):
            wrong.append(f"parallel={self.parallel!r} (expected data or members)")
        for name in ("batch_size", "lr", "prior_sd", "beta"):
            if getattr(self, name) <= 0:
                wrong.append(f"{name}={getattr(self, name)} (expected more than 0)")
        if self.two_pass and self.parallel == "members":
            wrong.append("two_pass with parallel='members' (each process already holds only its members)")
        if wrong:
            raise ValueError("cannot train with " + "; ".join(wrong))


@dataclass
class TrainingLog:
    """One row per step, and each example's responsibilities when it was last seen (nan: never)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    responsibilities: Float[Tensor, "member example"] | None = None


def train(objective: Objective, alpha: float | int, settings: Settings, accelerator: Any = None) -> TrainingLog:
    """Train the members in place. With an accelerator, batches (or members) are split over its processes."""
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    members = objective.stack.members
    whole, local = objective.stack, objective.stack
    sharded = settings.parallel == "members" and world > 1
    if sharded:
        if members % world:
            raise ValueError(f"{members} members on {world} processes; expected a multiple")
        local = whole.part(slice(rank * members // world, (rank + 1) * members // world))
        objective = objective.with_stack(local)
    optimizer = torch.optim.AdamW(local.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    log = TrainingLog(responsibilities=torch.full((members, len(objective)), float("nan")))
    local.train()
    factor = members if settings.scale_by_M else 1
    for rows in track(
        list(_batches(len(objective), settings)), "train members", enabled=settings.progress and rank == 0
    ):
        mine = rows if sharded else rows[rank::world]
        optimizer.zero_grad()
        share = _share(objective, mine, accelerator if world > 1 and not sharded else None, settings)
        s = _gradient(objective, mine, alpha, settings, factor * share, accelerator if sharded else None)
        if world > 1 and not sharded:
            _sum_gradients(local, accelerator)
        add_prior(local, settings.ridge * factor / members, settings.prior_sd)
        if settings.clip is not None:
            clip_members(local, settings.clip)
        optimizer.step()
        if s is not None:
            log.steps.append(monitor(s, alpha))
            if log.responsibilities is not None and s.shape[1] == len(mine) and objective.form != "token":
                log.responsibilities[:, mine] = responsibilities(s, alpha).float().cpu()
    local.eval()
    if sharded:
        _gather_members(whole, local, accelerator)
    return log


def add_prior(stack: StackedLoRA, strength: float | int, prior_sd: float | int) -> None:
    """Gradient of strength · ‖θ‖² / (2σ₀²)."""
    for parameter in stack.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(parameter.detach(), alpha=strength / prior_sd**2)


def clip_members(stack: StackedLoRA, largest: float | int) -> Float[Tensor, " member"]:
    """Scale each member's gradient to a norm of at most `largest`; returns the norms before."""
    grads = [parameter.grad for parameter in stack.parameters() if parameter.grad is not None]
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
    scale = (largest / norms.clamp(min=1e-12)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))
    return norms


def _gradient(
    objective: Objective, rows: Tensor, alpha: float | int, settings: Settings, scale: float | int, accelerator: Any
) -> Tensor | None:
    if not len(rows):
        return None

    def forward(which: slice) -> AbstractContextManager[Tensor]:
        return objective.forward(rows, which)

    members = objective.stack.members
    if accelerator is not None:
        return sharded_gradient(forward, members, alpha, accelerator.gather, accelerator.process_index, scale)
    return (two_pass_gradient if settings.two_pass else joint_gradient)(forward, members, alpha, scale)


def _batches(total: int, settings: Settings) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    done, epoch = 0, 0
    while done < settings.steps if settings.steps is not None else epoch < settings.epochs:
        for rows in torch.randperm(total, generator=generator).split(settings.batch_size):
            if settings.steps is not None and done == settings.steps:
                return
            yield rows
            done += 1
        epoch += 1


def _share(objective: Objective, rows: Tensor, accelerator: Any, settings: Settings) -> float:
    """This process's part of the batch, so that summed gradients are those of the whole batch."""
    if accelerator is None:
        return 1.0
    here = torch.tensor([float(objective.units(rows))], device=accelerator.device)
    return (here / accelerator.reduce(here, "sum").clamp(min=1)).item()


def _sum_gradients(stack: StackedLoRA, accelerator: Any) -> None:
    """One message for all factors."""
    parameters = list(stack.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
    for parameter, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter).clone()


def _gather_members(whole: StackedLoRA, local: StackedLoRA, accelerator: Any) -> None:
    """After training, every process gets every member."""
    with torch.no_grad():
        for target, part in zip(whole.parameters(), local.parameters(), strict=True):
            target.copy_(accelerator.gather(part.detach().contiguous()))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _restore(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])

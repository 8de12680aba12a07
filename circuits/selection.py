"""SITE stage 2: learn which heads carry the task, one number per head (Park et al. 2026, section 3, eq. 4).

1. alpha = sigmoid(theta), theta = 0 at the start, so alpha = 0.5 everywhere.
2. Each step: zero-shot prompts drawn with replacement; z of the last token becomes (1 - alpha) z + alpha t, all heads at once.
3. loss = cross-entropy of the answer's first token; Adam on theta (lr 0.2, 400 steps); the model is frozen.
4. Every `validate_every` steps the loss on held-out prompts is measured; the checkpoint kept is its minimum.

Steps are one-token decodes over an exact prefix cache (`prefix.py`). Rows of several tasks and seeds share one batch and one
backward: a row's loss depends on its own theta only and Adam is element-wise, so this equals separate fits.
Penalties, off by default: `l1` adds l1 * sum(alpha), which keeps only needed heads; `chg` subtracts chg * mean(theta), the
sign-controlled pull of causal head gating (Nam et al. 2025), see `roles.py`. They count in the checkpoint's loss as well.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from .embedding import TaskEmbedding, check_causal, check_embedding
from .fewshot import FewShotTask, encode_prompts
from .files import load_tensors, save_tensors
from .heads import HeadScores
from .prefix import PrefixCache, frozen
from .progress import track


def site_loss(
    prompts: PrefixCache,
    rows: Int[Tensor, "run row"],
    theta: Float[Tensor, "run layer head"],
    embedding: Float[Tensor, "run layer head d_head"],
) -> Float[Tensor, " run"]:
    """Each run's mean cross-entropy of the first answer token, after mixing its own embedding with its own alpha."""
    runs, batch = rows.shape
    alpha = torch.sigmoid(theta).repeat_interleave(batch, 0)
    logits = prompts.decode(rows.flatten(), alpha, embedding.repeat_interleave(batch, 0))
    loss = cross_entropy(logits.float(), prompts.prompts.first[rows.flatten()], reduction="none")
    return loss.view(runs, batch).mean(1)


def penalty(theta: Float[Tensor, "run layer head"], l1: float | int, chg: float | int) -> Float[Tensor, " run"]:
    """What is added to each run's loss; zero by default."""
    return l1 * torch.sigmoid(theta).flatten(1).sum(1) - chg * theta.flatten(1).mean(1)


@dataclass(frozen=True, eq=False, repr=False)
class HeadSelection(HeadScores):
    """Soft alpha per head, as scores: `values` is the mean over seeds (`examples`, one per seed).

    `alpha` is what `inject` uses: the checkpoint of the seed with the lowest validation loss.
    """

    repeats: ClassVar[str] = "seeds"
    theta: Float[Tensor, "seed layer head"] = field(default_factory=lambda: torch.zeros(1, 1, 1))
    validation: Float[Tensor, " seed"] = field(default_factory=lambda: torch.zeros(1))
    curve: Float[Tensor, "check seed"] = field(default_factory=lambda: torch.zeros(1, 1))
    checks: tuple[int, ...] = ()
    best_step: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def alpha(self) -> Float[Tensor, "layer head"]:
        return torch.sigmoid(self.theta[self.validation.argmin()])

    def agreement(self) -> dict[str, float]:
        """Mean over pairs of seeds: rank correlation of alpha, and Jaccard of {alpha > 0.5}. A lone seed has neither."""
        if len(self.theta) < 2:
            raise ValueError("agreement compares seeds and this selection has one; fit with seeds=2 or more")
        from scipy import stats

        flat = torch.sigmoid(self.theta).flatten(1)
        pairs = [(a, b) for a in range(len(flat)) for b in range(a)]
        rank = [float(stats.spearmanr(flat[a].numpy(), flat[b].numpy()).statistic) for a, b in pairs]
        both = [((flat[a] > 0.5) & (flat[b] > 0.5)).sum().item() for a, b in pairs]
        either = [((flat[a] > 0.5) | (flat[b] > 0.5)).sum().item() for a, b in pairs]
        jaccard = [x / y if y else 1.0 for x, y in zip(both, either, strict=True)]
        return {"spearman": sum(rank) / len(pairs), "jaccard": sum(jaccard) / len(pairs)}

    def save(self, stem: str | Path) -> Path:
        tensors = {"theta": self.theta, "validation": self.validation, "curve": self.curve}
        meta = {"checks": self.checks, "best_step": self.best_step, "seconds": self.seconds}
        return save_tensors(stem, tensors, {"format": "luthier.selection/1", **self.provenance(), **meta})

    @classmethod
    def load(cls, stem: str | Path) -> "HeadSelection":
        tensors, meta = load_tensors(stem)
        if meta.pop("format", None) != "luthier.selection/1":
            raise ValueError(
                f"{str(stem)!r} does not hold a head selection; expected a pair written by HeadSelection.save"
            )
        meta.update(checks=tuple(meta["checks"]), best_step=tuple(meta["best_step"]))
        alpha = torch.sigmoid(tensors["theta"])
        return cls(values=alpha.mean(0), examples=alpha if len(alpha) > 1 else None, **tensors, **meta)


def select_heads(
    model: Any,
    task: FewShotTask | Mapping[str, FewShotTask],
    embedding: TaskEmbedding | Tensor | Mapping[str, TaskEmbedding | Tensor],
    *,
    steps: int = 400,
    lr: float | int = 0.2,
    batch_size: int = 8,
    seeds: int = 1,
    seed: int = 0,
    validation: FewShotTask | Mapping[str, FewShotTask] | None = None,
    validate_every: int = 50,
    patience: int | None = None,
    l1: float | int = 0.0,
    chg: float | int = 0.0,
    prefix_cache: bool = True,
    progress: bool = True,
) -> "HeadSelection | dict[str, HeadSelection]":
    """Fit alpha for one task, or for a mapping of tasks in one backward (a mapping of selections is then returned).

    Without `validation`, a fifth of the rows (100 at most, as in the paper) is held out. The paper's batch size is 1; rows
    are one token each here, so 8 is the default. `patience` stops after that many checks without improvement in any run.
    """
    check_causal(model)
    many = isinstance(task, Mapping)
    tasks = dict(task) if isinstance(task, Mapping) else {"": task}
    embeddings = dict(embedding) if isinstance(embedding, Mapping) else {"": embedding}
    held = dict(validation) if isinstance(validation, Mapping) else {"": validation} if validation is not None else None
    if set(tasks) != set(embeddings) or (held is not None and set(tasks) != set(held)):
        raise ValueError(
            f"tasks {sorted(tasks)} and embeddings {sorted(embeddings)} (and validation) must have the same names"
        )
    if min(steps, batch_size, seeds, validate_every) < 1:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, seeds={seeds}, validate_every={validate_every}: each must be >= 1"
        )
    started = time.perf_counter()
    data = {name: _split(tasks[name], held[name] if held else None, seed) for name in tasks}
    vectors = torch.stack([check_embedding(model, embeddings[name]) for name in tasks])
    draws = _draws([len(train) for train, _ in data.values()], steps, batch_size, seeds, seed)
    settings = _Settings(lr, validate_every, patience, l1, chg, prefix_cache, progress)
    fit = _fit(model, list(data.values()), vectors, draws, settings)
    meta = dict(
        method="site",
        model=model.name,
        revision=model.revision,
        seed=seed,
        seconds=time.perf_counter() - started,
        options=dict(steps=steps, lr=lr, batch_size=batch_size, seeds=seeds, l1=l1, chg=chg, units="alpha"),
    )
    found = {name: _selection(fit, number, tasks[name], meta) for number, name in enumerate(tasks)}
    return found if many else found[""]


class _Settings(NamedTuple):
    lr: float
    validate_every: int
    patience: int | None
    l1: float
    chg: float
    prefix_cache: bool
    progress: bool


@dataclass
class _Fit:
    theta: Float[Tensor, "task seed layer head"]
    curve: Float[Tensor, "check task seed"]
    checks: tuple[int, ...]


def _selection(fit: _Fit, number: int, task: FewShotTask, meta: dict[str, Any]) -> HeadSelection:
    """One task's share of a fit."""
    theta, losses = fit.theta[number], fit.curve[:, number]
    alpha = torch.sigmoid(theta)
    return HeadSelection(
        values=alpha.mean(0),
        examples=alpha if len(alpha) > 1 else None,
        task=task.name,
        data=task.fingerprint,
        theta=theta,
        validation=losses.min(0).values,
        curve=losses,
        checks=fit.checks,
        best_step=tuple(fit.checks[index] for index in losses.argmin(0).tolist()),
        **meta,
    )


def _split(task: FewShotTask, validation: FewShotTask | None, seed: int) -> tuple[FewShotTask, FewShotTask]:
    if validation is not None:
        return task, validation
    if len(task) < 5:
        raise ValueError(f"task {task.name!r} has {len(task)} rows; 5 are needed to hold some out, or give validation=")
    held, train = task.split(min(100, len(task) // 5), seed)
    return train, held


def _draws(sizes: Sequence[int], steps: int, batch: int, seeds: int, seed: int) -> Int[Tensor, "step task seed batch"]:
    """Row numbers with replacement. Each task and seed has its own generator: a run does not depend on its company."""
    runs = [
        [
            torch.randint(size, (steps, batch), generator=torch.Generator().manual_seed(seed + offset))
            for offset in range(seeds)
        ]
        for size in sizes
    ]
    return torch.stack([torch.stack(run, 1) for run in runs], 1)


def _fit(
    model: Any,
    data: Sequence[tuple[FewShotTask, FewShotTask]],
    vectors: Float[Tensor, "task layer head d_head"],
    draws: Int[Tensor, "step task seed batch"],
    settings: _Settings,
) -> _Fit:
    steps, tasks, seeds, _ = draws.shape
    reuse, penalties = settings.prefix_cache, (settings.l1, settings.chg)
    train, draws = _encode_drawn(model, [rows for rows, _ in data], draws, reuse)
    held = [PrefixCache(model, encode_prompts(model, rows.prompts()), reuse=reuse) for _, rows in data]
    embedding = vectors.repeat_interleave(seeds, 0)
    theta = torch.zeros(tasks * seeds, *vectors.shape[1:3], device=vectors.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=settings.lr)
    curve, checks = [_validate(held, theta.detach(), embedding) + penalty(theta.detach(), *penalties)], [0]
    best, best_theta, stale = curve[0], theta.detach().clone(), 0
    with frozen(model.hf):
        for step in track(range(steps), "head selection", enabled=settings.progress):
            loss = site_loss(train, draws[step].flatten(0, 1).to(theta.device), theta, embedding)
            (theta.grad,) = torch.autograd.grad((loss + penalty(theta, *penalties)).sum(), [theta])
            optimizer.step()
            if (step + 1) % settings.validate_every and step + 1 < steps:
                continue
            now = theta.detach()
            curve.append(_validate(held, now, embedding) + penalty(now, *penalties))
            checks.append(step + 1)
            better = curve[-1] < best
            best = torch.where(better, curve[-1], best)
            best_theta = torch.where(better[:, None, None], now, best_theta)
            stale = 0 if better.any() else stale + 1
            if settings.patience is not None and stale >= settings.patience:
                break
    shape = (tasks, seeds)
    return _Fit(best_theta.cpu().unflatten(0, shape), torch.stack(curve).cpu().unflatten(1, shape), tuple(checks))


def _encode_drawn(
    model: Any, tasks: Sequence[FewShotTask], draws: Int[Tensor, "step task seed batch"], prefix_cache: bool
) -> tuple[PrefixCache, Int[Tensor, "step task seed batch"]]:
    """One prefix cache of the rows that are drawn at all, and the draws renumbered to its rows."""
    prompts, numbered = [], torch.empty_like(draws)
    for number, task in enumerate(tasks):
        used, inverse = draws[:, number].unique(return_inverse=True)
        numbered[:, number] = inverse + len(prompts)
        prompts += task.select(used.tolist()).prompts()
    return PrefixCache(model, encode_prompts(model, prompts), reuse=prefix_cache), numbered


@torch.no_grad()
def _validate(
    held: Sequence[PrefixCache],
    theta: Float[Tensor, "run layer head"],
    embedding: Float[Tensor, "run layer head d_head"],
) -> Float[Tensor, " run"]:
    """Mean held-out loss of every run: one decode per run, all its rows at once."""
    seeds = len(theta) // len(held)
    losses = []
    for run in range(len(theta)):
        prompts = held[run // seeds]
        rows = torch.arange(len(prompts), device=theta.device)[None]
        losses.append(site_loss(prompts, rows, theta[run : run + 1], embedding[run : run + 1]))
    return torch.cat(losses)

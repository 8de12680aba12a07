"""SITE beside what a user would pick instead, on the same rows, in one call.

1. Rows: `train` for demonstrations, embeddings and fitting (a part is held out for checkpoints and layers), `test` for scores.
2. Methods: zero-shot, icl, site, fv, tv, mtv, i2cl, lora. Each is fitted once per seed.
3. Scores stay apart: first-token accuracy, exact match, prefix match, answer NLL, each with a bootstrap interval over test rows.
4. Costs: trainable numbers, seconds to fit, prompt tokens per query, seconds per query.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.alphas import bootstrap
from circuits.answers import AnswerScores, score_answers
from circuits.embedding import check_causal, task_embedding
from circuits.fewshot import FewShotTask
from circuits.selection import select_heads

from .baselines.adapter import Adapter
from .injection import inject

METHODS = ("zero-shot", "icl", "site", "fv", "tv", "mtv", "i2cl", "lora")
METRICS = ("first", "exact", "prefix", "nll")


@dataclass(frozen=True)
class Comparison:
    """Per method: scores per (seed, test row), and costs averaged over seeds."""

    scores: dict[str, dict[str, Float[Tensor, "seed row"]]]
    costs: dict[str, dict[str, float]]
    task: str

    def mean(self, method: str, metric: str) -> tuple[float, float, float]:
        """Mean and 95 % bootstrap interval over test rows, each row averaged over seeds."""
        return bootstrap(self.scores[method][metric].mean(0))

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"task": self.task, "method": method, **{m: self.mean(method, m) for m in METRICS}, **self.costs[method]}
            for method in self.scores
        ]

    def __repr__(self) -> str:
        return f"Comparison on {self.task}\n{self.table()}"

    def table(self) -> str:
        """Markdown, one line per method."""
        lines = [
            "| method | first token | exact | prefix | answer NLL | trainable | fit s | prompt tokens | ms / query |"
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in self.rows():
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row[metric]) for metric in METRICS]
            costs = [f"{row['trainable']:.0f}", f"{row['fit_seconds']:.2f}", f"{row['prompt_tokens']:.1f}"]
            lines.append(
                f"| {' | '.join([row['method'], *cells, *costs, format(1000 * row['query_seconds'], '.2f')])} |"
            )
        return "\n".join(lines)


def compare(
    model: Any,
    train: FewShotTask,
    test: FewShotTask,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    n_prompts: int = 50,
    n_shots: int = 10,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    fold_case: bool = True,
    max_new_tokens: int = 20,
    progress: bool = True,
) -> Comparison:
    """Fit every method on `train` and score it on `test`. `options={"site": {"steps": 100}}` goes to that method's fit."""
    check_causal(model)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    scores: dict[str, list[AnswerScores]] = {method: [] for method in methods}
    fitted: dict[str, list[Adapter]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            adapter = fit(model, train, method, seed, n_prompts, n_shots, progress, (options or {}).get(method))
            prompts = train.prompts(adapter.shots, seed=seed, queries=test)
            with adapter.apply():
                scored = score_answers(model, prompts, fold_case=fold_case, max_new_tokens=max_new_tokens)
            scores[method].append(scored)
            fitted[method].append(adapter)
    return Comparison(
        {method: _stacked(scores[method]) for method in methods},
        {method: _costs(fitted[method], scores[method], len(test)) for method in methods},
        test.name,
    )


def fit(
    model: Any,
    train: FewShotTask,
    method: str,
    seed: int = 0,
    n_prompts: int = 50,
    n_shots: int = 10,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Adapter:
    """One method, fitted; `options` go to its own function. Embedding time counts in the fit of the methods that use it."""
    from .baselines.context_vectors import fit_context_vectors
    from .baselines.function_vectors import fit_function_vector
    from .baselines.low_rank import fit_lora
    from .baselines.sampled_heads import fit_sampled_heads
    from .baselines.task_vectors import fit_task_vector

    if method in ("zero-shot", "icl"):
        return Adapter(method, contextlib.nullcontext, shots=n_shots if method == "icl" else 0)
    options = options or {}
    held, rest = train.split(min(100, max(1, len(train) // 5)), seed)
    few = dict(n_prompts=n_prompts, n_shots=n_shots, seed=seed)
    if method == "tv":
        return fit_task_vector(model, rest, held, **few, **options)
    if method == "i2cl":
        return fit_context_vectors(model, rest, held, seed=seed, progress=progress, **options)
    if method == "lora":
        return fit_lora(model, rest, held, seed=seed, progress=progress, **options)
    started = time.perf_counter()
    embedding = task_embedding(model, rest, **few, progress=progress)
    if method == "fv":
        adapter = fit_function_vector(model, rest, held, embedding, n_shots=n_shots, seed=seed, **options)
    elif method == "mtv":
        adapter = fit_sampled_heads(model, rest, embedding, seed=seed, progress=progress, **options)
    else:
        found = select_heads(model, rest, embedding, validation=held, seed=seed, progress=progress, **options)
        adapter = Adapter("site", lambda: inject(model, embedding, found), trainable=found.values.numel())  # type: ignore[union-attr]
    return Adapter(
        adapter.name, adapter.apply, adapter.trainable, adapter.shots, time.perf_counter() - started, adapter.details
    )


def _stacked(runs: Sequence[AnswerScores]) -> dict[str, Float[Tensor, "seed row"]]:
    return {metric: torch.stack([getattr(run, metric).float() for run in runs]) for metric in METRICS}


def _costs(adapters: Sequence[Adapter], runs: Sequence[AnswerScores], queries: int) -> dict[str, float]:
    n = len(adapters)
    return {
        "trainable": float(adapters[0].trainable),
        "fit_seconds": sum(adapter.seconds for adapter in adapters) / n,
        "prompt_tokens": sum(run.prompt_tokens for run in runs) / n,
        "query_seconds": sum(run.seconds for run in runs) / n / queries,
    }

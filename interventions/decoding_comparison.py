"""AISP against its baselines under the same two budgets, on the same prompts and seeds, with a reward nobody optimised beside it.

1. Run AISP: n * iterations scored samples per prompt, S seconds.
2. Best-of-n and the ARGS-style search with as many scored samples; then with S seconds. Greedy once.
3. Score every chosen response with the held-out reward, and with the model's own likelihood.
4. Differences to best-of-n are paired by prompt; the interval is a bootstrap over prompts (seeds averaged first).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.alphas import bootstrap

from .aligned import Aligned, distinct
from .decoding_baselines import best_of_n, greedy, reward_guided
from .prelogits import aisp
from .rewards import Reward, finite_or_excluded, likelihood_reward


def compare_decoding(model: Any, prompts: Sequence[str], reward: Reward, *, heldout: Reward | None = None, seeds: Sequence[int] = (0,),
                     n: int = 32, iterations: int = 32, horizon: int = 128, max_new_tokens: int | None = None,
                     stop: str | Sequence[str] = (), sampling_temperature: float | int = 1.0, top_p: float | int = 1.0,
                     guidance: float | int = 1.0, equal_seconds: bool = True, rows: int = 256, progress: bool = True,
                     **aisp_options: Any) -> "DecodingComparison":  # fmt: skip
    """AISP, best-of-n, ARGS-style and greedy at equal samples and, unless switched off, at equal seconds. `aisp_options` go to aisp()."""
    prompts, longest = list(prompts), max_new_tokens or horizon
    common: dict[str, Any] = dict(max_new_tokens=longest, stop=stop, rows=rows)
    sampling: dict[str, Any] = dict(temperature=sampling_temperature, top_p=top_p, progress=progress)
    per_step = max(1, n * iterations // longest)
    runs: dict[str, list[Aligned]] = {}
    for seed in seeds:
        first = aisp(model, prompts, reward, n=n, iterations=iterations, horizon=horizon, seed=seed, progress=progress,
                     **{**common, "max_new_tokens": max_new_tokens}, **aisp_options)  # fmt: skip
        samples = int(first.samples.max())
        methods: dict[str, Callable[[], Aligned]] = {
            "greedy": lambda: greedy(model, prompts, reward, **common),
            "best-of-n, equal samples": lambda s=seed, m=samples: best_of_n(
                model, prompts, reward, n=m, seed=s, **sampling, **common
            ),
            "ARGS-style, equal samples": lambda s=seed: reward_guided(
                model, prompts, reward, k=per_step, weight=guidance, seed=s, **common
            ),
        }
        if equal_seconds:
            methods["best-of-n, equal seconds"] = lambda s=seed, t=first.seconds: best_of_n(
                model, prompts, reward, seed=s, seconds=t, **sampling, **common
            )
            methods["ARGS-style, equal seconds"] = lambda s=seed, t=first.seconds: reward_guided(
                model, prompts, reward, k=per_step, weight=guidance, seed=s, seconds=t, **common
            )
        runs.setdefault("AISP", []).append(first)
        for label, method in methods.items():
            runs.setdefault(label, []).append(method())
    other = {label: scores_of(heldout, parts) for label, parts in runs.items()} if heldout is not None else {}
    likelihood = {label: scores_of(likelihood_reward(model), parts) for label, parts in runs.items()}
    return DecodingComparison(runs, other, likelihood)


def scores_of(reward: Reward, parts: list[Aligned]) -> Float[Tensor, "seed prompt"]:
    with torch.no_grad():
        return torch.stack([finite_or_excluded(reward(p.prompts, p.responses), len(p.prompts))[0] for p in parts])


@dataclass(frozen=True)
class DecodingComparison:
    """All runs by method, one per seed, and what the rewards that were not optimised say of them."""

    runs: dict[str, list[Aligned]]
    heldout: dict[str, Float[Tensor, "seed prompt"]]
    likelihood: dict[str, Float[Tensor, "seed prompt"]]

    def rewards(self, method: str) -> Float[Tensor, "seed prompt"]:
        if method not in self.runs:
            raise ValueError(f"no method {method!r} in this comparison; it has {', '.join(self.runs)}")
        return torch.stack([part.rewards for part in self.runs[method]])

    def difference(self, method: str = "AISP", other: str = "best-of-n, equal samples",
                   resamples: int = 2000) -> tuple[float, float, float]:  # fmt: skip
        """Mean reward of `method` minus `other`, with its 95% interval over prompts."""
        return interval((self.rewards(method) - self.rewards(other)).mean(0), resamples)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per method: means with 95% intervals over prompts, lengths and costs."""
        return [self._row(label, parts) for label, parts in self.runs.items()]

    def _row(self, label: str, parts: list[Aligned]) -> dict[str, Any]:
        lengths = [len(tokens) for part in parts for tokens in part.tokens]
        row: dict[str, Any] = {"method": label, "reward": shown(interval(self.rewards(label).mean(0)))}
        row["minus best-of-n"] = shown(self.difference(label), sign="+")
        if self.heldout:
            row["held-out reward"] = shown(interval(self.heldout[label].mean(0)))
        row["log-likelihood"] = shown(interval(self.likelihood[label].mean(0)))
        row["diversity"] = round(distinct([text for part in parts for text in part.responses]), 2)
        row["tokens"] = round(sum(lengths) / len(lengths), 1)
        row["samples per prompt"] = round(float(torch.stack([part.samples for part in parts]).float().mean()))
        row["seconds"] = round(sum(part.seconds for part in parts) / len(parts), 1)
        return row

    def __repr__(self) -> str:
        return f"{self.table()}\n\n{self.statement()}"

    def table(self) -> str:
        """`rows()` as Markdown."""
        rows = self.rows()
        lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
        return "\n".join(lines + [f"| {' | '.join(map(str, row.values()))} |" for row in rows])

    def statement(self) -> str:
        """In words: where AISP beats the others and where it does not."""
        lines = []
        if len(self.runs["AISP"][0].prompts) < 2:
            lines.append("one prompt has no interval and decides nothing; give several")
        for other in [label for label in self.runs if label != "AISP"]:
            middle, low, high = self.difference("AISP", other)
            verdict = "beats" if low > 0 else "loses to" if high < 0 else "is not distinguishable from"
            lines.append(f"AISP {verdict} {other}: {shown((middle, low, high), '+')}")
        if self.heldout:
            gap = (self.heldout["AISP"] - self.heldout["best-of-n, equal samples"]).mean(0)
            lines.append(f"on the held-out reward, AISP minus best-of-n at equal samples: {shown(interval(gap), '+')}")
        return "\n".join(lines)


def interval(values: Float[Tensor, " prompt"], resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95% percentile bootstrap over prompts; one prompt has no interval (NaN)."""
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    return bootstrap(values, resamples=resamples)


def shown(values: tuple[float, float, float], sign: str = "") -> str:
    middle, low, high = values
    return f"{middle:{sign}.2f}" + ("" if math.isnan(low) else f" [{low:{sign}.2f}, {high:{sign}.2f}]")

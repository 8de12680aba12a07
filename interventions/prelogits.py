"""AISP: test-time alignment by adaptive importance sampling on pre-logits (Kanai et al., arXiv 2510.26219).

z_t is the input of the unembedding. The controlled model draws token t <= tau from softmax(W (z_t + v_t) + b), v_t ~ N(u_t, sigma^2 I).
Minimise -E[r] + lambda KL(Q_U || P): the optimum is q*(V) = exp(r / lambda) p(V) / Z, and the nearest Gaussian has u_t = E_q*[v_t].

1. Prefill every prompt once. U <- 0 [tau, d].
2. Each round: V^i = U + sigma eps^i, i = 1..n; roll the n responses out greedily given V^i; r_i = reward(prompt, response_i).
3. w = softmax_i( r_i / lambda - (1 - alpha) / sigma^2 sum_t <u_t, v_t^i> );   u_t <- sum_i w_i v_t^i.
4. Keep the best response of all n * rounds. alpha = 0 is the exact ratio p/q, alpha = 1 drops the control cost (MPPI's coefficient).

Tokens are the argmax, so that the response is a function of V (the paper's token rule was not available). U, V and their product are
float32; z + v is cast to the model's dtype. The noise is regenerated from seeds in step 3, never stored.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.progress import track

from .adaptation import (
    capped,
    effective_sample_size,
    gaussian_kl,
    has_fallen,
    log_weights,
    standardised,
    temperature_for_ess,
)
from .aligned import Aligned, padded_rows
from .perturbation import Perturbation
from .rewards import Reward, Scorer
from .rollout import Decoder, States, Tokens, derive, evaluating, in_chunks, one_seed_each, rollout


def importance_weights(rewards: Float[Tensor, " n"], mean: Float[Tensor, "tau d"], samples: Float[Tensor, "n tau d"],
                       sigma2: float | int, temperature: float | int, alpha: float | int) -> Float[Tensor, " n"]:  # fmt: skip
    """Self-normalised weights of step 3; a reward of -inf has weight zero."""
    inner = torch.einsum("td,ntd->n", mean, samples)
    return log_weights(rewards, inner, sigma2, temperature, alpha).softmax(0)


def aisp(
    model: Any,
    prompts: str | Sequence[str],
    reward: Reward,
    *,
    n: int = 32,
    iterations: int = 32,
    sigma2: float | int = 0.5,
    temperature: float | int = 0.3,
    alpha: float | int = 0.999,
    horizon: int = 128,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    rows: int = 256,
    seconds: float | None = None,
    target_ess: float | int | None = None,
    standardise: bool = False,
    rao_blackwell: bool = False,
    step_size: float | int = 1.0,
    norm_cap: float | int | None = None,
    patience: int | None = None,
    progress: bool = True,
) -> Aligned:
    """The best response of n * iterations per prompt, from a frozen model, with the statistics of every round.

    `horizon` is tau; `max_new_tokens` defaults to it (less where the context ends). At most `rows` samples are decoded at once; results
    do not depend on it. Off by default: `target_ess` picks lambda per round; `standardise` divides rewards by their deviation in the
    round; `rao_blackwell` integrates out noise after a sample's end; `step_size`, `norm_cap` hold U back; `patience` stops a prompt
    whose mean reward stayed below its maximum for that many rounds; `seconds` stops starting rounds.
    """
    options = Options(n, iterations, float(sigma2), temperature, alpha, horizon, target_ess, standardise, rao_blackwell, step_size,
                      norm_cap, patience)  # fmt: skip
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop = [stop] if isinstance(stop, str) else list(stop)
    decoder, scorer = Decoder(model), Scorer(reward)
    encoded = decoder.encode(prompts)
    seeds = one_seed_each(seed, len(prompts))
    longest = horizon if max_new_tokens is None else max_new_tokens
    limits = decoder.limits(encoded, longest, strict=max_new_tokens is not None)
    searches = [
        Search(text, ids, limit, derive(s, *ids.tolist()), decoder.zeros(horizon))
        for text, ids, limit, s in zip(prompts, encoded, limits, seeds, strict=True)
    ]
    started, chunks = time.perf_counter(), in_chunks(searches, max(1, rows // n))
    with evaluating(decoder.hf), torch.inference_mode():
        for number, chunk in enumerate(chunks):
            deadline = None if seconds is None else started + seconds * (number + 1) / len(chunks)
            label = f"AISP, prompts {number + 1}/{len(chunks)}"
            search_together(
                decoder, scorer, chunk, options, stop, deadline, track(range(iterations), label, enabled=progress)
            )
        return collected(decoder, scorer, searches, time.perf_counter() - started)


@dataclass(frozen=True)
class Options:
    """The numbers of one run, checked together."""

    n: int
    iterations: int
    sigma2: float
    temperature: float | int
    alpha: float | int
    horizon: int
    target_ess: float | int | None
    standardise: bool
    rao_blackwell: bool
    step_size: float | int
    norm_cap: float | int | None
    patience: int | None

    def __post_init__(self):
        rules = {
            "n": ("at least 1", self.n >= 1),
            "iterations": ("at least 1", self.iterations >= 1),
            "horizon": ("at least 1", self.horizon >= 1),
            "sigma2": ("at least 0", self.sigma2 >= 0),
            "temperature": ("positive", self.temperature > 0),
            "alpha": ("in [0, 1]", 0 <= self.alpha <= 1),
            "target_ess": (f"in [1, n] = [1, {self.n}]", self.target_ess is None or 1 <= self.target_ess <= self.n),
            "step_size": ("in (0, 1]", 0 < self.step_size <= 1),
            "norm_cap": ("positive", self.norm_cap is None or self.norm_cap > 0),
            "patience": ("at least 1", self.patience is None or self.patience >= 1),
        }
        broken = [
            f"{name} = {getattr(self, name)} must be {rule}" for name, (rule, holds) in rules.items() if not holds
        ]
        if broken:
            raise ValueError("; ".join(broken))


@dataclass
class Search:
    """One prompt between rounds: U, the best response so far, the record."""

    prompt: str
    tokens: Tokens
    limit: int
    seed: int
    mean: Float[Tensor, "tau d"]
    response: str = ""
    response_tokens: Tokens = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    best: float = -math.inf
    samples: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def keep_best(self, responses: list[str], tokens: list[Tensor], rewards: Float[Tensor, " n"]) -> None:
        winner = int(rewards.argmax())
        if self.samples == 0 or float(rewards[winner]) > self.best:
            self.best, self.response, self.response_tokens = (
                float(rewards[winner]),
                responses[winner],
                tokens[winner].cpu(),
            )
        self.samples += len(responses)

    def move_mean(
        self, v: Perturbation, rewards: Float[Tensor, " n"], lengths: Int[Tensor, " n"], options: Options
    ) -> None:
        """Step 3, with what `options` asks for."""
        o, inner = options, v.finish()
        shaped = (standardised(rewards) if o.standardise else rewards).to(inner.device)
        temperature = o.temperature
        if o.target_ess is not None:
            temperature = temperature_for_ess(shaped, inner, o.sigma2, o.alpha, o.target_ess)
        weights = log_weights(shaped, inner, o.sigma2, temperature, o.alpha).softmax(0)
        target = v.weighted_mean(weights, lengths.to(inner.device))
        self.mean = capped(target if o.step_size == 1 else self.mean.lerp(target, o.step_size), o.norm_cap)
        finite = rewards[rewards.isfinite()]
        row = {
            "ess": effective_sample_size(weights),
            "norm": float(self.mean.norm()),
            "kl": gaussian_kl(self.mean, o.sigma2) if o.sigma2 else 0.0,
            "temperature": float(temperature),
            "mean_reward": float(finite.mean()) if len(finite) else -math.inf,
            "max_reward": float(rewards.max()),
            "best": self.best,
        }
        for name, value in row.items():
            self.history[name].append(value)


def search_together(decoder: Decoder, scorer: Scorer, searches: list[Search], options: Options, stop: list[str],
                    deadline: float | None, rounds: Iterable[int]) -> None:  # fmt: skip
    """All rounds of prompts decoded side by side; a prompt that stopped early leaves the batch."""
    start, n = decoder.prefill([search.tokens for search in searches]), options.n
    active = list(range(len(searches)))
    for round_ in rounds:
        if not active or (round_ and deadline is not None and time.perf_counter() > deadline):
            break
        group = [searches[i] for i in active]
        noise = [
            Perturbation(s.mean, n, options.sigma2, options.alpha, (s.seed, round_), options.rao_blackwell)
            for s in group
        ]
        tokens = perturbed_rollout(decoder, decoder.select(start, torch.tensor(active, device=decoder.device)), noise,
                                   [s.limit for s in group], stop)  # fmt: skip
        texts = [decoder.response(group[i // n].tokens, sample, stop) for i, sample in enumerate(tokens)]
        rewards = scorer([group[i // n].prompt for i in range(len(texts))], texts)
        for p, search in enumerate(group):
            mine = slice(p * n, (p + 1) * n)
            search.keep_best(texts[mine], tokens[mine], rewards[mine])
            search.move_mean(noise[p], rewards[mine], torch.tensor([len(t) for t in tokens[mine]]), options)
        if options.patience is not None:
            active = [i for i in active if not has_fallen(searches[i].history["mean_reward"], options.patience)]


def perturbed_rollout(decoder: Decoder, start: States, noise: list[Perturbation], limits: list[int],
                      stop: Sequence[str] = (), share_prefixes: bool = True) -> list[Tokens]:  # fmt: skip
    """argmax W (z_t + v_t) + b while t < tau, argmax W z_t + b after it; n responses per perturbation, in order."""
    n, tau = noise[0].n, len(noise[0].mean)

    def pick(z: Tensor, state: Tensor, sample: Tensor, step: int) -> Tensor:
        hidden = z[state].float()
        if step < tau:
            going = torch.zeros(len(noise) * n, dtype=torch.bool, device=z.device)
            going[sample] = True
            going = going.view(len(noise), n)
            v = hidden.new_zeros(len(noise), n, hidden.shape[1])
            for p in going.any(1).nonzero()[:, 0].tolist():
                v[p] = noise[p].apply(step, going[p])
            hidden += v.view(-1, hidden.shape[1])[sample]
        return decoder.logits(hidden).argmax(-1)

    return rollout(decoder, start, n, pick, limits, stop, share_prefixes)


def collected(decoder: Decoder, scorer: Scorer, searches: list[Search], seconds: float) -> Aligned:
    return Aligned(
        method="aisp",
        prompts=[s.prompt for s in searches],
        responses=[s.response for s in searches],
        tokens=[s.response_tokens for s in searches],
        rewards=torch.tensor([s.best for s in searches]),
        samples=torch.tensor([s.samples for s in searches]),
        scored=scorer.scored,
        invalid=scorer.invalid,
        seconds=seconds,
        history={name: padded_rows([s.history[name] for s in searches]) for name in searches[0].history},
        mean=torch.stack([s.mean for s in searches]).cpu(),
        token_kl=padded_rows([row for chunk in in_chunks(searches, 64) for row in token_kl(decoder, chunk)]),
        model=decoder.name,
    )


def token_kl(decoder: Decoder, searches: list[Search]) -> list[list[float]]:
    """KL(softmax W(z_t + u_t) || softmax W z_t) at each position of every response inside the window."""
    states = decoder.pre_logits([s.tokens for s in searches], [s.response_tokens for s in searches])
    rows = []
    for search, z in zip(searches, states, strict=True):
        z, values = z[: len(search.mean)].float(), [math.nan] * len(search.mean)
        moved, base = (decoder.logits(h).float().log_softmax(-1) for h in (z + search.mean[: len(z)], z))
        values[: len(z)] = (moved.exp() * (moved - base)).sum(-1).tolist()
        rows.append(values)
    return rows

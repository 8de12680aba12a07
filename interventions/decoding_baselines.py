"""The methods AISP has to beat, on the same decoder, the same rewards and the same count of scored samples.

greedy             one response, no search.
best_of_n          n samples from the model (temperature, top-p), the best kept. Prefixes are shared like AISP's.
reward_guided      ARGS (Khanov et al., 2024): at every token the k most likely candidates are scored in context, and the one with the
                   largest log p(token) + weight * reward(text so far) is kept (temperature > 0: drawn from the softmax of that sum).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.progress import track

from .aligned import Aligned
from .rewards import Reward, Scorer
from .rollout import Decoder, Tokens, derive, evaluating, in_chunks, one_seed_each, rollout

BLOCK = (
    32  # samples that share one stream of random numbers; results do not depend on how many blocks are decoded together
)


def sampled(logits: Float[Tensor, "row vocabulary"], uniform: Float[Tensor, " row"], temperature: float | int = 1.0,
            top_p: float | int = 1.0) -> Int[Tensor, " row"]:  # fmt: skip
    """The token at the quantile `uniform` of each row's (tempered, nucleus) distribution."""
    p = (logits.float() / temperature).softmax(-1)
    order = None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)  # the token that crosses the threshold stays
    steps = p.cumsum(-1)
    chosen = torch.searchsorted(steps, uniform[:, None] * steps[:, -1:], right=True)[:, 0].clamp_max(p.shape[1] - 1)
    return chosen if order is None else order.gather(1, chosen[:, None])[:, 0]


def best_of_n(model: Any, prompts: str | Sequence[str], reward: Reward, *, n: int = 1024, temperature: float | int = 1.0,
              top_p: float | int = 1.0, max_new_tokens: int = 128, stop: str | Sequence[str] = (), seed: int | Sequence[int] = 0,
              rows: int = 256, seconds: float | None = None, progress: bool = True) -> Aligned:  # fmt: skip
    """The best of n samples per prompt; with `seconds`, as many more (or fewer) blocks of 32 as fit into that time."""
    if n < 1 or temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected n >= 1, temperature > 0 and 0 < top_p <= 1; got {n}, {temperature}, {top_p}")
    run = Run("best-of-n", model, prompts, reward, max_new_tokens, stop, seed)
    blocks = math.ceil(n / BLOCK)
    for number, group in enumerate(groups := in_chunks(list(range(len(run.prompts))), max(1, rows // min(n, BLOCK)))):
        deadline = None if seconds is None else run.started + seconds * (number + 1) / len(groups)
        together = max(1, rows // (len(group) * BLOCK))
        starts = range(0, blocks if seconds is None else 10**9, together)
        for first in track(
            starts, f"best of n, prompts {number + 1}/{len(groups)}", enabled=progress and seconds is None
        ):
            if deadline is not None and first and time.perf_counter() > deadline:
                break
            last = first + together if seconds is not None else min(first + together, blocks)
            count = (last - first) * BLOCK if seconds is not None else min(n - first * BLOCK, (last - first) * BLOCK)

            def pick(
                z: Tensor, state: Tensor, sample: Tensor, step: int, group=group, first=first, last=last, count=count
            ) -> Tensor:
                uniform = torch.cat([run.uniform(p, range(first, last), step)[:count] for p in group])
                return sampled(run.decoder.logits(z)[state], uniform[sample], temperature, top_p)

            run.decode(group, count, pick)
    return run.result()


def greedy(model: Any, prompts: str | Sequence[str], reward: Reward, *, max_new_tokens: int = 128, stop: str | Sequence[str] = (),
           rows: int = 256) -> Aligned:  # fmt: skip
    run = Run("greedy", model, prompts, reward, max_new_tokens, stop, 0)
    for group in in_chunks(list(range(len(run.prompts))), rows):
        run.decode(group, 1, lambda z, state, _sample, _step: run.decoder.logits(z).argmax(-1)[state])
    return run.result()


def reward_guided(model: Any, prompts: str | Sequence[str], reward: Reward, *, k: int = 10, weight: float | int = 1.0,
                  temperature: float | int = 0.0, max_new_tokens: int = 128, stop: str | Sequence[str] = (),
                  seed: int | Sequence[int] = 0, rows: int = 256, seconds: float | None = None) -> Aligned:  # fmt: skip
    """ARGS-style token search; k * max_new_tokens scored samples per prompt at most.

    `seconds`: repeated (with temperature 1 where it is 0, to be different) and the best kept; a run cut short ends greedily.
    """
    if k < 1 or temperature < 0:
        raise ValueError(f"expected k >= 1 and temperature >= 0; got {k}, {temperature}")
    run = Run("reward-guided", model, prompts, reward, max_new_tokens, stop, seed)
    for number, group in enumerate(groups := in_chunks(list(range(len(run.prompts))), rows)):
        deadline = math.inf if seconds is None else run.started + seconds * (number + 1) / len(groups)
        repeat = 0
        while not repeat or (seconds is not None and time.perf_counter() < deadline):
            warmth = temperature if temperature or not repeat else 1.0
            run.decode(group, 1, guided_pick(run, group, k, weight, warmth, repeat, deadline), count=False)
            repeat += 1
    return run.result()


def guided_pick(run: "Run", group: list[int], k: int, weight: float | int, temperature: float | int, repeat: int,
                deadline: float) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:  # fmt: skip
    texts: list[list[int]] = [[] for _ in group]

    def pick(z: Tensor, state: Tensor, sample: Tensor, step: int) -> Tensor:
        log_p = run.decoder.logits(z)[state].float().log_softmax(-1)
        top, candidates = log_p.topk(min(k, log_p.shape[1]), -1)
        if time.perf_counter() < deadline:
            drafts = [
                (i, [*texts[i], token])
                for i, row in zip(sample.tolist(), candidates.tolist(), strict=True)
                for token in row
            ]
            prompt = [group[i] for i, _ in drafts]
            read = [
                run.decoder.response(run.tokens[p], torch.tensor(d), run.stop)
                for p, (_, d) in zip(prompt, drafts, strict=True)
            ]
            scores = run.score(prompt, read)
            top = top + weight * scores.view(top.shape).to(top)
        best = top.argmax(-1)
        if temperature:
            uniform = torch.stack([run.uniform(group[i], range(repeat, repeat + 1), step)[0] for i in sample.tolist()])
            best = sampled(top, uniform, temperature)
        chosen = candidates.gather(1, best[:, None])[:, 0]
        for i, token in zip(sample.tolist(), chosen.tolist(), strict=True):
            texts[i].append(token)
        return chosen

    return pick


class Run:
    """What the baselines share: encoded prompts, counted scores, the best response of each prompt."""

    def __init__(self, method: str, model: Any, prompts: str | Sequence[str], reward: Reward, max_new_tokens: int,
                 stop: str | Sequence[str], seed: int | Sequence[int]):  # fmt: skip
        self.method, self.decoder, self.scorer = method, Decoder(model), Scorer(reward)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        self.tokens = self.decoder.encode(self.prompts)
        self.limits = self.decoder.limits(self.tokens, max_new_tokens, strict=False)
        seeds = one_seed_each(seed, len(self.prompts))
        self.seeds = [derive(s, *ids.tolist()) for s, ids in zip(seeds, self.tokens, strict=True)]
        self.best: list[tuple[float, str, Tokens]] = [(-math.inf, "", ids[:0]) for ids in self.tokens]
        self.samples = [0] * len(self.prompts)
        self._prefilled: tuple[list[int], Any] | None = None
        self.started = time.perf_counter()

    def uniform(self, prompt: int, blocks: range, step: int) -> Float[Tensor, " sample"]:
        """Numbers in [0, 1) that belong to this prompt, these blocks and this step."""
        device = self.decoder.device
        generators = [torch.Generator(device).manual_seed(derive(self.seeds[prompt], b, step)) for b in blocks]
        return torch.cat([torch.rand(BLOCK, generator=g, device=device) for g in generators])

    def score(self, prompt: list[int], responses: list[str]) -> Float[Tensor, " batch"]:
        for p in prompt:
            self.samples[p] += 1
        return self.scorer([self.prompts[p] for p in prompt], responses)

    def decode(
        self, group: list[int], samples: int, pick: Callable[[Tensor, Tensor, Tensor, int], Tensor], count: bool = True
    ) -> None:
        """`samples` responses for each prompt of the group, scored; the best so far is kept."""
        with evaluating(self.decoder.hf), torch.inference_mode():
            if self._prefilled is None or self._prefilled[0] != group:
                self._prefilled = (group, self.decoder.prefill([self.tokens[p] for p in group]))
            rows = rollout(self.decoder, self._prefilled[1], samples, pick, [self.limits[p] for p in group], self.stop)
        who = [p for p in group for _ in range(samples)]
        texts = [self.decoder.response(self.tokens[p], row, self.stop) for p, row in zip(who, rows, strict=True)]
        before = list(self.samples)
        rewards = self.score(who, texts)
        if not count:  # the last of these texts was counted as a candidate
            self.samples = before
        for p, text, row, value in zip(who, texts, rows, rewards.tolist(), strict=True):
            if value > self.best[p][0] or not self.best[p][2].numel():
                self.best[p] = (value, text, row.cpu())

    def result(self) -> Aligned:
        return Aligned(
            method=self.method,
            prompts=self.prompts,
            responses=[text for _, text, _ in self.best],
            tokens=[row for _, _, row in self.best],
            rewards=torch.tensor([value for value, _, _ in self.best]),
            samples=torch.tensor(self.samples),
            scored=self.scorer.scored,
            invalid=self.scorer.invalid,
            seconds=time.perf_counter() - self.started,
            model=self.decoder.name,
        )

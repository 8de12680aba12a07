"""What every decoding method returns: the chosen responses, their rewards, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .rollout import Tokens


@dataclass(frozen=True)
class Aligned:
    """One response per prompt.

    `samples` counts every response that was given a reward, duplicates and all; `scored` the distinct texts the reward really read;
    `invalid` those scored NaN or +inf. `history` has one row per prompt and one column per round (NaN after an early stop): ess, norm
    (|U|), kl, temperature, mean_reward, max_reward, best. `mean` is U; `token_kl` is KL(softmax W(z + u) || softmax W z) along the
    response, NaN after its end.
    """

    method: str
    prompts: list[str]
    responses: list[str]
    tokens: list[Tokens]
    rewards: Float[Tensor, " prompt"]
    samples: Int[Tensor, " prompt"]
    scored: int
    invalid: int
    seconds: float
    history: dict[str, Float[Tensor, "prompt round"]] = field(default_factory=dict)
    mean: Float[Tensor, "prompt tau d"] | None = None
    token_kl: Float[Tensor, "prompt tau"] | None = None
    model: str = ""

    def __repr__(self) -> str:
        """One line of costs, then a line for each of the first prompts."""
        costs = f"{int(self.samples.sum())} samples scored, {self.seconds:.1f} s; mean reward {float(self.rewards.mean()):.3f}"
        shown = zip(self.prompts[:5], self.responses, self.rewards.tolist(), strict=False)
        rows = [f"  {reward:.3f}  {prompt!r} -> {response!r}" for prompt, response, reward in shown]
        more = [f"  and {len(self.prompts) - 5} more"] if len(self.prompts) > 5 else []
        return "\n".join([f"Aligned({self.method}: {len(self.prompts)} prompts, {costs})", *rows, *more])

    def perturbation_norm(self) -> Float[Tensor, "prompt tau"]:
        """|u_t| per position."""
        if self.mean is None:
            raise ValueError(f"{self.method} has no perturbation; only aisp() moves pre-logits")
        return self.mean.norm(dim=-1)

    def summary(self) -> dict[str, float | int | str]:
        lengths = [len(t) for t in self.tokens]
        return {
            "method": self.method,
            "reward": float(self.rewards.mean()),
            "samples": int(self.samples.sum()),
            "scored": self.scored,
            "seconds": self.seconds,
            "tokens": sum(lengths) / max(1, len(lengths)),
        }


def padded_rows(rows: Sequence[Sequence[float]]) -> Float[Tensor, "row column"]:
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[float("nan")] * (width - len(row))] for row in rows])


def distinct(texts: Sequence[str], orders: Sequence[int] = (2, 3, 4)) -> float:
    """Diversity of ARGS and RE-Control, prod over n of (1 - rep_n), rep_n = 1 - |set| / (|n-grams| + 1), on whitespace words; mean."""
    values = []
    for text in texts:
        words, value = text.split(), 1.0
        for order in orders:
            grams = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
            value *= len(set(grams)) / (len(grams) + 1)
        values.append(value)
    return sum(values) / max(1, len(values))

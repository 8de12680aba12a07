"""V = U + sigma eps for one prompt and one round, made position by position and never stored.

The noise of (seed, round, position) is the same whenever asked for, so it is drawn twice: while decoding, where <U, V> is summed as V
goes by, and once more for the weighted mean. Memory is n * d instead of n * tau * d.

`rao_blackwell`: after sample i ended, its v_t changed nothing; under the weights' target its conditional mean is alpha u_t, and its
factor in the ratio integrates to one. So the tail enters the mean as alpha u_t, and <u, v> - (1 + alpha)/2 <u, u> is summed over the
positions before the end only (the constant matters now: samples end at different positions).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .rollout import derive


class Perturbation:
    def __init__(
        self,
        mean: Float[Tensor, "tau d"],
        n: int,
        sigma2: float,
        alpha: float,
        seed: Sequence[int],
        rao_blackwell: bool,
    ):
        self.mean, self.n, self.sigma, self.alpha = mean, n, sigma2**0.5, alpha
        self.seed, self.rao_blackwell = tuple(seed), rao_blackwell
        self.inner = torch.zeros(n, device=mean.device)
        self._next = 0

    def noise(self, position: int) -> Float[Tensor, "n d"]:
        generator = torch.Generator(self.mean.device).manual_seed(derive(*self.seed, position))
        return torch.randn(self.n, self.mean.shape[1], generator=generator, device=self.mean.device)

    def at(self, position: int) -> Float[Tensor, "n d"]:
        return self.mean[position] + self.sigma * self.noise(position)

    def apply(self, position: int, going: Bool[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """V at the next position, counted in <U, V>; `going`: the samples that have not ended."""
        v, u = self.at(position), self.mean[position]
        if self.rao_blackwell:
            self.inner += (v @ u - (1 + self.alpha) / 2 * (u @ u)) * going
        else:
            self.inner += v @ u
        self._next = position + 1
        return v

    def finish(self) -> Float[Tensor, " n"]:
        """<U, V> over the whole window: what no token used still counts, unless it is integrated out."""
        if self.alpha < 1 and not self.rao_blackwell and bool(self.mean.any()):
            for position in range(self._next, len(self.mean)):
                self.inner += self.at(position) @ self.mean[position]
        self._next = len(self.mean)
        return self.inner

    def weighted_mean(self, weights: Float[Tensor, " n"], lengths: Int[Tensor, " n"]) -> Float[Tensor, "tau d"]:
        """sum_i w_i v_t^i; `lengths` matter to `rao_blackwell` alone."""
        result = self.mean.clone()
        if not self.rao_blackwell:
            for position in range(len(result)):
                result[position] += self.sigma * (weights @ self.noise(position))
            return result
        for position in range(len(result)):
            used = weights * (lengths > position)
            if bool(used.any()):
                result[position] = used @ self.at(position) + self.alpha * (1 - used.sum()) * self.mean[position]
            else:
                result[position] *= self.alpha
        return result

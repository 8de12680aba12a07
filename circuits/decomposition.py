"""Contextual decomposition on plain tensors: how the relevant part of an activation passes through each module.

Every activation is x = β + γ: β comes from the source, γ is the rest (Hsu et al., arXiv 2407.00886, section 3.2). The total
x does not depend on the source, so only β is carried and γ = x - β. Three sets of rules:

  module              paper                                      frozen                      exact
  linear W x + b      W β + b |Wβ| / (|Wβ| + |Wγ|)               W β                         W β
  norm                the total's scale, bias split as above     the total's scale           N(x) - N(γ)
  attention           softmax(β_q·β_k) β_v                       A(x) β_v                    z(x) - z(γ)
  activation f        f(x) - f(γ)                                f(x) - f(γ)                 f(x) - f(γ)
  gate g * u          β_g β_u                                    g u - γ_g γ_u               g u - γ_g γ_u
  sign stabiliser     clamp β between 0 and x                    none                        none

1. "paper" is the published code, and its strict principle (β keeps only terms made of β alone) where that code has no module.
2. "frozen" keeps the total attention pattern, gives biases to the rest, and has no stabiliser.
3. "exact" is γ_out = f(γ) at every module. γ is then the forward pass with the source's z at its mean, so β at the logits is
   exactly the effect of mean ablation. It is run as that forward pass (`streams.Values`), so no function is needed here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

TOLERANCE = 1e-8  # the published code's guard against 0 / 0


class Rules(NamedTuple):
    """What distinguishes the β-carrying rule sets: how biases, attention, gates and signs are treated."""

    split_bias: bool
    decompose_pattern: bool
    strict_gate: bool
    stabilise: bool


RULES = {"paper": Rules(True, True, True, True), "frozen": Rules(False, False, False, False)}


def linear(
    beta: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
    total: Float[Tensor, "*rows d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """W β; with the module's `total` output given, plus the bias in proportion to |Wβ| (Singh et al. 2019)."""
    relevant = functional.linear(beta, weight)
    if bias is None or total is None:
        return relevant
    return add_bias_share(relevant, total - bias - relevant, bias, relevant)


def add_bias_share(
    relevant: Float[Tensor, "*batch d"], rest: Float[Tensor, "*batch d"], bias: Float[Tensor, " d"], onto: Tensor
) -> Float[Tensor, "*batch d"]:
    """onto + b |relevant| / (|relevant| + |rest| + tol), elementwise. Overwrites `rest`."""
    share = relevant.abs()
    return torch.addcmul(onto, bias, share.div_(rest.abs_().add_(share).add_(TOLERANCE)))


def norm(
    beta: Float[Tensor, "*batch d"],
    total: Float[Tensor, "*rows d"],
    scale: Float[Tensor, "*rows 1"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"] | None = None,
    centred: bool = False,
    split_bias: bool = False,
) -> Float[Tensor, "*batch d"]:
    """β times the total's scale: dividing by a number that the source hardly moves keeps the rule linear.

    The published code weighs the bias by the norm's *inputs* |β| and |γ|, not by what they become.
    """
    moved = beta - beta.mean(-1, keepdim=True) if centred else beta
    out = moved * scale * weight
    if bias is None or not split_bias:
        return out
    return add_bias_share(beta, total - beta, bias, out)


def activation(
    beta: Float[Tensor, "*batch d"],
    total: Float[Tensor, "*rows d"],
    activated: Float[Tensor, "*rows d"],
    function: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*batch d"]:
    """f(x) - f(γ): everything that would not be there without β. `activated` is f(x), known beforehand."""
    return activated - function(total - beta)


def gate(
    beta_gate: Float[Tensor, "*batch d"],
    beta_up: Float[Tensor, "*batch d"],
    total_gate: Float[Tensor, "*rows d"],
    total_up: Float[Tensor, "*rows d"],
    strict: bool,
) -> Float[Tensor, "*batch d"]:
    """A product of two activations: β_g β_u (strict), or g u - γ_g γ_u = β_g u + γ_g β_u."""
    if strict:
        return beta_gate * beta_up
    return beta_gate * total_up + (total_gate - beta_gate) * beta_up


def relevant_pattern(
    beta_q: Float[Tensor, "*batch query d_head"],
    beta_k: Float[Tensor, "*heads key d_head"],
    scaling: float,
    allowed: Bool[Tensor, "*mask query all_keys"] | None,
    softcap: float | None = None,
) -> Float[Tensor, "*batch query key"]:
    """softmax(mask(β_q · β_k)). Keys before the first of `beta_k` hold no β: their score is 0 and they only take weight."""
    scores = beta_q @ beta_k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    earlier = 0 if allowed is None else allowed.shape[-1] - scores.shape[-1]
    scores = functional.pad(scores, (earlier, 0))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1)[..., earlier:]


def stabilise(beta: Float[Tensor, "*batch d"], total: Float[Tensor, "*rows d"]) -> Float[Tensor, "*batch d"]:
    """Where β and γ disagree in sign, the larger takes the sum and the other becomes 0 (paper, appendix B.1).

    That is the same as clamping β between 0 and the total: beyond the total means |β| > |γ|, below 0 means |β| < |γ|.
    """
    return torch.clamp(beta, total.clamp(max=0), total.clamp(min=0))

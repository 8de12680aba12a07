"""What members say together and how far they disagree.

For members' probabilities p_i over columns (labels, or the vocabulary):

1. mixture    p̄ = (1/M) Σ p_i. Never an average of logits: that is a product of experts and breaks the reading of α = 1.
2. total      H[p̄];  aleatoric (1/M) Σ H[p_i];  mutual information = total − aleatoric, in [0, log M].
3. vote       shares of members whose most probable column it is; disagreement = 1 − largest share.
4. sequences  token mixture Π_t (1/M) Σ p_i(y_t | y_<t); exact sequence mixture (1/M) Σ_i Π_t p_i(y_t | y_<t).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .renyi import responsibilities


def entropy(p: Float[Tensor, "*batch column"]) -> Float[Tensor, "*batch"]:
    return torch.special.entr(p).sum(-1)


def entropy_split(
    members: Float[Tensor, "member example column"],
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"], Float[Tensor, " example"]]:
    """(total, aleatoric, mutual information), in nats."""
    p = members.double()
    total, aleatoric = entropy(p.mean(0)), entropy(p).mean(0)
    information = (total - aleatoric).clamp(0.0, math.log(len(members)))  # rounding only; Jensen gives the bounds
    return total.float(), aleatoric.float(), information.float()


def vote(members: Float[Tensor, "member example column"]) -> Float[Tensor, "example column"]:
    """Share of members that choose each column."""
    return torch.nn.functional.one_hot(members.argmax(-1), members.shape[-1]).float().mean(0)


def responsibility_entropy(
    log_likelihood: Float[Tensor, "member example"], alpha: float | int
) -> Float[Tensor, " example"]:
    """Entropy of w per labelled example: low where few members answer for it (conflict, contamination)."""
    return entropy(responsibilities(log_likelihood, alpha).T)


@dataclass(frozen=True, eq=False)
class Prediction:
    """Members' probabilities for a list of texts. `labels` names the columns (empty: the whole vocabulary)."""

    members: Float[Tensor, "member example column"]
    labels: tuple[str, ...] = ()
    combine: str = "mixture"  # or "vote"
    gold: Int[Tensor, " example"] | None = None

    def __len__(self) -> int:
        return self.members.shape[1]

    def __repr__(self) -> str:
        mean = self.mutual_information.mean().item()
        return f"Prediction({len(self)} texts, {len(self.members)} members; mean mutual information {mean:.3f} nats)"

    @property
    def mixture(self) -> Float[Tensor, "example column"]:
        return self.members.mean(0)

    @property
    def vote(self) -> Float[Tensor, "example column"]:
        return vote(self.members)

    @property
    def probabilities(self) -> Float[Tensor, "example column"]:
        """The combination asked for. Equal votes are decided by the mixture."""
        return self.mixture if self.combine == "mixture" else self.vote

    @property
    def predictions(self) -> Int[Tensor, " example"]:
        tie = 1e-3 / len(self.members) * self.mixture  # smaller than one vote
        return (self.probabilities + (tie if self.combine == "vote" else 0)).argmax(-1)

    @property
    def total(self) -> Float[Tensor, " example"]:
        return entropy_split(self.members)[0]

    @property
    def aleatoric(self) -> Float[Tensor, " example"]:
        return entropy_split(self.members)[1]

    @property
    def mutual_information(self) -> Float[Tensor, " example"]:
        return entropy_split(self.members)[2]

    @property
    def disagreement(self) -> Float[Tensor, " example"]:
        return 1 - self.vote.amax(-1)

    @property
    def spread(self) -> Float[Tensor, "example column"]:
        """Standard deviation of each column's probability over members."""
        return self.members.std(0, correction=0)

    def named(self) -> list[str]:
        return [self.labels[i] if self.labels else str(i) for i in self.predictions.tolist()]

    def abstain(self, coverage: float | int) -> Bool[Tensor, " example"]:
        """True for the share `coverage` of texts to answer: those with the least mutual information."""
        return answered(self.mutual_information, coverage)

    def route(self, threshold: float | int) -> Int[Tensor, " example"]:
        """The surest member per text, or -1 (ask a person) where mutual information exceeds `threshold`."""
        surest = entropy(self.members).argmin(0)
        return torch.where(self.mutual_information > threshold, torch.full_like(surest, -1), surest)


def answered(uncertainty: Float[Tensor, " example"], coverage: float | int) -> Bool[Tensor, " example"]:
    """The `coverage` share of least uncertain examples. Exactly that many: ties go by position."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; expected a share of the examples, in (0, 1]")
    keep = torch.zeros(len(uncertainty), dtype=torch.bool)
    keep[uncertainty.argsort(stable=True)[: max(1, round(coverage * len(uncertainty)))].cpu()] = True
    return keep


def specialists(weights: Float[Tensor, "member example"], groups: Sequence[str]) -> dict[str, Float[Tensor, " member"]]:
    """Mean responsibility of each member per group of examples: which member answers for which kind."""
    if len(groups) != weights.shape[1]:
        raise ValueError(f"{len(groups)} groups for {weights.shape[1]} examples; expected one group per example")
    names = list(groups)
    return {
        group: weights[:, [i for i, name in enumerate(names) if name == group]].mean(1)
        for group in dict.fromkeys(names)
    }


@dataclass(frozen=True, eq=False)
class SequenceScores:
    """log-likelihoods of given completions, in nats: per member, and of both mixtures."""

    members: Float[Tensor, "member example"]
    token_mixture: Float[Tensor, " example"]
    tokens: Int[Tensor, " example"]

    @property
    def sequence_mixture(self) -> Float[Tensor, " example"]:
        return torch.logsumexp(self.members, 0) - math.log(len(self.members))

"""What compare_renyi.py compares: ensembles, one LoRA, MC dropout and Laplace, all read as a set of members.

Laplace (where laplace-torch is installed) is fitted after training to the parameters of one LoRA: Kronecker-factored
generalised Gauss-Newton, prior precision by marginal likelihood, and `DRAWS` samples of its linearised predictive.
"""

import statistics
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

MEMBERS, DRAWS = 4, 32
METHODS = {
    "α = 0.8": (0.8, 0.0),
    "α = 0 (deep ensemble)": (0.0, 0.0),
    "α = 4": (4.0, 0.0),
    "one LoRA": (None, 0.0),
    "MC dropout": (None, 0.2),
}
Results = dict[str, list[dict[str, float]]]


def ensemble_of(model, method: str, seed: int, **options):
    from interventions import RenyiEnsemble

    alpha, dropout = METHODS[method]
    return RenyiEnsemble(model, 1 if alpha is None else MEMBERS, alpha or 0.0, dropout=dropout, seed=seed, **options)


def draws(ensemble, seed: int, read) -> list:
    """`read()` once; for MC dropout as often as an ensemble has members, each time with another mask."""
    if not ensemble.stack.dropout:
        return [read()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ensemble.stack.train()
        found = [read() for _ in range(MEMBERS)]
        ensemble.stack.eval()
    return found


def predict(ensemble, task, seed: int):
    """Members' probabilities, [member, example, label]."""
    found = draws(ensemble, seed, lambda: ensemble.predict(task))
    return replace(found[0], members=torch.cat([each.members for each in found]))


def has_laplace() -> bool:
    try:
        import laplace  # noqa: F401
    except ImportError:
        return False
    return True


class Answers(torch.nn.Module):
    """One LoRA as laplace-torch expects a classifier: logits of the label words at one position of each text."""

    def __init__(self, peft, columns):
        super().__init__()
        self.peft, self.columns = peft, columns

    def forward(self, batch):
        logits = self.peft(input_ids=batch["input_ids"], attention_mask=batch["mask"], use_cache=False).logits
        return logits[torch.arange(len(logits)), batch["where"]][:, self.columns].float()


class Preferences(torch.nn.Module):
    """One LoRA as a classifier of pairs: logits [β h, 0], so that the softmax is DPO's σ(β h)."""

    def __init__(self, peft, beta):
        super().__init__()
        self.peft, self.beta = peft, beta

    def forward(self, batch):
        pairs, length = batch["input_ids"].shape[0], batch["input_ids"].shape[-1]
        tokens, mask, targets = (batch[name].view(2 * pairs, length) for name in ("input_ids", "mask", "targets"))
        log_p = self.peft(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        s = (log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)).sum(1).view(pairs, 2)
        h = s[:, 0] - s[:, 1] - batch["reference"]
        return torch.stack([self.beta * h, torch.zeros_like(h)], 1)


def as_peft(ensemble, hf):
    """The only member as a PEFT model on a fresh base, its factors trainable."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as place:
        ensemble.save(place)
        return PeftModel.from_pretrained(hf, Path(place) / "member_0", is_trainable=True).eval()


def answer_items(examples, columns) -> list[dict]:
    """One item per answer; a text with several answers is there several times."""
    return [
        {
            "input_ids": examples.tokens[row],
            "mask": examples.attention_mask[row],
            "where": position,
            "labels": (columns == examples.targets[row, position]).int().argmax(),
        }
        for row, position in examples.where.nonzero()
    ]


def pair_items(pairs, reference) -> list[dict]:
    return [
        {
            "input_ids": pairs.tokens[2 * i : 2 * i + 2],
            "mask": pairs.attention_mask[2 * i : 2 * i + 2],
            "targets": pairs.targets[2 * i : 2 * i + 2],
            "reference": reference[i],
            "labels": 0,
        }
        for i in range(len(reference))
    ]


def laplace_draws(net, train: list[dict], test: list[dict], seed: int) -> torch.Tensor:
    """Probabilities [draw, example, class] of the linearised predictive."""
    from laplace import Laplace
    from torch.utils.data import DataLoader

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        posterior = Laplace(net, "classification", subset_of_weights="all", hessian_structure="kron")
        posterior.fit(DataLoader(train, batch_size=16))
        posterior.optimize_prior_precision(method="marglik")
        parts = [sampled(posterior, batch) for batch in DataLoader(test, batch_size=16)]
    return torch.cat(parts, 1)


def sampled(posterior, batch) -> torch.Tensor:
    """As `posterior.predictive_samples`, whose Cholesky factor fails where a logit is constant, as that of a pair is."""
    mean, covariance = posterior._glm_predictive_distribution(batch)
    values, vectors = torch.linalg.eigh(covariance.detach().double())
    noise = torch.randn(DRAWS, *mean.shape, dtype=torch.float64) * values.clamp(min=0).sqrt()
    logits = mean.detach() + torch.einsum("bij,dbj->dbi", vectors, noise)
    return torch.softmax(logits, -1).float()


def tell(seed: int, method: str) -> None:
    print(f"seed {seed}, {method}", file=sys.stderr, flush=True)


def table(found: Results) -> str:
    """Mean ± half-width of the 95 % t-interval over seeds."""
    from scipy.stats import t

    columns = list(dict.fromkeys(key for runs in found.values() for key in runs[0]))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, runs in found.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            if not values:
                cells.append("")
                continue
            count = len(values)
            wide = t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5 if count > 1 else 0
            cells.append(f"{statistics.mean(values):.3f} ± {wide:.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

"""What a source does to another head: three ways to read its relevant part β at the target's z, q, k or v.

1. "answer" (z only; CT-SFT eqs 5, 6, arXiv 2601.08146): what the target writes because of the source, β_z W_O at the read-out
   position, projected on the unit vector of gold minus the mean of the others' unembedding rows.
2. "effect": <β, ∂m/∂x> over all real positions, with m the task's margin and x the target's vector. To first order, how much of
   the margin passes from the source through that vector, whatever later heads use it for: a query, a key, a value, an MLP.
3. "share": β · x / |x|^2, how much of the target's own vector is there because of the source. z and q are read where the answer
   is read; k and v over all real tokens, since a head looks elsewhere for them. It does not know the task.

Under grouped-query attention the k and v of a target are those of its group, in "effect" with all the group's queries.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from . import sharding
from .blocks import Program
from .carrier import Node
from .encoding import Encoded
from .heads import Head
from .hooks import rewrite
from .model import Model
from .propagation import propagate
from .readout import column_logits, rows_that_fit
from .trace import Batch

SITES = ("z", "q", "k", "v")
SCORES = ("answer", "effect", "share")


def written(
    beta: Float[Tensor, "source example d_head"], W_O: Float[Tensor, "d_head d_model"], direction: Tensor
) -> Float[Tensor, "source example"]:
    """Eq. 6: what the head writes because of β, along each example's unit vector."""
    return ((beta @ W_O) * direction).sum(-1)


def effect(
    beta: Float[Tensor, "source example position d_head"], slope: Float[Tensor, "example position d_head"]
) -> Float[Tensor, "source example"]:
    """β weighted by what the margin makes of the vector. `slope` is 0 at pads."""
    return (beta * slope).sum((-1, -2))


def share(
    beta: Float[Tensor, "source example position d_head"],
    total: Float[Tensor, "example position d_head"],
    real: Float[Tensor, "example position"],
) -> Float[Tensor, "source example"]:
    """β · x / |x|^2 over the real positions."""
    shared = ((beta * total).sum(-1) * real).sum(-1)
    return shared / (total.pow(2).sum(-1) * real).sum(-1).clamp(min=1e-12)


def target_scores(
    program: Program,
    model: Model,
    encoded: Encoded,
    nodes: Sequence[Sequence[Node]],
    targets: Sequence[Head],
    means: Tensor,
    rules: str,
    sites: Sequence[str] = ("z",),
    score: str = "answer",
    **options,
) -> Float[Tensor, "source target example"]:
    """Each source's score at each target, summed over `sites`; 0 for sources that do not come before the target.

    Examples are shared out when several processes run.
    """
    check_sites(sites, score)
    mine = encoded.select(sharding.share(len(encoded)))
    scores = torch.zeros(len(nodes), len(targets), len(mine), device=model.device)
    wanted = {target.layer: tuple(sites) for target in targets}
    batch = _batch(model, mine, at_readout=score == "answer" or score == "share" and set(sites) <= {"z", "q"})
    read = {"answer": _read_answer, "effect": _read_effect, "share": _read_share}[score](
        program, model, mine, batch, wanted
    )

    def measure(layer: int, site: str, beta: Tensor, total: Tensor, indices: Tensor, examples: slice) -> None:
        for column, target in enumerate(targets):
            if target.layer == layer:
                scores[indices, column, examples] += read(target, site, beta, total, examples).to(scores)

    propagate(program, batch, nodes, means, rules, None, wanted, measure, **options)
    first = [min(node.layer for node in source) for source in nodes]
    before = torch.tensor([[layer < t.layer for t in targets] for layer in first], device=model.device)
    return sharding.gather(scores * before[:, :, None], len(encoded))


def check_sites(sites: Sequence[str], score: str) -> None:
    wrong = [site for site in sites if site not in SITES]
    if wrong or not sites:
        named = ", ".join(map(repr, wrong)) or "nothing"
        raise ValueError(f"site {named}; expected 'z', 'q', 'k' or 'v'")
    if score not in SCORES:
        raise ValueError(f"score={score!r}; expected 'answer', 'effect' or 'share'")
    if score == "answer" and tuple(sites) != ("z",):
        raise ValueError(
            f"score='answer' needs site 'z' (what a head writes); for {', '.join(sites)} use score='effect'"
        )


def task_directions(program: Program, encoded: Encoded) -> Float[Tensor, "example d_model"]:
    """v_task / ||v_task|| (eqs 5, 6): gold minus the mean of the others, in the residual stream before the final norm.

    A head with its own dense layer (BERT's pooler or MLM transform) is followed back through that linear map.
    """
    head = program.unembedding
    weight = head.out.weight[encoded.columns.to(head.out.weight.device)].float()
    directions = encoded.direction.to(weight) @ weight
    if head.dense is not None:
        directions = directions @ head.dense.weight.float()
    return directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)


# ---- the readings, bound to a task: (target, site, β [source example row head d_head], total, examples) -> [source example]

Read = Callable[[Head, str, Tensor, Tensor, slice], Tensor]


def _read_answer(program: Program, model: Model, encoded: Encoded, batch: Batch, wanted: dict) -> Read:
    directions = task_directions(program, encoded)

    def read(target: Head, site: str, beta: Tensor, total: Tensor, examples: slice) -> Tensor:
        W_O = model.anatomy.W_O(model.hf, target.layer)[target.head]
        return written(beta[:, :, 0, target.head], W_O.to(beta), directions[examples].to(beta))

    return read


def _read_effect(program: Program, model: Model, encoded: Encoded, batch: Batch, wanted: dict) -> Read:
    current: list = [None, {}]  # the slopes of the examples at hand; examples come in order, so one slice is enough

    def read(target: Head, site: str, beta: Tensor, total: Tensor, examples: slice) -> Tensor:
        if current[0] != examples:
            current[:] = [examples, slopes(model, encoded.select(range(len(encoded))[examples]), wanted)]
        index = _index(model, target, site)
        return effect(beta[..., index, :], current[1][target.layer, site][:, :, index].to(beta))

    return read


def _read_share(program: Program, model: Model, encoded: Encoded, batch: Batch, wanted: dict) -> Read:
    real = batch.attention_mask.gather(1, batch.rows)
    asked = real if real.shape[1] == 1 else functional.one_hot(encoded.readout.to(real.device), real.shape[1])

    def read(target: Head, site: str, beta: Tensor, total: Tensor, examples: slice) -> Tensor:
        index = _index(model, target, site)
        where = (asked if site in ("z", "q") else real)[examples]
        return share(beta[..., index, :], total[..., index, :], where.to(beta))

    return read


def _index(model: Model, target: Head, site: str) -> int:
    return model.anatomy.kv_head(target.head) if site in ("k", "v") else target.head


def _batch(model: Model, encoded: Encoded, at_readout: bool) -> Batch:
    once = Batch.read_once(encoded, model.device)
    if at_readout:
        return once
    return Batch(
        once.tokens, once.attention_mask, torch.arange(once.tokens.shape[1], device=model.device).expand_as(once.tokens)
    )


def slopes(
    model: Model, encoded: Encoded, wanted: dict[int, tuple[str, ...]]
) -> dict[tuple[int, str], Float[Tensor, "example position head d_head"]]:
    """∂m/∂x at the wanted sites of each layer, per example; 0 at pads. One forward and one backward, a few rows at a time."""
    parts: list[dict[tuple[int, str], Tensor]] = []
    for batch in encoded.batches(rows_that_fit(model, encoded, None)):
        probes: dict[tuple[int, str], Tensor] = {}
        with torch.enable_grad(), ExitStack() as hooks:
            for layer, sites in wanted.items():
                for site in sites:
                    hooks.enter_context(rewrite(model, site, _probe(probes, site), [layer]))
            total = batch.margin(column_logits(model, batch)[0]).sum()
            found = torch.autograd.grad(total, list(probes.values()))
        pads = ~batch.attention_mask.to(model.device).bool()[..., None, None]
        parts.append({key: grad.masked_fill(pads, 0) for key, grad in zip(probes, found, strict=True)})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _probe(probes: dict[tuple[int, str], Tensor], site: str) -> Callable[[Tensor, int], Tensor]:
    """Adds zeros, whose gradient is that of the site."""

    def add(x: Tensor, layer: int) -> Tensor:
        probes[layer, site] = torch.zeros_like(x, requires_grad=True)
        return x + probes[layer, site]

    return add

"""SIFT: train on two objectives without letting one undo the other (arXiv 2604.04231, Figure 1C; code comments "Eq. 19", "Eq. 20").

1. Keep one Muon momentum per objective: M_f for the objective, M_g for the constraint.
2. Gate, per block and step: a = cos(M_f, M_g). Control the block when a < epsilon.
3. Controlled: truncate both to K singular directions, orthogonalise the concatenated subspaces symmetrically,
   D = polar([U_f, U_g]) polar([V_f, V_g])^T. The two tasks then share no direction (spectral interference is 0 for 2K <= min(m, n)).
4. Otherwise: D = msign(M_f + M_g), a plain Muon step.
5. W <- W - lr * adjust(W) * D after decoupled decay; what is not a matrix inside the model is left to AdamW on the summed gradient.

As released, the gate reads the Nesterov momenta; so does this one. K, epsilon and the task settings of the paper's tables are not
known here; the defaults are ours.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.interference import default_rank
from circuits.partition import Block
from circuits.spectral import OVERSAMPLING, Spectrum, inverse_sqrt, subspace_iteration, truncated_svd

from . import muon
from .controls import adamw_update, blur, pcgrad
from .gradient_pairs import Objective, Pair, clear, clip_, collect, gather, require_sound, synchronize
from .trainable import blocks_of, masks_of, unwrapped

CONTROLS = ("sift", "sum", "topk", "pcgrad", "blur", "random-gate")


def interference_free(
    M_f: Float[Tensor, "*batch m n"], M_g: Float[Tensor, "*batch m n"], K: int, rtol: float = 1e-4
) -> Float[Tensor, "*batch m n"]:
    """The controlled update D of two task matrices: spectral norm 1, rank 2K, no direction shared between the tasks.

    `rtol` cuts directions that coincide (cosine above 1 - rtol): a shared one is kept once, opposite ones cancel.
    Without the cut, polar factors of dependent columns are arbitrary. Symmetric in f and g; blind to the scale of either.
    """
    m, n = M_f.shape[-2:]
    if 2 * K > min(m, n):
        warnings.warn(
            f"2K = {2 * K} directions do not fit in {m} x {n}: the tasks cannot be separated "
            f"(square and full rank, this is the mean of two Muon steps); choose K <= {min(m, n) // 2}",
            stacklevel=2,
        )
    return decorrelated(truncated_svd(M_f, K), truncated_svd(M_g, K), rtol).to(M_f.dtype)


def decorrelated(f: Spectrum, g: Spectrum, rtol: float = 1e-4) -> Float[Tensor, "*batch m n"]:
    """Step 3 from the two truncated spectra: U^ G_U^(-1/2) G_V^(-1/2) V^^T with 2K x 2K Gram matrices."""
    U, V = torch.cat([f.U, g.U], -1), torch.cat([f.V, g.V], -1)
    return U @ (inverse_sqrt(U.mT @ U, rtol) @ inverse_sqrt(V.mT @ V, rtol)) @ V.mT


class Gate(NamedTuple):
    """What the last step did to one block."""

    block: Block
    K: int
    cosine: float | None  # None where one objective does not reach the block
    controlled: bool


class Work(NamedTuple):
    """One block's directions in this step."""

    parameter: nn.Parameter
    block: Block
    f: Float[Tensor, "m n"]
    g: Float[Tensor, "m n"]


class SIFT(torch.optim.Optimizer):
    """Muon with a gated two-objective step; controls share the interface and the learning rate.

    control: sift | sum (plain Muon on the sum) | topk (sum of two truncated Muon updates, gated like sift) | pcgrad | blur |
    random-gate (as many controlled blocks per step as sift would have, drawn at random).
    blocks: "matrix", "head", or a number of heads per block. mask: a HeadMask or {parameter name: bool}; parameters that it does
    not name stay frozen, and nothing outside it moves by a single bit. K is capped at half the active rank of each block.
    `match_rms` gives controlled steps the Frobenius norm of a plain Muon step. `clip` bounds each objective's gradient norm.
    """

    def __init__(
        self,
        model: Any,
        mask: Any = None,
        *,
        lr: float | int = 1e-3,
        control: str = "sift",
        K: int | None = None,
        epsilon: float | int = -0.05,
        blocks: str | int = "matrix",
        momentum: float | int = 0.95,
        weight_decay: float | int = 0.1,
        adjust: str = "match_rms_adamw",
        adamw_lr: float | int | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | int = 0.0,
        clip: float | int | None = None,
        match_rms: bool = False,
        blur_weight: float | int = 1.0,
        rtol: float = 1e-4,
        seed: int = 0,
    ):
        if control not in CONTROLS:
            raise ValueError(f"control={control!r}; expected one of {', '.join(CONTROLS)}")
        if K is not None and K < 1:
            raise ValueError(
                f"K={K} singular directions; expected at least 1 (it is capped at half the rank of each block)"
            )
        muon.adjustment(1, 1, adjust)
        hf = unwrapped(model)
        self.names = {p: name for name, p in hf.named_parameters() if p.requires_grad}
        self.masks = masks_of(mask, self.names)
        self.blocks = blocks_of(hf, self.names, self.masks, blocks)
        self.last: list[Gate] = []
        shared = dict(
            control=control, K=K, epsilon=epsilon, clip=clip, blur_weight=blur_weight, rtol=rtol, seed=seed, steps=0
        )
        matrices = dict(kind="muon", momentum=momentum, adjust=adjust, match_rms=match_rms)
        rest = dict(kind="adamw", betas=adamw_betas, eps=adamw_eps)
        moving = [p for p in self.names if self.masks is None or p in self.masks]
        groups = [
            {
                "params": [p for p in moving if p in self.blocks],
                "lr": lr,
                "weight_decay": weight_decay,
                **matrices,
                **shared,
            },
            {
                "params": [p for p in moving if p not in self.blocks],
                "lr": lr if adamw_lr is None else adamw_lr,
                "weight_decay": adamw_weight_decay,
                **rest,
                **shared,
            },
        ]
        super().__init__([group for group in groups if group["params"]], {})

    def routes(self) -> dict[str, str]:
        """Parameter name -> 'muon' or 'adamw', for everything that may move."""
        return {self.names[p]: group["kind"] for group in self.param_groups for p in group["params"]}

    def accumulate(
        self,
        *,
        objective: Objective | None = None,
        constraint: Objective | None = None,
    ) -> None:
        """Add the gradients of a micro-batch. As with `backward`, the caller divides losses by the number of micro-batches."""
        if objective is not None:
            collect(self, "f", objective, retain_graph=isinstance(constraint, Tensor))
        if constraint is not None:
            collect(self, "g", constraint, retain_graph=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        clear(self)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        objective: Objective | None = None,
        constraint: Objective | None = None,
    ) -> Any:
        """One step on what was accumulated and what is given here: losses, functions that return them, or {parameter name: gradient}.

        With neither, the `.grad` of the parameters counts as the objective, and the step is a plain Muon step.
        Raises ValueError, before anything moves, when a gradient is not finite or the two objectives share no parameter.
        """
        result = None
        with torch.enable_grad():
            if closure is not None:
                result = closure()
            self.accumulate(objective=objective, constraint=constraint)
        settings = self.param_groups[0]
        try:
            pairs = synchronize(self, gather(self))
            require_sound(pairs, self.names)
        finally:
            clear(self)
        if settings["clip"] is not None:
            clip_(pairs, settings["clip"])
        if settings["control"] == "pcgrad":
            pairs = pcgrad(pairs)
        elif settings["control"] == "blur":
            pairs = blur(pairs, settings["blur_weight"])
        for group in self.param_groups:
            group["steps"] += 1
            if group["kind"] == "muon":
                self._move_matrices(group, pairs)
            else:
                for parameter in group["params"]:
                    if parameter in pairs:
                        adamw_update(
                            parameter, pairs[parameter].total(), self.state[parameter], group, self._mask(parameter)
                        )
        return result

    def _mask(self, parameter: nn.Parameter) -> Tensor | None:
        return None if self.masks is None else self.masks[parameter]

    def _move_matrices(self, group: dict[str, Any], pairs: Mapping[nn.Parameter, Pair]) -> None:
        work: list[Work] = []
        for parameter in group["params"]:
            if parameter not in pairs:
                continue
            state, directions = self.state[parameter], []
            for side, gradient in zip("fg", pairs[parameter], strict=True):
                if f"momentum_{side}" not in state:
                    state[f"momentum_{side}"] = torch.zeros_like(parameter, dtype=torch.float32)
                buffer = state[f"momentum_{side}"]
                gradient = torch.zeros_like(buffer) if gradient is None else gradient.float()
                directions.append(muon.momentum_update(gradient, buffer, group["momentum"]))
            mask = self._mask(parameter)
            shrink = group["lr"] * group["weight_decay"]
            parameter.mul_(1 - shrink if mask is None else 1 - shrink * mask.to(parameter.dtype))
            work += [Work(parameter, b, *(b.take(d) for d in directions)) for b in self.blocks[parameter]]
        self.last = self._gates(group, work)
        buckets: dict[tuple, list[int]] = {}
        for index, (gate, item) in enumerate(zip(self.last, work, strict=True)):
            warm = gate.controlled and f"basis {item.block.name}" in self.state[item.parameter]
            buckets.setdefault((gate.controlled, gate.K, warm, item.f.shape, item.f.device), []).append(index)
        for (controlled, K, _, shape, _), members in buckets.items():
            bucket = [work[i] for i in members]
            M_f, M_g = torch.stack([item.f for item in bucket]), torch.stack([item.g for item in bucket])
            D = self._controlled(group, K, M_f, M_g, bucket) if controlled else muon.orthogonalize(M_f + M_g)
            scale = group["lr"] * muon.adjustment(*shape, group["adjust"])
            for update, (parameter, block, *_) in zip(D.unbind(), bucket, strict=True):
                mask = self._mask(parameter)
                block.add_(parameter, update if mask is None else update * block.take(mask), alpha=-scale)

    def _gates(self, group: dict[str, Any], work: list[Work]) -> list[Gate]:
        """Cosines of all blocks with one transfer to the host. A block that one objective does not reach is not controlled."""
        if not work:
            return []
        products = [torch.stack([(f * g).sum(), f.square().sum(), g.square().sum()]) for _, _, f, g in work]
        ranks = [min(f.shape) for _, _, f, _ in work]
        K = [min(default_rank(r, r) if group["K"] is None else group["K"], r // 2) for r in ranks]
        cosines = [
            fg / (ff * gg) ** 0.5 if min(ff, gg) > 1e-40 else None for fg, ff, gg in torch.stack(products).tolist()
        ]
        gated = group["control"] in ("sift", "topk", "random-gate")
        chosen = [gated and k > 0 and a is not None and a < group["epsilon"] for a, k in zip(cosines, K, strict=True)]
        if group["control"] == "random-gate":
            generator = torch.Generator().manual_seed(group["seed"] * 1_000_003 + group["steps"])
            drawn = set(torch.randperm(len(work), generator=generator)[: sum(chosen)].tolist())
            chosen = [i in drawn and K[i] > 0 for i in range(len(work))]
        return [Gate(b, k, a, c) for (_, b, _, _), k, a, c in zip(work, K, cosines, chosen, strict=True)]

    def _controlled(
        self, group: dict[str, Any], K: int, M_f: Tensor, M_g: Tensor, bucket: list[Work]
    ) -> Float[Tensor, "block m n"]:
        """A bucket of controlled blocks. Large ones continue subspace iteration from their last controlled step."""
        if 4 * (K + OVERSAMPLING) > min(M_f.shape[-2:]):
            spectra = [Spectrum(*(part.float() for part in truncated_svd(M, K))) for M in (M_f, M_g)]
        else:
            states = [(self.state[p], f"basis {b.name}") for p, b, *_ in bucket]
            warm = states[0][1] in states[0][0]
            starts = [torch.stack([s[key][side] for s, key in states]) if warm else None for side in (0, 1)]
            results = [
                subspace_iteration(M, K, V, iterations=0 if warm else 3)
                for M, V in zip((M_f, M_g), starts, strict=True)
            ]
            spectra = [spectrum for spectrum, _ in results]
            for (state, key), *bases in zip(states, *(basis for _, basis in results), strict=True):
                state[key] = torch.stack(bases)
        f, g = spectra
        D = f.U @ f.V.mT + g.U @ g.V.mT if group["control"] == "topk" else decorrelated(f, g, group["rtol"])
        if group["match_rms"]:
            D = D * (min(D.shape[-2:]) ** 0.5 / torch.linalg.matrix_norm(D, keepdim=True).clamp_min(1e-12))
        return D

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exact: unlike the base class, momenta keep their float32 when parameters are bfloat16."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        present = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(saved, present, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                moved = value.to(parameter.device).clone() if isinstance(value, Tensor) else value
                self.state[parameter][key] = moved

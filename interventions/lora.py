"""Stacked LoRA: M adapters of one frozen model, run in one forward pass.

1. Every target (a linear layer or GPT-2's Conv1D) of base output W x gets A [member, r, in], B [member, r, out].
2. Examples are folded member-major, [member · batch, position, ...]; base weights are read once for all members, and
   the update is one batched product: y = W x + (lora_alpha / r) · (x Aᵀ) B.
3. Layers below the first adapted one see the plain batch: the batch is repeated at the door of the first adapted layer.
4. A circuit confines members to its heads: rows of B (q, k, v) and columns of A (o) outside them are held at zero.

Each member is an ordinary PEFT adapter: `save_member` writes a directory that `PeftModel.from_pretrained` reads.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuits.files import read_json, write_atomically, write_json

from .targets import Keep, find_blocks, find_targets, is_conv1d, layer_of, shape, untouched


def low_rank(
    x: Float[Tensor, "member row in"],
    A: Float[Tensor, "member r in"],
    B: Float[Tensor, "member r out"],
    base: Float[Tensor, "member row out"],
    scale: float,
) -> Float[Tensor, "member r row"]:
    """base + scale · (x Aᵀ) B for every member at once, written into `base`. Returns A xᵀ, which the gradient needs."""
    inner = torch.bmm(A, x.mT)  # on a CPU twice as fast as x Aᵀ
    base.baddbmm_(inner.mT, B, alpha=scale)
    return inner


class AdaptedLinear(torch.autograd.Function):
    """`low_rank` on top of a frozen matrix: both ways to x in one gradient, and no copy of the output's gradient.

    ∂x = g W + scale · (B gᵀ)ᵀ A, ∂A = scale · (B gᵀ) x, ∂B = scale · (A xᵀ) g. Left alone, autograd adds ∂x up from
    two parts, and copies g of every update written into a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, base: Tensor, W: Tensor, scale: float) -> Tensor:
        rows = x.reshape(len(A), -1, x.shape[-1])
        inner = low_rank(rows, A, B, base.view(len(A), -1, base.shape[-1]), scale)
        ctx.mark_dirty(base)
        ctx.save_for_backward(rows, inner, A, B, W)
        ctx.scale, ctx.shape = scale, x.shape
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        rows, inner, A, B, W = ctx.saved_tensors
        g = grads[0].reshape(len(A), -1, B.shape[-1])
        back, x = torch.bmm(B, g.mT).mul_(ctx.scale), None
        if ctx.needs_input_grad[0]:
            x = (g.flatten(0, 1) @ W).view_as(rows).baddbmm_(back.mT, A).view(ctx.shape)
        return x, torch.bmm(back, rows), torch.bmm(inner, g).mul_(ctx.scale), None, None, None


class StackedLoRA(nn.Module):
    """Factors of `members` adapters; `attached` hooks them into the model and leaves no trace behind.

    `target_modules`: name endings as in PEFT, "all-linear", or None for PEFT's choice for this architecture (usually
    q and v). `layers`: only these layers. `keep`: what a circuit lets move, from `targets.confine`.
    """

    def __init__(
        self,
        hf: nn.Module,
        members: int,
        r: int = 8,
        lora_alpha: float | int | None = None,
        target_modules: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
        keep: Keep | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        if members < 1 or r < 1:
            raise ValueError(f"members={members}, r={r}; expected at least one member of rank 1")
        self.members, self.r, self.dropout, self.target_modules = members, r, dropout, target_modules
        self.lora_alpha = float(2 * r if lora_alpha is None else lora_alpha)
        self.blocks = find_blocks(hf)
        self.names = find_targets(hf, target_modules, layers, self.blocks, keep)
        self.first = self._first_layer(hf)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        device = next(hf.parameters()).device
        for number, name in enumerate(self.names):
            inputs, outputs = shape(hf.get_submodule(name))
            self.A.append(nn.Parameter(_initial(members, inputs, r, seed, number).to(device)))
            self.B.append(nn.Parameter(torch.zeros(members, r, outputs, device=device)))
            columns, rows = (keep or {}).get(name, (None, None))
            for kind, size, mask in (("columns", inputs, columns), ("rows", outputs, rows)):
                mask = torch.ones(size) if mask is None else mask.float()
                self.register_buffer(f"{kind}_{number}", mask.to(device), persistent=False)
        self.confined = keep is not None

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r

    def factors(self, number: int, which: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        """A [member, r, in] and B [member, r, out] of a target, zero outside the circuit."""
        A, B = self.A[number], self.B[number]
        if not (isinstance(which, slice) and which == slice(None)):
            A, B = A[which], B[which]
        if self.confined:
            A = A * getattr(self, f"columns_{number}")
            B = B * getattr(self, f"rows_{number}")
        return A, B

    @contextmanager
    def attached(self, hf: nn.Module, which: slice | Tensor = slice(None), fold: bool = True) -> Iterator[int]:
        """Within: `hf` answers for the members `which`, member-major. Base weights take no gradient meanwhile.

        Yields how many times the caller must repeat its inputs: 1 when the model does it at the first adapted layer.
        `fold=False`: the batch is already [member · batch], as for one adapter per example.
        """
        count = len(torch.arange(self.members)[which])
        trainable = [p for p in hf.parameters() if p.requires_grad]
        first = self.first if fold else None
        blocks = self.blocks or ""
        with ExitStack() as stack:
            for parameter in trainable:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            for number, name in enumerate(self.names):
                module = hf.get_submodule(name)
                hook = self._update(self.factors(number, which), count, _plain_matrix(module))
                stack.callback(module.register_forward_hook(hook).remove)
            if first is not None and count > 1:
                repeat = _Repeat(count)
                for layer, block in enumerate(hf.get_submodule(blocks).children()):
                    if layer >= first:
                        hook = repeat.door if layer == first else repeat.follow
                        stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield 1 if first is not None or not fold else count

    def _update(self, factors: tuple[Tensor, Tensor], count: int, W: Float[Tensor, "out in"] | None):
        A, B = factors

        def hook(module, args, output):
            dropout = self.dropout and self.training
            if W is not None and not dropout and A.dtype == args[0].dtype == output.dtype:
                return AdaptedLinear.apply(args[0], A, B, output.detach(), W, self.scale)
            # The update is computed in the adapters' precision and added in it, as PEFT does on a half precision base.
            x = args[0].to(A.dtype)
            x = x.reshape(count, -1, x.shape[-1])
            if dropout:
                x = nn.functional.dropout(x, self.dropout)
            base = output.to(A.dtype).reshape(count, -1, output.shape[-1])
            low_rank(x, A, B, base, self.scale)
            return base.view_as(output).to(output.dtype)

        return hook

    def _first_layer(self, hf: nn.Module) -> int | None:
        """First adapted layer; None where the whole input must be repeated instead (see the conditions)."""
        config = getattr(hf, "config", None)
        # ALiBi biases carry heads in the batch axis; classifiers index their logits by the input's batch size.
        alibi = getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt")
        head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None
        layers = [layer_of(name, self.blocks) for name in self.names]
        inner = [layer for layer in layers if layer is not None]
        if self.blocks is None or alibi or head is None or not inner:
            return None
        outside = [name for name, layer in zip(self.names, layers, strict=True) if layer is None]
        return None if any(hf.get_submodule(name) is not head for name in outside) else min(inner)

    def part(self, which: slice) -> "StackedLoRA":
        """A copy that holds only these members."""
        twin = copy.deepcopy(self)
        for factors in (twin.A, twin.B):
            for number, parameter in enumerate(factors):
                factors[number] = nn.Parameter(parameter.detach()[which].clone())
        twin.members = len(twin.A[0])
        return twin

    # one member <-> one PEFT adapter

    def member_state(self, member: int) -> dict[str, Tensor]:
        state = {}
        for number, name in enumerate(self.names):
            A, B = self.factors(number)
            state[f"base_model.model.{name}.lora_A.weight"] = A[member].detach().cpu().contiguous()
            state[f"base_model.model.{name}.lora_B.weight"] = B[member].T.detach().cpu().contiguous()
        return state

    def load_member_state(self, member: int, state: dict[str, Tensor]) -> None:
        wanted = {f"base_model.model.{name}.lora_{f}.weight" for name in self.names for f in "AB"}
        if wanted != set(state):
            different = sorted(wanted ^ set(state))
            raise ValueError(
                f"adapter and ensemble differ in {len(different)} tensors, first {different[0]!r}; expected the same "
                "target modules, and no other trained modules"
            )
        with torch.no_grad():
            for number, name in enumerate(self.names):
                for factor, stacked in (("A", self.A[number]), ("B", self.B[number].mT)):
                    value = state[f"base_model.model.{name}.lora_{factor}.weight"]
                    given, expected = tuple(value.shape), tuple(stacked.shape[1:])
                    if given != expected:
                        raise ValueError(f"{name}: lora_{factor} is {given}; expected {expected}")
                    stacked[member].copy_(value)

    def save_member(self, member: int, directory: str | Path, hf: nn.Module) -> Path:
        """An ordinary PEFT adapter directory."""
        from peft import LoraConfig
        from safetensors.torch import save

        config = getattr(hf, "config", None)
        targets = self.target_modules if isinstance(self.target_modules, list | tuple) else None
        whole = targets is not None and not self.confined and self.names == find_targets(hf, targets, None, self.blocks)
        lora = LoraConfig(
            r=self.r,
            lora_alpha=int(self.lora_alpha) if self.lora_alpha.is_integer() else self.lora_alpha,  # pyright: ignore
            lora_dropout=self.dropout,
            target_modules=list(targets) if targets and whole else list(self.names),
            fan_in_fan_out=any(is_conv1d(hf.get_submodule(name)) for name in self.names),
            base_model_name_or_path=getattr(config, "_name_or_path", None) or None,
            inference_mode=True,
        )
        directory = Path(directory)
        content = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.to_dict().items()}
        write_atomically(directory / "adapter_model.safetensors", save(self.member_state(member)))
        write_json(directory / "adapter_config.json", content)
        return directory

    def load_member(self, member: int, directory: str | Path) -> None:
        """Read a PEFT adapter directory into one member."""
        from safetensors.torch import load

        config = read_json(Path(directory) / "adapter_config.json")
        if (config["r"], config["lora_alpha"]) != (self.r, self.lora_alpha):
            raise ValueError(
                f"adapter in {str(directory)!r} has r={config['r']}, lora_alpha={config['lora_alpha']}; "
                f"expected r={self.r}, lora_alpha={self.lora_alpha:g}"
            )
        self.load_member_state(member, load((Path(directory) / "adapter_model.safetensors").read_bytes()))


def _plain_matrix(module: nn.Module) -> Float[Tensor, "out in"] | None:
    """What `module` multiplies by, where that, in full sight, is all it does: not packed, not elsewhere, not hooked."""
    plain = type(module) is nn.Linear or is_conv1d(module)
    if not plain or type(module.weight) is not nn.Parameter or not untouched(module):
        return None
    return module.weight.T if is_conv1d(module) else module.weight


class _Repeat:
    """Pre-hooks of layers: repeat every tensor of the plain batch, member-major."""

    def __init__(self, count: int):
        self.count, self.batch = count, 0
        self.done: dict[int, tuple[Tensor, Tensor]] = {}  # masks and rotary tables are the same objects in every layer

    def door(self, module, args, kwargs):
        """First adapted layer: here the hidden states still have the plain batch."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.batch, self.done = hidden.shape[0], {}
        return self.follow(module, args, kwargs)

    def follow(self, module, args, kwargs):
        return self._each(args), self._each(kwargs)

    def _each(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value) if value.ndim > 1 and value.shape[0] == self.batch else value
        if isinstance(value, tuple | list):
            return type(value)(self._each(item) for item in value)
        if isinstance(value, dict):
            return {key: self._each(item) for key, item in value.items()}
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if id(value) not in self.done:  # the original is kept, so that its id stays its own
            repeated = value[None].expand(self.count, *value.shape).reshape(self.count * self.batch, *value.shape[1:])
            self.done[id(value)] = (value, repeated)
        return self.done[id(value)][1]


def _initial(members: int, inputs: int, r: int, seed: int, number: int) -> Float[Tensor, "member r in"]:
    """PEFT's A, uniform in ±1/√in; one seed per member, so that member 3 of 4 starts as member 3 of 8."""
    bound = 1 / math.sqrt(inputs)
    draws = []
    for member in range(members):
        generator = torch.Generator().manual_seed(((seed * 1009 + member) * 4093 + number) % 2**63)
        draws.append((torch.rand(inputs, r, generator=generator) * 2 - 1) * bound)
    return torch.stack(draws).mT.contiguous()

"""A circuit bound to a model: exactly which slices of which parameters may move (CT-SFT §4.2; spec of the slices: ours).

1. Every head of the circuit owns its rows of q, k, v (and their biases) and its columns of o (`Anatomy.slices`).
2. Under grouped-query attention a key/value head serves several query heads. `kv` decides: "shared" trains it when any of
   its query heads is in the circuit, "whole-group" only when all are, "freeze" never. It is counted once.
3. Norms are shared by all heads: "all" of them learn, those of the "circuit"'s layers, or "none".
4. Everything else is frozen: MLPs, embeddings, unembedding, output biases, all other heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits import files
from circuits.anatomy import KV, Anatomy, Slice
from circuits.heads import Circuit, Head, HeadScores

if TYPE_CHECKING:
    from peft import LoraConfig, ShiraConfig

Norms = Literal["all", "circuit", "none"]
FORMAT = "luthier.mask/1"


def slices_of(
    circuit: Circuit, anatomy: Anatomy, kv: KV | str, norms: Norms | str, biases: bool, sizes: Mapping[str, int]
) -> list[Slice]:
    """Steps 1-3: the slices that may move, disjoint, sorted by name. `sizes[name]` is the length of a norm parameter."""
    whole = {group for group in groups(circuit, anatomy) if members(group, anatomy) <= circuit.heads}
    found = set()
    for head in circuit:
        own: Any = "freeze" if kv == "whole-group" and (head.layer, anatomy.kv_head(head.head)) not in whole else kv
        found.update(anatomy.slices(head, kv=own, biases=biases))
    layers = None if norms == "all" else sorted({head.layer for head in circuit})
    if norms != "none":
        found.update(Slice(name, 0, 0, sizes[name]) for name in anatomy.norms(layers))
    return sorted(found)


def groups(circuit: Circuit, anatomy: Anatomy) -> set[tuple[int, int]]:
    """(layer, key/value head) of every group the circuit touches."""
    return {(head.layer, anatomy.kv_head(head.head)) for head in circuit}


def members(group: tuple[int, int], anatomy: Anatomy) -> set[Head]:
    """The query heads that one key/value head serves."""
    layer, kv = group
    return {Head(layer, kv * anatomy.group + i) for i in range(anatomy.group)}


@dataclass(frozen=True)
class HeadMask:
    """Which slices may move. Give it to `restrict` or `finetune`; `save` writes safetensors and JSON."""

    circuit: Circuit
    slices: tuple[Slice, ...]
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, Any]
    policy: Mapping[str, Any]
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_circuit(
        cls, circuit: Circuit, model: Any, kv: KV | str = "shared", norms: Norms | str = "all", biases: bool = True
    ) -> "HeadMask":
        """The mask of a circuit on what `circuits.load` returned. Raises ValueError for heads the model does not have."""
        for name, given, known in (("kv", kv, KV.__args__), ("norms", norms, Norms.__args__)):
            if given not in known:
                raise ValueError(f"{name}={given!r} is not a policy; choose one of {', '.join(map(repr, known))}")
        anatomy: Anatomy = model.anatomy
        circuit.check(anatomy.n_layers, anatomy.n_heads)
        every = parameter_shapes(model)
        lengths = {name: every[name][0] for name in anatomy.norm_parameters}
        slices = slices_of(circuit, anatomy, kv, norms, biases, lengths)
        if not slices:
            raise ValueError(
                "this mask would train nothing: the circuit is empty and norms='none'; name at least one head"
            )
        return cls(
            circuit=circuit,
            slices=tuple(slices),
            shapes={entry.parameter: every[entry.parameter] for entry in slices},
            sizes=sizes_of(anatomy),
            policy={"kv": kv, "norms": norms, "biases": biases},
            model=model.name,
            provenance=dict(circuit.provenance),
        )

    @classmethod
    def avoiding(
        cls,
        circuit: Circuit,
        kept_task: Any,
        model: Any,
        *,
        budget: int,
        target_task: Any = None,
        interference: HeadScores | None = None,
        step: float = 1e-2,
        **policy: Any,
    ) -> "HeadMask":
        """The mask of the `budget` heads of `circuit` that disturb `kept_task` least, by the rule of `avoiding.py`.

        Give `target_task` (the rule is estimated from gradients) or `interference` (measured per head, lower is better).
        `policy` goes to `from_circuit`.
        """
        from .avoiding import least_disturbing

        chosen = least_disturbing(circuit, kept_task, model, target_task, budget, interference, step)
        return cls.from_circuit(chosen, model, **policy)

    @cached_property
    def n_parameters(self) -> int:
        """Values that may move; a key/value head shared by several chosen heads counts once."""
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        """{parameter name: values of it that may move}."""
        counts = dict.fromkeys(self.shapes, 0)
        for name, dim, start, stop in self.slices:
            counts[name] += (stop - start) * torch.Size(self.shapes[name]).numel() // self.shapes[name][dim]
        return counts

    def tensors(self) -> dict[str, Bool[Tensor, "..."]]:
        """{Hugging Face parameter name: True where it may move}, for the parameters the mask touches."""
        masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        for name, dim, start, stop in self.slices:
            masks[name].narrow(dim, start, stop - start).fill_(True)
        return masks

    def check(self, model: Any) -> "HeadMask":
        """Itself when it fits `model`; ValueError that says what differs. Other weights of the same shape are fine."""
        sizes = sizes_of(model.anatomy)
        differ = [f"{key} {mine!r}, not {sizes[key]!r}" for key, mine in self.sizes.items() if sizes.get(key) != mine]
        shapes = parameter_shapes(model)
        differ += [
            f"{name} {shape}, not {shapes.get(name)}"
            for name, shape in self.shapes.items()
            if shapes.get(name) != shape
        ]
        if differ:
            was = f"mask was made for {self.model or 'another model'} ({'; '.join(differ[:3])})"
            raise ValueError(f"{was}; make one for {model.name} with HeadMask.from_circuit")
        return self

    def save(self, stem: str | Path) -> Path:
        """`stem.safetensors` ([n, 3] rows dim, start, stop per parameter) and `stem.json`."""
        rows: dict[str, list[list[int]]] = {}
        for name, *entry in self.slices:
            rows.setdefault(name, []).append(entry)
        meta = {
            "format": FORMAT,
            "model": self.model,
            "sizes": dict(self.sizes),
            "policy": dict(self.policy),
            "circuit": self.circuit.to_dict(),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "n_parameters": self.n_parameters,
            "provenance": dict(self.provenance),
        }
        return files.save_tensors(stem, {name: torch.tensor(entries) for name, entries in rows.items()}, meta)

    @classmethod
    def load(cls, stem: str | Path, model: Any) -> "HeadMask":
        """Read what `save` wrote; refused with one line when it was made for another model."""
        tensors, meta = files.load_tensors(stem)
        if meta.get("format") != FORMAT:
            raise ValueError(f"{str(stem)!r} does not hold a head mask; expected a pair written by HeadMask.save")
        slices = sorted(Slice(name, *row) for name, rows in tensors.items() for row in rows.tolist())
        mask = cls(
            circuit=Circuit.from_dict(meta["circuit"]),
            slices=tuple(slices),
            shapes={name: tuple(shape) for name, shape in meta["shapes"].items()},
            sizes=meta["sizes"],
            policy=meta["policy"],
            model=meta["model"],
            provenance=meta["provenance"],
        )
        return mask.check(model)

    def to_json(self, format: str = "mib") -> dict[str, Any]:
        """The circuit as a node file that EAP-IG and MIB read ("mib"), or as luthier's own circuit JSON."""
        if format not in ("mib", "luthier"):
            raise ValueError(f"no export format {format!r}; choose 'mib' or 'luthier'")
        if format == "luthier":
            return self.circuit.to_dict()
        layers, heads = self.sizes["n_layers"], self.sizes["n_heads"]
        nodes = {"input": {"in_graph": True}}
        for layer in range(layers):
            nodes |= {f"a{layer}.h{head}": {"in_graph": Head(layer, head) in self.circuit} for head in range(heads)}
            nodes[f"m{layer}"] = {"in_graph": False}
        parallel = bool(self.sizes["parallel"])
        config = {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": parallel, "d_model": self.sizes["d_model"]}
        meta = {"by": "luthier", "model": self.model, "policy": dict(self.policy)}
        return {"cfg": config, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": {}, "meta": meta}

    def lora_config(self, r: int = 8, **options: Any) -> "LoraConfig":
        """A PEFT config for exactly the layers this mask touches; `restrict(peft_model, mask)` then keeps it to the heads."""
        from .adapters import lora_config

        return lora_config(self, r, **options)

    def _repr_html_(self) -> str:
        from circuits.display import table_html

        totals = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        rows = [[name, f"{n:,}", f"{n / totals[name]:.0%}"] for name, n in self.counts().items()]
        return table_html(repr(self), ["parameter", "values that may move", "share"], rows)

    def shira_config(self, model: Any, **options: Any) -> "ShiraConfig":
        """A PEFT SHiRA config with exactly the mask's matrix entries, where SHiRA's one-r rule allows it."""
        from .adapters import shira_config

        return shira_config(self, model, **options)

    def __repr__(self) -> str:
        kept = ", ".join(f"{key}={value}" for key, value in self.policy.items())
        return f"HeadMask({len(self.circuit)} heads: {self.circuit}; {kept}; {self.n_parameters:,} values may move)"


def sizes_of(anatomy: Anatomy) -> dict[str, Any]:
    """What must agree between the model a mask was made for and the one it is used on."""
    keys = ("family", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_model")
    return {**{key: getattr(anatomy, key) for key in keys}, "parallel": anatomy.layout.fused == "interleaved"}


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape}; a PEFT model's base layers under the names they have without PEFT."""
    from circuits.anatomy import unwrap

    named = unwrap(model.hf).named_parameters()
    return {name.replace(".base_layer", ""): tuple(parameter.shape) for name, parameter in named}

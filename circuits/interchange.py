"""Circuits to and from other tools' files: MIB / EAP-IG JSON and .pt (node level), CircuitKIT scores, old prune dictionaries.

1. `write_mib`: every head, MLP, input and logits as nodes, no edges; heads of the circuit are `in_graph`. MLPs and input are in
   the graph too, since circuits here are sets of heads with everything else left alone. Provenance goes under `meta`.
2. `read_circuit` reads that JSON back, and EAP-IG's own: heads that are `in_graph`; or, scored but binary-free, `top=k`.
3. `.pt` is a pickle: it is read with `weights_only=True`, which refuses anything but tensors and plain containers.
4. `{layer: [heads]}` is the older Hugging Face prune dictionary: the heads to REMOVE. The circuit is its complement.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .anatomy import Anatomy
from .files import read_json, write_json
from .heads import Circuit, Head, HeadScores


def write_mib(path: str | Path, circuit: Circuit, anatomy: Anatomy, scores: HeadScores | None = None) -> Path:
    """Write a circuit (with scores, if given) as EAP-IG / MIB JSON at node level."""
    circuit.check(anatomy.n_layers, anatomy.n_heads)
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True}}
    for layer in range(anatomy.n_layers):
        for head in range(anatomy.n_heads):
            here = Head(layer, head)
            nodes[str(here)] = {"in_graph": here in circuit} | ({} if scores is None else {"score": scores[here]})
        nodes[f"m{layer}"] = {"in_graph": True}
    nodes["logits"] = {"in_graph": True}
    parallel = anatomy.family == "gpt_neox"
    size = {"n_layers": anatomy.n_layers, "n_heads": anatomy.n_heads, "d_model": anatomy.d_model}
    content = {"cfg": size | {"parallel_attn_mlp": parallel}, "nodes": nodes, "edges": {}}
    return write_json(path, content | {"meta": {"luthier": dict(circuit.provenance)}})


def read_circuit(path: str | Path, top: int | None = None) -> Circuit:
    """A circuit from EAP-IG / MIB `.json` or `.pt`, CircuitKIT score JSON, or a prune-dictionary JSON with `cfg` absent.

    `top=k` takes the k highest node scores instead of what is marked as in the graph.
    """
    path = Path(path)
    content = _read_pt(path) if path.suffix == ".pt" else read_json(path)
    if isinstance(content, Mapping) and {"cfg", "nodes"} <= set(content):
        return _from_nodes(content, top, path)
    if isinstance(content, Mapping) and "node_scores" in content:
        return _top(_circuitkit(content["node_scores"]), top, path, None, None)
    raise ValueError(
        f"{path.name} is neither EAP-IG / MIB (cfg, nodes) nor CircuitKIT (node_scores); "
        "for a prune dictionary use from_prune_heads"
    )


def from_prune_heads(removed: Mapping[Any, Sequence[int]], n_layers: int, n_heads: int) -> Circuit:
    """The complement of `{layer: [heads to remove]}` (keys may be strings, as in JSON)."""
    gone = Circuit([(int(layer), head) for layer, heads in removed.items() for head in heads], n_layers, n_heads)
    kept = gone.complement()
    return Circuit(kept, n_layers, n_heads, {"how": "prune_heads complement", "removed": [str(head) for head in gone]})


def to_prune_heads(circuit: Circuit) -> dict[int, list[int]]:
    """`{layer: [heads to remove]}` that leaves the circuit."""
    removed: dict[int, list[int]] = {}
    for head in circuit.complement():
        removed.setdefault(head.layer, []).append(head.head)
    return removed


def _from_nodes(content: Mapping[str, Any], top: int | None, path: Path) -> Circuit:
    layers, heads = content["cfg"]["n_layers"], content["cfg"]["n_heads"]
    nodes = {name: node for name, node in content["nodes"].items() if name[:1] == "a"}
    if top is not None:
        scored = {Head.parse(name): node.get("score") for name, node in nodes.items()}
        return _top({head: score for head, score in scored.items() if score is not None}, top, path, layers, heads)
    inside = [Head.parse(name) for name, node in nodes.items() if node.get("in_graph")]
    return Circuit(inside, layers, heads, {"how": f"read from {path.name}", "meta": content.get("meta", {})})


def _top(scores: dict[Head, float], top: int | None, path: Path, layers: int | None, heads: int | None) -> Circuit:
    if top is None or not 0 < top <= len(scores):
        raise ValueError(f"{path.name} scores {len(scores)} heads; say how many to take with top=, at most that many")
    best = sorted(scores, key=lambda head: -scores[head])[:top]
    return Circuit(best, layers, heads, {"how": f"top {top} of {path.name}"})


def _circuitkit(scores: Mapping[str, float]) -> dict[Head, float]:
    """CircuitKIT writes heads as `A0.1` and MLPs as `MLP 5`."""
    return {Head.parse(name.lower()): score for name, score in scores.items() if name[:1] in "Aa"}


def _read_pt(path: Path) -> Any:
    """EAP-IG's .pt, turned into the JSON's shape. Node order there: input, then per layer its heads and its MLP, then logits."""
    import pickle

    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected an EAP-IG .pt file")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} holds more than tensors and plain containers; it is not read ({error})"[:300]
        ) from None
    if not isinstance(content, Mapping) or not {"cfg", "nodes_in_graph"} <= set(content):
        raise ValueError(f"{path.name} is not an EAP-IG file; expected the keys cfg and nodes_in_graph")
    layers, heads = content["cfg"]["n_layers"], content["cfg"]["n_heads"]
    names = ["input"]
    for layer in range(layers):
        names += [*(f"a{layer}.h{head}" for head in range(heads)), f"m{layer}"]
    inside, scores = content["nodes_in_graph"], content.get("nodes_scores")
    if len(inside) < len(names):
        raise ValueError(
            f"{path.name} has {len(inside)} nodes; a model of {layers} layers and {heads} heads has {len(names)}"
        )
    nodes = {
        name: {"in_graph": bool(inside[i])} | ({} if scores is None else {"score": float(scores[i])})
        for i, name in enumerate(names)
    }
    return {"cfg": content["cfg"], "nodes": nodes}

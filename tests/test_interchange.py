"""Other tools' circuit files: round trips, node order, complements, and nothing unpickled."""

import json

import pytest
import torch

from circuits import Circuit, Head, HeadScores
from circuits.interchange import from_prune_heads, read_circuit, to_prune_heads, write_mib

from models import shared_tiny

HEADS = [Head(0, 1), Head(2, 3)]


def test_mib_json_round_trip(tmp_path):
    anatomy = shared_tiny("llama").anatomy
    circuit = Circuit(HEADS, 3, 4, {"how": "by hand"})
    scores = HeadScores(torch.arange(12.0).view(3, 4), "m")
    content = json.loads(write_mib(tmp_path / "c.json", circuit, anatomy, scores).read_text())
    assert set(content) == {"cfg", "nodes", "edges", "meta"}
    assert len(content["nodes"]) == 1 + 3 * 5 + 1 and content["nodes"]["a2.h3"] == {"in_graph": True, "score": 11.0}
    assert content["cfg"] == {"n_layers": 3, "n_heads": 4, "d_model": 32, "parallel_attn_mlp": False}
    again = read_circuit(tmp_path / "c.json")
    assert again == Circuit(HEADS, 3, 4) and again.provenance["meta"]["luthier"]["how"] == "by hand"
    assert read_circuit(tmp_path / "c.json", top=2) == Circuit([(2, 2), (2, 3)], 3, 4)


def test_eap_ig_pt_by_node_order(tmp_path):
    inside = torch.zeros(1 + 2 * 4, dtype=torch.bool)  # input, then a.h0 a.h1 a.h2 m of each of two layers
    inside[[0, 2, 4, 7, 8]] = True
    scores = torch.arange(9.0)
    cfg = {"n_layers": 2, "n_heads": 3, "d_model": 8, "parallel_attn_mlp": False}
    torch.save({"cfg": cfg, "nodes_in_graph": inside, "nodes_scores": scores}, tmp_path / "c.pt")
    assert read_circuit(tmp_path / "c.pt") == Circuit([(0, 1), (1, 2)], 2, 3)
    assert read_circuit(tmp_path / "c.pt", top=1) == Circuit([(1, 2)], 2, 3)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"cfg": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        read_circuit(tmp_path / "evil.pt")


def test_prune_dictionaries_are_complements():
    circuit = from_prune_heads({"0": [1, 2], 1: [0]}, 2, 3)
    assert circuit == Circuit([(0, 0), (1, 1), (1, 2)], 2, 3)
    assert to_prune_heads(circuit) == {0: [1, 2], 1: [0]}
    with pytest.raises(ValueError, match="a5.h0"):
        from_prune_heads({5: [0]}, 2, 3)


def test_circuitkit_scores_and_unknown_files(tmp_path):
    (tmp_path / "k.json").write_text(json.dumps({"node_scores": {"A0.1": 0.8, "MLP 5": 0.9, "A3.2": 0.1}}))
    assert read_circuit(tmp_path / "k.json", top=1) == Circuit([(0, 1)])
    with pytest.raises(ValueError, match="top="):
        read_circuit(tmp_path / "k.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="from_prune_heads"):
        read_circuit(tmp_path / "x.json")

"""`luthier interfere` as people call it, on the pocket model."""

import json

import pytest
import torch

from command import luthier

TRAIN = ("train", "--objective", "{f}/forget.jsonl", "--out", "{f}/x", "--constraint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Facts to forget and to keep, as files."""
    from circuits.pocket import facts

    folder = tmp_path_factory.mktemp("data")
    for split in ("forget", "retain"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts(split)))
    return folder


def test_train_measure_merge(monkeypatch, capsys, folder):
    """Two trained models, measured against each other and merged."""
    for name, first in (("a", "forget"), ("b", "retain")):
        second = "retain" if first == "forget" else "forget"
        files = "--objective", folder / f"{first}.jsonl", "--constraint", folder / f"{second}.jsonl"
        options = "--objective-as", "forget", "--steps", 3, "--lr", 5e-3, "--out", folder / name, "--json"
        code, out, err = luthier(monkeypatch, capsys, "interfere", "train", *files, *options)
        assert code == 0, err
        assert json.loads(out)["last"]["step"] == 3
        assert (
            "luthier interfere train" in (folder / name / "report.html").read_text()
            and (folder / name / "model.safetensors").is_file()
        )
    assert len(json.loads((folder / "a" / "training.json").read_text())) == 3

    measured = folder / "measured"
    code, out, err = luthier(
        monkeypatch,
        capsys,
        "interfere",
        "measure",
        folder / "a",
        folder / "b",
        "--view",
        "head",
        "--out",
        measured,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["blocks"] == 32 and -1 <= json.loads(out)["total"]["cosine"] <= 1
    assert (measured / "scores.safetensors").is_file()
    page, total = (measured / "report.html").read_text(), json.loads(out)["total"]
    assert f"cosine of the two updates is {total['cosine']:+.3f} over the whole model" in page
    assert "luthier interfere measure" in page and "Discovery" not in page  # its scores are no effects on a margin

    code, out, err = luthier(
        monkeypatch, capsys, "interfere", "merge", folder / "a", folder / "b", "--out", folder / "both", "--json"
    )
    assert code == 0, err
    summary = json.loads(out)
    assert summary["interference before"] > 0 and summary["interference after"] < 1e-6
    from circuits import load

    merged, base = (load(source).hf.model.layers[0].mlp.up_proj.weight for source in (folder / "both", "pocket"))
    assert not torch.equal(merged, base)


def test_files_of_rows_are_losses(monkeypatch, capsys, folder):
    options = "--first-as", "forget", "--out", folder / "rows", "--n", 6
    code, out, err = luthier(
        monkeypatch, capsys, "interfere", "measure", folder / "forget.jsonl", folder / "retain.jsonl", *options
    )
    assert code == 0, err
    assert "whole model" in out and "layer 3 mlp" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("measure", "{f}/forget.jsonl", "{f}/none.jsonl", "--out", "{f}/x"), "no file"),
        (
            ("measure", "{f}/forget.jsonl", "{f}/retain.jsonl", "--view", "neuron", "--out", "{f}/x"),
            "view='neuron'; expected one of",
        ),
        (
            ("measure", "{f}/forget.jsonl", "{f}/retain.jsonl", "--first-as", "hate", "--out", "{f}/x"),
            "learn or forget, not 'hate'",
        ),
        (("merge", "{f}", "{f}", "--out", "{f}/x"), "no safetensors in"),
        (
            ("train", "--objective", "{f}/forget.jsonl", "--constraint", "{f}/bad.jsonl", "--out", "{f}/x"),
            "has columns a; expected `text`",
        ),
        (
            (
                "train",
                "--objective",
                "{f}/forget.jsonl",
                "--constraint",
                "{f}/retain.jsonl",
                "--control",
                "no",
                "--out",
                "{f}/x",
            ),
            "control='no'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, folder, arguments, text):
    (folder / "bad.jsonl").write_text('{"a": 1}\n')
    code, _, err = luthier(monkeypatch, capsys, "interfere", *(a.format(f=folder) for a in arguments))
    assert code == 2 and text in err and err.count("\n") == 1


def test_adapters_are_measured_and_merged_as_the_changes_they_are(monkeypatch, capsys, tmp_path):
    """Two LoRA directories: the merged model is the base plus the sum that task arithmetic asks for."""
    from circuits import load
    from interventions import RenyiEnsemble

    ensemble = RenyiEnsemble(load("pocket"), 2, r=2, target_modules=["q_proj"], layers=[0, 1])
    with torch.no_grad():
        for number, B in enumerate(ensemble.stack.B):
            B.copy_(0.1 * torch.randn(B.shape, generator=torch.Generator().manual_seed(number)))
    ensemble.save(tmp_path)
    both = tmp_path / "member_0", tmp_path / "member_1"
    arguments = "interfere", "measure", *both, "--view", "matrix", "--out", tmp_path / "measured"
    code, out, err = luthier(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "layers.0.self_attn.q_proj" in out and "layers.2" not in out
    arguments = "interfere", "merge", *both, "--method", "task-arithmetic", "--out", tmp_path / "merged", "--json"
    code, out, err = luthier(monkeypatch, capsys, *arguments)
    assert code == 0, err
    merged, base = (load(source).hf.model.layers for source in (tmp_path / "merged", "pocket"))
    for layer, (A, B) in enumerate(zip(ensemble.stack.A, ensemble.stack.B, strict=True)):
        change = ensemble.stack.scale * torch.einsum("mri,mro->oi", A, B)
        moved = merged[layer].self_attn.q_proj.weight - base[layer].self_attn.q_proj.weight
        torch.testing.assert_close(moved, change, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged[2].self_attn.q_proj.weight, base[2].self_attn.q_proj.weight)

import json

import pytest
import torch

from circuits import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = files.write_atomically(tmp_path / "x.json", "old")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_tensors_come_back_and_halves_must_belong_together(tmp_path):
    files.save_tensors(tmp_path / "a", {"w": torch.arange(6.0).view(2, 3).T}, {"k": 1})
    tensors, meta = files.load_tensors(tmp_path / "a.json")
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3).T) and meta == {"k": 1}
    files.save_tensors(tmp_path / "b", {"w": torch.zeros(1)}, {})
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is not the file a\.json was saved with"):
        files.load_tensors(tmp_path / "a")


def test_a_stem_with_a_dot_keeps_it(tmp_path):
    files.save_tensors(tmp_path / "v1.5", {"w": torch.zeros(1)}, {})
    assert json.loads((tmp_path / "v1.5.json").read_text())["sha256"]
    assert files.load_tensors(tmp_path / "v1.5")[0]["w"].item() == 0


def test_fingerprints_follow_the_content():
    assert files.fingerprint([1, "a"]) == files.fingerprint([1, "a"]) != files.fingerprint([1, "b"])

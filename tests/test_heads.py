import pytest
import torch

from circuits import Circuit, Head, HeadScores


def scores(values, examples=None, **meta):
    return HeadScores(torch.tensor(values), "by hand", None if examples is None else torch.tensor(examples), **meta)


def test_heads_print_and_parse_in_the_shared_grammar():
    assert str(Head(9, 6)) == "a9.h6"
    assert Head.parse("a9.h6") == Head.parse("L9H6") == Head.parse("9.6") == Head(9, 6)
    assert sorted([Head(2, 0), Head(1, 9)]) == [Head(1, 9), Head(2, 0)]
    for wrong in ("m3", "96", "a9.h"):
        with pytest.raises(ValueError, match="is not a head; expected the form a9.h6"):
            Head.parse(wrong)


def test_circuits_are_sets_with_algebra():
    a, b = Circuit(["a0.h1", "a3.h2"], 4, 4), Circuit([(3, 2), Head(2, 0)], 4, 4)
    assert str(a) == "a0.h1 a3.h2"
    assert a == Circuit([Head(3, 2), Head(0, 1)], 4, 4) and hash(a) == hash(Circuit(["a3.h2", "a0.h1"], 4, 4))
    assert str(a | b) == "a0.h1 a2.h0 a3.h2"
    assert str(a & b) == "a3.h2" and str(a - b) == "a0.h1"
    assert a.jaccard(b) == pytest.approx(1 / 3)
    assert Circuit([]).jaccard(Circuit([])) == 1.0
    assert len(a.complement()) == 14 and not a.complement().heads & a.heads


def test_a_circuit_refuses_heads_that_do_not_exist():
    with pytest.raises(ValueError, match=r"circuit names a4\.h0, but the model has layers 0-3 and heads 0-3"):
        Circuit([(4, 0)], 4, 4)


def test_matched_random_keeps_the_count_per_layer_and_avoids_the_circuit():
    circuit = Circuit(["a0.h1", "a0.h2", "a2.h3"], 3, 4)
    drawn = [circuit.matched_random(seed) for seed in range(8)]
    for control in drawn:
        assert [head.layer for head in control] == [0, 0, 2]
        assert not control.heads & circuit.heads
    assert circuit.matched_random(3) == drawn[3] and len(set(drawn)) > 1
    crowded = Circuit([(0, 0), (0, 1), (0, 2)], 1, 4).matched_random(0)  # only one free head: two members must return
    assert len(crowded) == 3 and Head(0, 3) in crowded


def test_controls_by_score():
    s = scores([[0.5, -2.0], [0.01, 3.0]])
    assert [str(h) for h in s.rank()] == ["a1.h1", "a0.h0", "a1.h0", "a0.h1"]
    assert str(s.top(2)) == "a0.h0 a1.h1"
    assert str(s.top(2, by="magnitude")) == "a0.h1 a1.h1"
    assert str(Circuit.near_zero(s, 1)) == "a1.h0" and str(Circuit.least(s, 1)) == "a0.h1"
    assert s["a1.h1"] == s[1, 1] == 3.0
    with pytest.raises(ValueError, match="5 heads were asked for, but the model has 4"):
        s.top(5)


def test_the_bootstrap_interval_covers_the_mean_and_shrinks_with_examples():
    generator = torch.Generator().manual_seed(0)
    wide = HeadScores.from_examples(torch.randn(20, 1, 2, generator=generator), "noise")
    narrow = HeadScores.from_examples(torch.randn(2000, 1, 2, generator=generator), "noise")
    for s, n in ((wide, 20), (narrow, 2000)):
        low, high = s.interval()
        assert ((low < s.values) & (s.values < high)).all()
        # A normal mean's interval is 2 x 1.96 / sqrt(n) wide.
        assert ((high - low) * n**0.5 / 3.92 - 1).abs().max() < 0.35
    same = HeadScores.from_examples(torch.full((7, 1, 2), 3.0), "constant")
    assert torch.allclose(torch.stack(same.interval()), torch.full((2, 1, 2), 3.0))
    with pytest.raises(ValueError, match="no per-example values"):
        scores([[1.0]]).interval()


def test_correlation_with_itself_its_negative_and_another_shape():
    s = scores([[0.5, -2.0], [0.01, 3.0]])
    assert s.correlation(s) == {"pearson": pytest.approx(1), "spearman": pytest.approx(1), "top10": 1.0}
    assert s.correlation(scores([[-0.5, 2.0], [-0.01, -3.0]]))["spearman"] == pytest.approx(-1)
    with pytest.raises(ValueError, match="scores of different models"):
        s.correlation(scores([[1.0, 2.0]]))


def test_scores_refuse_nan_and_name_the_head():
    with pytest.raises(ValueError, match=r"by hand gave a score that is not finite at a1\.h0"):
        scores([[1.0], [float("nan")]])


def test_saved_nouns_load_equal(tmp_path):
    s = scores(
        [[1.0, 2.0]], [[[1.0, 2.0]], [[1.0, 2.0]]], model="m", task="t", data="d", seed=3, options={"rules": "exact"}
    )
    s.save(tmp_path / "s")
    loaded = HeadScores.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.values, s.values) and torch.equal(loaded.examples, s.examples)
    assert loaded.provenance() == s.provenance()
    circuit = s.top(1)
    assert Circuit.load(circuit.save(tmp_path / "c.json")) == circuit
    assert Circuit.load(tmp_path / "c.json").provenance["method"] == "by hand"


def test_foreign_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a circuit: expected JSON like"):
        Circuit.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("not json")
    with pytest.raises(ValueError, match="is not JSON"):
        Circuit.load(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no file .*expected a JSON file that luthier saved"):
        HeadScores.load(tmp_path / "absent")


def test_nouns_print_themselves_and_escape_html():
    s = scores([[0.5, -2.0]], [[[0.5, -2.0]], [[0.5, -2.0]]], model="m", task="<script>alert(1)</script>")
    assert "HeadScores(by hand: m" in repr(s) and "a0.h0      +0.500" in repr(s)
    assert "<script>" not in s._repr_html_() and "&lt;script&gt;" in s._repr_html_()
    assert repr(Circuit(["a0.h1"], 2, 2)) == "Circuit(1 of 4 heads: a0.h1)"
    assert "<td>h1</td>" in Circuit(["a0.h1"], 2, 2)._repr_html_()

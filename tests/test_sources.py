"""Sources that are nodes or sets, against hooks and against the one-head methods."""

from dataclasses import replace

import pytest
import torch
from test_cdt import ablated
from test_discovery import TokenTask

from circuits import Circuit, Head, Node, relevance, source_relevance, token_relevance
from circuits.means import mean_activations
from circuits.sources import SourceScores

from models import shared_tiny


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert-classifier"])
def test_sets_are_what_ablating_them_together_does(family, side):
    model = shared_tiny(family)
    if model.is_encoder and side == "left":
        pytest.skip("encoders are padded on the right")
    task = TokenTask(side, columns=(0, 1, 2) if model.kind == "classifier" else (5, 9, 11), n=3)
    encoded, means = task.encode(model), mean_activations(model, task)
    circuit = Circuit([Head(0, 1), Head(0, 3), Head(2, 0)])
    scores = source_relevance(model, task, [circuit, [Node(1, 2), Head(2, 1)], Node(1, 0)], progress=False)

    def margin(logits):
        columns = logits[:, encoded.columns] if model.kind == "classifier" else encoded.columns_of(logits)
        return encoded.margin(columns)

    with torch.no_grad():
        clean = margin(model(encoded.tokens, encoded.attention_mask))
    for i, nodes in enumerate(([Node(*h) for h in circuit], [Node(1, 2), Node(2, 1)], [Node(1, 0)])):
        effect = clean - margin(ablated(model, encoded.tokens, encoded.attention_mask, nodes, means))
        torch.testing.assert_close(scores.examples[:, i], effect, atol=1e-5, rtol=1e-5)
    assert scores[circuit] == pytest.approx(float(scores.examples[:, 0].mean()))
    assert scores[Node(1, 0)] == pytest.approx(relevance(model, task, progress=False)["a1.h0"], abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_node_is_what_silencing_that_head_at_that_token_does(side):
    """Rows of 9, 5 and 7 tokens: positions count from the end, and missing ones score 0."""
    model, task = shared_tiny("llama"), TokenTask(side, n=3)
    scores = source_relevance(model, task, progress=False)
    assert len(scores.sources) == 3 * 4 * 9 and scores.sources[0] == (Node(0, 0, -9),)
    head = Head(1, 2)
    expected = token_relevance(model, task, head, progress=False).values
    for row, (values, size) in enumerate(zip(expected, (9, 5, 7), strict=True)):
        mine = scores.examples[row].view(3, 4, 9)[1, 2]
        torch.testing.assert_close(mine[9 - size :], values, atol=1e-5, rtol=1e-4)
        assert mine[: 9 - size].abs().sum() < 1e-5
    grid = scores.grid()
    assert grid.shape == (3, 9, 4) and grid[1, -1, 2] == pytest.approx(scores[Node(1, 2, -1)])


def test_rows_of_one_length_count_from_the_start():
    class Even(TokenTask):
        def encode(self, model):
            whole = super().encode(model)
            tokens, readout = whole.tokens[:, :5], torch.full_like(whole.readout, 4)
            return replace(whole, tokens=tokens, attention_mask=torch.ones_like(tokens), readout=readout)

    scores = source_relevance(shared_tiny("gpt2"), Even(), rules="frozen", progress=False)
    assert {source[0].position for source in scores.sources} == set(range(5))
    best = scores.top(2)
    assert scores[best[0]] >= scores[best[1]] == pytest.approx(float(scores.values.sort().values[-2]))
    assert f"a{best[0][0].layer}.h{best[0][0].head}@{best[0][0].position} " in repr(scores)


def test_target_heads_and_files(tmp_path):
    model, task = shared_tiny("llama"), TokenTask()
    options = dict(targets=[Head(2, 1), Head(1, 0)], progress=False)
    scores = source_relevance(model, task, [Node(0, 1), Node(0, 2)], **options)
    assert scores[Node(0, 2)] == pytest.approx(relevance(model, task, **options)["a0.h2"], rel=1e-5)
    scores.save(tmp_path / "s")
    again = SourceScores.load(tmp_path / "s")
    assert again.sources == scores.sources and torch.equal(again.examples, scores.examples)
    assert again.about["targets"] == "a1.h0 a2.h1" and again.method == "cdt-exact"


def test_bad_input_says_what_was_expected(tmp_path):
    model, task = shared_tiny("llama"), TokenTask()

    def run(sources):
        return source_relevance(model, task, sources, progress=False)

    with pytest.raises(ValueError, match="sources='heads'; expected 'nodes', or a list of Node"):
        run("heads")
    with pytest.raises(ValueError, match="source position 40 does not exist"):
        run([Node(0, 0, 40)])
    with pytest.raises(ValueError, match="a source without nodes"):
        run([[]])
    scores = run([Node(0, 1), Circuit([Head(0, 1), Head(1, 1)])])
    with pytest.raises(ValueError, match=r"a0.h3@2 is not one of the 2 sources"):
        scores[Node(0, 3, 2)]
    with pytest.raises(ValueError, match="only sources of one node with a position"):
        scores.grid()
    relevance(model, task, progress=False).save(tmp_path / "heads")
    with pytest.raises(ValueError, match="does not hold source scores"):
        SourceScores.load(tmp_path / "heads")

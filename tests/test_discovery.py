"""relevance and discover on tasks: against the ablation oracle, and the circuit's own faithfulness."""

import pytest
import torch

from circuits import Circuit, Head, ablation, discover, faithfulness, relevance
from circuits.tasks import Task

from models import shared_tiny


class TokenTask(Task):
    """A task given as token ids, so that a tiny model without a tokenizer can be asked."""

    name = "tokens"
    fingerprint = "fixed"

    def __init__(self, side="right", columns=(5, 9, 11), n=6):
        self.side, self.columns, self.n = side, columns, n

    def __len__(self):
        return self.n

    def select(self, indices):
        return self

    def encode(self, model):
        from circuits.encoding import Encoded

        from models import ragged

        tokens, mask = model.pad(ragged(self.n), self.side)
        columns = torch.tensor(self.columns)
        gold = torch.arange(self.n) % len(columns)
        direction = torch.full((self.n, len(columns)), -1 / (len(columns) - 1))
        direction[torch.arange(self.n), gold] = 1.0
        return Encoded(tokens, mask, model.pooled_position(tokens, mask), columns, direction, gold, gold)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama-classifier", "bert-classifier"])
def test_exact_relevance_is_ablation(family, side):
    model = shared_tiny(family)
    if family == "bert-classifier" and side == "left":
        pytest.skip("encoders are padded on the right")
    task = TokenTask(side, columns=(0, 1, 2) if model.kind == "classifier" else (5, 9, 11))
    oracle = ablation(model, task, progress=False)
    found = relevance(model, task, progress=False)
    assert (found.examples - oracle.examples).abs().max() < 1e-5 * oracle.examples.abs().max()


def test_discovery_takes_the_highest_heads_and_reports_their_faithfulness():
    model, task = shared_tiny("llama"), TokenTask()
    circuit = discover(model, task, depth=0, per_depth=3, progress=False)
    scores = relevance(model, task, progress=False)
    assert circuit == scores.top(3)
    step = circuit.provenance["steps"][0]
    assert step["heads"] == pytest.approx({str(head): scores[head] for head in circuit}, rel=1e-5)
    curve = faithfulness(model, task, circuit, controls=0, progress=False)
    assert step["faithfulness"] == pytest.approx(float(curve.faithfulness[-1]), rel=1e-4)


def test_depth_adds_heads_that_come_before_the_last_ones():
    model, task = shared_tiny("gpt2"), TokenTask()
    circuit = discover(model, task, depth=3, per_depth=2, progress=False)
    steps = [[Head.parse(h) for h in step["heads"]] for step in circuit.provenance["steps"]]
    assert len(set().union(*steps)) == sum(map(len, steps)) == len(circuit)
    for targets, sources in zip(steps, steps[1:], strict=False):
        assert all(source.layer < max(t.layer for t in targets) for source in sources)
    stopped = discover(model, task, depth=3, per_depth=2, stop_at=-100.0, progress=False)
    assert stopped == Circuit(steps[0], 3, 4)


def test_pruning_never_loses_faithfulness():
    model, task = shared_tiny("llama"), TokenTask()
    whole = discover(model, task, depth=1, per_depth=4, progress=False)
    pruned = discover(model, task, depth=1, per_depth=4, prune=True, progress=False)
    assert set(pruned) < set(whole)
    assert {Head.parse(h) for h in pruned.provenance["pruned"]} == set(whole) - set(pruned)
    keep = [float(faithfulness(model, task, c, controls=0, progress=False).faithfulness[-1]) for c in (whole, pruned)]
    assert keep[1] >= keep[0] - 1e-5


def test_relevance_to_a_head_is_its_written_share():
    """Eq. 6 under exact rules: what the target writes towards the answer, clean minus ablated."""
    from test_cdt import ablated

    from circuits import record
    from circuits.cdt import Node
    from circuits.means import mean_activations

    model, task = shared_tiny("llama"), TokenTask(n=3)
    encoded, target, source = task.encode(model), Head(2, 1), Head(0, 3)
    means = mean_activations(model, task)
    with torch.no_grad():
        with record(model, "z", [2]) as clean:
            model(encoded.tokens, encoded.attention_mask)
        with record(model, "z", [2]) as changed:
            ablated(model, encoded.tokens, encoded.attention_mask, [Node(*source)], means)
        beta = (clean[2] - changed[2])[torch.arange(3), encoded.readout, target.head]
        direction = encoded.direction @ model.hf.lm_head.weight[encoded.columns]
        written = beta @ model.anatomy.W_O(model.hf, 2)[target.head]
        expected = (written * direction / direction.norm(dim=-1, keepdim=True)).sum(-1)
    scores = relevance(model, task, targets=[target], progress=False)
    torch.testing.assert_close(scores.examples[:, 0, 3], expected, atol=1e-6, rtol=1e-4)
    assert scores.examples[:, 2].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rules": "best"}, "rules='best'; expected one of 'paper', 'frozen', 'exact'"),
        ({"sources": "nodes"}, "expected 'heads' or a list of Head"),
        ({"sources": [Head(9, 0)]}, "a9.h0"),
        ({"batch_size": 0}, "expected a positive number"),
        ({"means": torch.zeros(3, 4, 5)}, "expected [3, (position,) 4, 8]"),
    ],
)
def test_bad_input_says_what_was_expected(options, text):
    with pytest.raises(ValueError) as error:
        relevance(shared_tiny("llama"), TokenTask(), progress=False, **options)
    assert text in str(error.value)

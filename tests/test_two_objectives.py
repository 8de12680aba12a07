import math

import pytest
import torch

from circuits import load
from interventions.sift import SIFT
from interventions.two_objectives import batches, encode, forget, learn, margins, prefer, train

FACTS = [("anna lives in", " rome"), ("bob likes", " soup")]


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


def test_only_answers_count_and_padding_does_not(pocket):
    rows = encode(pocket.tokenizer, FACTS)
    assert rows.scored.sum(1).tolist() == [
        len(pocket.tokenizer(a, add_special_tokens=False)["input_ids"]) for _, a in FACTS
    ]
    together = learn(pocket.hf, rows).item()
    alone = [learn(pocket.hf, encode(pocket.tokenizer, [row])).item() for row in FACTS]
    counts = rows.scored.sum(1).tolist()
    assert together == pytest.approx(sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts), rel=1e-4)
    whole = encode(pocket.tokenizer, [("", "anna lives in")])
    assert whole.scored.tolist()[0] == [False] + [True] * (whole.tokens.shape[1] - 1)


def test_the_three_losses_by_hand(pocket):
    one = encode(pocket.tokenizer, [("anna lives in", " paris")])
    p = math.exp(-learn(pocket.hf, one).item())
    assert forget(pocket.hf, one).item() == pytest.approx(-math.log(1 - p), abs=1e-5)
    chosen, rejected = (
        encode(pocket.tokenizer, [("the song was good | sentiment:", word)]) for word in (" good", " bad")
    )
    margin = margins(pocket.hf, chosen, rejected)
    assert margin.item() == pytest.approx((learn(pocket.hf, rejected) - learn(pocket.hf, chosen)).item(), abs=1e-4)
    assert prefer(pocket.hf, chosen, rejected, margin.detach()).item() == pytest.approx(math.log(2), abs=1e-6)
    assert prefer(pocket.hf, chosen, rejected, margin.detach() - 10).item() == pytest.approx(
        math.log(1 + math.exp(-1)), abs=1e-5
    )


def test_batches_go_round_in_one_order(pocket):
    rows = encode(pocket.tokenizer, [("", f"anna likes {w}") for w in ("soup", "rice", "bread")])
    draw = batches(rows, 2, seed=0)
    seen = torch.cat([draw(step).tokens for step in range(3)])
    assert torch.equal(seen[:3], seen[3:]) and len({tuple(row) for row in seen[:3].tolist()}) == len(
        rows.tokens.unique(dim=0)
    )


def test_training_forgets_one_thing_and_keeps_the_other():
    from circuits.pocket import facts

    model = load("pocket")
    rows = {
        split: encode(model.tokenizer, [(r["prompt"], r["answer"]) for r in facts(split)][:9])
        for split in ("forget", "retain")
    }
    before = {split: learn(model.hf, part).item() for split, part in rows.items()}
    optimizer = SIFT(model, lr=2e-3, weight_decay=0.0)
    records = train(
        model.hf,
        optimizer,
        lambda _: (forget(model.hf, rows["forget"]), learn(model.hf, rows["retain"])),
        12,
        progress=False,
    )
    after = {split: learn(model.hf, part).item() for split, part in rows.items()}
    assert after["forget"] > before["forget"] + 1 and after["retain"] < before["retain"] + 0.3
    assert len(records) == 12 and records[-1].objective < records[0].objective and not model.hf.training
    assert any(record.controlled > 0 for record in records) and all(-1 <= record.cosine <= 1 for record in records)


def test_rows_without_answers_are_refused(pocket):
    with pytest.raises(ValueError, match="no rows to train on"):
        encode(pocket.tokenizer, [])
    with pytest.raises(ValueError, match="has no answer token to score; give text or raise max_length=2"):
        encode(pocket.tokenizer, [("anna lives in", " rome")], max_length=2)

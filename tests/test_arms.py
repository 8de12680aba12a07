"""The comparison: every arm runs from the same start, resumes, chooses on validation, and its intervals are right."""

import json

import numpy as np
import pytest
import torch
from test_tuning import toy, words_tokenizer

from circuits import Circuit, HeadScores, load
from interventions.arms import ARMS, tfidf, tune_arm
from interventions.avoiding import costs, disturbance
from interventions.experiment import Bench, Experiment, Splits, at_depth, compare, restore, snapshot, target_examples
from interventions.masks import HeadMask
from interventions.tradeoff import agreement, arrows, bootstrap, choose, points, summarise, table, trade_off

from models import tiny


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    hf, tokenizer = tiny("llama"), words_tokenizer()
    hf.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    source = Splits(toy(40, 1, name="source"), toy(12, 2), toy(20, 3))
    target = Splits(toy(40, 4, flip=True), toy(12, 5, flip=True), toy(20, 6, flip=True))
    return Experiment(
        str(folder / "model"), source, {"flipped": target}, folder / "out", arms=("circuit", "norms", "tfidf"), sizes=(8,),
        seeds=(1, 2), per_depth=1, depths=(0, 1), source_examples=24, source_epochs=6, source_lr=3e-3, epochs=1,
    )  # fmt: skip


def test_comparison_runs_resumes_and_reports(plan):
    lines = compare(plan, progress=False)
    path = plan.directory / "results.jsonl"
    per_rate = {arm: 2 if arm == "circuit" else 1 for arm in ("circuit", "norms")}  # two depths
    wanted = 2 * (1 + sum(len(ARMS[arm].rates) * n for arm, n in per_rate.items()) + 1)
    assert len(lines) == wanted == len(path.read_text().splitlines())
    assert all(line["proof"].startswith("0 of ") for line in lines if line["arm"] in ("circuit", "norms"))
    # A killed run: the last lines are missing. Only those run again, from the same competent weights, to the same end.
    kept = path.read_text().splitlines()[:-3]
    path.write_text("\n".join(kept) + "\n")
    stamp = (plan.directory / "seed-2" / "competent.safetensors").stat().st_mtime_ns
    again = compare(plan, progress=False)
    assert (plan.directory / "seed-2" / "competent.safetensors").stat().st_mtime_ns == stamp
    for before, after in zip(lines, again, strict=True):
        assert {k: v for k, v in before.items() if k != "seconds"} == {k: v for k, v in after.items() if k != "seconds"}
    rows = summarise(again, "flipped", 8)
    assert [row.arm for row in rows] == ["untuned", "circuit", "norms", "tfidf"]
    assert "source" in rows[1].kept and rows[1].difference is None and rows[2].difference is not None
    text = table(rows)
    assert text.count("\n") == 5 and "| circuit |" in text and "| norms | 2e" not in text
    assert trade_off(again, "flipped", 8).count("| circuit |") == 2 * len(ARMS["circuit"].rates)
    path.write_text("half a li")
    with pytest.raises(ValueError, match="is not a results file"):
        compare(plan, progress=False)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "tfidf"])
def test_every_arm_trains_what_it_says_and_the_model_can_be_reset(arm):
    model = load(tiny("llama"), words_tokenizer())
    start = snapshot(model.hf)
    scores = HeadScores(torch.linspace(-1, 1, 12).view(3, 4), "made up")
    circuit = scores.top(2)
    anchor = ARMS[arm].anchors[-1]
    result, heads = tune_arm(
        arm, model, toy(8), toy(8, 1), circuit, scores, kept=toy(6, 2), lr=1e-2, anchor=anchor, seed=0, epochs=2, batch_size=4
    )  # fmt: skip
    assert result.options["anchor"] == anchor
    every = sum(p.numel() for p in model.hf.parameters())
    budget = HeadMask.from_circuit(circuit, model).n_parameters
    if arm in ("full", "direct", "l2sp"):
        assert result.trained == every and heads == ""
    elif arm == "lora":
        assert abs(result.trained - budget) < 0.5 * budget and result.moved > 0
        assert not [name for name, _ in model.hf.named_parameters() if "lora" in name]
    elif arm == "norms":
        assert result.trained == 32 * 7 and heads == "(no heads)"
    else:
        found = Circuit(heads.split(), 3, 4)
        assert len(found) == 2 and result.trained == HeadMask.from_circuit(found, model).n_parameters
        assert (found == circuit) == (arm == "circuit")
    restore(model.hf, start)
    assert all(torch.equal(p, start[name]) for name, p in model.hf.named_parameters())


def test_a_circuit_is_what_its_discovery_had_at_each_depth():
    steps = [{"depth": 0, "heads": {"a2.h1": 0.5}}, {"depth": 1, "heads": {"a0.h0": 0.2, "a1.h3": 0.1}}]
    circuit = Circuit(["a2.h1", "a0.h0", "a1.h3"], 3, 4, {"steps": steps})
    assert [str(at_depth(circuit, depth)) for depth in (0, 1, 2)] == ["a2.h1", "a0.h0 a1.h3 a2.h1", "a0.h0 a1.h3 a2.h1"]
    assert at_depth(circuit, 0).matched_random(0).heads.isdisjoint(circuit.heads)


def test_target_examples_avoid_the_rows_of_the_source_stage_where_enough_are_left(plan):
    pool = toy(40, 4)
    learn, rest = pool.split(24, seed=3)
    assert target_examples(pool, 16, 24, seed=3) == rest
    many = target_examples(pool, 20, 24, seed=3)
    assert len(many) == 20 and many != target_examples(pool, 20, 24, seed=4)
    assert target_examples(pool, 40, 24, seed=3) == pool
    import dataclasses

    with pytest.raises(ValueError, match="41 target examples were asked for, .* has 40; ask for fewer"):
        compare(dataclasses.replace(plan, sizes=(41,), directory=plan.directory / "large"), progress=False)
    assert not (plan.directory / "large").exists()


def test_a_depth_that_adds_no_head_is_not_trained_again(plan):
    """The line of the other depth is repeated, with its seconds its own; arms without depths are never looked up."""
    bench = Bench.__new__(Bench)
    steps = [{"depth": 0, "heads": {"a2.h1": 0.5}}]
    bench.circuit = Circuit(["a2.h1"], 3, 4, {"steps": steps})
    run = dict(arm="circuit", target="t", n=8, seed=1, lr=1e-3, anchor=0.0, depth=1)
    finished = {**run, "depth": 0, "heads": "a2.h1", "tests": {}}
    assert bench.same_heads(run, [finished]) is finished
    for other in ({"heads": "a0.h0"}, {"lr": 1e-2}, {"seed": 2}, {"n": 4}):
        assert bench.same_heads(run, [{**finished, **other}]) is None
    assert bench.same_heads({**run, "arm": "near_zero"}, [{**finished, "arm": "near_zero"}]) is None


def test_rates_can_be_given_per_arm(plan):
    import dataclasses

    chosen = dataclasses.replace(plan, rates={"norms": (0.1,)}, depths=(2,))
    runs = list(chosen.runs(1))
    assert [run["lr"] for run in runs if run["arm"] == "norms"] == [0.1]
    assert [run["depth"] for run in runs if run["arm"] == "circuit"] == [2, 2, 2]
    with pytest.raises(ValueError, match="no arm 'norm'"):
        list(dataclasses.replace(plan, rates={"norm": (0.1,)}).runs(1))


def test_an_unknown_arm_is_named(plan):
    import dataclasses

    with pytest.raises(ValueError, match="no arm 'magic'; choose from circuit, full"):
        compare(dataclasses.replace(plan, arms=("magic",), directory=plan.directory / "other"), progress=False)


def test_tfidf_learns_words():
    task = toy(40)
    result = tfidf(task, task, task)
    gold = [list(task.label_words).index(label) for label in task.labels]
    assert np.mean(np.array(result["predictions"]) == gold) > 0.9


def line(arm, seed, validation, right, lr=1e-3, kept="1111"):
    tests = {"t": {"accuracy": right.count("1") / 4, "macro_f1": 0.5, "right": right}}
    tests["source"] = {"accuracy": kept.count("1") / 4, "macro_f1": 0.5, "right": kept}
    where = dict(arm=arm, target="t", n=4, seed=seed, lr=lr, anchor=0.0, depth=None)
    return where | dict(validation=validation, tests=tests, trained=10, moved=9)


def test_choice_is_by_validation_not_by_test():
    lines = [line("circuit", 0, 0.9, "0000"), line("circuit", 0, 0.8, "1111", lr=1e-2), line("full", 0, 0.5, "1100")]
    assert choose(lines, "t", 4)["circuit"][0]["lr"] == 1e-3
    rows = {row.arm: row for row in summarise(lines, "t", 4)}
    assert rows["circuit"].accuracy[0] == 0.0 and rows["full"].difference[0] == 0.5 and rows["full"].moved == 9
    with pytest.raises(ValueError, match="no finished run of arm 'circuit' on 'u'"):
        summarise(lines, "u", 4)


def test_every_seed_chooses_among_the_settings_that_all_have_finished():
    lines = [line("full", seed, 0.5, "1100") for seed in (0, 1)]
    lines += [line("full", 0, 0.9, "1111", lr=1e-2), line("norms", 0, 0.9, "1111", lr=1e-2)]
    chosen = choose(lines, "t", 4)
    assert {seed: run["lr"] for seed, run in chosen["full"].items()} == {0: 1e-3, 1: 1e-3}
    assert list(chosen["norms"]) == [0]
    lines.append(line("full", 1, 0.4, "1111", lr=1e-2))
    assert {seed: run["lr"] for seed, run in choose(lines, "t", 4)["full"].items()} == {0: 1e-2, 1: 1e-3}


def test_the_difference_on_the_source_is_reported():
    lines = [line("circuit", 0, 0.9, "1111", kept="1100"), line("full", 0, 0.9, "1111", kept="1110")]
    circuit, full = summarise(lines, "t", 4)
    assert full.kept_difference["source"][0] == 0.25 and circuit.kept_difference == {}
    low, high = full.kept_difference["source"][1:]
    assert low >= 0  # paired: text for text, full keeps what the circuit keeps
    assert "| 0.750 [" in table([circuit, full]) and f"| +0.250 [{low:+.3f}, {high:+.3f}] |" in table([circuit, full])


def test_the_front_has_the_settings_that_none_beats_on_both():
    lines = [
        line("circuit", 0, 0.9, "1110", kept="1000"),  # best target
        line("full", 0, 0.9, "1100", kept="1110"),  # best kept
        line("norms", 0, 0.9, "1100", kept="1100"),  # beaten by full
        line("lora", 0, 0.9, "1000", kept="1110"),  # beaten by full
        {**line("full", 0, 0.9, "1111", kept="1111"), "n": 3},  # another size
    ]
    assert [(p.arm, p.front) for p in points(lines, "t", 4)] == [
        ("circuit", True), ("full", True), ("norms", False), ("lora", False)
    ]  # fmt: skip
    lines.append(line("full", 1, 0.9, "1111"))  # only one setting has finished the second seed
    assert [(p.arm, p.seeds, p.reached) for p in points(lines, "t", 4)] == [("full", 2, 0.75)]


def test_arrows_run_from_the_untuned_model_to_the_chosen_runs():
    lines = [line("untuned", seed, 0.1, "1000", kept="1111") | {"n": 0} for seed in (0, 1)]
    lines += [line("full", seed, 0.9, right, kept="1110") for seed, right in ((0, "1111"), (1, "1100"))]
    lines += [line("full", 0, 0.2, "0000", lr=1e-2, kept="0000")]  # validation did not choose it
    lines += [{**line("tfidf", 0, 0.9, "1111"), "tests": {"t": {"accuracy": 1.0, "right": "1111"}}}]
    drawn = arrows(lines, "t", 4)
    assert list(drawn) == ["full"]
    assert drawn["full"]["before"] == {"t": {"accuracy": 0.25, "n": 8}, "source": {"accuracy": 1.0, "n": 8}}
    assert drawn["full"]["after"] == {"t": {"accuracy": 0.75, "n": 8}, "source": {"accuracy": 0.75, "n": 8}}


def test_intervals_are_paired():
    """An arm that is right on one more text, whatever else, is always ahead by that text when it is drawn."""
    generator = np.random.default_rng(0)
    worse = (generator.random((4, 200)) < 0.6).astype(float)
    better = worse.copy()
    better[:, :40] = np.maximum(better[:, :40], 1.0)
    gap = bootstrap(better) - bootstrap(worse)
    alone = bootstrap(better) - bootstrap(worse, seed=1)
    assert gap.min() >= 0 and gap.std() < 0.6 * alone.std()
    assert abs(gap.mean() - (better.mean() - worse.mean())) < 0.01
    expected = worse.mean(0).std() / np.sqrt(200)
    assert bootstrap(np.tile(worse.mean(0), (4, 1))).std() == pytest.approx(expected, rel=0.1)


def test_agreement_is_the_mean_jaccard_of_all_pairs():
    a, b, c = Circuit(["a0.h0", "a0.h1"]), Circuit(["a0.h1"]), Circuit(["a1.h1"])
    assert agreement([a, b, c]) == pytest.approx((0.5 + 0 + 0) / 3)


def test_predicted_rise_and_fall_are_what_a_small_step_does():
    """First order against a real step: move every weight of a head by `step` against the sign of the target's gradient."""
    from interventions.restriction import restrict
    from interventions.tuning import readout_loss

    model, target, kept, size = load(tiny("qwen2"), words_tokenizer()), toy(12), toy(12, 3, flip=True), 1e-6
    model.hf.double()
    circuit = Circuit(["a1.h2"], 3, 4)
    rise, fall = costs(circuit, kept, model, target, size)[next(iter(circuit))]
    tasks = [task.encode(model) for task in (kept, target)]
    rows = torch.arange(12)
    with torch.no_grad():
        before = [readout_loss(model, encoded, rows) for encoded in tasks]
    with restrict(model, HeadMask.from_circuit(circuit, model, norms="none")) as restricted:
        parameters = list(restricted.parameters())
        gradients = torch.autograd.grad(readout_loss(model, tasks[1], rows), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= size * gradient.sign()
        with torch.no_grad():
            after = [readout_loss(model, encoded, rows) for encoded in tasks]
    changes = [(b - a).item() for a, b in zip(before, after, strict=True)]
    assert changes[0] == pytest.approx(rise, rel=0.05) and -changes[1] == pytest.approx(fall, rel=0.05)


def test_fisher_term_is_second_order():
    g = torch.tensor([1.0, -2.0])
    rise, fall = disturbance(g, torch.tensor([0.5, 0.5]), torch.tensor([3.0, 1.0]), step=0.1)
    assert fall == pytest.approx(0.3) and rise == pytest.approx(-0.1 * (0.5 - 0.5) + 0.01 / 2 * 4)


def test_avoiding_takes_the_least_disturbing_heads():
    model = load(tiny("llama"), words_tokenizer())
    circuit = Circuit(["a0.h0", "a1.h1", "a2.h2"], 3, 4)
    scores = HeadScores(torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 2.0, 0]]), "measured")
    mask = HeadMask.avoiding(circuit, toy(6), model, budget=2, interference=scores, norms="none")
    assert str(mask.circuit) == "a1.h1 a2.h2" and mask.policy["norms"] == "none"
    estimated = HeadMask.avoiding(circuit, toy(6), model, budget=1, target_task=toy(6, 1, flip=True))
    ratios = {h: r / f for h, (r, f) in costs(circuit, toy(6), model, toy(6, 1, flip=True), 1e-2).items()}
    assert list(estimated.circuit) == [min(ratios, key=ratios.get)]
    assert json.dumps(estimated.provenance, default=str)
    with pytest.raises(ValueError, match="budget=4 heads of a circuit of 3; choose between 1 and 3"):
        HeadMask.avoiding(circuit, toy(6), model, budget=4, interference=scores)
    with pytest.raises(ValueError, match="needs target_task= .* or interference="):
        HeadMask.avoiding(circuit, toy(6), model, budget=1)

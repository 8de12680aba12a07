"""Models whose working heads were built in: what each rule and each way of discovering finds of them."""

import pytest
import torch
from micro_models import KNOWN, MicroTask, micro

from circuits import ablation, discover, evaluate, gradient, integrated_gradients, load, relevance

TWINS = dict(means="corrupted", per_position=True, progress=False)
EARLY, LATE = {"induction": "a0.h1", "pointer": "a0.h3"}, {"induction": "a1.h2", "pointer": "a1.h0"}


@pytest.fixture(scope="module", params=KNOWN)
def built(request):
    return request.param, load(micro(request.param)), MicroTask(request.param, 24)


def test_the_models_do_their_task_with_these_heads_alone(built):
    name, model, task = built
    assert evaluate(model, task).accuracy == 1
    effects = ablation(model, task, ablate="resample", progress=False)
    assert effects.top(2) == KNOWN[name] and effects[EARLY[name]] > 5
    others = [abs(effects[head]) for head in model.anatomy.heads() if head not in KNOWN[name]]
    assert 0 < max(others) < 0.3


def test_exact_relevance_finds_both_and_frozen_misses_the_one_behind_queries_and_keys(built):
    name, model, task = built
    exact, frozen, paper = (relevance(model, task, rules=rules, **TWINS) for rules in ("exact", "frozen", "paper"))
    assert exact.top(2) == KNOWN[name] and exact[EARLY[name]] > 0.9 * exact[LATE[name]]
    for scores in (frozen, paper):
        assert scores.top(1).heads < KNOWN[name].heads and abs(scores[EARLY[name]]) < 0.1 * scores[LATE[name]]


@pytest.mark.parametrize("rules", ["frozen", "paper"])
def test_discovery_through_queries_and_keys_finds_it(built, rules):
    name, model, task = built
    options = dict(rules=rules, depth=1, per_depth=1, **TWINS)
    assert discover(model, task, through=("q", "k"), **options) == KNOWN[name]
    assert discover(model, task, **options) != KNOWN[name]


def test_the_slope_misleads_where_attention_is_sharp_and_the_path_does_not(built):
    name, model, task = built
    slope, path = (f(model, task, ablate="resample", progress=False) for f in (gradient, integrated_gradients))
    assert slope[EARLY[name]] < 0.1 * slope[LATE[name]] and path.top(2) == KNOWN[name]
    assert torch.isfinite(slope.values).all()

"""What notebooks show: every noun has a table of its own numbers, and no name can smuggle markup in."""

import pytest
import torch

from circuits import (
    AlphaCurve,
    AnswerScores,
    Circuit,
    FaithfulnessCurve,
    Head,
    HeadRoles,
    HeadScores,
    HeadSelection,
    TaskEmbedding,
    TransferMatrix,
)
from circuits.interference import overlap
from circuits.measurement import Interference
from interventions import Comparison, HeadMask, RenyiEnsemble
from interventions.aligned import Aligned
from interventions.decoding_comparison import DecodingComparison
from interventions.tuning import Tuning

from models import shared_tiny

EVIL = "<script>x</script>"


def nouns():
    model = shared_tiny("llama")
    generator = torch.Generator().manual_seed(0)
    circuit = Circuit([Head(0, 1)], 3, 4)
    examples = torch.randn(5, 3, 4, generator=generator)
    margins = torch.rand(2, 5, generator=generator)
    none = torch.zeros(0, 2, 5)
    yes = margins > 0
    meta = {"method": EVIL, "task": EVIL, "model": EVIL}
    at = {EVIL: {"accuracy": 0.25, "macro_f1": 0.2, "n": 8}}
    to = {EVIL: {"accuracy": 0.75, "macro_f1": 0.7, "n": 8}}
    first, second = torch.randn(2, 6, 4, generator=generator)
    return {
        "circuit": (circuit, "h1"),
        "scores": (HeadScores.from_examples(examples, EVIL, model=EVIL), "95 % interval"),
        "curve": (
            FaithfulnessCurve(
                torch.tensor([0, 12]), margins, yes, margins[1], margins[0], yes[0], none, none > 0, None, None,
                ("", EVIL), meta,
            ),
            "1.00",
        ),
        "mask": (HeadMask.from_circuit(circuit, model), "model.layers.0.self_attn.o_proj.weight"),
        "interference": (Interference({EVIL: overlap(first, second, 2)}, "matrix"), "sti_fro_normalized"),
        "tuning": (Tuning(EVIL, at, to, [], 1, 1, 9, 0.1, ""), "0.750"),
        "ensemble": (RenyiEnsemble(model, members=2, r=2), "2 members"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["circuit", "scores", "curve", "mask", "interference", "tuning", "ensemble"])
def test_nouns_show_their_numbers_escaped(name):
    noun, shown = nouns()[name]
    html = noun._repr_html_()
    assert shown in html and "<script" not in html
    assert repr(noun)


def results():
    yes, model = torch.tensor([True, False]), "tiny"
    pair = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    aligned = Aligned("aisp", ["one", "two"], [" a", " b"], [torch.tensor([1]), torch.tensor([2])], torch.tensor([1.0, 2.0]),
                      torch.tensor([4, 4]), 6, 0, 0.25)  # fmt: skip
    metrics = {name: torch.ones(1, 3) for name in ("first", "exact", "prefix", "nll")}
    costs = dict(trainable=3.0, fit_seconds=1.0, prompt_tokens=2.0, query_seconds=0.001)
    return {
        "alphas": (AlphaCurve((1,), yes[None], yes[None], yes[None, None], yes, yes), "soft alpha 0.500"),
        "transfer": (TransferMatrix(("up", "down"), pair, torch.zeros(2), pair, pair), "(none)"),
        "comparison": (Comparison({"site": metrics}, {"site": costs}, "capitals"), "Comparison on capitals\n| method"),
        "decoding": (DecodingComparison({"AISP": [aligned], "best-of-n, equal samples": [aligned]}, {},
                                        {"AISP": torch.zeros(1, 2), "best-of-n, equal samples": torch.zeros(1, 2)}), "| AISP | 1.5"),
        "aligned": (aligned, "8 samples scored, 0.2 s; mean reward 1.500)\n  1.000  'one' -> ' a'\n  2.000  'two'"),
        "embedding": (TaskEmbedding(torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), model, task="up", n_prompts=5, n_shots=2),
                      "TaskEmbedding(up on tiny: 3 layers x 4 heads, 5 prompts of 2 shots"),
        "answers": (AnswerScores(yes, yes, yes, torch.tensor([1.0, 2.0]), ("a", "b"), 9.0, 0.5),
                    "exact 0.500, prefix 0.500, nll 1.500; n=2"),
        "overlap": (overlap(torch.eye(4), -torch.eye(4), 2), "Overlap(cosine -1.000, STI"),
        "roles": (HeadRoles(*[HeadScores(torch.eye(3, 4), "x")] * 3, *[HeadSelection(torch.eye(3, 4), "x")] * 2),
                  "most needed: a0.h0 a1.h1 a2.h2"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(results()))
def test_results_print_what_they_say_not_their_tensors(name):
    result, shown = results()[name]
    assert shown in repr(result) and "tensor(" not in repr(result)

"""What notebooks show: every noun has a table of its own numbers, and no name can smuggle markup in."""

import pytest
import torch

from circuits import Circuit, FaithfulnessCurve, Head, HeadScores
from circuits.interference import overlap
from circuits.measurement import Interference
from interventions import HeadMask, RenyiEnsemble
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

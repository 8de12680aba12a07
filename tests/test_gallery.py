"""Every figure as a reader sees it, light and dark: titles whole, nothing that lies on a title, no empty plot.

Screenshots go to artifacts/screenshots/gallery-*.png for people to look at.
"""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import viz
from circuits import FaithfulnessCurve, Head, HeadScores
from circuits.interference import overlap
from circuits.measurement import Interference

CHROMIUM = shutil.which("chromium")
SHOTS = Path(__file__).resolve().parents[1] / "artifacts" / "screenshots"
WORDS = "<s> when Mary and Tom went to the park , Tom gave the ball to".split()
ABOUT = {"model": "an/organisation-with-a-long-name-7b", "task": "sentiment of reviews"}
KNOWN = f"{ABOUT['model']} · {ABOUT['task']} · n=50"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def figures():
    """One of each, with more than one state where the function has states."""
    scores = [HeadScores.from_examples(normal(30, 6, 8, seed=i) + normal(6, 8), f"method {i}", **ABOUT) for i in (0, 1)]
    circuit = scores[0].top(7)
    edges = {(a, b): scores[0][a] for a in circuit for b in circuit if a.layer < b.layer}
    arm = {"before": {"min": {"accuracy": 0.5, "n": 100}, "ind": {"accuracy": 0.8, "n": 400}}, **ABOUT}
    arms = {
        name: arm | {"after": {"min": {"accuracy": 0.6 + up, "n": 100}, "ind": {"accuracy": 0.79 - up, "n": 400}}}
        for name, up in (("circuit", 0.05), ("near-zero heads", 0.02), ("everything", 0.1))
    }
    places = {head: 3 + i // 3 for i, head in enumerate(circuit)}
    patterns = {head: normal(len(WORDS), len(WORDS)).softmax(-1) for head in circuit}
    return {
        "heatmap": viz.heatmap(scores, circuit),
        "flow": viz.flow(circuit, scores[0], edges),
        "flow over tokens": viz.flow(circuit, scores[0], edges, positions=places, tokens=WORDS),
        "attention": viz.attention(patterns, WORDS, about=KNOWN),
        "tokens": viz.tokens([WORDS, WORDS[:5]], [normal(len(WORDS)), normal(5)], about=KNOWN),
        "compare": viz.compare(*scores),
        "faithful": viz.faithful({"circuit": curve(0), "another method": curve(1)}),
        "training": viz.training(arms),
        "gating": viz.gating(
            [{f"model.layers.{i}.mlp.up_proj.weight": float(normal(1, seed=i)) for i in range(9)}] * 9, about=KNOWN
        ),
        "interference": viz.interference(
            {0: measured(0), 100: measured(1)}, about=f"{ABOUT['task']} against facts, n=50 each"
        ),
        "spectrum": viz.spectrum(measured(), about=f"{ABOUT['task']} against facts, n=50 each"),
        "decoding": viz.decoding(decoded()),
        "routing": viz.routing(normal(4, 40).softmax(0), ["plain", "ironic"] * 20, normal(40).abs(), about=KNOWN),
    }


def curve(seed):
    full, empty = 2 + normal(30, seed=seed).abs(), normal(30, seed=seed).abs()
    margins = empty + torch.tensor([0.0, 0.5, 0.9, 1.0])[:, None] * (full - empty)
    draws, about = margins * 0.6 * torch.ones(5, 1, 1), {**ABOUT, "method": "x", "ablate": "mean"}
    return FaithfulnessCurve(
        torch.tensor([0, 4, 16, 48]), margins, margins > 1, full, empty, full > 0, draws, draws > 1, margins * 0.1,
        margins > 2, ("", "a0.h1", "a0.h1 a2.h2", "all"), about,
    )  # fmt: skip


def measured(seed=0):
    heads = {str(Head(i // 4, i % 4)): overlap(*normal(2, 8, 6, seed=10 * seed + i), 3) for i in range(12)}
    return Interference(heads, "head", model=ABOUT["model"])


def decoded():
    history = {name: normal(3, 8).cumsum(1) for name in ("best", "max_reward", "mean_reward")} | {
        "ess": 5 + normal(3, 8)
    }
    norm, count = normal(3, 12).abs(), torch.tensor([64] * 3)
    return SimpleNamespace(
        model=ABOUT["model"],
        history=history,
        perturbation_norm=lambda: norm,
        prompts=["a"] * 3,
        samples=count,
        seconds=1.0,
    )


@pytest.fixture(scope="module", params=["light", "dark"])
def page(request, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    path = viz.report(tmp_path_factory.mktemp("gallery") / "page.html", figures())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme=request.param)
        page.set_default_timeout(120_000)
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"gallery-{request.param}.png", full_page=True)
        yield page
        browser.close()


BOXES = """() => [...document.querySelectorAll('.plot')].map(plot => {
  const box = element => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const all = selector => [...plot.querySelectorAll(selector)].map(box);
  return {plot: box(plot), title: all('.gtitle'), above: all('.legend, .updatemenu-header, .colorbar .cbtitle'),
          names: all('.legend'), drawn: plot.querySelectorAll('.plot path, .plot image, .plot rect').length}; })"""


def meet(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_every_title_says_model_task_and_how_many():
    for name, figure in figures().items():
        title = figure.layout.title.text
        assert ABOUT["model"] in title, f"{name}: {title}"
        assert ABOUT["task"] in title or name == "decoding", f"{name}: {title}"  # which has prompts, not a task
        assert re.search(r"n=\d|3 prompts", title), f"{name}: {title}"


def test_titles_are_whole_and_nothing_lies_on_them(page):
    for name, boxes in zip(figures(), page.evaluate(BOXES), strict=True):
        (title,), plot = boxes["title"], boxes["plot"]
        assert plot[0] <= title[0] and title[2] <= plot[2] and plot[1] + 4 <= title[1], f"the title of {name} is cut"
        assert not any(meet(title, other) for other in boxes["above"]), f"something lies on the title of {name}"
        for index, other in enumerate(boxes["above"]):
            rest = [box for box in boxes["above"][index + 1 :]]
            assert not any(meet(other, box) for box in rest), f"legend, menu or scale of {name} lie on one another"
        assert boxes["drawn"], f"{name} is empty"


def test_every_figure_is_in_the_gallery():
    shown = {name.split()[0] for name in figures()}
    assert shown == {name for name in viz.__all__ if name != "report"}

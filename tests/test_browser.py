"""What a reader sees: pages opened from disk in Debian's chromium with the network cut, moved, clicked and read back.

Screenshots go to artifacts/screenshots for people to look at.
"""

import shutil
from pathlib import Path

import pytest
import torch

import viz
from circuits import Circuit, FaithfulnessCurve, Head, HeadScores

CHROMIUM = shutil.which("chromium")
SHOTS = Path(__file__).resolve().parents[1] / "artifacts" / "screenshots"
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")


def scores(method="ablation", seed=0, **meta):
    generator = torch.Generator().manual_seed(seed)
    return HeadScores.from_examples(torch.randn(20, 3, 4, generator=generator), method, model="tiny", **meta)


def curve():
    generator = torch.Generator().manual_seed(0)
    full, empty = 2 + torch.rand(30, generator=generator), torch.rand(30, generator=generator)
    margins = empty + torch.tensor([0.0, 0.6, 1.0])[:, None] * (full - empty)
    draws = margins.expand(4, 3, 30) * 0.5
    meta = {"model": "tiny", "task": "t", "method": "ablation", "ablate": "mean"}
    return FaithfulnessCurve(
        torch.tensor([0, 3, 12]), margins, margins > 1, full, empty, full > 0, draws, draws > 1, None, None,
        ("", "a0.h1", "all"), meta,
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a report with these sections; any request beyond the file itself fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, offline=True)
    context.set_default_timeout(120_000)  # a busy machine is slow, not wrong

    def show(sections, dark=False, **options):
        path = viz.report(tmp_path / "page.html", sections, **options)
        page = context.new_page()
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        assert asked == [path.as_uri()] and problems == []
        return page

    yield show
    context.close()


def keep(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def hover_text(page):
    page.wait_for_selector(".hoverlayer .hovertext")
    return " ".join(page.locator(".hoverlayer .hovertext").all_text_contents()).replace("−", "-")


def cell_centre(page, x, y):
    """Where plotly drew a data point, in page pixels."""
    return page.evaluate(
        """([x, y]) => { const plot = document.querySelector('.plot'), l = plot._fullLayout, box = plot.getBoundingClientRect();
        return [box.x + l.xaxis._offset + l.xaxis.d2p(x), box.y + l.yaxis._offset + l.yaxis.d2p(y)]; }""",
        [x, y],
    )


def test_hover_shows_the_head_its_score_and_interval(open_page):
    given = scores()
    page = open_page({"Heads": viz.heatmap(given, Circuit([Head(1, 2)], 3, 4))})
    page.mouse.move(*cell_centre(page, 2, 1))
    text = hover_text(page)
    low, high = given.interval()
    assert "a1.h2" in text
    for value in (given[Head(1, 2)], low[1, 2], high[1, 2]):
        assert f"{value:+.4g}" in text
    assert "20 examples" in text
    keep(page, "heatmap")


def test_the_dropdown_switches_the_scores_shown(open_page):
    first, second = scores(task="a"), scores("gradient", seed=1, task="b")
    page = open_page({"Heads": viz.heatmap([first, second])})
    page.locator(".updatemenu-header").click()
    page.locator(".updatemenu-dropdown-button", has_text="gradient").click()
    page.wait_for_function("document.querySelector('.gtitle').textContent.includes('gradient')")  # drawn last
    assert page.evaluate("document.querySelector('.plot').data[1].visible") is True
    shown = page.evaluate("Array.from(document.querySelector('.plot').calcdata[1][0].z, row => Array.from(row))")
    assert torch.allclose(torch.tensor(shown), second.values, atol=1e-6)
    assert page.evaluate("document.querySelector('.plot').data[0].visible") is False


def test_the_legend_hides_the_circuit(open_page):
    page = open_page({"Heads": viz.heatmap(scores(), Circuit([Head(0, 0)], 3, 4))})
    assert page.locator(".scatterlayer .trace").count() == 2  # the line and its halo
    page.locator(".legendtoggle").first.click()
    page.wait_for_function("document.querySelectorAll('.scatterlayer .trace').length === 0")


def test_the_slider_hides_weak_edges_and_only_those(open_page):
    circuit = Circuit([Head(0, 0), Head(0, 1), Head(2, 3)], 3, 4)
    edges = {(Head(0, 0), Head(2, 3)): 1.0, (Head(0, 1), Head(2, 3)): -0.05}
    page = open_page({"Flow": viz.flow(circuit, scores(), edges)})
    drawn = "Array.from(document.querySelector('.plot').data).filter(t => t.visible !== false && t.mode === 'markers')"
    named = f"{drawn}.flatMap(t => t.text || [])"
    assert {"a0.h0 → a2.h3", "a0.h1 → a2.h3"} <= set(page.evaluate(named))
    box = page.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.55, box["y"] + box["height"] / 2)
    # The slider marks its stop at once and restyles the plot on a later frame: wait for what is drawn, not for the stop.
    page.wait_for_function(f"!{named}.includes('a0.h1 → a2.h3')")
    assert page.evaluate("document.querySelector('.plot').layout.sliders[0].active") >= 4
    assert "a0.h0 → a2.h3" in set(page.evaluate(named))
    keep(page, "flow")


def test_the_curve_shows_its_numbers_and_switches_to_accuracy(open_page):
    given = curve()
    page = open_page({"Faithfulness": viz.faithful(given)})
    where = page.evaluate(
        """() => { const p = document.querySelector('.plot'), l = p._fullLayout, box = p.getBoundingClientRect();
        return [box.x + l.xaxis._offset + l.xaxis.c2p(1), box.y + l.yaxis._offset + l.yaxis.d2p(0.6)]; }"""
    )
    page.mouse.move(*where)
    assert f"3 heads: {given.faithfulness[1]:.3f}" in hover_text(page)
    page.locator(".updatemenu-button", has_text="accuracy").click()
    page.wait_for_function("document.querySelector('.plot').layout.yaxis.title.text === 'accuracy'")
    visible = page.evaluate(
        "document.querySelector('.plot').data.filter(t => t.visible !== false && t.customdata).map(t => Array.from(t.y))"
    )
    assert len(visible) == 1 and visible[0] == pytest.approx(given.accuracy.tolist())
    keep(page, "faithful")


def test_injected_markup_is_shown_and_not_run(open_page):
    words = [EVIL, "<b>bold</b>", "fine"]
    sections = {
        EVIL: [EVIL, [{EVIL: EVIL}], viz.heatmap({EVIL: scores(task=EVIL), "b": scores()})],
        "tokens": viz.tokens(words, torch.tensor([1.0, -1.0, 0.5])),
        "attention": viz.attention(torch.eye(3), words),
    }
    page = open_page(sections, title=EVIL, summary=EVIL, command=EVIL, provenance={EVIL: EVIL})
    page.wait_for_timeout(300)
    assert page.title() == EVIL  # the text itself, not what the script would set
    assert page.locator("main img").count() == 0
    assert page.locator("h1").inner_text() == EVIL
    assert "<b>bold</b>" in " ".join(page.locator("#plot-1 .heatmaplayer text, #plot-1 text").all_text_contents())


def test_dark_screens_get_light_text(open_page):
    figure = viz.heatmap(scores(), Circuit([Head(0, 0)], 3, 4))
    page = open_page({"Heads": figure, "Curve": viz.faithful(curve())}, dark=True)
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .gtitle')).fill")
    assert min(int(part) for part in ink[4:-1].split(",")) > 180
    assert page.evaluate("document.querySelector('.plot').layout.paper_bgcolor") == "#1c222c"
    coloured = page.evaluate("JSON.stringify(document.querySelector('#plot-1').data)").lower()
    assert "#4aa8e0" in coloured and "rgba(74,168,224,0.18)" in coloured and "#0072b2" not in coloured
    keep(page, "dark")


def test_lines_of_a_paragraph_stay_lines(open_page):
    page = open_page({"One": ["first\nsecond", [{"a": 1}]]})
    assert page.locator("main p").last.inner_text().split("\n") == ["first", "second"]


def test_on_a_narrow_screen_the_page_stays_and_plots_scroll(open_page):
    """Plots and tables keep a width at which their words do not meet; they move inside their card, the page does not."""
    rows = [{"text": "a long example " * 12, "answer": "good", "margin": 1.0}]
    sections = {"Heads": [viz.heatmap(scores(), Circuit([Head(0, 0)], 3, 4)), rows], "Curve": viz.faithful(curve())}
    page = open_page(sections, title="luthier_discover_" * 9)
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.querySelector('.plot').getBoundingClientRect().width < 800")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('.plot').getBoundingClientRect().width") >= 700
    assert page.evaluate("document.querySelector('.card').scrollWidth > document.querySelector('.card').clientWidth")
    keep(page, "narrow")


def test_a_large_model_is_drawn_without_lag(open_page):
    generator = torch.Generator().manual_seed(0)
    big = HeadScores.from_examples(torch.randn(200, 32, 32, generator=generator), "ablation", model="big")
    page = open_page({"Heads": viz.heatmap(big, big.top(40))})
    page.mouse.move(*cell_centre(page, 17, 9))
    assert "a9.h17" in hover_text(page)
    redraw = "async () => { const start = performance.now(); await Plotly.redraw(document.querySelector('.plot'));"
    # A stuck page would take minutes; how quick it really is depends on the machine.
    assert page.evaluate(redraw + " return performance.now() - start; }") < 20_000
    keep(page, "large")

"""Figures hold the data they were given, escaped; the browser tests look at what is drawn."""

import json
import re
import time

import plotly.io
import pytest
import torch

from circuits import Circuit, FaithfulnessCurve, Head, HeadScores
from viz import attention, compare, faithful, flow, heatmap, interference, report, spectrum, theme, tokens, training

EVIL = "</script><script>document.title='owned'</script><b>"


def scores(layers=3, heads=4, n=20, method="ablation", seed=0, **meta):
    generator = torch.Generator().manual_seed(seed)
    return HeadScores.from_examples(torch.randn(n, layers, heads, generator=generator), method, model="tiny", **meta)


def curve(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0, 1, 4, 12])
    full, empty = 2 + torch.rand(30, generator=generator), torch.rand(30, generator=generator)
    share = torch.tensor([0.0, 0.5, 0.9, 1.0])[:, None]
    margins = empty + share * (full - empty)
    draws = empty + share**3 * (full - empty) * torch.rand(5, 1, 1, generator=generator)
    return FaithfulnessCurve(
        sizes, margins, margins > 0.5, full, empty, full > 0.5, draws, draws > 0.5, margins * 0.3, margins > 2.5,
        ("", "a0.h1", "a0.h1 a2.h2", "all"), {"model": "tiny", "task": "t", "method": "ablation", "ablate": "mean"},
    )  # fmt: skip


def test_heatmap_shows_each_score_with_its_interval():
    given = scores()
    figure = heatmap(given, Circuit([Head(0, 1), Head(2, 3)], 3, 4))
    cells, halo, outline = figure.data
    assert halo.x == outline.x and halo.legendgroup == outline.legendgroup and not halo.showlegend
    assert torch.allclose(torch.tensor(cells.z), given.values)
    low, high = given.interval()
    shown = torch.tensor(cells.customdata)
    assert torch.allclose(shown[..., 0], low) and torch.allclose(shown[..., 1], high)
    agreeing = (given.examples.sign() == given.values.sign()).float().mean(0) * 100
    assert torch.allclose(shown[..., 2], agreeing.round())
    assert cells.zmin == -cells.zmax and cells.zmid == 0
    assert outline.name == "circuit (2 heads)" and outline.x[:2] == (0.5, 1.5) and outline.y[0] == -0.5
    assert "tiny" in figure.layout.title.text and "n=20" in figure.layout.title.text
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # layer 0 on top


def test_heatmap_strip_is_the_histogram_of_the_examples():
    examples = torch.tensor([0.0] * 8 + [1.0]).view(9, 1, 1)
    strip = heatmap(HeadScores.from_examples(examples, "x")).data[0].text[0][0]
    assert strip == "+0 █▁▁▁▁▁▁▁▁▂ +1"


def test_heatmap_of_shares_has_one_side_and_names_its_units_and_repeats():
    class Seeds(HeadScores):
        repeats = "seeds"

    given = Seeds.from_examples(torch.rand(2, 3, 4), "site", options={"units": "alpha"})
    figure = heatmap(given)
    assert figure.data[0].zmin == 0 and figure.data[0].colorbar.title.text == "alpha"
    assert "2 seeds" in figure.layout.title.text and "2 seeds" in figure.data[0].hovertemplate


def test_heatmap_switches_between_scores():
    figure = heatmap([scores(task="a"), scores(task="b", seed=1), scores(method="gradient")])
    assert [trace.visible for trace in figure.data] == [True, False, False]
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["ablation", "ablation (b)", "gradient"]
    assert figure.layout.updatemenus[0].buttons[2].args[0]["visible"] == [False, False, True]
    assert "gradient" in figure.layout.updatemenus[0].buttons[2].args[1]["title.text"]


def test_heatmap_of_a_large_model_is_small_and_quick(tmp_path):
    big = scores(32, 32, 200)
    start = time.process_time()
    figure = heatmap(big, big.top(40))
    size = len(figure.to_json())
    assert time.process_time() - start < 2
    assert size < 250_000
    assert report(tmp_path / "page.html", figure).stat().st_size < 5_200_000  # plotly itself is 4.8 MB of that


def test_heatmap_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="no scores to show"):
        heatmap([])
    with pytest.raises(ValueError, match="different models in one heatmap"):
        heatmap([scores(), scores(4, 4)])
    with pytest.raises(ValueError, match=r"a5\.h0"):
        heatmap(scores(), Circuit([Head(5, 0)]))


def test_faithful_draws_curve_interval_and_controls():
    given = curve()
    figure = faithful(given)
    lines = {trace.name: trace for trace in figure.data if trace.visible is None and trace.hoverinfo != "skip"}
    assert list(lines["ablation"].y) == pytest.approx(given.faithfulness.tolist())
    assert list(lines["ablation"].x) == ["0", "1", "4", "12"]
    random = lines["matched random (5 draws, min to max)"]
    assert list(random.y) == pytest.approx(given.random.mean(0).tolist())
    assert list(lines["heads scored nearest zero"].y) == pytest.approx(given.near_zero.tolist())
    band = next(trace for trace in figure.data if trace.hoverinfo == "skip" and trace.legendgroup == "ablation")
    assert list(band.y) == pytest.approx(given.interval()[1].tolist() + given.interval()[0].tolist()[::-1])
    accuracy = [trace for trace in figure.data if trace.visible is False and trace.name == "ablation"][-1]
    assert list(accuracy.y) == pytest.approx(given.accuracy.tolist())


def test_training_draws_an_arrow_per_arm():
    arm = {
        "before": {"min": {"accuracy": 0.5, "n": 100}, "ind": {"accuracy": 0.8, "n": 400}},
        "after": {"min": {"accuracy": 0.7, "n": 100}, "ind": {"accuracy": 0.75, "n": 400}},
    }
    figure = training({"circuit": arm | {"task": EVIL}})
    assert (
        "tuned on &lt;/script&gt;" in figure.layout.title.text and "min n=100 · ind n=400" in figure.layout.title.text
    )
    (trace,) = figure.data
    assert list(trace.x) == [0.8, 0.75] and list(trace.y) == [0.5, 0.7]
    assert trace.error_y.array[0] == pytest.approx(0.05)
    (alone,) = training({"circuit": {when: {"min": at["min"]} for when, at in arm.items()}}).data
    assert list(alone.x) == [0, 1]
    many = training({f"arm {i}": arm for i in range(8)})
    assert len({(trace.line.color, trace.line.dash) for trace in many.data}) == 8
    assert many.layout.legend.orientation == "v" and training({"circuit": arm}).layout.legend.orientation == "h"
    with pytest.raises(ValueError, match="no task 'jav' was evaluated; evaluated: min, ind"):
        training({"circuit": arm}, target="jav")
    with pytest.raises(ValueError, match="no arm was evaluated"):
        training({"circuit": {"before": {}, "after": {}}})


def test_report_is_one_file_without_network(tmp_path):
    page = report(
        tmp_path / "r.html", {"One": [heatmap(scores()), "words", [{"a": 1.5, "b": None}]]}, command="luthier x"
    )
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", text)
    assert "Plotly" in text and "luthier x" in text and '<td class="number">1.500</td>' in text
    stored = text.split('id="figures">')[1].split("</script>")[0]
    (figure,) = json.loads(stored)
    assert figure["data"][0]["type"] == "heatmap"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_report_escapes_everything_a_user_can_name(tmp_path):
    given = scores(task=EVIL)
    arm = {when: {EVIL: {"accuracy": 0.5, "n": 9}} for when in ("before", "after")}
    figures = [heatmap({EVIL: given, "b": given}), faithful({EVIL: curve()}), training({EVIL: arm})]
    sections = {EVIL: [*figures, EVIL, [{EVIL: EVIL}]]}
    options = {"title": EVIL, "summary": EVIL, "provenance": {EVIL: EVIL}, "command": EVIL}
    text = report(tmp_path / "r.html", sections, **options).read_text()
    assert "<script>document" not in text
    assert text.count("&lt;/script&gt;") >= 8
    labels = json.loads(text.split('id="figures">')[1].split("</script>")[0])
    assert all("<script>" not in json.dumps(figure["layout"]["title"]) for figure in labels)


def test_report_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(TypeError, match="cannot show a int in a report"):
        report(tmp_path / "r.html", {"One": [3]})
    with pytest.raises(ValueError, match="nothing to report"):
        report(tmp_path / "r.html", {})
    assert list(tmp_path.iterdir()) == []


def test_the_global_template_is_left_alone():
    before = plotly.io.templates.default
    heatmap(scores()), faithful(curve())
    assert plotly.io.templates.default == before


def test_colours_stay_apart_for_colour_blind_readers():
    """Luminance alone tells strong against from neutral, and the two ends differ in blueness, which deuteranopes keep."""

    def channels(colour):
        return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    scale = [colour for _, colour in theme.DIVERGING]
    middle = len(scale) // 2
    left, right = [luminance(c) for c in scale[: middle + 1]], [luminance(c) for c in scale[middle:]]
    assert left == sorted(left) and right == sorted(right, reverse=True)
    for cold, warm in zip(scale[:middle], scale[:middle:-1], strict=True):
        assert channels(cold)[2] > channels(cold)[0] and channels(warm)[0] > channels(warm)[2]
    contrast = (1.05) / (luminance(theme.MUTED) + 0.05)
    assert contrast > 4.5


def measured(seed=0, view="head"):
    from circuits.interference import overlap
    from circuits.measurement import Interference

    generator = torch.Generator().manual_seed(seed)
    names = [f"a{layer}.h{head}" for layer in range(2) for head in range(3)] if view == "head" else ["q", "<b>o"]
    pairs = {name: torch.randn(2, 8, 6, generator=generator) for name in names}
    return Interference({name: overlap(f, g, 3) for name, (f, g) in pairs.items()}, view, model="tiny")


def test_interference_by_head_over_steps():
    given = {0: measured(0), 10: measured(1)}
    figure = interference(given)
    assert figure.data[1].z[1][2] == pytest.approx(given[10]["a1.h2"].cosine)
    assert figure.data[0].zmax == max(abs(v) for each in given.values() for v in each.values().values())
    assert [trace.visible for trace in figure.data] == [True, False]
    assert [step.label for step in figure.layout.sliders[0].steps] == ["0", "10"]
    with pytest.raises(ValueError, match="different views: head, matrix"):
        interference({0: measured(), 1: measured(view="matrix")})


def test_interference_by_block():
    given = measured(view="matrix")
    (bars,) = interference(given, "sti_fro_normalized").data
    assert list(bars.x) == [given["q"].sti_fro_normalized, given["<b>o"].sti_fro_normalized]
    assert list(bars.y) == ["q", "&lt;b&gt;o"]
    names = ["model.layers.0.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert theme.short_names(names) == ["layers.0.q_proj", "layers.1.mlp.up_proj"] and theme.short_names(["one"]) == [
        "one"
    ]


def test_spectrum_shows_the_principal_angles():
    given = measured(view="matrix")
    figure = spectrum(given)
    first = figure.layout.updatemenus[0].buttons[0].label.replace("&lt;b&gt;", "<b>")
    assert list(figure.data[0].y) == pytest.approx(given[first].angles_left.cos().tolist())
    assert list(figure.data[1].y) == pytest.approx(given[first].angles_right.cos().tolist())


def test_flow_draws_the_edges_it_is_given():
    given = scores()
    circuit = Circuit([Head(0, 0), Head(0, 1), Head(2, 3)], 3, 4)
    edges = {(Head(0, 0), Head(2, 3)): 1.0, (Head(0, 1), Head(2, 3)): -0.4}

    def shown(figure):
        middles = [trace for trace in figure.data if trace.mode == "markers"]
        return {name: value for trace in middles for name, value in zip(trace.text, trace.customdata, strict=True)}

    expected = {"a0.h0 → a2.h3": 1.0, "a0.h1 → a2.h3": -0.4}
    expected |= {f"{head} → logits": given[head] for head in circuit}
    assert shown(flow(circuit, given, edges)) == pytest.approx(expected)
    by_target = HeadScores(torch.zeros(3, 4).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0)), "x")
    assert shown(flow(circuit, given, {Head(2, 3): by_target}))["a0.h0 → a2.h3"] == 1.0
    placed = flow(circuit, given, positions={head: 1 for head in circuit}, tokens=["a", "<b>"])
    assert placed.layout.xaxis.ticktext == ("a", "&lt;b&gt;")
    heads = placed.data[-1]  # two heads over one token stand side by side, one higher, their names apart
    assert len(set(heads.x[:2])) == len(set(heads.y[:2])) == 2 and heads.textposition[:2] == (
        "bottom center",
        "top center",
    )
    with pytest.raises(ValueError, match=r"edges name a1\.h1, which the circuit does not hold"):
        flow(circuit, given, {(Head(1, 1), Head(2, 3)): 1.0})
    with pytest.raises(ValueError, match="the circuit is empty"):
        flow(Circuit([]), given)


def test_attention_and_tokens_show_their_values():
    pattern = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    figure = attention({Head(0, 1): pattern, Head(1, 0): pattern.T}, ["<s>", "Ġhi"])
    assert figure.data[0].z.tolist() == pattern.tolist()
    assert figure.layout.xaxis.ticktext == ("&lt;s&gt;", "hi")
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["a0.h1", "a1.h0"]
    with pytest.raises(ValueError, match=r"is \(2, 2\) for 3 tokens"):
        attention(pattern, ["a", "b", "c"])
    (grid,) = tokens(["a", "b", "c"], torch.tensor([1.0, -2.0, 0.5]), per_line=2).data
    assert grid.z[0].tolist() == [1.0, -2.0] and grid.z[1][0] == 0.5 and grid.zmax == 2
    assert [list(row) for row in grid.text] == [["a", "b"], ["c", ""]]
    (two,) = tokens([["a", "b", "c", "d", "e"], ["f"]], [torch.arange(5.0), torch.ones(1)], per_line=4).data
    assert [list(row) for row in two.text] == [["a", "b", "c"], ["d", "e", ""], [""] * 3, ["f", "", ""]]
    with pytest.raises(ValueError, match=r"\[2\] tokens and \[3\] values"):
        tokens(["a", "b"], torch.zeros(3))


def test_names_in_a_scatter_do_not_lie_on_one_another():
    values = torch.tensor([[10.0, 9.9, 5.0, 0.1]])
    named = compare(HeadScores(values, "a"), HeadScores(values, "b")).data[1].text
    assert named == ("a0.h0", "", "a0.h2", "a0.h3")  # the second stands where the first does


def test_compare_counts_common_heads():
    first = HeadScores(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), "a")
    second = HeadScores(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), "b")
    figure = compare(first, second)
    points, common = figure.data[1], figure.data[2]
    assert list(points.x) == [4, 3, 2, 1] and list(points.y) == [3, 4, 1, 2]
    assert dict(zip(common.x, common.y, strict=True)) == {1: 0, 2: 1, 3: pytest.approx(2 / 3), 4: 1}
    with pytest.raises(ValueError, match="scores of different models"):
        compare(first, scores())

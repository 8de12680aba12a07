"""Layer by head, signed: which heads matter, how sure one can be, and which are in the circuit."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from circuits import Circuit, HeadScores

from . import theme

BARS = "▁▂▃▄▅▆▇█"


def heatmap(
    scores: HeadScores | Sequence[HeadScores] | Mapping[str, HeadScores],
    circuit: Circuit | None = None,
    *,
    title: str | None = None,
) -> go.Figure:
    """One cell per head: orange supports the gold label, blue opposes it. Several scores get a dropdown to switch.

    Hover shows the head's score, its 95 % interval, how the examples are spread and how many agree in sign. The
    circuit's heads are outlined.
    """
    named = _named(scores)
    figure = go.Figure()
    for index, each in enumerate(named.values()):
        figure.add_trace(_cells(each, visible=index == 0))
    first = next(iter(named.values()))
    if circuit is not None and len(circuit):
        figure.add_traces(_outline(circuit.check(first.n_layers, first.n_heads)))
    theme.apply(figure, title or "Heads that do the task", _subtitle(first), height=_height(first))
    figure.update_xaxes(title="head", dtick=_step(first.n_heads), showgrid=False, range=[-0.5, first.n_heads - 0.5])
    figure.update_yaxes(title="layer", dtick=_step(first.n_layers), showgrid=False, range=[first.n_layers - 0.5, -0.5])
    if len(named) > 1:
        _add_dropdown(figure, named)
    return figure


def _named(scores: HeadScores | Sequence[HeadScores] | Mapping[str, HeadScores]) -> dict[str, HeadScores]:
    if isinstance(scores, HeadScores):
        return {scores.method: scores}
    named = dict(scores) if isinstance(scores, Mapping) else {}
    for each in () if isinstance(scores, Mapping) else scores:
        label = each.method
        if label in named and each.task:
            label += f" ({each.task})"
        while label in named:  # one method twice on one task
            label += " ′"
        named[label] = each
    if not named:
        raise ValueError("no scores to show; give HeadScores, a list of them, or a dict of name to HeadScores")
    shapes = {tuple(each.values.shape) for each in named.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"scores of different models in one heatmap: shapes {sorted(shapes)}; make one figure per model"
        )
    return named


def _cells(scores: HeadScores, visible: bool) -> go.Heatmap:
    values = scores.values.float().cpu().numpy()
    hover = "<b>a%{y}.h%{x}</b>  %{z:+.4g}"
    extra: dict = {}
    if scores.examples is not None and len(scores.examples) > 1:
        low, high = (bound.float().numpy() for bound in scores.interval())
        agree = ((scores.examples.sign() == scores.values.sign()).float().mean(0) * 100).round().cpu().numpy()
        extra = {"customdata": np.stack([low, high, agree], -1).astype("float32"), "text": _strips(scores)}
        hover += "<br>95 % interval %{customdata[0]:+.4g} to %{customdata[1]:+.4g}"
        hover += f"<br>{len(scores.examples)} {scores.repeats}  %{{text}}<br>%{{customdata[2]:.0f}} % share its sign"
    limit = float(np.abs(values).max()) or 1.0
    share = "units" in scores.options and values.min() >= 0  # alphas and gates have no side to be on
    return go.Heatmap(
        z=values.astype("float32"),
        zmid=None if share else 0,
        zmin=0 if share else -limit,
        zmax=limit,
        colorscale=list(theme.SEQUENTIAL if share else theme.DIVERGING),
        colorbar=theme.colorbar(scores.options.get("units", "effect on margin")),
        hovertemplate=hover + "<extra></extra>",
        name=theme.clean(scores.method),
        visible=visible,
        xgap=1,
        ygap=1,
        **extra,
    )


def _strips(scores: HeadScores, bins: int = 10) -> list[list[str]]:
    """Each head's examples as a ten-bar histogram between its own extremes, for the hover text."""
    assert scores.examples is not None
    examples: Float[np.ndarray, "example layer head"] = scores.examples.float().cpu().numpy()
    low, high = examples.min(0), examples.max(0)
    place = np.clip((examples - low) / np.where(high > low, high - low, 1) * bins, 0, bins - 1).astype(int)
    counts = (place[..., None] == np.arange(bins)).sum(0)
    heights = np.ceil(counts / counts.max(-1, keepdims=True) * (len(BARS) - 1)).astype(int)
    ends = np.vectorize(lambda value: f"{value:+.2g}")
    lows, highs = ends(low), ends(high)
    return [
        [f"{lows[i, j]} {''.join(BARS[h] for h in heights[i, j])} {highs[i, j]}" for j in range(heights.shape[1])]
        for i in range(heights.shape[0])
    ]


def _outline(circuit: Circuit) -> list[go.Scatter]:
    """Squares around the circuit's cells: a line of the text's colour on a halo of the page's, so that one of the two
    stands out on every cell. All squares are one trace, which can be switched off in the legend and scales to any size."""
    x: list[float | None] = []
    y: list[float | None] = []
    for head in circuit:
        left, right, top, bottom = head.head - 0.5, head.head + 0.5, head.layer - 0.5, head.layer + 0.5
        x += [left, right, right, left, left, None]
        y += [top, top, bottom, bottom, top, None]
    name = f"circuit ({len(circuit)} head{'s' * (len(circuit) != 1)})"
    look = {"mode": "lines", "hoverinfo": "skip", "legendgroup": "circuit"}
    return [
        go.Scatter(x=x, y=y, name=name, line={"color": theme.PAPER, "width": 5}, showlegend=False, **look),
        go.Scatter(x=x, y=y, name=name, line={"color": theme.INK, "width": 2}, showlegend=True, **look),
    ]


def _add_dropdown(figure: go.Figure, named: dict[str, HeadScores]) -> None:
    others = [True] * (len(list(figure.data)) - len(named))  # the outline stays
    buttons = []
    for index, (name, scores) in enumerate(named.items()):
        visible = [position == index for position in range(len(named))] + others
        text = figure.layout.title.text
        text = text.split("<br>")[0] + f"<br><span style='font-size:12px;color:{theme.MUTED}'>"
        text += f"{theme.clean(_subtitle(scores))}</span>"
        buttons.append(
            {"label": theme.clean(name), "method": "update", "args": [{"visible": visible}, {"title.text": text}]}
        )
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", **theme.MENU}
    figure.update_layout(updatemenus=[menu], legend={"x": 0, "xanchor": "left"})


def _subtitle(scores: HeadScores) -> str:
    return theme.describe(scores.model, scores.task, _count(scores), scores.method)


def _count(scores: HeadScores) -> str | None:
    if scores.examples is None:
        return None
    return f"n={len(scores.examples)}" if scores.repeats == "examples" else f"{len(scores.examples)} {scores.repeats}"


def _step(count: int) -> int:
    return 1 if count <= 16 else 2 if count <= 32 else 4


def _height(scores: HeadScores) -> int:
    return int(min(900, max(300, 150 + 30 * scores.n_layers)))

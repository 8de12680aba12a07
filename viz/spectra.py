"""Two objectives against each other: where in the model they conflict, over steps, and which directions they share."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from circuits.heads import Head
from circuits.measurement import Interference

from . import theme

METRICS = ("cosine", "sti_fro_normalized", "overlap_left_corrected", "overlap_right_corrected", "descent_fraction_f")
SHOWN = 12  # blocks a spectrum can switch between


def interference(
    measured: Interference | Mapping[int, Interference],
    metric: str = "cosine",
    *,
    title: str | None = None,
    about: str = "",
) -> go.Figure:
    """A metric of `Overlap` per block: layer × head for the head view, else one bar per block. Blue (negative) is conflict.

    A mapping of step to measurement gets a slider over the steps, with one colour scale for all of them.
    `about` says between what it was measured: two tasks with their n, two checkpoints.
    """
    steps = {0: measured} if isinstance(measured, Interference) else dict(measured)
    if not steps:
        raise ValueError("nothing to show; give an Interference or a dict of step to Interference")
    views = {each.view for each in steps.values()}
    if len(views) > 1:
        raise ValueError(
            f"measurements of different views: {', '.join(sorted(views))}; measure every step the same way"
        )
    first = next(iter(steps.values()))
    limit = max(abs(value) for each in steps.values() for value in each.values(metric).values()) or 1.0
    draw = _cells if first.view == "head" else _bars
    figure = go.Figure([draw(each, metric, limit, index == 0) for index, each in enumerate(steps.values())])
    subtitle = theme.describe(
        first.model, about, f"by {first.view}", f"whole model: {metric} {first.total[metric]:+.3f}"
    )
    height = 300 + 20 * (len(first.overlaps) if first.view != "head" else 0)
    theme.apply(figure, title or f"Interference: {metric}", subtitle, height=int(min(1000, max(360, height))))
    if first.view == "head":
        figure.update_xaxes(title="head", dtick=1, showgrid=False)
        figure.update_yaxes(title="layer", dtick=1, showgrid=False, autorange="reversed")
    else:
        figure.update_xaxes(title=metric, range=[-1.05 * limit, 1.05 * limit])
        figure.update_yaxes(autorange="reversed", showgrid=False)
    if len(steps) > 1:
        _slider(figure, list(steps))
    return figure


def _cells(each: Interference, metric: str, limit: float, visible: bool) -> go.Heatmap:
    heads = {Head.parse(name): part for name, part in each.overlaps.items()}
    shape = max(h.layer for h in heads) + 1, max(h.head for h in heads) + 1
    values, extra = np.full(shape, np.nan), np.full((*shape, len(METRICS)), np.nan)
    for head, part in heads.items():
        values[head] = part[metric]
        extra[head] = [part[name] for name in METRICS]
    hover = "<b>a%{y}.h%{x}</b>" + "".join(f"<br>{m} %{{customdata[{i}]:+.3f}}" for i, m in enumerate(METRICS))
    return go.Heatmap(
        z=values, customdata=extra, zmin=-limit, zmax=limit, zmid=0, colorscale=list(theme.DIVERGING), xgap=1, ygap=1,
        visible=visible, hovertemplate=hover + "<extra></extra>", colorbar=theme.colorbar(metric.replace("_", " ")),
    )  # fmt: skip


def _bars(each: Interference, metric: str, limit: float, visible: bool) -> go.Bar:
    values = each.values(metric)
    extra = [[part[name] for name in METRICS] for part in each.overlaps.values()]
    hover = "<b>%{y}</b>" + "".join(f"<br>{m} %{{customdata[{i}]:+.3f}}" for i, m in enumerate(METRICS))
    colours = [theme.ORANGE if value >= 0 else theme.BLUE for value in values.values()]
    return go.Bar(
        x=list(values.values()), y=[theme.clean(name) for name in theme.short_names(list(values))], orientation="h", customdata=extra,
        marker={"color": colours}, visible=visible, hovertemplate=hover + "<extra></extra>", showlegend=False,
    )  # fmt: skip


def _slider(figure: go.Figure, steps: list[int]) -> None:
    stops = [
        {"method": "restyle", "label": str(step), "args": [{"visible": [i == index for i in range(len(steps))]}]}
        for index, step in enumerate(steps)
    ]
    figure.update_layout(sliders=[{"steps": stops, "currentvalue": {"prefix": "step "}, "pad": {"t": 60}}])
    figure.update_layout(margin={"b": 130})


def spectrum(measured: Interference, *, title: str | None = None, about: str = "") -> go.Figure:
    """Which of the K leading directions two objectives share: cosines of the principal angles, per block.

    1 is a common direction, 0 an orthogonal one; the dropdown lists the blocks that share most beyond chance.
    Solid: the output side (left singular vectors); dashed: the input side.
    `about` says between what it was measured.
    """
    ranked = sorted(
        measured.overlaps,
        key=lambda n: -(measured[n]["overlap_left_corrected"] + measured[n]["overlap_right_corrected"]),
    )
    blocks = ranked[:SHOWN]
    if not blocks:
        raise ValueError("the measurement holds no block; was everything skipped?")
    figure = go.Figure()
    for index, name in enumerate(blocks):
        for side, colour, dash in (("left", theme.BLUE, "solid"), ("right", theme.ORANGE, "dash")):
            figure.add_trace(_angles(measured, name, side, colour, dash, visible=index == 0))
    subtitle = theme.describe(measured.model, about, f"by {measured.view}")
    theme.apply(figure, title or "Directions two objectives share", subtitle)
    figure.update_xaxes(title="principal angle, from the most shared", tickformat="d", nticks=measured[blocks[0]].K + 1)
    figure.update_yaxes(title="cosine", range=[-0.02, 1.05])
    buttons = [
        {
            "label": theme.clean(name),
            "method": "restyle",
            "args": [{"visible": [i // 2 == k for i in range(2 * len(blocks))]}],
        }
        for k, name in enumerate(blocks)
    ]
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", **theme.MENU}
    figure.update_layout(updatemenus=[menu], legend={"x": 0, "xanchor": "left"})
    return figure


def _angles(measured: Interference, name: str, side: str, colour: str, dash: str, visible: bool) -> go.Scatter:
    part = measured[name]
    cosines = np.cos(part[f"angles_{side}"].cpu().numpy())
    label = f"{'outputs' if side == 'left' else 'inputs'}: {part[f'overlap_{side}']:.2f} shared"
    label += f", {part[f'expected_{side}'] / max(part['K'], 1):.2f} by chance"
    return go.Scatter(
        x=list(range(1, len(cosines) + 1)), y=cosines, name=label, mode="lines+markers", visible=visible,
        line={"color": colour, "width": 2.5, "dash": dash},
        hovertemplate="angle %{x}: cosine %{y:.3f}<extra></extra>",
    )  # fmt: skip

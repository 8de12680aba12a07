"""Curves: behaviour kept by a circuit, and what tuning gains on the target against what it keeps elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from circuits import FaithfulnessCurve

from . import theme


def faithful(curves: FaithfulnessCurve | Mapping[str, FaithfulnessCurve], *, title: str | None = None) -> go.Figure:
    """Faithfulness against circuit size with its 95 % interval, the matched-random band and the near-zero control.

    Several curves are drawn together; the controls are those of the first. Buttons switch to accuracy.
    """
    named = {curves.meta.get("method", "circuit"): curves} if isinstance(curves, FaithfulnessCurve) else dict(curves)
    if not named:
        raise ValueError("no curves to show; give a FaithfulnessCurve or a dict of name to FaithfulnessCurve")
    first = next(iter(named.values()))
    figure = go.Figure()
    for share in ("faithfulness", "accuracy"):
        for trace in _controls(first, share):
            figure.add_trace(trace)
        for (name, curve), colour in zip(named.items(), theme.CATEGORIES * len(named), strict=False):
            for trace in _curve(curve, name, colour, share):
                figure.add_trace(trace)
    half = len(list(figure.data)) // 2
    for trace in list(figure.data)[half:]:
        trace.visible = False
    meta = first.meta
    about = theme.describe(
        meta.get("model"), meta.get("task"), f"n={len(first.full)}", f"{meta.get('ablate')} ablation"
    )
    theme.apply(figure, title or "Behaviour kept when every other head is ablated", about)
    sizes = sorted({int(size) for curve in named.values() for size in curve.sizes})
    figure.update_xaxes(title="heads kept", type="category", categoryarray=[str(s) for s in sizes])
    figure.update_yaxes(title="faithfulness (1 = whole model)", rangemode="tozero")
    figure.add_hline(y=1, line={"color": theme.MUTED, "width": 1, "dash": "dot"})
    _add_buttons(figure, half)
    return figure


def _curve(curve: FaithfulnessCurve, name: str, colour: str, share: str) -> list[go.Scatter]:
    x = [str(int(size)) for size in curve.sizes]
    value = curve.faithfulness if share == "faithfulness" else curve.accuracy
    low, high = curve.interval() if share == "faithfulness" else curve.accuracy_interval()
    text = [theme.clean(circuit if len(circuit) < 90 else circuit[:87] + "…") for circuit in curve.circuits]
    hover = "%{x} heads: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>%{text}<extra></extra>"
    line = go.Scatter(
        x=x,
        y=value.tolist(),
        name=theme.clean(name),
        legendgroup=name,
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"size": 7},
        text=text,
        customdata=[[float(a), float(b)] for a, b in zip(low, high, strict=True)],
        hovertemplate=hover,
    )
    interval = theme.band(x, low.tolist(), high.tolist(), colour, name, legendgroup=name, showlegend=False)
    return [interval, line]


def _controls(curve: FaithfulnessCurve, share: str) -> list[go.Scatter]:
    x, traces = [str(int(size)) for size in curve.sizes], []
    if len(curve.random):
        random = curve.random if share == "faithfulness" else curve.random_correct.float().mean(-1)
        name, colour = f"matched random ({len(random)} draws, min to max)", theme.MUTED
        low, high = random.min(0).values.tolist(), random.max(0).values.tolist()
        traces.append(theme.band(x, low, high, colour, name, legendgroup="random", showlegend=False))
        traces.append(_control(x, random.mean(0).tolist(), name, colour, "random", "dash"))
    if curve.near_zero_correct is not None and curve.near_zero is not None:
        near = curve.near_zero if share == "faithfulness" else curve.near_zero_correct.float().mean(-1)
        traces.append(_control(x, near.tolist(), "heads scored nearest zero", theme.PURPLE, "near", "dot"))
    return traces


def _control(x: list[str], y: list[float], name: str, colour: str, group: str, dash: str) -> go.Scatter:
    hover = f"{name}<br>%{{x}} heads: %{{y:.3f}}<extra></extra>"
    line = {"color": colour, "width": 2, "dash": dash}
    return go.Scatter(x=x, y=y, name=name, legendgroup=group, mode="lines", line=line, hovertemplate=hover)


def _add_buttons(figure: go.Figure, half: int) -> None:
    labels = {"faithfulness": "faithfulness (1 = whole model)", "accuracy": "accuracy"}
    buttons = []
    for index, (label, axis) in enumerate(labels.items()):
        visible = [(position < half) == (index == 0) for position in range(2 * half)]
        line = {"shapes[0].visible": index == 0}
        args = [{"visible": visible}, {"yaxis.title.text": axis, **line}]
        buttons.append({"label": label, "method": "update", "args": args})
    place = {"x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "direction": "right", "type": "buttons"}
    figure.update_layout(updatemenus=[{"buttons": buttons, **theme.MENU, **place}])
    figure.update_layout(margin={"b": 96})


def training(
    arms: Mapping[str, Mapping[str, Any]],
    target: str | None = None,
    kept: str | None = None,
    *,
    title: str | None = None,
) -> go.Figure:
    """What tuning gains on the target (up) against what it costs on a kept task (left): one arrow per arm.

    `arms` maps names to what `Tuning.to_dict()` gives (`before` and `after`: task name to accuracy and n). The first
    evaluated task is the target and the second the kept one unless named; with one task, before and after are bars.
    """
    tasks = list(dict.fromkeys(name for arm in arms.values() for name in arm["after"]))
    if not tasks:
        raise ValueError("no arm was evaluated on any task; give eval_tasks= (or --eval) when tuning")
    for name in (target, kept):
        if name is not None and name not in tasks:
            raise ValueError(f"no task {name!r} was evaluated; evaluated: {', '.join(tasks)}")
    goal = target or tasks[0]
    kept = kept or next((name for name in tasks if name != goal), None)
    figure = go.Figure()
    for index, (name, arm) in enumerate(arms.items()):
        cycle, colour = divmod(index, len(theme.CATEGORIES))
        # Where the colours start again, the line changes.
        figure.add_trace(_arrow(name, arm, goal, kept, theme.CATEGORIES[colour], ("solid", "dash", "dot")[cycle % 3]))
    first = next(iter(arms.values()))
    tuned = f"tuned on {first['task']}" if first.get("task") else None
    about = theme.describe(
        first.get("model"), tuned, *_sizes(first, goal, kept), "from before to after, whiskers: standard error"
    )
    theme.apply(figure, title or "Gained on the target, kept elsewhere", about)
    if len(arms) > 4:  # in one row they would run into the subtitle
        figure.update_layout(legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"})
    figure.update_yaxes(title=f"accuracy on {theme.clean(goal)} (target)")
    figure.update_xaxes(
        title=f"accuracy on {theme.clean(kept)} (to be kept)" if kept else "", showgrid=kept is not None
    )
    return figure


def _sizes(arm: Mapping[str, Any], *tasks: str | None) -> list[str]:
    return [f"{name} n={arm['after'][name]['n']:.0f}" for name in tasks if name in arm["after"]]


def _arrow(name: str, arm: Mapping[str, Any], target: str, kept: str | None, colour: str, dash: str) -> go.Scatter:
    """Before to after, with the standard error of each accuracy as whiskers."""
    points = [(arm[when].get(kept), arm[when][target]) for when in ("before", "after")]
    y = [goal["accuracy"] for _, goal in points]
    x = [other["accuracy"] if other else index for index, (other, _) in enumerate(points)]
    sizes = [None if other is None else other["n"] for other, _ in points]
    whisker = {"type": "data", "thickness": 1, "width": 3, "color": theme.faded(colour, 0.55)}
    return go.Scatter(
        x=x,
        y=y,
        name=theme.clean(name),
        mode="lines+markers",
        line={"color": colour, "width": 2.5, "dash": dash},
        marker={
            "size": [7, 15],
            "symbol": ["circle-open", "arrow"],
            "angleref": "previous",
            "color": colour,
            "opacity": 1,
        },
        error_y={**whisker, "array": [_error(value, goal["n"]) for value, (_, goal) in zip(y, points, strict=True)]},
        error_x={**whisker, "array": [_error(v, n) if n else 0 for v, n in zip(x, sizes, strict=True)]}
        if kept
        else None,
        customdata=["before", "after"],
        hovertemplate=f"{theme.clean(name)}, %{{customdata}}<br>target %{{y:.3f}}"
        + ("<br>kept %{x:.3f}" if kept else "")
        + "<extra></extra>",
    )


def _error(accuracy: float | int, n: float | int) -> float:
    """Standard error of a proportion."""
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / n)

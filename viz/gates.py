"""Where and when a gated optimizer found its two objectives in conflict: blocks by steps."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from . import theme


def gating(steps: Sequence[Mapping[str, float]], *, title: str | None = None, about: str = "") -> go.Figure:
    """One row per block, one column per step, blue where the objectives conflict (negative cosine).

    A step is {block name: cosine}, as `{gate.block.name: gate.cosine for gate in optimizer.last}` gives it; blocks that a step does
    not name stay empty. `about` says what was trained: model, tasks, method.
    """
    names = list(dict.fromkeys(name for step in steps for name in step))
    if not names:
        raise ValueError("no gates to show; give one {block name: cosine} per training step")
    values = [[step.get(name) for step in steps] for name in names]
    known = [value for row in values for value in row if value is not None]
    limit = max(max(map(abs, known)), 1e-9)
    cells = go.Heatmap(
        z=values, y=[theme.clean(name) for name in theme.short_names(names)], x=list(range(1, len(steps) + 1)), zmin=-limit, zmax=limit,
        colorscale=list(theme.DIVERGING), colorbar=theme.colorbar("cosine"),
        hovertemplate="%{y}<br>step %{x}: %{z:+.3f}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(cells)
    conflict = f"{sum(value < 0 for value in known)} of {len(known)} in conflict"
    subtitle = theme.describe(about, f"{len(names)} blocks", f"{len(steps)} steps", conflict)
    theme.apply(
        figure, title or "Where and when the objectives conflict", subtitle, height=max(360, 140 + 16 * len(names))
    )
    figure.update_xaxes(title="step", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure

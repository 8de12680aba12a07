"""Which ensemble member answers for which examples, and where members disagree."""

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from . import theme


def routing(
    responsibilities: Float[Tensor, "member example"],
    groups: Sequence[str] | None = None,
    uncertainty: Float[Tensor, " example"] | None = None,
    *,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    about: str = "",
) -> go.Figure:
    """Members by groups of examples: mean responsibility, 1/M where nobody specialises. Without groups: by example,
    ordered by the member that answers. `uncertainty` (mutual information, nats) adds one dot per example below.
    `about`: the model and the task, which a tensor cannot say."""
    members, examples = responsibilities.shape
    for name, given in (("groups", groups), ("texts", texts), ("uncertainty", uncertainty)):
        if given is not None and len(given) != examples:
            raise ValueError(f"{len(given)} {name} for {examples} examples; expected one per example")
    order = _order(responsibilities, groups)
    shown = list(dict.fromkeys(groups)) if groups is not None else None
    figure = make_subplots(
        rows=1 if uncertainty is None else 2, cols=1, vertical_spacing=0.2, row_heights=_heights(uncertainty)
    )
    bar = {} if uncertainty is None else {"len": 0.55, "y": 1, "yanchor": "top"}
    figure.add_trace(_shares(responsibilities, order, groups, shown, bar), row=1, col=1)
    if uncertainty is not None:
        figure.add_trace(_dots(uncertainty, order, groups, texts), row=2, col=1)
    height = max(300, 180 + 30 * members) + (0 if uncertainty is None else 200)
    subtitle = theme.describe(
        about, f"{members} members", f"n={examples}", f"{1 / members:.2f} where nobody specialises"
    )
    theme.apply(figure, title or "Who answers for what", subtitle, height=height)
    figure.update_yaxes(title="member", autorange="reversed", dtick=1, showgrid=False, row=1, col=1)
    figure.update_xaxes(title="" if shown else "example", showgrid=False, row=1, col=1)
    if uncertainty is not None:
        top = 1.08 * max(0.1, float(uncertainty.max()))  # nothing is made to look like something
        figure.update_yaxes(title="disagreement, nats", range=[-0.02 * top, top], row=2, col=1)
    return figure


def _heights(uncertainty: Tensor | None) -> list[float]:
    return [1.0] if uncertainty is None else [0.55, 0.45]


def _order(weights: Tensor, groups: Sequence[str] | None) -> list[int]:
    """By the member that answers, then by how surely; with groups the given order stays."""
    if groups is not None:
        return list(range(weights.shape[1]))
    best, who = weights.max(0)
    return sorted(range(weights.shape[1]), key=lambda i: (int(who[i]), -float(best[i])))


def _shares(
    weights: Tensor, order: list[int], groups: Sequence[str] | None, shown: list[str] | None, bar: dict
) -> go.Heatmap:
    if shown is None or groups is None:
        z, x = weights[:, order], list(range(weights.shape[1]))
    else:
        chosen = [[i for i, group in enumerate(groups) if group == name] for name in shown]
        z = torch.stack([weights[:, columns].mean(1) for columns in chosen], 1)
        x = [theme.clean(name) for name in shown]
    return go.Heatmap(
        z=z.tolist(),
        x=x,
        y=list(range(len(weights))),
        zmin=0,
        zmax=1,
        colorscale=list(theme.SEQUENTIAL),
        colorbar=theme.colorbar("responsibility") | bar,
        hovertemplate="member %{y}, %{x}<br>responsibility %{z:.3f}<extra></extra>",
        texttemplate="%{z:.2f}" if shown else None,
        xgap=1 if shown else 0,
        ygap=1,
    )


def _dots(
    uncertainty: Tensor, order: list[int], groups: Sequence[str] | None, texts: Sequence[str] | None
) -> go.Scatter | go.Box:
    values = [float(uncertainty[i]) for i in order]
    hover = [theme.clean(texts[i]) if texts is not None else f"example {i}" for i in order]
    mark = {"color": theme.BLUE, "size": 5, "opacity": 0.6}
    if groups is None:
        return go.Scatter(
            x=list(range(len(order))), y=values, text=hover, mode="markers", marker=mark, showlegend=False
        )
    x = [theme.clean(groups[i]) for i in order]
    return go.Box(
        x=x, y=values, text=hover, boxpoints="all", jitter=0.4, pointpos=0, marker=mark, showlegend=False,
        line={"color": theme.MUTED, "width": 1}, fillcolor="rgba(0,0,0,0)",
    )  # fmt: skip

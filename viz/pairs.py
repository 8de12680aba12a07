"""Two methods side by side: do they agree on sizes, and on which heads come first?"""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits import Head, HeadScores

from . import theme


def compare(first: HeadScores, second: HeadScores, *, title: str | None = None) -> go.Figure:
    """Left: each head's two scores, with the line of equality. Right: how much of the two top k is common, for every k."""
    agreement = first.correlation(second)  # refuses scores of different models
    names = [_name(first, second), _name(second, first)]
    figure = make_subplots(1, 2, column_widths=[0.55, 0.45], horizontal_spacing=0.14)
    for trace in _scatter(first, second, names):
        figure.add_trace(trace, 1, 1)
    for trace in _overlap(first, second):
        figure.add_trace(trace, 1, 2)
    about = theme.describe(
        first.model,
        first.task if first.task == second.task else f"{first.task} and {second.task}",
        _counts(first, second),
        f"Pearson {agreement['pearson']:.2f}, Spearman {agreement['spearman']:.2f}, top ten {agreement['top10']:.0%} common",
    )
    theme.apply(figure, title or f"{names[0]} against {names[1]}", about, height=460)
    figure.update_xaxes(title=theme.clean(names[0]), row=1, col=1)
    figure.update_yaxes(title=theme.clean(names[1]), row=1, col=1)
    figure.update_xaxes(title="k", row=1, col=2)
    figure.update_yaxes(title="share of the two top k in common", range=[0, 1.05], row=1, col=2)
    return figure


def _counts(first: HeadScores, second: HeadScores) -> str:
    counts = dict.fromkeys(f"n={scores.n_examples}" for scores in (first, second) if scores.n_examples)
    return " and ".join(counts)


def _name(scores: HeadScores, other: HeadScores) -> str:
    if scores.method != other.method:
        return scores.method
    differ = {k: v for k, v in scores.options.items() if other.options.get(k) != v}
    detail = ", ".join(f"{k}={v}" for k, v in differ.items()) or (scores.task if scores.task != other.task else "")
    return f"{scores.method} ({detail})" if detail else scores.method


def _scatter(first: HeadScores, second: HeadScores, names: list[str]) -> list[go.Scatter | go.Scattergl]:
    x, y = (scores.values.flatten().float().cpu().numpy() for scores in (first, second))
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    heads = [str(Head(*divmod(index, first.n_heads))) for index in range(len(x))]
    marked = _apart(x, y, high - low or 1.0)
    hover = "<b>%{customdata}</b><br>%{x:+.4g} and %{y:+.4g}<extra></extra>"
    points = go.Scattergl if len(x) > 3000 else go.Scatter
    line = {"color": theme.MUTED, "width": 1, "dash": "dot"}
    return [
        go.Scatter(x=[low, high], y=[low, high], mode="lines", line=line, name="equal", hoverinfo="skip"),
        points(
            x=x, y=y, mode="markers+text", text=[h if i in marked else "" for i, h in enumerate(heads)],
            textposition="top center", textfont={"size": 11}, customdata=heads, name="heads", hovertemplate=hover,
            marker={"size": 8, "color": theme.BLUE, "opacity": 0.75, "line": {"width": 0}}, showlegend=False,
        ),
    ]  # fmt: skip


def _apart(x: np.ndarray, y: np.ndarray, span: float) -> set[int]:
    """The largest heads whose names do not lie on one another: at most ten, a name is about 12 by 5 % of the plot."""
    chosen: list[int] = []
    for i in np.argsort(-np.maximum(np.abs(x), np.abs(y)))[:20].tolist():
        if len(chosen) < 10 and all(abs(x[i] - x[j]) > 0.12 * span or abs(y[i] - y[j]) > 0.05 * span for j in chosen):
            chosen.append(i)
    return set(chosen)


def _overlap(first: HeadScores, second: HeadScores) -> list[go.Scatter]:
    """By signed score, as circuits are chosen; chance is k of all heads."""
    ranks = first.rank(), second.rank()
    total = len(ranks[0])
    ks = sorted({int(k) for k in np.unique(np.geomspace(1, total, min(total, 60)).round())})
    shared = [len(set(ranks[0][:k]) & set(ranks[1][:k])) / k for k in ks]
    hover = "top %{x}: %{y:.0%} in common<extra></extra>"
    line = {"color": theme.MUTED, "width": 1.5, "dash": "dash"}
    return [
        go.Scatter(x=ks, y=shared, mode="lines+markers", name="in common", hovertemplate=hover,
                   line={"color": theme.ORANGE, "width": 2.5}),
        go.Scatter(x=ks, y=[k / total for k in ks], mode="lines", name="by chance", line=line, hoverinfo="skip"),
    ]  # fmt: skip

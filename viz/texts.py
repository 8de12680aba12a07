"""Heads on real text: where a head looks, and how much each token counts."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from circuits import Head

from . import theme


def attention(
    patterns: Float[Tensor, "query key"] | Mapping[Head, Float[Tensor, "query key"]],
    tokens: Sequence[str],
    *,
    title: str | None = None,
    about: str = "",
) -> go.Figure:
    """Where each token (row) looks (column). Several heads get a dropdown.

    A pattern is one row of `record(model, "blocks.3.attn.hook_pattern")`: `cache[3][example, head]`.
    """
    named = dict(patterns) if isinstance(patterns, Mapping) else {None: patterns}
    if not named:
        raise ValueError("no attention pattern to show; give a [query, key] tensor or a dict of head to tensor")
    figure = go.Figure()
    labels = [theme.word(token) for token in tokens]
    for index, (head, pattern) in enumerate(named.items()):
        if tuple(pattern.shape) != (len(tokens), len(tokens)):
            shape = tuple(pattern.shape)
            raise ValueError(
                f"pattern of {head or 'the head'} is {shape} for {len(tokens)} tokens; expected a square of them"
            )
        figure.add_trace(_pattern(pattern, labels, head, visible=index == 0))
    theme.apply(figure, title or "Where a head looks", about, height=int(min(900, 260 + 22 * len(tokens))))
    places = list(range(len(tokens)))
    figure.update_xaxes(title="a row looks at columns", tickvals=places, ticktext=labels, tickangle=-45, showgrid=False)
    figure.update_yaxes(tickvals=places, ticktext=labels, showgrid=False, autorange="reversed")
    if len(named) > 1:
        buttons = [
            {"label": str(head), "method": "restyle", "args": [{"visible": [i == index for i in range(len(named))]}]}
            for index, head in enumerate(named)
        ]
        menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.04, "yanchor": "bottom", **theme.MENU}
        figure.update_layout(updatemenus=[menu])
    return figure


def _pattern(pattern: Tensor, labels: list[str], head: Head | None, visible: bool) -> go.Heatmap:
    n = len(labels)
    pairs = [[f"{labels[query]} → {labels[key]}" for key in range(n)] for query in range(n)]
    return go.Heatmap(
        z=pattern.detach().float().cpu().numpy().round(4),
        zmin=0,
        zmax=1,
        text=pairs,
        colorscale=list(theme.SEQUENTIAL),
        colorbar=theme.colorbar("attention"),
        hovertemplate=f"{f'{head}: ' if head else ''}%{{text}}<br>%{{z:.3f}}<extra></extra>",
        visible=visible,
        xgap=1,
        ygap=1,
    )


def tokens(
    texts: Sequence[str] | Sequence[Sequence[str]],
    values: Float[Tensor, " token"] | Sequence[Float[Tensor, " _"]],
    *,
    per_line: int = 12,
    title: str | None = None,
    about: str = "",
) -> go.Figure:
    """Text with one signed value per token: orange supports the answer, blue opposes it. One text or several."""
    lists = [list(texts)] if not texts or isinstance(texts[0], str) else [list(text) for text in texts]  # type: ignore[arg-type]
    numbers = [values] if isinstance(values, Tensor) else list(values)
    if [len(text) for text in lists] != [len(row) for row in numbers]:
        raise ValueError(
            f"{[len(text) for text in lists]} tokens and {[len(row) for row in numbers]} values; expected one for each token"
        )
    # Lines of one text are equally long, so that no last word stands alone.
    width = max((-(-len(text) // -(-len(text) // per_line)) for text in lists if text), default=per_line)
    lines, heights = [], []
    for text, row in zip(lists, numbers, strict=True):
        for start in range(0, len(text), width):
            lines.append(text[start : start + width])
            heights.append(row[start : start + width].detach().float().cpu().numpy())
        lines.append([])  # an empty line between texts
        heights.append(np.zeros(0))
    lines, heights = lines[:-1], heights[:-1]
    grid = np.full((len(lines), width), np.nan)
    words = [[""] * width for _ in lines]
    for i, (line, row) in enumerate(zip(lines, heights, strict=True)):
        grid[i, : len(line)] = row
        words[i][: len(line)] = [theme.word(word) for word in line]
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid, text=words, texttemplate="%{text}", textfont={"size": 13}, zmin=-limit, zmax=limit, zmid=0,
            colorscale=list(theme.SOFT), hovertemplate="%{text}<br>%{z:+.4g}<extra></extra>", hoverongaps=False,
            colorbar=theme.colorbar("relevance"), xgap=2, ygap=6,
        )
    )  # fmt: skip
    theme.apply(figure, title or "Which tokens count", about, height=int(min(1000, 160 + 42 * max(2, len(lines)))))
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    return figure

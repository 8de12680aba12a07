"""Heads as a layered graph: which head feeds which, and what reaches the logits."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from circuits import Circuit, Head, HeadScores

from . import theme

Edges = Mapping[tuple[Head, Head], float] | Mapping[Head, HeadScores]
STEPS = 10  # stops of the threshold slider


def flow(
    circuit: Circuit,
    scores: HeadScores,
    edges: Edges | None = None,
    *,
    positions: Mapping[Head, int] | None = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
) -> go.Figure:
    """The circuit's heads by layer, each with an edge to the logits (its score) and edges to later heads.

    `edges` maps (from, to) to a relevance, or a target head to the HeadScores that `relevance(..., targets=[head])` gave.
    With `positions` (head to token index) and `tokens`, heads stand over the token they act at. Orange supports the
    answer, blue opposes it; width is size. The slider hides edges below a share of the largest of their kind.
    """
    heads = sorted(circuit.check(scores.n_layers, scores.n_heads))
    if not heads:
        raise ValueError("the circuit is empty; expected at least one head to draw")
    places = _places(heads, scores, positions)
    links = [(head, None, scores[head]) for head in heads] + _links(heads, edges, scores)
    figure = go.Figure()
    largest = {
        kind: max((abs(v) for _, to, v in links if (to is None) == kind), default=1) or 1 for kind in (True, False)
    }
    for step in range(STEPS):
        for kind in (True, False):
            inside = [
                link for link in links
                if (link[1] is None) == kind and min(STEPS - 1, int(abs(link[2]) / largest[kind] * STEPS)) == step
            ]  # fmt: skip
            for sign, colour in ((1, theme.ORANGE), (-1, theme.BLUE)):
                chosen = [link for link in inside if (link[2] >= 0) == (sign > 0)]
                figure.add_trace(_lines(chosen, places, colour, step))
                figure.add_trace(_middles(chosen, places, colour))
    figure.add_trace(_nodes(heads, scores, places))
    theme.apply(figure, title or "From heads to the answer", _about(scores, heads), height=_height(scores, tokens))
    _axes(figure, scores, tokens)
    _slider(figure)
    return figure


def _about(scores: HeadScores, heads: list[Head]) -> str:
    n = None if scores.n_examples is None else f"n={scores.n_examples}"
    return theme.describe(scores.model, scores.task, n, scores.method, f"{len(heads)} heads")


def _links(heads: list[Head], edges: Edges | None, scores: HeadScores) -> list[tuple[Head, Head | None, float]]:
    """Edges between heads of the circuit, from a lower layer to a higher one."""
    if not edges:
        return []
    found: dict[tuple[Head, Head], float] = {}
    for key, value in edges.items():
        if isinstance(value, HeadScores):
            target = Head(*key)  # type: ignore[misc]
            found |= {(source, target): value[source] for source in heads if source.layer < target.layer}
        else:
            source, target = key
            found[Head(*source), Head(*target)] = float(value)  # type: ignore[misc]
    outside = sorted({str(head) for pair in found for head in pair if head not in heads})
    if outside:
        raise ValueError(
            f"edges name {', '.join(outside)}, which the circuit does not hold; expected edges between its heads"
        )
    return [(source, target, value) for (source, target), value in found.items()]


def _places(
    heads: list[Head], scores: HeadScores, positions: Mapping[Head, int] | None
) -> dict[Head | None, tuple[float, float]]:
    """x is the head's index, or the token it acts at (side by side where several share one); y is the layer."""
    places: dict[Head | None, tuple[float, float]] = {None: ((scores.n_heads - 1) / 2, float(scores.n_layers))}
    if positions is None:
        return places | {head: (float(head.head), float(head.layer)) for head in heads}
    missing = [str(head) for head in heads if head not in positions]
    if missing:
        raise ValueError(f"positions has no token for {', '.join(missing)}; expected one for every head of the circuit")
    for head in heads:
        beside = [h for h in heads if h.layer == head.layer and positions[h] == positions[head]]
        rank = beside.index(head)
        # Side by side, and every other one higher, so that names do not meet.
        offset = (rank - (len(beside) - 1) / 2) * 0.45
        places[head] = (positions[head] + offset, head.layer + 0.34 * (rank % 2))
    places[None] = (float(max(positions.values())), float(scores.n_layers))
    return places


def _lines(links: list, places: dict, colour: str, step: int) -> go.Scatter:
    x: list[float | None] = []
    y: list[float | None] = []
    for source, target, _ in links:
        (x0, y0), (x1, y1) = places[source], places[target]
        # A gentle bend keeps edges that share a column apart.
        t = np.linspace(0, 1, 12)
        bend = 0.18 * (y1 - y0) * np.sin(np.pi * t) * (1 if x1 >= x0 else -1) * (0.0 if target is None else 1.0)
        x += [*(x0 + (x1 - x0) * t + bend).round(3).tolist(), None]
        y += [*(y0 + (y1 - y0) * t).round(3).tolist(), None]
    line = {"color": theme.faded(colour, 0.35 + 0.5 * (step + 1) / STEPS), "width": 0.8 + 0.6 * step}
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _middles(links: list, places: dict, colour: str) -> go.Scatter:
    """Unseen points on the edges that answer when pointed at."""
    middle = [
        ((places[a][0] * 2 + places[b][0]) / 3, (places[a][1] * 2 + places[b][1]) / 3, f"{a} → {b or 'logits'}", value)
        for a, b, value in links
    ]
    x, y, names, values = zip(*middle, strict=True) if middle else ((), (), (), ())
    return go.Scatter(
        x=x, y=y, mode="markers", marker={"size": 14, "color": colour, "opacity": 0}, text=names,
        customdata=values, hovertemplate="%{text}<br>%{customdata:+.4g}<extra></extra>", showlegend=False,
    )  # fmt: skip


def _nodes(heads: list[Head], scores: HeadScores, places: dict) -> go.Scatter:
    values = [scores[head] for head in heads]
    limit = max(abs(value) for value in values) or 1.0
    return go.Scatter(
        x=[places[head][0] for head in heads] + [places[None][0]],
        y=[places[head][1] for head in heads] + [places[None][1]],
        mode="markers+text",
        marker={
            "size": [14 + 18 * abs(value) / limit for value in values] + [24],
            "color": [*values, 0],
            "colorscale": list(theme.DIVERGING),
            "cmin": -limit,
            "cmax": limit,
            "line": {"color": theme.INK, "width": 1},
            "symbol": ["circle"] * len(heads) + ["square"],
            "opacity": 1,
            "colorbar": theme.colorbar(scores.options.get("units", "effect on margin")),
        },
        text=[str(head) for head in heads] + ["logits"],
        textposition=_sides(heads, places),
        cliponaxis=False,
        customdata=[*values, sum(values)],
        hovertemplate="<b>%{text}</b><br>score %{customdata:+.4g}<extra></extra>",
        showlegend=False,
    )


def _sides(heads: list[Head], places: dict) -> list[str]:
    """Names stand above their heads; below in the lowest row, whose edges all go up, and where the next head stands higher."""

    def crowded(head: Head) -> bool:
        x, y = places[head]
        return any(0 < places[h][1] - y < 0.5 and abs(places[h][0] - x) < 1 for h in heads)

    lowest = min(places[head][1] for head in heads)
    below = [places[head][1] == lowest or crowded(head) for head in heads]
    return ["bottom center" if under else "top center" for under in below] + ["top center"]


def _axes(figure: go.Figure, scores: HeadScores, tokens: Sequence[str] | None) -> None:
    if tokens is None:
        figure.update_xaxes(title="head", dtick=1, showgrid=False, range=[-0.6, scores.n_heads - 0.2])
    else:
        labels = [theme.word(token) for token in tokens]
        figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, showgrid=False)
        figure.update_xaxes(title="token", range=[-0.6, len(labels) - 0.2])
    ticks = [*range(scores.n_layers), scores.n_layers]
    figure.update_yaxes(title="layer", tickvals=ticks, ticktext=[*map(str, ticks[:-1]), "answer"], showgrid=True)
    figure.update_yaxes(range=[-0.9, scores.n_layers + 0.6])


def _slider(figure: go.Figure) -> None:
    """One stop per tenth of the largest edge: edges in lower tenths are hidden, heads stay."""
    steps = []
    for threshold in range(STEPS):
        visible = [index // 4 // 2 >= threshold for index in range(8 * STEPS)] + [True]
        steps.append({"method": "restyle", "args": [{"visible": visible}], "label": f"{threshold * 10} %"})
    prefix = {"prefix": "hide edges below ", "font": {"size": 12}, "xanchor": "left"}
    figure.update_layout(sliders=[{"steps": steps, "currentvalue": prefix, "pad": {"t": 64}, "len": 0.6, "x": 0}])
    figure.update_layout(margin={"b": 140})


def _height(scores: HeadScores, tokens: Sequence[str] | None) -> int:
    return int(min(1000, 320 + (44 if tokens is None else 60) * scores.n_layers))

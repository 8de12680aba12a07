"""One look for every figure: colour-blind-safe colours, plain labels, escaped text. The global template is never touched.

Categories use Okabe and Ito's palette. Signed values run from blue (against) over a light neutral to orange (for the gold
label), which stay apart under the three common kinds of colour blindness and in grey print. Figures carry their own
light background, so they read on dark pages too; `viz.report` recolours them when the reader's system is dark.
"""

from html import escape

import plotly.graph_objects as go

INK, MUTED, GRID, PAPER = "#1d2430", "#5b6675", "#e3e7ec", "#ffffff"
# Okabe-Ito, black and yellow last: yellow is weak on white, black is the outline colour.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#B2182B",
    "#E69F00",
)
CATEGORIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED)
DIVERGING = (
    (0.0, "#053061"),
    (0.2, "#2b7bba"),
    (0.4, "#a6cbe3"),
    (0.5, "#f4f4f2"),
    (0.6, "#f6bf8c"),
    (0.8, "#d9691a"),
    (1.0, "#7f2704"),
)
# For cells with words on them: the same hues, never so dark that black text is lost.
SOFT = ((0.0, "#6fb0db"), (0.25, "#b5d5ea"), (0.5, "#f7f7f5"), (0.75, "#f9cfa7"), (1.0, "#f0924a"))
SEQUENTIAL = ((0.0, "#f7fbff"), (0.35, "#9ecae1"), (0.7, "#2b7bba"), (1.0, "#053061"))
# Buttons stay light on every screen: plotly paints the pressed one light, whatever the rest is.
MENU = {"bgcolor": "#fff", "bordercolor": "#aab4c0", "font": {"color": "#222", "size": 12}}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def apply(figure: go.Figure, title: str, subtitle: str = "", height: int = 420) -> go.Figure:
    """Give a figure the house look; `title` and `subtitle` are escaped."""
    text = f"<b>{clean(title)}</b>"
    if subtitle:
        text += f"<br><span style='font-size:12px;color:{MUTED}'>{clean(subtitle)}</span>"
    figure.update_layout(
        template="none",
        title={
            "text": text,
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 22 if subtitle else 14},
        },
        font={"family": FONT, "size": 13, "color": INK},
        title_font={"size": 16},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        colorway=list(CATEGORIES),
        height=height,
        margin={"l": 64, "r": 24, "t": 84, "b": 56},
        hoverlabel={"bgcolor": PAPER, "bordercolor": MUTED, "font": {"family": FONT, "color": INK, "size": 12}},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": BLUE},
    )
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": MUTED, "ticks": "outside", "tickcolor": GRID}
    figure.update_xaxes(**axis, automargin=True, title_standoff=10)
    figure.update_yaxes(**axis, automargin=True, title_standoff=10)
    return figure


def clean(text: object) -> str:
    """Text as text: plotly reads a little HTML in labels, so tokens such as `<b>` must be escaped."""
    return escape(str(text), quote=False)


def word(token: str) -> str:
    """A token as a reader knows it: tokenizers' marks for spaces go, a bare space and a line end are shown."""
    text = token.replace("\n", "⏎").replace("Ċ", "⏎").replace("Ġ", " ").replace("▁", " ").strip()
    return clean(text) or "␣"


def short_names(names: list[str]) -> list[str]:
    """Parameter names without the beginning and the end that all of them share."""
    parts = [name.split(".") for name in names]
    least = min(map(len, parts))
    front = next((i for i in range(least) if len({part[i] for part in parts}) > 1), 0)
    front -= front > 0 and parts[0][front].isdigit()  # "layers.0" rather than "0"
    back = next((i for i in range(least) if len({part[-1 - i] for part in parts}) > 1), 0)
    return [".".join(part[front : len(part) - back]) or name for part, name in zip(parts, names, strict=True)]


def band(x: list, low: list, high: list, colour: str, name: str, **options) -> go.Scatter:
    """A filled interval between two curves, grouped with the line it belongs to."""
    filled = {"fill": "toself", "fillcolor": faded(colour), "line": {"width": 0}, "mode": "lines"}
    return go.Scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], name=name, hoverinfo="skip", **filled, **options)


def faded(colour: str, alpha: float = 0.18) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def colorbar(text: str) -> dict:
    """The legend of a colour scale, its title above so that long numbers never meet it."""
    return {"title": {"text": text.replace(" ", "<br>", 1), "side": "top"}, "thickness": 14, "outlinewidth": 0}


def describe(*parts: object) -> str:
    """`model · task · n=50`: the parts that are known, in one line."""
    return " · ".join(str(part) for part in parts if part not in (None, "", {}))

"""Decoding by importance sampling, round by round: what the reward gained, how many samples spoke, how far the pre-logits moved."""

from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from . import theme

# Dotted, because where every round finds the best there is two of these lines are one.
CURVES = {
    "best so far": ("best", theme.ORANGE, "solid"),
    "round's maximum": ("max_reward", theme.SKY, "dot"),
    "round's mean": ("mean_reward", theme.BLUE, "solid"),
}
PANELS = ("reward per round", "effective sample size", "|u| per position")


def decoding(result: Any, *, title: str | None = None) -> go.Figure:
    """Three panels for what `aisp` returned: reward and ESS per round, and the norm of the perturbation per position.

    Lines are means over prompts, bands the middle half of them. A prompt that stopped early leaves the mean where it stopped.
    """
    history = getattr(result, "history", None)
    if not history:
        method = getattr(result, "method", type(result).__name__)
        raise ValueError(f"{method} has no rounds to show; expected the result of aisp()")
    figure = make_subplots(rows=1, cols=3, column_widths=[0.42, 0.29, 0.29], horizontal_spacing=0.085)
    rounds = list(range(1, history["ess"].shape[1] + 1))
    for label, (name, colour, dash) in CURVES.items():
        _line(figure, 1, rounds, history[name], label, colour, dash, legend=True)
    _line(figure, 2, rounds, history["ess"], "ESS", theme.GREEN)
    norm = result.perturbation_norm()
    _line(figure, 3, list(range(1, norm.shape[1] + 1)), norm, "|u|", theme.PURPLE)
    about = theme.describe(
        result.model,
        f"{len(result.prompts)} prompts",
        f"{int(result.samples.sum())} scored samples",
        f"{result.seconds:.1f} s",
        f"final ESS {float(_finite_mean(history['ess'])[-1]):.1f}",
    )
    theme.apply(figure, title or "AISP, round by round", about)
    for column, (x, y) in enumerate((("round", PANELS[0]), ("round", PANELS[1]), ("token", PANELS[2])), start=1):
        figure.update_xaxes(title=x, row=1, col=column)
        figure.update_yaxes(title=y, row=1, col=column, rangemode="normal" if column == 1 else "tozero")
    return figure


def _line(
    figure: go.Figure, column: int, x: list[int], values: Tensor, name: str, colour: str, dash: str = "solid",
    legend: bool = False,
) -> None:  # fmt: skip
    finite = values.masked_fill(~values.isfinite(), torch.nan)
    if len(values) > 1:
        low, high = (torch.nanquantile(finite, q, dim=0).tolist() for q in (0.25, 0.75))
        band = theme.band(x, low, high, colour, name, legendgroup=name, showlegend=False)
        figure.add_trace(band, row=1, col=column)
    line = go.Scatter(
        x=x, y=_finite_mean(values).tolist(), name=name, legendgroup=name, showlegend=legend, mode="lines",
        line={"color": colour, "width": 2.5, "dash": dash}, hovertemplate=f"{name}, %{{x}}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(line, row=1, col=column)


def _finite_mean(values: Tensor) -> Tensor:
    return values.masked_fill(~values.isfinite(), torch.nan).nanmean(0)

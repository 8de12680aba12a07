"""What notebooks show for the nouns: small HTML tables, every string escaped, no plotting library."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .heads import Circuit, HeadScores


def table_html(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A captioned HTML table; all cells are escaped here, so callers pass plain text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def circuit_html(circuit: "Circuit") -> str:
    layers = sorted({head.layer for head in circuit})
    rows = [[f"a{layer}", " ".join(f"h{h.head}" for h in circuit if h.layer == layer)] for layer in layers]
    return table_html(repr(circuit).split(":")[0].removeprefix("Circuit(") or "empty circuit", ["layer", "heads"], rows)


def scores_html(scores: "HeadScores", k: int = 10) -> str:
    bounds = scores.interval() if scores.examples is not None and len(scores.examples) > 1 else None
    rows = []
    for head in scores.rank()[:k]:
        span = [f"[{bounds[0][head]:+.3f}, {bounds[1][head]:+.3f}]"] if bounds else []
        rows.append([str(head), f"{scores[head]:+.3f}", *span])
    about = ", ".join(
        filter(None, [scores.method, scores.model, scores.task, f"n={scores.n_examples}" if scores.n_examples else ""])
    )
    return table_html(
        f"top {len(rows)} heads: {about}", ["head", "score"] + (["95 % interval"] if bounds else []), rows
    )

"""One HTML file that shows a whole run: opens from disk with no network, on light and dark screens."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from circuits.files import write_atomically

# A section holds plots, paragraphs (plain text) and tables (rows as dicts), in any order.
Item = go.Figure | str | Sequence[Mapping[str, Any]]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --page: #f5f6f8; --card: #fff; --line: #dde2e8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa5b4; --page: #14181f; --card: #1c222c; --line: #313a48; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { max-width: 75ch; white-space: pre-line; } p.soft, caption, footer { color: var(--soft); }
nav a { margin-right: 1.1em; color: inherit; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 12px 0;
  overflow-x: auto; }
.plot { min-width: 760px; }
table { border-collapse: collapse; width: max-content; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32em 1.1em .32em 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { max-width: 52ch; }
td.number, th.number { text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4em 0; font-size: .86rem; }
"""

# Figures carry a light look of their own; on a dark screen their four neutral colours take the page's, and the two darkest
# of the categories a lighter tone, in lines and in bands (see theme.py).
SCRIPT = """
const figures = document.getElementById('figures').textContent, dark = matchMedia('(prefers-color-scheme: dark)');
const night = {'#1d2430': '#e6e9ee', '#5b6675': '#9aa5b4', '#e3e7ec': '#313a48', '#ffffff': '#1c222c',
  '#0072b2': '#4aa8e0', 'rgba(0,114,178': 'rgba(74,168,224', '#b2182b': '#f0707e', 'rgba(178,24,43': 'rgba(240,112,126'};
const light = new RegExp(Object.keys(night).join('|').replaceAll('(', '[(]'), 'gi');
function draw() {
  const text = dark.matches ? figures.replace(light, colour => night[colour.toLowerCase()]) : figures;
  return Promise.all(JSON.parse(text).map((figure, i) => Plotly.react('plot-' + i, figure.data, figure.layout,
    {responsive: true, displaylogo: false, modeBarButtonsToRemove: ['lasso2d', 'select2d']})));
}
draw().then(() => { dark.addEventListener('change', draw); document.body.dataset.ready = 'yes'; });
"""


def report(
    path: str | Path,
    figures: go.Figure | Sequence[Any] | Mapping[str, Any],  # Any: Item or a sequence of them, checked one by one
    *,
    title: str = "luthier report",
    summary: str = "",
    provenance: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Path:
    """Write one self-contained HTML page and return its path.

    `figures` maps section titles to a figure, a paragraph, a table (a list of dicts) or a list of these; a figure or a
    list of figures works too. All text is escaped. `provenance` and `command` close the page: what made it, and how
    to make it again. The file is renamed into place, so a failed run leaves no half page.
    """
    sections = _sections(figures)
    plots: list[str] = []
    body = "".join(_section(index, name, items, plots) for index, (name, items) in enumerate(sections.items()))
    links = "".join(f'<a href="#s{index}">{escape(name)}</a>' for index, name in enumerate(sections))
    content = "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">{escape(summary)}</p>' if summary else "",
            f"<nav>{links}</nav>" if len(sections) > 1 else "",
            body,
            _footer(provenance or {}, command),
            "</main>",
            f'<script type="application/json" id="figures">[{",".join(plots)}]</script>',
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )
    return write_atomically(path, content)


def _sections(figures: Any) -> dict[str, list[Item]]:
    if isinstance(figures, Mapping):
        sections = {str(name): _items(value) for name, value in figures.items()}
    else:
        sections = {"Figures": _items(figures)}
    if not any(sections.values()):
        raise ValueError("nothing to report; give at least one figure, paragraph or table")
    return sections


def _items(value: Any) -> list[Item]:
    if isinstance(value, go.Figure | str) or _is_table(value):
        return [value]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        items = list(value)
        wrong = [type(item).__name__ for item in items if not (isinstance(item, go.Figure | str) or _is_table(item))]
        if not wrong:
            return items
        value = wrong[0]
    name = value if isinstance(value, str) else type(value).__name__
    raise TypeError(f"cannot show a {name} in a report; expected a plotly Figure, a text or a list of dicts")


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(row, Mapping) for row in value)


def _section(index: int, name: str, items: list[Item], plots: list[str]) -> str:
    parts = [f'<h2 id="s{index}">{escape(name)}</h2>']
    for item in items:
        if isinstance(item, go.Figure):
            parts.append(f'<div class="card"><div class="plot" id="plot-{len(plots)}"></div></div>')
            plots.append(_json(item))
        elif isinstance(item, str):
            parts.append(f"<p>{escape(item)}</p>")
        else:
            parts.append(f'<div class="card">{table(item)}</div>')
    return "".join(parts)


def _json(figure: go.Figure) -> str:
    """The figure as JSON that no token can break out of: `<` never appears, so `</script>` cannot."""
    return str(figure.to_json()).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """An HTML table of the rows' keys, in order of appearance; numbers to the right, every cell escaped."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(row.get(c), int | float | None) for row in rows)}
    mark = {column: ' class="number"' if column in numeric else "" for column in columns}
    head = "".join(f"<th{mark[c]}>{escape(str(c))}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{mark[c]}>{escape(_cell(row.get(c)))}</td>" for c in columns) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _footer(provenance: Mapping[str, Any], command: str | None) -> str:
    if not provenance and not command:
        return ""
    parts = ["<footer><h2>Where this comes from</h2>"]
    if command:
        parts.append(f'<p>To make it again:</p><div class="card"><pre>{escape(command)}</pre></div>')
    rows = [
        {"what": key, "value": value if isinstance(value, str | int | float | Path) else json.dumps(value, default=str)}
        for key, value in provenance.items()
        if value is not None
    ]
    if rows:
        parts.append(f'<div class="card">{table(rows)}</div>')
    return "".join([*parts, "</footer>"])

"""The HTML of a report: tables, figures, and the page around them. It asks the network for nothing, by its policy."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from gzip import compress
from html import escape
from typing import Any

import msgspec
from msgspec import Struct
from rich.table import Column, Table
from rich.text import Text

from minidisagg.measure.plots import Figure, plotly, svg

CLASSES = {"bold": "bold", "dim": "dim", "cyan": "side-a", "green": "side-b"}  # by the style of a rich cell


class Content(Struct):
    """What a report says: under its title a head and a table, then figures, then more tables (all but these HTML)."""

    title: str
    head: str
    figures: list[Figure]
    tail: str = ""


def paragraphs(name: str, texts: Sequence[str]) -> str:
    return "".join(f'<p class="{name}">{escape(text)}</p>' for text in texts)


def html_table(table: Table) -> str:
    """The cells of a rich table as HTML."""

    def cell(tag: str, content: Any, column: Column) -> str:
        text, style = (content.plain, content.style) if isinstance(content, Text) else (content, column.style)
        return f'<{tag} class="{column.justify} {CLASSES.get(str(style), "")}">{escape(str(text))}</{tag}>'

    heads = "".join(cell("th", column.header, column) for column in table.columns)
    body = ""
    for row, contents in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        cells = "".join(cell("td", content, column) for content, column in zip(contents, table.columns, strict=True))
        body += f'<tr class="{"last" if row.end_section else ""}">{cells}</tr>'
    return (
        f'<section><h2>{escape(str(table.title))}</h2><div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{paragraphs('caption', [str(table.caption or '')])}</section>"
    )


def _figure(figure: Figure, index: int, interactive: bool) -> str:
    panels = ""
    for panel in figure.drawn:
        drawn = svg(panel, figure.columns)
        if interactive:
            drawn = f'<div class="plot"></div><script type="application/json">{plotly(panel, figure.columns)}</script>'
        panels += f"<div><h3>{escape(panel.title)}</h3>{drawn}</div>"
    return (
        f'<figure><h2>{escape(figure.title)}</h2><div class="legend">{figure.legend()}</div>'
        f'<div class="grid columns{figure.columns}">{panels}</div>'
        f"<figcaption><b>Figure {index}.</b> {escape(figure.caption)}</figcaption></figure>"
    )


def _provenance(options: Mapping[str, Any]) -> str:
    rows = {"command": options.get("command", "not recorded"), **options.get("machine", {})}
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    asked = {name: value for name, value in options.items() if name not in ("command", "machine")}
    text = msgspec.json.format(msgspec.json.encode(asked), indent=2).decode()
    return (
        f"<section><h2>Command and machine</h2><dl>{items}</dl>"
        f"<details><summary>All options</summary><pre>{escape(text)}</pre></details></section>"
    )


def page(content: Content, options: Mapping[str, Any], library: str) -> str:
    """The whole file; `library` is plotly.js, or empty for figures in SVG."""
    figures = "".join(_figure(figure, i, bool(library)) for i, figure in enumerate(content.figures, 1))
    packed = b64encode(compress(library.encode(), mtime=0)).decode()  # two fifths as large
    scripts = f'<script id="library" type="text/plain">{packed}</script><script>{DRAW}</script>' if library else ""
    title = escape(content.title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{content.head}{figures}{content.tail}{_provenance(options)}</main>"
        f"{scripts}</body></html>\n"
    )


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1c1f23; --dim: #656b73; --grid: #e6e8eb; --a: #0072b2;
  --b: #d55e00; --handoff: #8a6bb0; --queue: #c4c8ce; --prefill: #cc79a7; --transfer: #009e73; --wait: #e0b400;
  --decode: #8fa3b8; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --ink: #e4e6e9; --dim: #9aa1aa; --grid: #2a2f36;
  --a: #56b4e9; --b: #e69f00; --handoff: #b79ddb; --queue: #5b626b; --transfer: #1fb98d; --wait: #d9c440;
  --decode: #5f7388; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 980px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 6px }
h2 { font-size: 16px; margin: 0 0 6px }
h3 { font-size: 13px; margin: 0 0 2px; min-height: 19px }
section, figure { margin: 36px 0 0 }
.what { color: var(--dim); white-space: pre-line; margin: 0 }
.verdict { font-size: 17px; border-left: 3px solid; padding: 2px 0 2px 14px; margin: 16px 0 }
.note { margin: 4px 0; font-size: 14px }
.void { color: var(--bad) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  border-top: 1.5px solid; border-bottom: 1.5px solid }
th, td { padding: 2px 14px 2px 0; text-align: left; white-space: pre }
th { vertical-align: bottom }
thead { border-bottom: 1px solid }
.right { text-align: right }
.bold, .side-a, .side-b { font-weight: 600 }
.dim { color: var(--dim) } .side-a { color: var(--a) } .side-b { color: var(--b) }
tr.last td { border-bottom: 1px solid var(--grid) }
.caption, figcaption { font-size: 13px; color: var(--dim); margin: 6px 0 0 }
figcaption b { color: var(--ink) }
.grid { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr) }
.columns2 { grid-template-columns: repeat(2, minmax(0, 1fr)) }
.columns3 { grid-template-columns: repeat(3, minmax(0, 1fr)) }
@media (max-width: 820px) { .columns3 { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
@media (max-width: 560px) { .columns2, .columns3 { grid-template-columns: minmax(0, 1fr) } }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin-bottom: 6px }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; background: var(--c) }
.legend .line { width: 18px; height: 0; background: none; border-top: 2.5px solid var(--c); vertical-align: middle }
.legend .dash { border-top-style: dashed }
.legend .points { width: 8px; height: 8px }
.legend .circle.points { border-radius: 50% }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 12px; fill: var(--ink) }
svg .m { text-anchor: middle } svg .e { text-anchor: end }
svg .spans { fill: var(--c) }
svg .line, svg .points { fill: none; stroke: var(--c) }
svg .circle { stroke-linecap: round } svg .square { stroke-linecap: square } svg .dash { stroke-dasharray: 5 4 }
.lattice path { stroke: var(--grid) }
.axis { fill: none; stroke: var(--dim) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px; margin: 0 }
dt { color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace }
pre { font-size: 12px; overflow-x: auto }
summary { cursor: pointer; font-size: 13px; margin-top: 8px }
a { color: inherit }
@media print { figure, section { break-inside: avoid } }
"""

DRAW = """
const draw = () => {
  const css = getComputedStyle(document.documentElement);
  const color = (_, name) => css.getPropertyValue(name).trim();
  for (const div of document.querySelectorAll(".plot")) {
    const panel = JSON.parse(div.nextElementSibling.textContent.replace(/var\\((--[a-z]+)\\)/g, color));
    Plotly.react(div, panel.data, panel.layout, {responsive: true, displayModeBar: false});
  }
};
const load = async () => {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
};
load();
"""

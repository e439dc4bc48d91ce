"""Figures as plain data, and two ways to draw a panel of one: `svg`, and `plotly` (its JSON).

A colour is the name of a CSS variable of the page, so both follow its light and dark scheme.
"""

from __future__ import annotations

import math
from html import escape
from typing import Literal

import msgspec
from msgspec import Struct

WIDTHS = {1: 780, 2: 390, 3: 270}  # of a panel by the figure's columns, where letters are 12 high
LETTER = 6.6  # width
MARGIN = 12  # to the right of the axes


class Series(Struct, frozen=True):
    """`spans` are horizontal bars from `x` to `end` at the heights `y`. Without a label it is not in the legend."""

    kind: Literal["line", "points", "spans"]
    color: str
    x: list[float]
    y: list[float]
    label: str = ""
    end: list[float] = []
    size: float = 2.0  # of a point, or the width of a line
    opacity: float = 1.0
    marker: Literal["circle", "square", "dash"] = "circle"  # dash: a broken line


class Axis(Struct, frozen=True):
    """From `low` to `high`, which may be the smaller one; `names` stand for 0, 1, 2, … instead of numbers."""

    label: str
    low: float
    high: float
    log: bool = False
    names: list[str] = []

    def place(self, value: float) -> float:
        """From [low, high] to [0, 1]."""
        low, high, at = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)

    def ticks(self, length: float = 0.0) -> list[tuple[float, str]]:
        """Where the axis has its numbers, and how they are written; with a `length`, those with room side by side."""
        low, high = sorted((self.low, self.high))
        values = _log_ticks(low, high) if self.log else []
        values = values if len(values) > 2 else _linear_ticks(low, high)
        found = [(float(i), name) for i, name in enumerate(self.names)] or [(v, f"{v:,.10g}") for v in values]
        kept, free = [], -math.inf
        for value, text in found:
            middle, half = length * self.place(value), LETTER * len(text) / 2
            if not length or (middle - half >= free and middle + half <= length + MARGIN):
                kept.append((value, text))
                free = middle + half + LETTER
        return kept


class Panel(Struct, frozen=True):
    """One pair of axes and what is drawn into it; `height` in the units of `WIDTHS`."""

    title: str
    x: Axis
    y: Axis
    series: list[Series]
    height: int = 196


class Figure(Struct, frozen=True):
    """Panels in so many columns, under one legend and over one caption."""

    title: str
    caption: str
    panels: list[Panel]
    columns: int = 1

    @property
    def drawn(self) -> list[Panel]:
        """The panels that have data."""
        return [panel for panel in self.panels if any(len(s.x) > (s.kind == "line") for s in panel.series)]

    def legend(self) -> str:
        """One line of HTML for all panels."""
        every = [s for panel in self.panels for s in panel.series]  # empty ones keep their place in the order
        seen = {s.label for s in every if s.label and s.x}
        return "".join(
            f'<span><i class="{s.kind} {s.marker}" style="--c:var(--{s.color})"></i>{escape(label)}</span>'
            for label, s in {s.label: s for s in every}.items()
            if label in seen
        )


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    return [float(f"{k * step:.10g}") for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 200 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for k in decades for m in steps if low <= (value := float(f"{m}e{k}")) <= high]


# ---------------------------------------------------------------- SVG


def svg(panel: Panel, columns: int) -> str:
    """The panel as one SVG element."""
    width, height, top, bottom = WIDTHS[columns], panel.height, 6, 40
    longest = max((len(text) for _, text in panel.y.ticks()), default=0)
    left = 12 + LETTER * longest + (16 if panel.y.label else 0)
    wide, high = width - left - MARGIN, height - top - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + wide * panel.x.place(x), 1), round(top + high * (1 - panel.y.place(y)), 1)

    columns_at = [(at(value, panel.y.low)[0], escape(text)) for value, text in panel.x.ticks(wide)]
    rows_at = [(at(panel.x.low, value)[1], escape(text)) for value, text in panel.y.ticks()]
    thick = 0.8 * high / abs(panel.y.high - panel.y.low)
    box = f"{left:.1f} {top} {wide:.1f} {high}"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(panel.title)}"><g class="lattice">',
        *(f'<path d="M{x} {top}v{high}"/>' for x, _ in columns_at),
        *(f'<path d="M{left:.1f} {y}h{wide:.1f}"/>' for y, _ in rows_at if not panel.y.names),
        # an inner SVG, so that what is outside of the axes is cut off
        f'</g><svg x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{high}" viewBox="{box}">',
        *(
            _path(s, [at(*p) for p in zip(s.x, s.y, strict=True)], [at(e, 1)[0] for e in s.end], thick)
            for s in panel.series
            if s.x
        ),
        f'</svg><path class="axis" d="M{left:.1f} {top}v{high}h{wide:.1f}"/>',
        *(f'<text class="m" x="{x}" y="{height - 25}">{text}</text>' for x, text in columns_at),
        *(f'<text class="e" x="{left - 5:.1f}" y="{y + 4:.1f}">{text}</text>' for y, text in rows_at),
        f'<text class="m" x="{left + wide / 2:.1f}" y="{height - 7}">{escape(panel.x.label)}</text>',
        f'<text class="m" transform="translate(11 {top + high / 2}) rotate(-90)">{escape(panel.y.label)}</text></svg>',
    ]
    return "".join(parts)


def _path(s: Series, points: list[tuple[float, float]], ends: list[float], thick: float) -> str:
    """One path for the whole series: a point is a line of no length, whose ends are what one sees."""
    style = f"opacity:{s.opacity:g};--c:var(--{s.color})"
    if s.kind == "spans":
        bars = (f"M{x} {y - thick / 2:.1f}H{end}v{thick:.1f}H{x}z" for (x, y), end in zip(points, ends, strict=True))
        return f'<path class="spans" style="{style}" d="{"".join(bars)}"/>'
    d = "M" + "L".join(f"{x} {y}" for x, y in points)
    if s.kind == "points":
        d = "".join(f"M{x} {y}h0" for x, y in points)
    return f'<path class="{s.kind} {s.marker}" style="{style};stroke-width:{s.size:g}" d="{d}"/>'


def standalone(figure: Figure) -> str:
    """The figure as a file of its own: its legend, and its panels one below the other, light or dark as its viewer."""
    width, parts, y, x = WIDTHS[1], list[str](), 34, 12.0
    for series in {s.label: s for panel in figure.panels for s in panel.series if s.label}.values():
        style = f"--c:var(--{series.color})"
        parts.append(f'<path class="points circle" style="{style};stroke-width:8" d="M{x:.0f} 16h0"/>')
        parts.append(f'<text x="{x + 10:.0f}" y="20">{escape(series.label)}</text>')
        x += 34 + LETTER * len(series.label)
    for panel in figure.drawn:
        size = f'<svg y="{y + 20}" width="{width}" height="{panel.height}" '
        parts.append(f'<text class="t" x="12" y="{y + 12}">{escape(panel.title)}</text>')
        parts.append(svg(panel, 1).replace("<svg ", size, 1))
        y += panel.height + 30
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
    paper = '<rect width="100%" height="100%" fill="var(--bg)"/>'
    return f"{head}<style>{FILE_STYLE}</style>{paper}{''.join(parts)}</svg>\n"


FILE_STYLE = """
:root { --bg: #fff; --ink: #1c1f23; --dim: #656b73; --grid: #e6e8eb; --a: #0072b2; --b: #d55e00; --prefill: #cc79a7;
  --transfer: #009e73; --wait: #e0b400; --decode: #8fa3b8 }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --ink: #e4e6e9; --dim: #9aa1aa; --grid: #2a2f36;
  --a: #56b4e9; --b: #e69f00; --transfer: #1fb98d; --wait: #d9c440; --decode: #5f7388 } }
text { font: 12px sans-serif; fill: var(--ink) } .t { font-weight: bold } .m { text-anchor: middle }
.e { text-anchor: end } .spans { fill: var(--c) } .line, .points { fill: none; stroke: var(--c) }
.circle { stroke-linecap: round } .square { stroke-linecap: square } .dash { stroke-dasharray: 5 4 }
.lattice path { stroke: var(--grid) } .axis { fill: none; stroke: var(--dim) }
"""


# ---------------------------------------------------------------- plotly


def plotly(panel: Panel, columns: int) -> str:
    """The panel as JSON, safe in a script element, once the page has put its colours for `var(--…)`."""
    layout = {
        "height": panel.height + 10,
        "margin": {"l": 52, "r": MARGIN, "t": 8, "b": 42},
        "showlegend": False,
        "font": {"color": "var(--ink)", "size": 12},
        "paper_bgcolor": "var(--bg)",
        "plot_bgcolor": "var(--bg)",
        "barmode": "overlay",
        "hovermode": "closest",
        "xaxis": _plotly_axis(panel.x, WIDTHS[columns] - 52 - MARGIN),
        "yaxis": _plotly_axis(panel.y),
    }
    traces = [_trace(s) for s in panel.series if s.x]
    return msgspec.json.encode({"data": traces, "layout": layout}).decode().replace("<", "\\u003c")


def _plotly_axis(axis: Axis, length: float = 0.0) -> dict[str, object]:
    text = {"text": escape(axis.label), "standoff": 6, "font": {"size": 12}}  # plotly reads some HTML
    found: dict[str, object] = {
        "title": text,
        "type": "log" if axis.log else "linear",
        "gridcolor": "var(--grid)",
        "zeroline": False,
        "range": [math.log10(v) if axis.log else v for v in (axis.low, axis.high)],
        "linecolor": "var(--dim)",
        "automargin": True,
        "nticks": 7,
        "minor": {"ticks": ""},
        "separatethousands": True,
    }
    if axis.names or axis.log:  # plotly's own numbers on a logarithmic axis crowd
        ticks = axis.ticks(length)
        found |= {"tickvals": [value for value, _ in ticks], "ticktext": [escape(name) for _, name in ticks]}
    return found


def _trace(s: Series) -> dict[str, object]:
    color = f"var(--{s.color})"
    common = {"name": escape(s.label), "opacity": s.opacity, "x": s.x, "y": s.y}
    if s.kind == "spans":
        lengths = [end - start for start, end in zip(s.x, s.end, strict=True)]
        shape = {"type": "bar", "orientation": "h", "base": s.x, "x": lengths, "width": 0.8}
        return common | shape | {"marker": {"color": color, "line": {"width": 0}}, "hovertemplate": "%{x:.3~g}"}
    if s.kind == "points":
        return common | {"mode": "markers", "marker": {"color": color, "size": s.size + 0.5, "symbol": s.marker}}
    dash = "dash" if s.marker == "dash" else "solid"
    return common | {"mode": "lines", "line": {"color": color, "width": s.size, "dash": dash}}

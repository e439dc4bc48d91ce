"""Figures as plain data, and two ways to draw them: SVG (`svg`) and plotly's JSON (`plotly`).

Colours are names of CSS variables of the page (`a` is `var(--a)`), so both follow its light and dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Literal

import msgspec
from msgspec import Struct

WIDTHS = {1: 860, 2: 424, 3: 280}  # of a panel by columns, in the units in which text is 12 high
CHAR = 6.6  # width of a letter


class Series(Struct, frozen=True, kw_only=True):
    """`spans` are horizontal bars from `x` to `end` at the heights `y`. A series without label is not in the legend."""

    kind: Literal["line", "points", "spans"]
    color: str
    x: Sequence[float]
    y: Sequence[float]
    end: Sequence[float] = ()
    label: str = ""
    marker: Literal["circle", "square"] = "circle"
    size: float = 3.0  # of a point, or the width of a line
    opacity: float = 1.0
    dashed: bool = False


class Axis(Struct, frozen=True, kw_only=True):
    """`names` are the labels of 0, 1, 2, … instead of numbers; `down` lets it grow downwards."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False
    names: Sequence[str] = ()
    down: bool = False

    def place(self, value: float) -> float:
        """From [low, high] to [0, 1]."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, 1e-12)))
        return (high - at if self.down else at - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Where the axis has its numbers, and how they are written."""
        if self.names:
            return list(enumerate(self.names))
        found = _log_ticks(self.low, self.high) if self.log else []
        if len(found) < 3:
            found = _linear_ticks(self.low, self.high)
        return [(value, f"{value:.3g}%" if self.percent else f"{value:,.10g}") for value in found]


class Panel(Struct, frozen=True, kw_only=True):
    """One pair of axes and what is drawn into it; `height` in the units of `WIDTHS`."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    height: int = 220


class Figure(Struct, frozen=True, kw_only=True):
    """Panels in so many columns under one legend and one caption."""

    title: str
    caption: str
    panels: Sequence[Panel]
    columns: int = 1


def limits(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """An axis that holds the values, with a little room; from 0 unless it is logarithmic."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        return min(known) / 1.1, max(known) * 1.1
    return min(0.0, *known), max(known) * 1.03 or 1.0


def _linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    candidates = [float(f"{m}e{k}") for k in range(first, last + 1) for m in steps]
    return [value for value in candidates if low <= value <= high]


def legend(figure: Figure) -> str:
    """The legend of all panels, as HTML."""
    items = {s.label: s for panel in figure.panels for s in panel.series if s.label}
    return "".join(
        f'<span><i class="{s.kind} {s.marker}{" dashed" if s.dashed else ""}" '
        f'style="--c:var(--{s.color});opacity:{max(s.opacity, 0.45):g}"></i>{escape(label)}</span>'
        for label, s in items.items()
    )


# ---------------------------------------------------------------- SVG


def svg(panel: Panel, columns: int) -> str:
    """The panel as one SVG element."""
    width, height, top, bottom, right = WIDTHS[columns], panel.height, 24, 42, 14
    left = max(34.0, 24 + CHAR * max((len(text) for _, text in panel.y.ticks()), default=0))
    wide, high = width - left - right, height - top - bottom
    if panel.y.names and not panel.y.label:
        left, wide = left - 14, wide + 14

    def across(value: float) -> float:
        return left + wide * panel.x.place(value)

    def up(value: float) -> float:
        return top + high * (1 - panel.y.place(value))

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(panel.title)}">',
        f'<text class="t" x="{left:.1f}" y="14">{escape(panel.title)}</text>',
        f'<svg x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{high}" '
        f'viewBox="{left:.1f} {top} {wide:.1f} {high}"><g class="grid">',  # inner: clips what is outside of the axes
    ]
    parts += [f'<path d="M{across(v):.1f} {top}v{high}"/>' for v, _ in panel.x.ticks()]
    parts += [f'<path d="M{left:.1f} {up(v):.1f}h{wide:.1f}"/>' for v, _ in panel.y.ticks() if not panel.y.names]
    parts.append("</g>")
    thick = 0.8 * high / max(len(panel.y.names), panel.y.high - panel.y.low if not panel.y.log else 1, 1)
    for s in panel.series:
        parts.append(_svg_series(s, [(across(x), up(y)) for x, y in zip(s.x, s.y, strict=True)],
                                 [across(x) for x in s.end], thick))  # fmt: skip
    parts.append(f'</svg><path class="axis" d="M{left:.1f} {top}v{high}h{wide:.1f}"/>')
    for value, text in panel.x.ticks():
        parts.append(f'<text class="m" x="{across(value):.1f}" y="{height - 26}">{escape(text)}</text>')
    for value, text in panel.y.ticks():
        parts.append(f'<text class="e" x="{left - 5:.1f}" y="{up(value) + 4:.1f}">{escape(text)}</text>')
    parts.append(f'<text class="m" x="{left + wide / 2:.1f}" y="{height - 8}">{escape(panel.x.label)}</text>')
    if panel.y.label:
        middle = top + high / 2
        parts.append(f'<text class="m" transform="rotate(-90 11 {middle})" x="11" y="{middle}">'
                     f"{escape(panel.y.label)}</text>")  # fmt: skip
    return "".join([*parts, "</svg>"])


def _svg_series(s: Series, points: list[tuple[float, float]], ends: list[float], thick: float) -> str:
    color = f"var(--{s.color})"
    if s.kind == "spans":
        bars = "".join(f"M{x:.1f} {y - thick / 2:.1f}H{max(end, x + 0.3):.1f}v{thick:.1f}H{x:.1f}z"
                       for (x, y), end in zip(points, ends, strict=True))  # fmt: skip
        return f'<path style="fill:{color};opacity:{s.opacity:g}" d="{bars}"/>'
    if s.kind == "points":  # lines of no length: their round or square ends are the marks
        cap, d = "round" if s.marker == "circle" else "square", "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    else:
        cap, d = "butt", "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ";stroke-dasharray:5 4" if s.dashed else ""
    style = f"fill:none;stroke:{color};stroke-width:{s.size:g};stroke-linecap:{cap};opacity:{s.opacity:g}{dash}"
    return f'<path style="{style}" d="{d}"/>' if points else ""


# ---------------------------------------------------------------- plotly


def plotly(panel: Panel) -> str:
    """The panel as JSON for `Plotly.react`, safe inside a script element; `var(--…)` is for the page to replace."""
    layout = {
        "title": {"text": _plain(panel.title), "font": {"size": 13}, "x": 0, "xref": "paper", "xanchor": "left",
                  "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 8}},
        "height": panel.height + 20, "margin": {"l": 56, "r": 12, "t": 28, "b": 44}, "showlegend": False,
        "font": {"color": "var(--ink)", "size": 11}, "paper_bgcolor": "var(--bg)", "plot_bgcolor": "var(--bg)",
        "barmode": "overlay", "hovermode": "closest",
        "xaxis": _plotly_axis(panel.x), "yaxis": _plotly_axis(panel.y),
    }  # fmt: skip
    data = {"data": [_plotly_series(s, panel) for s in panel.series if s.x], "layout": layout}
    return msgspec.json.encode(data).decode().replace("<", "\\u003c")


def _plain(text: str) -> str:
    return escape(text, quote=False)  # plotly reads some HTML in its texts


def _plotly_axis(axis: Axis) -> dict[str, object]:
    low, high = (math.log10(v) if axis.log else v for v in (axis.low, axis.high))
    found: dict[str, object] = {
        "title": {"text": _plain(axis.label), "standoff": 6}, "type": "log" if axis.log else "linear",
        "range": [high, low] if axis.down else [low, high], "gridcolor": "var(--grid)", "zeroline": False,
        "linecolor": "var(--dim)", "showline": True, "automargin": True, "ticksuffix": "%" if axis.percent else "",
    }  # fmt: skip
    if axis.names:
        found |= {"tickvals": list(range(len(axis.names))), "ticktext": [_plain(name) for name in axis.names]}
        found["showgrid"] = False
    return found


def _plotly_series(s: Series, panel: Panel) -> dict[str, object]:
    color, name = f"var(--{s.color})", _plain(s.label or panel.title)
    common: dict[str, object] = {"name": name, "opacity": s.opacity, "x": list(s.x), "y": list(s.y)}
    if s.kind == "spans":
        lengths = [end - start for start, end in zip(s.x, s.end, strict=True)]
        return common | {
            "type": "bar", "orientation": "h", "base": list(s.x), "x": lengths, "width": 0.8,
            "marker": {"color": color, "line": {"width": 0}}, "hovertemplate": "%{x:.3~g}",
        }  # fmt: skip
    if s.kind == "points":
        return common | {"type": "scatter", "mode": "markers",
                         "marker": {"color": color, "size": s.size + 0.5, "symbol": s.marker}}  # fmt: skip
    line = {"color": color, "width": s.size, "dash": "dash" if s.dashed else "solid"}
    return common | {"type": "scatter", "mode": "lines", "line": line}


def thinned(values: Sequence[float], digits: int = 5) -> list[float]:
    """Rounded to so many digits: a file needs no more than can be seen."""
    return [float(f"{value:.{digits}g}") for value in values]


def boxed(panel: Panel, count: int) -> bool:
    """Whether the panel's lines have at most `count` points each."""
    return all(len(s.x) <= count for s in panel.series) and all(a is not b for a, b in pairwise(panel.series))

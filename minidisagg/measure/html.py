"""report.html of a run directory: one file that opens offline, made from the directory's other files alone.

With plotly installed (the extra `report`) the figures are interactive and the library is in the file; else they are
SVG. A content security policy in the page keeps it from asking the network for anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from minidisagg.measure import contest, figures
from minidisagg.measure.comparison import Comparison, number
from minidisagg.measure.contest import Contest
from minidisagg.measure.goodput import SLO, parse_slo
from minidisagg.measure.page import Content, html_table, page, paragraphs
from minidisagg.measure.report import goodput_table, head_text, link_table, main_table, stage_table, worker_table
from minidisagg.measure.run_directory import GoodputSearch, read_json, read_result
from minidisagg.measure.timeline import read_timeline

LIMIT = 6_000_000  # bytes of a report; where plotly does not fit the figures are SVG


def write_html(run_dir: Path) -> Path:
    """Write report.html from options.json, result.json, requests.jsonl and trace.json; returns its path.

    The steps of a sweep get theirs too, in their directories. Raises `OSError`, and `ValueError` for files of no run
    or of another version.
    """
    try:
        return _write(run_dir, read_json(run_dir / "options.json"))
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError(f"{run_dir}: not a run directory of this version: {error!r}") from None


def _write(run_dir: Path, options: dict[str, Any]) -> Path:
    result = read_result(run_dir)
    if isinstance(result, Comparison):
        content = _of_comparison(result)
    elif isinstance(result, Contest):
        content = _of_contest(result)
    elif isinstance(result, GoodputSearch):
        content = _of_goodput(result)
    else:
        content = _of_sweep(result)
        for users in result:
            _write(run_dir / f"concurrency-{users}", options)
    if (run_dir / "trace.json").exists():
        content.figures += figures.trace_figures(read_timeline(run_dir / "trace.json"))
    text, left_out = page(content, options, _plotly_js()), 0
    if len(text.encode()) > LIMIT:
        text = page(content, options, "")
    while len(text.encode()) > LIMIT and content.figures:
        content.figures.pop()  # the last ones are those of the trace, which grow with the workers
        left_out += 1
        note = f"Figures left out, as the file would be larger than {LIMIT / 1e6:g} MB with them: {left_out}."
        text = page(replace(content, tail=content.tail + paragraphs("note", [note])), options, "")
    path = run_dir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _plotly_js() -> str:
    if find_spec("plotly") is None:
        return ""
    library: Any = import_module("plotly.offline")
    return str(library.get_plotlyjs())


# ---------------------------------------------------------------- what a report says


def _of_comparison(comparison: Comparison) -> Content:
    a, b = comparison.a, comparison.b
    told = a.results[0].get("slo")
    slo = parse_slo([told]) if isinstance(told, str) else None
    drawn = [
        figures.attainment_figure(comparison, slo) if slo else None,
        figures.latency_figure(comparison, slo or SLO()),
        figures.interference_figure(comparison),
        figures.waterfall_figure(comparison),
        figures.load_figure(comparison),
        figures.usage_figure(comparison),
    ]
    head = paragraphs("what", [head_text(comparison.sides).plain])
    head += paragraphs("verdict void" if comparison.void else "verdict", [comparison.verdict])
    head += _notes(comparison.void, comparison.marks) + html_table(main_table(comparison))
    tables = [draw(comparison) for draw in (stage_table, worker_table, link_table)]
    title = f"{b.label} against {a.label}" if b else a.label
    tail = "".join(html_table(table) for table in tables if table is not None)
    return Content(title, head, [figure for figure in drawn if figure and figure.drawn], tail)


def _of_contest(of: Contest) -> Content:
    top = paragraphs("what", [head_text(of.sides).plain])
    top += paragraphs("verdict void" if of.void else "verdict", [of.verdict])
    top += _notes(of.void, of.marks) + html_table(contest.table(of))
    return Content(", ".join(side.label for side in of.sides), top, [contest.ratio_figure(of)])


def _of_goodput(search: GoodputSearch) -> Content:
    found = search.goodput
    name, first = next(iter(found.items()))
    alone = f"{name} holds {number(first.rate)} requests/s with {first.target:.0%} of them within the SLO."
    head = paragraphs("what", [f"SLO (ms): {search.slo}"])
    head += paragraphs("verdict void" if search.void else "verdict", [search.verdict or alone])
    head += _notes(search.void, search.marks) + html_table(goodput_table(found))
    return Content("Goodput of " + " and ".join(found), head, [figures.goodput_figure(found)])


def _notes(void: Sequence[str], marks: Sequence[str]) -> str:
    return paragraphs("note", [f"Void: {reason}" for reason in void] + [f"Note: {mark}" for mark in marks])


def _of_sweep(comparisons: Mapping[int, Comparison]) -> Content:
    head, said = "", set[str]()
    for users, one in comparisons.items():
        link = f'<a href="concurrency-{users}/report.html">{users} at a time</a>'
        head += f'<p class="verdict{" void" if one.void else ""}">{link}: {escape(one.verdict)}</p>'
        head += _notes((), [mark for mark in one.marks if mark not in said])
        said.update(one.marks)
    sides = next(iter(comparisons.values())).sides
    return Content(
        "A handful of users: " + " and ".join(s.label for s in sides), head, [figures.sweep_figure(comparisons)]
    )

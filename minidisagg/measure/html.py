"""report.html of a run directory: one file that opens offline, made from the directory's other files alone.

With plotly installed (the extra `report`) the figures are interactive and the library is in the file; else they are
SVG. A content security policy in the page keeps it from asking the network for anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from minidisagg.measure import figures
from minidisagg.measure.comparison import Comparison, Side, Usage, number
from minidisagg.measure.goodput import SLO, GoodputResult, parse_slo
from minidisagg.measure.intervals import STATISTICS, Ratio, center
from minidisagg.measure.page import Content, html_table, page, paragraphs
from minidisagg.measure.records import LinkRecord, RequestRecord, RunRecord, WorkerRecord
from minidisagg.measure.report import goodput_table, head_text, link_table, main_table, stage_table, worker_table
from minidisagg.measure.stats import RATES

LIMIT = 6_000_000  # bytes of a report; where plotly does not fit the figures are SVG


class Line(RequestRecord, kw_only=True):
    """A line of requests.jsonl."""

    side: str
    repetition: int


def write_html(run_dir: Path) -> Path:
    """Write report.html from options.json, result.json, requests.jsonl and trace.json; returns its path.

    The steps of a sweep get theirs too, in their directories. Raises OSError, and ValueError for files of no run.
    """
    try:
        return _write(run_dir, _read(run_dir / "options.json"))
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError(f"{run_dir}: not a run directory of this version: {error!r}") from None


def _write(run_dir: Path, options: dict[str, Any]) -> Path:
    result = _read(run_dir / "result.json")
    if "sides" in result:
        content = _of_comparison(result, _requests(run_dir / "requests.jsonl"), options)
    elif "goodput" in result:
        content = _of_goodput(result)
    else:
        content = _of_sweep(result)
        for users in result:
            _write(run_dir / f"concurrency-{users}", options)
    if (run_dir / "trace.json").exists():
        content.figures += figures.trace_figures(_read(run_dir / "trace.json")["traceEvents"])
    text, left_out = page(content, options, _plotly_js()), 0
    if len(text.encode()) > LIMIT:
        text = page(content, options, "")
    while len(text.encode()) > LIMIT and content.figures:
        content.figures.pop()  # the last ones are those of the trace, which grow with the workers
        left_out += 1
        note = f"{left_out} figures are left out, as the file would be larger than {LIMIT / 1e6:g} MB with them."
        text = page(replace(content, tail=content.tail + paragraphs("note", [note])), options, "")
    path = run_dir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _plotly_js() -> str:
    if find_spec("plotly") is None:
        return ""
    library: Any = import_module("plotly.offline")
    return str(library.get_plotlyjs())


# ---------------------------------------------------------------- reading


def _read(path: Path) -> dict[str, Any]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])


def _requests(path: Path) -> list[Line]:
    decoder = msgspec.json.Decoder(Line)
    with path.open("rb") as file:
        return [decoder.decode(line) for line in file if line.strip()]


def read_comparison(result: Mapping[str, Any], lines: Sequence[Line], num_warmups: int) -> Comparison:
    """The `Comparison` that `to_dict` and the lines of requests.jsonl came from, as far as reports show it."""
    sides = []
    for letter, (label, side) in zip("AB", result["sides"].items(), strict=False):
        own = [line for line in lines if line.side == letter]
        usages = msgspec.convert([_known(usage) for usage in side["workers"]], list[Usage])
        links = msgspec.convert(side["links"], list[list[LinkRecord]])
        runs = []
        for one, carried in zip(side["repetitions"], links, strict=True):
            runs.append(
                RunRecord(
                    label=label,
                    mode=one["mode"],
                    policy=one["policy"],
                    model=one["model_id"],
                    workload=one["workload"],
                    request_rate=one["request_rate"],
                    burstiness=one["burstiness"],
                    max_concurrency=one["max_concurrency"],
                    seed=one["seed"],
                    repetition=one["repetition"],
                    num_warmups=num_warmups,
                    requests=[line for line in own if line.repetition == one["repetition"]],
                    workers=[_worker(usage, one["wall"]) for usage in usages],
                    links=carried,
                    frontend_cpu_share=one["frontend_cpu_share"],
                    wall_s=one["wall"],
                )
            )
        sides.append(Side(label, _values(side["repetitions"]), runs, side["repetitions"]))
    ratios = {name: msgspec.convert(_known(ratio), Ratio) for name, ratio in result["ratios"].items()}
    b = sides[1] if len(sides) > 1 else None
    return Comparison(sides[0], b, ratios, result["marks"], result["void"], result["verdict"])


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in values.items()}  # JSON has no nan


def _worker(usage: Usage, wall: float) -> WorkerRecord:
    """A worker whose shares are `usage`: its own counters are not in result.json."""
    busy = usage.busy * wall
    peaks = [0.0 if math.isnan(value) else 1.0 for value in (usage.compute, usage.bandwidth)]
    return WorkerRecord(
        name=usage.name,
        role=usage.role,
        busy_s=busy,
        cpu_s=usage.cpu * wall,
        flops=usage.compute * busy,
        bytes_read=usage.bandwidth * busy,
        peak_flops=peaks[0],
        peak_bytes=peaks[1],
    )


def _values(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`Side.values` from the results of its repetitions."""
    names = {name: (name, 1.0) for name in RATES} | {"attainment": ("slo_attainment", 1.0)}
    for key in (key for one in repetitions for key in one):
        kind, _, metric = key.removesuffix("_ms").partition("_")
        if key.endswith("_ms") and kind in STATISTICS:
            names[f"{kind}_{metric}"] = (key, 1e-3)
    seen = {
        name: [one[key] * scale for one in repetitions if one.get(key) is not None]
        for name, (key, scale) in names.items()
    }
    return {name: center(values) for name, values in seen.items() if values}


# ---------------------------------------------------------------- what a report says


def _of_comparison(result: Mapping[str, Any], lines: Sequence[Line], options: Mapping[str, Any]) -> Content:
    comparison = read_comparison(result, lines, options["arrivals"]["num_warmups"])
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
    head = paragraphs("what", [head_text(comparison).plain])
    head += paragraphs("verdict void" if comparison.void else "verdict", [comparison.verdict])
    head += _notes(comparison.void, comparison.marks) + html_table(main_table(comparison))
    tables = [draw(comparison) for draw in (stage_table, worker_table, link_table)]
    title = f"{b.label} against {a.label}" if b else a.label
    tail = "".join(html_table(table) for table in tables if table is not None)
    return Content(title, head, [figure for figure in drawn if figure and figure.drawn], tail)


def _of_goodput(result: Mapping[str, Any]) -> Content:
    found = {}
    for key, one in result["goodput"].items():
        upper = math.inf if one["upper"] is None else one["upper"]  # JSON has no infinity
        found[key.partition(": ")[2]] = msgspec.convert({**one, "upper": upper}, GoodputResult)
    name, first = next(iter(found.items()))
    alone = f"{name} holds {number(first.rate)} requests/s with {first.target:.0%} of them within the SLO."
    head = paragraphs("what", [f"SLO (ms): {result['slo']}"])
    head += paragraphs("verdict void" if result["void"] else "verdict", [result.get("verdict", alone)])
    head += _notes(result["void"], result["marks"]) + html_table(goodput_table(found))
    return Content("Goodput of " + " and ".join(found), head, [figures.goodput_figure(found)])


def _notes(void: Sequence[str], marks: Sequence[str]) -> str:
    return paragraphs("note", [f"Void: {reason}" for reason in void] + [f"Note: {mark}" for mark in marks])


def _of_sweep(result: Mapping[str, Any]) -> Content:
    comparisons = {int(users): read_comparison(one, (), 0) for users, one in result.items()}
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

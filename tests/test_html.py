"""report.html: the numbers of the tables, figures of the records, and no way out of the file."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.table import Table

from minidisagg.formats import VersionError
from minidisagg.measure import html, report, run_directory
from minidisagg.measure.comparison import Comparison, compare_runs
from minidisagg.measure.figures import (
    GAPS,
    SCALES,
    attainment_figure,
    gaps_of,
    goodput_figure,
    interference_figure,
    latency_figure,
    sweep_figure,
    trace_figures,
)
from minidisagg.measure.goodput import SLO, GoodputResult, Trial
from minidisagg.measure.html import write_html
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.plots import Axis, Figure, Panel, Series, svg
from minidisagg.measure.records import LinkRecord, RequestRecord, RunRecord, WorkerRecord
from minidisagg.measure.timeline import trace_document

NASTY = '</script><img src="http://example.com/x"><b>'
PANELS = 1 + 6 + 2 + 2 + 2 + 2  # of the workers no bandwidth, as their ceilings are not known
LIMITS = SLO(ttft=300, tpot=60)


def request(i: int, rep: int, disagg: bool, tokens: int = 6) -> RequestRecord:
    start = 100.0 + 0.3 * i
    wait = 0.01 * ((i * 7 + rep) % 5)
    first = start + wait + 0.2
    gaps = [0.04 + 0.001 * ((i + k + rep) % 9) for k in range(tokens - 1)]
    if disagg:
        gaps[0] += 0.03
    elif i % 3 == 0:
        gaps[-1] += 0.25
    times = [first]
    for gap in gaps:
        times.append(times[-1] + gap)
    stages = {"queue": wait, "prefill": 0.2, "transfer": 0.02 if disagg else 0.0, "decode_wait": 0.0}
    stages["decode"] = times[-1] - start - sum(stages.values())
    return RequestRecord(
        request_id=str(i), index=i, scheduled=start, sent=start + 0.001, prompt_len=32, output_len=tokens,
        token_times=times, finish_reason="length", stages=stages, handoffs=[0] if disagg else [],
        workers=["prefill-0", "decode-0"] if disagg else ["worker-0"],
    )  # fmt: skip


def run(rep: int, disagg: bool, count: int = 40, label: str = "", tokens: int = 6) -> RunRecord:
    requests = [request(i, rep, disagg, tokens) for i in range(count)]
    requests[3] = RequestRecord(
        request_id="3", index=3, scheduled=100.9, sent=100.9, prompt_len=32, output_len=tokens, error="refused"
    )
    names = (("prefill-0", "prefill"), ("decode-0", "decode")) if disagg else (("worker-0", "both"),)
    workers = [
        WorkerRecord(name=name, role=role, busy_s=6.0, flops=3e9, bytes_read=1e9, cpu_s=5.0, peak_flops=1e9)
        for name, role in names
    ]
    link = LinkRecord(source="prefill-0", dest="decode-0", kind="shm", bytes=10**8, seconds=0.5, transfers=count)
    return RunRecord(
        label=label or ("disagg" if disagg else "colocated"), mode="disagg" if disagg else "colocated", policy="fcfs",
        model="tiny", workload="random 32 in", request_rate=3.3, repetition=rep, num_warmups=2, requests=requests,
        workers=workers, links=[link] if disagg else [], frontend_cpu_share=0.02, wall_s=12.5, marks=["a remark"],
    )  # fmt: skip


def comparison(reps: int = 3, count: int = 40, label: str = "", **options: Any) -> Comparison:
    a, b = ([run(rep, side, count, label if side else "") for rep in range(reps)] for side in (False, True))
    return compare_runs(a, b, LIMITS, resamples=100, **options)


def write_options(directory: Path, **more: object) -> None:
    options = {"version": run_directory.VERSION, "trials": {"slo": None}, **more}
    (directory / "options.json").write_bytes(msgspec.json.encode(options))


def write_trace(directory: Path, events: list[dict[str, Any]]) -> None:
    (directory / "trace.json").write_text(json.dumps(trace_document(events)))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_directory.write_run_directory(tmp_path, comparison())
    write_options(tmp_path, command="minidisagg bench --mode both", machine={"cpu": "Abacus 9000"})
    return tmp_path


def write_sweep(directory: Path) -> dict[int, Comparison]:
    steps = {n: comparison(count=20 + n) for n in (1, 4)}
    for n, one in steps.items():
        run_directory.write_run_directory(directory / f"concurrency-{n}", one)
    run_directory.write_json(directory / "result.json", run_directory.sweep_to_dict(steps))
    write_options(directory)
    return steps


def write_search(directory: Path) -> dict[str, GoodputResult]:
    trials = [Trial(1.0, 1.0), Trial(2.0, 0.95), Trial(4.0, 0.2)]
    found = {
        "colocated": GoodputResult(2.0, 4.0, 0.95, 0.9, True, trials),
        "disagg": GoodputResult(4.0, float("inf"), 0.97, 0.9, False, [Trial(3.0, 1.0), Trial(4.0, 0.97)]),
    }
    marks = ["disagg: the search did not converge"]
    result = run_directory.search_to_dict(found, LIMITS, [], marks)
    run_directory.write_json(directory / "result.json", result)
    write_options(directory)
    return found


@pytest.fixture
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)


class Reader(HTMLParser):
    """All that a browser might fetch, and what stands in cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.plain = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.cells[-1] += data
        if not self.tags or self.tags[-1][0] not in ("script", "style"):
            self.plain += data


def assert_closed(text: str) -> None:
    """No tag or style of the page can load anything, and its policy forbids it."""
    reader = Reader(text)
    names = [name for name, _ in reader.tags]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use"} & {*names}
    for name, attributes in reader.tags:
        assert not {"src", "srcset", "data", "poster", "action", "background", "xlink:href"} & attributes.keys(), name
        assert not any(key.startswith("on") for key in attributes), name
        assert re.fullmatch(r"concurrency-\d+/report\.html", attributes.get("href") or "concurrency-1/report.html")
        assert "url(" not in (attributes.get("style") or "")
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]
    policy = next(a["content"] for n, a in reader.tags if n == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none';") and "http" not in policy and "*" not in policy
    assert names.index("meta") < names.index("style")


def cells_of(table: Table | None) -> list[str]:
    assert table is not None
    return [getattr(cell, "plain", cell) for column in table.columns for cell in column.cells]


@pytest.mark.parametrize(
    "draw", [report.main_table, report.stage_table, report.worker_table, report.link_table], ids=lambda f: f.__name__
)
def test_the_files_alone_give_the_tables_of_the_run(run_dir: Path, draw: Callable[[Comparison], Table | None]) -> None:
    again = run_directory.read_result(run_dir)
    assert isinstance(again, Comparison)
    expected = cells_of(draw(comparison()))
    assert cells_of(draw(again)) == expected
    assert len([cell for cell in expected if cell]) > 8


def test_the_page_shows_the_tables_verdict_and_marks(run_dir: Path, no_plotly: None) -> None:
    path = write_html(run_dir)
    assert path == run_dir / "report.html" and path.stat().st_size < 400_000
    text = path.read_text()
    assert_closed(text)
    reader, original = Reader(text), comparison()
    for table in (report.main_table(original), report.link_table(original)):
        assert {*cells_of(table)} <= {*reader.cells}
    for expected in (original.verdict, "a remark", "requests failed, the first of them", "minidisagg bench --mode both",
                     "Abacus 9000", "40 requests \u00d7 3 repetitions", "Figure 6."):  # fmt: skip
        assert expected in reader.plain
    assert text.count("<svg viewBox") == PANELS
    assert write_html(run_dir).read_text() == text


def test_a_void_run_says_so_first(tmp_path: Path, no_plotly: None) -> None:
    runs = [run(rep, True) for rep in range(3)]
    for one in runs:
        one.frontend_cpu_share = 0.5
    run_directory.write_run_directory(tmp_path, compare_runs(runs, (), LIMITS))
    write_options(tmp_path)
    text = write_html(tmp_path).read_text()
    assert 'class="verdict void">Void, no verdict.<' in text
    assert text.count("Void: disagg: the front end took 50% of a core") == 1
    assert "<h1>disagg</h1>" in text and "not recorded" in text


@pytest.mark.parametrize("library", ["<script-free/>", ""])
def test_texts_cannot_become_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr(html, "_plotly_js", lambda: library)
    nasty = comparison(label=NASTY)
    nasty.marks.append(NASTY)
    nasty.b.runs[0].workers[0].name = NASTY  # type: ignore[union-attr]
    run_directory.write_run_directory(tmp_path, nasty)
    write_options(tmp_path, command=NASTY, machine={NASTY: NASTY})
    text = write_html(tmp_path).read_text()
    assert_closed(text)
    assert "<img" not in text and "<b>" not in text.replace("<b>Figure", "")
    assert text.count("</script>") == (2 + PANELS if library else 0)


def test_with_plotly_it_has_the_same_panels_and_stays_under_the_limit(run_dir: Path) -> None:
    pytest.importorskip("plotly")
    text = write_html(run_dir).read_text()
    assert len(text.encode()) < html.LIMIT
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', text)
    panels = [json.loads(script) for script in scripts]
    assert len(panels) == PANELS and all(
        panel["data"] and panel["layout"]["xaxis"]["title"]["text"] for panel in panels
    )
    colors = {*re.findall(r"var\((--[a-z]+)\)", "".join(scripts))}
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert colors >= {"--a", "--b", "--ink"} and all(f"{color}:" in style for color in colors)
    (packed,) = re.findall(r'<script id="library" type="text/plain">(.*?)</script>', text)
    assert gzip.decompress(b64decode(packed)).decode() == html._plotly_js()
    assert len(text) < 0.45 * len(html._plotly_js())  # many runs have a report each
    assert_closed(text)


def test_where_the_library_is_too_large_the_figures_are_svg(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_plotly_js", lambda: os.urandom(html.LIMIT // 2).hex() * 2)
    path = write_html(run_dir)
    assert path.stat().st_size < 400_000 and "<svg viewBox" in path.read_text()


def test_figures_that_do_not_fit_are_left_out_and_it_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_plotly_js", lambda: "")
    write_trace(run_dir, trace(2, "colocated worker-0"))
    whole = write_html(run_dir).read_text()
    monkeypatch.setattr(html, "LIMIT", len(whole.encode()) - 1)
    text = write_html(run_dir).read_text()
    assert len(text.encode()) <= html.LIMIT
    assert (
        "Figures left out, as the file would be larger than" in text
        and " MB with them: 1." in text
        and whole.count("<svg viewBox") - text.count("<svg viewBox") == 1
    )
    monkeypatch.setattr(html, "LIMIT", 1)
    text = write_html(run_dir).read_text()
    assert "<svg" not in text and {*cells_of(report.main_table(comparison()))} <= {*Reader(text).cells}


def test_a_sweep_has_a_report_and_one_per_step(tmp_path: Path, no_plotly: None) -> None:
    steps = write_sweep(tmp_path)
    text = write_html(tmp_path).read_text()
    assert_closed(text)
    assert 'href="concurrency-4/report.html"' in text and text.count("<svg viewBox") == 4
    for panel in ("SLO attainment", "p90 TTFT", "Mean TPOT", "Throughput"):
        assert f"<h3>{panel}</h3>" in text
    assert text.count("Note: a remark") == 1
    assert steps[4].verdict in Reader((tmp_path / "concurrency-4" / "report.html").read_text()).plain


def test_a_search_shows_attainment_over_rate(tmp_path: Path, no_plotly: None) -> None:
    found = write_search(tmp_path)
    reader = Reader(write_html(tmp_path).read_text())
    assert "No winner: no clear difference in goodput between colocated and disagg." in reader.plain
    assert "disagg: the search did not converge" in reader.plain and "95.0%" in reader.cells
    points = [s for s in goodput_figure(found).panels[0].series if s.kind == "points"]
    assert points[0].x == [1.0, 2.0, 4.0] and points[0].y == [100.0, 95.0, 20.0]


def test_a_directory_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"options\.json"):
        write_html(tmp_path)
    write_options(tmp_path)
    for content in (
        "[",
        '{"version": 2}',
        '{"version": 2, "sides": {"a": {}}}',
        '{"version": 2, "goodput": {"a": {}}}',
    ):
        (tmp_path / "result.json").write_text(content)
        (tmp_path / "requests.jsonl").write_text("")
        with pytest.raises(ValueError, match="not a run directory"):
            write_html(tmp_path)


@pytest.mark.parametrize("name", ["options.json", "result.json", "requests.jsonl", "trace.json"])
def test_files_of_another_version_are_refused_in_one_line(run_dir: Path, name: str) -> None:
    write_trace(run_dir, [])
    path, known = run_dir / name, 1 if name == "trace.json" else run_directory.VERSION
    version = re.compile(rf'"version": ?{known}')
    written = path.read_text()
    others = {"version 99": version.sub('"version":99', written), "no version": version.sub('"since":1', written)}
    for said, text in others.items():
        path.write_text(text)
        expected = rf"^{path} has {said}, and this minidisagg reads version {known} \(docs/formats.md\)$"
        with pytest.raises(VersionError, match=expected):
            write_html(run_dir)


def test_what_is_written_begins_with_its_version(run_dir: Path) -> None:
    for name in ("options.json", "result.json", "requests.jsonl"):
        assert re.match(rf'\{{\s*"version": ?{run_directory.VERSION},', (run_dir / name).read_text()), name


def test_the_records_of_a_run_are_read_as_they_were(run_dir: Path) -> None:
    again, original = run_directory.read_result(run_dir), comparison()
    assert isinstance(again, Comparison)
    for side, before in zip(again.sides, original.sides, strict=True):
        assert (side.label, side.values) == (before.label, before.values)
        for one, other in zip(side.runs, before.runs, strict=True):
            assert [msgspec.convert(msgspec.to_builtins(r), RequestRecord) for r in one.requests] == other.requests
            assert msgspec.structs.replace(one, requests=[]) == msgspec.structs.replace(other, requests=[])


# ---------------------------------------------------------------- figures


def test_a_gap_is_stalled_by_half_a_prefill_on_its_own_worker() -> None:
    def one(worker: str, scheduled: float, queue: float, prefill: float, gaps: list[float]) -> RequestRecord:
        times = [scheduled + queue + prefill]
        for gap in gaps:
            times.append(times[-1] + gap)
        return RequestRecord(
            request_id="", scheduled=scheduled, sent=scheduled, prompt_len=1, output_len=1, token_times=times,
            stages={"queue": queue, "prefill": prefill}, workers=[worker],
        )  # fmt: skip

    running = one("w0", 0.0, 0.0, 1.0, [0.1, 1.0, 0.1, 0.1])  # tokens at 1.0 1.1 2.1 2.2 2.3
    arriving = one("w0", 1.0, 0.2, 0.8, [])  # prefill 1.2 to 2.0, all in the second gap
    assert gaps_of([running, arriving])[:, 3].tolist() == [0, 1, 0, 0]
    assert gaps_of([running, arriving])[:, 1].tolist() == pytest.approx([100, 1000, 100, 100])
    elsewhere = one("w1", 1.0, 0.2, 0.8, [])
    assert not gaps_of([running, elsewhere])[:, 3].any()
    long = one("w0", 0.0, 0.2, 3.0, [])  # its middle is in the gap, but not half of it
    assert not gaps_of([running, long])[:, 3].any()


def test_disaggregated_gaps_are_handoffs_but_never_stalled() -> None:
    requests = [request(i, 0, disagg=True) for i in range(10)]
    for unnamed in (False, True):
        gaps = gaps_of([msgspec.structs.replace(r, workers=[] if unnamed else r.workers) for r in requests])
        assert gaps[:, 2].sum() == 10 and gaps[:, 3].sum() == 0
    assert gaps_of([request(i, 0, disagg=False) for i in range(10)])[:, 3].sum() > 0


def test_curves_are_distributions_and_points_are_bounded() -> None:
    many = compare_runs([run(0, False, 900, tokens=12)], [run(0, True, 900, tokens=12)], LIMITS, resamples=100)
    for panel in latency_figure(many, LIMITS).panels:
        for s in (s for s in panel.series if s.label != "SLO"):
            falling = "longer" in panel.y.label
            assert all(x <= y for x, y in pairwise(s.x))
            assert all((b <= a) if falling else (b >= a) for a, b in pairwise(s.y))
            assert (s.y[0] if falling else s.y[-1]) == 100 and len(s.x) <= 240
    figure = interference_figure(many)
    assert figure is not None
    plain = figure.panels[0].series[0]
    assert GAPS / 2 < len(plain.x) <= GAPS


def test_attainment_over_scale_is_the_table_s_at_one() -> None:
    both = comparison(reps=2)
    [panel] = attainment_figure(both, LIMITS).panels
    for side, color in zip(both.sides, "ab", strict=True):
        curves = [s for s in panel.series if s.color == color]
        assert len(curves) == 3 and all(x <= y for s in curves for x, y in pairwise(s.y))
        for curve, result in zip(curves, side.results, strict=False):
            assert curve.y[SCALES.index(1.0)] == pytest.approx(100 * float(str(result["slo_attainment"])), abs=0.01)
        for scale in (SCALES[40], SCALES[60]):
            run = side.runs[0]
            met = [SLO(ttft=300 * scale, tpot=60 * scale).met_by(r) for r in run.requests[2:38]]
            assert curves[0].y[SCALES.index(scale)] == pytest.approx(100 * sum(met) / 36, abs=0.01)


def test_a_sweep_stands_at_its_numbers_of_users() -> None:
    figure = sweep_figure({16: comparison(count=20), 2: comparison(count=30)})
    throughput = figure.panels[-1]
    assert throughput.x.names == ["2", "16"] and throughput.series[0].x == [0.0, 1.0]
    expected = [comparison(count=n).a.values["output_throughput"] for n in (30, 20)]
    assert throughput.series[0].y == pytest.approx(expected, rel=1e-3)


def trace(pid: int, worker: str) -> list[dict[str, Any]]:
    def step(at: float, ms: float, prefill: int) -> dict[str, Any]:
        return {"name": "x", "cat": "step", "ph": "X", "pid": pid, "tid": 1, "ts": at * 1e6, "dur": ms * 1e3,
                "args": {"prefill_tokens": prefill}}  # fmt: skip

    name = {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": worker}}
    pages = [
        {"name": "pages", "ph": "C", "pid": pid, "tid": 0, "ts": at * 1e6, "args": {"live": 7, "cached": 2}}
        for at in (51.0, 51.5)
    ]
    return [name, step(52.0, 300, 64), step(50.0, 40, 0), step(51.0, 45, 0), *pages]


def test_steps_of_a_trace_are_drawn_per_worker(run_dir: Path, no_plotly: None) -> None:
    events = [*trace(2, "colocated worker-0"), *trace(102, "disagg <decode-0>")]
    events.append({"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "colocated requests"}})
    steps, pages = trace_figures(events)
    assert [panel.title for panel in steps.panels] == [
        "colocated worker-0: time of a step",
        "disagg <decode-0>: time of a step",
    ]
    for panel, color in zip(steps.panels, "ab", strict=True):
        decode, prefill = panel.series
        assert (decode.x, decode.y, decode.color) == ([0.0, 1.0], [40.0, 45.0], color)
        assert (prefill.x, prefill.y) == ([2.0], [300.0])
    assert [(s.x, s.y) for s in pages.panels[1].series] == [([1.0, 1.5], [2.0] * 2), ([1.0, 1.5], [7.0] * 2)]
    assert trace_figures([]) == []
    write_trace(run_dir, events)
    text = write_html(run_dir).read_text()
    assert "Figure 8." in text and "disagg &lt;decode-0&gt;: time of a step" in text
    assert_closed(text)


def test_svg_puts_data_where_the_axes_say() -> None:
    series = [Series("line", "a", [0.0, 10.0], [1.0, 100.0]), Series("spans", "b", [5.0], [10.0], "", [10.0])]
    panel = Panel("", Axis("t", 0, 10), Axis("y", 1, 100, True), series, height=146)
    text = svg(panel, 2)
    line, bar = (next(re.finditer(rf'class="{kind}[^>]*d="([^"]+)"', text))[1] for kind in ("line", "spans"))
    (x0, y0), (x1, y1) = ([float(v) for v in point.split()] for point in line[1:].split("L"))
    assert (y0, y1) == (106, 6) and x1 == 378  # the lower left and upper right corners
    found = re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)v[\d.]+H([\d.]+)z", bar)
    assert found and float(found[1]) == pytest.approx((x0 + x1) / 2, abs=0.1) and float(found[2]) == x1
    assert ">0</text>" in text and ">100</text>" in text and ">t</text>" in text


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis("", 0, 100), ["0", "20", "40", "60", "80", "100"]),
        (Axis("", 30, 1200, True), ["50", "100", "200", "500", "1,000"]),
        (Axis("", 60, -1), ["0", "20", "40", "60"]),
        (Axis("", 41, 47, True), ["41", "42", "43", "44", "45", "46", "47"]),
        (Axis("", 1.4, -0.6, names=["x", "y"]), ["x", "y"]),
    ],
)
def test_ticks_are_round(axis: Axis, expected: list[str]) -> None:
    assert [text for _, text in axis.ticks()] == expected


def test_numbers_of_an_axis_have_room() -> None:
    axis = Axis("ms", 1900, 4000, True)
    assert [text for _, text in axis.ticks()] == ["2,000", "2,500", "3,000", "3,500", "4,000"]
    for length in range(60, 400):
        ends = [
            (length * axis.place(v) - 3.3 * len(t), length * axis.place(v) + 3.3 * len(t))
            for v, t in axis.ticks(length)
        ]
        assert ends and ends[-1][1] <= length + 12 and all(one[1] < two[0] for one, two in pairwise(ends))


def test_a_legend_names_what_is_drawn_in_order() -> None:
    def panel(*lengths: int) -> Panel:
        series = [Series("line", "a", [1.0] * n, [1.0] * n, name) for name, n in zip("xyz", lengths, strict=True)]
        return Panel("", Axis("", 0, 1), Axis("", 0, 1), series)

    text = Figure("", "", [panel(1, 0, 1), panel(1, 1, 0)]).legend()
    assert re.findall(r"</i>(.)</span>", text) == ["x", "y", "z"]
    assert "</i>y" not in Figure("", "", [panel(1, 0, 1)]).legend()


# ---------------------------------------------------------------- provenance


def test_the_command_keeps_no_key() -> None:
    line = command_line(["/usr/bin/minidisagg", "bench", "--api-key", "s3cret", "--api-key=s3cret", "--seed", "1"])
    assert line == "minidisagg bench --api-key ... --api-key=... --seed 1"
    assert command_line(["/x/minidisagg/__main__.py", "bench"]) == "python -m minidisagg bench"


def test_the_machine_is_described_in_plain_values() -> None:
    found = machine()
    assert {"time", "cpu", "cores", "system", "python"} <= found.keys()
    assert json.loads(msgspec.json.encode(found)) == found


# ---------------------------------------------------------------- in a browser

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
WATCH = """<script>
const told = {seen: [], errors: [], drawn: []};
addEventListener('securitypolicyviolation', event => told.seen.push(event.blockedURI));
addEventListener('error', event => told.errors.push(event.message || event.target.outerHTML), true);
addEventListener('unhandledrejection', event => told.errors.push(String(event.reason)));
for (const level of ['error', 'warn']) console[level] = (...what) => told.errors.push(what.join(' '));
</script>"""
TELL = """<script>addEventListener('load', () => setTimeout(() => {
  for (const plot of document.querySelectorAll('.plot, main svg[role=img]')) {
    const frame = plot.getBoundingClientRect();
    const inside = box => box.right > frame.left && box.left < frame.right && box.bottom > frame.top
      && box.top < frame.bottom;  // what is not drawn is at 0, 0
    const shown = trace => [trace, ...trace.querySelectorAll('path')].some(
      element => element.matches('path') && inside(element.getBoundingClientRect()));
    told.drawn.push([...plot.querySelectorAll('.trace, .line, .points[style], .spans')].filter(shown).length);
  }
  told.seen.push(...performance.getEntriesByType('resource').map(entry => entry.name));
  document.body.dataset.told = JSON.stringify(told);
}, 1500))</script>"""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=5000", "--dump-dom",
)  # fmt: skip


def browse(text: str, tmp_path: Path) -> dict[str, Any]:
    """What the page did in a headless browser: loads it tried, errors, and how much of each plot is to be seen."""
    asked = [os.environ.get(name, "") for name in ("BROWSER", "CHROME")]
    names = [name for name in asked if "chrom" in Path(name).name] + [*BROWSERS]  # others take other flags
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no headless browser: neither $BROWSER, $CHROME, nor one of {', '.join(BROWSERS)} is a Chrome")
    path = tmp_path / "watched.html"
    path.write_text(text.replace("<style>", WATCH + "<style>", 1).replace("</body>", TELL + "</body>"))
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    body = next(attributes for name, attributes in Reader(dom).tags if name == "body")
    told: dict[str, Any] = json.loads(body["data-told"] or "{}")
    return told


@pytest.mark.parametrize(("kind", "panels"), [("run", PANELS + 4), ("search", 1), ("sweep", 4)])
def test_a_browser_draws_it_and_loads_nothing(
    kind: str, panels: int, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    if kind == "run":
        events = [*trace(2, "colocated worker-0"), *trace(102, "disagg decode-0")]
        write_trace(run_dir, events)
    else:
        (write_search if kind == "search" else write_sweep)(run_dir)
    interactive = write_html(run_dir).read_text()
    monkeypatch.setattr(html, "_plotly_js", lambda: "")
    plain = write_html(run_dir).read_text()
    series = [len(re.findall(r'<path class="(?:line|points|spans)', one)) for one in plain.split('role="img"')[1:]]
    for text in (interactive, plain):
        told = browse(text, tmp_path)
        assert told["seen"] == [] and told["errors"] == []
        assert told["drawn"] == series and len(series) == panels and all(series)


def test_a_browser_would_tell_of_loads_and_errors(run_dir: Path, tmp_path: Path, no_plotly: None) -> None:
    text = write_html(run_dir).read_text()
    wrong = '<img src="http://127.0.0.1:9/leak.png"><script>console.error("one"); throw Error("two")</script>'
    told = browse(
        text.replace("</h1>", f"</h1>{wrong}", 1).replace('class="line', 'display="none" class="line'), tmp_path
    )
    assert {*told["seen"]} == {"http://127.0.0.1:9/leak.png"}
    assert "one" in told["errors"] and "Uncaught Error: two" in told["errors"]
    assert told["drawn"][0] == 0 < told["drawn"][-1], "lines are hidden, bars are not"

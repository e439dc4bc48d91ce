"""A `Comparison` as tables for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minidisagg.measure.comparison import (
    DASH,
    TIMES,
    Comparison,
    Side,
    Usage,
    better,
    milliseconds,
    number,
    ratio_text,
    share,
    worker_usage,
)
from minidisagg.measure.goodput import GoodputResult
from minidisagg.measure.intervals import STATISTICS, Ratio
from minidisagg.measure.records import STAGES, LinkRecord
from minidisagg.measure.stats import LATENCIES, MAX_FRONTEND_SHARE, MAX_SEND_LAG, RATES, send_lag, ttft_of_turn

LATENCY_TITLES = ("TTFT", "2nd token", "TPOT", "ITL, no handoffs", "handoff gap", "max ITL", "E2E")
RATE_TITLES = ("requests/s", "output tok/s", "total tok/s", "goodput req/s")
SIGNS = "=: no difference at 95 %; ?: one at 95 % but not at 98 %, no winner\n"
TERMS = (
    "2nd token: since the request was due; handoff gap: in which it changes workers; max ITL: its longest gap\n"
    "requests/s: that ended while it was measured; goodput: that came then, so that it can be the higher one"
)
UNKNOWN = Ratio(math.nan, math.nan, math.nan, math.nan, math.nan)
NAME = len("colocated")  # a longer name of a side has lines of its own, and its letter for what is better
MOST_WORKERS, MOST_LINKS = 12, 6  # of a side, that a terminal shows one by one
REST = "; report.html has all"


# ---------------------------------------------------------------- tables


def plain_table(title: str, caption: str = "") -> Table:
    return Table(
        title=title,
        caption=caption or None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )


def broken(label: str) -> str:
    """A side's name over several lines: a word, a policy or a setting each."""
    return re.sub(r" |(?<=[:,])(?=[^ ])", "\n", label)


def main_table(comparison: Comparison) -> Table:
    """Latencies, throughput and goodput, with B / A and which of them is better; one side alone is drawn compactly."""
    a, b = comparison.a, comparison.b
    if b is None:
        return _single_table(a)
    table = plain_table("Latency (ms) and throughput", SIGNS + TERMS)
    short = max(len(a.label), len(b.label)) <= NAME
    names = (a.label, b.label) if short else ("A", "B")
    # At 80 columns a long name is what gives way, not a number.
    table.add_column("", no_wrap=True, min_width=max(map(len, LATENCY_TITLES)))
    table.add_column("", style="dim", no_wrap=True, min_width=max(map(len, STATISTICS)))
    for side, name in zip((a, b), names, strict=True):
        head = name if short else broken(f"{name}: {side.label}")
        table.add_column(head, justify="right", overflow="fold", min_width=9)
    table.add_column("B / A  [95 %]", justify="right", no_wrap=True, min_width=18)
    table.add_column("better", no_wrap=True, min_width=6)

    def add(title: str, kind: str, statistic: str, write: Callable[[float | None], str], last: bool = False) -> None:
        ratio = comparison.ratios.get(statistic, UNKNOWN)
        known = not math.isnan(ratio.ratio)
        name, style = ("=", "dim") if known else ("", "")
        if ratio.differs:
            name, style = (names[0], "cyan") if better(statistic, ratio) == "a" else (names[1], "green")
            name, style = (name, style) if ratio.clear else (f"? {name}", "dim")
        values = [write(side.values.get(statistic)) for side in (a, b)]
        cells = [kind, *values, ratio_text(ratio) if known else ""]
        table.add_row(Text(title, style="bold"), *cells, Text(name, style=style), end_section=last)

    for title, metric in zip(LATENCY_TITLES, LATENCIES, strict=True):
        if f"mean_{metric}" in a.values or f"mean_{metric}" in b.values:
            for kind in STATISTICS:
                add(title if kind == "mean" else "", kind, f"{kind}_{metric}", milliseconds, kind == STATISTICS[-1])
    for title, rate in zip(RATE_TITLES, RATES, strict=True):
        if rate in a.values:
            add(title, "", rate, number)
    if "attainment" in a.values:
        add("SLO attainment", "", "attainment", share)
    return table


def _single_table(side: Side) -> Table:
    table = plain_table(f"{side.label}: latency (ms) and throughput", TERMS)
    for head in ("", *STATISTICS):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for title, metric in zip(LATENCY_TITLES, LATENCIES, strict=True):
        if f"mean_{metric}" in side.values:
            cells = [milliseconds(side.values.get(f"{kind}_{metric}")) for kind in STATISTICS]
            table.add_row(Text(title, style="bold"), *cells, end_section=metric == LATENCIES[-1])
    for title, rate in zip(RATE_TITLES, RATES, strict=True):
        if rate in side.values:
            table.add_row(Text(title, style="bold"), number(side.values[rate]))
    if "attainment" in side.values:
        table.add_row(Text("SLO attainment", style="bold"), share(side.values["attainment"]))
    return table


def turn_table(comparison: Comparison) -> Table | None:
    """TTFT by the turn of a session, and how much of its prompt was in a prefix cache; None without sessions."""
    table = plain_table("TTFT by turn (ms)", "cached: share of the prompts' tokens that were prefix hits")
    table.add_column("turn", justify="right")
    for side in comparison.sides:
        for head in (f"{side.label}\np50", "\np90", "\ncached"):
            table.add_column(head, justify="right", no_wrap=True, overflow="ellipsis")
    if comparison.b is not None:
        table.add_column("B / A of p50", justify="right", no_wrap=True)
    for turn in range(1 + max(request.turn for side in comparison.sides for request in side.runs[0].requests)):
        name, cells = ttft_of_turn(turn), list[str]()
        if not any(f"p50_{name}" in side.values for side in comparison.sides):
            continue
        for side in comparison.sides:
            done = [request for run in side.runs for request in run.requests if request.turn == turn and request.ok]
            cached, prompts = sum(r.cached_tokens for r in done), sum(r.prompt_len for r in done)
            cells += [milliseconds(side.values.get(f"{kind}_{name}")) for kind in ("p50", "p90")]
            cells.append(share(cached / prompts if prompts else None))
        ratio = comparison.ratios.get(f"p50_{name}", UNKNOWN)
        table.add_row(str(turn + 1), *cells, *([ratio_text(ratio)] if comparison.b is not None else []))
    return table if table.row_count else None


def stage_table(comparison: Comparison) -> Table | None:
    """Where the time of a request went; None if no run has stage times."""
    table = plain_table("Stages of a request (ms)", "%: share of the mean end-to-end time")
    table.add_column("", no_wrap=True)
    for side in comparison.sides:
        name = side.label
        if len({other.runs[0].mode for other in comparison.sides if other.runs}) > 1:
            name = name.partition(" ")[0]  # the mode says which it is
        for head in (f"{name}\nmean", "\np50", "\np99", "\n%"):
            table.add_column(head, justify="right", no_wrap=True, overflow="ellipsis")
    rows = 0
    for stage in STAGES:
        if not any(f"mean_stage_{stage}" in side.values for side in comparison.sides):
            continue
        cells: list[str] = []
        for side in comparison.sides:
            mean, whole = (side.values.get(f"mean_{name}", math.nan) for name in (f"stage_{stage}", "e2el"))
            cells += map(milliseconds, (mean, *(side.values.get(f"{q}_stage_{stage}") for q in ("p50", "p99"))))
            cells.append(f"{100 * mean / whole:.0f}" if whole and not math.isnan(mean) else "")
        table.add_row(Text(stage.replace("_", " "), style="bold"), *cells)
        rows += 1
    return table if rows else None


def worker_table(comparison: Comparison, most: float = math.inf) -> Table | None:
    """What each worker made of its device: a phase wastes whichever resource it is not using, in numbers.

    Of a side of more than `most`, the least busy of each role, their mean and the busiest.
    """
    usages = [worker_usage(side.runs) for side in comparison.sides]
    measured = any(not math.isnan(row.compute) for rows in usages for row in rows)  # else it was a simulation
    caption = "busy: share of the time in steps"
    if max(map(len, usages)) > most:
        usages = [rows if len(rows) <= most else _of_roles(rows) for rows in usages]
        caption += REST
    if measured:
        caption += "; compute, bandwidth: of the measured ceilings, while busy; wastes: the less used of the two"
    table = plain_table("Workers", caption)
    for head in ("", "role"):
        table.add_column(head, no_wrap=True, overflow="ellipsis")
    for head in ("busy", "CPU", "compute", "bandwidth") if measured else ("busy",):
        table.add_column(head, justify="right", no_wrap=True, min_width=len(head))
    if measured:
        table.add_column("wastes", no_wrap=True, min_width=len("100% bandwidth"))
    for side, rows in zip(comparison.sides, usages, strict=True):
        if rows:
            table.add_row(Text(side.label, style="bold"))
        for row in rows:
            used = {"compute": row.compute, "bandwidth": row.bandwidth}
            known = not any(math.isnan(value) for value in used.values())
            least = min(used, key=lambda name: used[name])
            waste = f"{1 - used[least]:.0%} {least}" if known else ""
            cells = [f"{value:.0%}" if not math.isnan(value) else "" for value in (row.busy, row.cpu, *used.values())]
            shown = [*cells, waste] if measured else cells[:1]
            table.add_row(f"  {row.name}", row.role, *shown, end_section=row is rows[-1])
    return table if table.row_count else None


def _of_roles(rows: Sequence[Usage]) -> list[Usage]:
    shown: list[Usage] = []
    for role in dict.fromkeys(row.role for row in rows):
        own = sorted((row for row in rows if row.role == role), key=lambda row: row.busy)
        means = (fmean(getattr(row, name) for row in own) for name in Usage.__struct_fields__[2:])
        shown += [own[0], Usage(f"mean of {len(own)}", role, *means), own[-1]]
    return shown


def link_table(comparison: Comparison, most: float = math.inf) -> Table | None:
    """KV bytes and time on the wire per link, over all repetitions; None if nothing was transferred.

    Of a side with more than `most` links, their sum and the busiest.
    """
    caption = "count: pieces that were sent; of wall: share of the time that a link was sending"
    table = plain_table("KV on the wire", caption)
    table.add_column("", overflow="fold")  # a long name takes two lines where there is no room, and no number is cut
    table.add_column("kind", no_wrap=True)
    for head in ("count", "MB", "seconds", "GB/s", "of wall", "fails"):
        table.add_column(head, justify="right", no_wrap=True)
    for side in comparison.sides:
        every, rows = [link for run in side.runs for link in run.links], dict[str, list[LinkRecord]]()
        for link in every:
            rows.setdefault(f"{link.source} → {link.dest}", []).append(link)
        wall, count = sum(run.wall_s for run in side.runs), len(rows)
        if rows:
            table.add_row(Text(side.label, style="bold"))
        if count > most:
            busiest = max(rows, key=lambda name: sum(link.seconds for link in rows[name]))
            rows = {f"{count} links; busiest:": every, busiest: rows[busiest]}
            table.caption = caption + REST
        for name, links in rows.items():
            moved, seconds = sum(link.bytes for link in links), sum(link.seconds for link in links)
            time = wall * (count if links is every else 1)
            table.add_row(
                f"  {name}",
                "/".join(dict.fromkeys(link.kind for link in links)),
                f"{sum(link.transfers for link in links):,}",
                number(moved / 1e6),
                number(seconds),
                number(moved / seconds / 1e9 if seconds else None),
                share(seconds / time if time else None),
                str(sum(link.failures for link in links)),
            )
    return table if table.row_count else None


def goodput_table(found: Mapping[str, GoodputResult]) -> Table:
    """What the searches found, by side."""
    table = plain_table("Goodput: the highest rate at which enough requests are within the SLO")
    for head in ("", "requests/s", "fails from", "surely within", "attainment", "runs"):
        table.add_column(head, justify="right" if head else "left")
    for label, one in found.items():
        low, high = map(number, one.sure)
        cells = number(one.rate), number(one.upper), f"[{low}, {high}]", share(one.attainment), str(len(one.trials))
        table.add_row(label, *cells)
    return table


def sweep_table(comparisons: Sequence[tuple[int, Comparison]]) -> Table:
    """Three lines per concurrency."""
    table = plain_table("A handful of users (closed loop)")
    first = comparisons[0][1]
    table.add_column("at a time", justify="right")
    table.add_column("")
    for side in first.sides:
        table.add_column(side.label, justify="right")
    if first.b is not None:
        table.add_column("B / A [95 %]", justify="right")
    metrics = ("TTFT p50, ms", "p50_ttft", 1e3), ("TPOT, ms", "mean_tpot", 1e3), ("tok/s", "output_throughput", 1.0)
    for concurrency, comparison in comparisons:
        for row, (title, name, scale) in enumerate(metrics):
            cells = [str(concurrency) if row == 0 else "", title]
            cells += [number(side.values.get(name, math.nan) * scale) for side in comparison.sides]
            if comparison.b is not None:
                ratio = comparison.ratios.get(name, UNKNOWN)
                cells.append(DASH if math.isnan(ratio.ratio) else ratio_text(ratio))
            table.add_row(*cells, end_section=row == len(metrics) - 1)
    return table


def render_sweep(steps: Sequence[tuple[int, Comparison]]) -> Group:
    """A whole sweep, for a rich console."""
    marks = marks_text([mark for _, one in steps for mark in one.marks], [why for _, one in steps for why in one.void])
    verdicts = [Text(f"{users} at a time: {one.verdict}", style="bold") for users, one in steps]
    return Group(sweep_table(steps), marks, *verdicts)


def overhead_text(comparison: Comparison) -> Text | None:
    """What measuring took from the machine at worst, beside what makes a run void; a line per side. A simulation took
    nothing."""
    if not any(run.frontend_cpu_share for side in comparison.sides for run in side.runs):
        return None
    lines = [f"The front end, void above {MAX_FRONTEND_SHARE:.0%} of a core, or {MAX_SEND_LAG:.0%} of the TTFT SLO:"]
    for side in comparison.sides:
        cpu, lag = max(run.frontend_cpu_share for run in side.runs), max(send_lag(run.requests) for run in side.runs)
        lines.append(f"  {side.label}: {share(cpu)} of a core, p99 send lag {milliseconds(lag)} ms")
    return Text("\n".join(lines), style="dim")


def marks_text(marks: Iterable[str], void: Iterable[str]) -> Text:
    """Remarks that limit what the numbers may be used for, each once."""
    lines = [Text(f"void: {reason}", style="bold red") for reason in dict.fromkeys(void)]
    lines += [Text(f"note: {mark}", style="yellow") for mark in dict.fromkeys(marks)]
    return Text("\n").join(lines)


def head_text(sides: Sequence[Side]) -> Text:
    """What was compared, in a few lines; of more than two sides a table has the names."""
    run, n = sides[0].runs[0], len(sides[0].runs)
    rate = "at the trace's own times" if run.request_rate == "trace" else f"rate {run.request_rate}/s"
    what = ", ".join(part for part in (run.model, run.workload, rate, f"seed {run.seed}") if part)
    lines = [f"{len(run.requests)} requests {TIMES} {n} repetition{'s' * (n > 1)}: {what}"]
    lines += [
        f"{letter}: {side.label}{f' ({side.runs[0].policy})' if side.runs[0].policy else ''}"
        for letter, side in zip("AB", sides if len(sides) < 3 else (), strict=False)
    ]
    if "slo" in sides[0].results[0]:
        lines.append(f"SLO (ms): {sides[0].results[0]['slo']}")
    return Text("\n".join(lines))


def render(comparison: Comparison) -> Group:
    """The whole report, for a rich console."""
    parts: list[RenderableType] = [head_text(comparison.sides)]
    workers, links = partial(worker_table, most=MOST_WORKERS), partial(link_table, most=MOST_LINKS)
    for draw in (main_table, turn_table, stage_table, workers, links, overhead_text):
        if (drawn := draw(comparison)) is not None:
            parts += [Text(""), drawn]
    if comparison.marks or comparison.void:
        parts.append(marks_text(comparison.marks, comparison.void))
    return Group(*parts, Text(""), Text(comparison.verdict, style="bold"))

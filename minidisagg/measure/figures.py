"""The figures of a report: a `Comparison` in, `Figure`s out.

What shows one repetition shows the first; how many points are drawn of more is said in the caption.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from msgspec.structs import astuple
from numpy.typing import ArrayLike

from minidisagg.measure.comparison import Comparison, worker_usage
from minidisagg.measure.goodput import SLO, GoodputResult, monotone_fit
from minidisagg.measure.plots import Axis, Figure, Panel, Series
from minidisagg.measure.records import STAGES, RequestRecord, RunRecord
from minidisagg.measure.stats import Array, by_schedule, samples_of, window_of

SIDES = ("a", "b")  # their colours
SCALES = [2.0 ** (k / 24) for k in range(-48, 49)]  # of an SLO
CURVE, GAPS, STEPS, BARS = 240, 4000, 600, 60  # points of a CDF, gaps of a side, samples over time, requests
TIME = "seconds after the first arrival"
UNTIL_FIRST = "until first token"  # of a request whose server told no stages
HUES = ("queue", "prefill", "transfer", "wait", "decode", "prefill")
STAGE_COLORS = dict(zip((*STAGES, UNTIL_FIRST), HUES, strict=True))


def rounded(values: ArrayLike, digits: int = 5) -> list[float]:
    """A file needs no more digits than can be seen."""
    return [float(f"{value:.{digits}g}") for value in np.asarray(values, dtype=np.float64)]


# ---------------------------------------------------------------- distributions


def attainment_figure(comparison: Comparison, slo: SLO) -> Figure:
    """The table's attainment, and what it would be under tighter and looser limits."""
    scaled = [SLO(*(limit and limit * scale for limit in astuple(slo))) for scale in SCALES]

    def least(request: RequestRecord) -> int:
        return bisect_left(scaled, True, key=lambda limits: limits.met_by(request))

    def attained(run: RunRecord) -> Array:
        window = window_of(run)
        kept = by_schedule(run)[window.first : window.last]
        return 100 * np.bincount([least(r) for r in kept], minlength=len(scaled) + 1).cumsum()[:-1] / len(kept)

    scale = Axis("the SLO's limits, multiplied by", SCALES[0], SCALES[-1], True)
    series = [Series("line", "dim", [1.0] * 2, [0.0, 103.0], "the SLO", size=1.2, marker="dash")]
    for side, color in zip(comparison.sides, SIDES, strict=False):
        shares = [attained(run) for run in side.runs]
        if len(shares) > 1:
            series += [Series("line", color, rounded(SCALES), rounded(s), size=0.8, opacity=0.4) for s in shares]
        series.append(Series("line", color, rounded(SCALES), rounded(np.mean(shares, axis=0)), side.label))
    return Figure(
        "SLO attainment over its scale",
        f"Share of the measured requests within {slo} (ms), with all limits multiplied by the same number; failed ones "
        "never are. Thick lines are means over the repetitions, thin ones single repetitions.",
        [Panel("", scale, Axis("requests within the SLO, %", 0, 103), series, 250)],
    )


def latency_figure(comparison: Comparison, slo: SLO) -> Figure:
    """CDFs of what the tables summarize."""
    samples = [[samples_of(run).metrics for run in side.runs] for side in comparison.sides]
    panels = []
    for title, metric, limit, tail in (
        ("TTFT", "ttft", slo.ttft, False),
        ("TPOT", "tpot", slo.tpot, False),
        ("End to end", "e2el", slo.e2el, False),
        ("ITL, no handoffs", "itl", None, False),
        ("ITL, no handoffs: tail", "itl", None, True),
        ("Largest gap of a request", "max_itl", None, False),
    ):
        pools = [[run[metric].values * 1e3 for run in runs if metric in run] for runs in samples]
        series = []
        for side, color, own in zip(comparison.sides, SIDES, pools, strict=False):
            own = [pool for pool in own if len(pool)]
            if len(own) > 1:
                series += [Series("line", color, *_cdf(pool, tail), size=0.8, opacity=0.4) for pool in own]
            if own:
                series.append(Series("line", color, *_cdf(np.concatenate(own), tail), label=side.label))
        if not series:
            continue
        everything = np.concatenate([pool for own in pools for pool in own])
        time = _log_axis("ms", everything, 1.1)
        if limit is not None and time.low < limit < time.high:
            series.append(Series("line", "dim", [limit] * 2, [0.0, 100.0], "SLO", size=1.2, marker="dash"))
        share = Axis("longer than, %", 0.05, 100, True) if tail else Axis("share, %", 0, 100)
        panels.append(Panel(title, time, share, series))
    return Figure(
        "Latency distributions",
        "Share of the measured requests (for ITL of the gaps between tokens, handoffs left out) with at most a latency;"
        " for the tail, with at least it. Thick lines are all repetitions together, thin ones single repetitions. "
        f"A line goes through at most {CURVE} quantiles; time is logarithmic and starts at the 0.1st percentile.",
        panels,
        columns=3,
    )


def _log_axis(label: str, values: Array, room: float) -> Axis:
    low = max(float(np.percentile(values, 0.1)) / room, 1e-3)
    return Axis(label, low, max(float(values.max()), low) * room, True)


def _cdf(pool: Array, tail: bool) -> tuple[list[float], list[float]]:
    values, n = np.sort(pool), len(pool)
    even, upper = np.linspace(1, n, CURVE // 2), n + 1 - np.geomspace(1, n, CURVE // 2)  # as dense where few are
    ranks = np.unique(np.concatenate([even, upper]).round().astype(np.int64))
    return rounded(values[ranks - 1]), rounded(100 * ((n + 1 - ranks) if tail else ranks) / n)


# ---------------------------------------------------------------- over time


def gaps_of(requests: Sequence[RequestRecord]) -> Array:
    """[gaps, 4]: end in seconds after the first arrival, length in ms, whether a handoff, whether stalled.

    Stalled: half or more of one other request's prefill on the same worker lies in the gap, which is no handoff.
    """
    prefills: dict[str, list[tuple[float, float]]] = {}  # by worker: (middle, seconds)
    for r in requests:
        if seconds := r.stages.get("prefill", 0.0):
            start = r.scheduled + r.stages.get("queue", 0.0)
            prefills.setdefault(_seats(r)[0], []).append((start + seconds / 2, seconds))
    for seen in prefills.values():
        seen.sort()
    origin = min((r.scheduled for r in requests), default=0.0)
    rows = []
    for r in requests:
        first, last = _seats(r)
        for i, (start, end) in enumerate(pairwise(r.token_times)):
            handoff = i in r.handoffs
            seen = prefills.get(last if r.handoffs and i > r.handoffs[0] else first, [])
            inside = seen[bisect_left(seen, (start, 0.0)) : bisect_right(seen, (end, 0.0))]  # half holds the middle
            stalled = not handoff and any(seconds <= 2 * (end - start) for _, seconds in inside)
            rows.append((end - origin, (end - start) * 1e3, handoff, stalled))
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _seats(r: RequestRecord) -> tuple[str, str]:
    """Where it was prefilled and decoded, by name or, where the records have none, by role."""
    return (r.workers[0], r.workers[-1]) if r.workers else ("prefill", "decode") if r.handoffs else ("", "")


def interference_figure(comparison: Comparison) -> Figure | None:
    """Every gap between two tokens at the time at which it ended: with a colocated prefill, all others wait."""
    found = [gaps_of(by_schedule(side.runs[0])) for side in comparison.sides]
    everything = np.concatenate(found)
    if not len(everything):
        return None
    time, length = Axis(TIME, 0, float(everything[:, 0].max()) * 1.01), _log_axis("gap, ms", everything[:, 1], 1.3)
    panels = []
    for side, color, gaps in zip(comparison.sides, SIDES, found, strict=False):
        plain = gaps[(gaps[:, 2] + gaps[:, 3]) == 0]
        kinds = (
            (plain, f"{side.label}: a gap", color, 2.2, 0.6, False),
            (gaps[gaps[:, 2] > 0], "handoff to the decode worker", "handoff", 3.0, 0.9, True),
            (gaps[gaps[:, 3] > 0], "another request's prefill ran inside", "ink", 3.4, 0.85, False),
        )
        series = []
        for rows, label, hue, size, opacity, square in kinds:
            shown = rows[:: max(1, math.ceil(len(rows) / GAPS))]
            marker: Literal["square", "circle"] = "square" if square else "circle"
            series.append(
                Series("points", hue, rounded(shown[:, 0]), rounded(shown[:, 1], 4), label, [], size, opacity, marker)
            )
        title = f"{side.label}: a prefill in {gaps[:, 3].mean() if len(gaps) else 0:.1%} of the gaps"
        panels.append(Panel(title, time, length, series, 210))
    return Figure(
        "Interference: the gaps between tokens over time",
        "First repetition. A point is a gap between two tokens of one request. A prefill counts as inside where at "
        "least half of it, on the same worker, lies in the gap; without workers in the records, on any of that role. "
        f"Of each kind of point at most {GAPS:,} are drawn, every k-th by request.",
        panels,
    )


def waterfall_figure(comparison: Comparison) -> Figure | None:
    """The first requests, a line each, with their stages as bars."""
    shown = [by_schedule(side.runs[0])[:BARS] for side in comparison.sides]
    ends = [r.token_times[-1] - requests[0].scheduled for requests in shown for r in requests if r.token_times]
    if not ends:
        return None
    panels = []
    for side, requests in zip(comparison.sides, shown, strict=True):
        bars: dict[str, list[tuple[float, float, float]]] = {stage: [] for stage in STAGE_COLORS}
        for row, r in enumerate(requests):
            at = r.scheduled - requests[0].scheduled
            for stage, seconds in _stages(r):
                if seconds > 0:
                    bars[stage].append((at, row, at + seconds))
                at += seconds
        series = []
        for stage, seen in bars.items():
            x, y, end = (rounded(column) for column in np.array(seen).reshape(-1, 3).T)
            series.append(Series("spans", STAGE_COLORS[stage], x, y, stage.replace("_", " "), end))
        rows = max(len(requests), 20)
        time = Axis(TIME, 0, max(ends) * 1.01)
        panels.append(Panel(side.label, time, Axis("request", rows, -1), series, 60 + 5 * rows))
    return Figure(
        "Waterfall of requests",
        f"The first {BARS} requests by arrival, first repetition, warm-up included. A line is one request from its "
        "scheduled arrival to its last token.",
        panels,
    )


def _stages(r: RequestRecord) -> Iterable[tuple[str, float]]:
    if r.stages or not r.token_times:
        return [(stage, r.stages[stage]) for stage in STAGES if stage in r.stages]
    return [(UNTIL_FIRST, r.token_times[0] - r.scheduled), ("decode", r.token_times[-1] - r.token_times[0])]


def load_figure(comparison: Comparison) -> Figure:
    """Requests under way, and the tokens of KV cache that they hold."""
    panels = []
    for title, tokens in (("Requests in the system", False), ("KV cache held, tokens", True)):
        series = []
        for side, color in zip(comparison.sides, SIDES, strict=False):
            requests = [r for r in by_schedule(side.runs[0]) if r.token_times]
            changes = [(0.0, 0.0)]
            for r in requests:
                start = r.scheduled - requests[0].scheduled
                times = [time - requests[0].scheduled for time in r.token_times]
                if tokens:
                    changes += [(start + r.stages.get("queue", 0.0), r.prompt_len), *((time, 1) for time in times)]
                    changes.append((times[-1], -r.prompt_len - len(times)))
                else:
                    changes += [(start, 1), (times[-1], -1)]
            table = np.array(sorted(changes))
            grid = np.linspace(0, table[-1, 0], STEPS)
            held = np.cumsum(table[:, 1])[np.searchsorted(table[:, 0], grid, side="right") - 1]
            series.append(Series("line", color, rounded(grid), rounded(held), side.label, size=1.3))
        time, top = (max(max(v) for v in values) for values in ([s.x for s in series], [s.y for s in series]))
        panels.append(Panel(title, Axis(TIME, 0, time or 1.0), Axis("", 0, top * 1.05 or 1.0), series))
    return Figure(
        "Load and KV cache over time",
        "First repetition, from the records of the requests: one holds its prompt from the start of its prefill and a "
        f"token more with each that it emits, until the last; a shared prefix counts for each. {STEPS} samples.",
        panels,
        columns=2,
    )


# ---------------------------------------------------------------- workers, rates, users


def trace_figures(events: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Steps and KV pages of each worker over time, from the events of trace.json; empty where it has none."""
    workers: dict[int, str] = {}
    roles: dict[int, str] = {}
    origins: dict[int, float] = {}  # of each side: its processes' numbers are in one hundred
    for event in events:
        if event["ph"] == "M" and event["name"] == "process_name":
            workers[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "process_labels":
            roles[event["pid"]] = event["args"]["labels"]
        elif "ts" in event:
            side = event["pid"] // 100
            origins[side] = min(origins.get(side, math.inf), event["ts"])

    def table(pid: int, kind: str, name: str, *keys: str) -> Array:
        """[events, 2 + keys]: start in seconds, duration in ms, and values."""
        rows = [
            [(event["ts"] - origins[pid // 100]) / 1e6, event.get("dur", 0.0) / 1e3, *(event["args"][k] for k in keys)]
            for event in events
            if event["pid"] == pid and event.get(kind) == name and "ts" in event
        ]
        return np.array(sorted(rows), dtype=np.float64).reshape(-1, 2 + len(keys))

    steps = {pid: table(pid, "cat", "step", "prefill_tokens") for pid in workers}
    steps = {pid: rows for pid, rows in steps.items() if len(rows)}
    if not steps:
        return []
    everything = np.concatenate(list(steps.values()))
    time, length = Axis(TIME, 0, float(everything[:, 0].max()) * 1.01 or 1.0), _log_axis("ms", everything[:, 1], 1.3)
    lines, pages = [], []
    for pid, rows in steps.items():
        color, side, series = SIDES[min(pid // 100, 1)], workers[pid].rpartition(" ")[0], []
        name = f"{workers[pid]}, {roles[pid]}" if pid in roles else workers[pid]
        for chosen, hue, label in (
            (rows[rows[:, 2] == 0], color, f"{side}: decode alone"),
            (rows[rows[:, 2] > 0], "ink", "with prefill tokens"),
        ):
            shown = chosen[:: max(1, math.ceil(len(chosen) / GAPS))]
            series.append(Series("points", hue, rounded(shown[:, 0]), rounded(shown[:, 1], 4), label, size=2.6))
        lines.append(Panel(f"{name}: time of a step", time, length, series, 160))
        held = table(pid, "name", "pages", "live", "cached")
        held = held[:: max(1, len(held) // STEPS)]
        top = float(held[:, 2:].max()) if len(held) else 0.0
        curves = [
            Series("line", hue, rounded(held[:, 0]), rounded(held[:, column]), label, size=1.4)
            for hue, column, label in (("dim", 3, "kept for reuse"), (color, 2, f"{side}: in use"))
        ]
        pages.append(Panel(f"{name}: pages of the KV cache", time, Axis("", 0, top * 1.05 or 1.0), curves, 160))
    note = "From trace.json, which holds the first run of each side."
    drawn = f"{note} Of each kind of point at most {GAPS:,} are drawn, every k-th."
    return [
        Figure("Interference: the steps of the workers over time", drawn, lines),
        Figure("KV cache of the workers over time", f"{note} At most {2 * STEPS} samples a line.", pages, columns=2),
    ]


def usage_figure(comparison: Comparison) -> Figure:
    """What each worker used of its device."""
    rows = [(side, usage) for side in comparison.sides for usage in worker_usage(side.runs)]
    names, panels = [usage.name for _, usage in rows], []
    of_ceiling = "% of the measured ceiling"
    for title, field, label in (
        ("Busy", "busy", "% of the time"),
        ("Compute, while busy", "compute", of_ceiling),
        ("Bandwidth, while busy", "bandwidth", of_ceiling),
    ):
        series = []
        for side, color in zip(comparison.sides, SIDES, strict=False):
            own = [(y, 100 * getattr(usage, field)) for y, (owner, usage) in enumerate(rows) if owner is side]
            known = np.array([pair for pair in own if not math.isnan(pair[1])]).reshape(-1, 2)
            series.append(
                Series("spans", color, [0.0] * len(known), rounded(known[:, 0]), side.label, rounded(known[:, 1]))
            )
        height = 56 + 24 * max(len(names), 2)
        panels.append(Panel(title, Axis(label, 0, 100), Axis("", len(names) - 0.4, -0.6, names=names), series, height))
    note = "Over all repetitions. Ceilings: the fastest matrix product and read that were measured on the worker."
    return Figure("Use of the workers", note, panels, columns=3)


def goodput_figure(found: Mapping[str, GoodputResult]) -> Figure:
    """What the search for goodput saw, and the falling curve that it read its result from."""
    rates = [trial.rate for result in found.values() for trial in result.trials]
    low, high = min(rates) / 1.1, max(rates) * 1.1
    targets = {f"target {result.target:.0%}": 100 * result.target for result in found.values()}
    series = [Series("line", "dim", [low, high], [y] * 2, name, [], 1.2, 1.0, "dash") for name, y in targets.items()]
    for (label, result), color in zip(found.items(), SIDES, strict=False):
        for kind, trials in (("line", monotone_fit(result.trials)), ("points", result.trials)):
            x, y = rounded([t.rate for t in trials]), rounded([100 * t.attainment for t in trials])
            name, size = (label, 7.0) if kind == "points" else ("", 1.6)
            series.append(Series(kind, color, x, y, name, size=size))  # type: ignore[arg-type]
    rate, share = Axis("requests per second", low, high, True), Axis("requests within the SLO, %", -3, 103)
    note = "A point is one run of the search, a line the falling curve nearest to the points."
    return Figure("Attainment over rate", note, [Panel("", rate, share, series, 300)])


def sweep_figure(comparisons: Mapping[int, Comparison]) -> Figure:
    """Attainment, latency and throughput over the number of requests at a time."""
    panels, names = [], [str(n) for n in sorted(comparisons)]
    for title, unit, statistic, scale in (
        ("SLO attainment", "%", "attainment", 100.0),
        ("p90 TTFT", "ms", "p90_ttft", 1e3),
        ("Mean TPOT", "ms", "mean_tpot", 1e3),
        ("Throughput", "output tokens/s", "output_throughput", 1.0),
    ):
        series, top = [], 0.0
        for index, color in enumerate(SIDES):
            sides = {n: one.sides[index] for n, one in sorted(comparisons.items()) if index < len(one.sides)}
            seen = {n: side.values[statistic] * scale for n, side in sides.items() if statistic in side.values}
            if seen:
                x, y = [float(names.index(str(n))) for n in seen], rounded(list(seen.values()))
                top = max(top, *y)
                series.append(Series("line", color, x, y, size=1.6))
                series.append(Series("points", color, x, y, next(iter(sides.values())).label, size=7))
        if series:
            users = Axis("requests at a time", -0.3, len(names) - 0.7, names=names)
            panels.append(Panel(title, users, Axis(unit, 0, top * 1.08 or 1.0), series))
    return Figure("Over the number of users", "Closed loop; centers over the repetitions.", panels, columns=2)

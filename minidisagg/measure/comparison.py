"""A against B as plain data: values, ratios with intervals, what limits their use, and one sentence of verdict.

A comparison names a winner only for what its intervals separate clearly, and none at all if a run is void.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec import Struct

from minidisagg.measure.goodput import SLO, GoodputResult
from minidisagg.measure.intervals import LEAST_REQUESTS, RUN_NOISE, STATISTICS, Ratio, center, compare
from minidisagg.measure.records import RunRecord
from minidisagg.measure.stats import (
    POLICY_FAILED,
    RATES,
    Samples,
    samples_of,
    summarize,
    unsteady,
    value_of,
    void_reasons,
    window_of,
)

# What the verdict weighs: enough to show both sides of the trade, few enough not to find a winner by looking often.
VERDICT = (
    ("p99 ITL", "p99_itl"),
    ("p90 TTFT", "p90_ttft"),
    ("TPOT", "mean_tpot"),
    ("throughput", "output_throughput"),
    ("goodput", "request_goodput"),
)
VOID = "Void, no verdict."  # its reasons stand beside it
TIMES, DASH = "\u00d7", "\u2013"  # the typographic signs
PUBLISHABLE_REQUESTS, PUBLISHABLE_REPEATS = 300, 3


class Side(Struct, frozen=True):
    """One side: `values` by statistic (seconds or rates, centers over its repetitions), its runs and their results."""

    label: str
    values: dict[str, float]
    runs: list[RunRecord]
    results: list[dict[str, object]]


class Comparison(Struct, frozen=True):
    """All that a report shows. `b` is None where one mode ran alone; `ratios` are then empty."""

    a: Side
    b: Side | None
    ratios: dict[str, Ratio]
    marks: list[str]
    void: list[str]
    verdict: str

    @property
    def sides(self) -> list[Side]:
        return [self.a] if self.b is None else [self.a, self.b]


def compare_runs(
    a: Sequence[RunRecord],
    b: Sequence[RunRecord] = (),
    slo: SLO | None = None,
    *,
    run_noise: float = RUN_NOISE,
    resamples: int = 1000,
    seed: int = 0,
    alike: Sequence[tuple[str, str]] = (),
) -> Comparison:
    """Repetitions of A, and of B in the same order, as one comparison; B may be left out. Raises ValueError.

    `alike`: labels of the two, if they decided alike throughout.
    """
    runs = [*a, *b]
    samples = [samples_of(run, slo) for run in runs]
    ratios = compare(samples[: len(a)], samples[len(a) :], seed, resamples, run_noise) if b else {}
    void = list(dict.fromkeys(f"{run.label}: {reason}" for run in runs for reason in void_reasons(run, slo)))
    same = bool(b) and a[0].label == b[0].label  # an A/A control
    side_a = _side(a, samples[: len(a)], slo, " A" if same else "")
    side_b = _side(b, samples[len(a) :], slo, " B" if same else "") if b else None
    verdict = verdict_of(side_a.label, side_b.label, ratios, void) if side_b else single_verdict(side_a, void)
    return Comparison(side_a, side_b, ratios, [*marks_of(runs, len(a), run_noise), *alike_marks(alike)], void, verdict)


def alike_marks(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What a reader must know of sides that decided alike throughout, which all sides of a group did."""
    groups: list[list[str]] = []
    for a, b in pairs:
        known = next((group for group in groups if a in group or b in group), None)
        if known is None:
            groups.append([a, b])
        else:
            known += [label for label in (a, b) if label not in known]
    return [f"{listing(group)} decided alike throughout: this load does not tell them apart" for group in groups]


def _side(runs: Sequence[RunRecord], samples: Sequence[Samples], slo: SLO | None, suffix: str) -> Side:
    results = [summarize(run, one, slo) for run, one in zip(runs, samples, strict=True)]
    return Side(runs[0].label + suffix, values_of(samples), list(runs), results)


def values_of(samples: Sequence[Samples]) -> dict[str, float]:
    """Each statistic as the center of its repetitions, in seconds and per second."""
    values: dict[str, float] = {}
    for metric in dict.fromkeys(name for one in samples for name in one.metrics):
        plain = metric in RATES or metric == "attainment"
        for kind in ("mean",) if plain else STATISTICS:
            seen = [value_of(one.metrics.get(metric), kind) for one in samples]
            if seen := [value for value in seen if not math.isnan(value)]:
                values[metric if plain else f"{kind}_{metric}"] = center(seen)
    return values


def marks_of(runs: Sequence[RunRecord], repeats: int, run_noise: float = RUN_NOISE) -> list[str]:
    """What limits the use of these runs, one line each; `repeats` are those of each side. `run_noise`: 0 for a
    simulator."""
    marks = list(dict.fromkeys(mark for run in runs for mark in run.marks))
    marks += {run.label: mark for run in reversed(runs) if (mark := unsteady(run))}.values()  # the first of each side
    fewest = min(len(run.requests) for run in runs)
    if fewest < PUBLISHABLE_REQUESTS:
        marks.append(f"{fewest} requests a run (< {PUBLISHABLE_REQUESTS})")
    alone = len(runs) <= repeats
    if not alone and (measured := min(w.last - w.first for w in map(window_of, runs))) < LEAST_REQUESTS:
        marks.append(f"{measured} measured requests (< {LEAST_REQUESTS}) have no intervals, and no winner")
    if not alone and repeats < PUBLISHABLE_REPEATS:
        assumed = ": noise between runs assumed" if run_noise else ""
        marks.append(f"{repeats} repetition{'s' * (repeats > 1)} (< {PUBLISHABLE_REPEATS}){assumed}")
    for label in dict.fromkeys(run.label for run in runs):
        every = [request for run in runs if run.label == label for request in run.requests]
        failed = [r for r in every if not r.ok and not r.rejected and not POLICY_FAILED.search(r.error)]  # it is void
        if failed:
            why = failed[0].error or "it has no token"
            marks.append(f"{label}: {len(failed)} of {len(every)} requests failed, the first of them by: {why}")
        if rejected := sum(request.rejected for request in every):
            marks.append(f"{label}: {rejected} of {len(every)} requests were rejected")
    return marks


class Usage(Struct, frozen=True):
    """Shares of 1, over all repetitions: time busy, CPU of one core, and of the ceilings while busy; nan: not known."""

    name: str
    role: str
    busy: float
    cpu: float
    compute: float
    bandwidth: float


def worker_usage(runs: Sequence[RunRecord]) -> list[Usage]:
    """How much of its device each worker used, by worker name."""

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole > 0 else math.nan

    usages = []
    for name in dict.fromkeys(worker.name for run in runs for worker in run.workers):
        seen = [(worker, run.wall_s) for run in runs for worker in run.workers if worker.name == name]
        wall, busy = sum(wall for _, wall in seen), sum(worker.busy_s for worker, _ in seen)
        usages.append(
            Usage(
                name,
                seen[0][0].role,
                ratio(busy, wall),
                ratio(sum(worker.cpu_s for worker, _ in seen), wall),
                ratio(sum(w.flops for w, _ in seen), sum(w.busy_s * w.peak_flops for w, _ in seen)),
                ratio(sum(w.bytes_read for w, _ in seen), sum(w.busy_s * w.peak_bytes for w, _ in seen)),
            )
        )
    return usages


# ---------------------------------------------------------------- verdict


def better(statistic: str, ratio: Ratio) -> str:
    """`"a"` or `"b"`, whose value is the better one: latencies want to be low, rates high."""
    high_wins = statistic in RATES or statistic == "attainment"
    return "b" if (ratio.ratio > 1.0) == high_wins else "a"


def verdict_of(a: str, b: str, ratios: dict[str, Ratio], void: Sequence[str] = ()) -> str:
    """One sentence on B against A."""
    if void:
        return VOID
    wins: dict[str, list[str]] = {"a": [], "b": [], "": []}
    for title, statistic in VERDICT:
        if (ratio := ratios.get(statistic)) is not None and not math.isnan(ratio.ratio):
            side = better(statistic, ratio) if ratio.clear else ""
            wins[side].append(f"{title} {ratio_text(ratio)}" if side else title)
    same = f"no clear difference in {listing(wins[''])}" if wins[""] else ""
    if not wins["a"] and not wins["b"]:
        return f"No winner: {same or 'nothing to compare'} between {a} and {b}."
    if wins["a"] and wins["b"]:
        head = f"No overall winner, {b} against {a}: better {listing(wins['b'])}, but worse {listing(wins['a'])}"
    elif wins["b"]:
        head = f"{b} is better than {a}: {listing(wins['b'])}"
    else:
        head = f"{b} is worse than {a}: {listing(wins['a'])}"
    return f"{head}; {same}." if same else f"{head}."


def goodput_verdict(found: Mapping[str, GoodputResult], void: Sequence[str]) -> tuple[Ratio, str]:
    """B / A of two searches, and one sentence on it.

    The interval has every ratio that is left open by what surely holds and what surely fails.
    """
    (name, a), (other, b) = found.items()
    (low_a, high_a), (low_b, high_b) = a.sure, b.sure
    middle = b.rate / a.rate if a.rate else math.inf if b.rate else math.nan
    low, high = low_b / high_a, high_b / low_a if low_a else math.inf
    ratio = Ratio(a.rate, b.rate, middle, low, high, low > 1.0 or high < 1.0)
    verdict = verdict_of(name, other, {"request_goodput": ratio}, void)
    return ratio, verdict if ratio.clear or void else f"{verdict} {other} / {name} is {ratio_text(ratio)}."


def single_verdict(side: Side, void: Sequence[str]) -> str:
    """One sentence on a mode that ran alone."""
    if void:
        return VOID
    values = side.values
    parts = [f"p90 TTFT {milliseconds(values.get('p90_ttft'))} ms", f"p99 ITL {milliseconds(values.get('p99_itl'))} ms"]
    parts.append(f"{number(values.get('output_throughput'))} output tok/s")
    if "attainment" in values:
        parts.append(f"{values['attainment']:.0%} of requests within the SLO")
    return f"{side.label}: {listing(parts)}."


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# ---------------------------------------------------------------- numbers


def number(value: float | None) -> str:
    """Three significant digits, thousands apart, a dash for what is not known."""
    if value is None or math.isnan(value):
        return DASH
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1000)


def share(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.1%}"


def ratio_text(ratio: Ratio) -> str:
    def short(value: float) -> str:
        return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"

    return f"{short(ratio.ratio)}{TIMES} [{short(ratio.low)}, {short(ratio.high)}]"

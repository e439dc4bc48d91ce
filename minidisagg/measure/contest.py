"""Any number of sides under the same load: one table, one figure, one verdict.

Each side is compared with the first, the baseline, and the best with each other one. Sides that cannot be told apart at
98 % are called level, however many were tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct
from rich.console import Group
from rich.table import Table
from rich.text import Text

from minidisagg.measure.comparison import (
    VOID,
    Side,
    alike_marks,
    better,
    listing,
    marks_of,
    milliseconds,
    number,
    ratio_text,
    share,
    values_of,
)
from minidisagg.measure.goodput import SLO
from minidisagg.measure.intervals import RUN_NOISE, Ratio, compare
from minidisagg.measure.plots import Axis, Figure, Panel, Series
from minidisagg.measure.records import RunRecord
from minidisagg.measure.report import head_text, marks_text, plain_table
from minidisagg.measure.stats import Samples, samples_of, summarize, void_reasons

COLUMNS = (  # title, statistic, how it is written
    ("TTFT\np50", "p50_ttft", milliseconds),
    ("\np99", "p99_ttft", milliseconds),
    ("2nd\np50", "p50_ttst", milliseconds),
    ("TPOT\nmean", "mean_tpot", milliseconds),
    ("ITL\np99", "p99_itl", milliseconds),
    ("\ntok/s", "output_throughput", number),
    ("good-\nput", "request_goodput", number),
    ("in\nSLO", "attainment", share),
)
DRAWN = (("p90 TTFT", "p90_ttft"), ("TPOT", "mean_tpot"), ("p99 ITL", "p99_itl"), ("goodput", "request_goodput"))
DECIDES = "request_goodput"


class Contest(Struct, frozen=True):
    """`ratios`: of each side but the first against the first, `best`: of the best by goodput against each other one."""

    sides: list[Side]
    ratios: list[dict[str, Ratio]]
    best: list[Ratio]
    marks: list[str]
    void: list[str]
    verdict: str


def contest(
    runs: Sequence[Sequence[RunRecord]],
    slo: SLO | None,
    *,
    seed: int = 0,
    run_noise: float = RUN_NOISE,
    alike: Sequence[tuple[str, str]] = (),
) -> Contest:
    """`runs`: of each side its repetitions, all in the same order. `alike`: sides that decided alike throughout."""
    samples = [[samples_of(run, slo) for run in side] for side in runs]
    sides = [
        Side(side[0].label, values_of(own), list(side), [summarize(*pair, slo) for pair in zip(side, own, strict=True)])
        for side, own in zip(runs, samples, strict=True)
    ]
    ratios = [compare(samples[0], other, seed, run_noise=run_noise) for other in samples[1:]]
    every = [run for side in runs for run in side]
    void = list(dict.fromkeys(f"{run.label}: {reason}" for run in every for reason in void_reasons(run, slo)))
    scores = [side.values.get(DECIDES, math.nan) for side in sides]
    first = max(range(len(sides)), key=lambda i: scores[i] if not math.isnan(scores[i]) else -1.0)
    best = [_against(samples[i], samples[first], seed, run_noise) for i in range(len(sides)) if i != first]
    verdict = VOID if void else _verdict(sides, first, best)
    return Contest(sides, ratios, best, [*marks_of(every, len(runs[0]), run_noise), *alike_marks(alike)], void, verdict)


def _against(a: Sequence[Samples], b: Sequence[Samples], seed: int, run_noise: float) -> Ratio:
    only = [[_only(one) for one in side] for side in (a, b)]
    return compare(only[0], only[1], seed, run_noise=run_noise)[DECIDES]


def _only(samples: Samples) -> Samples:
    return Samples(samples.window, samples.schedule, {DECIDES: samples.metrics[DECIDES]})


def _verdict(sides: Sequence[Side], first: int, best: Sequence[Ratio]) -> str:
    """One sentence."""
    others = [side for i, side in enumerate(sides) if i != first]
    level = [side.label for side, ratio in zip(others, best, strict=True) if not (ratio.clear and ratio.ratio > 1.0)]
    name = sides[first].label
    if len(level) == len(others):
        return f"No difference in goodput that is clear: {listing([name, *level])} cannot be told apart."
    closest = min((ratio for ratio in best if ratio.clear and ratio.ratio > 1.0), key=lambda ratio: ratio.ratio)
    if level:
        names = listing([name, *level])
        return f"{names} cannot be told apart in goodput, and are better than the others by {ratio_text(closest)}."
    return f"{name} has the best goodput, {ratio_text(closest)} of the next."


# ---------------------------------------------------------------- showing


def table(of: Contest) -> Table:
    """A row per side, with what is clearly better or worse than the baseline."""
    caption = f"+, -: clearly better, worse than {of.sides[0].label}"
    drawn = plain_table("Latency (ms), tokens and requests per second", caption)
    drawn.add_column("", overflow="fold", min_width=12)
    shown = [c for c in COLUMNS if any(c[1] in side.values for side in of.sides)]
    for title, _, _ in shown:
        drawn.add_column(title, justify="right", no_wrap=True)
    for side, ratios in zip(of.sides, [{}, *of.ratios], strict=True):
        cells = [Text(side.label)]
        for _, statistic, write in shown:
            ratio = ratios.get(statistic)
            text, style = write(side.values.get(statistic)), ""
            if ratio is not None and ratio.clear:
                text, style = (f"{text}+", "green") if better(statistic, ratio) == "b" else (f"{text}-", "red")
            cells.append(Text(text, style=style))
        drawn.add_row(*cells)
    return drawn


def ratio_figure(of: Contest) -> Figure:
    """Each side against the baseline, with intervals."""
    names = [side.label for side in of.sides[1:]]
    panels = []
    for title, statistic in DRAWN:
        found = [ratios.get(statistic) for ratios in of.ratios]
        known = [(i, r) for i, r in enumerate(found) if r is not None and not math.isnan(r.ratio) and r.low > 0]
        if not known:
            continue
        edges = [1.0, *(r.low for _, r in known), *(r.high for _, r in known)]
        axis = Axis(f"{title}, against {of.sides[0].label}", min(edges) / 1.05, max(edges) * 1.05, True)
        heights = Axis("", len(names) - 0.5, -0.5, names=names)
        spans = Series(
            "spans",
            "b",
            [r.low for _, r in known],
            [float(i) for i, _ in known],
            "95 %",
            [r.high for _, r in known],
            6.0,
        )
        points = Series("points", "a", [r.ratio for _, r in known], [float(i) for i, _ in known], "ratio", size=4.0)
        one = Series("line", "dim", [1.0] * 2, [-0.5, len(names) - 0.5], "equal", size=1.2, marker="dash")
        panels.append(Panel(title, axis, heights, [spans, points, one], 60 + 24 * len(names)))
    caption = (
        "Less is better for latencies, more for goodput. Bars are 95 % intervals, from paired resampling of blocks."
    )
    return Figure("Against the baseline", caption, panels, columns=2)


def render(of: Contest) -> Group:
    """The whole, for a rich console."""
    marks = [marks_text(of.marks, of.void)] if of.marks or of.void else []
    return Group(head_text(of.sides), Text(""), table(of), Text(""), *marks, Text(of.verdict, style="bold"))

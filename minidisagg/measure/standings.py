"""The tables of a league: who meets its SLOs for how many requests, under which load, and who cannot be told apart.

The score is the share of requests that meet all SLOs, the mean over loads (in the overall table over the workloads,
too); failed and rejected ones never do. Everybody had the same requests at the same times, so that sides are compared
in pairs: resamples take the same blocks of requests of both. Of those that are not clearly (98 %) worse than the best
of those that are left, none is ranked above another: they share a place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
from msgspec import Struct
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minidisagg.measure.comparison import DASH, listing, milliseconds, number, ratio_text, share
from minidisagg.measure.goodput import SLO
from minidisagg.measure.intervals import Drawn, Ratio, block_weights, center, ratio_of_shares
from minidisagg.measure.plots import Axis, Figure, Panel, Series, standalone

VERSION = 1  # of league.json and runs.jsonl
RESAMPLES = 400
COLORS = ("transfer", "a", "b", "prefill", "decode", "wait")  # of the loads
SCORE = "share of the requests within all SLOs, mean over the loads"


class Condition(Struct, frozen=True):
    """A workload under a load: a share of what the devices would do at best, and the requests per second that it is."""

    workload: str
    load: float
    rate: float
    slo: SLO
    requests: int  # of each run


class Played(Struct, frozen=True):
    """What is kept of a run. `met`: 1 for each measured request, by schedule, that is within the SLO, else 0.

    `values` in seconds and per second; `decisions`: a hash of what was done for whom, where and when.
    """

    met: str
    values: dict[str, float]
    decisions: str
    cpu_s: float


class League(Struct, frozen=True, kw_only=True):
    """All of it. `cells` by repetition, place of the condition, place of the side."""

    labels: list[str]
    policies: list[str]  # as they were asked for
    workers: int
    conditions: list[Condition]
    cells: dict[tuple[int, int, int], Played]
    repeats: int
    seed: int
    about: str
    marks: list[str]

    @property
    def workloads(self) -> dict[str, list[int]]:
        """Places of the conditions of each."""
        found: dict[str, list[int]] = {}
        for place, condition in enumerate(self.conditions):
            found.setdefault(condition.workload, []).append(place)
        return found

    def values(self, place: int, side: int, name: str) -> float:
        """A statistic of one side under one condition, the center over the repetitions."""
        values = [self.cells[repetition, place, side].values for repetition in range(self.repeats)]
        return center([one[name] for one in values if name in one])


class Standing(Struct, frozen=True):
    """A side's place: "3", or "3=" where it shares it. `against`: the best one, from this one's point of view."""

    side: int
    place: str
    score: float
    low: float
    high: float
    against: Ratio | None


def drawn_of(league: League) -> list[list[Drawn]]:
    """[condition][side]: shares within the SLO, and their resamples."""
    sides, found = range(len(league.labels)), []
    for place in range(len(league.conditions)):
        values, draws, count = [], [], 0
        for repetition in range(league.repeats):
            lines = [league.cells[repetition, place, side].met for side in sides]
            met = np.array([list(map(int, line)) for line in lines], dtype=np.float32).T
            count = len(met)
            weights = block_weights(count, RESAMPLES, np.random.default_rng([league.seed, place, repetition]))
            draws.append((weights @ met).astype(np.float64) / count)  # whole numbers: exact, in whatever order
            values.append(met.sum(axis=0, dtype=np.float64) / count)
        table, cube = np.array(values), np.array(draws)
        found.append([Drawn(table[:, side], cube[:, :, side], 0.5 / count) for side in sides])
    return found


def mean_of(conditions: Sequence[Drawn]) -> Drawn:
    """Of one side under several conditions."""
    half = 1 / sum(1 / one.half for one in conditions)
    values, draws = [one.values for one in conditions], [one.draws for one in conditions]
    return Drawn(np.mean(values, axis=0), np.mean(draws, axis=0), half)


def standings(drawn: Sequence[Sequence[Drawn]]) -> list[Standing]:
    """Of some conditions, the best first."""
    means = [mean_of(side) for side in zip(*drawn, strict=True)]
    order = sorted(range(len(means)), key=lambda side: -float(means[side].values.mean()))
    groups: list[list[int]] = []
    for side in order:
        ahead = groups and ratio_of_shares(means[side], means[groups[-1][0]])
        if ahead and not (ahead.clear and ahead.ratio > 1.0):
            groups[-1].append(side)
        else:
            groups.append([side])
    found: list[Standing] = []
    for group in groups:
        place = f"{len(found) + 1}{'=' * (len(group) > 1)}"
        for side in group:
            against = None if side == order[0] else ratio_of_shares(means[order[0]], means[side])
            found.append(Standing(side, place, *means[side].interval, against))
    return found


def alike(league: League) -> list[str]:
    """Sides that no run tells apart."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for side, label in enumerate(league.labels):
        cells = [played.decisions for cell, played in sorted(league.cells.items()) if cell[2] == side]
        groups.setdefault(tuple(cells), []).append(label)
    return [f"{listing(group)} decided alike throughout" for group in groups.values() if len(group) > 1]


# ---------------------------------------------------------------- tables


def _table(title: str, caption: str) -> Table:
    drawn = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left",
        caption_justify="left", caption_style="dim", pad_edge=False, show_edge=False, header_style="bold",
    )  # fmt: skip
    drawn.add_column("", justify="right", no_wrap=True)
    drawn.add_column("", min_width=15)
    return drawn


def _columns(table: Table, *heads: str) -> None:
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)


def overall_table(league: League, drawn: Sequence[Sequence[Drawn]]) -> Table:
    """Over all conditions, and each workload's score."""
    caption = (
        f"Score: {SCORE} and workloads; beside it of the best one's, as a geometric mean over the repetitions with a "
        "95 % interval; =: a shared place"
    )
    table = _table("Overall", caption)
    _columns(table, "score")
    table.add_column("of the best", justify="right")
    _columns(table, *(name.removeprefix("like ").replace("-", "-\n", 1) for name in league.workloads))
    for one in standings(drawn):
        parts = [mean_of([drawn[place][one.side] for place in places]) for places in league.workloads.values()]
        own = [share(part.interval[0]) for part in parts]
        against = DASH if one.against is None else ratio_text(one.against)
        table.add_row(one.place, league.labels[one.side], share(one.score), against, *own)
    return table


def workload_table(league: League, drawn: Sequence[Sequence[Drawn]], name: str) -> Table:
    """One workload: each load, and what is behind it."""
    places = league.workloads[name]
    loads, middle = [league.conditions[place] for place in places], places[len(places) // 2]
    rates = ", ".join(f"{one.load:g} is {one.rate:.3g} requests/s" for one in loads)
    caption = (
        f"Score: {SCORE}; {rates}; SLO (ms) {loads[0].slo}; goodput: requests/s within it of each worker, at the best "
        f"load; latencies (ms) at load {league.conditions[middle].load:g}"
    )
    table = _table(name, caption)
    _columns(table, *(f"at {one.load:g}" for one in loads), "score", "goodput", "TTFT\np90", "TPOT")
    refusing = any(league.values(place, side, "rejected") for place in places for side in range(len(league.labels)))
    if refusing:
        _columns(table, "refused")
    for one in standings([drawn[place] for place in places]):
        shares = [share(drawn[place][one.side].interval[0]) for place in places]
        best = max(league.values(place, one.side, "request_goodput") for place in places) / league.workers
        latencies = [milliseconds(league.values(middle, one.side, key)) for key in ("p90_ttft", "mean_tpot")]
        last = [share(league.values(middle, one.side, "rejected"))] if refusing else []
        table.add_row(one.place, league.labels[one.side], *shares, share(one.score), number(best), *latencies, *last)
    return table


def render(league: League) -> RenderableType:
    """All tables, for a rich console."""
    drawn = drawn_of(league)
    tables = [workload_table(league, drawn, name) for name in league.workloads]
    parts = [part for table in [*tables, overall_table(league, drawn)] for part in (table, Text(""))]
    notes = [Text(f"note: {note}", style="yellow") for note in [*league.marks, *alike(league)]]
    return Group(Text(_head(league)), Text(""), *parts, *notes)


def _head(league: League) -> str:
    count = " or ".join(map(str, dict.fromkeys(one.requests for one in league.conditions)))
    runs = f"{count} requests \u00d7 {league.repeats} repetition{'s' * (league.repeats > 1)}, seed {league.seed}"
    return f"{league.about}\n{len(league.labels)} sides, {len(league.conditions)} conditions, each {runs}"


# ---------------------------------------------------------------- figure and files


def figure(league: League) -> Figure:
    """Each side's share within the SLO under each load, a panel per workload, in the order of the overall table."""
    drawn = drawn_of(league)
    order = [one.side for one in standings(drawn)]
    names, panels = [league.labels[side] for side in order], []
    for name, places in league.workloads.items():
        series = []
        for index, place in enumerate(places):
            color, found = COLORS[index % len(COLORS)], [drawn[place][side].interval for side in order]
            shift = 0.5 * (index - (len(places) - 1) / 2) / max(1, len(places) - 1)
            rows = [row + shift for row in range(len(order))]
            series += [
                Series("line", color, [round(100 * low, 2), round(100 * high, 2)], [row, row], size=1.4, opacity=0.6)
                for row, (_, low, high) in zip(rows, found, strict=True)
            ]
            label = f"load {league.conditions[place].load:g}"
            series.append(Series("points", color, [round(100 * m, 2) for m, _, _ in found], rows, label, size=6.0))
        shares = Axis("requests within all SLOs, %", -2, 102)
        panels.append(Panel(name, shares, Axis("", len(names) - 0.4, -0.6, names=names), series, 60 + 20 * len(names)))
    caption = "Lines are 95 % intervals. Loads are shares of what the devices would do if none of them ever waited."
    return Figure("League", caption, panels)


def to_svg(league: League) -> str:
    """The figure as one file."""
    return standalone(figure(league))


def to_markdown(league: League, made: Mapping[str, object]) -> str:
    """league.md."""
    drawn = drawn_of(league)
    tables = [overall_table(league, drawn), *(workload_table(league, drawn, name) for name in league.workloads)]
    own = [f"`{policy}`" for policy in dict.fromkeys(league.policies) if "{" in policy]
    notes = [*league.marks, *alike(league)]
    if own:
        notes.append(f"settings that are the SLO's: {listing(own)}")
    parts = ["# League", _head(league).replace("\n", ". ") + ".", f"    {made['command']}"]
    parts += [_markdown(tables[0]), "![League](league.svg)", *map(_markdown, tables[1:])]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    parts.append(", ".join(f"{key}: {value}" for key, value in made.items() if key != "command"))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    heads = [line(str(column.header).replace("-\n", "-").replace("\n", " ") for column in table.columns)]
    heads.append(line("---:" if column.justify == "right" else "---" for column in table.columns))
    rows = map(line, zip(*(column.cells for column in table.columns), strict=True))
    return "\n".join([f"## {table.title}", "", *heads, *rows, "", f"{table.caption}."])


def to_dict(league: League, made: Mapping[str, object]) -> dict[str, object]:
    """league.json."""
    drawn = drawn_of(league)
    tables = {"overall": range(len(league.conditions)), **league.workloads}
    cells = []
    for (repetition, place, side), played in league.cells.items():
        one, ends = league.conditions[place], drawn[place][side]
        cells.append(
            {
                "workload": one.workload, "load": one.load, "side": league.labels[side], "repetition": repetition,
                "attainment": float(ends.values[repetition]), **played.values, "decisions": played.decisions,
            }
        )  # fmt: skip
    return {
        "version": VERSION,
        "made": made,
        "about": _head(league),
        "seed": league.seed,
        "sides": dict(zip(league.labels, league.policies, strict=True)),
        "conditions": [msgspec.to_builtins(one) for one in league.conditions],
        "standings": {
            name: [
                {"side": league.labels[one.side], **msgspec.to_builtins(msgspec.structs.replace(one, side=0))}
                for one in standings([drawn[place] for place in places])
            ]
            for name, places in tables.items()
        },
        "notes": [*league.marks, *alike(league)],
        "cells": cells,
    }

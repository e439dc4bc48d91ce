"""The state as text of a given size: `frame(state, ui, width, height)`. Pure.

    ─ 1 pipeline ──────────────────────────────   the requests in each stage, and how old the oldest is
    ─ 2 latency ────────────  ─ 4 links ───────   side by side
    ─ 3 workers ───────────────────────────────
    ─ 5 interference ───────  ─ 6 requests ────   side by side where there is room, else one above the other
    ─ 7 log ───────────────────────────────────

A row that does not fit is left out.
"""

from __future__ import annotations

from rich.segment import Segment, SegmentLines
from rich.style import Style

from minidisagg.monitor.keys import HELP, Ui, selected_worker
from minidisagg.monitor.panels import ACCENT, BAD, BOLD, DIM, GOOD, PANELS, PLAIN, Drawn, Line, details, fit
from minidisagg.monitor.state import State

GAP = 2  # columns between panels


def frame(state: State, ui: Ui, width: int, height: int) -> SegmentLines:
    """The whole screen."""
    body = max(0, height - 2)
    if ui.mode == "help":
        keys = ([Segment(f"  {key:<7}", ACCENT), Segment(text)] for key, text in HELP)
        lines = _panel("?", "help", Drawn([Segment("any key: back ", DIM)], [[], *keys]), width)
    elif ui.mode == "details":
        lines = _panel("⏎", "request", details(state, ui, width), width)
    elif state.now.seq < 0:
        lines = [[Segment("  waiting for the first event …", DIM)]]
    elif ui.panel:
        lines = _row([(ui.panel, width)], state, ui, body)
    else:
        lines = _overview(state, ui, width, body)
    lines = lines[:body] + [[] for _ in range(body - len(lines))]
    lines = [_header(state, ui, width), *lines, _footer(state, ui, width)]
    return SegmentLines([fit(line, width) for line in lines], new_lines=True)


# ---------------------------------------------------------------- layout


# Panels side by side, each by number and width. The row gets at least so many lines or is left out, and no more than
# the other number if some are over.
Row = tuple[list[tuple[int, int]], int, int]


def _overview(state: State, ui: Ui, width: int, height: int) -> list[Line]:
    workers = len(state.now.workers)
    table = 2 + min(workers, 4)
    strips = max(table, min(2 + 3 * workers, height - 10 - table))  # three lines each before the log gets any

    def pair(one: int, other: int, least: int) -> list[tuple[int, int]]:
        right = min(max((width - GAP) * 2 // 5, least), (width - GAP) // 2)
        return [(one, width - GAP - right), (other, right)]

    beside = width >= 110
    rows: list[Row] = [
        ([(1, width)], 4, 4),
        (pair(2, 4, 36), 6, 6),
        ([(3, width)], table, 2 + workers),
        (pair(5, 6, 54) if beside else [(5, width)], strips, 2 + 7 * workers),
        *([] if beside else [([(6, width)], 6, 12)]),
        ([(7, width)], 4, height),
    ]
    kept, lines = list[Row](), list[Line]()
    for row in rows:
        if row[1] <= height:
            kept.append(row)
            height -= row[1]
    for panels, least, most in kept:
        more = min(height, most - least)
        height -= more
        lines += _row(panels, state, ui, least + more)
    return lines


def _row(panels: list[tuple[int, int]], state: State, ui: Ui, height: int) -> list[Line]:
    columns = []
    for number, width in panels:
        name, draw = PANELS[number]
        lines = _panel(str(number), name, draw(state, ui, width, height - 1), width)[:height]
        columns.append([fit(line, width) for line in lines + [[] for _ in range(height - len(lines))]])
    gap = Segment(" " * GAP)
    return [[part for line in lines for part in (*line, gap)][:-1] for lines in zip(*columns, strict=True)]


def _panel(number: str, name: str, drawn: Drawn, width: int) -> list[Line]:
    title = [Segment("─ ", DIM), Segment(number, ACCENT), Segment(f" {name} ", BOLD), *drawn.legend]
    rest = width - Segment.get_line_length(title)
    return [[*title, Segment("─" * max(rest, 0), DIM)], *drawn.lines]


def _header(state: State, ui: Ui, width: int) -> Line:
    now = state.now
    right = [Segment(f" {ui.lost} ", Style(color="red", reverse=True)) if ui.lost else Segment(f"● {ui.live} ", GOOD)]
    if ui.load is not None:
        right[:0] = [Segment(f"load {ui.load:g}/s ", Style(color="magenta")), Segment(f"{ui.trouble} ", BAD)]
    left = [Segment(" minidisagg ", ACCENT), Segment(f" {now.model} ", BOLD)]
    paused = [Segment(" admission paused ", Style(color="yellow", reverse=True))] * now.paused
    space, words = width - Segment.get_line_length(right), f"{now.mode}  {now.policy}  {now.link}"
    if len(words) > (room := space - Segment.get_line_length(left + paused) - 2):  # the last are worth least
        words = words[: max(room + 2, 0)].rpartition("  ")[0]
    return [*fit([*left, Segment(f" {words} "), *paused], max(space, 0)), *right]


def _footer(state: State, ui: Ui, width: int) -> Line:
    worker = selected_worker(ui, state)
    if ui.mode == "kill" and worker is not None:
        return [Segment(f" kill {worker.name}? its requests are recomputed elsewhere  y/n", BAD + BOLD)]
    if ui.mode == "filter":
        typed = Segment(ui.filter), Segment("▏", ACCENT)
        return [Segment(" filter the log: ", BOLD), *typed, Segment("  enter: keep  esc: all", DIM)]
    hints = "" if ui.live == "once" else "space pause  m mode  p policy  f flip  K kill  ? help  q quit "
    status = [Segment(f" {ui.status} ", BAD if ui.failed else PLAIN)]
    if Segment.get_line_length(status) > width - len(hints):  # what just happened is worth more than the hints
        return status
    return [*fit(status, width - len(hints)), Segment(hints, DIM)]

"""The seven panels: each a function of the state and its size, made of rich's segments.

Segments cost a tenth of what rich's layouts and tables do. Colours are the terminal's own, so that a light background
works, and every colour has a shape, a place or a word beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.segment import Segment
from rich.style import Style

from minidisagg.monitor.keys import Ui, selected_request, selected_worker
from minidisagg.monitor.state import BUCKET, PARTS, STAGES, Bucket, End, Link, State, Worker

Line = list[Segment]
PLAIN, BOLD, DIM, GOOD, BAD = Style(), Style(bold=True), Style(dim=True), Style(color="green"), Style(color="red")
ACCENT, WARN = Style(color="cyan", bold=True), Style(color="yellow")
COLOURS = [Style(color=name) for name in ("yellow", "blue", "magenta", "cyan", "green")]  # of waiting … decoding
STAGE_STYLES, PART_STYLES = dict(zip(STAGES, COLOURS, strict=True)), dict(zip(PARTS, COLOURS, strict=True))
PAGES = (
    ("live", "█", Style(color="green")), ("in flight", "▓", Style(color="magenta")),
    ("cached", "▒", Style(color="cyan")), ("quarantined", "x", Style(color="red")), ("free", "·", DIM),
)  # fmt: skip
STEPS = (  # what is in them, said at length and in short
    ("decode only", "decode", Style(color="green")), ("decode + some prefill", "+ some", Style(color="yellow")),
    ("decode + mostly prefill", "+ much prefill", Style(color="red")), ("prefill only", "prefill", Style(color="blue")),
)  # fmt: skip
ROLES = {"prefill": Style(color="blue"), "decode": Style(color="green"), "both": Style(color="magenta")}
EIGHTHS, RISING = " ▏▎▍▌▋▊▉█", " ▁▂▃▄▅▆▇█"
GUTTER = 14  # columns left of a strip
GOOD_SHARE = 0.9  # of the requests: DistServe's measure
NONE = "-"


class Drawn(NamedTuple):
    """A panel: what stands in its title, and its lines."""

    legend: Line
    lines: list[Line]


def _pipeline(state: State, ui: Ui, width: int, height: int) -> Drawn:
    assert state.now is not None
    counts = [state.now.stages.get(stage, 0) for stage in STAGES]
    each, full = width // len(STAGES), max(*counts, 8)
    names: Line = []
    bars: Line = []
    ages: Line = []
    for number, (stage, count) in enumerate(zip(STAGES, counts, strict=True)):
        style = STAGE_STYLES[stage]
        label = (" " if number == 0 else "→ ") + stage.replace("_waiting", " wait")
        names.append(Segment(f"{label:<{each}}", style + BOLD))
        figure = f"{'' if number == 0 else ' '} {count:<4d} "
        bars += [Segment(figure, BOLD), Segment(_bar(count / full, max(each - len(figure) - 2, 1)) + "  ", style)]
        age = state.now.oldest.get(stage)
        text = f"oldest {duration(age)}" if count and age is not None else NONE
        ages.append(Segment(f"{'' if number == 0 else ' '} {text:<{each - 2 + (number == 0)}}", DIM))
    return Drawn([], [names, bars, ages])


def _latency(state: State, ui: Ui, width: int, height: int) -> Drawn:
    assert state.now is not None
    legend = [Segment(f"{'p50':>5}{'p90':>9}{'p99':>9}  {'of the last minute' if width >= 60 else '1 min'} ", DIM)]
    lines: list[Line] = []
    for name in ("ttft", "tpot", "itl"):
        values, limit = state.now.latencies.get(name, []), state.slo.get(name)
        line = [Segment(f" {name.upper():<7}", BOLD)]
        for value in values or (None, None, None):
            style = PLAIN if limit is None or value is None else GOOD if value * 1000 <= limit else BAD
            line.append(Segment(f"{duration(value):>9}", style))
        if limit is not None:
            line.append(Segment(f"  ≤ {duration(limit / 1000)} ", DIM))
            line += _gauge(values[2] * 1000 / limit if values else 0.0, width - Segment.get_line_length(line) - 1)
        lines.append(line)
    rates = state.tokens.rates() or [0.0, 0.0]
    lines.append([
        Segment(" tokens ", BOLD), Segment(f"{rates[0]:>9,.0f}"), Segment(" prompt/s", DIM),
        Segment(f"{rates[1]:>9,.0f}"), Segment(" output/s", DIM),
    ])  # fmt: skip
    good, share, ended = state.goodput()
    line = [Segment(" goodput" if state.slo else " ended  ", BOLD), Segment(f"{good:>9.2f}"), Segment(" req/s", DIM)]
    if state.slo:
        style = PLAIN if not ended else GOOD if share >= GOOD_SHARE else BAD
        line += [Segment(f"  {share:>6.1%}" if ended else f"{NONE:>8}", style), Segment(f" of {ended} requests", DIM)]
    else:
        line.append(Segment(f"  {ended} in the last minute", DIM))
    return Drawn(legend, [*lines, line])


def _workers(state: State, ui: Ui, width: int, height: int) -> Drawn:
    assert state.now is not None
    workers, chosen = state.now.workers, selected_worker(ui, state)
    wide = max((len(worker.name) for worker in workers), default=6)
    room = max(width - wide - 61, 4)
    legend: Line = []
    for name, glyph, style in PAGES:
        legend += [Segment(glyph, style), Segment(f" {name}  ", DIM)]
    head = f"   {'':<{wide}} {'role':<8}{'state':<10}{'epoch':<6}{'KV pages':<{room}}"
    lines: list[Line] = [[Segment(f"{head} used{'run/wait':>10}{'tok/s':>9}{'busy':>6}", DIM)]]
    first = _first(workers.index(chosen) if chosen else 0, len(workers), height - 1)
    for worker in workers[first : first + max(height - 1, 1)]:
        lines.append(_worker(state, worker, worker is chosen, wide, room))
    return Drawn(legend, lines)


def _worker(state: State, worker: Worker, chosen: bool, wide: int, room: int) -> Line:
    stats, busy = worker.stats, state.worker_busy(worker)
    mood = GOOD if worker.state == "up" else BAD if worker.state == "down" else WARN
    line = [
        Segment(" ▸ " if chosen else "   ", ACCENT),
        Segment(f"{worker.name:<{wide}} ", BOLD if chosen else PLAIN),
        Segment(f"{worker.role:<8}", ROLES.get(worker.role, DIM)), Segment(f"{worker.state:<10}", mood),
        Segment(f"{worker.epoch:<6}"),
    ]  # fmt: skip
    if stats is None:
        return [*line, Segment("·" * room, DIM)]
    pages = (stats.pages_live, stats.pages_inflight, stats.pages_cached, stats.pages_quarantined, stats.pages_free)
    for (_, glyph, style), cells in zip(PAGES, split(pages, room), strict=True):
        line.append(Segment(glyph * cells, style))
    used = (pages[0] + pages[1] + pages[3]) / max(1, sum(pages))
    batch = f"{stats.running}/{stats.waiting + stats.offers}"
    line += [Segment(f" {used:>4.0%}{batch:>10}{state.worker_tokens(worker.name):>9,.0f}")]
    return [*line, Segment(f"{NONE:>6}" if busy is None else f"{min(busy, 1.0):>6.0%}")]


def _links(state: State, ui: Ui, width: int, height: int) -> Drawn:
    assert state.now is not None
    wide = max(width - 26, 5)
    lines: list[Line] = [[Segment(f" {'':<{wide}}{'GB/s':>6}{'piece':>8}{'open':>5}{'fail':>5}", DIM)]]
    for worker in state.now.workers:
        for link in worker.stats.links if worker.stats else []:
            speed, piece = state.link_rates(worker, link)
            lines.append([
                Segment(f" {_link_name(worker.name, link, wide):<{wide}}"), Segment(f"{speed / 1e9:>6.3f}", BOLD),
                Segment(f"{duration(piece):>8}"), Segment(f"{link.backlog:>5}", WARN if link.backlog else DIM),
                Segment(f"{link.failures:>5}", BAD if link.failures else DIM),
            ])  # fmt: skip
    if len(lines) == 1:
        lines.append([Segment(" no KV has moved yet", DIM)])
    hidden = len(lines) - height
    if hidden > 0:
        lines[height - 1 :] = [[Segment(f" and {hidden + 1} more", DIM)]]
    return Drawn([], lines)


def _link_name(source: str, link: Link, width: int) -> str:
    """As much as fits: prefill-0 → decode-0 gloo, prefill-0 → decode-0, p0→d0."""
    pair = f"{source} → {link.peer}"
    if len(pair) > width:
        return _cut(re.sub(r"(\w)\w*-", r"\1", pair).replace(" ", ""), width)
    return f"{pair} {link.kind}" if len(pair) + len(link.kind) < width else pair


def _interference(state: State, ui: Ui, width: int, height: int) -> Drawn:
    assert state.now is not None
    workers, chosen = state.now.workers, selected_worker(ui, state)
    legend: Line = []
    for name, short, style in STEPS:
        legend += [Segment("█ ", style), Segment(f"{name}  " if width > 96 else f"{short} ", DIM)]
    each = max(1, min(height if ui.panel else 7, (height - 1) // max(1, len(workers))))
    room, tall = max(1, (height - 1) // each), each - (each > 3)  # a free line above each strip that is high enough
    first = _first(workers.index(chosen) if chosen else 0, len(workers), room)
    newest, columns = int(state.now.clock / BUCKET), max(width - GUTTER, 1)
    strips = {}
    for worker in workers[first : first + room]:
        strip = strips[worker.name] = dict[int, Bucket]()
        for bucket in reversed(state.buckets.get(worker.name, ())):
            if bucket.index <= newest - columns:
                break
            strip[bucket.index - newest + columns - 1] = bucket
    full = _scale([bucket.longest.seconds for strip in strips.values() for bucket in strip.values()])
    lines: list[Line] = []
    for name, strip in strips.items():
        longest = max((bucket.longest.seconds for bucket in strip.values()), default=None)
        notes = [_cut(name, GUTTER - 2), "no steps" if longest is None else f"max {duration(longest)}"]
        lines += [[]] * (each - tall)
        for n in range(tall):
            note = Segment(f" {notes[n] if n < len(notes) else '':<{GUTTER - 1}}", DIM if n else BOLD)
            lines.append([note, *_level(strip, columns, tall - 1 - n, tall, full)])
    text = f" full height {duration(full)} · tall red: decodes behind a prefill"
    lines.append([Segment(f"{text} · a column: the longest step in {BUCKET:g} s" if width > 110 else text, DIM)])
    return Drawn(legend, lines)


def _level(strip: dict[int, Bucket], columns: int, level: int, tall: int, full: float) -> Iterable[Segment]:
    """One line of a strip of `tall` lines; 0 is the lowest."""
    cells = []
    for column in range(columns):
        bucket = strip.get(column)
        if bucket is None:
            cells.append((PLAIN, " "))
            continue
        step = bucket.longest
        eighths = max(1, round(min(step.seconds / full, 1.0) * tall * 8)) - level * 8
        share = step.prefill_tokens / max(1, step.prefill_tokens + step.decode_tokens)
        kind = 0 if not step.prefill_tokens else 3 if not step.decode_tokens else 1 if share < 0.5 else 2
        cells.append((STEPS[kind][2], RISING[min(max(eighths, 0), 8)]))
    for style, run in groupby(cells, key=lambda cell: cell[0]):
        yield Segment("".join(glyph for _, glyph in run), style)


def _waterfall(state: State, ui: Ui, width: int, height: int) -> Drawn:
    legend: Line = []
    for part, style in PART_STYLES.items():
        legend += [Segment("█ "[: 1 + (width >= 60)], style), Segment(f"{part.replace('decode_', '')} ", DIM)]
    ends = list(state.ends)
    if not ends:
        return Drawn(legend, [[Segment(" none has ended yet", DIM)]])
    at = next((i for i, end in enumerate(ends) if end.id == ui.request), len(ends) - 1)
    first = max(0, min(at - height // 2, len(ends) - height)) if ui.request else max(0, len(ends) - height)
    shown = ends[first : first + height]
    room, full = max(width - 22, 4), max(end.e2e for end in shown) or 1.0
    lines = []
    for end in reversed(shown):
        chosen = end.id == ui.request
        name = Segment(f" {'▸' if chosen else ' '}{end.id[-8:]:<9}", BOLD if chosen else DIM)
        bars = parts(end, max(1, round(end.e2e / full * room)))
        text = f"{duration(end.e2e) if end.stages else end.finish:>9}"
        lines.append([name, *fit(bars, room), Segment(text, PLAIN if not state.slo or state.meets(end) else BAD)])
    return Drawn(legend, lines)


def parts(end: End, room: int) -> Line:
    """A bar of the stages of a request, `room` wide."""
    cells = split([end.stages.get(part, 0.0) for part in PARTS], room, least=0)
    return [Segment("█" * n, PART_STYLES[part]) for part, n in zip(PARTS, cells, strict=True) if n]


def _log(state: State, ui: Ui, width: int, height: int) -> Drawn:
    assert state.now is not None
    wanted = [event for event in state.log if ui.filter.lower() in event.text.lower()]
    legend = [Segment(f"/{ui.filter} {len(wanted)} of {len(state.log)} ", ACCENT)] if ui.filter else []
    lines: list[Line] = []
    if not wanted:
        lines.append([Segment(" nothing matches" if state.log else " nothing has happened yet", DIM)])
    for event in wanted[-1 : -height - 1 : -1]:
        age = duration(max(0.0, state.now.clock - event.clock), whole=True)
        lines.append([Segment(f"{age:>8} ago  ", DIM), Segment(event.text)])
    return Drawn(legend, lines)


def details(state: State, ui: Ui, width: int) -> Drawn:
    """All there is to know of the selected request."""
    end = selected_request(ui, state)
    if end is None:
        return Drawn([], [[Segment(" It is no longer kept: ← → select another", DIM)]])
    lines: list[Line] = [
        [Segment(f" {end.id}", BOLD)],
        [Segment(f" {end.prompt_tokens} prompt tokens, {end.output_tokens} output tokens, end: {end.finish}")],
        [],
        [Segment(" "), *parts(end, max(width - 2, 5))],
        [],
    ]
    for part in PARTS:
        seconds = end.stages.get(part, 0.0)
        lines.append([
            Segment(" █ ", PART_STYLES[part]),
            Segment(f"{part.replace('_', ' '):<13}{duration(seconds):>9}"),
            Segment(f"{seconds / end.e2e if end.e2e else 0.0:>8.1%}", DIM),
        ])  # fmt: skip
    lines += [[Segment(f"   {'end to end':<13}{duration(end.e2e):>9}", BOLD)], []]
    for name, value in (("ttft", end.ttft), ("tpot", end.tpot), ("itl", end.max_itl), ("e2el", end.e2e)):
        limit = state.slo.get(name)
        label = {"itl": "longest ITL", "e2el": "end to end"}.get(name, name.upper())
        style = PLAIN if limit is None else GOOD if value * 1000 <= limit else BAD
        if limit is not None or name != "e2el":
            text = "" if limit is None else f"  ≤ {duration(limit / 1000)}"
            lines.append([Segment(f"   {label:<13}"), Segment(f"{duration(value):>9}", style), Segment(text, DIM)])
    return Drawn([Segment("← → another, esc back ", DIM)], lines)


PANELS: dict[int, tuple[str, Callable[[State, Ui, int, int], Drawn]]] = {
    1: ("pipeline", _pipeline), 2: ("latency", _latency), 3: ("workers", _workers), 4: ("links", _links),
    5: ("interference", _interference), 6: ("requests", _waterfall), 7: ("log", _log),
}  # fmt: skip


# ---------------------------------------------------------------- small things


def duration(seconds: float | None, whole: bool = False) -> str:
    """Three digits and a unit; `whole`: of seconds, minutes and hours, as an age."""
    if seconds is None:
        return NONE
    if whole or seconds >= 600:
        size, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
        return f"{seconds / size:.0f} {unit}"
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1000, "ms")
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def fit(line: Line, width: int) -> Line:
    """Cut or filled, and without what a terminal would obey."""
    for i, (text, style, _) in enumerate(line):
        if not text.isprintable():
            line[i] = Segment("".join(c if c.isprintable() else "·" for c in text), style)
    return Segment.adjust_line_length(line, width, PLAIN)


def split(values: Sequence[float], cells: int, least: int = 1) -> list[int]:
    """`cells` in proportion to `values`; whoever has any gets `least`, while there are enough."""
    total = sum(values)
    if total <= 0:
        return [0] * len(values)
    exact = [value / total * cells for value in values]
    least = min(least, cells // len(values))
    found = [max(int(part), least if part > 0 else 0) for part in exact]
    while (over := sum(found) - cells) != 0:
        by = -1 if over > 0 else 1
        able = [i for i, n in enumerate(found) if values[i] > 0 and n + by >= least]
        found[max(able, key=lambda i: (exact[i] - found[i]) * by)] += by
    return found


def _bar(share: float, width: int) -> str:
    eighths = round(min(share, 1.0) * width * 8)
    text = "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    return f"{text or ('▏' if share else ''):<{width}}"


def _gauge(share: float, width: int) -> Line:
    """A bar to `share` of the limit, which stands in the middle."""
    if width < 8:
        return []
    bar = _bar(share / 2, width)
    half = width // 2
    style = GOOD if share <= 1 else BAD
    return [Segment(bar[:half], style), Segment("│", BOLD), Segment(bar[half + 1 :], style)]


def _scale(values: list[float]) -> float:
    """The next of 1, 2 and 5 times a power of ten over all but a few percent: it rarely changes, an outlier is cut."""
    peak = sorted(values)[math.ceil(0.97 * (len(values) - 1))] if values else 0.0
    ten = 10.0 ** math.floor(math.log10(peak)) if peak > 0 else 1.0
    return next(ten * factor for factor in (1, 2, 5, 10) if peak <= ten * factor * 1.000001)


def _first(chosen: int, count: int, room: int) -> int:
    """Of the lines of a list that is longer than its room: the chosen one is seen."""
    return max(0, min(chosen - room + 1, count - room)) if chosen >= room else 0


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"

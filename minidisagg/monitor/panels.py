"""The seven panels: each a function of the state and its size, made of rich's segments.

Segments cost a tenth of what rich's layouts and tables do. Colours are the terminal's own, so that a light background
works (bold yellow and bold cyan do not: many terminals draw them in a bright, pale tone), and every colour has a shape,
a place or a word beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby, islice
from typing import NamedTuple

from rich.segment import Segment
from rich.style import Style

from minidisagg.admin_schema import STAGES, EndRecord, LinkState, WorkerState, WorkerStats
from minidisagg.measure.records import STAGES as PARTS
from minidisagg.monitor.keys import Ui, selected_request, selected_worker
from minidisagg.monitor.state import BUCKET, Bucket, State, slo_values

Line = list[Segment]
PLAIN, BOLD, DIM, GOOD, BAD = Style(), Style(bold=True), Style(dim=True), Style(color="green"), Style(color="red")
ACCENT, WARN = Style(color="cyan"), Style(color="yellow")
COLOURS = [Style(color=name) for name in ("yellow", "blue", "magenta", "cyan", "green")]  # of waiting … decoding
NAMES = ("queue", "prefill", "transfer", "wait", "decode")
PART_LOOKS = dict(zip(PARTS, zip(NAMES, "·█▒░▄", COLOURS, strict=True), strict=True))
STAGE_LOOKS = dict(zip(STAGES, PART_LOOKS.values(), strict=True))
PAGES = (
    ("live", "█", Style(color="green")), ("in flight", "▓", Style(color="magenta")),
    ("cached", "▒", Style(color="cyan")), ("quarantined", "x", Style(color="red")), ("free", "·", DIM),
)  # fmt: skip
STEPS = (  # by the most prefill tokens in them
    (0, "0", "·", Style(color="green")), (64, "1-64", "░", Style(color="yellow")),
    (256, "65-256", "▒", Style(color="magenta")), (math.inf, ">256", "█", Style(color="red")),
)  # fmt: skip
ROLES = {"prefill": Style(color="blue"), "decode": Style(color="green"), "both": Style(color="magenta")}
EIGHTHS, RISING = " ▏▎▍▌▋▊▉█", " ▁▂▃▄▅▆▇█"
GUTTER = 14  # columns left of a strip
TICK = 5  # seconds between the times under it
GOOD_SHARE = 0.9  # of the requests: DistServe's measure
NONE = "-"


class Drawn(NamedTuple):
    """A panel: what stands in its title, and its lines."""

    legend: Line
    lines: list[Line]


def _pipeline(state: State, ui: Ui, width: int, height: int) -> Drawn:
    counts = [state.now.stages.get(stage, 0) for stage in STAGES]
    each, full = width // len(STAGES), max(*counts, 8)
    workers = [worker for worker in state.now.workers if worker.state == "up"]
    idle = [role for role in ("prefill", "decode") if not any(w.role in (role, "both") for w in workers)]
    legend = [Segment(f"no worker takes {' or '.join(idle)}: new requests wait ", BAD + BOLD)] if idle else []
    names, bars, ages = Line(), Line(), Line()
    for stage, count in zip(STAGES, counts, strict=True):
        style, arrow, age = STAGE_LOOKS[stage][2], "→ " if names else " ", state.now.oldest.get(stage)
        names.append(Segment(f"{arrow + stage.replace('_waiting', ' wait'):<{each}}", style))
        figure = f"{'':{len(arrow)}}{count:<4d} "
        bars += [Segment(figure, BOLD), Segment(_bar(count / full, max(each - len(figure) - 2, 1)) + "  ", style)]
        text = f"oldest {duration(age)}" if count and age is not None else NONE
        ages.append(Segment(f"{'':{len(arrow)}}{text:<{each - len(arrow)}}", DIM))
    return Drawn(legend, [names, bars, ages])


def _latency(state: State, ui: Ui, width: int, height: int) -> Drawn:
    wide = width >= 60
    each, given = 9 if wide else 8, "(default)" if state.default_slo else "SLO"
    legend = [Segment(f"{'p50':>{each - 4}}{'p90':>{each}}{'p99':>{each}} {given} ", DIM)]
    legend += [Segment(" of the last minute ", DIM)] * wide
    lines: list[Line] = []
    for name in ("ttft", "tpot", "itl"):
        values, limit = state.now.latencies.get(name, []), state.slo.get(name)
        line = [Segment(f" {name.upper():<7}", BOLD)]
        for value in values or (None, None, None):
            style = PLAIN if limit is None or value is None else GOOD if value * 1000 <= limit else BAD
            line.append(Segment(f"{duration(value):>{each}}", style))
        if limit is not None:
            line.append(Segment(f" ≤ {duration(limit / 1000)} ", DIM))
            line += _gauge(values[2] * 1000 / limit if values else 0.0, width - Segment.get_line_length(line) - 1)
        lines.append(line)
    come, made = state.tokens.rates() or (0.0, 0.0)
    good, share, ended = state.goodput()
    style = PLAIN if not ended else GOOD if share >= GOOD_SHARE else BAD
    lines += [
        [
            Segment(" tokens ", BOLD),
            Segment(f"{come:>{each},.0f}"),
            Segment(" prompt/s", DIM),
            Segment(f"{made:>{each},.0f}"),
            Segment(" output/s", DIM),
        ],
        [
            Segment(" goodput", BOLD),
            Segment(f"{good:>{each}.2f}"),
            Segment(" req/s", DIM),
            Segment(f"  {share:>6.1%}" if ended else f"{NONE:>8}", style),
            Segment(f" of {ended} requests" if wide else f" of {ended}/min", DIM),
        ],
    ]
    return Drawn(legend, lines)


def _workers(state: State, ui: Ui, width: int, height: int) -> Drawn:
    workers, chosen = state.now.workers, selected_worker(ui, state)
    wide = max((len(worker.name) for worker in workers), default=6)
    room = max(width - wide - 61, 4)
    legend = [part for name, glyph, style in PAGES for part in (Segment(glyph, style), Segment(f" {name}  ", DIM))]
    head = f"   {'':<{wide}} {'role':<8}{'state':<10}{'epoch':<6}{'KV pages':<{room}}"
    first = _first(workers.index(chosen) if chosen else 0, len(workers), height - 1)
    lines: list[Line] = [[Segment(f"{head} used{'run/wait':>10}{'tok/s':>9}{'busy':>6}", DIM)]]
    lines += (_worker(state, one, one is chosen, wide, room) for one in workers[first : first + max(height - 1, 1)])
    if ui.panel == 3:
        known = [(worker.name, worker.stats) for worker in workers if worker.stats is not None]
        if (each := (height - len(lines)) // max(len(known), 1)) < 4 and chosen is not None:
            known, each = [(name, stats) for name, stats in known if name == chosen.name], height - len(lines)
        for name, stats in known:
            lines += _page_grid(name, _pages(stats), width - 6, each - 2)
    return Drawn(legend, lines)


def _page_grid(name: str, pages: Sequence[int], width: int, height: int) -> Iterable[Line]:
    """All pages by their state: a cell for each, or for as many as it takes to fit in `height` lines."""
    each = max(1, math.ceil(sum(pages) / max(1, width * height)))
    cells = math.ceil(sum(pages) / each)
    counts = ", ".join(f"{count} {state}" for count, (state, _, _) in zip(pages, PAGES, strict=True))
    drawn = [Segment(glyph * n, style) for n, (_, glyph, style) in zip(split(pages, cells), PAGES, strict=True)]
    yield []
    yield [Segment(f"   {name} ", BOLD), Segment(f"KV pages by state, {each} a cell: {counts}", DIM)]
    for line in Segment.divide(drawn, range(width, cells + width, width)):
        yield [Segment("   "), *line]


def _pages(stats: WorkerStats) -> tuple[int, ...]:
    """Counts in the order of `PAGES`."""
    return stats.pages_live, stats.pages_inflight, stats.pages_cached, stats.pages_quarantined, stats.pages_free


def _worker(state: State, worker: WorkerState, chosen: bool, wide: int, room: int) -> Line:
    stats, busy = worker.stats, state.worker_busy(worker)
    mood = GOOD if worker.state == "up" else BAD if worker.state == "down" else WARN
    line = [
        Segment(" ▸ " if chosen else "   ", ACCENT),
        Segment(f"{worker.name:<{wide}} ", BOLD if chosen else PLAIN),
        Segment(f"{worker.role:<8}", ROLES.get(worker.role, DIM)),
        Segment(f"{worker.state:<10}", mood),
        Segment(f"{worker.epoch:<6}"),
    ]
    if stats is None:
        return [*line, Segment("·" * room, DIM)]
    pages = _pages(stats)
    for (_, glyph, style), cells in zip(PAGES, split(pages, room), strict=True):
        line.append(Segment(glyph * cells, style))
    used = (pages[0] + pages[1] + pages[3]) / max(1, sum(pages))
    batch = f"{stats.running}/{stats.waiting + stats.offers}"
    line += [Segment(f" {used:>4.0%}{batch:>10}{state.worker_tokens(worker.name):>9,.0f}")]
    return [*line, Segment(f"{NONE:>6}" if busy is None else f"{min(busy, 1.0):>6.0%}")]


def _links(state: State, ui: Ui, width: int, height: int) -> Drawn:
    unit, each = ("B/s", 10) if width >= 64 else ("", 6)
    wide = max(width - 19 - 2 * each, 5)
    head = f" {'':<{wide}}{'now' if unit else 'B/s':>{each}}{'wire':>{each}}{'piece':>8}{'open':>5}{'fail':>5}"
    lines: list[Line] = [[Segment(head, DIM)]]
    for worker in state.now.workers:
        for link in worker.stats.links if worker.stats else []:
            speed, wire, piece = state.link_rates(worker, link)
            lines.append(
                [
                    Segment(f" {_link_name(worker.name, link, wide):<{wide}}"),
                    Segment(f"{rate(speed, unit):>{each}}", BOLD),
                    Segment(f"{rate(wire, unit):>{each}}"),
                    Segment(f"{duration(piece):>8}"),
                    Segment(f"{link.backlog:>5}", WARN if link.backlog else DIM),
                    Segment(f"{link.failures:>5}", BAD if link.failures else DIM),
                ]
            )
    if len(lines) == 1:
        lines.append([Segment(" no KV has moved yet", DIM)])
    if len(lines) > height:
        lines[height - 1 :] = [[Segment(f" and {len(lines) - height + 1} more", DIM)]]
    moved = state.now.migrations
    return Drawn([Segment(f"{moved:,} migrated ", DIM)] if moved else [], lines)


def _link_name(source: str, link: LinkState, width: int) -> str:
    """As much as fits: prefill-0 → decode-0 gloo, prefill-0 → decode-0, p0→d0."""
    pair = f"{source} → {link.peer}"
    if len(pair) > width:
        return _cut(re.sub(r"(\w)\w*-", r"\1", pair).replace(" ", ""), width)
    return f"{pair} {link.kind}" if len(pair) + len(link.kind) < width else pair


def _interference(state: State, ui: Ui, width: int, height: int) -> Drawn:
    workers, chosen = state.now.workers, selected_worker(ui, state)
    legend = [Segment("prefill tokens:  " if width > 61 else "prefill ", DIM)]
    legend += (part for _, name, glyph, style in STEPS for part in (Segment(glyph, style), Segment(f" {name} ", DIM)))
    each = max(1, min(height if ui.panel else 7, (height - 1) // max(1, len(workers))))
    # The last line of each strip has a glyph of what was in the step; the first is free where it is high enough.
    count, tall = max(1, (height - 1) // each), each - (each > 1) - (each > 4)
    first = _first(workers.index(chosen) if chosen else 0, len(workers), count)
    newest, columns = int(state.now.clock / BUCKET), max(width - GUTTER, 1)
    oldest = newest - columns + 1
    strips = {
        worker.name: {b.index - oldest: b for b in islice(reversed(state.buckets.get(worker.name, ())), columns)}
        for worker in workers[first : first + count]
    }
    full = _scale([b.longest.seconds for strip in strips.values() for at, b in strip.items() if at >= 0])
    marks = [(int(clock / BUCKET) - oldest, name, text) for clock, name, text in state.marks]
    lines: list[Line] = []
    for name, strip in strips.items():
        longest = max((bucket.longest.seconds for at, bucket in strip.items() if at >= 0), default=None)
        notes = [_cut(name, GUTTER - 2), "no steps" if longest is None else f"max {duration(longest)}"]
        cuts = {column for column, worker, _ in marks if worker in ("", name)}
        lines += [[]] * (each > 4)
        for n in range(tall + (each > 1)):
            note = Segment(f" {notes[n] if n < len(notes) else '':<{GUTTER - 1}}", DIM if n else BOLD)
            lines.append([note, *_level(strip, cuts, columns, tall - 1 - n, tall, full)])
    axis, seconds = [" "] * columns, range(TICK, int(columns * BUCKET), TICK)
    labels = [(columns - 1 - int(ago / BUCKET), f"-{ago} s") for ago in seconds]
    labels += [(columns - 3, "now"), *((column, f"│{mode}") for column, worker, mode in marks if not worker)]
    for column, text in labels:
        if 0 <= column <= columns - len(text):
            axis[column : column + len(text)] = text
    lines.append([Segment(f"{f' high: {duration(full)}':<{GUTTER}}{''.join(axis)}", DIM)])
    return Drawn(legend, lines)


def _level(
    strip: dict[int, Bucket], cuts: Collection[int], columns: int, level: int, tall: int, full: float
) -> Iterable[Segment]:
    """One line of a strip of `tall` lines; 0 is the lowest, and below it stands what was in the steps."""
    cells = []
    for column in range(columns):
        bucket = strip.get(column)
        if column in cuts:
            cells.append((ACCENT, "│"))
        elif bucket is None:
            cells.append((PLAIN, " "))
        else:
            step = bucket.longest
            _, _, glyph, style = next(kind for kind in STEPS if step.prefill_tokens <= kind[0])
            eighths = max(1, round(min(step.seconds / full, 1.0) * tall * 8)) - level * 8
            cells.append((style, glyph if level < 0 else RISING[min(max(eighths, 0), 8)]))
    for style, run in groupby(cells, key=lambda cell: cell[0]):
        yield Segment("".join(glyph for _, glyph in run), style)


def _waterfall(state: State, ui: Ui, width: int, height: int) -> Drawn:
    """The requests on one axis of time: those that run, the newest first, and below them those that have ended."""
    now, ends, live = state.now.clock, list(state.ends), [] if ui.request else state.now.requests
    legend = [Segment(f"{len(live)} live  ", DIM)] if live and width > 63 else []
    for name, glyph, style in PART_LOOKS.values():
        legend += [Segment(glyph, style), Segment(f"{name} ", DIM)]
    if not ends and not live:
        return Drawn(legend, [[Segment(" no request yet", DIM)]])
    live = live[: max(1, height // 2) if ends else height - 1]
    rows = max(height - 1 - len(live), 0)
    at = next((i for i, end in enumerate(ends) if end.id == ui.request), len(ends) - 1)
    first = max(0, min(at - rows // 2, len(ends) - rows)) if ui.request else max(0, len(ends) - rows)
    shown = ends[first : first + rows]
    begin = min([now - request.age for request in live] + [end.clock - end.e2e for end in shown], default=now)
    until = now if live else max((end.clock for end in shown), default=now)
    room = max(width - 22, 4)
    scale = room / max(until - begin, 1e-3)

    def line(name: str, begun: float, bars: Line, text: Segment) -> Line:
        label = Segment(f" {'▸' if name == ui.request else ' '}{name[-8:]:<9}", BOLD if name == ui.request else DIM)
        start = max(0, min(int((begun - begin) * scale), room - Segment.get_line_length(bars)))
        return [label, *fit([Segment(" " * start), *bars], room), text]

    lines = []
    for request in reversed(live):  # of what was before its stage, the router tells when it has ended
        name, glyph, style = STAGE_LOOKS[request.stage]
        cells = max(1, round(request.age * scale))
        last = min(cells, max(1, round(request.in_stage * scale)))
        bars = [Segment("─" * (cells - last), DIM), Segment(glyph * last, style)]
        lines.append(line(request.id, now - request.age, bars, Segment(f"{name:>9}", style)))
    for end in reversed(shown):
        text = Segment(f"{duration(end.e2e) if end.stages else end.finish:>9}", PLAIN if state.meets(end) else BAD)
        lines.append(line(end.id, end.clock - end.e2e, parts(end, max(1, round(end.e2e * scale))), text))
    left, right = f"-{duration(now - begin)}", "now" if until > now - 1 else f"-{duration(now - until)}"
    lines.append([Segment(f"{'':<11}{left}{right:>{max(room - len(left), 0)}}", DIM)])
    return Drawn(legend, lines)


def parts(end: EndRecord, room: int) -> Line:
    """A bar of the stages of a request, `room` wide."""
    cells = split([end.stages.get(part, 0.0) for part in PARTS], room, least=0)
    return [Segment(glyph * n, style) for n, (_, glyph, style) in zip(cells, PART_LOOKS.values(), strict=True) if n]


def _log(state: State, ui: Ui, width: int, height: int) -> Drawn:
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
    for part, (_, glyph, look) in PART_LOOKS.items():
        seconds = end.stages.get(part, 0.0)
        text = Segment(f"{part.replace('_', ' '):<13}{duration(seconds):>9}")
        lines.append([Segment(f" {glyph} ", look), text, Segment(f"{seconds / (end.e2e or 1.0):>8.1%}", DIM)])
    names = {"e2el": "end to end", "ttft": "TTFT", "tpot": "TPOT", "itl": "longest ITL"}
    for name, label in names.items():
        seconds, limit = slo_values(end)[name], state.slo.get(name)
        style = PLAIN if limit is None else GOOD if seconds * 1000 <= limit else BAD
        line = [Segment(f"   {label:<13}"), Segment(f"{duration(seconds):>9}", style)]
        lines.append([*line, Segment("" if limit is None else f"  ≤ {duration(limit / 1000)}", DIM)])
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


def rate(per_second: float | None, unit: str) -> str:
    """Three digits of bytes, and K, M or G before the unit."""
    if per_second is None:
        return NONE
    size, prefix = next(((10.0**n, p) for n, p in ((9, "G"), (6, "M")) if per_second >= 0.9995 * 10**n), (1e3, "K"))
    value = per_second / size
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}{' ' if unit else ''}{prefix}{unit}"


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

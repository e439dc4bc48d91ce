"""A run as text: lines for a pipe, and a screen of a given size. Pure.

 minidisagg replay  A/2  sarathi:chunk=64, asked: sjf              1.234 s of 9.8 s
─ run ──────────────────────────   each worker over the whole run, the cursor's moment marked
─ decode-0 ─────────────────────   its steps, one a column, around the cursor
─ step 12 of Sarathi ───────────   what was in it, what came of it, what another policy had done
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rich.segment import Segment, SegmentLines
from rich.style import Style

from minidisagg.monitor.panels import ACCENT, BAD, BOLD, DIM, PLAIN, STEPS, Line, fit
from minidisagg.replay.steps import Lane, Run, Step, WorkerStep

KEYS = "← → step  [ ] ten  home end  ↑ ↓ worker  "
NEXT = "n p next, previous that differs  "
MARK = "≠"
GUTTER = 12  # columns left of a strip
AXIS = 14  # columns between two times
FAR = 10  # steps of [ and ]


@dataclass
class Cursor:
    """Where the user looks."""

    run: Run
    lane: int = 0
    index: int = 0

    @property
    def step(self) -> Step:
        """The one there."""
        return self.run.lanes[self.lane].steps[self.index]

    def go(self, key: str) -> bool:
        """What a key does (a character, or prompt_toolkit's name of it); whether it does anything."""
        lane, ways = self.run.lanes[self.lane], {"left": -1, "right": 1, "[": -FAR, "]": FAR}
        by = ways | {"s-left": -FAR, "s-right": FAR, "home": -len(lane.steps), "end": len(lane.steps)}
        if key in by:
            self.index = min(max(self.index + by[key], 0), len(lane.steps) - 1)
        elif key in ("up", "down"):
            time, after = self.step.time, self.lane + (1 if key == "down" else -1)
            if 0 <= after < len(self.run.lanes):
                self.lane, self.index = after, self.run.lanes[after].at(time)
        elif key in ("n", "p"):
            here = self.step.time, self.lane, self.index
            later = [one for one in self.run.differing if one > here]
            earlier = [one for one in self.run.differing if one < here]
            if found := later[:1] if key == "n" else earlier[-1:]:
                _, self.lane, self.index = found[0]
        else:
            return False
        return True


# ---------------------------------------------------------------- lines


def plain(lane: Lane, step: Step) -> Iterator[str]:
    """A line of a step, and under it what was decided."""
    facts = "  ".join(f"{name} {text}" for name, text in step.facts())
    yield f"{step.time:9.4f} s  {lane.name}  {_title(step)}  {facts}"
    for text in step.events:
        yield f"{'':13}{text}"
    for one in step.differences:
        yield f"{'':13}{_difference(one.hook, one.about, one.recorded, one.other, one.failed)}"


def _difference(hook: str, about: str, recorded: str, other: str, failed: bool) -> str:
    return f"{MARK} {hook}, {about}: recorded {recorded}; asked: {'error, ' if failed else ''}{other}"


def _title(step: Step) -> str:
    if not isinstance(step, WorkerStep):
        return step.title
    took = f", {step.seconds * 1e3:.1f} ms" if step.seconds else ""
    return step.title + (f" and up to {step.repeat - 1} equal ones" if step.repeat > 1 else "") + took


# ---------------------------------------------------------------- the screen


def frame(cursor: Cursor, width: int, height: int) -> SegmentLines:
    """The whole screen."""
    run, lane, step = cursor.run, cursor.run.lanes[cursor.lane], cursor.step
    asked = f"  asked: {run.ask}, {len(run.differing)} steps differ" if run.ask else ""
    right = f"{step.time:.4f} s of {run.end:.3f} s "
    left = [Segment(" minidisagg replay ", ACCENT), Segment(f" {run.name} ", BOLD)]
    left.append(Segment(f" {', '.join(run.policies)}{asked}"))
    lines = [[*fit(left, max(width - len(right), 0)), Segment(right, BOLD)]]
    lanes = max(1, min(len(run.lanes), (height - 10) // 2))
    first = min(max(cursor.lane - lanes // 2, 0), len(run.lanes) - lanes)
    lines.append(_rule("run", "", width))
    lines += [_overview(cursor, number, width) for number in range(first, first + lanes)]
    place = f"step {cursor.index + 1} of {len(lane.steps)}"
    lines += [_rule(lane.name, place, width), *_strip(cursor, width), _rule(_title(step), "", width)]
    lines += [[Segment(f" {name:<{GUTTER - 2}} ", DIM), Segment(text)] for name, text in step.facts()]
    for one in step.differences:
        lines.append([Segment(" " + _difference(one.hook, one.about, one.recorded, one.other, one.failed), BAD)])
    lines += [[Segment(f" {text}")] for text in step.events]
    body = height - 1
    if len(lines) > body:
        lines[body - 1 :] = [[Segment(f" … and {len(lines) - body + 1} lines more: --plain has all", DIM)]]
    lines += [[] for _ in range(body - len(lines))]
    lines.append([Segment(f" {KEYS}{NEXT if run.ask else ''}q quit", DIM)])
    return SegmentLines([fit(line, width) for line in lines], new_lines=True)


def _rule(title: str, more: str, width: int) -> Line:
    line = [Segment("─ ", DIM), Segment(f"{title} ", BOLD), *([Segment(f"{more} ", DIM)] if more else [])]
    return [*line, Segment("─" * max(width - Segment.get_line_length(line), 0), DIM)]


def _look(step: Step) -> tuple[str, Style]:
    """By its prompt tokens, as in the monitor."""
    tokens = step.prompt_tokens
    return next((glyph, style) for most, _, glyph, style in STEPS if tokens <= most)


def _overview(cursor: Cursor, number: int, width: int) -> Line:
    """One worker over the whole run: of each slice of time the step with the longest prompt."""
    run, room = cursor.run, max(width - GUTTER - 1, 1)
    lane, chosen = run.lanes[number], number == cursor.lane
    scale = room / max(run.end, 1e-9)
    cells: list[Step | None] = [None] * room
    odd = set[int]()
    for step in lane.steps:
        at = min(int(max(step.time, 0.0) * scale), room - 1)
        known = cells[at]
        if known is None or step.prompt_tokens > known.prompt_tokens:
            cells[at] = step
        if step.differences:
            odd.add(at)
    here = min(int(max(cursor.step.time, 0.0) * scale), room - 1)
    line = [Segment(f"{'>' if chosen else ' '}{lane.name[: GUTTER - 2]:<{GUTTER - 1}}", BOLD if chosen else DIM)]
    for at, cell in enumerate(cells):
        glyph, style = (" ", PLAIN) if cell is None else _look(cell)
        if at in odd:
            glyph, style = MARK, BAD
        if at == here:
            glyph, style = ("│" if glyph == " " else glyph), style + Style(reverse=True)
        line.append(Segment(glyph, style))
    return line


def _strip(cursor: Cursor, width: int) -> list[Line]:
    """The steps around the cursor, one a column; which of them differ; when they were."""
    steps, room = cursor.run.lanes[cursor.lane].steps, max(width - GUTTER - 1, 1)
    first = min(max(cursor.index - room // 2, 0), max(len(steps) - room, 0))
    seen = steps[first : first + room]
    look: Line = [Segment(f" {'steps':<{GUTTER - 1}}", DIM)]
    for at, step in enumerate(seen, first):
        glyph, style = _look(step)
        look.append(Segment(glyph, style + Style(reverse=True) if at == cursor.index else style))
    marks = "".join(MARK if step.differences else " " for step in seen)
    axis, ticks = "", range(0, len(seen), AXIS)
    for at, after in pairwise([*ticks, len(seen)]):
        axis += f"{f'│{seen[at].time:.3f} s':<{after - at}}"[: after - at]
    return [
        look,
        [Segment(f" {'differ':<{GUTTER - 1}}" if cursor.run.ask else " " * GUTTER, DIM), Segment(marks, BAD)],
        [Segment(" " * GUTTER), Segment(axis, DIM)],
    ]

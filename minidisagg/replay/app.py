"""`minidisagg replay`: as lines, or on a screen of which keys move the cursor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from msgspec import Struct
from rich.console import Console
from rich.live import Live

from minidisagg.monitor.reader import reading_keys
from minidisagg.policies import PATIENCE, in_time, load_policy, pinned, shown
from minidisagg.replay.asking import GaveUp
from minidisagg.replay.records import choose_record
from minidisagg.replay.screen import Cursor, frame, plain
from minidisagg.replay.steps import Run


class ReplayOptions(Struct, frozen=True, kw_only=True):
    """The flags of `minidisagg replay`."""

    directory: Path
    run: str = ""
    worker: str = ""
    at: float | None = None  # seconds
    ask: str = ""
    plain: bool = False


def run_replay(options: ReplayOptions) -> None:
    """To the end of the lines, or until the user leaves. Raises `ValueError` and `OSError` in one line."""
    ask = pinned(options.ask)
    if ask:  # before minutes of reading
        with in_time(PATIENCE, TimeoutError, f"it takes more than {PATIENCE:.0f} s to load"):
            load_policy(ask)
    record, names = choose_record(options.directory, options.run)
    screen = not options.plain and sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with Console(stderr=True).status(f"replaying {record.name}") if screen else contextlib.nullcontext():
        try:
            run = Run(record, ask)
        except StopIteration as error:
            raise ValueError(f"run {record.name}: one of its logs is cut before its first input") from error
        except GaveUp as error:
            raise TimeoutError(f"--ask {shown(ask)} does not answer: {error}") from error
    lanes = [lane.name for lane in run.lanes]
    if options.worker and options.worker not in lanes:
        raise ValueError(f"run {run.name} has no worker {options.worker!r}: there are {', '.join(lanes)}")
    if len(names) > 1:
        click.echo(f"run {run.name}; --run takes another of {', '.join(names)}", err=True)
    if screen:
        cursor = Cursor(run, lanes.index(options.worker) if options.worker else 0)
        cursor.index = run.lanes[cursor.lane].at(options.at or 0.0)
        asyncio.run(_live(cursor))
        lines: Iterator[str] = iter(())
    else:
        lines = _lines(run, options)
    for line in lines:
        click.echo(line)
    if ask:
        click.echo(f"asked {shown(ask)}, recorded {', '.join(run.policies)}")
    for line in run.summary():
        click.echo(line)


def _lines(run: Run, options: ReplayOptions) -> Iterator[str]:
    """By time. `--at`: of each worker the last step up to then."""
    lanes = [lane for lane in run.lanes if lane.name == options.worker or not options.worker]
    seen = [(step.time, number, step) for number, lane in enumerate(lanes) for step in lane.steps]
    if options.at is not None:
        seen = [(0.0, number, lane.steps[lane.at(options.at)]) for number, lane in enumerate(lanes)]
    for _, number, step in sorted(seen, key=lambda one: one[:2]):
        yield from plain(lanes[number], step)


async def _live(cursor: Cursor) -> None:
    # COLUMNS and LINES, where a shell has exported them, are true until the first change of size.
    console = Console(_environ={**os.environ, "COLUMNS": "", "LINES": ""})
    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    screen = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def draw() -> None:
        screen.update(frame(cursor, *console.size), refresh=True)

    def on_key(key: str) -> None:
        if key in ("q", "c-c"):
            leave.set()
        elif cursor.go(key):
            draw()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, leave.set)
    loop.add_signal_handler(signal.SIGWINCH, draw)
    with reading_keys(on_key, leave.set), screen:
        draw()
        await leave.wait()

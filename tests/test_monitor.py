"""The monitor: its numbers against the events they come from, its frames, and the program in a pseudo-terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pyte
import pytest
from fake_engine import fake_engine
from rich.cells import cell_len
from rich.console import Console
from serving import Serving, serving

from minidisagg.monitor.app import MonitorError, MonitorOptions, read_events, run_monitor
from minidisagg.monitor.keys import POLICIES, Post, SetLoad, Ui, press
from minidisagg.monitor.load import DemoLoad
from minidisagg.monitor.panels import duration, split
from minidisagg.monitor.state import BUCKET, SPAN, End, Event, Link, Snapshot, State, Stats, Step, Worker, decode
from minidisagg.monitor.view import frame

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "docs/data/monitor.jsonl.gz"
SIZES = ((80, 24), (120, 40), (200, 60), (40, 12), (20, 4))
SLO = {"ttft": 100.0, "tpot": 5.0}


def snapshot(clock: float = 100.0, seq: int = 10, **fields: Any) -> Snapshot:
    stats = Stats(
        running=7, waiting=2, offers=1, pages_free=50, pages_live=30, pages_cached=15, pages_inflight=4,
        pages_quarantined=1, clock=clock, links=[Link("decode-0", "shm", 10, 10**9, 0.5, failures=3, backlog=6)],
    )  # fmt: skip
    workers = [Worker("prefill-0", "prefill", "up", 1, 77, stats=stats), Worker("decode-0", state="down", epoch=4)]
    given = {
        "model": "a/model", "mode": "disagg", "policy": "fcfs", "workers": workers,
        "stages": {"waiting": 11, "prefilling": 2, "transferring": 3, "decode_waiting": 1, "decoding": 24},
        "oldest": {"waiting": 1.5, "decoding": 4.25},
        "latencies": {"ttft": [0.0123, 0.08, 0.345], "tpot": [], "itl": []},
        **fields,
    }  # fmt: skip
    return Snapshot(clock, seq, **given)


def text_of(state: State, ui: Ui | None = None, width: int = 120, height: int = 40) -> str:
    """The frame as plain text; every line is exactly as wide as asked."""
    console = Console(file=io.StringIO(), width=width, height=height, record=True, force_terminal=True)
    console.print(frame(state, ui or Ui(), width, height), end="")
    lines = console.export_text().splitlines()
    assert len(lines) == height
    assert [cell_len(line) for line in lines] == [width] * height
    return "\n".join(lines)


def state_of(*snapshots: Snapshot, slo: dict[str, float] | None = None) -> State:
    state = State(slo)
    for one in snapshots:
        state.apply(one)
    return state


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


# ---------------------------------------------------------------- state


@pytest.fixture(scope="module")
def recorded() -> list[bytes]:
    return list(read_events(RECORDED))


def test_numbers_are_those_of_the_recorded_events(recorded: list[bytes]) -> None:
    """Computed again, from the raw JSON and all of it at once."""
    state = State(SLO)
    for data in recorded:
        state.apply(decode(data))
    raw = [json.loads(data) for data in recorded]
    steps, ends, log = ([r for one in raw for r in one[name]] for name in ("steps", "ends", "events"))
    first, last = raw[0], raw[-1]
    assert len(steps) > 1000 and len(ends) > 100 and len(log) == 2

    assert [event.text for event in state.log] == [event["text"] for event in log]
    assert [end.id for end in state.ends] == [end["id"] for end in ends][-500:]
    met = sum(end["ttft"] <= 0.1 and end["tpot"] <= 0.005 and end["finish"] == "length" for end in ends)
    since = min(record["clock"] for record in steps + ends)
    assert last["clock"] - 60 < since <= first["clock"]
    assert state.goodput() == pytest.approx((met / (last["clock"] - since), met / len(ends), len(ends)))

    window = [one for one in raw if one["clock"] > last["clock"] - SPAN]
    before = raw[len(raw) - len(window) - 1]
    for name, rate in zip(("prompt_tokens", "generation_tokens"), state.tokens.rates(), strict=True):
        assert rate == pytest.approx((last[name] - before[name]) / (last["clock"] - before["clock"]))

    newest = int(last["clock"] / BUCKET)
    for worker in state.now.workers if state.now else []:
        mine = [step for step in steps if step["worker"] == worker.name]
        recent = [s for s in mine if newest - SPAN / BUCKET <= int(s["clock"] / BUCKET) < newest]
        tokens = sum(step["prefill_tokens"] + step["decode_tokens"] for step in recent)
        assert state.worker_tokens(worker.name) == pytest.approx(tokens / SPAN) and tokens
        longest: dict[int, float] = {}
        for step in mine:
            index = int(step["clock"] / BUCKET)
            longest[index] = max(longest.get(index, 0.0), step["seconds"])
        assert {b.index: b.longest.seconds for b in state.buckets[worker.name]} == longest

    links = [(one["clock"], link) for one in raw for w in one["workers"] if w["stats"] for link in w["stats"]["links"]]
    assert links[-1][1]["transfers"] > 10 and state.now is not None
    sender = state.now.workers[0]
    assert sender.stats is not None and sender.stats.links[0].bytes == links[-1][1]["bytes"]
    speed, piece = state.link_rates(sender, sender.stats.links[0])
    assert 1e4 < speed < 1e9 and piece is not None and 1e-5 < piece < 1.0


def test_rates_of_links_and_busy_share() -> None:
    def at(clock: float, moved: int, pieces: int, seconds: float, busy: float) -> Snapshot:
        stats = Stats(clock=clock, busy_seconds=busy, links=[Link("b", "shm", pieces, moved, seconds)])
        return snapshot(clock, workers=[Worker("a", "prefill", "up", 1, 7, stats=stats)])

    state = state_of(at(0.0, 0, 0, 0.0, 0.0), at(2.0, 0, 0, 0.0, 0.0))
    assert state.now is not None
    worker = state.now.workers[0]
    assert worker.stats is not None
    assert state.link_rates(worker, worker.stats.links[0]) == (0.0, None)
    for clock in (3.0, 7.5, 8.0):
        state.apply(at(clock, int(clock * 1e9), int(clock * 100), clock * 0.25, clock * 0.5))
    worker = state.now.workers[0]
    assert worker.stats is not None
    speed, piece = state.link_rates(worker, worker.stats.links[0])
    assert speed == pytest.approx(1e9) and piece == pytest.approx(0.0025)  # of 3.0 to 8.0 alone
    assert state.worker_busy(worker) == pytest.approx(0.5)
    state.apply(at(9.0, 0, 0, 0.0, 0.0))  # its counters start anew
    assert state.worker_busy(worker) is None


def test_a_reconnection_counts_nothing_twice_and_another_server_starts_anew() -> None:
    steps = [Step(n, 99.0, "a", 0.01, 0, 5) for n in (1, 2, 3)]
    ends = [End(4, 99.5, "x", "length")]
    events = [Event(5, 99.6, "hello")]
    state = state_of(snapshot(seq=5, steps=steps, ends=ends, events=events))
    state.apply(snapshot(100.1, 6, steps=steps, ends=ends, events=[*events, Event(6, 100.0, "again")]))
    assert state.worker_tokens("a") == 15 / SPAN and state.goodput()[2] == 1
    assert [event.text for event in state.log] == ["hello", "again"]
    state.apply(snapshot(101.0, 2, events=[Event(1, 100.9, "new")]))
    assert [event.text for event in state.log] == ["new"] and not state.ends and not state.buckets
    worker = Worker("prefill-0", "prefill", "up", 1, 78)
    state.apply(snapshot(101.5, 9, workers=[worker]))  # more records than before, but another process
    assert not state.log


def test_goodput_is_of_the_last_minute_and_leaves_aborted_requests_out() -> None:
    ends = [
        End(1, 10.0, "old", "length", ttft=0.01),
        End(2, 50.0, "good", "stop", ttft=0.1, tpot=0.005),
        End(3, 50.0, "late", "stop", ttft=0.1001),
        End(4, 50.0, "gone", "abort", ttft=0.01),
        End(5, 50.0, "error", "error"),
    ]
    assert state_of(snapshot(20.0, 5, ends=ends), slo=SLO).goodput() == (2 / 10, 2 / 4, 4)
    assert state_of(snapshot(71.0, 5, ends=ends), slo=SLO).goodput() == (1 / 60, 1 / 3, 3)
    assert state_of(snapshot(), slo=SLO).goodput() == (0.0, 0.0, 0)


# ---------------------------------------------------------------- view


@pytest.mark.parametrize("size", SIZES)
def test_no_line_is_wider_than_the_terminal(recorded: list[bytes], size: tuple[int, int]) -> None:
    state = state_of(*map(decode, recorded), slo=SLO)
    states = [State(), state_of(snapshot(workers=[])), state_of(snapshot(model="長い" * 99)), state]
    uis = [Ui(), Ui(load=5.0, lost="server gone"), Ui(mode="help"), Ui(mode="details"), Ui(mode="kill")]
    for one in states:
        for ui in [*uis, Ui(mode="filter", filter="x" * 300), *(Ui(panel=n) for n in range(1, 8))]:
            text_of(one, ui, *size)


def test_the_panels_show_the_numbers() -> None:
    ends = [
        End(3, 99.0, "cmpl-1", "length", 256, 64, 0.05, 0.004, 0.01, 1.0, {"queue": 0.25, "decode": 0.75}),
        End(4, 99.0, "cmpl-2", "length", 256, 64, 0.05, 0.004, 0.01, 2.0, {"prefill": 1.0, "decode": 1.0}),
    ]
    steps = [Step(1, 99.2, "prefill-0", 0.0123, 256, 0), Step(2, 99.3, "prefill-0", 0.045, 200, 300)]
    events = [Event(5, 88.0, "prefill-0 is up"), Event(6, 90.0, "evil \x1b[2J name")]
    state = state_of(
        snapshot(95.0, 0, prompt_tokens=1000, generation_tokens=50),
        snapshot(prompt_tokens=6000, generation_tokens=5050, steps=steps, ends=ends, events=events), slo=SLO,
    )  # fmt: skip
    text = text_of(state)
    assert re.search(r"^ 11 +█+\S? +2 +\S+ +3 +\S+ +1 +\S+ +24 +█{10,}", text, re.M)
    assert "oldest 1.50 s" in text and "oldest 4.25 s" in text
    assert re.search(r"TTFT +12.3 ms +80.0 ms +345 ms +≤ 100 ms", text)
    assert re.search(r"TPOT +- +- +- +≤ 5.00 ms", text)
    assert re.search(r"tokens +1,000 prompt/s +1,000 output/s", text)
    assert re.search(r"goodput +0.40 req/s +100.0% of 2 requests", text)
    row = line_with(text, "▸ prefill-0")
    assert re.search(r"prefill +up +1 +█+▓+▒+x+·+ +35% +7/3 +151 ", row)  # (256 + 500) tokens in 5 s
    assert re.search(r"decode-0 +down +4 +·+ *$", line_with(text, "  decode-0"))
    assert re.search(r"prefill-0 → decode-0 +0\.000 +50\.0 ms +6 +3 *$", line_with(text, "→ decode-0"))
    assert "max 45.0 ms" in text and "full height 50.0 ms" in text
    assert len(re.findall("█", line_with(text, "cmpl-1")[-45:])) * 2 == pytest.approx(
        len(re.findall("█", line_with(text, "cmpl-2")[-45:])), abs=1
    )
    assert "12 s ago  prefill-0 is up" in text and "evil ·[2J name" in text
    assert "evil" not in text_of(state, Ui(filter="IS UP"))
    details = text_of(state, Ui(mode="details", request="cmpl-1"))
    assert "256 prompt tokens, 64 output tokens" in details
    assert re.search(r"queue +250 ms +25.0%", details) and re.search(r"end to end +1.00 s", details)


def test_a_small_terminal_keeps_the_panels_of_worth(recorded: list[bytes]) -> None:
    state = state_of(*map(decode, recorded))
    small, large = text_of(state, width=80, height=24), text_of(state)
    shown = [name for name in ("pipeline", "latency", "workers", "links", "interference", "requests", "log")
             if re.search(rf"\d {name} ", small)]  # fmt: skip
    assert shown == ["pipeline", "latency", "workers", "links", "interference"]
    assert all(re.search(rf"{n} {name} ", large) for n, name in ((6, "requests"), (7, "log")))
    assert text_of(state, Ui(panel=6), 80, 24).splitlines()[1].startswith("─ 6 requests")


def test_colours_of_the_strip_tell_what_was_in_a_step() -> None:
    kinds = [(0, 9, "green"), (3, 9, "yellow"), (30, 9, "red"), (30, 0, "blue")]
    steps = [Step(n, 90.0 + n, "prefill-0", 0.01, *kind[:2]) for n, kind in enumerate(kinds, 1)]
    drawn = frame(state_of(snapshot(steps=steps)), Ui(panel=5), 120, 20)
    bottom = next(
        line for line in reversed(drawn.lines[:-2]) if any("█" in s.text and s.style.color for s in line if s.style)
    )
    assert [s.style.color.name for s in bottom if s.style and s.style.color] == [kind[2] for kind in kinds]


def test_colours_are_the_terminals_own(recorded: list[bytes]) -> None:
    """Neither black nor white, which vanish on one background or the other, nor any that a theme does not set."""
    state = state_of(*map(decode, recorded), slo=SLO)
    for ui in (Ui(lost="gone", load=1.0), Ui(mode="help"), Ui(mode="details"), Ui(mode="kill")):
        styles = {segment.style for line in frame(state, ui, 120, 40).lines for segment in line if segment.style}
        colours = {style.color.name for style in styles if style.color}
        assert colours <= {"red", "green", "yellow", "blue", "magenta", "cyan"}
        assert not any(style.bgcolor for style in styles)


def test_small_helpers() -> None:
    assert [duration(s) for s in (0.00042, 0.0123, 0.9996, 59.94, 599.0, 660.0, None)] == [
        "0.42 ms", "12.3 ms", "1.00 s", "59.9 s", "599 s", "11 min", "-",
    ]  # fmt: skip
    assert split([1, 0, 999, 1], 10) == [1, 0, 8, 1] and split([0, 0], 10) == [0, 0]
    assert split([1, 0, 999, 1], 10, least=0) == [0, 0, 10, 0]
    for cells in range(1, 30):
        for values in ([5, 1, 1, 1, 90], [1, 1, 1, 1, 1], [0, 0, 3, 0, 0], [1e-9, 1, 0, 0, 1e9]):
            assert sum(split(values, cells)) == cells


# ---------------------------------------------------------------- keys


def test_keys_ask_for_the_actions() -> None:
    state, ui = state_of(snapshot(ends=[End(n, 99.0, str(n), "stop") for n in (1, 2, 3)])), Ui(load=5.0)
    assert press(ui, " ", state) == Post("pause", "pause admission")
    assert press(ui, "m", state) == Post("mode", "mode colocated", {"mode": "colocated"})
    assert press(ui, "p", state) == Post("policy", "policy prefill_first", {"policy": "prefill_first"})
    assert press(ui, "f", state) == Post("workers/prefill-0/role", "prefill-0 becomes decode", {"role": "decode"})
    assert press(ui, "R", state) == Post("workers/prefill-0/restart", "restart prefill-0")
    assert press(ui, "K", state) is None and ui.mode == "kill"
    assert press(ui, "q", state) is None and ui.mode == "" and ui.status == "not killed"
    press(ui, "down", state), press(ui, "down", state), press(ui, "K", state)
    assert press(ui, "y", state) == Post("workers/decode-0/kill", "kill decode-0")
    assert press(ui, "+", state) == SetLoad(8.0) and press(ui, "-", state) == SetLoad(3.0)
    assert press(Ui(load=0.0), "-", state) == SetLoad(0.0)
    assert press(Ui(), "+", state) is None
    assert [press(ui, key, state) for key in ("s", "q", "c-c")] == ["save", "quit", "quit"]
    for key, request in (("left", "2"), ("left", "1"), ("left", "1"), ("right", "2"), ("escape", "")):
        press(ui, key, state)
        assert ui.request == request
    for key, panel in (("7", 7), ("7", 0), ("3", 3), ("1", 1), ("escape", 0)):
        press(ui, key, state)
        assert ui.panel == panel
    for key in "/a q":
        assert press(ui, key, state) is None
    press(ui, "c-h", state)
    assert ui.filter == "a "
    paused = state_of(snapshot(paused=True, mode="colocated", policy="sarathi:chunk=9"))
    assert press(Ui(), " ", paused) == Post("resume", "resume admission")
    assert press(Ui(), "m", paused) == Post("mode", "mode disagg", {"mode": "disagg"})
    assert press(Ui(), "p", paused) == Post("policy", f"policy {POLICIES[0]}", {"policy": POLICIES[0]})
    assert [press(Ui(), key, State()) for key in " mpfRK"] == [None] * 6  # nothing is known yet


# ---------------------------------------------------------------- load


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(partial(fake_engine, 100.0, workers=2)) as running:
        yield running


def test_demo_load_sends_at_its_rate(served: Serving) -> None:
    async def run() -> tuple[list[int], int, float]:
        """Requests sent by the end of each phase, failures, and the seconds of the one with a load."""
        connector, sent = aiohttp.TCPConnector(limit=0), []
        async with aiohttp.ClientSession(served.url, connector=connector) as session:
            load = DemoLoad(session, 0.0)
            task, set_at = asyncio.create_task(load.run()), []
            # What fell due before the rate became 0 is still sent: the last phase is the silent one.
            for rate, seconds in ((0.0, 0.05), (100.0, 0.8), (0.0, 0.2), (0.0, 0.2)):
                set_at.append(time.monotonic())
                load.set_rate(rate)
                await asyncio.sleep(seconds)
                sent.append(load.sent)
            await asyncio.gather(*load._running)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return sent, load.failed, set_at[2] - set_at[1]

    before = sum(worker.seen for worker in served.frontend.workers.values())
    (none, _, some, same), failed, seconds = asyncio.run(run())
    assert none == 0 and 70 * seconds < some < 130 * seconds and same == some and failed == 0
    assert sum(worker.seen for worker in served.frontend.workers.values()) - before == some


# ---------------------------------------------------------------- the program


class Terminal:
    """The monitor in a pseudo-terminal."""

    def __init__(self, args: Sequence[str | Path], cwd: Path, width: int = 120, height: int = 40) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.screen, self.raw = pyte.Screen(width, height), b""
        self.stream = pyte.ByteStream(self.screen)
        self.resize(width, height, tell=False)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minidisagg", "monitor", *map(str, args)], stdin=self.slave, stdout=self.slave,
            stderr=self.slave, cwd=cwd, env={**env, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip

    def resize(self, width: int, height: int, tell: bool = True) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.screen.resize(height, width)
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def read(self, seconds: float) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            data = os.read(self.master, 1 << 16)
            self.raw += data
            self.stream.feed(data)
            seconds = 0.0

    def press(self, keys: str, wanted: str = "") -> None:
        os.write(self.master, keys.encode())
        if wanted:
            self.wait(wanted)

    def wait(self, pattern: str, seconds: float = 15.0) -> None:
        """Until the screen shows it."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.text}"
            self.read(0.05)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def ended(self) -> int:
        """The exit code; the terminal must be as before."""
        end = time.monotonic() + 10
        while self.process.poll() is None:
            assert time.monotonic() < end, "it does not end"
            self.read(0.05)
        self.read(0.05)
        assert termios.tcgetattr(self.slave) == self.before
        assert self.raw.rfind(b"\x1b[?1049l") > self.raw.rfind(b"\x1b[?1049h") >= 0  # the alternate screen is left
        assert self.raw.rfind(b"\x1b[?25h") > self.raw.rfind(b"\x1b[?25l") >= 0  # the cursor is shown
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def terminal(*args: str | Path, cwd: Path, width: int = 120, height: int = 40) -> Iterator[Terminal]:
    opened = Terminal(args, cwd, width, height)
    try:
        yield opened
    finally:
        opened.close()


def test_every_key(served: Serving, tmp_path: Path) -> None:
    router = served.frontend.router
    record = tmp_path / "all.jsonl"
    flags = ("--goodput", "ttft:100 tpot:5", "--demo-load", "5", "--record", record)
    with terminal(served.url, *flags, cwd=tmp_path) as tty:
        tty.wait(r"load 5/s +● live")
        tty.press("+", "load 8/s")
        tty.press("-", "load 5/s")
        tty.press(" ", "admission paused")
        assert router.paused
        tty.press(" ", "resume admission: done")
        assert not router.paused
        tty.press("m", "mode disagg: done")
        tty.wait(r"worker-0 prefill +up[\s\S]*worker-1 decode +up")
        tty.press("p", "policy prefill_first: done")
        assert router.policy_spec == "prefill_first"
        tty.press("f", "worker-0 becomes decode: done")
        tty.wait("worker-0 decode +up")
        tty.press("f", "worker-0 prefill +up")
        tty.press("\x1b[B", "▸ worker-1")
        tty.press("K", r"kill worker-1\?.*y/n")
        tty.press("n", "not killed")
        tty.press("K", r"kill worker-1\?")
        tty.press("y", "kill worker-1: done")
        tty.wait("worker-1 is up, epoch 2")
        tty.press("R", "restart worker-1: done")
        tty.wait("worker-1 is up, epoch 3", 30)
        tty.press("\x1b[A", "▸ worker-0")
        tty.wait(r"00000\d\d +█.* s")
        tty.press("\x1b[D", "▸00000")
        tty.press("\r", "256 prompt tokens, 64 output tokens, end: length")
        tty.press("\x1b[C", "256 prompt tokens")
        tty.press("\x1b", "1 pipeline")
        for number, name in enumerate(
            ("pipeline", "latency", "workers", "links", "interference", "requests", "log"), 1
        ):
            tty.press(str(number), rf"^.*\n─ {number} {name} [^\n]*\n(?![\s\S]*─ \d)")
        tty.press("7", "1 pipeline")
        tty.press("/", "filter the log:")
        tty.press("paused\r", r"/paused 1 of \d+")
        assert "epoch 2" not in tty.text
        tty.press("?", "pause or resume admission: new requests wait")
        tty.press("?", "1 pipeline")
        tty.press("s", r"saved \d+ events to monitor-.*\.jsonl")
        tty.press("q")
        assert tty.ended() == 0
    saved = list(read_events(next(tmp_path.glob("monitor-*.jsonl"))))
    received = list(read_events(record))
    assert saved == received[: len(saved)] and len(received) > 20
    assert "admission paused" in [event.text for event in state_of(*map(decode, received)).log]


def test_resizing(served: Serving, tmp_path: Path) -> None:
    with terminal(served.url, cwd=tmp_path) as tty:
        tty.wait("7 log")
        tty.resize(80, 24)
        tty.wait(r"^(?=.{73}● live)(?![\s\S]*7 log)")
        tty.resize(150, 45)
        tty.wait(r"^(?=.{143}● live)(?=[\s\S]*7 log)")
        os.kill(tty.process.pid, signal.SIGTERM)
        assert tty.ended() == 0


def test_ctrl_c_and_errors_restore_the_terminal(served: Serving, tmp_path: Path, recorded: list[bytes]) -> None:
    with terminal(served.url, cwd=tmp_path) as tty:
        tty.wait("live")
        tty.press("\x03")
        assert tty.ended() == 0
    (tmp_path / "bad.jsonl").write_bytes(recorded[0] + b"\nnot JSON\n")
    with terminal("--replay", tmp_path / "bad.jsonl", cwd=tmp_path) as tty:
        assert tty.ended() == 2
        assert b"bad.jsonl, line 2: not an event" in tty.raw


def test_a_server_that_goes_and_comes_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    engine = partial(fake_engine, 30.0)
    with contextlib.ExitStack() as stack:
        with serving(engine, port=port) as first:
            tty = stack.enter_context(terminal(first.url, cwd=tmp_path))
            tty.wait("● live")
        tty.wait("server gone, reconnecting")
        tty.press(" ", "pause admission: Cannot connect")
        with serving(engine, port=port):
            tty.wait("● live")
            tty.press(" ", "pause admission: done")
        tty.wait("server gone, reconnecting")
        with serving(engine, port=port, api_keys=("secret",)):  # trying again is of no use
            assert tty.ended() == 1
        assert b"answers 401: the API key is missing or wrong (--api-key or $MINIDISAGG_API_KEY)" in tty.raw


def test_replay(tmp_path: Path, recorded: list[bytes]) -> None:
    (tmp_path / "short.jsonl").write_bytes(b"\n".join(recorded[-8:]))
    with terminal("--replay", tmp_path / "short.jsonl", cwd=tmp_path, width=80, height=24) as tty:
        tty.wait("the replay has ended")
        tty.press(" ", "pause admission: this is a replay")
        tty.press("q")
        assert tty.ended() == 0


def test_once(served: Serving, recorded: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_monitor(MonitorOptions(url=served.url, once=True))
    text = capsys.readouterr().out
    assert "1 pipeline" in text and "worker-1" in text and "\x1b" not in text
    run_monitor(MonitorOptions(url=served.url, once=True, as_json=True))
    assert [worker["name"] for worker in json.loads(capsys.readouterr().out)["workers"]] == ["worker-0", "worker-1"]
    run_monitor(MonitorOptions(replay=RECORDED, once=True, as_json=True))
    assert json.loads(capsys.readouterr().out) == json.loads(recorded[-1])
    run_monitor(MonitorOptions(replay=RECORDED, once=True))
    last = json.loads(recorded[-1])
    assert re.search(rf"decoding[\s\S]*\b{last['stages']['decoding']}\b", capsys.readouterr().out)
    (tmp_path / "empty").write_bytes(b"")
    for options, error in (
        (MonitorOptions(url="localhost:8000"), "not the address of a server"),
        (MonitorOptions(url=served.url + "/path"), "not the address of a server"),
        (MonitorOptions(as_json=True), "--json needs --once"),
        (MonitorOptions(demo_load=1.0, once=True), "--demo-load needs a live monitor"),
        (MonitorOptions(), "needs a terminal"),
        (MonitorOptions(once=True, replay=tmp_path / "empty"), "holds no event"),
    ):
        with pytest.raises(ValueError, match=error):
            run_monitor(options)
    with pytest.raises(MonitorError, match=r"no server answers at http://127.0.0.1:9 \(minidisagg serve starts one"):
        run_monitor(MonitorOptions(url="http://127.0.0.1:9", once=True))


def test_the_recording_is_small() -> None:
    assert RECORDED.stat().st_size < 200_000
    with gzip.open(RECORDED) as lines:
        assert sum(1 for _ in lines) > 100

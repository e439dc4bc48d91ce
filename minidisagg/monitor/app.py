"""`minidisagg monitor`: the terminal, the stream of events and the clock.

Tasks share `State` and `Ui`: one reads events (from the server or a file), one paints, at most ten times a second, and
one sends load once asked to. Keys come by callback. Whatever ends one of the first two ends all, and the terminal is
as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal, cast
from urllib.parse import urlsplit

import aiohttp
from msgspec import Struct
from rich.console import Console
from rich.live import Live

from minidisagg.address import parse_server_url
from minidisagg.admin_schema import Snapshot
from minidisagg.formats import VersionError
from minidisagg.monitor.keys import Action, Post, SetLoad, Ui, press
from minidisagg.monitor.load import DemoLoad
from minidisagg.monitor.reader import reading_keys
from minidisagg.monitor.state import State, decode
from minidisagg.monitor.view import frame

HZ = 10  # events and frames per second
SILENCE = 5.0  # seconds without an event: the server is gone
TIMEOUT = aiohttp.ClientTimeout(total=SILENCE)  # of everything but the events
BACKOFF = 0.25, 2.0  # seconds before the first and the later attempts to reconnect
KEPT_BYTES = 16 << 20  # of events, for `s`
MAX_EVENT = 16 << 20  # bytes
MAX_PAUSE = 5.0  # seconds between two events of a replay
STATUS = 5.0  # seconds for which the footer says what happened


class MonitorOptions(Struct, frozen=True, kw_only=True):
    """The flags of `minidisagg monitor`."""

    url: str = "http://127.0.0.1:8000"
    api_key: str = ""
    slo: dict[str, float] = {}  # milliseconds of ttft, tpot, itl, e2el; empty: a default
    demo_load: float | None = None  # requests per second
    record: Path | None = None
    replay: Path | None = None
    once: bool = False
    as_json: bool = False
    ended: Callable[[], str] = str  # says why a server that is gone will not come back; "" where nobody knows


class MonitorError(OSError):
    """The server cannot be watched; the text says why, in one line."""


def run_monitor(options: MonitorOptions) -> None:
    """Runs until the user or a signal ends it. Raises `ValueError` for options, `OSError` for files and the server."""
    try:
        if urlsplit(parse_server_url(options.url)).path:
            raise ValueError("it has a path")
    except ValueError as error:
        raise ValueError(f"{options.url!r} is not the address of a server: {error}") from None
    if options.as_json and not options.once:
        raise ValueError("--json needs --once")
    if options.demo_load is not None and (options.replay or options.once):
        raise ValueError("--demo-load needs a live monitor")
    if options.record and options.replay and options.record.resolve() == options.replay.resolve():
        raise ValueError(f"--record {options.record} would overwrite what --replay reads")
    if not options.once and not (sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"):
        raise ValueError("the monitor needs a terminal; without one: --once or --once --json")
    asyncio.run(_run(options))


async def _run(options: MonitorOptions) -> None:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(
        parse_server_url(options.url),
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=SILENCE),
        read_bufsize=MAX_EVENT,
    ) as session:
        with ExitStack() as files:
            monitor = Monitor(session, options, files)
            try:
                await (monitor.once() if options.once else monitor.live())
            except (aiohttp.ClientError, TimeoutError) as error:
                raise MonitorError(f"the server at {options.url} is gone: {error}") from None


class Monitor:
    """One run of the monitor."""

    def __init__(self, session: aiohttp.ClientSession, options: MonitorOptions, files: ExitStack) -> None:
        self.options, self.session, self.files = options, session, files
        self.state, self.ui = State(options.slo), Ui()
        self.load: DemoLoad | None = None
        self._record: IO[bytes] | None = None
        self._received: deque[bytes] = deque()  # the latest events, at most KEPT_BYTES
        self._bytes = 0
        self._changed, self._quit = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # the load, and what keys asked for

    # ------------------------------------------------------------ without a screen

    async def once(self) -> None:
        """Print what there is, as JSON or as a frame: the last one of a file, the server's after a second of events."""
        if self.options.replay is not None:
            for data in read_events(self.options.replay):
                self._take(data)
        elif self.options.as_json:
            self._take(await self._get("/admin/state"))
        else:
            await self._get("/admin/state")
            began = time.monotonic()
            async with contextlib.aclosing(self._events()) as events:
                async for data in events:
                    self._take(data)
                    if time.monotonic() - began > 1.0:
                        break
        if not self._received:
            raise ValueError(f"{self.options.replay or self.options.url} holds no event")
        if self.options.as_json:
            sys.stdout.buffer.write(self._received[-1] + b"\n")  # UTF-8, whatever the terminal has
            return
        console = Console()
        self.ui.live = "once"
        height = console.height - 1 if console.is_terminal else 40
        console.print(frame(self.state, self.ui, console.width, height), end="")

    # ------------------------------------------------------------ full screen

    async def live(self) -> None:
        """The full-screen monitor."""
        if self.options.replay is None:
            await self._get("/admin/state")  # early and in one line, before the screen is taken
        # COLUMNS and LINES, where a shell has exported them, are true until the first change of size.
        console = Console(_environ={**os.environ, "COLUMNS": "", "LINES": ""})
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._quit.set)
        loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
        if self.options.demo_load is not None:
            self._set_load(self.options.demo_load)
        screen = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        with reading_keys(self._on_key, self._quit.set), screen:
            work: list[Coroutine[Any, Any, Any]] = [self._quit.wait(), self._follow(), self._paint(console, screen)]
            tasks = [asyncio.create_task(one) for one in work]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in [*tasks, *self._tasks]:
                    task.cancel()
                await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _paint(self, console: Console, screen: Live) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # statuses end while nothing happens, too
                    await self._changed.wait()
            self._changed.clear()
            if time.monotonic() - self.ui.said > STATUS:
                self.ui.status = ""
            self.ui.trouble = self.load.trouble if self.load is not None else ""
            screen.update(frame(self.state, self.ui, *console.size), refresh=True)
            await asyncio.sleep(0.95 / HZ)

    # ------------------------------------------------------------ events

    async def _follow(self) -> None:
        if self.options.replay is not None:
            return await self._replay(self.options.replay)
        delay = BACKOFF[0]
        while True:
            try:
                async for data in self._events():
                    self._take(data)
                    if self.ui.lost:
                        self.ui.say("connected again")
                    self.ui.lost, delay = "", BACKOFF[0]
                what, reason = "gone", "it ended the stream"
            except TimeoutError:
                what, reason = "hangs", f"no event for {SILENCE:g} s"
            except VersionError as error:  # to try again would not help
                raise MonitorError(f"{self.options.url}: {error}") from None
            except (aiohttp.ClientError, ValueError) as error:
                what, reason = "gone", str(error) or type(error).__name__
            if why := self.options.ended():
                raise MonitorError(why)
            self.ui.lost = f"server {what}, reconnecting"
            self.ui.say(f"server {what}: {reason}", failed=True)
            self._changed.set()
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF[1])

    async def _replay(self, path: Path) -> None:
        self.ui.live = "replay"
        clock = None
        for data in read_events(path):
            snapshot = decode(data)
            await asyncio.sleep(min(max(snapshot.clock - (clock or snapshot.clock), 0.0), MAX_PAUSE))
            clock = snapshot.clock
            self._take(data, snapshot)
        self.ui.say("the replay has ended")
        self._changed.set()
        await self._quit.wait()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """The JSON of each event of the server. Raises `MonitorError` where trying again is of no use."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        async with self.session.get(f"/admin/events?hz={HZ}", timeout=timeout) as answer:
            await _check(answer)
            while data := await answer.content.readuntil(b"\n\n"):
                yield data.removeprefix(b"data: ").strip()

    async def _get(self, path: str) -> bytes:
        """An answer that is a snapshot, or `MonitorError`."""
        try:
            async with self.session.get(path, timeout=TIMEOUT) as answer:
                await _check(answer)
                data = await answer.read()
                decode(data)
                return data
        except VersionError as error:
            raise MonitorError(f"{self.options.url}: {error}") from None
        except ValueError:
            raise MonitorError(f"what answers at {self.options.url} is no minidisagg server") from None
        except (aiohttp.ClientError, TimeoutError):
            where = f"{self.options.url} (minidisagg serve starts one, minidisagg monitor URL names another)"
            raise MonitorError(f"no server answers at {where}") from None

    def _take(self, data: bytes, snapshot: Snapshot | None = None) -> None:
        self.state.apply(snapshot or decode(data))
        if (path := self.options.record) is not None:
            if self._record is None:  # with the first event: without one, no empty file
                self._record = self.files.enter_context(_open(path, "wb"))
            self._record.write(data + b"\n")
        self._received.append(data)
        self._bytes += len(data)
        while self._bytes > KEPT_BYTES:
            self._bytes -= len(self._received.popleft())
        self._changed.set()

    # ------------------------------------------------------------ keys

    def _on_key(self, key: str) -> None:
        if (action := press(self.ui, key, self.state)) is not None:
            self._act(action)
        self._changed.set()

    def _act(self, action: Action) -> None:
        if action == "quit":
            self._quit.set()
        elif self.options.replay is not None:
            self.ui.say("this is a replay: nothing is done", failed=True)
        elif isinstance(action, SetLoad):
            self._set_load(action.rate)
        elif isinstance(action, Post):
            self.ui.say(f"{action.label} …")
            self._start(self._post(action))
        else:
            self._start(self._save())

    def _set_load(self, rate: float) -> None:
        if self.load is None:
            self.load = DemoLoad(self.session, rate)
            self._start(self.load.run())
        self.load.set_rate(rate)
        self.ui.load = rate
        self.ui.say(f"load {rate:g} requests/s, {self.load.sent} sent so far")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _post(self, action: Post) -> None:
        try:
            async with self.session.post(f"/admin/{action.path}", json=action.body, timeout=TIMEOUT) as answer:
                error = "" if answer.status == 200 else await _message(answer)
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = str(failure) or "no answer"
        self.ui.say(f"{action.label}: {error or 'done'}", failed=bool(error))
        self._changed.set()

    async def _save(self) -> None:
        name, events = Path(time.strftime("monitor-%Y%m%d-%H%M%S.jsonl")), list(self._received)
        try:
            await asyncio.to_thread(name.write_bytes, b"".join(data + b"\n" for data in events))
            async with self.session.get("/admin/trace", timeout=TIMEOUT) as answer:
                answer.raise_for_status()
                await asyncio.to_thread(name.with_suffix(".trace.json").write_bytes, await answer.read())
            self.ui.say(f"saved {len(events)} events: {name} and .trace.json")
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            self.ui.say(f"not all is saved: {error}", failed=True)
        self._changed.set()


def _open(path: Path, mode: Literal["rb", "wb"]) -> IO[bytes]:
    """Gzipped if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path, mode)) if path.suffix == ".gz" else path.open(mode)


def read_events(path: Path) -> Iterator[bytes]:
    """The lines of a recording, up to where its writer was killed. Raises `ValueError` at one that is none."""
    with _open(path, "rb") as lines, contextlib.suppress(EOFError):
        for number, line in enumerate(lines, 1):
            try:
                decode(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield line.strip()


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status in (401, 404, 405):
        hint = " (--api-key or $MINIDISAGG_API_KEY)" if answer.status == 401 else ""
        raise MonitorError(f"{answer.url.origin()} answers {answer.status}: {await _message(answer)}{hint}")
    answer.raise_for_status()


async def _message(answer: aiohttp.ClientResponse) -> str:
    """What the server's error body says, in one line."""
    try:
        text = str((await answer.json(content_type=None))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = answer.reason or str(answer.status)
    return " ".join(text.split())[:200]

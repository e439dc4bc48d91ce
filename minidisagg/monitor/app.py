"""`minidisagg monitor`: the terminal, the stream of events and the clock.

Three tasks share `State` and `Ui`: one reads events (from the server or a file), one sends load if asked to, and one
paints, at most ten times a second. Keys come by callback. Whatever ends one of them ends all, and the terminal is as
it was.
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
from collections.abc import AsyncGenerator, Coroutine, Iterator
from enum import Enum
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Struct
from prompt_toolkit.input import Input, create_input
from rich.console import Console
from rich.live import Live

from minidisagg.monitor.keys import Action, Post, SetLoad, Ui, press
from minidisagg.monitor.load import DemoLoad
from minidisagg.monitor.state import Snapshot, State, decode
from minidisagg.monitor.view import frame

HZ = 10  # events and frames per second
SILENCE = 5.0  # seconds without an event: the server is gone
BACKOFF = 0.25, 2.0  # seconds before the first and the later attempts to reconnect
KEPT_BYTES = 16 << 20  # of events, for `s`
MAX_EVENT = 16 << 20  # bytes
MAX_PAUSE = 5.0  # seconds between two events of a replay
ESCAPE = 0.05  # seconds after which an escape is the key, not the start of a sequence


class MonitorOptions(Struct, frozen=True, kw_only=True):
    """The flags of `minidisagg monitor`."""

    url: str = "http://127.0.0.1:8000"
    api_key: str = ""
    slo: dict[str, float] = {}  # milliseconds of ttft, tpot, itl, e2el
    demo_load: float | None = None  # requests per second
    record: Path | None = None
    replay: Path | None = None
    once: bool = False
    as_json: bool = False


class MonitorError(OSError):
    """The server cannot be watched; the text says why, in one line."""


def run_monitor(options: MonitorOptions) -> None:
    """Runs until the user or a signal ends it. Raises `ValueError` for options, `OSError` for files and the server."""
    address = urlsplit(options.url)
    if address.scheme not in ("http", "https") or not address.hostname or address.path.strip("/") not in ("", "v1"):
        raise ValueError(f"{options.url!r} is not the address of a server, like http://127.0.0.1:8000")
    if options.as_json and not options.once:
        raise ValueError("--json needs --once")
    if options.demo_load is not None and (options.replay or options.once):
        raise ValueError("--demo-load needs a live monitor")
    if not options.once and not (sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"):
        raise ValueError("the monitor needs a terminal; without one: --once or --once --json")
    asyncio.run(_run(options))


async def _run(options: MonitorOptions) -> None:
    address = urlsplit(options.url)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(
        f"{address.scheme}://{address.netloc}", headers=headers, connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=SILENCE), read_bufsize=MAX_EVENT,
    ) as session:  # fmt: skip
        with options.record.open("wb") if options.record else contextlib.nullcontext() as record:
            monitor = Monitor(session, options, record)
            try:
                await (monitor.once() if options.once else monitor.live(Console()))
            except aiohttp.ClientError as error:
                raise MonitorError(f"the server at {options.url} is gone: {error}") from None


class Monitor:
    """One run of the monitor."""

    def __init__(self, session: aiohttp.ClientSession, options: MonitorOptions, record: IO[bytes] | None) -> None:
        self.options, self.session, self.record = options, session, record
        self.state, self.ui = State(options.slo), Ui(load=options.demo_load)
        self.load = DemoLoad(session, options.demo_load) if options.demo_load is not None else None
        self._received: deque[bytes] = deque()  # the latest events, at most KEPT_BYTES
        self._bytes = 0
        self._changed, self._quit = asyncio.Event(), asyncio.Event()
        self._posts: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ without a screen

    async def once(self) -> None:
        """Print what there is, as JSON or as a frame: the last one of a file, the server's after a second of events."""
        if self.options.replay is not None:
            recorded = list(read_events(self.options.replay))
            if not recorded:
                raise ValueError(f"{self.options.replay} holds no event")
            for data in recorded:
                self._take(data)
            raw = recorded[-1]
        elif self.options.as_json:
            raw = await self._get("/admin/state")
        else:
            raw, began = await self._get("/admin/state"), time.monotonic()
            async with contextlib.aclosing(self._events()) as events:
                async for raw in events:
                    self._take(raw)
                    if time.monotonic() - began > 1.0:
                        break
        if self.options.as_json:
            sys.stdout.write(raw.decode() + "\n")
            return
        console = Console()
        self.ui.live = "once"
        height = console.height - 1 if console.is_terminal else 40
        console.print(frame(self.state, self.ui, console.width, height), end="")

    # ------------------------------------------------------------ full screen

    async def live(self, console: Console) -> None:
        """The full-screen monitor."""
        if self.options.replay is None:
            decode(await self._get("/admin/state"))  # early and in one line, before the screen is taken
        loop, source = asyncio.get_running_loop(), create_input(sys.stdin)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._quit.set)
        loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
        work: list[Coroutine[Any, Any, Any]] = [self._quit.wait(), self._follow()]
        if self.load is not None:
            work.append(self.load.run())
        screen = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        with source.raw_mode(), source.attach(lambda: self._on_input(source, loop)), screen:
            tasks = [asyncio.create_task(one) for one in [*work, self._paint(console, screen)]]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in [*tasks, *self._posts]:
                    task.cancel()
                await asyncio.gather(*tasks, *self._posts, return_exceptions=True)
        for task in done:
            task.result()

    async def _paint(self, console: Console, screen: Live) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
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
                    self.ui.lost, delay = "", BACKOFF[0]
                reason = "it ended the stream"
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                reason = str(error) or type(error).__name__
            self.ui.lost = "server gone, reconnecting"
            self.ui.say(f"server gone: {reason}", failed=True)
            self._changed.set()
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF[1])

    async def _replay(self, path: Path) -> None:
        self.ui.live = "replay"
        for data in read_events(path):
            before = self.state.now
            after = decode(data)
            if before is not None:
                await asyncio.sleep(min(max(after.clock - before.clock, 0.0), MAX_PAUSE))
            self._take(data, after)
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
        try:
            async with self.session.get(path, timeout=aiohttp.ClientTimeout(total=SILENCE)) as answer:
                await _check(answer)
                return await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            where = f"{self.options.url} (minidisagg serve starts one, minidisagg monitor URL names another)"
            raise MonitorError(f"no server answers at {where}") from None

    def _take(self, data: bytes, snapshot: Snapshot | None = None) -> None:
        self.state.apply(snapshot or decode(data))
        if self.record is not None:
            self.record.write(data + b"\n")
        self._received.append(data)
        self._bytes += len(data)
        while self._bytes > KEPT_BYTES:
            self._bytes -= len(self._received.popleft())
        self._changed.set()

    # ------------------------------------------------------------ keys

    def _on_input(self, source: Input, loop: asyncio.AbstractEventLoop) -> None:
        keys = source.read_keys()
        if source.closed:
            self._quit.set()
        loop.call_later(ESCAPE, lambda: self._on_keys(source.flush_keys()))
        self._on_keys(keys)

    def _on_keys(self, keys: list[Any]) -> None:
        for key in keys:
            name = key.key.value if isinstance(key.key, Enum) else key.key
            if (action := press(self.ui, name, self.state)) is not None:
                self._act(action)
            self._changed.set()

    def _act(self, action: Action) -> None:
        if action == "quit":
            self._quit.set()
        elif action == "save":
            self._save()
        elif isinstance(action, SetLoad) and self.load is not None:
            self.load.set_rate(action.rate)
            self.ui.load = action.rate
            failed = f", {self.load.failed} failed" if self.load.failed else ""
            self.ui.say(f"load {action.rate:g} requests/s ({self.load.sent} sent{failed})")
        elif isinstance(action, Post):
            if self.options.replay is not None:
                return self.ui.say(f"{action.label}: this is a replay", failed=True)
            self.ui.say(f"{action.label} …")
            task = asyncio.get_running_loop().create_task(self._post(action))
            self._posts.add(task)
            task.add_done_callback(self._posts.discard)

    async def _post(self, action: Post) -> None:
        timeout = aiohttp.ClientTimeout(total=SILENCE)
        try:
            async with self.session.post(f"/admin/{action.path}", json=action.body, timeout=timeout) as answer:
                error = "" if answer.status == 200 else await _message(answer)
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = str(failure) or "no answer"
        self.ui.say(f"{action.label}: {error or 'done'}", failed=bool(error))
        self._changed.set()

    def _save(self) -> None:
        path = Path(time.strftime("monitor-%Y%m%d-%H%M%S.jsonl"))
        try:
            path.write_bytes(b"".join(data + b"\n" for data in self._received))
        except OSError as error:
            return self.ui.say(f"not saved: {error}", failed=True)
        self.ui.say(f"saved {len(self._received)} events to {path}, for --replay")


def read_events(path: Path) -> Iterator[bytes]:
    """The lines of a recording, gzipped if its name ends in .gz. Raises `ValueError` at one that is none."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                decode(line)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}, line {number}: not an event of the monitor: {error}") from None
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

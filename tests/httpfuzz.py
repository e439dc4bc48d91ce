"""Runs the cases of `httpcases` against a server over raw sockets and checks every answer.

Of every case: the server sends valid HTTP or nothing, never a status of 500 or above, and from 400 on the OpenAI
error body. `Apart` runs the fuzzer, or a client that behaves well, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvloop
from httpcases import Case, good, is_malformed, make_case

ANSWER_TIMEOUT = 20.0  # seconds for an answer that must come
LINGER = 0.03  # seconds to wait where none need come
ERROR_TYPES = {
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error",
}  # fmt: skip


@dataclass
class Answer:
    """One parsed answer."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Summary:
    """What a run saw: how often each kind of case ended in each status (0: no answer)."""

    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    malformed: int = 0  # cases; the rest is well-formed, or was answered as if it were
    failures: list[str] = field(default_factory=list)

    @property
    def statuses(self) -> set[int]:
        return {status for _, status in self.seen}


class Broken(AssertionError):
    """The server broke a rule."""


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readuntil(b"\r\n")
    return line[:-2]


async def read_answer(reader: asyncio.StreamReader, head: bool = False) -> Answer | None:
    """One answer; None where the connection ends before it begins. Raises `Broken` where it is no HTTP."""
    while True:
        try:
            line = await _line(reader)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        version, _, rest = line.partition(b" ")
        if not re.fullmatch(rb"HTTP/\d\.\d", version) or not rest[:3].isdigit():  # aiohttp says the request's version
            raise Broken(f"not a status line: {line[:100]!r}")
        status, headers = int(rest[:3]), {}
        while line := await _line(reader):
            name, colon, value = line.partition(b":")
            if not colon or not name.strip():
                raise Broken(f"not a header: {line[:100]!r}")
            headers[name.decode("ascii").lower()] = value.strip().decode("ascii")
        if status >= 200:
            break
    body = bytearray()
    if head or status in (204, 304):
        pass
    elif headers.get("transfer-encoding") == "chunked":
        while size := int(await _line(reader), 16):
            body += await reader.readexactly(size)
            if await _line(reader):
                raise Broken("a chunk does not end where it says")
        await _line(reader)
    elif "content-length" in headers:
        body += await reader.readexactly(int(headers["content-length"]))
    else:
        body += await reader.read()
    return Answer(status, headers, bytes(body))


def check_answer(answer: Answer, case: Case) -> None:
    """Raises `Broken`."""
    if answer.status >= 500:
        raise Broken(f"status {answer.status}: {answer.body[:300]!r}")
    if case.statuses and answer.status not in case.statuses:
        raise Broken(f"status {answer.status} is none of {sorted(case.statuses)}: {answer.body[:300]!r}")
    if case.head:
        return
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if answer.status >= 400:
        check_error(answer.body, kind)
    elif kind == "application/json":
        whole = json.loads(answer.body)
        if case.choices:
            _check_whole(whole, case.choices)
    elif kind == "text/event-stream":
        check_stream(answer.body, case.choices)


def check_error(body: bytes, kind: str) -> None:
    """The body that OpenAI's clients expect."""
    try:
        error = json.loads(body)["error"]
        right = (
            kind == "application/json" and set(error) == {"message", "type", "param", "code"} and error["message"]
            and error["type"] in ERROR_TYPES and all(isinstance(error[key], str | None) for key in error)
            and isinstance(error["message"], str)
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise Broken(f"not the error body ({kind}): {body[:300]!r}")


def check_stream(body: bytes, choices: int) -> None:
    """Events, each choice with one end, and the mark."""
    events = body.decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        raise Broken(f"the stream does not end well: {body[-300:]!r}")
    ends: Counter[int] = Counter()
    for event in events[:-2]:
        if not event.startswith("data: "):
            raise Broken(f"not an event: {event[:100]!r}")
        for choice in json.loads(event[6:])["choices"]:
            if ends[choice["index"]]:
                raise Broken(f"choice {choice['index']} goes on after its end")
            ends[choice["index"]] += choice["finish_reason"] is not None
    if choices and (len(ends) != choices or set(ends.values()) != {1}):
        raise Broken(f"{choices} choices ended so: {dict(ends)}")


def _check_whole(whole: dict[str, Any], choices: int) -> None:
    if [choice["index"] for choice in whole["choices"]] != list(range(choices)):
        raise Broken(f"not {choices} choices: {str(whole)[:300]}")
    times, usage = whole["metrics"], whole["usage"]
    if abs(sum(value for stage, value in times.items() if stage != "e2e") - times["e2e"]) > 1e-6:
        raise Broken(f"stage times do not add up: {times}")
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"] or not usage["completion_tokens"]:
        raise Broken(f"usage does not add up: {usage}")


async def run_case(case: Case, port: int) -> list[int]:
    """Send it and check what comes; the statuses, or [0]. Raises `Broken`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    statuses: list[int] = []
    try:
        middle = len(case.data) // 2 if case.pause else 0
        writer.write(case.data[:middle])
        await asyncio.sleep(case.pause)
        writer.write(case.data[middle:])
        if case.half_close:
            writer.write_eof()
        if case.leave_after >= 0:
            if case.leave_after:
                await reader.read(case.leave_after)
            writer.transport.abort()
            return [0]
        await writer.drain()
        async with asyncio.timeout(ANSWER_TIMEOUT if case.answers else LINGER):
            while not case.answers or len(statuses) < case.answers:
                answer = await read_answer(reader, case.head)
                if answer is None:
                    break
                check_answer(answer, case)
                statuses.append(answer.status)
    except TimeoutError:
        if case.answers:
            raise Broken(f"{len(statuses)} of {case.answers} answers within {ANSWER_TIMEOUT} s") from None
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        if case.answers:
            raise Broken(f"{type(error).__name__} instead of an answer") from None
    finally:
        writer.transport.abort()
    if len(statuses) < case.answers:
        raise Broken(f"the server closed after {len(statuses)} of {case.answers} answers")
    return statuses or [0]


async def fuzz(port: int, seed: int, count: int, concurrency: int = 16) -> Summary:
    """Run the cases [0, count) of a seed; stops at ten failures."""
    summary = Summary()
    indices = iter(range(count))

    async def work() -> None:
        for index in indices:
            name, case = make_case(seed, index)
            try:
                statuses = await run_case(case, port)
                summary.malformed += is_malformed(name, statuses)
                for status in statuses:
                    summary.seen[name, status] += 1
            except Broken as error:
                summary.failures.append(f"seed {seed} case {index} ({name}): {error}\n  sent {case.data[:600]!r}")
            if len(summary.failures) >= 10:
                return

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return summary


async def behave(port: int, seconds: float, every: float = 0.05, tokens: int = 8) -> list[float]:
    """One short request every `every` seconds, however long the others take; from when each was due to its end."""
    case = Case(good(max_tokens=tokens, ignore_eos=True), 1, frozenset({200}), choices=1)
    took, began = list[float](), time.monotonic()

    async def one(due: float) -> None:
        await run_case(case, port)
        took.append(time.monotonic() - due)

    async with asyncio.TaskGroup() as tasks:
        for turn in range(int(seconds / every)):
            due = began + turn * every
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.create_task(one(due))
    return took


class Apart:
    """`work(*arguments)`, a coroutine function of a module, in another process."""

    def __init__(
        self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any, cpus: set[int], nice: int = 0
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_apart, args=(theirs, work, arguments, cpus, nice), daemon=True)
        self._process.start()
        theirs.close()

    async def result(self) -> Any:
        """Waits for it. Raises `EOFError` where the process died."""
        found = await asyncio.to_thread(self._pipe.recv)
        await asyncio.to_thread(self._process.join)
        return found


def _apart(
    pipe: Any, work: Callable[..., Coroutine[Any, Any, Any]], arguments: tuple[Any, ...], cpus: set[int], nice: int
) -> None:
    os.sched_setaffinity(0, cpus)
    os.nice(nice)
    pipe.send(uvloop.run(work(*arguments)))

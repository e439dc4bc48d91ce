"""The HTTP server under malformed and hostile requests, over an engine that makes tokens up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import httpcases
import httpfuzz
import hypothesis
import pytest
import requests
import uvloop
from cluster import needs_two_cores
from fake_engine import MODEL, FakeFrontend, fake_server
from httpcases import CANARY, KEY, Case, good, request
from httpfuzz import Apart, behave, run_case

from minidisagg.server import app, completions, connections, generation
from minidisagg.server.app import Server, ServerSettings
from minidisagg.server.openapi import describe

T = TypeVar("T")
KEYED = ServerSettings(port=0, api_keys=("other-key", KEY))


async def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until `holds`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def clean_server(rate: float = 0.0, model: str = MODEL) -> AsyncIterator[tuple[Server, FakeFrontend, int]]:
    """A server with keys; afterwards nothing is left of any request, and it still answers."""
    loop, unhandled = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    async with fake_server(KEYED, rate, model) as (server, frontend, port):
        before = len(asyncio.all_tasks())
        yield server, frontend, port
        await eventually(lambda: frontend.idle and server.active == 0 and len(asyncio.all_tasks()) <= before)
        frontend.router.check_integrity()
        assert await run_case(Case(good(), 1, frozenset({200}), choices=1), port) == [200]
    assert not unhandled


def assert_secret(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a prompt nor the key, in any record or traceback."""
    assert CANARY not in caplog.text and KEY not in caplog.text


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a fuzzer reaches quickly."""
    monkeypatch.setattr(app, "MAX_BODY", httpcases.MAX_BODY)
    monkeypatch.setattr(app, "READ_TIMEOUT", httpcases.READ_TIMEOUT)


async def _fuzz(seed: int, count: int) -> httpfuzz.Summary:
    async with clean_server(rate=500.0) as (_, frontend, port):
        summary = await httpfuzz.fuzz(port, seed, count)
        check_fuzzed(summary, frontend)
    return summary


def check_fuzzed(summary: httpfuzz.Summary, frontend: FakeFrontend) -> None:
    """No rule was broken, and the fuzzer reached what it is there to reach: else it proves nothing."""
    assert not summary.failures, "\n".join(summary.failures)
    assert summary.statuses >= {0, 200, 400, 401, 404, 405, 408, 413}
    assert {name for name, _ in summary.seen} == {kind.__name__.strip("_") for kind, _ in httpcases.KINDS}
    assert sum(worker.aborted for worker in frontend.workers.values()) > 0  # some clients left in the middle


class CheckedLog(logging.Handler):
    """No error, no line that a client has forged, no secret; keeps nothing, since a growing heap slows this process."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.wrong: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        text = self.format(record)
        forged = "\n" in record.getMessage()  # a path cannot forge a line
        if record.levelno >= logging.ERROR or forged or CANARY in text or KEY in text:
            self.wrong.append(text)

    def __enter__(self) -> CheckedLog:
        root = logging.getLogger()
        self._before = root.handlers, root.level
        root.handlers = [self]
        root.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.handlers, level = self._before
        root.setLevel(level)
        assert self.count > 0 and not self.wrong, self.wrong[:10]


def on_uvloop(work: Coroutine[Any, Any, T]) -> T:
    """On the event loop that `serve` uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def test_raw_requests(small: None) -> None:
    with CheckedLog():
        summary = on_uvloop(_fuzz(1, 3600))
    sys.stdout.write(f"{summary.malformed} malformed requests\n")
    assert summary.malformed >= 1500


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_two_cores
def test_many_raw_requests(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    """From another process, while a client that behaves well asks for 8 tokens every 50 ms, in 80 ms at best."""
    window = 10.0  # seconds; the medians over windows, since this machine may do other things too

    def p99(took: list[float]) -> float:
        return statistics.quantiles(took, n=100)[-1]

    async def run() -> tuple[httpfuzz.Summary, float, list[float], list[float]]:
        alone, beside = list[float](), list[float]()
        async with clean_server(rate=100.0) as (_, frontend, port):
            for _ in range(3):
                alone.append(p99(await Apart(behave, port, window, cpus=others).result()))
            began = time.monotonic()
            fuzzing = asyncio.create_task(Apart(httpfuzz.fuzz, port, 2, 170_000, cpus=others, nice=10).result())
            while not fuzzing.done():
                beside.append(p99(await Apart(behave, port, window, cpus=others).result()))
            took = time.monotonic() - began
            summary = await fuzzing
            for _ in range(3):
                alone.append(p99(await Apart(behave, port, window, cpus=others).result()))
            check_fuzzed(summary, frontend)
        return summary, took, alone, beside[:-1]  # in the last one the fuzzer ended

    cores = os.sched_getaffinity(0)
    others = cores - {min(cores)}
    os.sched_setaffinity(0, {min(cores)})  # the server has a core of its own
    gc.collect()
    gc.freeze()  # as `serve` does
    try:
        with CheckedLog():
            summary, took, alone, beside = on_uvloop(run())
    finally:
        os.sched_setaffinity(0, cores)
        gc.unfreeze()
    before, with_fuzzer = statistics.median(alone), statistics.median(beside)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{summary.malformed} malformed requests in {took:.0f} s, 0 failures; p99 of a healthy client "
            f"{1e3 * before:.0f} ms alone, {1e3 * with_fuzzer:.0f} ms beside the fuzzer: {with_fuzzer / before:.2f}x "
            f"(alone {[round(1e3 * value) for value in alone]}, beside {[round(1e3 * value) for value in beside]})\n"
        )
    assert summary.malformed >= 100_000
    assert with_fuzzer < 2 * before


def _is_negative(case: Any) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_negative


@pytest.mark.parametrize("examples", [30, pytest.param(250, marks=pytest.mark.slow)])
def test_requests_made_from_the_description(examples: int, caplog: pytest.LogCaptureFixture) -> None:
    """Schemathesis: what fits the OpenAPI description and what does not; all answers are as the description says."""
    import schemathesis  # here, because it takes a second
    from schemathesis.checks import positive_data_acceptance
    from schemathesis.core.result import Ok

    caplog.set_level(logging.DEBUG)
    excluded = [positive_data_acceptance]  # what depends on two fields or on the model is not in a schema
    statuses: Counter[int] = Counter()
    malformed = 0
    described = describe() | {"security": []}  # else wrong keys are most of what it makes
    session = requests.Session()
    with asyncio.Runner() as runner:
        running = clean_server(model="dummy:tiny,max_len=64")
        _, _, port = runner.run(running.__aenter__())
        session.headers["Authorization"] = f"Bearer {KEY}"
        for result in schemathesis.openapi.from_dict(described).get_all_operations():
            assert isinstance(result, Ok)
            operation = result.ok()
            for mode in schemathesis.GenerationMode:
                if mode.is_negative and not operation.body:
                    continue  # nothing in it can be wrong

                @hypothesis.settings(
                    max_examples=examples if operation.body else examples // 10, deadline=None, database=None,
                    derandomize=True, phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )  # fmt: skip
                @hypothesis.given(operation.as_strategy(mode))
                def call(case: schemathesis.Case[Any]) -> None:
                    nonlocal malformed
                    response = case.call(f"http://127.0.0.1:{port}", session)
                    statuses[response.status_code] += 1
                    malformed += _is_negative(case) and response.status_code >= 400
                    case.validate_response(response, excluded_checks=excluded)

                runner.run(asyncio.to_thread(call))
        session.close()
        runner.run(running.__aexit__(None, None, None))
    sys.stdout.write(f"{malformed} malformed requests; {statuses}\n")
    assert statuses[200] > examples and malformed > 3 * examples and statuses.total() > 8 * examples * 0.9
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_fuzzer_finds_errors() -> None:
    """Answers that break the rules are seen."""
    whole = httpfuzz.Answer(500, {}, b"")
    with pytest.raises(httpfuzz.Broken):
        httpfuzz.check_answer(whole, Case(b""))
    for body in (
        b"",
        b"404: Not Found",
        b'{"error":{}}',
        b'{"error":{"message":"a","type":"b","param":null,"code":null}}',
    ):
        with pytest.raises(httpfuzz.Broken):
            httpfuzz.check_answer(httpfuzz.Answer(404, {"content-type": "application/json"}, body), Case(b""))
    with pytest.raises(httpfuzz.Broken):
        httpfuzz.check_stream(b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n', 1)


def test_an_internal_error_names_no_prompt(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug whose message holds the prompt: the client gets 500 and the log the place."""
    caplog.set_level(logging.DEBUG)

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot do {CANARY}")

    async def run() -> httpfuzz.Answer | None:
        async with clean_server() as (_, _, port):
            with monkeypatch.context() as patch:
                patch.setattr(completions.Completions, "read", fail)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(good())
                answer = await httpfuzz.read_answer(reader)
                writer.close()
            return answer

    answer = asyncio.run(run())
    assert answer is not None and answer.status == 500 and CANARY.encode() not in answer.body
    httpfuzz.check_error(answer.body, "application/json")
    assert "internal error RuntimeError" in caplog.text
    assert_secret(caplog)


def test_an_error_in_the_middle_of_a_stream(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Valid HTTP to its end: no second header among the events."""
    caplog.set_level(logging.DEBUG)
    calls = 0
    chunk = completions.Completions.chunk

    def fail_later(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError(f"cannot do {CANARY}")
        return chunk(self, *args)

    async def run() -> bytes:
        async with clean_server(rate=200.0) as (_, _, port):
            with monkeypatch.context() as patch:
                patch.setattr(completions.Completions, "chunk", fail_later)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(good(max_tokens=50, stream=True))
                try:
                    async with asyncio.timeout(5):
                        return await reader.readuntil(b"\r\n0\r\n\r\n")
                except asyncio.IncompleteReadError as cut:
                    return cut.partial
                finally:
                    writer.transport.abort()

    data = asyncio.run(run())
    assert data.count(b"HTTP/1.1 ") == 1 and data.count(b"finish_reason") == 2, data
    assert b"[DONE]" not in data
    assert_secret(caplog)


def test_every_route_wants_the_key() -> None:
    """As the application lists them, so that a new route is covered."""

    async def run() -> None:
        async with clean_server() as (server, _, port):
            routes = {
                (route.method, route.resource.canonical.replace("{model}", "x")) for route in server.app.router.routes()
                if route.resource is not None
            }  # fmt: skip
            assert len(routes) > 20
            for method, path in sorted(routes):
                body = b"{}" if method == "POST" else None
                wanted = 200 if path == "/health" else 401
                for key in (None, "wrong-key"):
                    case = Case(request(path, body, method, key), 1, frozenset({wanted}), head=method == "HEAD")
                    await run_case(case, port)

    asyncio.run(run())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", ""])
def test_open_to_others_only_with_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="--api-key"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("a",)).host == host


def test_a_slow_reader_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client leaves unread is bounded, and then its connection and its request end."""
    monkeypatch.setattr(connections, "WRITE_TIMEOUT", 60.0)  # the bound on tokens must do it

    async def run() -> None:
        async with clean_server() as (server, frontend, port):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(good(max_tokens=3500, n=16, stream=True))
                worker = frontend.workers["worker-0"]
                await eventually(lambda: worker.seen == 16)
                await eventually(lambda: frontend.idle and server.active == 0)
                assert worker.aborted > 0

    asyncio.run(run())


def test_a_late_loop_cuts_nobody_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """News that piles up because this process was busy is not the client's fault."""
    monkeypatch.setattr(generation, "MAX_UNREAD", 8)

    async def run() -> None:
        async with clean_server() as (_, _, port):
            case = Case(good(max_tokens=20, n=16, stream=True), 1, frozenset({200}), choices=16)
            assert await run_case(case, port) == [200]

    asyncio.run(run())

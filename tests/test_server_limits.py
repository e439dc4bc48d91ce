"""What the server does at its limits: who does not read, what cannot be served, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import select
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import uvloop
from aiohttp import web
from click.testing import CliRunner
from fake_engine import FakeFrontend, fake_engine, fake_server
from serving import serving

from minidisagg.cli import cli
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings
from minidisagg.core.messages import Role, SamplingParams, Stats
from minidisagg.core.router import RouterSpec
from minidisagg.core.tracked import Emit
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.channel import ChannelError
from minidisagg.runtime.output import OutputProcessor
from minidisagg.server import admin, app, completions, connections, generation
from minidisagg.server.app import Server, drain
from minidisagg.server.generation import Choice, Generation
from minidisagg.server.history import EndRecord, Timing
from minidisagg.server.protocol import ApiError

MODEL = "dummy:tiny,max_len=4096"
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]


@dataclass
class Site:
    """A listening server and a client, on one loop."""

    server: Server
    frontend: FakeFrontend
    port: int
    session: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, what the body says, and the headers."""
        async with self.session.request(method, path, json=body, headers=headers) as answer:
            kind = answer.content_type
            return answer.status, await (answer.json() if "json" in kind else answer.text()), answer.headers

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        return await self.call("POST", path, body, **headers)

    async def metric(self, name: str) -> float:
        """The sum of all rows that begin so."""
        _, text, _ = await self.call("GET", "/metrics")
        lines = (line for line in text.splitlines() if line.startswith(f"minidisagg:{name}"))
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@asynccontextmanager
async def site(
    rate: float = 0.0, model: str = MODEL, router: RouterSpec | None = None, workers: int = 1
) -> AsyncIterator[Site]:  # fmt: skip
    async with (
        fake_server(None, rate, model, router, workers) as (server, frontend, port),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        yield Site(server, frontend, port, session)


def run(work: Callable[[], Coroutine[Any, Any, None]], loop: Any = None) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work())


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        await asyncio.sleep(0.01)


async def raw(port: int, data: bytes) -> bytes:
    """What comes back until the server closes, or for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    found = bytearray()
    try:
        async with asyncio.timeout(0.4):
            while more := await reader.read(65536):
                found += more
    except TimeoutError:
        pass
    writer.transport.abort()
    return bytes(found)


def http(path: str, body: Any = None, extra: bytes = b"") -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = b"%s %s HTTP/1.1\r\nHost: x\r\n%s" % (b"GET" if body is None else b"POST", path.encode(), extra)
    return head + (b"Content-Length: %d\r\n\r\n" % len(data) if data else b"\r\n") + data


# ---------------------------------------------------------------- who does not read


@LOOPS
@pytest.mark.parametrize("what", ["stream", "body", "closing body", "events"])
def test_who_takes_nothing_is_reset(what: str, loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so: an error on the client's socket is a reset, and a connection that was closed has none."""
    monkeypatch.setattr(connections, "WRITE_TIMEOUT", 0.3)
    monkeypatch.setattr(generation, "MAX_UNREAD", 1 << 40)
    snapshot = admin.Admin.snapshot

    async def large(_: Any) -> bytes:
        return b"x" * (16 << 20)

    monkeypatch.setattr(completions.Answer, "whole", large)
    monkeypatch.setattr(
        admin.Admin, "snapshot",
        lambda *args: msgspec.structs.replace(snapshot(*args), model="x" * (4 << 20)),
    )  # fmt: skip
    ask = {"prompt": "a", "max_tokens": 190_000, "stream": what == "stream", "ignore_eos": True}
    data = http(TEXT, ask, b"Connection: close\r\n" if what == "closing body" else b"")

    async def work() -> None:
        async with site(model="dummy:tiny,max_len=200000") as at:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", at.port))
                client.sendall(http("/admin/events?hz=20") if what == "events" else data)
                poll = select.poll()
                poll.register(client, select.POLLERR)
                await until(lambda: poll.poll(0), 20.0)
                with pytest.raises(ConnectionResetError):
                    while client.recv(1 << 20):  # what had come before
                        pass
            await until(lambda: at.frontend.idle and not at.server.active and at.server.admin._places._value == 16)
            assert (await at.call("GET", "/health"))[0] == 200

    run(work, loop)


@LOOPS
def test_who_reads_slowly_is_served(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_TIMEOUT", 0.3)

    async def large(_: Any) -> bytes:
        return b"x" * (6 << 20)

    monkeypatch.setattr(completions.Answer, "whole", large)

    async def work() -> None:
        async with site() as at:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
                client.connect(("127.0.0.1", at.port))
                client.sendall(http(TEXT, {"prompt": "a"}))
                client.setblocking(False)
                size, began = 0, time.monotonic()
                while size < 6 << 20:
                    size += len(await asyncio.get_running_loop().sock_recv(client, 1 << 17))
                    await asyncio.sleep(0.03)
                assert time.monotonic() - began > 0.7, "longer than one may take nothing"

    run(work, loop)


def test_listeners_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_LISTENERS", 2)

    async def work() -> None:
        async with site() as at:
            first, second = [await at.session.get("/admin/events") for _ in range(2)]
            assert first.status == second.status == 200 and first.headers["x-request-id"]
            assert (await at.call("GET", "/admin/events"))[0] == 429
            first.close()
            await until(lambda: at.server.admin._places._value == 1)
            third = await at.session.get("/admin/events")
            assert third.status == 200
            second.close()
            third.close()

    run(work)


def test_what_may_be_unread_is_counted_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_UNREAD", 20)

    async def work() -> None:
        async with site() as at:
            unread: list[int] = []
            tokens = SamplingParams(max_tokens=50, ignore_eos=True)
            with Generation(at.frontend, at.server.tokenizer, lambda: None, at.server.metrics, "prompt") as made:
                made.on_stall = lambda: unread.append(made._queue.qsize())
                made.submit([[1, 2]], 4, tokens, "", 0)
                await until(lambda: len(unread) >= 100)
            assert unread[0] == 4 * 20 + 1

    run(work)


# ---------------------------------------------------------------- errors


@LOOPS
def test_an_internal_error_in_a_stream_is_its_last_event(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, calls = completions.Completions.chunk, 0

    def fail(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("secret")
        return chunk(self, *args)

    monkeypatch.setattr(completions.Completions, "chunk", fail)

    async def work() -> None:
        async with site(rate=200.0) as at:
            data = await raw(at.port, http(TEXT, {"prompt": "a", "max_tokens": 50, "stream": True}))
            assert data.endswith(b"\r\n0\r\n\r\n"), "closed, and valid HTTP to its end"
            last = json.loads(data.rpartition(b"data: ")[2].partition(b"\n\n")[0])
            assert last["error"]["type"] == "server_error" and last["error"]["message"] == "internal error"
            assert b"secret" not in data and b"[DONE]" not in data
            await until(lambda: at.frontend.idle)

    run(work, loop)


def test_a_failing_engine_ends_a_stream_with_an_error() -> None:
    with serving(partial(fake_engine, 20.0)) as served:
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model=MODEL, prompt="a", max_tokens=100, stream=True)
            texts = [next(stream).choices[0].text for _ in range(3)]
            frontend, now = served.frontend, time.monotonic

            async def fail() -> None:
                for name in list(frontend.router.requests):
                    frontend.router.on_abort(name, now(), reason="the worker burns")
                frontend._drain()

            served.call(fail())
            with pytest.raises(openai.APIError, match="the worker burns"):
                list(stream)
            assert len(texts) == 3


def test_tokens_that_came_with_a_failure_are_not_lost() -> None:
    async def work() -> None:
        tokenizer = Tokenizer.load(MODEL)
        made: Any = Generation(None, tokenizer, lambda: None, None, "x")  # type: ignore[arg-type]
        made.choices = [Choice(n, [1], OutputProcessor(tokenizer, SamplingParams()), Timing(1)) for n in range(2)]
        for choice, emit in (
            (0, Emit("0", 0, (65,))), (0, Emit("0", finish="error", error="no more")), (1, Emit("1", 0, (66, 67))),
        ):  # fmt: skip
            made._queue.put_nowait((made.choices[choice], emit))
        found: list[tuple[int, int]] = []
        with pytest.raises(ApiError, match="no more"):
            async for batch in made.news():
                found += [(news.choice.index, part.token) for news in batch for part in news.parts]
        assert found == [(0, 65), (1, 66), (1, 67)]

    run(work)


def test_a_broken_channel_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ChannelError("the peer does not read")

    async def work() -> None:
        async with site() as at:
            monkeypatch.setattr(at.frontend, "submit", fail)
            status, answer, headers = await at.post(TEXT, {"prompt": "a"})
            assert status == 503 and answer["error"]["code"] == "unavailable" and headers["Retry-After"]

    run(work)


def test_every_answer_has_an_id() -> None:
    async def work() -> None:
        async with site() as at:
            for data, status in (
                (b"NOT HTTP\r\n\r\n", b"400"), (http("/v1/models", extra=b"Expect: wonders\r\n"), b"417"),
                (http("/nothing"), b"404"), (http("/health"), b"200"), (http("/admin/events?hz=1"), b"200"),
                (http(TEXT, {"prompt": "a", "stream": True}), b"200"), (http(TEXT, {"prompt": 1}), b"400"),
            ):  # fmt: skip
                head, _, _ = (await raw(at.port, data)).partition(b"\r\n\r\n")
                assert head.split()[1] == status and head.lower().count(b"\r\nx-request-id: ") == 1, head
            head = await raw(at.port, http("/health", extra="x-request-id: é\r\n".encode()))
            assert b"x-request-id" in head and "é".encode() not in head

    run(work)


def test_draining_turns_away_what_is_still_being_sent() -> None:
    async def work() -> None:
        async with site() as at:
            data = http(TEXT, {"prompt": "a"})
            reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
            writer.write(data[:-3])
            await asyncio.sleep(0.1)
            await drain(at.server)
            writer.write(data[-3:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 503")
            writer.close()

    run(work)


# ---------------------------------------------------------------- what can never be


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_what_never_fits_is_no_429(path: str) -> None:
    param = "prompt" if path == TEXT else "messages"

    def body(length: int, **more: Any) -> dict[str, Any]:
        text = "a" * length
        return {"prompt": text, **more} if path == TEXT else {"messages": [{"role": "user", "content": text}], **more}

    async def work() -> None:
        async with site(router=RouterSpec(max_waiting=8, max_waiting_tokens=300)) as at:
            for asked, words in ((body(5, n=9), "9 requests"), (body(400), "300"), (body(120, n=3), "300")):
                status, answer, headers = await at.post(path, asked | {"max_tokens": 2})
                assert status == 400 and words in answer["error"]["message"] and "Retry-After" not in headers
                assert answer["error"]["param"] == param
            assert (await at.post(path, body(5, n=8, max_tokens=2)))[0] == 200
            status, answer, _ = await at.post(path, body(200, max_tokens=4000))
            error = answer["error"]
            assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded")

    run(work)


def test_many_prompts_at_once() -> None:
    """As lm-eval with --batch_size 128 sends them."""

    async def work() -> None:
        async with site() as at:
            body = {"prompt": [[72, 105, 33]] * 128, "max_tokens": 1, "logprobs": 1, "echo": True}
            status, answer, _ = await at.post(TEXT, body)
            assert status == 200 and len(answer["choices"]) == 128
            status, answer, _ = await at.post(TEXT, {"prompt": ["a"] * 257})
            assert status == 400 and "256" in answer["error"]["message"]

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_generated_is_nothing_used(stream: bool) -> None:
    async def work() -> None:
        async with site() as at:
            usage = {"include_usage": True, "continuous_usage_stats": True}
            body = {"prompt": "Hi!", "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
            _, answer, _ = await at.post(TEXT, body | ({"stream_options": usage} if stream else {}))
            found = [json.loads(line[6:]) for line in answer.split("\n\n")[:-2]] if stream else [answer]
            assert "".join(choice["text"] for event in found for choice in event["choices"]) == "Hi!"
            assert [event["usage"]["completion_tokens"] for event in found] == [0] * len(found)
            assert found[-1]["usage"]["total_tokens"] == 3

    run(work)


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("name, refused, harmless", [
    ("chat_template", "{{ 1 }}", None), ("chat_template_kwargs", {"enable_thinking": False}, {}),
    ("add_generation_prompt", False, True), ("continue_final_message", True, False),
    ("skip_special_tokens", False, True), ("include_stop_str_in_output", True, False),
    ("truncate_prompt_tokens", 5, None), ("bad_words", ["a"], []), ("allowed_token_ids", [1], None),
    ("return_tokens_as_token_ids", True, False), ("detokenize", False, True),
])  # fmt: skip
def test_fields_that_would_change_the_answer(path: str, name: str, refused: Any, harmless: Any) -> None:
    asked: dict[str, Any] = {"prompt": "a"} if path == TEXT else {"messages": MESSAGES}

    async def work() -> None:
        async with site() as at:
            status, answer, _ = await at.post(path, {**asked, name: refused})
            assert (status, answer["error"]["param"]) == (400, name) and "not supported" in answer["error"]["message"]
            assert (await at.post(path, {**asked, name: harmless, "max_tokens": 1}))[0] == 200

    run(work)


def test_messages_that_a_template_would_not_see() -> None:
    async def work() -> None:
        async with site() as at:
            call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            for more in ({"tool_calls": [call]}, {"tool_call_id": "x"}):
                status, answer, _ = await at.post(CHAT, {"messages": [*MESSAGES, {**MESSAGES[0], **more}]})
                assert status == 400 and answer["error"]["param"] == "messages[1]"
                assert f"{next(iter(more))} is not supported" in answer["error"]["message"]
            status, answer, _ = await at.post(CHAT, {"messages": MESSAGES, "echo": True})
            assert (status, answer["error"]["param"]) == (400, "echo")
            harmless = [{**MESSAGES[0], "tool_calls": [], "tool_call_id": None}]
            assert (await at.post(CHAT, {"messages": harmless, "echo": False, "max_tokens": 1}))[0] == 200

    run(work)


def test_a_seed_that_leaves_room_for_the_request() -> None:
    made = CliRunner().invoke(cli, ["serve", "dummy:tiny", "--seed", str(1 << 32)])
    assert made.exit_code == 2 and "--seed" in made.output

    async def work() -> None:
        cluster = ClusterSettings(prefill_workers=1, decode_workers=0)
        run = RunSettings(seed=(1 << 32) - 1)
        async with await FakeFrontend.start(ModelSettings(model=MODEL), cluster, run) as frontend:
            assert [emit.tokens async for emit in frontend.generate([1], SamplingParams(max_tokens=1))]

    run(work)


@pytest.mark.parametrize("seed", [(1 << 63) - 1, -(1 << 63)])
def test_choices_of_the_last_seed_and_of_the_first(seed: int) -> None:
    async def work() -> None:
        async with site() as at:
            status, answer, _ = await at.post(TEXT, {"prompt": "a", "max_tokens": 8, "n": 3, "seed": seed})
            assert status == 200 and len({choice["text"] for choice in answer["choices"]}) == 3

    run(work)


# ---------------------------------------------------------------- overload


def ends(count: int, now: float, gap: float) -> list[EndRecord]:
    """Requests that ended every `gap` seconds, the last one just now."""
    return [
        EndRecord(seq=0, clock=now - gap * (count - 1 - n), id="", finish="length", prompt_tokens=1, output_tokens=1,
                  ttft=0.1, tpot=0.0, max_itl=0.0, e2e=0.1, stages={})
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("gap, seconds", [(0.5, 4), (0.01, 1), (30.0, 60)])
def test_when_to_come_again_goes_by_the_queue(gap: float, seconds: int) -> None:
    """Eight wait: at two a second that is four seconds, but never more than OpenAI's clients heed."""

    async def work() -> None:
        async with site(router=RouterSpec(max_waiting=8)) as at:
            at.server.history.ends.extend(ends(100, time.monotonic(), gap))
            at.frontend.router.view.changed(waiting=8)
            status, _, headers = await at.post(TEXT, {"prompt": "a"})
            assert status == 429 and abs(int(headers["Retry-After"]) - seconds) <= (seconds == 4)
            at.frontend.router.view.changed(waiting=7)  # the router itself refuses the second choice
            status, _, headers = await at.post(TEXT, {"prompt": "a", "n": 2})
            assert status == 429 and abs(int(headers["Retry-After"]) - seconds) <= (seconds == 4)
            at.frontend.router.view.changed(waiting=0)

    run(work)


def test_openai_clients_come_again() -> None:
    with serving(partial(fake_engine, 4.0, router=RouterSpec(max_waiting=1))) as served:

        async def occupy() -> asyncio.Task[Any]:
            tokens = SamplingParams(max_tokens=1)
            return asyncio.create_task(anext(served.frontend.generate([1], tokens)))  # type: ignore[arg-type]

        served.call(occupy())
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(model=MODEL, prompt="a", max_tokens=1)
            headers = refused.value.response.headers
            assert headers["retry-after"] == "1" and "x-should-retry" not in headers, "a retry is of use"
            assert refused.value.code == "rate_limit_exceeded" and headers["x-request-id"]
            made = client.with_options(max_retries=2).completions.create(model=MODEL, prompt="a", max_tokens=1)
            assert made.usage is not None and made.usage.completion_tokens == 1


def test_an_error_that_would_come_again_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError

    async def work() -> None:
        async with site() as at:
            monkeypatch.setattr(at.frontend, "submit", fail)
            status, _, headers = await at.post(TEXT, {"prompt": "a"})
            assert status == 500 and headers["x-should-retry"] == "false"

    run(work)


# ---------------------------------------------------------------- health


def test_health_knows_whether_anything_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "GRACE", 0.6)

    async def work() -> None:
        async with site() as at:
            at.frontend.drain("worker-0")
            began = time.monotonic()
            assert (await at.call("GET", "/health"))[0] == 200, "not for a moment's absence"
            await until(lambda: at.server.unhealthy() == "no worker takes prefill or decode")
            assert 0.3 < time.monotonic() - began < 2
            assert (await at.call("GET", "/health"))[0] == 503
            at.frontend.kill("worker-0")
            await until(lambda: not at.server.unhealthy())
            at.frontend.router.view.workers["worker-0"].changed(role=Role.PREFILL)
            await until(lambda: at.server.unhealthy() == "no worker takes decode")

    run(work)


def test_health_outlives_a_worker_but_not_the_router() -> None:
    async def work() -> None:
        async with site() as at:
            at.frontend.error = "worker-0: out of memory"  # as it started anew, which it has done since
            assert (await at.call("GET", "/health"))[0] == 200

            def fail(_: Any) -> Any:
                raise RuntimeError("a bug")

            at.frontend.router.policy.rebalance = fail  # type: ignore[method-assign]
            await until(lambda: "the router failed" in at.server.unhealthy())
            assert (await at.call("GET", "/health"))[0] == 503

    run(work)


def test_health_sees_requests_that_nobody_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker reports no work, as one does that a message never reached."""
    monkeypatch.setattr(app, "STUCK_AFTER", 0.6)

    async def work() -> None:
        async with site(rate=0.5) as at:
            asking = asyncio.create_task(at.post(TEXT, {"prompt": "a", "max_tokens": 2}))
            worker = at.frontend.workers["worker-0"]
            await until(lambda: worker.requests)
            lost = dict(worker.requests)
            worker.requests.clear()
            assert not at.server.unhealthy()
            await until(lambda: "no worker makes progress" in at.server.unhealthy())
            at.frontend.pause(True)
            await until(lambda: not at.server.unhealthy())  # the operator wants it so
            at.frontend.pause(False)
            worker.rate = 50.0
            worker.requests.update(lost)
            worker._work.set()
            assert (await asking)[0] == 200
            await until(lambda: not at.server.unhealthy())

    run(work)


# ---------------------------------------------------------------- admin


def test_the_names_of_metrics_are_as_written_down() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    listed = page.partition("## /metrics")[2].partition("A dashboard")[2].partition("The labels")[0]
    own = page.partition("Names that vLLM does not have")[2].partition("## Glossary")[0]
    names = re.findall(r"`(\w+)(?:\{\w+\})?`", listed + own)

    async def work() -> None:
        async with site() as at:
            _, text, _ = await at.call("GET", "/metrics")
            told = {*re.findall(r"^(?:# TYPE )?minidisagg:(\w+)", text, re.M)}
            assert len(names) > 18 and {*names} <= told | {name.removesuffix("_bucket") for name in told}
            assert all(line.startswith(("# ", "minidisagg:")) for line in text.splitlines())

    run(work)


def test_admin_says_what_may_be_asked_and_what_a_kill_leaves() -> None:
    async def work() -> None:
        async with site() as at:
            for path, field, choices in (
                ("/admin/workers/worker-0/role", "role", "prefill, decode, both"),
                ("/admin/mode", "mode", "colocated, disagg"),
            ):
                status, told = (await at.post(path, {field: "disag"}))[:2]
                assert status == 400 and f"{field} must be one of {choices}" in str(told)
            status, told = (await at.post("/admin/workers/worker-0/kill", {}))[:2]
            assert status == 200 and "'down'" in str(told) and "pid" not in str(told)

    run(work)


@pytest.mark.parametrize("path", ["/admin/policy", "/admin/mode", "/admin/workers/worker-0/role"])
def test_bodies_of_admin_are_read_like_others(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "READ_TIMEOUT", 0.3)

    async def malformed(_: Any) -> bytes:
        raise web.RequestPayloadError("a chunk of -1 bytes")

    async def work() -> None:
        async with site() as at:
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n" % path.encode()
            assert (await raw(at.port, head)).startswith(b"HTTP/1.1 408")
            assert (await at.post(path, {}, **{"Content-Encoding": "gzip"}))[0] == 415
            monkeypatch.setattr(web.Request, "read", malformed)
            assert (await at.post(path, {}))[0] == 400

    run(work)


def test_no_stage_is_left_without_a_worker() -> None:
    with serving(partial(fake_engine, workers=2)) as served:

        def post(path: str, body: Any) -> tuple[int, str]:
            async def send() -> tuple[int, str]:
                async with aiohttp.ClientSession() as session, session.post(served.url + path, json=body) as answer:
                    return answer.status, await answer.text()

            return asyncio.run(send())

        def role(name: str, role: str) -> tuple[int, str]:
            return post(f"/admin/workers/{name}/role", {"role": role})

        assert role("worker-0", "prefill")[0] == 200
        status, text = role("worker-1", "prefill")
        assert status == 409 and "no worker for decode" in text
        assert role("worker-1", "decode")[0] == 200
        status, text = post("/admin/workers/worker-0/drain", {})
        assert status == 409 and "no worker for prefill" in text
        assert role("worker-0", "decode")[0] == 409
        assert role("worker-1", "both")[0] == 200 and role("worker-0", "decode")[0] == 200
        assert post("/admin/workers/worker-0/drain", {})[0] == 200
        assert role("worker-1", "decode")[0] == 409, "one that drains does not count"
        assert post("/admin/workers/worker-1/restart", {})[0] == 200, "it comes back"


def test_a_mode_that_was_asked_for_while_a_worker_was_down_is_what_it_gets() -> None:
    async def work() -> None:
        async with site(workers=2) as at:
            supervisor = at.frontend.supervisor
            start, supervisor._start = supervisor._start, lambda name: None

            async def state() -> dict[str, Any]:
                status, answer, _ = await at.call("GET", "/admin/state")
                assert status == 200
                return {worker["name"]: worker for worker in answer["workers"]} | {"mode": answer["mode"]}

            assert (await state())["worker-1"]["pid"] > 0
            assert (await at.post("/admin/workers/worker-1/kill", {}))[0] == 200
            await until(lambda: "worker-1" not in at.frontend.hellos)
            down = (await state())["worker-1"]
            assert down["state"] == "down" and "pid" not in down
            assert (await at.post("/admin/mode", {"mode": "disagg"}))[0] == 200
            assert (await state())["mode"] == "disagg"
            start("worker-1")
            workers = at.frontend.router.view.workers
            await until(lambda: [w.role for w in workers.values()] == [Role.PREFILL, Role.DECODE])

    run(work)


def test_other_sites_may_not_administer() -> None:
    async def work() -> None:
        async with site() as at:
            for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                status, answer, _ = await at.call("POST", "/admin/pause", {}, **headers)
                assert status == 403 and "--api-key" in answer["error"]["message"]
            assert not at.frontend.router.paused

    run(work)


# ---------------------------------------------------------------- metrics and the log


def test_ends_are_counted_as_clients_see_them() -> None:
    async def work() -> None:
        async with site() as at:
            _, first, _ = await at.call("GET", "/metrics")
            for reason in ("stop", "length", "abort", "error"):  # there from the beginning, or the first is missed
                for labels in ('role="both",worker="worker-0"', 'role="router",worker="router"'):
                    assert f'request_success_total{{finished_reason="{reason}",{labels}}} 0.0' in first
            text = (await at.post(TEXT, {"prompt": "a", "max_tokens": 64, "seed": 3}))[1]["choices"][0]["text"]
            await at.post(TEXT, {"prompt": "a", "max_tokens": 4000, "seed": 3, "stop": text[9:12]})
            await until(lambda: at.frontend.idle)
            served = 'finished_reason="%s",role="both",worker="worker-0"}'
            assert await at.metric("request_success_total{" + served % "length") == 1
            assert await at.metric("request_success_total{" + served % "stop") == 1
            assert await at.metric('request_success_total{finished_reason="abort"') == 0
            assert [end.finish for end in at.server.history.ends] == ["length", "stop"]
            assert await at.metric("e2e_request_latency_seconds_count") == 2

            at.frontend.workers["worker-0"].rate = 20.0
            body = {"prompt": "a", "max_tokens": 3000, "stream": True}
            async with at.session.post(TEXT, json=body) as left:
                await left.content.readany()
            await until(lambda: at.frontend.idle)
            assert await at.metric("request_success_total{" + served % "abort") == 1
            for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_decode_time_seconds"):
                assert await at.metric(f"{name}_count") == 2, "what a client cut short is no latency"
            assert await at.metric("time_to_first_token_seconds_count") == 3

    run(work)


def test_what_waits_in_the_router_is_seen() -> None:
    async def work() -> None:
        async with site() as at:
            row = 'num_requests_waiting{role="router",worker="router"}'
            assert await at.metric(row) == 0
            at.frontend.pause(True)
            asking = asyncio.create_task(at.post(TEXT, {"prompt": "a", "max_tokens": 2, "n": 3}))
            await until(lambda: at.frontend.router.parked)
            assert await at.metric(row) == 3
            at.frontend.pause(False)
            await asking
            assert await at.metric(row) == 0
            worker = '{role="both",worker="worker-0"}'
            for name, count in (
                ("prompt_tokens_total", 3), ("generation_tokens_total", 6), ("time_to_first_token_seconds_count", 3),
                ("inter_token_latency_seconds_count", 3), ("request_prefill_time_seconds_count", 3),
                ("request_decode_time_seconds_count", 3),
            ):  # fmt: skip
                assert await at.metric(name + worker) == count, name

    run(work)


def test_the_busy_share_is_that_of_the_latest_reports() -> None:
    async def work() -> None:
        async with site() as at:
            report = at.frontend.stats["worker-0"]

            def later(seconds: float, busy: float) -> Stats:
                return msgspec.structs.replace(report, clock=report.clock + seconds, busy_seconds=busy)

            for reports, share in (([later(0, 1), later(2, 2)], 0.5), ([later(0, 9), later(1, 0.1)], 0.0)):
                seen = []
                while share not in seen and len(seen) < 5:  # a report of the worker's own may come in between
                    at.server.history.reports["worker-0"] = deque(reports)
                    at.frontend.router.stats["worker-0"] = reports[-1]
                    seen.append(await at.metric('worker_busy_share{role="both",worker="worker-0"}'))
                assert seen[-1] == share
            await until(lambda: at.frontend.stats["worker-0"] is at.server.history.reports["worker-0"][-1])

    run(work)


def test_a_line_for_each_request(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(app, "LOG_EVERY", 0.2)

    def line(name: str) -> str:
        return next((text for text in caplog.messages if text.startswith(name + " ended: ")), "")

    async def work() -> None:
        async with site() as at:
            body = {"prompt": ["canary", "ab"], "n": 2, "max_tokens": 5, "seed": 1}
            await at.post(TEXT, body, **{"x-request-id": "mine"})
            wanted = "mine ended: engine 00000000 to 00000003, prompt 8 tokens, output 20 tokens, length, 0."
            assert line("mine").startswith(wanted) and line("mine").endswith(" s")
            at.frontend.workers["worker-0"].rate = 20.0
            async with at.session.post(
                TEXT, json={"prompt": "canary", "max_tokens": 900, "stream": True}, headers={"x-request-id": "gone"}
            ) as left:
                await left.content.readany()
            await until(lambda: line("gone"))
            assert ", abort, " in line("gone") and "canary" not in caplog.text
            await until(lambda: any("Avg prompt throughput: " in text for text in caplog.messages))

    run(work)
    loud = [one.getMessage() for one in caplog.records if one.levelno > logging.DEBUG]  # what there is without -v
    assert any("Avg prompt" in text for text in loud) and not any("mine" in text or "gone" in text for text in loud)

"""The bench over HTTP, against a server of this file that answers byte by byte what it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from minidisagg.bench.http_client import EventStream, HttpLoadGenerator, HttpServer, error_text, stage_times
from minidisagg.bench.settings import parse_base_url
from minidisagg.cli import main
from minidisagg.measure.goodput import SLO, attainment
from minidisagg.measure.records import RequestRecord
from minidisagg.workload.lengths import WorkItem

STAGES = {"queue": 0.5, "prefill": 0.25, "transfer": 0.125, "decode_wait": 0.0, "decode": 1.0, "e2e": 1.875}
PAUSE = 0.04  # seconds between pieces that must not be seen as one


def sse(*events: object) -> bytes:
    """Events as bytes; a string is sent as it is."""
    return b"".join(b"data: %s\n\n" % (e if isinstance(e, str) else json.dumps(e)).encode() for e in events)


def token(text: str = "x", finish: str | None = None) -> dict[str, Any]:
    """A chunk with one token."""
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]}


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    """The last chunk."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": "cmpl-1", "choices": [], "usage": counts | more.pop("counts", {}), **more}


class Fake:
    """The server: `answer(body)` gives (status, content type, pieces of the body), or a float: a pause, in seconds."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, str, list[bytes | float]]]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: Any = {"object": "list", "data": [{"id": "tiny", "root": "dummy:tiny", "max_model_len": 256}]}
        self.tokenizer_info: Any = None
        self.running = self.most_running = 0

    async def _models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        return web.json_response(self.models) if self.models is not None else web.Response(status=404)

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response(self.tokenizer_info) if self.tokenizer_info else web.Response(status=404)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        status, kind, pieces = self.answer(self.bodies[-1])
        response = web.StreamResponse(status=status, headers={"Content-Type": kind})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await response.prepare(request)
            for piece in pieces:
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                elif piece == b"CUT":
                    assert request.transport is not None
                    request.transport.abort()
                else:
                    await response.write(piece)
        finally:
            self.running -= 1
        return response

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its URL."""
        app = web.Application()
        for prefix in ("", "/proxy"):
            app.add_routes([
                web.get(f"{prefix}/v1/models", self._models), web.get(f"{prefix}/tokenizer_info", self._info),
                web.post(f"{prefix}/v1/completions", self._completions),
            ])  # fmt: skip
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def stream(*pieces: bytes | float) -> tuple[int, str, list[bytes | float]]:
    """A stream that is answered with 200."""
    return 200, "text/event-stream; charset=utf-8", list(pieces)


def items(count: int, output_len: int = 3, gap: float = 0.0) -> list[WorkItem]:
    """Requests with their index as the first token."""
    return [
        WorkItem(index=i, prompt_len=2, output_len=output_len, arrival_s=i * gap, prompt=[i, 7], salt="#0")
        for i in range(count)
    ]


def measured(
    fake: Fake, work: list[WorkItem], concurrency: int | None = None, seed: int = 0, **settings: str
) -> tuple[list[RequestRecord], list[str]]:
    """The records of one run, by index, and the notes on it."""

    async def run() -> tuple[list[RequestRecord], list[str]]:
        async with fake.listening() as url, HttpServer(url, **settings) as server, asyncio.timeout(20):
            await server.connect()
            records = await HttpLoadGenerator(server, work, seed, None).run(concurrency)
            return sorted(records, key=lambda r: r.index), server.notes(records)

    return asyncio.run(run())


def by_index(*answers: tuple[int, str, list[bytes | float]]) -> Fake:
    """A server whose answer goes by the first token of the prompt."""
    return Fake(lambda body: answers[body["prompt"][0]])


# ---------------------------------------------------------------- events out of bytes


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_are_found_however_the_bytes_are_cut(size: int, newline: bytes) -> None:
    text = b': ping\n\nevent: x\ndata: {"a": "\xc3\xa4"}\n\ndata:one\ndata: two\n\n\n\ndata: [DONE]\n\ndata: cut'
    data, events, found = text.replace(b"\n", newline), EventStream(), []
    for at in range(0, len(data), size):
        found += events.push(data[at : at + size])
    assert found == [b'{"a": "\xc3\xa4"}', b"one\ntwo", b"[DONE]"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "busy"}', "busy"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b'{"detail": [{"loc": "body"}]}', '[{"loc":"body"}]'),
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
    ],
)
def test_error_bodies_of_all_kinds(body: bytes, text: str) -> None:
    assert error_text(body) == text


def test_only_whole_stage_times_count() -> None:
    times = stage_times(STAGES)
    assert times is not None
    assert (times.queue, times.decode_wait, times.e2e) == (0.5, 0.0, 1.875)
    for other in (None, 3, {"time_in_queue": 1.0}, {**STAGES, "decode": None}):
        assert stage_times(other) is None


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://host/v1/", "https://host"),
        ("http://[::1]:80/proxy/v1", "http://[::1]:80/proxy"),
        ("http://[::1]", "http://[::1]"),
        ("http://[fe80::1%25eth0]:80", "http://[fe80::1%25eth0]:80"),
    ],
)
def test_base_urls(text: str, url: str) -> None:
    assert parse_base_url(text) == url


@pytest.mark.parametrize("text", [
    "localhost:8000", "ftp://host", "http://", "http://host:port", "http://h?key=1", "http://h:99999", "http://[::1",
    "http://[::1]x:80", "http://::1]:80",
])  # fmt: skip
def test_what_is_no_base_url(text: str) -> None:
    with pytest.raises(ValueError, match="--base-url"):
        parse_base_url(text)


@pytest.mark.parametrize(
    "text", ["http://::1:8000", "http://::1", "http://fe80::1:80/v1", "http://::ffff:127.0.0.1:80"]
)
def test_an_ipv6_address_without_brackets_is_told_of_them(text: str) -> None:
    with pytest.raises(ValueError, match=r"in brackets: http://\[::1\]:8000"):
        parse_base_url(text)


# ---------------------------------------------------------------- records


def test_a_stream_in_odd_pieces_gives_one_time_per_token() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 1}}
    data = sse(token(), token(""), token(finish="length"), usage(2, 3, counts=details, metrics=STAGES), "[DONE]")
    second = data.index(b"data:", 10)
    third = data.index(b"data:", second + 1)
    # The second event is complete with its blank line only, which comes with the beginning of the third.
    fake = by_index(stream(data[:second], PAUSE, data[second : third - 1], PAUSE, data[third - 1 : third + 9],
                           PAUSE, data[third + 9 :]))  # fmt: skip
    records, notes = measured(fake, items(1))
    (record,) = records
    first, middle, last = record.token_times
    assert middle - first > 1.9 * PAUSE
    assert last - middle > 0.9 * PAUSE
    assert 0 < first - record.sent < first - record.scheduled
    assert record.stages == {name: value for name, value in STAGES.items() if name != "e2e"}
    assert (record.finish_reason, record.error, record.rejected) == ("length", "", False)
    assert (record.prompt_len, record.output_len, record.completion_tokens) == (2, 3, None)
    assert (record.cached_tokens, record.handoffs) == (1, [0])
    assert notes == ["50% of prompt tokens were in the server's prefix cache"]


def test_what_is_sent() -> None:
    fake = by_index(stream(sse(token(finish="length"), "[DONE]")))
    measured(fake, items(1, output_len=1), seed=5, api_key="secret")
    (body,) = fake.bodies
    assert len(body.pop("cache_salt")) > 8
    assert body == {
        "model": "tiny", "prompt": [0, 7], "max_tokens": 1, "min_tokens": 1, "ignore_eos": True, "temperature": 0.0,
        "seed": 5 << 32, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert [headers["Authorization"] for headers in fake.headers] == ["Bearer secret"] * 2


def test_two_runs_share_no_prefix_cache() -> None:
    fake = by_index(*[stream(sse(token(finish="length"), "[DONE]"))] * 2)
    measured(fake, items(2, 1))
    measured(fake, items(2, 1))
    salts = [body["cache_salt"] for body in fake.bodies]
    assert salts[0] == salts[1] != salts[2] == salts[3]


def test_texts_are_sent_as_texts_where_there_are_no_ids() -> None:
    fake = Fake(lambda _: stream(sse(token(finish="length"), usage(11, 1), "[DONE]")))
    work = [WorkItem(index=0, prompt_len=4, output_len=1, prompt_text="What is a queue?")]
    (record,), _ = measured(fake, work)
    assert fake.bodies[0]["prompt"] == "What is a queue?"
    assert record.prompt_len == 11  # the server's count: the workload's was an estimate


def test_failures_have_their_message_and_miss_the_slo() -> None:
    error = {"error": {"message": "worker d0\ndied", "type": "server_error", "param": None, "code": None}}
    full = {"error": {"message": "too many requests are waiting"}}
    fake = by_index(
        stream(sse(token(), token(finish="length"), usage(2, 2), "[DONE]")),
        stream(sse(token()), PAUSE, sse(error)),
        (429, "application/json", [json.dumps(full).encode()]),
        (503, "text/plain", [b"shutting down"]),
        stream(sse(token(), token())),  # ends with neither an end nor a reason
        stream(sse(token()), PAUSE, b"CUT"),
        (200, "application/json", [b'{"choices": [{"text": "xx"}]}']),
        stream(sse(usage(2, 0), "[DONE]")),
        stream(b"data: {\n\n"),
        stream(sse(token(), {"object": "error", "message": "out of memory"}, "[DONE]")),
    )
    records, notes = measured(fake, items(10, output_len=2))
    assert [(r.finish_reason, r.rejected, len(r.token_times)) for r in records] == [
        ("length", False, 2), ("error", False, 1), ("reject", True, 0), ("error", False, 0), ("error", False, 2),
        ("error", False, 1), ("error", False, 0), ("error", False, 0), ("error", False, 0),
        ("error", False, 1),
    ]  # fmt: skip
    assert [r.error for r in records[:5]] == [
        "", "worker d0 died", "429: too many requests are waiting", "503: shutting down",
        "the stream broke off after 2 tokens",
    ]  # fmt: skip
    assert "\n" not in records[5].error and "payload" in records[5].error.lower()  # in aiohttp's words
    assert records[6].error == "the answer is no event stream but application/json"
    assert records[7].error == "the answer has no tokens"
    assert records[8].error.startswith("an event is not as OpenAI's are: ")
    assert records[9].error == "out of memory"
    assert [r.ok for r in records] == [True] + [False] * 9
    assert attainment(records, SLO(ttft=10_000)) == 0.1
    assert notes == []


def test_a_count_that_differs_is_noted_and_spread_over_nothing() -> None:
    fake = by_index(
        stream(sse(token("x y"), token(finish="length"), usage(2, 4), "[DONE]")),
        stream(sse(*[token()] * 3, token(finish="length"), usage(2, 4), "[DONE]")),
        stream(sse(token(), token(finish="stop"), "[DONE]")),
    )
    records, notes = measured(fake, items(3, output_len=4))
    assert [(len(r.token_times), r.completion_tokens) for r in records] == [(2, 4), (4, None), (2, None)]
    assert all(r.ok and not r.stages for r in records)
    assert notes == [
        "in 1 of 3 answers events are not tokens (4 tokens by the server's count, 2 events): TPOT, ITL and "
        "output tok/s are of events",
        "1 of 3 answers are shorter than asked for (ignore_eos is not heeded)",
    ]


def test_an_open_loop_waits_for_no_answer_and_a_closed_one_does() -> None:
    answer = stream(sse(token()), 0.1, sse(token(finish="length"), "[DONE]"))
    fake = by_index(*[answer] * 4)
    records, _ = measured(fake, items(4, output_len=2, gap=0.01))
    assert fake.most_running == 4
    gaps = [r.scheduled - records[0].scheduled for r in records]
    assert gaps == pytest.approx([0.0, 0.01, 0.02, 0.03], abs=1e-6)
    assert all(r.sent >= r.scheduled for r in records)
    fake.most_running = 0
    records, _ = measured(fake, items(4, output_len=2), concurrency=2)
    assert fake.most_running == 2
    assert records[2].scheduled >= min(r.token_times[-1] for r in records[:2])


# ---------------------------------------------------------------- who is there


def connected(fake: Fake, **settings: str) -> HttpServer:
    """The server after `connect`."""

    async def run() -> HttpServer:
        async with fake.listening() as url, HttpServer(url, **settings) as server:
            await server.connect()
            return server

    return asyncio.run(run())


def test_the_server_tells_its_model_and_the_tokenizer_is_found() -> None:
    fake = by_index()
    server = connected(fake)
    assert (server.model, server.max_model_len) == ("tiny", 256)
    assert server.vocab_size == 256  # of dummy:tiny's byte tokenizer
    assert server.encode is not None
    fake.models = {"data": [{"id": "someone/else"}]}
    fake.tokenizer_info = {"eos_token": "</s>", "vocab_size": 321}
    server = connected(fake)
    assert (server.model, server.vocab_size, server.encode) == ("someone/else", 321, None)
    fake.tokenizer_info = None
    assert connected(fake).vocab_size == 0
    assert connected(fake, tokenizer="dummy:tiny").vocab_size == 256
    with pytest.raises(ValueError, match="unknown model 'nope'"):
        connected(fake, tokenizer="nope")
    fake.models = None
    assert connected(fake, model="given").model == "given"
    with pytest.raises(ValueError, match="names no model"):
        connected(fake)


# ---------------------------------------------------------------- the command


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs `minidisagg bench ARGS` in this process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("MINIDISAGG_DEBUG", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *args])
        out = capsys.readouterr()
        return int(str(ended.value.code)), out.out, out.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def url() -> Iterator[Callable[[Fake], str]]:
    """Starts a fake server in a thread; gives its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    contexts = []

    def start(fake: Fake) -> str:
        context = fake.listening()
        contexts.append(context)
        return asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(5)

    yield start
    for context in contexts:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_nobody_there_is_one_line(bench: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, _, err = bench("--base-url", f"http://127.0.0.1:{port}/v1")
    assert (code, err.splitlines()) == (
        2,
        [f"minidisagg: error: nothing answers at http://127.0.0.1:{port}: Connection refused"],
    )


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["--base-url", "http://h:1", "--mode", "both"], "--mode is for the engine"),
        (["--base-url", "http://h:1", "--against", "colocated"], "--against is for the engine"),
        (["--base-url", "http://h:1", "--max-num-seqs", "4"], "--max-num-seqs is for the engine"),
        (["--base-url", "http://h:1", "--link", "shm", "--preset", "quick"], "--link is for the engine"),
        (["--api-key", "k"], "--api-key is for a server"),
        (["--tokenizer", "t"], "--tokenizer is for a server"),
        (["--base-url", "h:1"], "--base-url 'h:1': expected a URL"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(bench: Any, args: list[str], flag: str) -> None:
    code, _, err = bench(*args)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"minidisagg: error: {flag}")


def paced(body: dict[str, Any]) -> tuple[int, str, list[bytes | float]]:
    """A token every 2 ms after 10 ms, as many as asked for; with stage times."""
    n = body["max_tokens"]
    pieces: list[bytes | float] = [0.01]
    for i in range(n):
        pieces += [sse(token(finish="length" if i == n - 1 else None)), 0.002]
    return stream(*pieces, sse(usage(len(body["prompt"]), n, metrics=STAGES), "[DONE]"))


def test_a_whole_benchmark(bench: Any, url: Any, tmp_path: Path) -> None:
    fake = Fake(paced)
    base = url(fake)
    code, out, err = bench(
        "--base-url", base, "--request-rate", "100", "--num-prompts", "30", "--repeats", "2", "--num-warmups", "2",
        "--random-input-len", "5", "--random-output-len", "4", "--goodput", "ttft:60000", "--result-dir",
        str(tmp_path), "--json", "--api-key", "my-own-key",
    )  # fmt: skip
    assert code == 0, err
    host = base.removeprefix("http://")
    for part in (f"tiny at {base}", f"{host}: latency (ms)", "Stages of a request", "2 repetitions"):
        assert part in err
    (directory,) = tmp_path.iterdir()
    files = ["options.json", "report.html", "requests.jsonl", "result.json"]
    assert sorted(path.name for path in directory.iterdir()) == files
    result = json.loads((directory / "result.json").read_text())
    assert json.loads(out)["sides"].keys() == result["sides"].keys() == {host}
    assert (result["model_id"], result["mode"], result["label"], result["failed"]) == ("tiny", "http", host, 0)
    assert (result["slo_attainment"], result["repetitions"], result["num_prompts"]) == (1.0, 2, 60)
    assert result["mean_stage_prefill_ms"] == 250.0
    assert result["median_ttft_ms"] >= 10 > result["median_tpot_ms"] >= 2
    lines = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
    assert [(line["repetition"], len(line["token_times"])) for line in lines] == [(0, 4)] * 30 + [(1, 4)] * 30
    bodies = fake.bodies[8:]  # after the calibration
    assert len(bodies) == 60
    assert {len(body["prompt"]) for body in bodies} == {5}
    assert len({tuple(body["prompt"]) for body in bodies}) == 60  # each repetition draws its own
    written = "".join(path.read_text() for path in directory.iterdir())
    assert "my-own-key" not in written
    assert json.loads((directory / "options.json").read_text())["server"]["base_url"] == base


def test_a_server_behind_a_path(bench: Any, url: Any, tmp_path: Path) -> None:
    fake = Fake(paced)
    code, _, err = bench(
        "--base-url", f"{url(fake)}/proxy/v1", "--num-prompts", "20", "--repeats", "1", "--request-rate", "inf",
        "--random-input-len", "5", "--random-output-len", "2", "--result-dir", str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0, err
    assert len(fake.bodies) == 28


def test_ctrl_c_leaves_no_request_behind(url: Any, tmp_path: Path) -> None:
    def answer(_: dict[str, Any]) -> tuple[int, str, list[bytes | float]]:
        if len(fake.bodies) <= 8:  # the calibration
            return stream(sse(*[token()] * 2, token(finish="length"), "[DONE]"))
        return stream(sse(token()), 60.0)

    fake = Fake(answer)
    base = url(fake)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        sys.executable, "-m", "minidisagg", "bench", "--base-url", base, "--request-rate", "50", "--num-prompts", "100",
        "--random-input-len", "5", "--random-output-len", "3", "--result-dir", str(tmp_path / "results"),
    ]  # fmt: skip
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while fake.running < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    deadline = time.monotonic() + 5
    while fake.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list((tmp_path / "results").iterdir()) == []


def test_a_relative_rate_is_of_what_was_measured_alone(bench: Any, url: Any, tmp_path: Path) -> None:
    base = url(Fake(paced))
    code, out, err = bench(
        "--base-url", base, "--num-prompts", "20", "--repeats", "1", "--num-warmups", "0", "--random-input-len", "5",
        "--random-output-len", "2", "--request-rate", "0.5x", "--result-dir", str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "(derived)" in err
    (repetition,) = json.loads(out)["sides"][base.removeprefix("http://")]["repetitions"]
    assert 5 < repetition["request_rate"] <= 50  # the first token takes 10 ms and a little: 1x is at most 100/s


def test_a_sweep_and_no_stage_times(bench: Any, url: Any, tmp_path: Path) -> None:
    fake = Fake(lambda body: stream(sse(*[token()] * (body["max_tokens"] - 1), token(finish="length"), "[DONE]")))
    code, _, err = bench(
        "tiny", "--base-url", url(fake), "--num-prompts", "20", "--repeats", "1", "--num-warmups", "0",
        "--random-input-len", "5", "--random-output-len", "3", "--max-concurrency", "1,3", "--result-dir",
        str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "closed loop" in err
    assert "Stages" not in err
    assert len({body["cache_salt"] for body in fake.bodies}) == 4  # warm-up, calibration, two runs of the same prompts
    assert "1 at a time: " in err and "3 at a time: " in err and "20 requests a run (< 300)" in err
    (directory,) = tmp_path.iterdir()
    assert {path.name for path in directory.glob("concurrency-*")} == {"concurrency-1", "concurrency-3"}


def test_a_server_that_fails_alone_is_not_measured(bench: Any, url: Any, tmp_path: Path) -> None:
    fake = Fake(lambda _: (400, "application/json", [b'{"error": {"message": "min_tokens is not supported"}}']))
    base = url(fake)
    short = ("--base-url", base, "--random-input-len", "5", "--result-dir", str(tmp_path))
    code, _, err = bench(*short)
    host = base.removeprefix("http://")
    assert (code, err.splitlines()[-1]) == (
        1,
        f"minidisagg: error: {host}: a request alone failed: 400: min_tokens is not supported",
    )
    code, _, err = bench(*short, "--random-output-len", "252")
    assert (code, err.count("more than the limit of 256")) == (2, 1)
    fake.models = {"data": [{"id": "unknown"}]}
    code, _, err = bench(*short)
    assert code == 2
    assert list(tmp_path.iterdir()) == []
    assert "does not tell the vocabulary of unknown, which --dataset-name random needs: give --tokenizer" in err

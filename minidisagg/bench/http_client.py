"""The load over HTTP: any server with OpenAI's completions, measured as the in-process bench measures a cluster.

    GET  /v1/models         the model's name and length limit
    GET  /tokenizer_info    the size of its vocabulary, where no tokenizer is at hand
    POST /v1/completions    one stream per request: an event with `choices` is a token, at the time its bytes came

What a server does not tell (stage times, prefix hits, its workers) is left out of the result, never made up.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Struct

from minidisagg.bench.client import LoadGenerator, Progress
from minidisagg.core.messages import Hello, Stats
from minidisagg.core.tracked import Emit, StageTimes
from minidisagg.measure.records import STAGES, RequestRecord
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.workload.lengths import Encode, WorkItem

SILENCE = 120.0  # seconds without a byte after which a request has failed
CONNECT = 10.0  # seconds for the first connection
KEEP_ALIVE = 2.0  # seconds: less than any server's, or an idle connection is closed under the next request
MAX_MESSAGE = 300  # characters of a server's error that are kept
ANY_LENGTH = 1 << 30  # tokens: the server names no limit


# ---------------------------------------------------------------- what a server answers


class _Model(Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(Struct):
    data: list[_Model]


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Choice(Struct):
    finish_reason: str | None = None


class _Event(Struct):
    """The parts of a chunk that count; texts are skipped over."""

    object: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    metrics: Any = None  # every server has its own: see `stage_times`
    error: Any = None


class RequestError(Exception):
    """A request that came to nothing; the text says why, in one line."""

    def __init__(self, reason: str, rejected: bool = False) -> None:
        super().__init__(one_line(reason))
        self.rejected = rejected


def one_line(text: str) -> str:
    """Of an error's text, as much as a report needs."""
    return " ".join(text.split())[:MAX_MESSAGE] or "an error without a message"


class EventStream:
    """Server-sent events out of bytes, however these are cut. Lines end with LF or CRLF."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes; comments and other fields are left out."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class Answer:
    """One stream under way: fills in the record's token times, and keeps what the end needs."""

    _decoder = msgspec.json.Decoder(_Event)

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.finish = ""
        self.ended = False
        self.times: StageTimes | None = None
        self.prompt_tokens = 0  # as the server counts them; 0: it does not say

    def take(self, event: bytes, now: float) -> None:
        """One event that came at `now`. Raises `RequestError` where it is an error or nothing readable."""
        if event == b"[DONE]":
            self.ended = True
            return
        try:
            chunk = self._decoder.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"an event is not as OpenAI's are: {error}") from None
        if chunk.error is not None or chunk.object == "error":
            raise RequestError(error_text(event))
        if chunk.choices:
            self.record.token_times.append(now)
            self.finish = chunk.choices[0].finish_reason or self.finish
        if chunk.usage is not None:
            self._count(chunk.usage)
        if (times := stage_times(chunk.metrics)) is not None:
            self.times = times
            # Only a handoff takes time in these two, and it lies between the first token and the second.
            self.record.handoffs = [0] if times.transfer + times.decode_wait > 0 else []

    def _count(self, usage: _Usage) -> None:
        record = self.record
        record.completion_tokens = usage.completion_tokens
        self.prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0

    def close(self) -> None:
        """The connection has ended. Raises `RequestError` where the answer has not."""
        record = self.record
        if not (self.ended or self.finish):
            raise RequestError(f"the stream broke off after {len(record.token_times)} tokens")
        if not record.token_times:
            raise RequestError("the answer has no tokens")
        if record.completion_tokens == len(record.token_times):
            record.completion_tokens = None  # nothing to remark


def stage_times(metrics: object) -> StageTimes | None:
    """The stage times of a `metrics` object as minidisagg serves it; None for any other."""
    if not isinstance(metrics, dict):
        return None
    values = {name: metrics.get(name) for name in (*STAGES, "e2e")}
    if not all(type(value) in (int, float) for value in values.values()):
        return None
    return StageTimes(**values)  # type: ignore[arg-type]


def error_text(body: bytes) -> str:
    """What an error body says: `{"error": {"message"}}`, the simpler forms that servers have, or its first text."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# ---------------------------------------------------------------- the load


class HttpLoadGenerator(LoadGenerator):
    """One run of a workload on a server: `LoadGenerator`'s schedule, with one HTTP request for each item."""

    def __init__(self, server: HttpServer, items: Sequence[WorkItem], seed: int, on_done: Progress | None) -> None:
        super().__init__(server, items, seed, on_done)  # type: ignore[arg-type]  # used by `_send` alone
        self.server = server
        # No two runs share a prefix cache, where the server knows this field.
        self._salt = secrets.token_hex(4)

    async def run(self, max_concurrency: int | None) -> list[RequestRecord]:
        """Send everything and wait for every end. Cancelled, it leaves no request behind."""
        async with asyncio.TaskGroup() as self._tasks:
            return await super().run(max_concurrency)

    def _send(self, item: WorkItem, scheduled: float) -> None:
        self._tasks.create_task(self._request(self._record(item, scheduled), item))

    def body(self, item: WorkItem) -> dict[str, object]:
        """The request: token ids where the workload has them, else its text; greedy, and of exactly its length."""
        return {
            "model": self.server.model,
            "prompt": item.prompt_text if item.prompt is None else item.prompt,
            "max_tokens": item.output_len,
            "min_tokens": item.output_len,
            "ignore_eos": True,
            "temperature": 0.0,
            "seed": ((self.seed << 32) + item.index) % (1 << 63),
            "cache_salt": f"{self._salt}{item.salt}",
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _request(self, record: RequestRecord, item: WorkItem) -> None:
        answer, body = Answer(record), msgspec.json.encode(self.body(item))
        record.sent = time.monotonic()  # not when it was scheduled: what the event loop was late is the client's lag
        try:
            await self._stream(answer, body)
        except RequestError as error:
            end = Emit(record.request_id, finish="reject" if error.rejected else "error", error=str(error))
        except TimeoutError:
            end = Emit(record.request_id, finish="error", error=f"nothing came for {SILENCE:.0f} s")
        except (aiohttp.ClientError, OSError) as error:
            end = Emit(record.request_id, finish="error", error=_reason(error))
        else:
            end = Emit(record.request_id, finish=answer.finish, times=answer.times)
            if item.prompt is None and answer.prompt_tokens:
                record.prompt_len = answer.prompt_tokens  # the workload's was an estimate
        self._finish(item, record, end)

    async def _stream(self, answer: Answer, body: bytes) -> None:
        url = f"{self.server.base_url}/v1/completions"
        async with self.server.session.post(url, data=body) as response:
            if response.status != 200:
                reason = error_text(await response.read())
                raise RequestError(f"{response.status}: {reason}", rejected=response.status == 429)
            if response.content_type != "text/event-stream":
                raise RequestError(f"the answer is no event stream but {response.content_type}")
            events = EventStream()
            async for data in response.content.iter_any():
                now = time.monotonic()
                for event in events.push(data):
                    answer.take(event, now)
        answer.close()


# ---------------------------------------------------------------- the server


class HttpServer:
    """A server under test, as the bench sees a cluster. An async context manager; `connect` before anything else."""

    mode, policy = "http", ""

    def __init__(self, base_url: str, model: str = "", tokenizer: str = "", api_key: str = "") -> None:
        """`base_url` is without /v1. `model` empty: the first that the server names. `tokenizer`: a local model."""
        self.base_url = base_url
        self.model = model
        self.label = urlsplit(base_url).netloc.rpartition("@")[2]
        self.max_model_len = ANY_LENGTH
        self.encode: Encode | None = None
        self.vocab_size = 0  # 0: not known
        self.hellos: dict[str, Hello] = {}
        self._tokenizer = tokenizer
        self._api_key = api_key

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self.session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    async def fresh_stats(self) -> dict[str, Stats]:
        """Nothing: the workers behind a server are its own affair."""
        return {}

    def load(self, items: Sequence[WorkItem], seed: int, on_done: Progress | None) -> LoadGenerator:
        """One run to be."""
        return HttpLoadGenerator(self, items, seed, on_done)

    async def connect(self) -> None:
        """Ask who is there. Raises `ValueError`, one line, where nobody answers or the model's name stays unknown."""
        status, body = await self._get("/v1/models")
        if status in (401, 403):
            raise ValueError(f"{self.base_url} wants another key: give --api-key or set OPENAI_API_KEY")
        try:
            models = msgspec.json.decode(body, type=_Models).data if status == 200 else []
        except (msgspec.DecodeError, UnicodeDecodeError):
            models = []
        card = next((model for model in models if self.model in ("", model.id)), None)
        if card is not None:
            self.model = card.id
            self.max_model_len = card.max_model_len or ANY_LENGTH
        elif not self.model:
            raise ValueError(f"{self.base_url}/v1/models names no model (status {status}); give MODEL")
        await self._learn_vocabulary([card.root or "", card.id] if card is not None else [self.model])

    async def _learn_vocabulary(self, names: list[str]) -> None:
        """The tokenizer of the model, if it is on this machine, else the number of token ids that the server tells."""
        for name in [self._tokenizer] if self._tokenizer else dict.fromkeys(filter(None, names)):
            try:
                tokenizer = await asyncio.to_thread(Tokenizer.load, name)
            except (ValueError, OSError):
                if self._tokenizer:
                    raise
                continue  # it is on the server only
            self.encode, self.vocab_size = tokenizer.encode, tokenizer.vocab_size
            return
        status, body = await self._get("/tokenizer_info")
        if status == 200:
            try:
                self.vocab_size = msgspec.json.decode(body, type=dict[str, Any]).get("vocab_size") or 0
            except (msgspec.DecodeError, UnicodeDecodeError):
                return  # not what minidisagg answers: the size stays unknown

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(CONNECT), self.session.get(self.base_url + path) as response:
                return response.status, await response.read()
        except TimeoutError:
            raise ValueError(f"nothing answers at {self.base_url}: no answer in {CONNECT:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ValueError(f"nothing answers at {self.base_url}: {_reason(error)}") from None

    def notes(self, records: Sequence[RequestRecord]) -> list[str]:
        """What a reader of the numbers must know, one line each."""
        ok = [record for record in records if record.ok]
        lines = []
        differ = [record for record in ok if record.completion_tokens is not None]
        if differ:
            counted, events = sum(r.completion_tokens or 0 for r in differ), sum(len(r.token_times) for r in differ)
            lines.append(
                f"in {len(differ)} of {len(ok)} answers events are not tokens ({counted} tokens by the server's "
                f"count, {events} events): TPOT, ITL and output tok/s are of events"
            )
        short = sum(_generated(record) < record.output_len for record in ok)
        if short:
            lines.append(f"{short} of {len(ok)} answers are shorter than asked for (ignore_eos is not heeded)")
        cached, prompts = sum(r.cached_tokens for r in ok), sum(r.prompt_len for r in ok)
        if cached > 0.01 * prompts:
            lines.append(f"{cached / prompts:.0%} of prompt tokens were in the server's prefix cache")
        return lines


def _generated(record: RequestRecord) -> int:
    return len(record.token_times) if record.completion_tokens is None else record.completion_tokens


def _reason(error: Exception) -> str:
    """One line; the system's own words where the error is the system's, as aiohttp adds addresses to them."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return one_line(str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error))

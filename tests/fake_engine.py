"""An engine without workers' processes: the real front end, router and channels, and workers that make tokens up.

For tests of the HTTP server and for measuring what the front end costs:

    async with fake_engine(rate=100.0) as frontend: ...
    async with fake_server() as (server, frontend, port): ...

A fake worker runs as a task of the same event loop behind the real Unix socket, so that every message is encoded,
framed and decoded. It starts in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings
from minidisagg.core.messages import (
    Abort,
    Envelope,
    Hello,
    Logprobs,
    Message,
    Migrate,
    Role,
    SetRole,
    Stats,
    Stayed,
    StepOutput,
    Submit,
    TokenLogprob,
    TokenOut,
)
from minidisagg.core.router import RouterSpec
from minidisagg.model.loader import load_config
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.channel import Channel, connect
from minidisagg.runtime.frontend import Frontend
from minidisagg.server.app import Server, ServerSettings, listening

MODEL = "dummy:tiny,max_len=4096"
PAGE, PAGES = 16, 4096
STATS_EVERY = 0.25  # seconds


def fake_token(seed: int, index: int, vocab_size: int) -> int:
    """The output token at `index` of a request with this seed: any id, evenly."""
    mixed = ((seed * 0x9E3779B97F4A7C15 + index) ^ 0xD1B54A32D192ED03) * 0xBF58476D1CE4E5B9 % (1 << 64)
    return (mixed >> 33) % vocab_size


@dataclass
class FakeWorker:
    """Answers each `Submit` with one token per step, all requests of a step in one `StepOutput`."""

    name: str
    vocab_size: int
    max_model_len: int
    rate: float = 0.0  # steps per second; 0: as fast as the front end takes them; may change at any time
    max_num_seqs: int = 256
    epoch: int = 0
    requests: dict[str, Submit] = field(default_factory=dict)  # in the order of their arrival
    emitted: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seen: int = 0  # requests ever
    aborted: int = 0
    cached: int = 0  # tokens of each prompt that it says were in its prefix cache
    submitted: list[Submit] = field(default_factory=list)  # all of them, the latest 100
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    _role: Role = Role.BOTH

    async def run(self, path: str) -> None:
        """Connect, greet, serve until cancelled."""
        channel = await connect(f"unix:{path}")
        self.requests.clear()
        self._role = Role.BOTH
        info: dict[str, str | int | float] = {
            "device": "fake", "dtype": "float32", "threads": 1, "cpus": "", "link": "shm", "bandwidth": 0.0,
            "flops": 0.0, "parameters": 0, "vocab_size": self.vocab_size,
        }  # fmt: skip
        self._send(channel, Hello(Role.BOTH, PAGES, PAGE, self.max_model_len, "fake", "", os.getpid(), 64, info))
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._report(channel))
                tasks.create_task(self._step(channel))
                async for envelope in channel:
                    self._on_message(channel, envelope.body)
                raise ConnectionError("the front end is gone")
        except* ConnectionError:
            pass
        finally:
            channel.close()

    def _send(self, channel: Channel, body: Message) -> None:
        channel.send(Envelope(self.name, self.epoch, body))  # type: ignore[arg-type]

    def _on_message(self, channel: Channel, body: Message) -> None:
        if isinstance(body, Submit):
            self.seen += 1
            self.submitted = [*self.submitted[-99:], body]
            self.requests[body.request_id] = body
            self.emitted[body.request_id] = len(body.spec.emitted)
            self._work.set()
        elif isinstance(body, Abort):
            self.aborted += self.requests.pop(body.request_id, None) is not None
        elif isinstance(body, SetRole):
            self._role = body.role
        elif isinstance(body, Migrate):
            self._send(channel, Stayed(body.request_id, body.incarnation, "a fake moves nothing", body.anew))

    async def _report(self, channel: Channel) -> None:
        while True:
            running = min(len(self.requests), self.max_num_seqs)
            live = sum((len(r.spec.prompt) + self.emitted[r.request_id]) // PAGE + 1 for r in self.requests.values())
            self._send(channel, Stats(
                self._role, self.steps, running, len(self.requests) - running, 0, 0, 0, max(0, PAGES - live), live,
                0, 0, 0, clock=time.monotonic(), cpu_seconds=time.process_time(),
            ))  # fmt: skip
            await asyncio.sleep(STATS_EVERY)

    async def _step(self, channel: Channel) -> None:
        loop, due = asyncio.get_running_loop(), 0.0
        while True:
            if not self.requests:
                self._work.clear()
                await self._work.wait()
            began = loop.time()
            due = max(due, began) + (1 / self.rate if self.rate else 0.0)
            if self.rate:
                await asyncio.sleep(due - began)
            batch = list(self.requests.values())[: self.max_num_seqs]
            outs = [self._advance(channel, request, loop.time() - began) for request in batch]
            if outs:
                new = sum(len(r.spec.prompt) for r, out in zip(batch, outs, strict=True) if out.index == 0)
                decoding = sum(out.index > 0 for out in outs)
                self.steps += 1
                self._send(channel, StepOutput(self.steps, outs, loop.time() - began, new, decoding))
            await channel._writer.drain()  # a worker waits for a front end that is behind
            await asyncio.sleep(0)

    def _advance(self, channel: Channel, request: Submit, seconds: float) -> TokenOut:
        name, sampling, index = request.request_id, request.spec.sampling, self.emitted[request.request_id]
        token = fake_token(sampling.seed or 0, index, self.vocab_size)
        if sampling.prompt_logprobs is not None and index == 0 and len(request.spec.prompt) > 1:
            scores = [_score(prompt_token, sampling.prompt_logprobs) for prompt_token in request.spec.prompt[1:]]
            self._send(channel, Logprobs(name, request.incarnation, 1, scores))
        if sampling.logprobs is not None:
            first = len(request.spec.prompt) + index
            self._send(channel, Logprobs(name, request.incarnation, first, [_score(token, sampling.logprobs)]))
        self.emitted[name] += 1
        stops = index + 1 > sampling.min_tokens and token in sampling.stop_token_ids
        finish = "stop" if stops else "length" if index + 1 >= sampling.max_tokens else ""
        if finish:
            del self.requests[name], self.emitted[name]
        return TokenOut(
            name, request.incarnation, index, token, finish, prefill_s=0.0 if index else seconds,
            cached_tokens=0 if index else self.cached,
        )  # fmt: skip


def _score(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(-1.0, [(token + n, -1.0 - n) for n in range(top)])


class FakeSupervisor:
    """Stands where the parent of worker processes stands."""

    def __init__(self, workers: list[FakeWorker], path: Path, on_down: Callable[..., None]) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.greeted: set[tuple[str, int]] = set()
        self.restarts = dict.fromkeys(self.workers, 0)
        self._path, self._on_down = str(path), on_down
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def names(self) -> list[str]:
        return list(self.workers)

    async def start(self) -> None:
        for name in self.workers:
            self._start(name)

    def kill(self, name: str, epoch: int, wanted: bool = False) -> None:
        """The worker dies, and starts again under the next epoch once the news has been told."""
        if self.workers[name].epoch != epoch:
            return
        self._tasks[name].cancel()
        self.restarts[name] += 1
        loop = asyncio.get_running_loop()
        loop.call_soon(self._on_down, name, epoch, False, () if wanted else None)
        loop.call_soon(self._start, name)

    def log_tail(self, name: str) -> str:
        return ""

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start(self, name: str) -> None:
        self.workers[name].epoch += 1
        self._tasks[name] = asyncio.get_running_loop().create_task(self.workers[name].run(self._path))


class FakeFrontend(Frontend):
    """The front end, with `FakeSupervisor` for the real one."""

    workers: dict[str, FakeWorker]

    def __init__(
        self, model: ModelSettings, cluster: ClusterSettings, run: RunSettings, router: RouterSpec | None = None
    ) -> None:
        super().__init__(model, cluster, run, router)
        config = load_config(model.model)
        limit = model.max_model_len or config.max_model_len
        fakes = [FakeWorker(name, config.vocab_size, limit) for name, _, _ in cluster.roles()]
        supervisor = FakeSupervisor(fakes, self.run_dir / "frontend.sock", self._on_worker_down)
        self.supervisor = supervisor  # type: ignore[assignment]
        self.workers = supervisor.workers

    @property
    def idle(self) -> bool:
        """Nothing of any request is left, here or on a worker."""
        return not self.router.requests and not any(worker.requests for worker in self.workers.values())


@contextlib.asynccontextmanager
async def fake_engine(
    rate: float = 0.0, model: str = MODEL, workers: int = 1, router: RouterSpec | None = None
) -> AsyncIterator[FakeFrontend]:
    """A running front end over `workers` colocated fakes that each make `rate` steps per second (0: no limit)."""
    cluster = ClusterSettings(prefill_workers=workers - workers // 2, decode_workers=workers // 2)
    frontend = await FakeFrontend.start(ModelSettings(model=model), cluster, RunSettings(), router)
    assert isinstance(frontend, FakeFrontend)
    for worker in frontend.workers.values():
        worker.rate = rate
    try:
        yield frontend
    finally:
        await frontend.stop()


@contextlib.asynccontextmanager
async def fake_server(
    settings: ServerSettings | None = None,
    rate: float = 0.0,
    model: str = MODEL,
    router: RouterSpec | None = None,
    workers: int = 1,
) -> AsyncIterator[tuple[Server, FakeFrontend, int]]:
    """A listening server over a fake engine, and its port."""
    async with fake_engine(rate, model, workers, router) as frontend:
        server = Server(frontend, Tokenizer.load(model), settings or ServerSettings(port=0))
        async with listening(server) as port:
            yield server, frontend, port

"""The front-end process: the router, the supervisor, and the workers' channels on one event loop.

    submit ──▶ Router.on_request ──Send──▶ channel ──▶ worker
    worker ──StepOutput──▶ Router.on_message ──Emit──▶ the request's callback (on the same turn of the loop)

`bench`, `LLM`, `chat` and the server all use this one object.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, built_alike, check_moves, mps_daemon
from minidisagg.core.checked import PolicyError
from minidisagg.core.effects import Send, drain
from minidisagg.core.messages import (
    ROUTER,
    Envelope,
    Fatal,
    Hello,
    Reconfigure,
    RequestSpec,
    Role,
    SamplingParams,
    Starting,
    Stats,
    TokenId,
)
from minidisagg.core.plan import SeqKey
from minidisagg.core.router import Kill, Router, RouterSpec
from minidisagg.core.routerlog import RecordingRouter
from minidisagg.core.tracked import Emit
from minidisagg.policies import make_policy, pinned, rehearse
from minidisagg.runtime.channel import Channel, ChannelError, listen
from minidisagg.runtime.launch import Supervisor
from minidisagg.runtime.operations import Operations
from minidisagg.runtime.rundir import make_run_dir

TICK = 0.25
STATS_TIMEOUT = 5.0  # seconds; a worker reports four times a second
START_TIMEOUT = 300.0  # seconds for all workers to load their weights
QUIET_TIMEOUT = 60.0  # seconds for workers without requests to come to rest, leases of lost handoffs included
# Without a server there is nobody to turn away: whoever measures or generates offline waits.
UNLIMITED = RouterSpec(max_waiting=sys.maxsize, max_waiting_tokens=sys.maxsize, request_timeout=math.inf)
logger = logging.getLogger("minidisagg")
OnEmit = Callable[[Emit, float], None]
OnStarting = Callable[[str, Starting | None], None]  # which worker
MAX_SEED = (1 << 63) - 1


class Observer(Protocol):
    """Hears what happens. `now` is `time.monotonic()`."""

    def on_message(self, envelope: Envelope, now: float) -> None:
        """A worker's message, after the router has had it."""

    def on_emit(self, emit: Emit, now: float) -> None:
        """News of a request, before its client has them."""

    def on_event(self, text: str) -> None:
        """One line of what operators want to know."""


class StartError(RuntimeError):
    """The cluster did not come up; one line for the user."""


class EngineError(RuntimeError):
    """The router, or the policy, has failed in a way that no restart mends; one line for the user."""


class Frontend(Operations):
    """A running cluster. `await Frontend.start(...)`, then `submit` or `generate`, then `await stop()`."""

    def __init__(
        self, model: ModelSettings, cluster: ClusterSettings, run: RunSettings, router: RouterSpec | None = None
    ) -> None:
        self.model = model
        self.cluster = cluster = msgspec.structs.replace(cluster, policy=pinned(cluster.policy))
        self.run = run
        self.loop = asyncio.get_running_loop()
        self._limits = router
        self.roles = {name: (role, settings.options()) for name, role, settings in cluster.roles()}
        rehearse(cluster.policy, self.roles)
        self._routers = 0  # that there have been
        self._log: BinaryIO | None = None  # of this one's inputs
        self.router = self._make_router()
        self.run_dir, self._owner = make_run_dir()
        self.channels: dict[str, Channel] = {}
        self.greetings: dict[str, Hello] = {}  # the last of each worker, dead ones too: what it can hold stays true
        self.restarted: list[tuple[float, str]] = []  # when a worker died, and which
        self.error = ""  # why a worker did not start
        self.failure = ""  # after which nothing works any more
        self.observers: list[Observer] = []
        self._ids = itertools.count()
        self._callbacks: dict[str, OnEmit] = {}
        self._on_starting: OnStarting | None = None
        self._ready = asyncio.Event()
        self._reported = asyncio.Event()  # a worker has sent its statistics
        self._greeted = asyncio.Event()  # a worker has said hello
        self._tasks: set[asyncio.Task[None]] = set()
        self._failing: dict[str, str] = {}  # by worker: why its store takes nothing
        self._server: asyncio.Server | None = None
        try:
            self.supervisor = Supervisor(model, cluster, run, self.run_dir, self._on_worker_down)
        except BaseException:
            shutil.rmtree(self.run_dir)
            os.close(self._owner)
            self._close_log()
            raise

    @classmethod
    async def start(
        cls, model: ModelSettings, cluster: ClusterSettings, run: RunSettings, router: RouterSpec | None = None,
        on_starting: OnStarting | None = None,
    ) -> Frontend:  # fmt: skip
        """Start the workers and wait for all of them. Raises `StartError` or `ValueError` in one line.

        `on_starting` is told what a worker is at before it is up, by its name, and None once it is.
        """
        frontend = cls(model, check_moves(cluster, model.prefix_caching), run, router)
        frontend._on_starting = on_starting
        try:
            path = str(frontend.run_dir / "frontend.sock")
            frontend._server = await listen(path, frontend._serve_worker)
            await frontend.supervisor.start()
            await asyncio.wait_for(frontend._ready.wait(), START_TIMEOUT)
            if error := frontend.error or frontend.failure:
                raise StartError(error)
        except TimeoutError:
            await frontend.stop()
            raise StartError(f"the workers did not come up within {START_TIMEOUT:.0f} s") from None
        except BaseException:
            await frontend.stop()
            raise
        frontend._on_starting = None  # a worker that comes back has no line to be shown on
        frontend._warn()
        task = frontend.loop.create_task(frontend._tick())
        frontend._tasks.add(task)
        task.add_done_callback(frontend._on_tick_end)
        return frontend

    async def stop(self) -> None:
        """Stop the workers, close the sockets, remove the run directory."""
        for task in self._tasks:
            task.cancel()
        for request_id in list(self._callbacks):
            self._emit(Emit(request_id, finish="error", error="the engine is stopping"))
        for channel in self.channels.values():
            channel.close()
        await self.supervisor.stop()
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self.run_dir, True)  # a few small files; at the interpreter's exit there are no threads to ask
        os.close(self._owner)
        self._close_log()

    async def __aenter__(self) -> Frontend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ------------------------------------------------------------ what users call

    @property
    def stats(self) -> dict[str, Stats]:
        """The last `Stats` of each live worker."""
        return self.router.stats

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output that every worker can hold, whether it is up or not."""
        return min((hello.max_model_len for hello in self.greetings.values()), default=0)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return int(next(iter(self.greetings.values())).info["vocab_size"])

    def check(self, prompt: list[int], sampling: SamplingParams) -> None:
        """Raises `ValueError` if no worker could ever finish this request."""
        limit = self.max_model_len
        # Built in this process, neither has been through a decoder yet, and the workers' would refuse what they hold.
        msgspec.convert(prompt, list[TokenId])
        msgspec.convert(msgspec.structs.asdict(sampling), SamplingParams)
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) + sampling.max_tokens > limit + (sampling.max_tokens == 1):  # whose own KV nobody computes
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}: "
                f"together more than the limit of {limit}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise ValueError(f"token ids must be below the vocabulary's size of {self.vocab_size}")

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        on_emit: OnEmit,
        arrival: float | None = None,
        salt: str = "",
        priority: int = 0,
        **more: Any,
    ) -> str:
        """Send a request and return its id; `on_emit(emit, time.monotonic())` is called with its tokens and its end.

        `more`: other fields of `RequestSpec`, which policies see or a benchmark needs. Raises `ValueError`, and
        `EngineError` once the engine has failed for good.
        """
        if self.failure:
            raise EngineError(self.failure)
        self.check(prompt, sampling)
        number = next(self._ids)
        request_id = f"{number:08d}"  # never reused: workers remember the ids of what is over
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=((self.run.seed << 32) + number) & MAX_SEED)
        self._callbacks[request_id] = on_emit
        now = time.monotonic()
        spec = RequestSpec(
            prompt=prompt,
            sampling=sampling,
            arrival=now if arrival is None else arrival,
            salt=salt,
            priority=priority,
            **more,
        )
        self.router.on_request(request_id, spec, now)
        self._drain()
        return request_id

    def abort(self, request_id: str) -> None:
        """The client left; its callback hears of the end."""
        self.router.on_abort(request_id, time.monotonic())
        self._drain()

    async def generate(self, prompt: list[int], sampling: SamplingParams, **more: Any) -> AsyncIterator[Emit]:
        """Tokens as they come, the end last; `more` as of `submit`. Leaving the iteration aborts the request."""
        news: asyncio.Queue[Emit] = asyncio.Queue()  # bounded by max_tokens
        request_id = self.submit(prompt, sampling, lambda emit, _: news.put_nowait(emit), **more)
        try:
            while True:
                emit = await news.get()
                yield emit
                if emit.finish:
                    return
        finally:
            self.abort(request_id)

    # ------------------------------------------------------------ what operators call

    async def reconfigure(self, cluster: ClusterSettings, run: RunSettings) -> None:
        """Make the same workers another cluster, as it is after its start: on the same processes, weights and memory,
        with its roles, options, policy, records and injected delays.

        Caches are empty, policies and estimators new; workers keep their names, and begin their next epoch. Waits until
        they are at rest. Raises `ValueError` where requests run or `cluster` takes other workers, and `StartError`.
        """
        if not built_alike(self.cluster, cluster):
            raise ValueError("these workers cannot be that cluster: it takes others")
        if self.router.requests:
            raise ValueError(f"{len(self.router.requests)} requests are running")
        roles = zip(self.worker_names, cluster.roles(), strict=True)
        roles_by_name = {name: (role, settings.options()) for name, (_, role, settings) in roles}
        cluster = msgspec.structs.replace(cluster, policy=pinned(cluster.policy))
        rehearse(cluster.policy, roles_by_name)
        await self._all_up()
        self.cluster, self.run, self.roles = cluster, run, roles_by_name
        self.router = self._make_router()  # a new one has no estimates, and takes no news of the epochs before
        for name, config in self.supervisor.reconfigure(cluster, run).items():
            if name in self.channels:  # else its process is dead, and the next one is started so
                body = Reconfigure(msgspec.json.encode(config).decode())
                self.channels[name].send(Envelope(ROUTER, 0, body))
        await self._all_up()

    async def fresh_stats(self) -> dict[str, Stats]:
        """Wait until every live worker has reported anew, so that its counters cover all that has happened."""
        seen = dict(self.router.reports)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATS_TIMEOUT):
                # The next report may have been under way when this was asked for; the one after it was not.
                while any(self.router.reports.get(name, 0) < seen.get(name, 0) + 2 for name in self.hellos):
                    self._reported.clear()
                    await self._reported.wait()
        return dict(self.stats)

    # ------------------------------------------------------------ inside

    def _warn(self) -> None:
        """Once, of what makes it slower than it might be."""
        for why in {hello.info.get("why_link", "") for hello in self.greetings.values()} - {""}:
            logger.warning("%s: KV moves over gloo instead, through the hosts' memory", why)
        devices = Counter(str(hello.info.get("device", "")) for hello in self.greetings.values())
        for device, count in devices.items():
            if count > 1 and device.startswith("cuda") and not mps_daemon():
                logger.warning(
                    "%d workers share %s: without an MPS daemon their kernels take turns, and each is as slow as the "
                    "other is busy",
                    count, device,
                )  # fmt: skip

    def _make_router(self) -> Router:
        options = {Role.PREFILL: self.cluster.prefill.options(), Role.DECODE: self.cluster.decode.options()}
        limits = self._limits or replace(UNLIMITED, seed=self.run.seed)
        run = self.run
        spec = replace(limits, stuck_after=run.step_deadline, predictor=run.predictor, options=options)
        policy = make_policy(self.cluster.policy, ROUTER, self.run.decision_dir)
        self._close_log()
        self._routers += 1
        if not run.record_dir:
            return Router(spec, policy)
        path = Path(run.record_dir) / f"{ROUTER}.{self._routers}.inputs"
        path.parent.mkdir(exist_ok=True)
        self._log = path.open("wb", buffering=0)
        return RecordingRouter(spec, policy, self.cluster.policy, self._log)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    async def _all_up(self) -> None:
        """Wait until every worker has said hello to this router."""
        try:
            async with asyncio.timeout(QUIET_TIMEOUT):
                while len(self.hellos) < len(self.worker_names):
                    if self.failure:
                        raise StartError(self.failure)
                    self._greeted.clear()
                    await self._greeted.wait()
        except TimeoutError:
            missing = ", ".join(name for name in self.worker_names if name not in self.hellos)
            raise StartError(f"{missing} did not come to rest within {QUIET_TIMEOUT:.0f} s") from None

    async def _serve_worker(self, channel: Channel) -> None:
        try:
            async for envelope in channel:
                if self._on_starting is not None and isinstance(envelope.body, Starting | Hello):
                    self._on_starting(envelope.source, envelope.body if isinstance(envelope.body, Starting) else None)
                if isinstance(envelope.body, Hello):
                    self.supervisor.greeted.add((envelope.source, envelope.epoch))
                    self.channels[envelope.source] = channel
                    self.greetings[envelope.source] = envelope.body
                    self.tell(f"{envelope.source} is up, epoch {envelope.epoch}")
                elif isinstance(envelope.body, Fatal) and envelope.source not in self.channels:
                    self.error = f"{envelope.source}: {envelope.body.reason}"
                    self._ready.set()
                elif isinstance(envelope.body, Fatal) and envelope.body.hopeless:
                    self._give_up(envelope.body.reason)
                    for request_id in list(self.router.requests):  # or the next process would be sent them
                        self.router.on_abort(request_id, time.monotonic())
                now = time.monotonic()
                self.router.on_message(envelope, now)
                self._drain()
                for observer in self.observers:
                    observer.on_message(envelope, now)
                self._on_told(envelope.source, envelope.body)
                if isinstance(envelope.body, Hello):
                    self._greeted.set()
                if len(self.channels) == len(self.worker_names):
                    self._ready.set()
        except ChannelError as error:
            logger.warning("%s", error)  # the worker notices, and starts anew
        except Exception as error:
            self._on_router_failure(error)

    def _on_worker_down(self, name: str, epoch: int, early: bool, suspects: Collection[SeqKey] | None) -> None:
        if early and not self.error:
            self.error = f"{name} did not start: {self.supervisor.log_tail(name) or 'no message'}"
        if early:
            self._ready.set()
        self.channels.pop(name, None)
        self.restarted.append((time.monotonic(), name))
        self.tell(f"{name} is down, epoch {epoch}")
        try:
            self.router.on_worker_down(name, epoch, time.monotonic(), suspects)
            self._drain()
        except Exception as error:  # the supervisor, who calls this, goes on
            self._on_router_failure(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.router.on_tick(time.monotonic())
            self._drain()

    def _on_tick_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_router_failure(error)

    def _on_router_failure(self, error: BaseException) -> None:
        """A bug in the router or its policy."""
        reason = str(error) if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
        self._give_up(f"the router failed: {reason}", error)

    def _give_up(self, reason: str, error: BaseException | None = None) -> None:
        """Nothing will work any more, and nobody waits for it for ever."""
        self.failure = self.failure or reason
        logger.error("%s", reason, exc_info=error)
        for request_id in list(self._callbacks):
            self._emit(Emit(request_id, finish="error", error=reason))

    def tell(self, text: str, level: int = logging.INFO) -> None:
        logger.log(level, "%s", text)
        for observer in self.observers:
            observer.on_event(text)

    def _drain(self) -> None:
        for effect in drain(self.router.outbox):
            if isinstance(effect, Send):
                channel = self.channels.get(effect.dest)
                if channel is not None:  # else its process is dying, and `_on_worker_down` follows
                    try:
                        channel.send(Envelope(ROUTER, 0, effect.body))
                    except ChannelError as error:  # it reads no more
                        logger.warning("%s: %s", effect.dest, error)
                        self.supervisor.kill(effect.dest, self.router.epochs[effect.dest])
            elif isinstance(effect, Emit):
                self._emit(effect)
            elif isinstance(effect, Kill):
                self.supervisor.kill(effect.worker, effect.epoch)

    def _emit(self, emit: Emit) -> None:
        callback = self._callbacks.get(emit.request_id)
        if callback is None:
            return  # told of its end already: the engine stops, or the router failed
        if emit.finish:
            del self._callbacks[emit.request_id]
        now = time.monotonic()
        for observer in self.observers:
            observer.on_emit(emit, now)
        callback(emit, now)

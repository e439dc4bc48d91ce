"""A worker process: one event loop that drives one `EngineCore`, and one thread that drives one device.

    front end ──Submit──▶ channel ──Received──┐
    peers ──KVOffer, …──▶ channel ──Received──┼─▶ core.on ─▶ _advance: carry out the outbox, plan the next step
    device thread ──tokens────────StepDone────┤                Send          → channel to the front end or a peer
    link threads ──pieces─────────PieceDone───┘                StartPiece → LinkSet
                                                               StepPlan      → device thread

On a CPU the loop and the device share the worker's cores; the device thread runs at a lower priority, so that a
message is answered at once even in the middle of a long prefill.

Crash-only: an error at any entrance of the loop ends the process, for the supervisor to start the next. Behind that the
loop's own handler and the threads' are the net.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from minidisagg.config import WorkerConfig
from minidisagg.core.accounts import StalledError
from minidisagg.core.checked import PolicyError
from minidisagg.core.effects import AbortLink, LoadPages, OpenLink, Send, StartPiece, drain
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputlog import RecordingCore
from minidisagg.core.inputs import (
    AbortConfirmed,
    Input,
    LayersDone,
    Loaded,
    PieceDone,
    Received,
    Saved,
    Schedule,
    StepDone,
    Tick,
)
from minidisagg.core.messages import (
    ROUTER,
    AnyMessage,
    Envelope,
    Fatal,
    Hello,
    LinkOpen,
    LinkReady,
    PeerDown,
    PeerUp,
    PieceSpans,
    Reconfigure,
    Starting,
)
from minidisagg.core.plan import StepPlan
from minidisagg.model.config import ModelConfig
from minidisagg.model.loader import load_config
from minidisagg.policies import make_policy
from minidisagg.runtime.blackbox import Note
from minidisagg.runtime.ceilings import measure_ceilings
from minidisagg.runtime.channel import Channel, ChannelError, connect, listen
from minidisagg.runtime.device import Step, StepResult
from minidisagg.runtime.linkset import LinkHooks, LinkSet, link_kind
from minidisagg.runtime.load import max_model_len, most_seqs, most_tokens
from minidisagg.runtime.runner import Runner
from minidisagg.runtime.specs import engine_spec
from minidisagg.runtime.storage import Storage
from minidisagg.store.lifetime import store_of
from minidisagg.transfer.emulate import make_nic
from minidisagg.transfer.links import LinkHost

TICK = 0.25  # seconds between ticks and Stats
UNSENT = 10_000  # messages kept for a peer whose address has not come yet


class Worker:
    """Drives one engine core. See the module's picture."""

    make_links: Callable[[str, LinkHost, LinkHooks], LinkSet] = LinkSet

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.runner = Runner(config, self._computed)
        self.done = asyncio.Event()
        self.failure = ""
        self.record: BinaryIO | None = None  # the input log
        self.storage: Storage | None = None
        self.next_config: WorkerConfig | None = None  # that it takes once nothing is left to do
        self.peers: dict[str, str] = {}  # addresses of the live workers
        self.channels: dict[str, Channel] = {}
        self.unsent: dict[str, list[AnyMessage]] = {}  # for peers that have no channel yet
        self.tasks: set[asyncio.Task[None]] = set()
        self.steps_flying = self.checked = 0  # steps under way, and those done when the accounts were checked last
        self.busy_seconds = self.flops = self.bytes_read = 0.0
        self.clock_offset = config.run.clock_offsets.get(config.name, 0.0)
        self.reading = Note(Path(config.run_dir), config.name, config.epoch, "message")

    async def run(self) -> None:
        """Load, say hello, serve until told to stop; raises `ValueError` for what a user can mend."""
        config = self.config
        self.catch_all()
        run_dir = Path(config.run_dir)
        frontend = await connect(f"unix:{run_dir}/frontend.sock")
        self.channels[ROUTER] = frontend
        try:
            model_config = load_config(config.model.model)
            await self.runner.load(model_config, self._say_starting)
            hello = self.hello = await self.runner.on_device(self._prepare, model_config)
            self._make_links()
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            self._send(ROUTER, Fatal(reason, config.name, config.epoch))
            await asyncio.sleep(0.2)  # let it leave
            raise
        server = await listen(hello.address.removeprefix("unix:"), self._serve_peer)
        self._send(ROUTER, hello)
        self._spawn(self._serve_frontend(frontend))
        self._spawn(self._tick())
        await self.done.wait()
        server.close()
        for task in self.tasks:
            task.cancel()
        await self.links.close()
        if self.storage is not None:
            await self.storage.close()
        self.runner.close()
        if self.record is not None:
            self.record.close()

    def _say_starting(self, what: str, done: int, total: int) -> None:
        self.loop.call_soon_threadsafe(self._send, ROUTER, Starting(what, done, total))

    def _prepare(self, model_config: ModelConfig) -> Hello:
        config, cache, model = self.config, self.runner.device.cache, self.runner.device.model
        (kind, why), emulated = link_kind(config.cluster), config.cluster.emulate_link
        self.nic = make_nic(emulated)
        bandwidth = flops = 0.0  # not known
        if config.run.ceilings and config.epoch == 1:  # later its neighbours are at work, and would be measured too
            bandwidth, flops = measure_ceilings(model.dtype, device=model.device)
        self.link_kind = kind
        self._make_core()
        limit = max_model_len(config, model_config, cache)
        return Hello(
            config.role,
            cache.num_pages,
            cache.page_size,
            limit,
            self.core.spec.fingerprint,
            f"unix:{config.run_dir}/{config.name}.{config.epoch}.sock",
            os.getpid(),
            model_config.kv_bytes_per_token(cache.data.dtype.itemsize),
            self.runner.device.info()
            | {
                "cpus": config.settings.cpus,
                "link": kind if self.nic is None else f"{kind} as {emulated}",
                "why_link": why,
                "bandwidth": bandwidth,
                "flops": flops,
            },
        )

    def _make_core(self) -> None:
        """The core of this epoch, and the log of its inputs."""
        config, kind = self.config, self.link_kind
        spec = engine_spec(config, self.runner.device, kind, self.nic)
        load_policy = partial(make_policy, who=config.name, log_dir=config.run.decision_dir)
        if self.record is not None:
            self.record.close()
            self.record = None
        if config.run.record_dir:
            path = Path(config.run.record_dir) / f"{config.name}.{config.epoch}.inputs"
            self.record = path.open("wb", buffering=0)  # a kill loses nothing
            self.core: EngineCore = RecordingCore(spec, load_policy, self.record)
        else:
            self.core = EngineCore(spec, load_policy)
        ahead = config.run.step_ahead
        self.depth = ahead if ahead >= 0 else int(self.runner.device.model.device.type == "cuda")

    def _make_links(self) -> None:
        config, cache = self.config, self.runner.device.cache
        run_dir, timeout = Path(config.run_dir), config.run.link_timeout
        checked, codecs = config.cluster.gpu_checksums, self.core.spec.codecs
        host = LinkHost(self.link_kind, cache.data, cache.fd, run_dir, timeout, self.nic, checked, codecs)
        clock = self.now if config.run.trace else None
        hooks = LinkHooks(self._carry_out, self._on_news, self._on_failure, clock)
        self.links = self.make_links(config.name, host, hooks)
        if config.cluster.kv_store:
            spec = store_of(config.cluster.kv_store, config.run_dir)
            self.storage = Storage(spec, cache.data, self.core.spec.fingerprint, self._on_news)

    async def _begin_epoch(self, config: WorkerConfig) -> None:
        """The next epoch, as after a start, on the same process, weights, memory and channels.

        Links are closed and opened anew on demand: a core begins without any, so that a log begins there as well, and
        replays without what came before. Whoever measures warms up first.
        """
        self.core.check_integrity()
        await self.links.close()
        if self.storage is not None:
            await self.storage.close()
            self.storage = None
        await self.runner.on_device(self.runner.device.begin, most_seqs(config.cluster), most_tokens(config.cluster))
        self.config, self.checked = config, 0
        self._make_core()
        self._make_links()
        self.hello = msgspec.structs.replace(self.hello, role=config.role)
        self._send(ROUTER, self.hello)

    # ------------------------------------------------------------ inputs

    async def _serve_frontend(self, channel: Channel) -> None:
        async for envelope in channel:
            self._on_message(envelope)
        self.done.set()  # the front end is gone, and a worker does not outlive it

    async def _serve_peer(self, channel: Channel) -> None:
        try:
            async for envelope in channel:
                self._on_message(envelope)
        except ChannelError as error:
            self._stop(str(error))
        except Exception as error:  # no task of this worker's, which would tell
            self._on_failure(error)

    def _on_message(self, envelope: Envelope) -> None:
        if self._guarded(self._read, envelope):
            self._advance()

    def _read(self, envelope: Envelope) -> None:
        """The note stays where the message does not come through: its request is a suspect."""
        about = getattr(envelope.body, "request_id", None)
        if about is None:
            self._take(envelope)
        else:
            self.reading.write([(about, envelope.body.incarnation)])  # type: ignore[union-attr]
            self._take(envelope)
            self.reading.clear()

    def _take(self, envelope: Envelope) -> None:
        body = envelope.body
        if isinstance(body, PeerUp):
            if self.peers.get(body.worker, body.address) != body.address:  # a death that this one was not told of
                self._hang_up(body.worker)
            self.peers[body.worker] = body.address
            if body.worker in self.unsent:
                self._spawn(self._connect_peer(body.worker))
        elif isinstance(body, PeerDown):
            self.peers.pop(body.worker, None)
            self.unsent.pop(body.worker, None)
            self._hang_up(body.worker)
        if isinstance(body, LinkOpen):
            if envelope.epoch >= self.core.peers.get(envelope.source, 0):  # else its process is dead already
                self.links.on_link_open(envelope.source, body)
        elif isinstance(body, LinkReady):
            self.links.on_link_ready(envelope.source, body)
        elif isinstance(body, Reconfigure):
            self.next_config = msgspec.json.decode(body.config, type=WorkerConfig)
        else:
            self.core.on(Received(envelope), self.now())
        if isinstance(body, PeerDown):
            self._drain()  # the core gives up the links that it knows of, and what is left is for nobody
            self.links.on_peer_down(body.worker, body.epoch)

    def _on_news(self, what: LayersDone | PieceDone | AbortConfirmed | Loaded | Saved) -> None:
        if self._guarded(self._tell, what):
            self._advance()

    def _tell(self, what: Input) -> None:
        self.core.on(what, self.now())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._tell(Tick())
            self._advance()
            self._send(ROUTER, self.stats())
            if pieces := self.links.take_trace():
                self._send(ROUTER, PieceSpans(pieces))
            if self.core.idle and self.core.steps != self.checked:  # wrong accounts end it before they do harm
                self.checked = self.core.steps
                self.core.check_integrity()

    def now(self) -> float:
        """This worker's clock; no other process knows where it began."""
        return time.monotonic() + self.clock_offset

    def stats(self) -> AnyMessage:
        """The core's numbers with what only the process knows."""
        return msgspec.structs.replace(
            self.core.stats(),
            links=self.links.stats(),
            busy_seconds=self.busy_seconds,
            flops=self.flops,
            bytes_read=self.bytes_read,
            cpu_seconds=time.process_time(),
            clock=self.now(),
            store=self.storage.stats() if self.storage else None,
        )

    # ------------------------------------------------------------ outputs

    def _advance(self) -> None:
        """Carry out what the core wants, and keep the device busy."""
        self._guarded(self._carry_on)
        if self.next_config is not None and self.core.idle:
            config, self.next_config = self.next_config, None
            self._spawn(self._begin_epoch(config))

    def _carry_on(self) -> None:
        self._drain()
        while self.steps_flying <= self.depth:
            plan = self.core.on(Schedule(), self.now())
            self._drain()
            if plan is None:
                return
            self.steps_flying += 1
            self._spawn(self._step(plan))

    async def _step(self, plan: StepPlan) -> None:
        result = await self.runner.step(plan, partial(self._report, plan.step_id))
        self.steps_flying -= 1
        self.busy_seconds += result.seconds
        self.flops += result.flops
        self.bytes_read += result.bytes_read
        for logprobs in result.logprobs:  # they decide nothing, so the core need not see them
            self._send(ROUTER, logprobs)
        self._tell(StepDone(plan.step_id, result.tokens, result.seconds))
        self._advance()

    def _computed(self, step: Step, result: StepResult) -> StepResult:
        """On the device's thread, before the next step: for who wants it to take longer."""
        return result

    def _report(self, step_id: int, layer: int) -> None:
        """From whatever thread knows it; the loop hears of it before the step's end, which comes the same way."""
        self.loop.call_soon_threadsafe(self._on_news, LayersDone(step_id, layer))

    def _drain(self) -> None:
        for effect in drain(self.core.outbox):
            if isinstance(effect, Send):
                self._carry_out(effect)
            elif isinstance(effect, StartPiece):
                self.links.start(effect.piece)
            elif isinstance(effect, OpenLink):
                self.links.open(effect.peer, effect.link_epoch)
            elif isinstance(effect, AbortLink):
                self.links.abort(effect)
            elif isinstance(effect, LoadPages):
                self.storage.load(effect)  # type: ignore[union-attr]  # a core whose spec has a store
            else:
                self.storage.save(effect)  # type: ignore[union-attr]

    def _carry_out(self, effect: Send) -> None:
        self._send(effect.dest, effect.body)

    def _send(self, dest: str, body: AnyMessage) -> None:
        if dest in self.channels:
            try:
                self.channels[dest].send(Envelope(self.config.name, self.config.epoch, body))
            except ChannelError as error:
                self._stop(f"{dest}: {error}")
            return
        first = dest not in self.unsent
        waiting = self.unsent.setdefault(dest, [])
        waiting.append(body)
        if len(waiting) > UNSENT:
            self._stop(f"{dest} cannot be reached")
        elif first and dest in self.peers:
            self._spawn(self._connect_peer(dest))

    def _hang_up(self, peer: str) -> None:
        if (gone := self.channels.pop(peer, None)) is not None:
            gone.close()

    async def _connect_peer(self, peer: str) -> None:
        address = self.peers[peer]
        try:
            channel = await connect(address)
        except OSError:
            if self.peers.get(peer) == address:  # it died; its parent will say so
                self.unsent.pop(peer, None)
            return
        if self.peers.get(peer) != address:  # it died meanwhile, and another one may have taken its place
            channel.close()
            return
        self.channels[peer] = channel
        for body in self.unsent.pop(peer, []):
            self._send(peer, body)

    # ------------------------------------------------------------ tasks

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """Crash-only: an error in any task ends the process, and its supervisor starts the next."""
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> bool:
        """Whether it came through; a worker that has failed does nothing more."""
        if self.failure:
            return False
        try:
            work(*arguments)
        except Exception as error:
            self._on_failure(error)
        return not self.failure

    def catch_all(self) -> None:
        """The net below: what no entrance has caught ends this process too."""

        def on_thread_error(failed: threading.ExceptHookArgs) -> None:
            error = failed.exc_value or RuntimeError(f"{failed.thread} has failed")
            self.loop.call_soon_threadsafe(self._on_failure, error)

        self.loop.set_exception_handler(self._on_loop_error)
        threading.excepthook = on_thread_error

    def _on_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ConnectionError):  # a peer's end of a channel: its parent will say so
            return
        self._on_failure(error or RuntimeError(context["message"]))

    def _on_failure(self, error: BaseException) -> None:
        # The next process would have the same policy; but what stalled may be these requests, which it tries thrice.
        hopeless = isinstance(error, PolicyError) and not isinstance(error, StalledError)
        if hopeless and not self.failure:
            self._send(ROUTER, Fatal(str(error), self.config.name, self.config.epoch, hopeless=True))
        self._stop(f"{type(error).__name__}: {error}", error)

    def _stop(self, reason: str, error: BaseException | None = None) -> None:
        if not self.failure:
            self.failure = reason
            if error is not None:
                sys.excepthook(type(error), error, error.__traceback__)  # into the worker's log file
        self.done.set()

"""The second driver of the core: a heap, a virtual clock, and workers whose device is a cost model.

It runs the production `Router` and `EngineCore`; only time, messages and bytes are simulated. With `tokens`, KV is a
hash chain (`sim/memory.py`), in which any wrong page shows in the output. Without, only times are true, and decode
steps that are equal are one event, until something comes to the worker: then the steps that have ended are told, and
the one that is under way is the last.

Faults are calls, made by whoever drives the run: `kill`, `stall`, `abort`; `Chaos` reorders and duplicates messages,
breaks transfers and delays the confirmation of an abort; a step that holds a request of `poison` ends its worker.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush
from math import fsum

import msgspec

from minidisagg.core.effects import AbortLink, OpenLink, Send, StartPiece, drain
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputs import AbortConfirmed, Input, LayersDone, PieceDone, Received, Schedule, StepDone, Tick
from minidisagg.core.messages import ROUTER, AnyMessage, Envelope, Hello, PeerUp, RequestSpec, SamplingParams
from minidisagg.core.plan import Piece, StepPlan, advanced
from minidisagg.core.policy import Policy
from minidisagg.core.router import Kill, Router
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tracked import Emit
from minidisagg.sim.cost_model import wire_bytes
from minidisagg.sim.devices import HashChain, TimingOnly
from minidisagg.sim.shelf import Shelf
from minidisagg.sim.world import UNHEEDED, Observer, Outcome, SimWorker, Step, World

TICK = 0.25  # seconds between ticks


class Simulator:
    """A cluster on a virtual clock."""

    def __init__(self, specs: list[EngineSpec], make_policy: Callable[[], Policy], world: World | None = None) -> None:
        self.now = 0.0
        self.world = world = world or World()
        self.cost, self.chaos = world.cost, world.chaos
        self.rng = random.Random(world.seed)
        self.make_policy = make_policy
        make_router = Router if world.record is None else world.record.router
        self.router = make_router(world.router, make_policy())
        self.workers: dict[str, SimWorker] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.poison: set[str] = set()
        self.orderly = not world.tokens and self.chaos == type(self.chaos)()
        self.shelf = Shelf(world.seed, self.chaos.break_transfer)
        self.deaths = 0
        self.happened = 0
        self.one_sided = any(spec.one_sided_links for spec in specs)
        self.planes = max(spec.num_layers if spec.granularity.layered else 1 for spec in specs)
        self.on_end: Callable[[str], None] = lambda _: None
        self.observers: list[Observer] = []
        self._events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._outside = 0  # arrivals and faults still to come
        self._last_delivery: dict[tuple[str, str], float] = {}
        self._targets: dict[tuple[str, int], SimWorker] = {}  # the process that a link was opened to
        self._posted: dict[tuple[str, int, int], dict[bool, tuple[SimWorker, Piece]]] = {}
        self._dead_ends: set[tuple[str, str, int, bool]] = set()  # (owner, peer, link epoch, outgoing)
        self._touched: set[str] = set()  # workers, or the router, that this event may have changed
        for spec in specs:
            self._start(spec)
        self.at(TICK, self._tick)

    # ------------------------------------------------------------ what the test or the planner calls

    def plan(self, time: float, action: Callable[[], None]) -> None:
        """Something from outside happens at this virtual time: an arrival, a fault. The run goes on until then."""
        self._outside += 1

        def happen() -> None:
            self._outside -= 1
            action()

        self.at(time, happen)

    def at(self, time: float, action: Callable[[], None], last: bool = True) -> None:
        """Run `action` at this virtual time; after whatever is at the same time and not `last`."""
        heappush(self._events, (time if time > self.now else self.now, last, next(self._count), action))

    def submit(
        self, request_id: str, prompt: list[int], sampling: SamplingParams, at: float, salt: str = "", priority: int = 0
    ) -> None:
        """A client sends this request at that time."""
        spec = RequestSpec(prompt=prompt, sampling=sampling, arrival=at, salt=salt, priority=priority)
        self.plan(at, partial(self.send, request_id, spec))

    def send(self, request_id: str, spec: RequestSpec) -> None:
        """A client's request arrives, now."""
        outcome = self.outcomes[request_id] = Outcome(spec)
        self.router.on_request(request_id, spec, self.now)
        if request_id in self.router.requests:
            outcome.workers = self.router.requests[request_id].workers  # grows with each move
        self._drain_router()

    def abort(self, request_id: str) -> None:
        """The client of this request leaves, now."""
        self.router.on_abort(request_id, self.now)
        self._drain_router()

    def kill(self, name: str) -> None:
        """SIGKILL: the process is gone at once, its parent notices soon, a new one starts later."""
        worker = self.workers[name]
        if worker.alive:
            self._tell_equal_steps(worker)
            worker.alive = False
            if isinstance(worker.device, HashChain):
                worker.device.alive = False
            self.deaths += 1
            self.at(self.now + 0.005, lambda: self._reaped(worker))

    def stall(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`: everything it should have done happens then, in order."""
        self._tell_equal_steps(self.workers[name])
        self.workers[name].stalled_until = max(self.workers[name].stalled_until, self.now + seconds)

    def run(self, until: float = 1e9) -> None:
        """Process events until all is over and quiet for a second, or the clock passes `until`."""
        quiet_since = self.now
        while self._events and self.now <= until:
            if self._outside or not self.settled:
                quiet_since = self.now
            elif self.now > quiet_since + 1.0:
                return
            self._next()

    def run_events(self, most: int, until: Callable[[], bool] = lambda: False) -> None:
        """So many events, or fewer if something has come about; there is always another, since time passes."""
        for _ in range(most):
            self._next()
            if until():
                return

    def _next(self) -> None:
        self.happened += 1
        self.now, _, _, action = heappop(self._events)
        action()
        if self.world.check:
            self.check_integrity()
            self._touched.clear()

    def check_integrity(self) -> None:
        """Invariants of the cores that the last event touched: those of the others were proved before it."""
        if ROUTER in self._touched:
            self.router.check_integrity()
        for name in self._touched - {ROUTER}:
            if self.workers[name].alive:
                self.workers[name].core.check_integrity()

    @property
    def settled(self) -> bool:
        """No request and no transfer is under way."""
        return not self.router.requests and all(w.core.idle for w in self.workers.values() if w.alive)

    # ------------------------------------------------------------ processes

    def _start(self, spec: EngineSpec) -> None:
        world = self.world
        make_core = EngineCore if world.record is None else world.record.core
        core = make_core(spec, lambda _: self.make_policy())
        device = HashChain(core, self.planes, world.vocab, world.check) if world.tokens else TimingOnly()
        worker = self.workers[spec.name] = SimWorker(core, device)
        size, kv_bytes = spec.page_size, spec.layer_bytes * spec.num_layers // spec.page_size
        hello = Hello(spec.role, spec.num_pages, size, 1 << 20, spec.fingerprint, f"sim:{spec.name}", 0, kv_bytes or 1)
        self._send(worker, ROUTER, hello)

    def _reaped(self, worker: SimWorker) -> None:
        spec, computing = worker.core.spec, worker.steps[0].plan.items if worker.steps else []
        suspects = {(item.request_id, item.incarnation) for item in computing} or None
        self.router.on_worker_down(spec.name, spec.epoch, self.now, suspects)
        self._drain_router()
        self.at(self.now + self.world.restart_after, lambda: self._start(replace(spec, epoch=spec.epoch + 1)))

    def _tick(self) -> None:
        self.router.on_tick(self.now)
        self._drain_router()
        for worker in self.workers.values():
            if not worker.silent:
                self._inside(worker, partial(self._worker_tick, worker), cuts=False)
                worker.silent = self.orderly and worker.core.idle
        self.at(self.now + TICK, self._tick)

    def _worker_tick(self, worker: SimWorker) -> None:
        if worker.repeats:  # what it tells of itself has the pages that the steps up to now have taken
            plan, _, ends = worker.steps[0]
            past, size = bisect.bisect_right(ends, self.now), worker.core.spec.page_size
            if any(item.start + past + 1 > len(item.pages) * size for item in plan.items):
                self._tell_equal_steps(worker)
        worker.core.on(Tick(), self.now)
        self._send(worker, ROUTER, msgspec.structs.replace(worker.core.stats(), links=[*worker.sent.values()]))

    def _inside(self, worker: SimWorker, action: Callable[[], None], cuts: bool = True) -> None:
        """Run in the worker's process: never once it is dead, later while it is stopped.

        `cuts`: equal steps that are under way end here, since what happens may change the next one.
        """
        if not worker.alive:
            return
        if self.now < worker.stalled_until or worker.backlog:
            worker.backlog.append(action)
            if len(worker.backlog) == 1:
                self.at(worker.stalled_until, lambda: self._resume(worker))
            return
        self._touched.add(worker.core.spec.name)
        worker.silent = False
        if cuts and worker.repeats:
            self._tell_equal_steps(worker)
        action()
        if worker.alive:
            if worker.core.outbox:
                self._drain_worker(worker)
            if len(worker.steps) <= self.world.depth:
                self._schedule(worker)

    def _resume(self, worker: SimWorker) -> None:
        if self.now < worker.stalled_until:  # it was stopped again
            self.at(worker.stalled_until, lambda: self._resume(worker))
            return
        backlog, worker.backlog = worker.backlog, []
        for action in backlog:
            self._inside(worker, action)

    # ------------------------------------------------------------ messages

    def _send(self, sender: SimWorker, dest: str, body: AnyMessage) -> None:
        self._post(Envelope(sender.core.spec.name, sender.core.spec.epoch, body), dest, None)

    def _post(self, envelope: Envelope, dest: str, target: SimWorker | None) -> None:
        """FIFO per pair, unless chaos has its way. A frame goes to the process to which its channel leads."""
        if target is None and dest != ROUTER:
            target = self.workers[dest]
        if self.orderly:
            self.at(self.now + self.cost.message, partial(self._deliver, envelope, dest, target))
            return
        if ROUTER not in (envelope.source, dest) and self.rng.random() < self.chaos.drop:
            return
        pair = envelope.source, dest
        when = max(self.now + self.cost.message, self._last_delivery.get(pair, 0.0))
        if self.rng.random() < self.chaos.reorder and not isinstance(envelope.body, Hello):
            when += self.rng.random() * self.chaos.delay
        else:
            self._last_delivery[pair] = when
        times = [when]
        if self.rng.random() < self.chaos.duplicate:
            times.append(when + self.rng.random() * self.chaos.delay)
        for time in times:
            self.at(time, partial(self._deliver, envelope, dest, target))

    def _deliver(self, envelope: Envelope, dest: str, target: SimWorker | None) -> None:
        if dest == ROUTER:
            for observer in self.observers:
                observer.on_message(envelope, self.now)
            self.router.on_message(envelope, self.now)
            self._drain_router()
        elif target is not None:
            cuts = not isinstance(envelope.body, UNHEEDED)
            self._inside(target, partial(self._tell, target, Received(envelope)), cuts)

    def _drain_router(self) -> None:
        self._touched.add(ROUTER)
        for effect in drain(self.router.outbox):
            if isinstance(effect, Send):
                # The first process of a peer changes nothing; of a thousand workers that would be a million messages.
                if not (self.orderly and isinstance(effect.body, PeerUp) and effect.body.epoch == 1):
                    self._post(Envelope(ROUTER, 0, effect.body), effect.dest, None)
            elif isinstance(effect, Emit):
                self._on_emit(effect)
            elif isinstance(effect, Kill):
                if self.workers[effect.worker].core.spec.epoch == effect.epoch:
                    self.kill(effect.worker)

    def _on_emit(self, emit: Emit) -> None:
        outcome = self.outcomes[emit.request_id]
        if outcome.finish:
            raise AssertionError(f"{emit.request_id} emits after its end")
        if emit.tokens and emit.index != len(outcome.tokens):
            raise AssertionError(f"{emit.request_id} emits index {emit.index} after {len(outcome.tokens)} tokens")
        if emit.handoff and outcome.tokens:
            outcome.handoffs.append(len(outcome.tokens) - 1)
        outcome.tokens.extend(emit.tokens)
        outcome.cached_tokens = emit.cached_tokens
        # Of equal steps at once each token came when its step's own message would have.
        message = self.cost.message
        outcome.token_times.extend([end + message for end in emit.ends] or [self.now] * len(emit.tokens))
        outcome.finish, outcome.error, outcome.times = emit.finish, emit.error, emit.times
        for observer in self.observers:
            observer.on_emit(emit, self.now)
        if emit.finish:
            self.on_end(emit.request_id)

    # ------------------------------------------------------------ a worker's device and links

    def _drain_worker(self, worker: SimWorker) -> None:
        for effect in drain(worker.core.outbox):
            if isinstance(effect, Send):
                self._send(worker, effect.dest, effect.body)
            elif isinstance(effect, StartPiece):
                self._start_transfer(worker, effect.piece)
            elif isinstance(effect, AbortLink):
                self._abort_link(worker, effect)
            elif isinstance(effect, OpenLink):
                self._targets[worker.core.spec.name, effect.link_epoch] = self.workers[effect.peer]
            else:
                seconds, what = self.shelf.carry_out(worker.device, effect)
                self.at(self.now + seconds, partial(self._inside, worker, partial(self._shelved, worker, what)))

    def _shelved(self, worker: SimWorker, what: Callable[[], Input]) -> None:
        worker.core.on(what(), self.now)

    def _schedule(self, worker: SimWorker) -> None:
        most = worker.device.most if self.world.equal_steps and not self.world.depth else 1
        while len(worker.steps) <= self.world.depth:
            plan = worker.core.on(Schedule(most), self.now)
            if worker.core.outbox:
                self._drain_worker(worker)
            if plan is None:
                return
            seconds = self.cost.steps(worker.core.spec, plan)
            begins = max(worker.device_free_at, self.now)
            for layer in plan.reports:
                share = layer / worker.core.spec.num_layers
                self.at(begins + seconds[0] * share, partial(self._report_layers, worker, plan, layer))
            ends = list(itertools.accumulate(seconds, initial=begins))[1:]
            self._begin(worker, Step(plan, seconds, ends))

    def _begin(self, worker: SimWorker, step: Step) -> None:
        worker.steps.append(step)
        worker.device_free_at = step.ends[-1]
        # Before a message of the same instant, whether it was put there now or as one of many steps long ago.
        self.at(step.ends[-1], partial(self._finish_step, worker, step), last=self.world.tokens)

    def _finish_step(self, worker: SimWorker, step: Step) -> None:
        if step.plan.repeat > 1 and (not worker.steps or worker.steps[0] is not step):
            return  # cut short
        self._inside(worker, partial(self._finish, worker, step), cuts=False)

    def _finish(self, worker: SimWorker, step: Step) -> None:
        plan = step.plan
        if any(item.request_id in self.poison for item in plan.items):
            self.kill(worker.core.spec.name)
            return
        tokens, took = worker.device.finish(plan, plan.repeat), fsum(step.seconds)
        worker.steps.popleft()
        worker.busy += took
        ends = step.ends if plan.repeat > 1 else []
        worker.core.on(StepDone(plan.step_id, tokens, took, plan.repeat, ends), self.now)

    def _tell_equal_steps(self, worker: SimWorker) -> None:
        """Those of the device's equal steps that have ended; the next one is under way, and no other follows."""
        if not worker.repeats:
            return
        plan, seconds, ends = worker.steps.popleft()
        past = bisect.bisect_right(ends, self.now)
        took = fsum(seconds[:past])
        worker.busy += took
        worker.core.on(StepDone(plan.step_id, worker.device.finish(plan, past), took, past, ends[:past]), self.now)
        self._drain_worker(worker)
        self._begin(worker, Step(advanced(plan, past), seconds[past : past + 1], ends[past : past + 1]))

    def _report_layers(self, worker: SimWorker, plan: StepPlan, layer: int) -> None:
        def report() -> None:
            if worker.steps and worker.steps[0].plan is plan:
                worker.device.compute(plan, layer)
                worker.core.on(LayersDone(plan.step_id, layer), self.now)

        self._inside(worker, report)

    def _start_transfer(self, worker: SimWorker, piece: Piece) -> None:
        """Two-sided: the bytes move once both ends have started it. One-sided: when the source has."""
        if self.one_sided:
            receiver = self._targets[worker.core.spec.name, piece.link_epoch] if piece.send else worker
            arrives = self._transfer(worker, worker, piece) if piece.send else self.now
            self.at(arrives, lambda: self._finish_transfer(worker, receiver, piece))
            return
        where = worker.core.spec.name if piece.send else piece.peer, piece.link_epoch, piece.seq
        posted = self._posted.setdefault(where, {})
        posted[piece.send] = worker, piece
        if len(posted) == 2:
            del self._posted[where]
            done = self._transfer(posted[True][0], worker, piece)
            ok = self.rng.random() >= self.chaos.break_transfer
            self.at(done, lambda: self._land(*posted[True], *posted[False], ok))

    def _finish_transfer(self, worker: SimWorker, receiver: SimWorker, piece: Piece) -> None:
        """One-sided: the source writes into the destination's memory, whatever that thinks of it by now."""

        def finish() -> None:
            if (worker.core.spec.name, piece.peer, piece.link_epoch, piece.send) in self._dead_ends:
                return
            if piece.send:
                ok = self.rng.random() >= self.chaos.break_transfer
                worker.device.send(piece, receiver.device, piece.remote)
            else:  # bytes that went to this worker's dead predecessor fail the checksum
                ok = self._targets[piece.peer, piece.link_epoch] is worker
            worker.core.on(PieceDone(piece.peer, piece.link_epoch, piece.seq, piece.send, ok), self.now)

        self._inside(worker, finish)

    def _land(self, sender: SimWorker, send: Piece, receiver: SimWorker, receive: Piece, ok: bool) -> None:
        if sender.alive and receiver.alive and self.now < sender.stalled_until:
            self.at(sender.stalled_until, lambda: self._land(sender, send, receiver, receive, ok))
            return
        names = sender.core.spec.name, receiver.core.spec.name
        receiving = receiver.alive and (names[1], names[0], send.link_epoch, False) not in self._dead_ends
        sending = sender.alive and (names[0], names[1], send.link_epoch, True) not in self._dead_ends
        if receiving and sending and receive.pages:  # else they are thrown away
            sender.device.send(send, receiver.device, receive.pages)
        for worker, piece, there in ((sender, send, sending), (receiver, receive, receiving)):
            if there:
                done = PieceDone(piece.peer, piece.link_epoch, piece.seq, piece.send, ok and sending and receiving)
                self._inside(worker, partial(self._tell, worker, done), self._matters(worker, piece))

    def _matters(self, worker: SimWorker, piece: Piece) -> bool:
        """It may be the last of a request that then decodes here, or of one that then leaves."""
        sent, received = worker.core.sender.transfers.values(), worker.core.receiver.transfers.values()
        return any(one.open for one in sent) if piece.send else any(one.expected is not None for one in received)

    def _tell(self, worker: SimWorker, what: Input) -> None:
        worker.core.on(what, self.now)

    def _transfer(self, source: SimWorker, worker: SimWorker, piece: Piece) -> float:
        """When a piece has arrived that both its ends have started; `piece` is what `worker`, one of them, knows."""
        dest = piece.peer if worker is source else worker.core.spec.name
        begins, arrives = self.cost.transfer(source.core.spec, dest, piece, self.now)
        source.has_sent(dest, int(wire_bytes(source.core.spec, piece)), arrives - begins, begins - self.now)
        return arrives

    def _abort_link(self, worker: SimWorker, effect: AbortLink) -> None:
        """Confirmed after a while; a one-sided destination only if the source has stopped."""
        if self.one_sided and not effect.outgoing and not effect.peer_dead:
            return

        def confirm() -> None:
            self._dead_ends.add((worker.core.spec.name, effect.peer, effect.link_epoch, effect.outgoing))
            worker.core.on(AbortConfirmed(effect.peer, effect.link_epoch, effect.outgoing), self.now)

        self.at(self.now + self.rng.random() * self.chaos.abort_delay, lambda: self._inside(worker, confirm))

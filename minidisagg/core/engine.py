"""One worker's brain, and the way of a request through it.

    Received     Submit → QUEUED; KVOffer → waits for pages, then WAIT_KV
    Schedule     the policy fills a step through the BatchBuilder; QUEUED → RUNNING
    LayersDone   the KV of some layers leaves before the others are computed
    StepDone     sampled tokens go to the router; RUNNING → HELD with all that is to be computed here
    PieceDone, AbortConfirmed   pieces of KV have moved, or never will
    Loaded, Saved               pages have come from the store, or gone there
    Tick         leases, deadlines

Sans-IO: these inputs come through the one door `on`, with the time, and effects go out through `outbox`, so that the
same code runs under the worker's event loop and under the simulator's virtual clock. `Schedule` may come a step ahead
of `StepDone`. What makes that safe: a request keeps its pages while any step carries it, plans carry the incarnation,
and computed lengths are assigned from the plan and never added up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minidisagg.core.blocks import BlockPool
from minidisagg.core.copies import Copies
from minidisagg.core.effects import Effect
from minidisagg.core.ends import Ends
from minidisagg.core.handoff import Receiver, Sender
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
from minidisagg.core.ledger import EPOCH_BITS, DestinationLedger, SourceLedger
from minidisagg.core.lived import LivedTime
from minidisagg.core.messages import (
    ROUTER,
    Abort,
    KVAck,
    KVBusy,
    KVCancel,
    KVDone,
    KVFailed,
    KVGrant,
    KVOffer,
    KVPiece,
    KVWait,
    LinkAborted,
    Migrate,
    PeerDown,
    PeerUp,
    Replicate,
    SetPolicy,
    SetRole,
    Stayed,
    StepOutput,
    Submit,
    TokenOut,
    fetched,
)
from minidisagg.core.plan import NO_TOKEN, SeqKey, StepPlan, advanced
from minidisagg.core.policy import Policy
from minidisagg.core.request import FOREVER, Request, State
from minidisagg.core.requests import Requests
from minidisagg.core.scheduler import Offer, Scheduler
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tiers import Tiers


class EngineCore(Ends):
    """One worker's."""

    def __init__(self, spec: EngineSpec, load_policy: Callable[[str], Policy]) -> None:
        """`load_policy` makes the policy that the spec names, and those that are set while it runs."""
        self.spec = spec
        self.now = 0.0
        self.outbox: list[Effect] = []
        self.pool = BlockPool(spec.num_pages)
        self.requests = Requests()
        self.plans: dict[int, StepPlan] = {}  # steps in flight
        self.peers: dict[str, int] = {}  # per worker, the lowest epoch that is not known to be dead
        self.up: dict[str, int] = {}  # per worker, the epoch of its last `PeerUp`
        self.steps = 0
        self._clock = LivedTime()  # what leases and deadlines are counted in
        self._lived = 0.0
        self._renew_at = 0.0  # when the other sides of handoffs are told again that this one lives
        self._step_since = 0.0  # when the oldest step in flight could begin
        self._shut_since = 0.0  # since when offers have stood before an empty worker
        self._dropped: list[SeqKey] = []  # sequences that the device may forget
        emit = self.outbox.append
        self.outgoing = SourceLedger(spec, emit)
        self.incoming = DestinationLedger(spec, emit)
        self.sender = Sender(spec, self.outgoing, emit, self._leave, self._handoff_ended)
        self.receiver = Receiver(spec, self.pool, self.incoming, emit, self._handoff_ready, self._end)
        self.scheduler = Scheduler(
            spec, load_policy(spec.policy), self.pool, lambda: len(self.receiver.transfers), self._preempted, self._fail
        )
        self.copies = Copies(spec, self.pool, self.requests, emit, self._begin)
        self.tiers = Tiers(spec, self.pool, emit, partial(self.scheduler.queue, again=True), self._part)
        self.scheduler.published, self.scheduler.fetch = self.tiers.save, self.tiers.load
        self._inputs: dict[type, Callable[[Any], StepPlan | None]] = {
            Received: self._on_received,
            Schedule: self._on_schedule,
            LayersDone: self._on_layers_done,
            StepDone: self._on_step_done,
            PieceDone: self._on_piece_done,
            AbortConfirmed: self._on_abort_confirmed,
            Loaded: self.tiers.on_loaded,
            Saved: self.tiers.on_saved,
            Tick: self._on_tick,
        }
        self._messages: dict[type, Callable[[str, Any, float], None]] = {
            Submit: self._on_submit,
            Abort: self._on_abort,
            Migrate: self._on_migrate,
            Replicate: self._on_replicate,
            SetRole: self._on_set_role,
            SetPolicy: self._on_set_policy,
            PeerUp: self._on_peer_up,
            PeerDown: self._on_peer_down,
            KVOffer: self._on_offer,
            KVGrant: self.sender.on_grant,
            KVWait: self.sender.on_wait,
            KVBusy: self.receiver.on_busy,
            KVPiece: self.incoming.on_piece,
            KVDone: self.receiver.on_done,
            KVAck: self.sender.on_ack,
            KVCancel: self._on_cancel,
            KVFailed: self._on_failed,
            LinkAborted: self._on_link_aborted,
        }
        self._load_policy = load_policy

    # ------------------------------------------------------------ what drivers call

    def on(self, what: Input, now: float) -> StepPlan | None:
        """The one door. Answers `Schedule` with the next step, if there is one.

        Raises `PolicyError`, of which `StalledError` is one; after it the core is of no use.
        """
        self.now = self.scheduler.now = now
        self._lived = self._clock.at(now)
        return self._inputs[type(what)](what)

    # ------------------------------------------------------------ inputs

    def _on_received(self, what: Received) -> None:
        """A message of a dead epoch of a peer changes nothing."""
        envelope = what.envelope
        if envelope.source != ROUTER and envelope.epoch < self.peers.get(envelope.source, 0):
            return
        self._messages[type(envelope.body)](envelope.source, envelope.body, self._lived)

    def _on_schedule(self, what: Schedule) -> StepPlan | None:
        self._grant_offers()
        if not (self.scheduler.running or self.scheduler.waiting):
            return None
        batch = self.scheduler.compose()
        if batch is None:
            self.check_stall()
            return None
        for request in batch.begun:
            if request.decode and not (self.spec.through_store and request.until >= request.prefill_len):
                self.sender.offer(request, request.decode, self._lived)
        self.steps += 1
        repeat = self.scheduler.equal_steps(batch, what.most) if what.most > 1 and not self.plans else 1
        items = list(batch.members.values())
        plan = StepPlan(self.steps, items, batch.new, self._dropped, self.sender.reports(items), repeat)
        self._dropped = []
        if not self.plans:
            self._step_since = self._lived
        self.plans[plan.step_id] = plan
        return plan

    def _on_layers_done(self, done: LayersDone) -> None:
        self.sender.advance_layers(self.plans[done.step_id].items, done.layer, self._lived)

    def _on_step_done(self, done: StepDone) -> None:
        self._step_since = self._lived
        plan = self.plans.pop(done.step_id)
        self.steps += done.steps - 1
        if goes_on := done.steps < plan.repeat:
            self.steps += 1
            self.plans[self.steps] = advanced(plan, done.steps)
        if done.steps:
            self._on_computed(plan, done, goes_on)

    def _on_computed(self, plan: StepPlan, done: StepDone, goes_on: bool) -> None:
        """`goes_on`: an equal step with the same requests is under way."""
        if plan.repeat > 1:
            self.scheduler.grow(plan.items, done.steps + goes_on)
        sampling, place = sum(item.sample for item in plan.items), 0
        out: list[TokenOut] = []
        prefill = decode = context = 0
        for item in plan.items:
            end, tokens = item.start + item.count + done.steps - 1, list[int]()
            if item.sample:
                tokens, place = done.tokens[place::sampling], place + 1
            request = self.requests[item.request_id, item.incarnation]
            request.inflight -= not goes_on
            context += end
            if end <= request.prefill_len:
                prefill += item.count
            else:
                decode += item.count
                self.scheduler.cohorts.trust(request)
            if request.state is not State.RUNNING:
                self._retire_if_settled(request)
                continue
            request.num_computed = end
            if plan.repeat > 1:
                request.num_scheduled = end + goes_on
            request.pending -= item.sample and not goes_on
            broken = NO_TOKEN in tokens
            told = request.take(tokens, self.now) if tokens and not broken else None
            self.scheduler.publish(request)  # before a last token takes the pages away
            if broken:
                self._fail(request, "the logits of its next token are not finite, or forbid every token")
            elif told is not None:
                out.append(told)
                if told.finish:
                    self._end(request)
            if request.state is State.RUNNING and end >= request.until:
                self._leave(request)
            elif request.state is State.RUNNING and request.key in self.sender.transfers:
                self.sender.advance(request, self._lived)
        clock = done.ends[-1] if done.ends else self.now
        figures = done.seconds, prefill, decode, context, clock
        begun = [new.request_id for new in plan.new] if prefill else []
        output = StepOutput(done.step_id, out, *figures, done.ends, *self.pool.news(), begun)
        self.scheduler.learner.learn(output)
        self._send(ROUTER, output)
        self.tiers.let_go()  # after its last token

    def _on_piece_done(self, done: PieceDone) -> None:
        (self.outgoing if done.send else self.incoming).on_piece_done(done, self._lived)

    def _on_abort_confirmed(self, done: AbortConfirmed) -> None:
        (self.outgoing if done.outgoing else self.incoming).on_aborted(done.peer, done.link_epoch)

    def _on_tick(self, tick: Tick) -> None:
        computes = bool(self.plans) and self._lived <= self._step_since + self.spec.step_deadline
        self.outgoing.on_tick(self._lived)
        for request in self.sender.on_tick(self._lived, computes):
            self._give_back(request, "the decode worker granted no pages in time", failure=False)
        self.tiers.on_tick(self.now)
        for request in self.held:
            if request.key not in self.sender.transfers and self.now > request.ready_at + self.spec.lease:
                self._give_back(request, "held for too long", failure=False)
        self.copies.on_tick(self.now)
        self.incoming.on_tick(self._lived)
        self.receiver.on_tick(self._lived)
        self.incoming.accuse(self._lived)
        if (computes or self.scheduler.running) and self._lived > self._renew_at:
            self._renew_at = self._lived + self.spec.lease / 4
            if computes:
                self.sender.renew()
            # Only what runs here makes room; without it two workers might wait for each other's pages for ever.
            for offer in self.scheduler.offers if self.scheduler.running else ():
                self._send(offer.source, KVWait(*offer.request.key))
        self._refuse_where_empty()

    # ------------------------------------------------------------ messages

    def _on_submit(self, source: str, message: Submit, _: float) -> None:
        if self._stale(message.request_id, message.incarnation):
            return
        request = Request(message, self.spec.fingerprint, self.now)
        if message.decode or message.hold:
            until = message.until or request.prefill_len + self.spec.decode_after - 1
            request.until = min(until, request.longest)
        self._add(request)
        copy = fetched(message.request_id), message.incarnation
        if not (message.after and self._alive(message.after) and self.copies.wait(request, copy, message.after)):
            self._begin(request)

    def _begin(self, request: Request) -> None:
        """No other worker has more of it: what the store has is fetched while it would wait in the queue."""
        if not self.tiers.load(request, self.now, len(self.scheduler.running)):
            self.scheduler.queue(request)

    def _on_abort(self, source: str, message: Abort, _: float) -> None:
        self.requests.close(message.request_id, message.incarnation)
        self._forget_offers(message.request_id, message.incarnation)
        for request in self.requests.of(message.request_id):
            if request.incarnation <= message.incarnation:
                self._end(request)

    def _on_migrate(self, source: str, message: Migrate, _: float) -> None:
        request = self.requests.get((message.request_id, message.incarnation))
        if request is None or request.key in self.sender.transfers or 0 <= message.anew <= request.tried:
            return  # a late copy: to offer it twice by one name would take the first offer's grant for the second's
        request.tried = max(message.anew, request.tried)
        if message.dest == self.spec.name:
            request.decode, request.until, request.ready_at = "", FOREVER, -1.0
            if request.state is State.HELD:
                self.scheduler.run(request)
        elif request.state is State.HELD or (request.state is State.RUNNING and not request.is_prefill):
            if message.anew < 0:  # bound late, it cannot stay
                request.decode = message.dest
            request.codec = message.codec or request.codec
            self.sender.offer(request, message.dest, self._lived, message.anew)
            if request.state is State.HELD:
                self.sender.finish(request, self._lived)
        elif request.state is not State.DONE_INFLIGHT:
            self._send(ROUTER, Stayed(*request.key, "it does not decode here yet", request.tried))

    def _on_replicate(self, source: str, message: Replicate, _: float) -> None:
        if self._stale(message.request_id, message.incarnation):
            return
        if not self._alive(message.dest):
            self.copies.refuse(message)
        elif (request := self.copies.held(message, self.now)) is not None:
            self._add(request)
            self.sender.offer(request, message.dest, self._lived, prefix=True)
            self._leave(request)

    def _on_set_role(self, source: str, message: SetRole, _: float) -> None:
        self.scheduler.role, self.scheduler.options = message.role, message.options or self.spec.options
        self._send(ROUTER, self.stats())

    def _on_set_policy(self, source: str, message: SetPolicy, _: float) -> None:
        self.scheduler.set_policy(self._load_policy(message.spec))

    def _on_peer_up(self, source: str, message: PeerUp, _: float) -> None:
        stale = message.epoch < self.peers.get(message.worker, 0)
        if not stale and message.epoch > self.up.get(message.worker, -1):
            self.up[message.worker] = message.epoch
            self._fence_peer(message.worker, message.epoch)
            self.outgoing.abort(message.worker, peer_dead=True)  # opened after the death, it leads nowhere

    def _on_peer_down(self, source: str, message: PeerDown, _: float) -> None:
        self._fence_peer(message.worker, message.epoch + 1)

    def _alive(self, worker: str) -> bool:
        """For all that is known here."""
        return self.peers.get(worker, 0) <= self.up.get(worker, 0)

    def _fence_peer(self, worker: str, epoch: int) -> None:
        """All processes of this worker before `epoch` are dead; known already, it changes nothing."""
        if epoch > self.peers.get(worker, 0):
            self.peers[worker] = epoch
            self.scheduler.forget_offers(lambda o: o.source == worker and o.message.link_epoch >> EPOCH_BITS < epoch)
            self.copies.on_peer_down(worker)
            self.outgoing.abort(worker, peer_dead=True)
            self.incoming.on_peer_down(worker, epoch - 1, self._lived)

    def _on_offer(self, source: str, offer: KVOffer, _: float) -> None:
        key = offer.request_id, offer.incarnation
        if any(waiting.request.key == key for waiting in self.scheduler.offers):
            return
        if self._stale(*key):
            return
        request = Request(offer, self.spec.fingerprint, self.now)
        proposed, refusal = Offer(source, offer, request), ""
        if offer.fingerprint != self.spec.fingerprint:
            refusal = "another model or cache layout"
        elif max(request.length, request.prefill_len) > self.spec.num_pages * self.spec.page_size:
            refusal = "the prompt exceeds the decode worker's KV cache"
        elif self.incoming.is_dead(source, offer.link_epoch):
            refusal = "the link has been given up"
        elif offer.prefix:  # nothing runs for it, and nobody waits for room for it
            pages = self.scheduler.reserve(request)
            if pages is not None:
                self._grant(proposed, pages)
                return
            refusal = "no room for a prefix"
        else:
            self.scheduler.queue_offer(proposed)
            self._grant_offers()
            if offer.open and proposed in self.scheduler.offers:  # it would hold up who cannot stay where he is
                self._forget_offers(*key)
                refusal = "no room for it now"
        if refusal:
            self._send(source, KVFailed(*key, refusal))
            if offer.prefix:
                self.requests.close(*key)
                self.copies.ended(key)

    def _on_cancel(self, source: str, message: KVCancel, _: float) -> None:
        key = message.request_id, message.incarnation
        self._forget_offers(*key)
        if key not in self.requests:
            self.requests.close(*key)  # it may have overtaken the offer
            self.copies.ended(key)
        self.receiver.on_cancel(source, message, self._lived)

    def _on_failed(self, source: str, message: KVFailed, _: float) -> None:
        request = self.sender.on_failed(source, message)
        if request is not None:
            self._give_back(request, message.reason, failure=True)

    def _on_link_aborted(self, source: str, message: LinkAborted, now: float) -> None:
        if message.outgoing:
            self.incoming.on_peer_aborted(source, message.link_epoch, now)
        else:
            self.outgoing.on_peer_aborted(source, message.link_epoch)

    # ------------------------------------------------------------ handoffs

    def _leave(self, request: Request) -> None:
        """All that is to be computed here is."""
        self.scheduler.remove(request)
        request.state, request.ready_at = State.HELD, self.now
        if request.first_scheduled_at >= 0:
            request.prefill_s += self.now - request.first_scheduled_at
        if request.key in self.sender.transfers:
            self.sender.finish(request, self._lived)
        elif request.decode:
            self.tiers.part(request)

    def _grant_offers(self) -> None:
        while (taken := self.scheduler.take_offer()) is not None:
            self._grant(*taken)

    def _grant(self, offer: Offer, reserved: list[int]) -> None:
        request = offer.request
        request.state = State.WAIT_KV
        self._add(request)
        self.receiver.grant(request, offer.source, offer.message.link_epoch, reserved, self._lived)

    def _handoff_ready(self, request: Request, done: KVDone) -> None:
        computed = request.prefill_len + len(done.tokens) - 1 if done.tokens else request.length
        request.num_scheduled = request.num_computed = computed
        request.output += done.tokens
        request.ready_at, request.prefill_s = self.now, done.prefill_s
        self.scheduler.publish(request)
        if request.prefix:
            request.state = State.HELD
            self._end(request)
            self.copies.tell()
        else:
            self.scheduler.run(request)

    def _handoff_ended(self, request: Request, failure: str) -> None:
        if request.state is State.DONE_INFLIGHT:
            self._retire_if_settled(request)
        elif request.state is State.RUNNING and not request.decode:
            self._send(ROUTER, Stayed(*request.key, failure, request.tried))
        elif failure:
            self._give_back(request, failure, failure=True)
        else:
            self._end(request)

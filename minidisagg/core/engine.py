"""One worker's brain, and the way of a request through it.

    Received     Submit → QUEUED; KVOffer → waits for pages, then WAIT_KV
    Schedule     the policy fills a step through the BatchBuilder; QUEUED → RUNNING
    StepDone     sampled tokens go to the router; after prefill RUNNING → HELD if decode is elsewhere
    PieceDone, AbortConfirmed   pieces of KV have moved, or never will
    Tick         leases, deadlines

Sans-IO: these inputs come through the one door `on`, with the time, and effects go out through `outbox`, so that the
same code runs under the worker's event loop and under the simulator's virtual clock. `Schedule` may come a step ahead
of `StepDone`. What makes that safe: a request keeps its pages while any step carries it, plans carry the incarnation,
and computed lengths are assigned from the plan and never added up.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minidisagg.core.batch import BatchBuilder
from minidisagg.core.blocks import BlockPool, IntegrityError, PageState
from minidisagg.core.checked import Checked, PolicyError
from minidisagg.core.effects import Effect, Send
from minidisagg.core.handoff import Receiver, Sender
from minidisagg.core.inputs import AbortConfirmed, Input, PieceDone, Received, Schedule, StepDone, Tick
from minidisagg.core.lived import LivedTime
from minidisagg.core.messages import (
    ROUTER,
    Abort,
    AnyMessage,
    Failed,
    KVAck,
    KVBusy,
    KVCancel,
    KVChunk,
    KVDone,
    KVFailed,
    KVGrant,
    KVOffer,
    KVWait,
    LinkAborted,
    Migrate,
    PeerDown,
    PeerUp,
    Released,
    Role,
    SetPolicy,
    SetRole,
    Stats,
    StepOutput,
    Submit,
    TokenOut,
)
from minidisagg.core.plan import NO_TOKEN, SeqKey, StepPlan
from minidisagg.core.policy import Policy, Stage, WorkerOptions
from minidisagg.core.request import Request, State

FENCED = 65536  # ended requests whose incarnation is still remembered


class StalledError(RuntimeError):
    """Work is queued, nothing is in flight, and the policy plans nothing: it would wait for ever."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from; the same values and inputs give the same plans."""

    name: str
    epoch: int
    role: Role
    num_pages: int
    page_size: int
    num_layers: int
    fingerprint: str
    policy: str = "fcfs"
    one_sided_links: bool = False
    prefix_caching: bool = True
    lease: float = 30.0  # seconds that a side of a handoff waits for the other
    link_timeout: float = 10.0  # seconds for one piece on a link
    step_deadline: float = 120.0  # seconds for one step: until then a worker that computes is alive
    options: WorkerOptions = field(default_factory=WorkerOptions)


class EngineCore:
    """Schedules one worker. Also the `WorkerView` of its policy."""

    def __init__(self, spec: EngineSpec, load_policy: Callable[[str], Policy]) -> None:
        """`load_policy` makes the policy that the spec names, and those that are set while it runs."""
        self.spec = spec
        self.policy = Checked(load_policy(spec.policy))
        self.name = spec.name
        self.role = spec.role
        self.options = spec.options
        self.page_size = spec.page_size
        self.num_pages = spec.num_pages
        self.now = 0.0
        self.outbox: list[Effect] = []
        self.pool = BlockPool(spec.num_pages)
        self.requests: dict[SeqKey, Request] = {}
        self.waiting: list[Request] = []  # QUEUED, by the policy's order
        self.running: list[Request] = []  # RUNNING, by the policy's order
        self.offers: list[tuple[str, KVOffer, Request]] = []  # by the policy's order
        self.plans: dict[int, StepPlan] = {}  # steps in flight
        self.peers: dict[str, int] = {}  # per worker, the lowest epoch that is not known to be dead
        self.up: dict[str, int] = {}  # per worker, the epoch of its last `PeerUp`
        self.cohorts: Counter[int] = Counter()  # suspects of a crash that are here, by cohort
        self.steps = 0
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._clock = LivedTime()  # what leases and deadlines are counted in
        self._lived = 0.0
        self._renew_at = 0.0  # when the other sides of handoffs are told again that this one lives
        self._step_since = 0.0  # when the oldest step in flight could begin
        self._shut_since = 0.0  # since when offers have stood before an empty worker
        self._cohort = 0  # whose turn the last step was
        self._dropped: list[SeqKey] = []  # sequences that the executor may forget
        self._fence: OrderedDict[str, int] = OrderedDict()  # highest incarnation that is over, or was aborted
        emit = self.outbox.append
        self.sender = Sender(
            spec.epoch, spec.page_size, spec.num_layers, spec.one_sided_links, spec.lease, spec.link_timeout, emit,
            self._handoff_ended,
        )  # fmt: skip
        self.receiver = Receiver(
            self.pool, spec.lease, spec.link_timeout, emit, self._handoff_ready, self._handoff_gone
        )
        self._inputs: dict[type, Callable[[Any], StepPlan | None]] = {
            Received: self._on_received, Schedule: self._on_schedule, StepDone: self._on_step_done,
            PieceDone: self._on_piece_done, AbortConfirmed: self._on_abort_confirmed, Tick: self._on_tick,
        }  # fmt: skip
        self._messages: dict[type, Callable[[str, Any, float], None]] = {
            Submit: self._on_submit, Abort: self._on_abort, Migrate: self._on_migrate, SetRole: self._on_set_role,
            SetPolicy: self._on_set_policy, PeerUp: self._on_peer_up, PeerDown: self._on_peer_down,
            KVOffer: self._on_offer, KVGrant: self.sender.on_grant, KVWait: self.sender.on_wait,
            KVBusy: self.receiver.on_busy, KVChunk: self.receiver.on_chunk, KVDone: self.receiver.on_done,
            KVAck: self.sender.on_ack, KVCancel: self._on_cancel, KVFailed: self._on_failed,
            LinkAborted: self._on_link_aborted,
        }  # fmt: skip
        self._load_policy = load_policy

    # ------------------------------------------------------------ what drivers call

    def on(self, what: Input, now: float) -> StepPlan | None:
        """The one door. Answers `Schedule` with the next step, if there is one.

        Raises `PolicyError` and `StalledError`, after which the core is of no use.
        """
        self.now, self._lived = now, self._clock.at(now)
        return self._inputs[type(what)](what)

    def stats(self) -> Stats:
        """The engine's share of a `Stats` message; the driver adds what it measures."""
        count = self.pool.counts
        prompts = [*self.waiting, *(request for request in self.running if request.is_prefill)]
        return Stats(
            role=self.role, steps=self.steps, running=len(self.running), waiting=len(self.waiting),
            held=len(self.held), offers=len(self.offers),
            queued_tokens=sum(request.remaining for request in prompts),
            pages_free=count[PageState.FREE], pages_live=count[PageState.LIVE], pages_cached=count[PageState.CACHED],
            pages_inflight=count[PageState.INFLIGHT], pages_quarantined=count[PageState.QUARANTINED],
            preemptions=self.preemptions, prefix_queries=self.prefix_queries, prefix_hits=self.prefix_hits,
            flying=len(self.plans),
        )  # fmt: skip

    @property
    def idle(self) -> bool:
        """No request, no step, no transfer."""
        return not self.requests and not self.plans and not self.offers

    @property
    def free_pages(self) -> int:
        """Pages that an allocation can have."""
        return self.pool.available

    @property
    def expected(self) -> int:
        """Requests whose KV is on its way here."""
        return len(self.receiver.transfers)

    @property
    def held(self) -> list[Request]:
        """Requests computed here that wait for their decode worker."""
        return [request for request in self.requests.values() if request.state is State.HELD]

    def check_integrity(self) -> None:
        """The pool's invariants, and that its references are exactly what the requests hold."""
        self.pool.check_integrity()
        holders = [0] * self.num_pages
        for request in self.requests.values():
            reserved: list[int] = []
            if request.state is State.WAIT_KV:
                reserved = [p for p in request.pages if self.pool.state[p] > PageState.CACHED]
            for page in request.pages:
                holders[page] += page not in reserved
        if holders != self.pool.refs:
            wrong = [page for page in range(self.num_pages) if holders[page] != self.pool.refs[page]]
            raise IntegrityError(f"pages {wrong[:8]} have other references than holders")

    # ------------------------------------------------------------ inputs

    def _on_received(self, what: Received) -> None:
        """A message of a dead epoch of a peer changes nothing."""
        envelope = what.envelope
        if envelope.source != ROUTER and envelope.epoch < self.peers.get(envelope.source, 0):
            return
        self._messages[type(envelope.body)](envelope.source, envelope.body, self._lived)

    def _on_schedule(self, _: Schedule) -> StepPlan | None:
        self._grant_offers()
        if self.policy.dynamic_order:
            self._reorder(self.waiting, "prefill")
            self._reorder(self.running, "decode")
        for cohort in self._turns():
            batch = BatchBuilder(self, cohort)
            self.policy.compose(batch, self)
            if batch.items:
                self._cohort = cohort
                break
        else:
            if not (self.plans or self.sender.busy or self.receiver.busy or self.held):
                if self.waiting or self.running:
                    raise StalledError(
                        f"worker {self.name}: {len(self.waiting)} requests wait, {len(self.running)} run, "
                        f"{self.free_pages} pages are free, and policy {self.policy.name} plans nothing"
                    )
            return None
        self.steps += 1
        plan = StepPlan(self.steps, batch.items, batch.new, self._dropped)
        self._dropped = []
        if not self.plans:
            self._step_since = self._lived
        self.plans[plan.step_id] = plan
        return plan

    def _on_step_done(self, done: StepDone) -> None:
        self._step_since = self._lived
        plan = self.plans.pop(done.step_id)
        sampled = iter(done.tokens)
        out: list[TokenOut] = []
        prefill = decode = context = 0
        for item in plan.items:
            token = next(sampled) if item.sample else -1
            request = self.requests[item.request_id, item.incarnation]
            request.inflight -= 1
            context += item.start + item.count
            if item.start + item.count <= request.prefill_len:
                prefill += item.count
            else:
                decode += item.count
                self._trust(request)
            if request.state is not State.RUNNING:
                self._retire_if_settled(request)
                continue
            request.num_computed = item.start + item.count
            self._publish(request)  # before the token: a last one takes the pages away
            if item.sample:
                request.pending -= 1
                if token == NO_TOKEN:
                    self._fail(request, "the logits of its next token are not finite, or forbid every token")
                else:
                    out.append(self._on_token(request, token))
            if request.state is State.RUNNING and request.key in self.sender.transfers:
                self.sender.advance(request, self._lived)
        self._send(ROUTER, StepOutput(done.step_id, out, done.seconds, prefill, decode, context, self.now))

    def _on_piece_done(self, done: PieceDone) -> None:
        (self.sender if done.send else self.receiver).on_piece_done(done, self._lived)

    def _on_abort_confirmed(self, done: AbortConfirmed) -> None:
        (self.sender if done.outgoing else self.receiver).on_aborted(done.peer, done.link_epoch)

    def _on_tick(self, tick: Tick) -> None:
        computes = bool(self.plans) and self._lived <= self._step_since + self.spec.step_deadline
        for request in self.sender.on_tick(self._lived, computes):
            self._give_back(request, "the decode worker granted no pages in time", failure=False)
        for request in self.held:
            if request.key not in self.sender.transfers and self.now > request.ready_at + self.spec.lease:
                self._give_back(request, "held for too long", failure=False)
        self.receiver.on_tick(self._lived)
        if (computes or self.running) and self._lived > self._renew_at:
            self._renew_at = self._lived + self.spec.lease / 4
            if computes:
                self.sender.renew()
            # Only what runs here makes room; without it two workers might wait for each other's pages for ever.
            for source, _, offered in self.offers if self.running else ():
                self._send(source, KVWait(*offered.key))
        self._refuse_where_empty()

    # ------------------------------------------------------------ what the builder calls

    def admit(self, request: Request, spare: int) -> bool:
        """QUEUED → RUNNING with pages for all known tokens, so that a prompt once begun never waits for memory.

        `spare` pages must stay: one for each running request, or their next tokens would preempt right away.
        """
        hashes = request.extend_hashes(self.page_size) if self.spec.prefix_caching else []
        cached = self.pool.match(hashes[: (request.num_tokens - 1) // self.page_size])  # one token must be computed
        need = -(-request.num_tokens // self.page_size) - len(cached)
        self.pool.hold(cached)
        pages = self.pool.allocate(need) if self.pool.available >= need + spare else None
        if pages is None:
            self.pool.drop(cached)
            return False
        self.waiting.remove(request)
        request.pages = cached + pages
        request.published = len(cached)
        request.num_scheduled = request.num_computed = request.cached_tokens = len(cached) * self.page_size
        self.prefix_queries += request.num_tokens
        self.prefix_hits += request.cached_tokens
        self._run(request)
        return request.state is State.RUNNING

    def scheduled(self, request: Request, count: int, samples: bool) -> None:
        """`count` tokens of the request are in the step being built."""
        request.num_scheduled += count
        request.inflight += 1
        request.pending += samples
        if request.first_scheduled_at < 0:
            request.first_scheduled_at = self.now
            if request.decode:
                self.sender.offer(request, request.decode, self._lived, self.spec.fingerprint)

    def preempt(self, request: Request) -> None:
        """Give its pages back; the router places the recomputation."""
        self.preemptions += 1
        self._give_back(request, "preempted", failure=False)

    # ------------------------------------------------------------ messages

    def _on_submit(self, source: str, message: Submit, _: float) -> None:
        if self._stale(message.request_id, message.incarnation):
            return
        request = Request(message, self.spec.fingerprint, self.now)
        self._add(request)
        self._insert(self.waiting, request, "prefill")

    def _on_abort(self, source: str, message: Abort, _: float) -> None:
        self._close(message.request_id, message.incarnation)
        self._forget_offers(message.request_id, message.incarnation)
        for request in [r for r in self.requests.values() if r.request_id == message.request_id]:
            if request.incarnation <= message.incarnation:
                self._end(request, State.DONE_INFLIGHT)

    def _on_migrate(self, source: str, message: Migrate, _: float) -> None:
        request = self.requests.get((message.request_id, message.incarnation))
        if request is None or request.state is not State.HELD or request.key in self.sender.transfers:
            return
        if message.dest == self.name:
            request.decode, request.leaves, request.ready_at = "", False, -1.0
            self._run(request)
        else:
            self.sender.offer(request, message.dest, self._lived, self.spec.fingerprint)
            self.sender.finish_prefill(request, request.output[-1], self._lived)

    def _on_set_role(self, source: str, message: SetRole, _: float) -> None:
        self.role = message.role
        self._send(ROUTER, self.stats())

    def _on_set_policy(self, source: str, message: SetPolicy, _: float) -> None:
        """Schedule by it from now on; what waits is put in its order."""
        self.policy = Checked(self._load_policy(message.spec))
        self._reorder(self.waiting, "prefill")
        self._reorder(self.running, "decode")
        offers, self.offers = self.offers, []
        for peer, offer, request in offers:
            self._queue_offer(peer, offer, request)

    def _on_peer_up(self, source: str, message: PeerUp, _: float) -> None:
        stale = message.epoch < self.peers.get(message.worker, 0)
        if not stale and message.epoch > self.up.get(message.worker, -1):
            self.up[message.worker] = message.epoch
            self._fence_peer(message.worker, message.epoch)
            self.sender.abort_link(message.worker, peer_dead=True)  # opened after the death, it leads nowhere

    def _on_peer_down(self, source: str, message: PeerDown, _: float) -> None:
        self._fence_peer(message.worker, message.epoch + 1)

    def _fence_peer(self, worker: str, epoch: int) -> None:
        """All processes of this worker before `epoch` are dead; known already, it changes nothing."""
        if epoch > self.peers.get(worker, 0):
            self.peers[worker] = epoch
            self.offers = [offer for offer in self.offers if offer[0] != worker]
            self.sender.abort_link(worker, peer_dead=True)
            self.receiver.on_peer_down(worker, epoch - 1, self._lived)

    def _on_offer(self, source: str, offer: KVOffer, _: float) -> None:
        key = offer.request_id, offer.incarnation
        if any(waiting.request_id == key[0] and waiting.incarnation == key[1] for _, waiting, _ in self.offers):
            return
        if self._stale(*key):
            return
        request = Request(offer, self.spec.fingerprint, self.now)
        refusal = ""
        if offer.fingerprint != self.spec.fingerprint:
            refusal = "another model, cache layout or codec"
        elif request.prefill_len > self.num_pages * self.page_size:
            refusal = "the prompt exceeds the decode worker's KV cache"
        elif self.receiver.is_dead(source, offer.link_epoch):
            refusal = "the link has been given up"
        if refusal:
            self._send(source, KVFailed(*key, refusal))
            return
        self._queue_offer(source, offer, request)
        self._grant_offers()

    def _on_cancel(self, source: str, message: KVCancel, _: float) -> None:
        key = message.request_id, message.incarnation
        self._forget_offers(*key)
        if key not in self.requests:
            self._close(*key)  # it may have overtaken the offer
        self.receiver.on_cancel(source, message, self._lived)

    def _on_failed(self, source: str, message: KVFailed, _: float) -> None:
        request = self.requests.get((message.request_id, message.incarnation))
        reason = self.sender.on_failed(source, message)
        if reason is not None and request is not None:
            self._give_back(request, reason, failure=True)

    def _on_link_aborted(self, source: str, message: LinkAborted, now: float) -> None:
        if message.outgoing:
            self.receiver.on_peer_aborted(source, message.link_epoch, now)
        else:
            self.sender.on_peer_aborted(source, message.link_epoch)

    # ------------------------------------------------------------ tokens

    def _on_token(self, request: Request, token: int) -> TokenOut:
        first = len(request.output) == request.prefill_len - len(request.prompt)
        request.output.append(token)
        finish = request.finish_reason()
        now = self.now
        out = TokenOut(
            request.request_id, request.incarnation, len(request.output) - 1, token, finish,
            queue_s=request.first_scheduled_at - request.queued_at if first else 0.0,
            prefill_s=now - request.first_scheduled_at if first else 0.0,
            wait_s=max(0.0, request.first_scheduled_at - request.ready_at) if request.ready_at >= 0 else 0.0,
            step_s=now - request.first_scheduled_at if request.ready_at >= 0 else 0.0,
            cached_tokens=request.cached_tokens if first else 0,
        )  # fmt: skip
        request.ready_at = -1.0
        if finish:
            self._end(request, State.DONE_INFLIGHT)
        elif first and request.leaves:
            self.running.remove(request)
            request.state = State.HELD
            request.ready_at = now
            if request.decode:
                self.sender.finish_prefill(request, token, self._lived)
        return out

    def _publish(self, request: Request) -> None:
        """Offer the pages that have become full and confirmed to the prefix cache."""
        full = request.num_computed // self.page_size
        if full > request.published and self.spec.prefix_caching:
            hashes = request.extend_hashes(self.page_size)
            for index in range(request.published, full):
                self.pool.publish(request.pages[index], hashes[index])
            request.published = full

    # ------------------------------------------------------------ handoffs

    def _grant_offers(self) -> None:
        """Answer the offers that fit, in the policy's order; the first that does not holds up the rest."""
        while self._accepts_offer():
            source, offer, request = self.offers[0]
            hashes = request.extend_hashes(self.page_size) if self.spec.prefix_caching else []
            cached = self.pool.match(hashes)
            need = -(-request.prefill_len // self.page_size) - len(cached)
            self.pool.hold(cached)
            fits = self.pool.available >= need + len(self.running)  # a page each for what is running
            reserved = self.pool.reserve(need) if fits else None
            if reserved is None:
                self.pool.drop(cached)
                return
            del self.offers[0]
            request.state = State.WAIT_KV
            request.peer = source
            request.pages = cached + reserved
            request.published = len(cached)
            request.cached_tokens = len(cached) * self.page_size
            self._add(request)
            self.receiver.grant(request, source, offer.link_epoch, len(cached), reserved, self._lived)

    def _queue_offer(self, source: str, offer: KVOffer, request: Request) -> None:
        try:
            request.sort_key["transfer"] = self.policy.order(request, "transfer", self)
            bisect.insort(self.offers, (source, offer, request), key=lambda o: o[2].sort_key["transfer"])
        except PolicyError as error:
            self._send(ROUTER, Failed(*request.key, str(error)))
        except TypeError as error:
            self._send(ROUTER, Failed(*request.key, str(self.policy.incomparable(error))))

    def _accepts_offer(self) -> bool:
        """Whether the policy takes the first offer; one that it cannot answer for is no offer any more."""
        while self.offers:
            try:
                return self.policy.accept(self.offers[0][2], self)
            except PolicyError as error:
                _, _, request = self.offers.pop(0)
                self._send(ROUTER, Failed(*request.key, str(error)))
        return False

    def _refuse_where_empty(self) -> None:
        """An empty worker has room for any offer. If the policy takes none, nothing here will ever change its mind."""
        if not self.offers or self.requests or self.plans or self.sender.busy or self.receiver.busy:
            self._shut_since = self._lived
        elif self._lived > self._shut_since + self.spec.lease / 2:
            for source, _, request in self.offers:
                reason = f"policy {self.policy.name}: accept refuses it though worker {self.name} is empty"
                self._send(source, KVFailed(*request.key, reason))
            self.offers = []

    def _handoff_ready(self, request: Request, first_token: int) -> None:
        request.num_scheduled = request.num_computed = request.prefill_len
        request.output.append(first_token)
        request.ready_at = self.now
        self._publish(request)
        self._run(request)

    def _handoff_gone(self, request: Request) -> None:
        self._end(request, State.DONE_INFLIGHT)

    def _handoff_ended(self, request: Request, failure: str) -> None:
        if request.state in (State.DONE_INFLIGHT, State.PREEMPTED):
            self._retire_if_settled(request)
        elif failure:
            self._give_back(request, failure, failure=True)
        else:
            self._end(request, State.DONE_INFLIGHT)

    # ------------------------------------------------------------ ends

    def _give_back(self, request: Request, reason: str, failure: bool) -> None:
        if request.state in (State.DONE_INFLIGHT, State.PREEMPTED, State.DONE):
            return
        self._end(request, State.PREEMPTED)
        self._send(ROUTER, Released(request.request_id, request.incarnation, reason, failure))

    def _fail(self, request: Request, reason: str) -> None:
        """It can go on nowhere."""
        if request.state not in (State.DONE_INFLIGHT, State.PREEMPTED, State.DONE):
            self._end(request, State.DONE_INFLIGHT)
            self._send(ROUTER, Failed(request.request_id, request.incarnation, reason))

    def _reorder(self, queue: list[Request], stage: Stage) -> None:
        for request in queue[:]:
            try:
                request.sort_key[stage] = self.policy.order(request, stage, self)
            except PolicyError as error:
                self._fail(request, str(error))
        try:
            queue.sort(key=lambda r: r.sort_key[stage])
        except TypeError as error:
            raise self.policy.incomparable(error) from error

    def _end(self, request: Request, state: State) -> None:
        """Out of every queue at once; the pages go when no step and no peer can touch them any more."""
        if request.state is State.QUEUED:
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            self.running.remove(request)
        elif request.state is State.WAIT_KV and request.pages:
            if request.key in self.receiver.transfers:
                self.receiver.drop(request, "aborted")
            return  # the receiver says when its pages are settled
        elif request.state in (State.DONE_INFLIGHT, State.PREEMPTED, State.DONE):
            return
        request.state = state
        if request.key in self.sender.transfers:
            self.sender.stop(request)
        self._retire_if_settled(request)

    def _retire_if_settled(self, request: Request) -> None:
        if request.state is State.DONE or request.inflight or request.key in self.sender.transfers:
            return
        request.state = State.DONE
        self.pool.drop(request.pages)
        request.pages = []
        if request.introduced:
            self._dropped.append(request.key)
        del self.requests[request.key]
        self._trust(request)
        self._close(request.request_id, request.incarnation)

    def _close(self, request_id: str, incarnation: int) -> None:
        """Remember that this incarnation is over, so that a late message cannot revive it."""
        self._fence[request_id] = max(incarnation, self._fence.pop(request_id, -1))
        if len(self._fence) > FENCED:
            self._fence.popitem(last=False)

    def _stale(self, request_id: str, incarnation: int) -> bool:
        """Over, aborted, or here already; a newer incarnation ends an older one that is still here."""
        if incarnation <= self._fence.get(request_id, -1) or (request_id, incarnation) in self.requests:
            return True
        for request in [r for r in self.requests.values() if r.request_id == request_id]:
            if request.incarnation > incarnation:
                return True
            self._end(request, State.DONE_INFLIGHT)
        self._forget_offers(request_id, incarnation)
        return False

    def _forget_offers(self, request_id: str, incarnation: int) -> None:
        """Offers that wait are no requests yet; their source hears of the end from the router."""
        self.offers = [o for o in self.offers if o[2].request_id != request_id or o[2].incarnation > incarnation]

    def _run(self, request: Request) -> None:
        """Into the batch, in the policy's order: who stands in front is served, and evicts, first."""
        request.state = State.RUNNING
        self._insert(self.running, request, "decode")

    def _insert(self, queue: list[Request], request: Request, stage: Stage) -> None:
        """Into the queue, in the policy's order. A request that has no place in it fails."""
        try:
            request.sort_key[stage] = self.policy.order(request, stage, self)
            bisect.insort(queue, request, key=lambda r: r.sort_key[stage])
        except (PolicyError, TypeError) as error:
            queue.append(request)  # where the end of it looks
            self._fail(request, str(error if isinstance(error, PolicyError) else self.policy.incomparable(error)))

    # ------------------------------------------------------------ suspects

    def _add(self, request: Request) -> None:
        self.requests[request.key] = request
        if request.cohort:
            self.cohorts[request.cohort] += 1

    def _trust(self, request: Request) -> None:
        """It has survived a step of decode, or has left: its cohort is one less."""
        if request.cohort:
            self.cohorts[request.cohort] -= 1
            self.cohorts += Counter()  # without the cohorts that have become empty
            request.cohort = 0

    def _turns(self) -> list[int]:
        """The cohorts that have work, those after the one whose turn it was first."""
        if not self.cohorts:
            return [0]
        cohorts = sorted({request.cohort for queue in (self.running, self.waiting) for request in queue})
        after = bisect.bisect_right(cohorts, self._cohort)
        return (cohorts[after:] + cohorts[:after]) or [0]

    def _send(self, dest: str, body: AnyMessage) -> None:
        self.outbox.append(Send(dest, body))


def drain(core: EngineCore) -> Iterator[Effect]:
    """Take the effects out, those that carrying them out adds included."""
    while core.outbox:
        effects = core.outbox[:]
        core.outbox.clear()  # the list itself is what sender and receiver emit into
        yield from effects

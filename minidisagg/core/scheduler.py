"""What one worker computes next: its queues and their order, who gets pages, and the step that comes of it.

The policy decides, by a view of the worker; the scheduler keeps every account (tokens, sequences, pages, preemption). A
request comes in through `queue`, `queue_offer` or `run`, and leaves through `remove`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minidisagg.core.blocks import BlockPool, PageState
from minidisagg.core.checked import Checked, PolicyError
from minidisagg.core.cohorts import Cohorts
from minidisagg.core.costs import StepCosts, StepLearner
from minidisagg.core.messages import KVOffer, Role
from minidisagg.core.plan import PlanItem, SeqInit
from minidisagg.core.policy import Batch, Policy, Stage, WorkerOptions, WorkerView
from minidisagg.core.request import Composed, Request, State, Work, request_of
from minidisagg.core.spec import EngineSpec


class Offer(NamedTuple):
    """A handoff that a peer proposes, and the request that would come of it."""

    source: str
    message: KVOffer
    request: Request


@dataclass(frozen=True)
class View:
    """The `WorkerView` of a policy."""

    _scheduler: Scheduler
    name: str
    page_size: int
    num_pages: int

    @property
    def role(self) -> Role:
        """What the router sends here."""
        return self._scheduler.role

    @property
    def options(self) -> WorkerOptions:
        """Of its role."""
        return self._scheduler.options

    @property
    def now(self) -> float:
        """Seconds, on the worker's clock."""
        return self._scheduler.now

    @property
    def free_pages(self) -> int:
        """Pages that an allocation can have."""
        return self._scheduler.pool.available

    @property
    def running(self) -> Sequence[Work]:
        """In the policy's order."""
        return tuple(request.view for request in self._scheduler.running)

    @property
    def waiting(self) -> Sequence[Work]:
        """In the policy's order."""
        return tuple(request.view for request in self._scheduler.waiting)

    @property
    def expected(self) -> int:
        """Requests whose KV is on its way here."""
        return self._scheduler.expected()

    @property
    def costs(self) -> StepCosts:
        """What its steps have taken."""
        return self._scheduler.learner.costs


def scheduler_of(view: WorkerView) -> Scheduler:
    """The mechanism's way back."""
    assert isinstance(view, View)
    return view._scheduler


def composed(batch: Batch) -> Composed:
    """The mechanism's way back."""
    assert isinstance(batch, BatchBuilder)
    return Composed(batch._cohort, batch._members, batch._begun, batch._new)


class Scheduler:
    """One worker's."""

    def __init__(
        self,
        spec: EngineSpec,
        policy: Policy,
        pool: BlockPool,
        expected: Callable[[], int],
        preempted: Callable[[Request], None],
        failed: Callable[[Request, str], None],
    ) -> None:
        """`expected()`: requests whose KV is on its way here. `preempted(request)` and `failed(request, reason)` end a
        request, which leads to `remove`."""
        self.spec = spec
        self.role = spec.role
        self.options = spec.options
        self.policy = Checked(policy)
        self.pool = pool
        self.expected = expected
        self.published: Callable[[int, bytes], None] = lambda page, digest: None  # a page is in the prefix cache
        self.fetch: Callable[[Request, float, int], bool] = lambda request, now, spare: False  # `Tiers.load`
        self._preempted = preempted
        self._failed = failed
        self.now = 0.0
        self.waiting: list[Request] = []  # QUEUED, by the policy's order
        self.running: list[Request] = []  # RUNNING, by the policy's order
        self.offers: list[Offer] = []  # by the policy's order
        self.cohorts = Cohorts()
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.learner = StepLearner()
        self.view = View(self, spec.name, spec.page_size, spec.num_pages)
        self._decoded: list[Request] = []  # all of the last step, if it was one of decode alone

    # ------------------------------------------------------------ queues

    def queue(self, request: Request, again: bool = False) -> None:
        """A prompt to compute, in its place by the policy's order; one that stood there, before its equals."""
        self._insert(self.waiting, request, "prefill", bisect.insort_left if again else bisect.insort_right)

    def run(self, request: Request) -> None:
        """Into the batch: who stands in front by the policy's order is served, and evicts, first."""
        request.state = State.RUNNING
        self._insert(self.running, request, "decode")

    def remove(self, request: Request) -> None:
        """It waits and runs no more."""
        if request.state is State.QUEUED:
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            self.running.remove(request)

    def set_policy(self, policy: Policy) -> None:
        """Schedule by it from now on; what is here is put in its order."""
        self.policy = Checked(policy)
        self._reorder(self.waiting, "prefill")
        self._reorder(self.running, "decode")
        offers, self.offers = self.offers, []
        for offer in offers:
            self.queue_offer(offer)

    def _insert(
        self, queue: list[Request], request: Request, stage: Stage, insort: Callable[..., None] = bisect.insort_right
    ) -> None:
        """A request that has no place in the order fails."""
        try:
            request.sort_key[stage] = self.policy.order(request.view, stage, self.view)
            insort(queue, request, key=lambda r: r.sort_key[stage])
        except (PolicyError, TypeError) as error:
            queue.append(request)  # where the end of it looks
            self._failed(request, self._said(error))

    def _reorder(self, queue: list[Request], stage: Stage) -> None:
        for request in queue[:]:
            try:
                request.sort_key[stage] = self.policy.order(request.view, stage, self.view)
            except PolicyError as error:
                self._failed(request, str(error))
        try:
            queue.sort(key=lambda r: r.sort_key[stage])
        except TypeError as error:
            raise self.policy.incomparable(error) from error

    def _said(self, error: PolicyError | TypeError) -> str:
        return str(error if isinstance(error, PolicyError) else self.policy.incomparable(error))

    # ------------------------------------------------------------ offers

    def queue_offer(self, offer: Offer) -> None:
        """A handoff that waits for pages. One that has no place in the order fails."""
        request = offer.request
        try:
            request.sort_key["transfer"] = self.policy.order(request.view, "transfer", self.view)
            bisect.insort(self.offers, offer, key=lambda o: o.request.sort_key["transfer"])
        except (PolicyError, TypeError) as error:
            self._failed(request, self._said(error))

    def take_offer(self) -> tuple[Offer, list[int]] | None:
        """The first offer, if the policy accepts it and there is room, and the pages reserved for its KV.

        One that does not fit holds up the rest.
        """
        if not self._accepts_first():
            return None
        offer = self.offers[0]
        request = offer.request
        pages = self.reserve(request)
        if pages is None:
            return None
        del self.offers[0]
        return offer, pages

    def reserve(self, request: Request) -> list[int] | None:
        """Pages for KV that is offered, and for the rest of its prompt: who is to go on with it waits for none."""
        tokens = request.length if request.prefix else max(request.length, request.prefill_len)
        # A page each for what is running, or their next tokens would preempt right away.
        return self._pages_for(request, tokens, request.length, len(self.running), self.pool.reserve)

    def forget_offers(self, gone: Callable[[Offer], bool]) -> None:
        """Offers that wait are no requests yet."""
        self.offers = [offer for offer in self.offers if not gone(offer)]

    def _accepts_first(self) -> bool:
        """Whether the policy takes the first offer; one that it cannot answer for is no offer any more."""
        while self.offers:
            try:
                return self.policy.accept(self.offers[0].request.view, self.view)
            except PolicyError as error:
                self._failed(self.offers.pop(0).request, str(error))
        return False

    # ------------------------------------------------------------ pages

    def _pages_for(
        self, request: Request, tokens: int, cacheable: int, spare: int, take: Callable[[int], list[int] | None]
    ) -> list[int] | None:
        """Give the request a block table for `tokens`: what the prefix cache has of the first `cacheable`, and the rest
        from `take`, which is returned.

        None, and nothing has changed, if not `spare` pages would be left.
        """
        size = self.spec.page_size
        hashes = request.extend_hashes(size) if self.spec.prefix_caching else []
        cached = self.pool.match(hashes[: cacheable // size])
        need = -(-tokens // size) - len(cached)
        self.pool.hold(cached)
        pages = take(need) if self.pool.available >= need + spare else None
        if pages is None:
            self.pool.drop(cached)
            return None
        request.pages = cached + pages
        request.published = len(cached)
        request.cached_tokens = len(cached) * size
        return pages

    def admit(self, request: Request) -> bool:
        """QUEUED → RUNNING with pages for all known tokens: a prompt once begun never waits for memory, and its pages
        mostly form one run, which moves faster."""
        running, tokens = len(self.running), request.known
        if running + self.expected() >= self.options.max_num_seqs:
            return False
        if self.fetch(request, self.now, running):
            self.waiting.remove(request)  # and comes back with it
            return False
        # One token at least must be computed. A page each must stay for what is running.
        if self._pages_for(request, tokens, tokens - 1, running, self.pool.allocate) is None:
            return False
        self.waiting.remove(request)
        request.num_scheduled = request.num_computed = request.cached_tokens
        self.prefix_queries += tokens
        self.prefix_hits += request.cached_tokens
        self.run(request)
        return request.state is State.RUNNING

    def evict(self, keep: Container[Request]) -> Request | None:
        """Preempt one of the running requests that are neither in flight nor to `keep`, as the policy says."""
        candidates = [r.view for r in self.running if not r.inflight and r not in keep]
        victim = self.policy.evict(self.view, candidates)
        if victim is None:
            return None
        request = request_of(victim.request)
        self.preemptions += 1
        self._preempted(request)
        return request

    def publish(self, request: Request) -> None:
        """Offer the pages that have become full and confirmed to the prefix cache."""
        full = request.num_computed // self.spec.page_size
        if full > request.published and self.spec.prefix_caching:
            hashes = request.extend_hashes(self.spec.page_size)
            # Nobody else asks for what is lossy, or has its log-probabilities told: it has names of its own.
            asked = not request.lossy and (self.spec.through_store or request.sampling.prompt_logprobs is None)
            for index in range(request.published, full):
                self.pool.publish(request.pages[index], hashes[index])
                if asked:
                    self.published(request.pages[index], hashes[index])
            request.published = full

    # ------------------------------------------------------------ steps

    def compose(self) -> Composed | None:
        """The next step, as the policy fills it; None where it is empty."""
        if self.policy.dynamic_order:
            self._reorder(self.waiting, "prefill")
            self._reorder(self.running, "decode")
        for cohort in self.cohorts.turns(itertools.chain(self.running, self.waiting)):
            batch = BatchBuilder(self, cohort)
            self.policy.compose(batch, self.view)
            if not batch.empty:
                self.cohorts.last = cohort
                return composed(batch)
        return None

    def equal_steps(self, batch: Composed, most: int) -> int:
        """How often the step can be computed in a row, if nothing comes in: nobody ends before, and all have pages.

        Only once it has been computed alone, so that what a change of the batch brings is told at once.
        """
        decodes = [r for r, item in batch.members.items() if item.count == 1 and item.start >= r.prefill_len]
        again = decodes == self._decoded and len(decodes) == len(batch.members) == len(self.running)
        self._decoded = decodes if len(decodes) == len(batch.members) else []
        if not again or self.waiting or self.offers or self.cohorts or not self.policy.equal_steps:
            return 1
        for request, item in batch.members.items():
            if request.sampling.stop_token_ids:
                return 1
            most = min(most, request.last_index - item.index, request.until - item.start)
        size, free = self.spec.page_size, self.pool.counts[PageState.FREE]

        def too_many(steps: int) -> bool:
            return sum(-(-(i.start + steps) // size) - len(i.pages) for i in batch.members.values()) > free

        if too_many(most):  # evicting from the prefix cache, or a request, is for a step of its own
            most = bisect.bisect_left(range(most), True, lo=1, key=too_many) - 1
        return max(1, most)

    def grow(self, items: Sequence[PlanItem], steps: int) -> None:
        """The pages of so many equal steps, handed out as they would have been one step after the other."""
        size = self.spec.page_size
        needs = [
            (step, place)
            for place, item in enumerate(items)
            for step in range(len(item.pages) * size - item.start + 1, steps + 1, size)
        ]
        for _, place in sorted(needs):
            pages = self.pool.allocate(1)
            assert pages is not None  # they were counted
            items[place].pages.extend(pages)


class BatchBuilder:
    """One step under construction. It owns every account; a policy only asks it."""

    def __init__(self, scheduler: Scheduler, cohort: int = 0) -> None:
        """Of requests of this cohort only, so that a step that fails accuses nobody else."""
        self._scheduler, self._cohort = scheduler, cohort
        self._tokens_left = scheduler.options.max_num_batched_tokens
        self._seqs_left = scheduler.options.max_num_seqs
        # stable while requests are added and preempted
        self.running = self._mine(scheduler.running)
        self.waiting = self._mine(scheduler.waiting)
        self._members: dict[Request, PlanItem] = {}
        self._begun: list[Request] = []
        self._new: list[SeqInit] = []
        self._pending = False  # pages of a victim are still being read by a link

    def _mine(self, queue: list[Request]) -> Sequence[Work]:
        if not self._scheduler.cohorts:
            return tuple(request.view for request in queue)
        return tuple(request.view for request in queue if request.cohort == self._cohort)

    @property
    def tokens_left(self) -> int:
        """That still go into the step."""
        return self._tokens_left

    @property
    def seqs_left(self) -> int:
        """Requests that still do."""
        return self._seqs_left

    @property
    def empty(self) -> bool:
        """Nothing is in the step yet."""
        return not self._members

    def add(self, work: Work, limit: int | None = None) -> int:
        """Put up to `limit` tokens of the request (default: all that remain) into the step.

        Returns how many went in: 0 where it does not fit, has nothing to compute, or is in the step already.
        """
        request = request_of(work)
        if not self._seqs_left or not self._tokens_left or (limit is not None and limit <= 0):
            return 0
        if request in self._members or request.cohort != self._cohort:
            return 0
        if request.state is State.QUEUED:
            if not self._scheduler.admit(request):
                return 0
        elif request.state is not State.RUNNING:
            return 0
        start, index, count = request.num_scheduled, len(request.output) + request.pending, 1
        if start >= request.until:
            return 0  # all that is to come from here is in flight
        if start < request.prefill_len:
            rest = min(request.prefill_len, request.until) - start
            count = min(rest, self._tokens_left, limit or self._tokens_left)
            if self._scheduler.options.chunk:
                count = min(count, self._scheduler.options.chunk)
        elif index >= request.last_index:
            return 0
        end = start + count
        if end > len(request.pages) * self._scheduler.spec.page_size and not self._room(request, end):
            return 0
        self._put(request, start, count, index)
        return count

    def _room(self, request: Request, end: int) -> bool:
        """Pages for positions [0, end); preempts for them where a decode would else stand still."""
        scheduler = self._scheduler
        missing = -(-end // scheduler.spec.page_size) - len(request.pages)
        while missing > 0:
            pages = scheduler.pool.allocate(missing)
            if pages is not None:
                request.pages.extend(pages)
                break
            victim = None if self._pending else scheduler.evict(self._members)
            if victim is None:
                return False  # what is in flight will free pages
            self._pending = bool(victim.pages)
            if victim is request:
                return False
        return True

    def _put(self, request: Request, start: int, count: int, index: int) -> None:
        end = start + count
        if not request.introduced:
            request.introduced = True
            self._begun.append(request)
            self._new.append(
                SeqInit(request.request_id, request.incarnation, request.prompt, list(request.output), request.sampling)
            )
        samples = end == len(request.prompt) + index
        tokens = request.tokens(start, end)
        item = PlanItem(request.request_id, request.incarnation, start, count, tokens, request.pages, samples, index)
        self._members[request] = item
        self._tokens_left -= count
        self._seqs_left -= 1
        request.num_scheduled += count
        request.inflight += 1
        request.pending += samples
        if request.first_scheduled_at < 0:
            request.first_scheduled_at = self._scheduler.now

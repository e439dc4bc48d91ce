"""What can be told of a worker's core from outside: its numbers, and whether its accounts agree."""

from __future__ import annotations

from minidisagg.core.blocks import BlockPool, IntegrityError, PageState
from minidisagg.core.checked import PolicyError
from minidisagg.core.handoff import Receiver, Sender
from minidisagg.core.messages import Stats
from minidisagg.core.plan import StepPlan
from minidisagg.core.request import Request, State
from minidisagg.core.requests import Requests
from minidisagg.core.scheduler import Scheduler
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tiers import Tiers


class StalledError(PolicyError):
    """Work is queued, nothing is in flight, and the policy plans nothing: it would wait for ever."""


class Accounts:
    """The parts of a core."""

    spec: EngineSpec
    pool: BlockPool
    requests: Requests
    plans: dict[int, StepPlan]
    scheduler: Scheduler
    sender: Sender
    receiver: Receiver
    tiers: Tiers
    steps: int

    def stats(self) -> Stats:
        """The engine's share of a `Stats` message; the driver adds what it measures."""
        count, scheduler = self.pool.counts, self.scheduler
        prompts = [*scheduler.waiting, *(request for request in scheduler.running if request.is_prefill)]
        return Stats(
            role=scheduler.role,
            steps=self.steps,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            held=len(self.held),
            offers=len(scheduler.offers),
            queued_tokens=sum(request.remaining for request in prompts),
            pages_free=count[PageState.FREE],
            pages_live=count[PageState.LIVE],
            pages_cached=count[PageState.CACHED],
            pages_inflight=count[PageState.INFLIGHT],
            pages_quarantined=count[PageState.QUARANTINED],
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            flying=len(self.plans),
        )

    @property
    def idle(self) -> bool:
        """No request, no step, no transfer."""
        return not (self.requests or self.plans or self.scheduler.offers or self.tiers.busy)

    @property
    def held(self) -> list[Request]:
        """Requests computed here that wait for their decode worker."""
        return [request for request in self.requests.values() if request.state is State.HELD]

    def check_integrity(self) -> None:
        """The pool's invariants, and that its references are exactly what the requests hold."""
        self.pool.check_integrity()
        self.requests.check_integrity()
        holders = [0] * self.spec.num_pages
        for request in self.requests.values():
            reserved: list[int] = []
            if request.state is State.WAIT_KV:
                reserved = [p for p in request.pages if self.pool.state[p] > PageState.CACHED]
            for page in request.pages:
                holders[page] += page not in reserved
        for page in self.tiers.held():
            holders[page] += 1
        if holders != self.pool.refs:
            wrong = [page for page in range(self.spec.num_pages) if holders[page] != self.pool.refs[page]]
            raise IntegrityError(f"pages {wrong[:8]} have other references than holders")

    def check_stall(self) -> None:
        """An empty step is right while something else here makes progress, or while there is nothing to do."""
        scheduler = self.scheduler
        if self.plans or self.sender.busy or self.receiver.busy or self.held or self.tiers.busy:
            return
        if scheduler.waiting or scheduler.running:
            policy = scheduler.policy
            where = policy.where("compose", None) or policy.where("evict", None)  # of a user's file, what it has
            raise StalledError(
                f"worker {self.spec.name}: {len(scheduler.waiting)} requests wait, {len(scheduler.running)} run, "
                f"{self.pool.available} pages are free, and policy {policy.name} plans nothing{where}"
            )

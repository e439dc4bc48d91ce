"""What each hook of a recorded policy answered, and what another policy would have answered in its place.

The state stays that of the recorded run: the other policy is asked first, about copies of all that a hook could change
(requests, hints, dice, pages), and its answer is compared and forgotten. Where it would have placed a step's requests
the scheduler's own `BatchBuilder` says, on a copy of the scheduler.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec.structs import replace as replace_struct

from minidisagg.core.blocks import IntegrityError
from minidisagg.core.checked import Checked, OutOfTime, PolicyError
from minidisagg.core.cohorts import Cohorts
from minidisagg.core.handoff import Outgoing
from minidisagg.core.plan import SeqKey
from minidisagg.core.policy import (
    Batch,
    Change,
    ClusterView,
    Migration,
    Placement,
    Policy,
    Reject,
    RequestView,
    RoleChange,
    Stage,
    Victim,
    WorkerView,
)
from minidisagg.core.request import Request, State, Work, request_of
from minidisagg.core.scheduler import BatchBuilder, Scheduler, View, composed, scheduler_of
from minidisagg.core.tiers import wanted
from minidisagg.core.tracked import tracked_of
from minidisagg.policies import PATIENCE, in_time

SHOWN = 8  # requests that a difference between two steps names
Hints = dict[str, str | int | float]


class Difference(NamedTuple):
    """A decision that the other policy would have made differently, or could not make (`failed`)."""

    hook: str
    about: str  # a request, or the worker's step
    recorded: str
    other: str
    failed: bool = False


@dataclass
class Tally:
    """Of one hook."""

    asked: int = 0
    differ: int = 0
    failed: int = 0  # of those that differ: it raised, or answered what cannot be
    first: tuple[float, str] | None = None  # that differs: when, in seconds on the run's clock, and on which worker


@dataclass
class Notes:
    """What all that are asked on behalf of one policy have in common."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    hints: dict[SeqKey, Hints] = field(default_factory=dict)  # what the other's `place` would have told the workers


class GaveUp(BaseException):
    """The other policy does not answer: no failure of the recorded one, through whose hook this passes."""


class Asker:
    """Beside one router or one worker. `decisions` and `differences`: since somebody took them."""

    def __init__(self, name: str, other: Policy | None, notes: Notes) -> None:
        """Without another policy the recorded one's decisions are told, and no more."""
        self.name = name
        self.other = None if other is None else Checked(other)
        self.notes = notes
        self.sent: Mapping[SeqKey, Outgoing] = {}  # the worker's handoffs
        self.decisions: list[str] = []
        self.differences: list[Difference] = []
        self.keys: dict[tuple[SeqKey, Stage], Any] = {}  # of the other's `order`
        self.hints: dict[str, Hints] = {}  # by request: what the other sees and writes in the router

    def ask(self, question: Callable[[Checked], Any]) -> Any:
        """The other's answer, or the `PolicyError` that it came to; None where there is nobody to ask."""
        if self.other is None:
            return None
        try:
            with in_time(PATIENCE, OutOfTime, f"more than {PATIENCE:.0f} s"):
                return question(self.other)
        except OutOfTime as error:
            raise GaveUp(str(error)) from error
        except (PolicyError, IntegrityError) as error:
            return error if isinstance(error, PolicyError) else PolicyError(str(error))

    def compare(self, hook: str, about: str, now: float, recorded: Any, other: Any, tell: Callable[[Any], str]) -> None:
        """Count a decision, and mark it if the two answers are not the same."""
        if self.other is None:
            return
        tally = self.notes.tallies.setdefault(hook, Tally())
        tally.asked += 1
        failed = isinstance(other, PolicyError)
        if not failed and other == recorded:
            return
        tally.differ, tally.failed = tally.differ + 1, tally.failed + failed
        tally.first = min(tally.first or (now, self.name), (now, self.name))
        said = " ".join(str(other).split()) if failed else tell(other)
        self.differences.append(Difference(hook, about, tell(recorded), said, failed))

    def take_decisions(self) -> list[str]:
        """And begin anew."""
        taken, self.decisions = self.decisions, []
        return taken

    def take_differences(self) -> list[Difference]:
        """And begin anew."""
        taken, self.differences = self.differences, []
        return taken


class Asked(Policy):
    """Decides as `policy`, which was recorded, does; what another would have done is noted."""

    asks: Policy

    def __init__(self, policy: Policy, asker: Asker) -> None:
        self.asks, self._asker = policy, asker

    @property
    def dynamic_order(self) -> bool:  # type: ignore[override]
        """The recorded one's, as all that the mechanism goes by."""
        return bool(self.asks.dynamic_order)

    @property
    def equal_steps(self) -> bool:  # type: ignore[override]
        """So is this."""
        return bool(self.asks.equal_steps)

    @property
    def replaces(self) -> bool:
        """Asked where either of the two has something to say: the default answer changes nothing."""
        other = self._asker.other
        return self.asks.replaces or (other is not None and other.replaces)

    # ------------------------------------------------------------ the router's hooks

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        other = self._routed("admit", request, cluster, _verdict)
        answer = self.asks.admit(request, cluster)
        self._noted("admit", request, cluster, _verdict(answer), other, told=answer is not None)
        return answer

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        other = self._routed("place", request, cluster, _place)
        answer = self.asks.place(request, cluster)
        self._noted("place", request, cluster, _place(answer), other, told=True)
        return answer

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        now = request.prefill, request.decode or None

        def tell(one: Placement | None) -> str:  # as the router sees it: another codec alone moves nothing
            return "stays" if one is None or (one.prefill, one.decode) == now else _place(one)

        other = self._routed("replace", request, cluster, tell, later=1)
        answer = self.asks.replace(request, cluster)
        self._noted("replace", request, cluster, tell(answer), other, told=tell(answer) != "stays")
        return answer

    def rebalance(self, cluster: ClusterView) -> list[Change]:
        other = self._asker.ask(lambda policy: _changes(policy.rebalance(_copied_cluster(cluster)), cluster))
        answer = list(self.asks.rebalance(cluster))
        recorded = _changes(answer, cluster)
        self._asker.compare("rebalance", "the cluster", cluster.now, recorded, other, str)
        if answer:
            self._asker.decisions.append(f"rebalance: {recorded}")
        return answer

    def _routed(
        self, hook: str, request: RequestView, cluster: ClusterView, tell: Callable[[Any], str], later: int = 0
    ) -> Any:
        """`later`: for which incarnation after this one its hints are."""
        tracked, notes = tracked_of(request), self._asker.notes
        if self._asker.other is None:
            return None
        hints = self._asker.hints.setdefault(request.request_id, dict(tracked.spec.hints))
        mine = copy.copy(tracked)
        mine.spec = replace_struct(tracked.spec, hints=hints)
        answer = self._asker.ask(lambda policy: tell(getattr(policy, hook)(mine.view, _copied_cluster(cluster))))
        notes.hints[request.request_id, tracked.incarnation + later] = dict(hints)
        return answer

    def _noted(
        self, hook: str, request: RequestView, cluster: ClusterView, recorded: str, other: Any, told: bool
    ) -> None:
        self._asker.compare(hook, request.request_id, cluster.now, recorded, other, str)
        if told:
            self._asker.decisions.append(f"{hook} {request.request_id}: {recorded}")

    # ------------------------------------------------------------ a worker's hooks

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        asker, scheduler = self._asker, scheduler_of(worker)
        other = asker.ask(lambda policy: policy.accept(self._copied(offer).view, _look(scheduler, asker)))
        answer = self.asks.accept(offer, worker)
        asker.compare("accept", offer.request_id, worker.now, answer, other, lambda one: "grant" if one else "wait")
        return answer

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        asker, scheduler = self._asker, scheduler_of(worker)
        mine = self._copied(request)
        key = asker.ask(lambda policy: policy.order(mine.view, stage, _look(scheduler, asker)))
        answer = self.asks.order(request, stage, worker)
        if asker.other is None:
            return answer
        of, queue = request_of(request), _queue(scheduler, stage)
        if not isinstance(key, PolicyError):
            asker.keys[of.key, stage] = key
        if of in queue:  # it is put in order again: the order of all of them shows in the step
            return answer
        others = [one for one in queue if (one.key, stage) in asker.keys]
        recorded = _rank(answer, [one.sort_key[stage] for one in others])
        found = key
        if not isinstance(key, PolicyError):
            found = asker.ask(lambda policy: _own_rank(policy, key, [asker.keys[one.key, stage] for one in others]))
        where = f"of {len(others) + 1} at {stage}"
        asker.compare("order", request.request_id, worker.now, recorded, found, lambda one: f"place {one + 1} {where}")
        return answer

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        asker, step = self._asker, composed(batch)
        other = asker.ask(lambda policy: _step(scheduler_of(worker), step.cohort, policy, asker))
        self.asks.compose(batch, worker)
        recorded = _members(batch)
        asker.compare("compose", "the step", worker.now, recorded, other, lambda one: _told(one, recorded, other))
        asker.decisions += [f"admitted {request.request_id}{_from_cache(request)}" for request in step.begun]

    def evict(self, worker: WorkerView, candidates: Sequence[Work]) -> Victim | None:
        asker, scheduler = self._asker, scheduler_of(worker)

        def question(policy: Checked) -> str:
            return _victim(policy.evict(_look(scheduler, asker), [self._copied(one).view for one in candidates]))

        other = asker.ask(question)
        answer = self.asks.evict(worker, candidates)
        asker.compare("evict", "a decode without a page", worker.now, _victim(answer), other, str)
        asker.decisions.append(f"preempted {_victim(answer)}")
        return answer

    def _copied(self, view: Work) -> Request:
        return copied_request(request_of(view), self._asker)


# ---------------------------------------------------------------- copies


@dataclass(frozen=True)
class _Look(View):
    """A worker as the other policy would see it: its queues are in that one's order, and made of copies."""

    _asker: Asker

    @property
    def running(self) -> Sequence[Work]:
        return tuple(request.view for request in _ordered(self._scheduler.running, "decode", self._asker))

    @property
    def waiting(self) -> Sequence[Work]:
        return tuple(request.view for request in _ordered(self._scheduler.waiting, "prefill", self._asker))


def _look(scheduler: Scheduler, asker: Asker) -> _Look:
    return _Look(scheduler, scheduler.spec.name, scheduler.spec.page_size, scheduler.spec.num_pages, asker)


def copied_request(request: Request, asker: Asker) -> Request:
    """With the hints that the other policy would have given it, as far as the router is recorded."""
    mine = copy.copy(request)
    mine.pages, mine.hashes, mine.sort_key = request.pages[:], request.hashes[:], {}
    hints = asker.notes.hints.get(request.key, request.spec.hints)
    mine.spec = replace_struct(request.spec, hints=dict(hints))
    mine.view = Work(mine)
    return mine


def _ordered(queue: Iterable[Request], stage: Stage, asker: Asker) -> list[Request]:
    """Copies in the other's order; without those for which it has none, which would have failed."""
    found = []
    for request in queue:
        if (request.key, stage) in asker.keys:
            found.append(mine := copied_request(request, asker))
            mine.sort_key[stage] = asker.keys[request.key, stage]
    assert asker.other is not None
    try:
        return sorted(found, key=lambda request: request.sort_key[stage])
    except TypeError as error:
        raise asker.other.incomparable(error) from error


def _copied_cluster(cluster: ClusterView) -> ClusterView:
    """Its own dice, which lie as they lay."""
    dice = random.Random()
    dice.setstate(cluster.rng.getstate())
    workers = {name: copy.copy(status) for name, status in cluster.workers.items()}
    return replace(cluster, workers=MappingProxyType(workers), rng=dice)


def _own_rank(policy: Checked, key: Any, others: Iterable[Any]) -> int:
    try:
        return _rank(key, others)
    except TypeError as error:
        raise policy.incomparable(error) from error


def _shallow(of: Any) -> Any:
    """A copy with containers of its own."""
    mine = copy.copy(of)
    vars(mine).update({name: copy.copy(value) for name, value in vars(of).items()})
    return mine


def _step(scheduler: Scheduler, cohort: int, policy: Checked, asker: Asker) -> dict[str, int]:
    """The step that `policy` would have composed: tokens by request."""

    def preempted(request: Request) -> None:
        mine.remove(request)
        request.state = State.DONE_INFLIGHT
        sent = asker.sent.get(request.key)
        if sent is None or not (sent.stopping or sent.flying):  # else a link still reads from its pages
            mine.pool.drop(request.pages)
            request.pages = []

    def failed(request: Request, reason: str) -> None:
        raise PolicyError(reason)

    def fetched(request: Request, now: float, spare: int) -> bool:
        """It would have gone to the store."""
        wants = wanted(mine.spec, mine.pool, request, spare)
        if wants is not None:
            mine.pool.hold(wants[0])
            mine.pool.reserve(len(wants[1]))
            request.state = State.WAIT_KV
        return wants is not None

    mine = Scheduler(scheduler.spec, policy.asks, _shallow(scheduler.pool), scheduler.expected, preempted, failed)
    mine.role, mine.options, mine.now = scheduler.role, scheduler.options, scheduler.now
    mine.fetch = fetched
    mine.learner, mine.cohorts = scheduler.learner, Cohorts(scheduler.cohorts)
    mine.waiting = _ordered(scheduler.waiting, "prefill", asker)
    mine.running = _ordered(scheduler.running, "decode", asker)
    if policy.dynamic_order:
        mine.set_policy(policy.asks)  # which puts them in its order of now
    batch = BatchBuilder(mine, cohort)
    policy.compose(batch, mine.view)
    return _members(batch)


# ---------------------------------------------------------------- answers


def _verdict(answer: Reject | None) -> str:
    return "in" if answer is None else "rejected"


def _place(answer: Placement | Reject) -> str:
    if not isinstance(answer, Placement):
        return "rejected"
    there = answer.prefill
    if answer.decode != answer.prefill:
        there += f" → {answer.decode or 'left open'}"
    there += f" after {answer.split_at} tokens" if answer.split_at is not None else ""
    there += f", prefix from {answer.fetch_from}" if answer.fetch_from is not None else ""
    return there if answer.codec is None else f"{there} as {answer.codec}"


def _changes(answer: Sequence[Change], cluster: ClusterView) -> str:
    """Those that change something."""
    return ", ".join(filter(None, (_change(one, cluster) for one in answer))) or "no change"


def _change(one: Change, cluster: ClusterView) -> str:
    if not isinstance(one, RoleChange):
        name = one.request.request_id
        return f"{name} moves to {one.worker}" if isinstance(one, Migration) else f"{one.worker} gets {name}'s prefix"
    worker = cluster.workers[one.worker]
    return "" if one.role is (worker.flipping or worker.role) else f"{one.worker} becomes {one.role.name.lower()}"


def _victim(answer: Victim | None) -> str:
    return "nobody" if answer is None else answer.request.request_id


def _members(batch: Batch) -> dict[str, int]:
    return {item.request_id: item.count for item in composed(batch).members.values()}


def _from_cache(request: Request) -> str:
    return f" ({request.cached_tokens} tokens of it from the prefix cache)" if request.cached_tokens else ""


def _told(step: dict[str, int], recorded: dict[str, int], other: Any) -> str:
    """Tokens of the requests of which the two steps do not have as many."""
    against = {} if isinstance(other, PolicyError) else other
    odd = [name for name in {**recorded, **against} if recorded.get(name) != against.get(name)]
    more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    return ", ".join(f"{name} ({step.get(name, 0)})" for name in odd[:SHOWN]) + more


def _queue(scheduler: Scheduler, stage: Stage) -> list[Request]:
    if stage == "transfer":
        return [offer.request for offer in scheduler.offers]
    return scheduler.waiting if stage == "prefill" else scheduler.running


def _rank(key: Any, others: Iterable[Any]) -> int:
    """How many stand before it: who comes later stands behind its equals."""
    return sum(not key < other for other in others)

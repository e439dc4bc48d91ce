"""A recorded run through the production core once more, and what there is to see at each of its steps."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minidisagg.core.blocks import PageState
from minidisagg.core.checked import policy_name
from minidisagg.core.effects import AbortLink, Effect, Send, drain
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputlog import as_recorded, read_entries
from minidisagg.core.inputs import Input, Received, Schedule, StepDone
from minidisagg.core.messages import (
    ROUTER,
    Abort,
    Failed,
    Hello,
    KVAck,
    KVGrant,
    KVOffer,
    Migrate,
    PeerDown,
    Released,
    Role,
    SetPolicy,
    SetRole,
    StepOutput,
    Submit,
)
from minidisagg.core.plan import StepPlan
from minidisagg.core.policy import HOOKS, Policy
from minidisagg.core.router import Router, RouterEffect
from minidisagg.core.routerlog import (
    Died,
    Drained,
    Heard,
    Moved,
    PauseSet,
    PolicySet,
    RoleSet,
    RouterInput,
    checksum,
    feed,
    read_router,
)
from minidisagg.core.tracked import Emit
from minidisagg.policies import load_policy, shown
from minidisagg.replay.asking import Asked, Asker, Difference, Notes
from minidisagg.replay.records import Record, is_cut

PLACES = Role.PREFILL, Role.BOTH, Role.DECODE
KEPT = 16  # names of requests that a step keeps of a queue


class Chunk(NamedTuple):
    """A part of a prompt: positions [start, end) of `of`."""

    request_id: str
    start: int
    end: int
    of: int


class Moving(NamedTuple):
    """A handoff under way: pieces that were started, and how many of these have not landed."""

    request_id: str
    peer: str
    pieces: int
    flying: int


@dataclass
class Step:
    """One moment of a worker or of the router at which something was decided."""

    time: float  # seconds since the run began
    title: str
    events: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """That it computes."""
        return 0

    def facts(self) -> list[tuple[str, str]]:
        """Lines for a person."""
        return []


@dataclass
class WorkerStep(Step):
    """A step as it was planned. `seconds`: what it took, with those equal to it that were computed at once."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[str, ...] = ()
    waiting: int = 0
    queue: tuple[str, ...] = ()  # the first of those that wait
    running: int = 0
    held: int = 0
    offers: int = 0
    pages: tuple[int, ...] = ()  # by `PageState`
    sending: tuple[Moving, ...] = ()
    receiving: tuple[Moving, ...] = ()
    repeat: int = 1
    seconds: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.prefill)

    def facts(self) -> list[tuple[str, str]]:
        def listed(names: Iterable[str], count: int) -> str:
            return f"{count}: {' '.join(names)}" if count else "0"

        free, live, cached, inflight, quarantined = self.pages
        pages = f"{live + inflight + quarantined} of {sum(self.pages)} used"
        odd = {"being written": inflight, "in quarantine": quarantined}.items()
        pages += (
            "".join(f", {count} of them {what}" for what, count in odd if count) + f"; {cached} cached, {free} free"
        )
        more = f", {self.held} held for their decode worker" if self.held else ""
        more += f", {self.offers} offers wait" if self.offers else ""
        chunks = " ".join(f"{one.request_id}[{one.start}:{one.end} of {one.of}]" for one in self.prefill)
        return [
            ("prefill", f"{self.prompt_tokens} tokens: {chunks}" if chunks else "0"),
            ("decode", listed(self.decode, len(self.decode))),
            ("queue", listed([*self.queue, *["…"] * (self.waiting > len(self.queue))], self.waiting)),
            ("running", f"{self.running}{more}"),
            ("KV pages", pages),
            ("sending", listed(map(_moving, self.sending), len(self.sending))),
            ("receiving", listed(map(_moving, self.receiving), len(self.receiving))),
        ]


@dataclass
class RouterStep(Step):
    """A decision of the router. `workers`: what it then knew of each."""

    waiting: int = 0
    waiting_tokens: int = 0
    workers: tuple[tuple[str, str, int, int, int], ...] = ()  # name, role, queued tokens, decoding, free pages

    def facts(self) -> list[tuple[str, str]]:
        known = [
            (name, f"{role}: {queued} prompt tokens queued, {decoding} decode, {free} pages free")
            for name, role, queued, decoding, free in self.workers
        ]
        return [("waiting", f"{self.waiting} requests, {self.waiting_tokens} prompt tokens"), *known]


@dataclass
class Lane:
    """The router's or a worker's steps, by time. `plans`: what was compared; `wrong`: came out otherwise."""

    name: str
    place: int = 0  # among the lanes: the router, then as a request passes them
    steps: list[Step] = field(default_factory=list)
    plans: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)
    cut: float | None = None  # when its log ends, if that is within a record

    def at(self, time: float) -> int:
        """The step that is the last up to then, or the first."""
        return max(0, bisect.bisect_right(self.steps, time, key=lambda step: step.time) - 1)


class Run:
    """All of one record. `ask`: the other policy's name, as for `load_policy`; empty: none is asked."""

    def __init__(self, record: Record, ask: str) -> None:
        """Raises `ValueError` and `OSError`; what a policy does wrong when it is asked is in `lanes` and `notes`."""
        self.name, self.ask, self._other_name = record.name, shown(ask), ask
        self.policies = list[str]()  # that were recorded
        self.lanes = list[Lane]()
        self.notes = Notes()
        self.began = 0.0
        self._other()
        workers = record.workers
        if record.router is not None:
            heard = self._router(record.router)
            workers = {key: workers[key] for key in heard if key in workers}
        if not self.began:
            self.began = min(map(_first_time, workers.values()), default=0.0)
        for (name, epoch), path in workers.items():
            self._worker(name, epoch, path)
        self.lanes = sorted((lane for lane in self.lanes if lane.steps), key=lambda lane: (lane.place, lane.name))
        if not self.lanes:
            raise ValueError(f"run {record.name} has no step")
        self.end = max(lane.steps[-1].time for lane in self.lanes)
        for lane in self.lanes:
            if lane.cut is not None:
                after = f"; the others go on until {self.end:.3f} s" if self.end > lane.cut else ""
                lane.notes.append(f"{lane.name}: the record ends early, in mid-record at {lane.cut:.3f} s{after}")
        self.differing = sorted(
            (step.time, number, index)
            for number, lane in enumerate(self.lanes)
            for index, step in enumerate(lane.steps)
            if step.differences
        )

    def summary(self) -> list[str]:
        """Whether the replay is the run that was recorded, and how the other policy's answers differ."""
        plans, wrong = (sum(getattr(lane, name) for lane in self.lanes) for name in ("plans", "wrong"))
        lines = [
            f"{plans} plans and router messages replayed, " + ("all as recorded" if not wrong else f"{wrong} otherwise")
        ]
        if wrong:
            lines[0] += ": the code, or what a policy imports, is not what it was"
        lines += [note for lane in self.lanes for note in lane.notes]
        for hook in HOOKS if self.ask else ():
            if (tally := self.notes.tallies.get(hook)) is None:
                continue
            line = f"of {tally.asked} decisions of {hook}, {tally.differ} differ"
            if tally.first is not None:
                line += f", first at {tally.first[0] - self.began:.3f} s ({tally.first[1]})"
            lines.append(line + (f"; {tally.failed} of them are errors" if tally.failed else ""))
        return lines

    # ------------------------------------------------------------ the two kinds of logs

    def _other(self) -> Policy | None:
        """Of the router and of each worker an instance of its own, as in a run."""
        return load_policy(self._other_name) if self._other_name else None

    def _recorded(self, asker: Asker) -> Callable[[str], Policy]:
        def load(name: str) -> Policy:
            if shown(name) not in self.policies:
                self.policies.append(shown(name))
            return Asked(load_policy(name), asker)

        return load

    def _router(self, path: Path) -> list[tuple[str, int]]:
        """Returns the workers that it heard of, and their epochs."""
        heard, lane, asker = list[tuple[str, int]](), Lane(ROUTER), Asker(ROUTER, self._other(), self.notes)
        self.lanes.append(lane)
        load = self._recorded(asker)
        with path.open("rb") as log:
            head, entries = read_router(log)
            router = Router(head.spec, load(head.policy))
            for entry, recorded in entries:
                what = entry.what
                self.began = self.began or entry.now
                if isinstance(what, Heard) and isinstance(what.envelope.body, Hello):
                    heard.append((what.envelope.source, what.envelope.epoch))
                try:
                    effects = feed(router, entry, load)
                except Exception as error:
                    self._end(lane, entry.now, error, entries)
                    break
                sent = checksum(effects)
                lane.plans += bool(recorded or sent)
                lane.wrong += recorded is not None and sent != recorded
                events = [*_router_input(what), *asker.take_decisions(), *_router_effects(effects)]
                differences = asker.take_differences()
                if events or differences:
                    self._note_router(lane, router, entry.now, events, differences)
        if is_cut(path):
            lane.cut = router.view.now - self.began
        return heard

    def _note_router(
        self, lane: Lane, router: Router, now: float, events: list[str], differences: list[Difference]
    ) -> None:
        view = router.view
        workers = tuple(
            (one.name, one.role.name.lower(), one.queued_tokens, one.decoding, one.pages_free)
            for one in view.workers.values()
        )
        title = f"decision {len(lane.steps) + 1} of {policy_name(router.policy)}"
        step = RouterStep(now - self.began, title, events, differences, view.waiting, view.waiting_tokens, workers)
        lane.steps.append(step)

    def _worker(self, name: str, epoch: int, path: Path) -> None:
        lane, again = next((lane for lane in self.lanes if lane.name == name), None), f", epoch {epoch}"
        if lane is None:
            self.lanes.append(lane := Lane(name))
            again = ""
        asker = Asker(name, self._other(), self.notes)
        with path.open("rb") as log:
            spec, entries = read_entries(log)
            lane.place = 1 + PLACES.index(spec.role)
            core = EngineCore(spec, self._recorded(asker))
            asker.sent = core.sender.transfers
            events, flying = list[str](), dict[int, WorkerStep]()
            for entry, recorded in entries:
                what, now = entry.what, entry.now
                events += _worker_input(what)
                try:
                    plan = core.on(what, now)
                except Exception as error:
                    self._end(lane, now, error, entries)
                    break
                told = [text for effect in drain(core.outbox) for text in _worker_effect(effect)]
                if isinstance(what, StepDone) and (step := flying.pop(what.step_id, None)) is not None:
                    step.seconds += what.seconds
                    step.events += told  # what came of it
                    if core.steps in core.plans and core.steps not in flying:
                        flying[core.steps] = step  # of equal steps another one is under way
                    told = []
                events += told
                if isinstance(what, Schedule):
                    lane.plans += plan is not None
                    lane.wrong += as_recorded(plan) != recorded
                if plan is not None:
                    step = flying[plan.step_id] = _worker_step(core, plan, now - self.began, again)
                    step.events = [*events, *asker.take_decisions()]
                    step.differences = asker.take_differences()
                    lane.steps.append(step)
                    events = []
            if events and lane.steps:
                lane.steps[-1].events += events
        if is_cut(path):
            lane.cut = core.now - self.began

    def _end(self, lane: Lane, now: float, error: Exception, rest: Iterator[object]) -> None:
        """Of what ended the recorded run, too, if that is where its log ends."""
        lane.wrong += next(rest, None) is not None
        what = " ".join(f"{type(error).__name__}: {error}".split())
        lane.notes.append(f"{lane.name} ends at {now - self.began:.3f} s in {what}")


def _first_time(path: Path) -> float:
    with path.open("rb") as log:
        return next((entry.now for entry, _ in read_entries(log)[1]), 0.0)


# ---------------------------------------------------------------- what is kept of a step


def _worker_step(core: EngineCore, plan: StepPlan, time: float, epoch: str) -> WorkerStep:
    chunks, decode = list[Chunk](), list[str]()
    for item in plan.items:
        request = core.requests[item.request_id, item.incarnation]
        end = item.start + item.count
        if end <= request.prefill_len:
            chunks.append(Chunk(item.request_id, item.start, end, request.prefill_len))
        else:
            decode.append(item.request_id)
    scheduler = core.scheduler
    sending = [Moving(key[0], one.peer, one.pieces, one.flying) for key, one in core.sender.transfers.items()]
    receiving = [
        Moving(key[0], one.source, one.posted, one.posted - one.arrived) for key, one in core.receiver.transfers.items()
    ]
    return WorkerStep(
        time,
        f"step {plan.step_id} of {scheduler.policy.name}{epoch}",
        prefill=tuple(chunks),
        decode=tuple(decode),
        waiting=len(scheduler.waiting),
        queue=tuple(request.request_id for request in scheduler.waiting[:KEPT]),
        running=len(scheduler.running),
        held=len(core.held),
        offers=len(scheduler.offers),
        pages=tuple(core.pool.counts[state] for state in PageState),
        sending=tuple(sending),
        receiving=tuple(receiving),
        repeat=plan.repeat,
    )


def _moving(one: Moving) -> str:
    return f"{one.request_id} ({one.peer}, {one.pieces} pieces, {one.flying} on the link)"


def _worker_input(what: Input) -> list[str]:
    if not isinstance(what, Received):
        return []
    source, body = what.envelope.source, what.envelope.body
    if isinstance(body, Submit):
        return [f"came {body.request_id}" + (f", to decode on {body.decode}" if body.decode else "")]
    if isinstance(body, Abort):
        return [f"aborted {body.request_id}"]
    if isinstance(body, KVOffer):
        return [f"offered {body.request_id} by {source}"]
    if isinstance(body, KVGrant):
        return [f"granted {body.request_id} by {source}"]
    if isinstance(body, Migrate):
        return [f"placed {body.request_id} for decode on {body.dest}"]
    if isinstance(body, SetRole):
        return [f"becomes {body.role.name.lower()}"]
    if isinstance(body, SetPolicy):
        return [f"policy {shown(body.spec)}"]
    if isinstance(body, PeerDown):
        return [f"{body.worker} is down"]
    return []


def _worker_effect(effect: Effect) -> list[str]:
    if isinstance(effect, AbortLink):
        return [f"gives the link with {effect.peer} up"]
    if not isinstance(effect, Send):
        return []
    body = effect.body
    if isinstance(body, StepOutput):
        return [f"ended {one.request_id} ({one.finish})" for one in body.tokens if one.finish]
    if isinstance(body, KVGrant):
        return [f"granted {body.request_id} to {effect.dest}"]
    if isinstance(body, KVAck):
        return [f"landed {body.request_id} from {effect.dest}"]
    if isinstance(body, Released):
        return [f"gave {body.request_id} back: {body.reason}"]
    if isinstance(body, Failed):
        return [f"failed {body.request_id}: {body.reason}"]
    return []


def _router_input(what: RouterInput) -> list[str]:
    if isinstance(what, Heard) and isinstance(what.envelope.body, Hello):
        return [f"{what.envelope.source} is up, epoch {what.envelope.epoch}"]
    if isinstance(what, Died):
        return [f"{what.worker} is down, epoch {what.epoch}"]
    if isinstance(what, RoleSet):
        return [f"{what.worker} is to become {what.role.name.lower()}"]
    if isinstance(what, PolicySet):
        return [f"policy {shown(what.spec)}"]
    if isinstance(what, PauseSet):
        return ["admission paused" if what.paused else "admission resumed"]
    if isinstance(what, Moved):
        return [f"{what.request_id} is to move to {what.worker}"]
    return [f"{what.worker} drains"] if isinstance(what, Drained) else []


def _router_effects(effects: list[RouterEffect]) -> list[str]:
    ends = [one for one in effects if isinstance(one, Emit) and one.finish in ("reject", "error", "abort")]
    return [f"{one.request_id}: {one.finish}{f', {one.error}' if one.error else ''}" for one in ends]

"""The cluster's brain, in the front-end process: it places requests, and its log is the only durable truth of them.

    on_request       admit → place → Submit (or reject, or wait for a worker)
    on_message       tokens, in the order of their index; stage times; what a worker gave back is placed anew
    on_worker_down   every request that needed the worker is resubmitted: prompt and emitted tokens, incarnation + 1
    on_tick          deadlines, lost heartbeats, role flips

Recovery is one path for every failure and for preemption: forget the incarnation everywhere, submit the next one.

Blame: a worker that dies leaves word of the requests that its step was computing, or of the one whose message it was
reading. They are suspects. Each half of them becomes a cohort, which shares no step with anybody else, so that every
further death halves the suspects; only a request that stood alone is charged with it. n suspects cost at most
⌈log2 n⌉ + 3 deaths. Where nothing is known, everyone who was there is charged.
Sans-IO like the engine: effects go out through `outbox`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from minidisagg.core.checked import Checked, PolicyError
from minidisagg.core.cluster import Cluster
from minidisagg.core.lived import Heartbeat, LivedTime
from minidisagg.core.messages import (
    Abort,
    Cached,
    Envelope,
    Failed,
    Fatal,
    Hello,
    Logprobs,
    Parted,
    PeerDown,
    PeerUp,
    Released,
    RequestSpec,
    Role,
    SetPolicy,
    SetRole,
    Stats,
    Stayed,
    StepOutput,
    Stored,
    TokenOut,
    WorkerOptions,
)
from minidisagg.core.placing import Kill as Kill
from minidisagg.core.placing import Placing
from minidisagg.core.placing import RouterEffect as RouterEffect
from minidisagg.core.plan import SeqKey
from minidisagg.core.policy import Policy, Reject, RoleChange, WorkerStatus
from minidisagg.core.predictor import LengthPredictor, Predictor
from minidisagg.core.tracked import Emit, Stage, Tracked

MAX_FAILURES = 3  # a request that is charged with this many ends in an error


Suspects = Collection[SeqKey] | None


@dataclass(frozen=True)
class RouterSpec:
    """Limits of the router."""

    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 20
    request_timeout: float = 600.0  # seconds from arrival to the last token
    lost_after: float = 10.0  # seconds without a word from a worker
    stuck_after: float = 120.0  # seconds that one step may take
    seed: int = 0
    predictor: Predictor = "none"  # of output lengths
    options: Mapping[Role, WorkerOptions] = field(default_factory=dict)  # that a worker takes with a role; else its own


class Router(Placing):
    """Places requests on workers and follows them to their end."""

    def __init__(self, spec: RouterSpec, policy: Policy) -> None:
        self.spec = spec
        self.policy = Checked(policy)
        self.outbox: list[RouterEffect] = []
        self.requests: dict[str, Tracked] = {}
        self.parked: list[str] = []  # accepted, and no worker can take them now
        self.hellos: dict[str, Hello] = {}
        self.epochs: dict[str, int] = {}  # the newest of each worker, dead ones too
        self.stats: dict[str, Stats] = {}
        self.reports: dict[str, int] = {}  # how many `Stats` have come of each
        self.heartbeats: dict[str, Heartbeat] = {}
        self.roles: dict[str, Role] = {}  # that were set while running: a restarted worker takes them again
        self.paused = False  # admission is paused: new requests are parked
        self.policy_spec = ""  # of a policy that was set while running
        self.migrations = 0  # that went on elsewhere while they decoded
        self._cohorts = 0  # of suspects that there have been
        self._copies = 0  # of prefixes that `rebalance` has asked for
        self._clock = LivedTime()
        self._lived = 0.0
        self.predictor = LengthPredictor(spec.predictor)
        self.cluster = Cluster(spec.max_waiting, spec.max_waiting_tokens, spec.seed)
        self.view = self.cluster.view
        self.view.changed(requests=lambda: [request.view for request in self.requests.values()])

    # ------------------------------------------------------------ clients

    def on_request(self, request_id: str, spec: RequestSpec, now: float) -> None:
        """A client's request; its fate is told through `Emit`. Its arrival may lie before `now` (open-loop load)."""
        self._set(now)
        if request_id in self.requests:
            self.outbox.append(Emit(request_id, finish="error", error="a request of this id is running"))
            return
        expected = self.predictor.predict(spec)
        spec = replace(spec, hints=dict(spec.hints), predicted_len=expected)
        request = Tracked(request_id, spec, now + self.spec.request_timeout)
        try:
            verdict = self.policy.admit(request.view, self.view)
        except PolicyError as error:
            self.outbox.append(Emit(request_id, finish="error", error=str(error)))
            return
        if isinstance(verdict, Reject):
            self._reject(request_id, verdict)
            return
        self.requests[request_id] = request
        self.cluster.arrived(request)
        self._place(request, new=True)

    def on_abort(self, request_id: str, now: float, reason: str = "") -> None:
        """The client left."""
        self._set(now)
        request = self.requests.get(request_id)
        if request is not None:
            if not reason:  # a stop string has come, or somebody has read enough: the conversation may go on
                self._return(request)
            self._abandon(request)
            self._finish(request, Emit(request_id, finish="error" if reason else "abort", error=reason))

    # ------------------------------------------------------------ workers

    def on_message(self, envelope: Envelope, now: float) -> None:
        """A worker's message; one of a dead epoch changes nothing."""
        self._set(now)
        name, body = envelope.source, envelope.body
        status = self.view.workers.get(name)
        if isinstance(body, Hello):
            self._on_hello(name, envelope.epoch, body)
            return
        if status is None or status.epoch != envelope.epoch:
            return
        self.heartbeats[name].heard_at = self._lived
        if isinstance(body, StepOutput):
            self._on_step(status, body)
        elif isinstance(body, Stats):
            self._on_stats(status, body)
        elif isinstance(body, Cached):
            self.cluster.on_cached(name, body)
        elif isinstance(body, Stored):
            self.cluster.on_stored(body)
        elif isinstance(body, Logprobs | Released | Failed | Stayed | Parted):
            request = self.requests.get(body.request_id)
            if request is None or not request.speaks(name, body.incarnation):
                return
            if isinstance(body, Logprobs):
                request.logprobs.update(enumerate(body.values, body.first))
            elif isinstance(body, Released):
                self._resubmit(request, body.reason, body.failure)
            elif isinstance(body, Parted):
                if request.stage is Stage.TRANSFER and request.decode in self.view.workers:
                    self._parted(request)
                elif request.stage is Stage.PREFILL:
                    self._resubmit(request, "it left before its first token came", failure=False)
            elif isinstance(body, Stayed):
                if (body.incarnation, body.anew) == (request.before, request.incarnation):
                    self._stayed(request)
            else:
                self._fail(request, body.reason)
        elif isinstance(body, Fatal):
            target = self.view.workers.get(body.worker)
            if target is not None and target.epoch == body.epoch:
                self.outbox.append(Kill(target.name, target.epoch, body.reason))

    def on_worker_down(self, name: str, epoch: int, now: float, suspects: Suspects = None) -> None:
        """The worker's process is dead (waited for): tell its peers, resubmit what needed it.

        `suspects`: what it was at work on; empty where no request is to blame, None where nobody knows.
        """
        self._set(now)
        status = self.view.workers.get(name)
        if status is None or status.epoch != epoch:
            return
        self.cluster.remove(name)
        del self.hellos[name], self.heartbeats[name]
        self.stats.pop(name, None)
        for other in self.view.workers:
            self._send(other, PeerDown(name, epoch))
        users = [request for request in self.requests.values() if request.uses(name)]
        if suspects:
            self._accuse([r for r in users if {(r.request_id, r.incarnation), (r.request_id, r.before)} & {*suspects}])
        for request in users:
            self._resubmit(request, f"worker {name} failed", failure=suspects is None)

    def on_tick(self, now: float) -> None:
        """Call a few times a second. Raises `PolicyError`: without `rebalance` the router cannot go on."""
        self._set(now)
        for request in list(self.requests.values()):
            if now > request.deadline:
                self.on_abort(request.request_id, now, reason="the request's deadline has passed")
        for name, beat in list(self.heartbeats.items()):
            stuck = self.stands_still(name, self.spec.stuck_after)
            if self._lived - beat.heard_at > self.spec.lost_after or stuck:
                beat.heard_at = beat.stepped_at = self._lived
                reason = "makes no progress" if stuck else "does not answer"
                self.outbox.append(Kill(name, self.view.workers[name].epoch, reason))
        if self.policy.replaces:
            self._replace_waiting()
        for change in self.policy.rebalance(self.view):
            if isinstance(change, RoleChange):
                self.set_role(change, now)
            else:
                self.move(change)
        for status in self.view.workers.values():
            if status.flipping is None:
                continue
            self._clear(status.name)  # again and again: what was on its way there is there now
            if not self.uses(status.name):
                self._send(status.name, SetRole(status.flipping, self.spec.options.get(status.flipping)))
        self.place_parked(now)

    def set_role(self, change: RoleChange, now: float) -> None:
        """The worker gets nothing new from now on, and the new role once it is empty; what decodes there migrates.

        A worker that is down takes the role when it is back.
        """
        self.roles[change.worker] = change.role
        status = self.view.workers.get(change.worker)
        if status is not None:
            status.changed(flipping=change.role if change.role != status.role else None)

    def stands_still(self, name: str, seconds: float) -> bool:
        """The live worker's step takes longer than this."""
        return self.heartbeats[name].stands_still(self._lived, seconds)

    def uses(self, name: str) -> bool:
        """Some request needs the worker."""
        return any(request.uses(name) for request in self.requests.values())

    def set_policy(self, spec: str, policy: Policy, now: float) -> None:
        """Place by `policy` from now on, and have every worker schedule by it, later ones too."""
        self.policy, self.policy_spec = Checked(policy), spec
        for name in self.view.workers:
            self._send(name, SetPolicy(spec))
        self.place_parked(now)

    def pause(self, paused: bool, now: float) -> None:
        """New requests wait here, or go on."""
        self.paused = paused
        self.place_parked(now)

    def drain(self, name: str, now: float) -> None:
        """The live worker takes nothing new, until it is started again. Raises `KeyError`."""
        self.view.workers[name].changed(draining=True)

    def place_parked(self, now: float) -> None:
        """Try again what found no worker."""
        self._set(now)
        parked, self.parked = self.parked, []
        for request_id in parked:
            request = self.requests.get(request_id)
            if request is not None and not request.prefill:
                self._place(request, new=False)

    def check_integrity(self) -> None:
        """The counters that hooks see equal what the log says."""
        self.cluster.check_integrity(self.requests.values())

    # ------------------------------------------------------------ giving up

    def _abandon(self, request: Tracked) -> None:
        """Abort this incarnation wherever it may be."""
        for name in dict.fromkeys((request.prefill, request.decode)):  # a set's order differs from run to run
            if name in self.view.workers:
                self._send(name, Abort(request.request_id, request.incarnation))
        self.cluster.release(request)

    def _accuse(self, suspects: list[Tracked]) -> None:
        """Halve them, or charge the one that is left. It has failed twice then, if it had been a suspect before."""
        if len(suspects) == 1:
            suspects[0].failures += 2 if suspects[0].cohort and not suspects[0].failures else 1
        middle = -(-len(suspects) // 2)
        for half in filter(None, (suspects[:middle], suspects[middle:])):
            self._cohorts += 1
            for request in half:
                request.cohort = self._cohorts

    def _fail(self, request: Tracked, reason: str) -> None:
        self._abandon(request)
        self._finish(request, Emit(request.request_id, finish="error", error=reason))

    def _resubmit(self, request: Tracked, reason: str, failure: bool) -> None:
        self._abandon(request)
        request.failures += failure
        if request.failures >= MAX_FAILURES:
            error = f"failed {request.failures} times, last: {reason}"
            self._finish(request, Emit(request.request_id, finish="error", error=error))
            return
        request.renew()
        request.early.clear()
        request.begun, request.stage = False, Stage.PARKED
        self._place(request, new=False)

    # ------------------------------------------------------------ messages

    def _on_hello(self, name: str, epoch: int, hello: Hello) -> None:
        if epoch <= self.epochs.get(name, -1):
            return  # a late copy must not bring a dead process back
        if name in self.view.workers:  # the new process came before the news of the old one's death
            self.on_worker_down(name, self.view.workers[name].epoch, self.view.now)
        self.epochs[name] = epoch
        for other, peer in self.hellos.items():
            self._send(other, PeerUp(name, epoch, hello.address))
            self._send(name, PeerUp(other, self.view.workers[other].epoch, peer.address))
        self.cluster.add(name, epoch, hello)
        if self.policy_spec:
            self._send(name, SetPolicy(self.policy_spec))
        if name in self.roles:
            self.set_role(RoleChange(name, self.roles[name]), self.view.now)
        self.hellos[name] = hello
        self.heartbeats[name] = Heartbeat(self._lived, stepped_at=self._lived)
        self.place_parked(self.view.now)

    def _on_stats(self, status: WorkerStatus, stats: Stats) -> None:
        self.stats[status.name] = stats
        self.reports[status.name] = self.reports.get(status.name, 0) + 1
        self.heartbeats[status.name].on_stats(stats, self._lived)
        if stats.role == status.flipping:
            status.changed(role=stats.role, flipping=None)
        elif stats.role != status.role and status.flipping is None:  # a late copy of an earlier order won
            self._send(status.name, SetRole(status.role, self.spec.options.get(status.role)))
        self.cluster.on_stats(status, stats)

    def _on_step(self, status: WorkerStatus, step: StepOutput) -> None:
        self.cluster.on_step(status.name, step)
        for request_id in step.begun:
            if (begun := self.requests.get(request_id)) is not None:
                begun.begun = True
        for out in step.tokens:
            request = self.requests.get(out.request_id)
            known = request is not None and request.speaks(status.name, out.incarnation)
            if request is None or not known or out.index < len(request.emitted):
                continue
            request.early[out.index] = status.name, out
            while (next_out := request.early.pop(len(request.emitted), None)) is not None:
                self._on_token(request, *next_out, step.ends)

    def _on_token(self, request: Tracked, source: str, out: TokenOut, ends: Sequence[float]) -> None:
        if not request.emitted:
            self.cluster.arrived(request, -1)
        if first := request.stage is Stage.PREFILL:
            self.cluster.computed(request)
        moving = request.before >= 0
        emit = request.news(out, request.take(source, out, self.view.now), ends)
        if moving and request.before < 0:
            self.migrations += 1
            if (left := self.view.workers.get(request.prefill)) is not None and left.flipping is not None:
                self._clear(left.name)
        if out.finish:
            self._finish(request, replace(emit, finish=out.finish))
            return
        self.outbox.append(emit)
        if first and not request.decode:
            self._bind_late(request)

    # ------------------------------------------------------------ ends

    def _finish(self, request: Tracked, last: Emit) -> None:
        """The request is over; `last` tells the client, with the stage times."""
        if not request.emitted:
            self.cluster.arrived(request, -1)
        if last.finish in ("stop", "length"):
            self.predictor.learn(request.spec, len(request.emitted))
        if request.stage is Stage.TRANSFER and request.decode in self.view.workers:
            # The end came with the token that prefill sampled: the decode worker may still hold an offer or a grant.
            self._send(request.decode, Abort(request.request_id, request.incarnation))
        elif last.finish in ("stop", "length"):
            self._return(request)
        self.cluster.release(request)
        del self.requests[request.request_id]
        self.outbox.append(replace(last, times=request.times(self.view.now)))

    def _reject(self, request_id: str, verdict: Reject) -> None:
        self.outbox.append(Emit(request_id, finish="reject", error=verdict.reason, retry_after=verdict.retry_after))

    def _set(self, now: float) -> None:
        self.view.changed(now=now)
        self._lived = self._clock.at(now)

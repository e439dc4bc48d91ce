"""Where requests go: to begin, once they have begun, and while they decode; and prefixes, before and after."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from minidisagg.core.checked import Checked, PolicyError
from minidisagg.core.cluster import Cluster
from minidisagg.core.effects import Send
from minidisagg.core.messages import (
    Abort,
    Migrate,
    PeerDown,
    PeerUp,
    Replicate,
    RequestSpec,
    Role,
    SetPolicy,
    SetRole,
    Submit,
    fetched,
    returned,
)
from minidisagg.core.policy import ClusterView, Migration, Placement, Reject, Replica
from minidisagg.core.tracked import Emit, Stage, Tracked, tracked_of


class Kill(Struct, frozen=True):
    """The supervisor must kill this worker's process and wait for it."""

    worker: str
    epoch: int
    reason: str


RouterEffect = Send | Emit | Kill


def _spec_now(request: Tracked) -> RequestSpec:
    """What is known of it: its hints as they are now, where nothing is encoded on the way too."""
    hints = dict(request.spec.hints)
    return replace(request.spec, emitted=list(request.emitted), cohort=request.cohort, hints=hints)


class Placing:
    """Of a `Router`, which has the parts."""

    policy: Checked
    outbox: list[RouterEffect]
    requests: dict[str, Tracked]
    parked: list[str]
    paused: bool
    cluster: Cluster
    view: ClusterView
    _copies: int

    def _set(self, now: float) -> None:
        raise NotImplementedError

    def _fail(self, request: Tracked, reason: str) -> None:
        raise NotImplementedError

    def _reject(self, request_id: str, verdict: Reject) -> None:
        raise NotImplementedError

    def _resubmit(self, request: Tracked, reason: str, failure: bool) -> None:
        raise NotImplementedError

    def _abandon(self, request: Tracked) -> None:
        raise NotImplementedError

    def _place(self, request: Tracked, new: bool) -> None:
        view = self.view
        waits = self.paused and not request.workers  # what was placed before, and preempted, goes on
        if waits or not view.anybody(Role.PREFILL) or not view.anybody(Role.DECODE):
            self.parked.append(request.request_id)
            return
        placement = self._ask_place(request)
        if placement is None:
            return
        if isinstance(placement, Reject):
            if new:
                del self.requests[request.request_id]
                self.cluster.arrived(request, -1)
                self._reject(request.request_id, placement)
            else:  # accepted once: it is not turned away any more
                self.parked.append(request.request_id)
            return
        self._send_to(request, placement)

    def _send_to(self, request: Tracked, placement: Placement) -> None:
        request.prefill, request.stage = placement.prefill, Stage.PREFILL
        self.cluster.charge(request)
        self._bind(request, placement.decode or "")
        request.workers.append(placement.prefill)
        spec = _spec_now(request)
        decode = "" if placement.decode == placement.prefill else placement.decode or ""
        hold, until = placement.decode is None, placement.split_at or 0
        request.home = placement.prefill if placement.returns else ""
        request.codec = placement.codec or ""
        key, after = (request.request_id, request.incarnation), ""
        if placement.fetch_from not in (None, placement.prefill):
            after = placement.fetch_from or ""
            self._send(after, Replicate(fetched(key[0]), key[1], spec, placement.prefill))
        self._send(placement.prefill, Submit(*key, spec, decode, hold, request.codec, until, after))

    def _replace_waiting(self) -> None:
        """As a resubmission does, but nothing has been computed yet."""
        for request in [r for r in self.requests.values() if r.stage is Stage.PREFILL and not r.begun]:
            try:
                placement = self.policy.replace(request.view, self.view)
            except PolicyError as error:
                self._fail(request, str(error))
                continue
            there = request.prefill, request.decode or None
            if placement is not None and (placement.prefill, placement.decode) != there:
                self._abandon(request)
                request.renew()
                request.early.clear()
                self._send_to(request, placement)

    def _ask_place(self, request: Tracked) -> Placement | Reject | None:
        """None: the policy has no answer, and the request has failed."""
        try:
            return self.policy.place(request.view, self.view)
        except PolicyError as error:
            self._fail(request, str(error))
            return None

    def _bind(self, request: Tracked, decode: str) -> None:
        request.decode = decode
        self.cluster.decodes(request)

    def _decode_at(self, request: Tracked, worker: str) -> None:
        self.cluster.decodes(request, -1)
        self._bind(request, worker)

    def _bind_late(self, request: Tracked) -> None:
        placement = self._ask_place(request)
        if placement is None:
            return
        if isinstance(placement, Reject) or placement.decode is None:
            self._resubmit(request, "no worker takes decode", failure=False)
            return
        self._bind(request, placement.decode)
        request.codec = placement.codec or request.codec
        request.stage = Stage.TRANSFER if placement.decode != request.prefill else Stage.DECODE
        request.stage_at = self.view.now
        migrate = Migrate(request.request_id, request.incarnation, placement.decode, request.codec)
        self._send(request.prefill, migrate)

    # ------------------------------------------------------------ moving

    def move(self, change: Migration | Replica) -> None:
        """As `rebalance` says."""
        request = tracked_of(change.request)
        if isinstance(change, Migration):
            self.migrate(request.request_id, change.worker, self.view.now)
        elif change.source != change.worker:
            self._copies += 1
            copy = f"{request.request_id}*{self._copies}"
            self._send(change.source, Replicate(copy, 0, request.spec, change.worker))

    def migrate(self, request_id: str, worker: str, now: float) -> bool:
        """A request that decodes goes on at `worker`; False where it does not decode, or does so there, or `worker`
        takes no decodes."""
        self._set(now)
        request, status = self.requests.get(request_id), self.view.workers.get(worker)
        if request is None or request.stage is not Stage.DECODE or worker == request.decode:
            return False
        if status is None or not status.takes(Role.DECODE):
            return False
        request.prefill = request.decode
        self._decode_at(request, worker)
        request.stage, request.stage_at = Stage.TRANSFER, self.view.now
        request.before = before = request.renew()
        self._send(request.prefill, Migrate(request_id, before, worker, anew=request.incarnation))
        return True

    def _parted(self, request: Tracked) -> None:
        """It goes on from what the store has of it."""
        request.renew()
        request.prefill = request.decode
        spec, key = _spec_now(request), (request.request_id, request.incarnation)
        self._send(request.decode, Submit(*key, spec, codec=request.codec))

    def _stayed(self, request: Tracked) -> None:
        self._decode_at(request, request.prefill)
        request.stage, request.stage_at = Stage.DECODE, self.view.now
        request.incarnation, request.before = request.before, -1

    def _clear(self, name: str) -> None:
        """What decodes at a worker that flips goes on elsewhere, where there are the fewest: one after the other, since
        the last page of one would wait behind all pages of another; the shortest first, for which there is room if
        there is for any."""
        if any(r.before >= 0 and r.prefill == name for r in self.requests.values()):
            return
        others = [w for w in self.view.candidates(Role.DECODE) if w.name != name]
        decoding = [r for r in self.requests.values() if r.stage is Stage.DECODE and r.decode == name]
        if others and decoding:
            worker = min(others, key=lambda w: (w.decoding, w.name))
            self.migrate(min(decoding, key=lambda r: r.prefill_len).request_id, worker.name, self.view.now)

    def _return(self, request: Tracked) -> None:
        """What its decode worker has computed goes back to where the next turn of its conversation begins, if it has
        another home."""
        ends = {request.decode, request.home}
        if request.stage is Stage.DECODE and len(ends) == 2 and ends <= self.view.workers.keys():
            copy = returned(request.request_id), request.incarnation
            self._send(request.decode, Replicate(*copy, _spec_now(request), request.home))

    def _send(
        self, dest: str, body: PeerUp | PeerDown | Submit | Abort | Migrate | Replicate | SetRole | SetPolicy
    ) -> None:
        self.outbox.append(Send(dest, body))

"""How requests end on a worker: finished, given back to the router, failed, or no longer wanted."""

from __future__ import annotations

from minidisagg.core.accounts import Accounts
from minidisagg.core.copies import Copies
from minidisagg.core.effects import Effect, Send
from minidisagg.core.messages import ROUTER, AnyMessage, Failed, KVFailed, Parted, Released
from minidisagg.core.plan import SeqKey
from minidisagg.core.request import Request, State


class Ends(Accounts):
    """Of a core, which has the parts."""

    outbox: list[Effect]
    copies: Copies
    _dropped: list[SeqKey]
    _lived: float
    _shut_since: float

    def _refuse_where_empty(self) -> None:
        """An empty worker has room for any offer. If the policy takes none, nothing here will ever change its mind."""
        scheduler = self.scheduler
        if not scheduler.offers or self.requests or self.plans or self.sender.busy or self.receiver.busy:
            self._shut_since = self._lived
        elif self._lived > self._shut_since + self.spec.lease / 2:
            for offer in scheduler.offers:
                reason = f"policy {scheduler.policy.name}: accept refuses it though worker {self.spec.name} is empty"
                self._send(offer.source, KVFailed(*offer.request.key, reason))
            scheduler.forget_offers(lambda offer: True)

    def _give_back(self, request: Request, reason: str, failure: bool) -> None:
        if request.state in (State.DONE_INFLIGHT, State.DONE):
            return
        self._end(request)
        self._send(ROUTER, Released(request.request_id, request.incarnation, reason, failure))

    def _part(self, request: Request) -> None:
        """It leaves through the store."""
        self._send(ROUTER, Parted(*request.key))
        self._end(request)

    def _preempted(self, request: Request) -> None:
        """The router places the recomputation, in colocated mode too: one mechanism, cheap by the prefix cache. Under
        FCFS the request is the first again, since it keeps its arrival time."""
        self._give_back(request, "preempted", failure=False)

    def _fail(self, request: Request, reason: str) -> None:
        """It can go on nowhere."""
        if request.state in (State.DONE_INFLIGHT, State.DONE):
            return
        if request.key in self.requests:  # else it is only offered
            self._end(request)
        self._send(ROUTER, Failed(request.request_id, request.incarnation, reason))

    def _end(self, request: Request) -> None:
        """Out of every queue at once; the pages go when no step and no peer can touch them any more."""
        if request.state is State.WAIT_KV and request.pages:
            if request.key in self.receiver.transfers:
                self.receiver.drop(request, "aborted")
            return  # the receiver says when its pages are settled
        if request.state in (State.DONE_INFLIGHT, State.DONE):
            return
        self.copies.forget(request)
        self.scheduler.remove(request)
        request.state = State.DONE_INFLIGHT
        if request.key in self.sender.transfers:
            self.sender.transfers[request.key].stop()
        self._retire_if_settled(request)

    def _retire_if_settled(self, request: Request) -> None:
        if request.state is State.DONE or request.inflight or request.key in self.sender.transfers:
            return
        request.state = State.DONE
        self.pool.drop(request.pages)
        request.pages = []
        if request.introduced:
            self._dropped.append(request.key)
        self.requests.remove(request)
        self.scheduler.cohorts.trust(request)
        self.copies.ended(request.key)

    def _stale(self, request_id: str, incarnation: int) -> bool:
        """Over, aborted, or here already; a newer incarnation ends an older one that is still here."""
        if self.requests.is_over(request_id, incarnation) or (request_id, incarnation) in self.requests:
            return True
        for request in self.requests.of(request_id):
            if request.incarnation > incarnation:
                return True
            self._end(request)
        self._forget_offers(request_id, incarnation)
        return False

    def _forget_offers(self, request_id: str, incarnation: int) -> None:
        """Offers that wait are no requests yet; their source hears of the end from the router."""
        self.scheduler.forget_offers(
            lambda offer: offer.request.request_id == request_id and offer.request.incarnation <= incarnation
        )

    def _add(self, request: Request) -> None:
        self.requests.add(request)
        self.scheduler.cohorts.suspect(request)

    def _send(self, dest: str, body: AnyMessage) -> None:
        self.outbox.append(Send(dest, body))

"""Prefixes that are copied from one worker's cache into another's, and the requests that wait for them.

A copy is a handoff of a request that is over: its source holds what its prefix cache has of the tokens, its
destination publishes what comes and lets go of it. Whoever waits for it is begun when it has ended, well or not: what
came is then found in the prefix cache like anything else there.
"""

from __future__ import annotations

from collections.abc import Callable

from minidisagg.core.blocks import BlockPool
from minidisagg.core.effects import Effect, Send
from minidisagg.core.messages import ROUTER, Cached, KVCancel, Replicate
from minidisagg.core.plan import SeqKey
from minidisagg.core.request import Request, State
from minidisagg.core.requests import Requests
from minidisagg.core.spec import EngineSpec


class Copies:
    """Of one worker, at either end."""

    def __init__(
        self,
        spec: EngineSpec,
        pool: BlockPool,
        requests: Requests,
        emit: Callable[[Effect], None],
        begin: Callable[[Request], None],
    ) -> None:
        """`begin(request)`: it waits no more."""
        self.spec, self.pool, self.requests = spec, pool, requests
        self._emit, self._begin = emit, begin
        self._waiting: dict[SeqKey, tuple[Request, str]] = {}  # by copy: who waits for it, and where it comes from

    def held(self, message: Replicate, now: float) -> Request | None:
        """The prefix that is asked for as a request that is to be handed over; None where there is nothing of it."""
        request = Request(message, self.spec.fingerprint, now)
        pages = self.pool.match(request.extend_hashes(self.spec.page_size)) if self.spec.prefix_caching else []
        if not pages:
            self.refuse(message)
            return None
        self.pool.hold(pages)
        request.state, request.pages, request.published = State.HELD, pages, len(pages)
        request.until = request.num_scheduled = request.num_computed = len(pages) * self.spec.page_size
        return request

    def refuse(self, message: Replicate) -> None:
        """Nothing will come of it."""
        key = message.request_id, message.incarnation
        self.requests.close(*key)
        self._emit(Send(message.dest, KVCancel(*key, 0)))

    def wait(self, request: Request, copy: SeqKey, source: str) -> bool:
        """The request waits for the copy, unless that is over."""
        if self.requests.is_over(*copy):
            return False
        request.state, self._waiting[copy] = State.WAIT_KV, (request, source)
        return True

    def ended(self, copy: SeqKey) -> None:
        """A request or a copy is over: if somebody waits for it, he has waited for long enough."""
        request, _ = self._waiting.pop(copy, (None, ""))
        if request is not None:
            request.state = State.QUEUED
            self._begin(request)

    def forget(self, request: Request) -> None:
        """It waits no more, and is not to begin."""
        if request.state is State.WAIT_KV:
            self._waiting = {copy: of for copy, of in self._waiting.items() if of[0] is not request}

    def tell(self) -> None:
        """How the prefix cache has changed since it was told last: no step may follow that would say it."""
        if any(news := self.pool.news()):
            self._emit(Send(ROUTER, Cached(*news)))

    def on_peer_down(self, worker: str) -> None:
        """Nothing comes from there."""
        for copy in [copy for copy, (_, source) in self._waiting.items() if source == worker]:
            self.ended(copy)

    def on_tick(self, now: float) -> None:
        """Nobody waits for ever. An offer may have evicted pages, and come to nothing."""
        self.tell()
        for copy, (request, _) in list(self._waiting.items()):
            if now > request.queued_at + self.spec.lease:
                self.ended(copy)

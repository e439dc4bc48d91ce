"""The store below the device's cache: pages come up before a request begins, and go down when they are published.

    Submit ──▶ pages beyond the device's hits reserved ──LoadPages──▶ Loaded: what was there is cached, it begins
    publish ──▶ page held ──SavePage──▶ Saved: the page is let go of

What comes up is found in the prefix cache like anything else there, so that nothing else knows of the store. A page
that is being written down is LIVE until it has been: neither eviction nor preemption takes it away before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from minidisagg.core.blocks import BlockPool
from minidisagg.core.effects import Effect, LoadPages, SavePage, Send
from minidisagg.core.inputs import Loaded, Saved
from minidisagg.core.messages import ROUTER, Stored
from minidisagg.core.plan import SeqKey
from minidisagg.core.request import Request, State
from minidisagg.core.spec import EngineSpec


class Loading(NamedTuple):
    """Under way for a request: the prefix that is held here already, and what is to come behind it."""

    request: Request
    cached: list[int]
    digests: list[bytes]
    pages: list[int]


class Tiers:
    """Of one worker; without a store it does nothing."""

    def __init__(
        self, spec: EngineSpec, pool: BlockPool, emit: Callable[[Effect], None], begin: Callable[[Request], None]
    ) -> None:
        """`begin(request)`: what could be loaded for it is here."""
        self.spec, self.pool = spec, pool
        self.loading: dict[SeqKey, Loading] = {}
        self.saving: dict[bytes, int] = {}  # pages that are held for it
        self._parting: list[Request] = []  # that leave through the store
        self._emit, self._begin = emit, begin

    @property
    def busy(self) -> bool:
        """Something is on its way, up or down."""
        return bool(self.loading or self.saving)

    def held(self) -> list[int]:
        """A page for each reference that this holds."""
        return [*self.saving.values(), *(page for one in self.loading.values() for page in one.cached)]

    # ------------------------------------------------------------ up

    def load(self, request: Request) -> bool:
        """Fetch what the store may have of its prompt; False where there is nothing to fetch, or no room for it."""
        size = self.spec.page_size
        if not self.spec.store or not self.spec.prefix_caching:
            return False
        digests = request.extend_hashes(size)[: (request.num_tokens - 1) // size]  # one token at least is computed
        cached = self.pool.match(digests)
        missing = digests[len(cached) :]
        self.pool.hold(cached)
        pages = self.pool.reserve(len(missing)) if missing else None
        if pages is None:
            self.pool.drop(cached)
            return False
        request.state = State.WAIT_KV
        self.loading[request.key] = Loading(request, cached, missing, pages)
        self._emit(LoadPages(*request.key, missing, pages))
        return True

    def on_loaded(self, done: Loaded) -> None:
        """So many are there, from the first on."""
        request, cached, digests, pages = self.loading.pop((done.request_id, done.incarnation))
        self.pool.land(pages[: done.pages])
        self.pool.cancel(pages[done.pages :])
        for page, digest in zip(pages[: done.pages], digests, strict=False):
            self.pool.publish(page, digest)
        self.pool.drop([*cached, *pages[: done.pages]])
        if request.state is State.WAIT_KV:  # else it has ended meanwhile
            request.state = State.QUEUED
            self._begin(request)

    # ------------------------------------------------------------ down

    def save(self, page: int, digest: bytes) -> None:
        """It has been published."""
        if self.spec.store and digest not in self.saving and self.pool.match([digest]) == [page]:
            self.pool.hold([page])
            self.saving[digest] = page
            self._emit(SavePage(digest, page))

    def on_saved(self, done: Saved) -> None:
        """Or not: a store that has no room takes nothing, and what it had may have left it."""
        self.pool.drop([self.saving.pop(done.digest)])
        self._emit(Send(ROUTER, Stored([done.digest] if done.kept else [], done.evicted)))

    def part(self, request: Request) -> None:
        """It leaves through the store, once all its pages are there."""
        self._parting.append(request)

    def parted(self) -> list[Request]:
        """Those of which all pages are there, since the last time."""
        held = [request for request in self._parting if request.state is State.HELD]
        gone = [request for request in held if not any(digest in self.saving for digest in request.hashes)]
        self._parting = [request for request in held if request not in gone]
        return gone

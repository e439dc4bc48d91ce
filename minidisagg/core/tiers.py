"""The store below the device's cache: pages come up before a request begins, and go down when they are published.

    Submit, or admission ──▶ pages beyond the device's hits reserved ──LoadPages──▶ Loaded: what was there is cached
    publish ──▶ page held ──SavePage──▶ Saved: the page is let go of

What comes up is found in the prefix cache like anything else there, so that nothing else knows of the store. A page
that is being written down is LIVE until it has been: neither eviction nor preemption takes it away before. So a
quarter of the cache is at most; what is published beyond that is written when there is room, if it is cached by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from minidisagg.core.blocks import BlockPool, PageState
from minidisagg.core.effects import Effect, LoadPages, SavePage, Send
from minidisagg.core.inputs import Loaded, Saved
from minidisagg.core.messages import ROUTER, Stored
from minidisagg.core.plan import SeqKey
from minidisagg.core.request import Request, State
from minidisagg.core.spec import EngineSpec

READS = 2  # of a request: when it comes, and when it is admitted; what others push out then is computed


def wanted(spec: EngineSpec, pool: BlockPool, request: Request, spare: int) -> tuple[list[int], list[bytes]] | None:
    """The pages that hold the beginning of it, and what is to be read behind them; None where nothing is, or where
    there is no room for the whole request beside `spare` pages."""
    if not spec.store or not spec.prefix_caching or request.reads >= READS:
        return None
    most = min((request.known - 1) // spec.page_size, request.found)  # one token at least is computed
    digests = request.extend_hashes(spec.page_size)[:most]
    cached = pool.match(digests)
    room = pool.available - sum(pool.state[page] is PageState.CACHED for page in cached) - spare
    fits = -(-request.known // spec.page_size) - len(cached) <= room
    return (cached, digests[len(cached) :]) if fits and len(cached) < len(digests) else None


class Loading(NamedTuple):
    """Under way for a request: the prefix that is held here already, and what is to come behind it."""

    request: Request
    cached: list[int]
    digests: list[bytes]
    pages: list[int]
    since: float


class Tiers:
    """Of one worker; without a store it does nothing."""

    def __init__(
        self,
        spec: EngineSpec,
        pool: BlockPool,
        emit: Callable[[Effect], None],
        begin: Callable[[Request], None],
        leave: Callable[[Request], None],
    ) -> None:
        """`begin(request)`: what could be loaded for it is here. `leave(request)`: all of it is in the store."""
        self.spec, self.pool = spec, pool
        self.loading: dict[SeqKey, Loading] = {}
        self.saving: dict[bytes, int] = {}  # pages that are held for it
        self._later: list[Request] = []  # that are to be loaded, too, once others have been
        self._unsaved: dict[int, bytes] = {}  # pages that have been published, and wait until fewer are
        self.silent = False  # it has answered nothing for a lease: whatever else was asked of it would be lost, too
        self._waited: float | None = None  # since when it has not answered
        self._parting: list[Request] = []  # that leave through the store
        self._emit, self._begin, self._leave = emit, begin, leave

    @property
    def busy(self) -> bool:
        """Something is on its way, up or down."""
        return bool(self.loading or self.saving)

    def held(self) -> list[int]:
        """A page for each reference that this holds."""
        return [*self.saving.values(), *(page for one in self.loading.values() for page in one.cached)]

    # ------------------------------------------------------------ up

    def load(self, request: Request, now: float, spare: int) -> bool:
        """Fetch what the store may have of it; False where nothing is `wanted`, or the store is silent.

        Called when the request comes, so that it waits for the store and its turn at once, and when it is admitted:
        what it had no room for, or what has left the cache in between, is read then. A request that is preempted is
        swapped out and in by this.
        """
        wants = None if self.silent else wanted(self.spec, self.pool, request, spare)
        if wants is None:
            return False
        cached, missing = wants
        request.state = State.WAIT_KV
        coming = self.pool.counts[PageState.INFLIGHT] + len(missing)
        if self.loading and (self._later or coming > self.spec.num_pages // 2):
            self._later.append(request)  # else nobody could begin without a store that hangs; and nobody is overtaken
            return True
        self.pool.hold(cached)
        pages = self.pool.reserve(len(missing))
        assert pages is not None  # there was room for more
        request.reads += 1
        self.loading[request.key] = Loading(request, cached, missing, pages, now)
        self._emit(LoadPages(*request.key, missing, pages))
        return True

    def on_loaded(self, done: Loaded) -> None:
        """So many are there, from the first on."""
        request, cached, digests, pages, _ = self.loading.pop((done.request_id, done.incarnation))
        self.pool.land(pages[: done.pages])
        self.pool.cancel(pages[done.pages :])
        for page, digest in zip(pages[: done.pages], digests, strict=False):
            self.pool.publish(page, digest)
        self.pool.drop([*cached, *pages[: done.pages]])
        self._answered()
        # What came before this worker's time it has now seen. Behind the first page that was missed nobody has looked.
        self._emit(Send(ROUTER, Stored(digests[: done.pages], digests[done.pages : done.pages + 1])))
        request.found = min(request.found, len(cached) + done.pages)
        self._go_on(request)

    def on_tick(self, now: float) -> None:
        """A store that does not answer is waited for no longer; pages that it was to fill stay reserved."""
        if not self.busy or self._waited is None:
            self._waited = now
        self.silent = now > self._waited + self.spec.lease
        for one in self.loading.values():
            if one.request.state is State.WAIT_KV and (self.silent or now > one.since + self.spec.lease):
                one.request.found = 0  # it asks no more
                self._go_on(one.request)
        if self.silent:
            self._go_on()
        self.let_go(now)

    def _go_on(self, *requests: Request) -> None:
        """And who waits for a load of its own asks again."""
        later, self._later = self._later, []
        for request in *requests, *later:
            if request.state is State.WAIT_KV:  # else it has ended, or begun without
                request.state = State.QUEUED
                self._begin(request)

    # ------------------------------------------------------------ down

    def save(self, page: int, digest: bytes) -> None:
        """It has been published."""
        if self.spec.store:
            self._unsaved[page] = digest
            self._save()

    def on_saved(self, done: Saved) -> None:
        """Or not: a store that has no room takes nothing, and what it had may have left it."""
        self.pool.drop([self.saving.pop(done.digest)])
        self._answered()
        self._emit(Send(ROUTER, Stored([done.digest] if done.kept else [], done.evicted)))
        self.let_go()

    def part(self, request: Request) -> None:
        """It leaves through the store, once all its pages are there."""
        self._parting.append(request)

    def let_go(self, now: float = 0.0) -> None:
        """Those leave of which all pages are there, and who has waited for long enough."""
        held = [request for request in self._parting if request.state is State.HELD]
        due = {*self.saving, *self._unsaved.values()} if held else set()
        gone = [
            request for request in held
            if self.silent or now > request.ready_at + self.spec.lease or due.isdisjoint(request.hashes)
        ]  # fmt: skip
        self._parting = [request for request in held if request not in gone]
        for request in gone:
            self._leave(request)

    def _answered(self) -> None:
        self.silent, self._waited = False, None
        self._save()

    def _save(self) -> None:
        most = max(1, self.spec.num_pages // 4)
        while self._unsaved and not self.silent and len(self.saving) < most:
            digest = self._unsaved.pop(page := next(iter(self._unsaved)))
            if digest not in self.saving and self.pool.match([digest]) == [page]:
                self.pool.hold([page])
                self.saving[digest] = page
                self._emit(SavePage(digest, page))

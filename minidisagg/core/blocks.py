"""Who owns which page of the KV cache: five states, reference counts, and the prefix cache by chained hashes.

    FREE ──allocate──▶ LIVE ──last drop──▶ CACHED (if published) or FREE
    FREE ──reserve───▶ INFLIGHT ──land──▶ LIVE
                          │ └──────cancel──▶ FREE         the peer said that it stopped
                          └──quarantine──▶ QUARANTINED ──release──▶ FREE   its link's abort is confirmed

A page that a peer may still write to is INFLIGHT or QUARANTINED and is never handed out; only a finished transfer or
a confirmed abort ends that.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum


class PageState(IntEnum):
    """A page is in exactly one of these."""

    FREE = 0
    LIVE = 1
    CACHED = 2
    INFLIGHT = 3
    QUARANTINED = 4


class IntegrityError(AssertionError):
    """An invariant of the accounting is broken; always a bug, never a user's mistake."""


def prefix_root(fingerprint: str, salt: str) -> bytes:
    """The parent hash of a request's first page: model and layout, and the tenant."""
    return hashlib.sha256(f"{fingerprint}\0{salt}".encode()).digest()


def page_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """SHA-256 over the parent's hash and the ids of one full page, so that equal hashes mean equal prefixes."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


def page_hashes(parent: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """Of all full pages, the first of them after `parent`."""
    hashes = [parent]
    for end in range(page_size, len(tokens) + 1, page_size):
        hashes.append(page_hash(hashes[-1], tokens[end - page_size : end]))
    return hashes[1:]


def short(digest: bytes) -> bytes:
    """What the router knows a page by: a wrong guess there costs time only, so that eight bytes will do."""
    return digest[:8]


class BlockPool:
    """Accounts for `num_pages` pages of one worker's KV cache; knows nothing of requests or tensors."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a KV cache needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self.state = [PageState.FREE] * num_pages
        self.refs = [0] * num_pages
        self.counts = [num_pages, 0, 0, 0, 0]  # pages by state
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._by_hash: dict[bytes, int] = {}
        # A heap hands out the lowest page first: a prompt's pages then mostly form one run, which moves faster.
        self._free = list(range(num_pages))
        self._lru: OrderedDict[int, None] = OrderedDict()
        self.stored: list[bytes] = []  # what the prefix cache has gained since somebody took the list, and lost
        self.removed: list[bytes] = []

    @property
    def available(self) -> int:
        """Pages that an allocation can have: FREE, and CACHED ones that it may evict."""
        return self.counts[PageState.FREE] + self.counts[PageState.CACHED]

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, LIVE with one reference each, or None and no change."""
        return self._take(count, PageState.LIVE, 1)

    def reserve(self, count: int) -> list[int] | None:
        """`count` pages for a peer to write into (INFLIGHT), or None and no change."""
        return self._take(count, PageState.INFLIGHT, 0)

    def land(self, pages: Sequence[int]) -> None:
        """A transfer into these pages is complete: INFLIGHT becomes LIVE with one reference."""
        self._move(pages, PageState.INFLIGHT, PageState.LIVE)
        for page in pages:
            self.refs[page] = 1

    def cancel(self, pages: Sequence[int]) -> None:
        """The peer has said that it will not write here (any more): INFLIGHT becomes FREE."""
        self._move(pages, PageState.INFLIGHT, PageState.FREE)

    def quarantine(self, pages: Sequence[int]) -> None:
        """Nobody knows whether the peer still writes here."""
        self._move(pages, PageState.INFLIGHT, PageState.QUARANTINED)

    def release(self, pages: Sequence[int]) -> None:
        """The abort of the link is confirmed: QUARANTINED becomes FREE."""
        self._move(pages, PageState.QUARANTINED, PageState.FREE)

    def hold(self, pages: Sequence[int]) -> None:
        """One more reference on pages that are LIVE or CACHED."""
        for page in pages:
            if self.state[page] is PageState.CACHED:
                del self._lru[page]
                self._move((page,), PageState.CACHED, PageState.LIVE)
            elif self.state[page] is not PageState.LIVE:
                raise IntegrityError(f"page {page} is {self.state[page].name} and cannot be held")
            self.refs[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One reference less; the last one sends a published page to the prefix cache, another to FREE.

        Pages are dropped last first, so that the tail of a prefix is evicted before its head.
        """
        refs, unknown, cached = self.refs, list[int](), list[int]()
        for page in reversed(pages):
            if refs[page] < 1:
                raise IntegrityError(f"page {page} is {self.state[page].name} with {refs[page]} references")
            refs[page] -= 1
            if not refs[page]:
                (unknown if self._hash_of[page] is None else cached).append(page)
        self._move(unknown, PageState.LIVE, PageState.FREE)
        self._move(cached, PageState.LIVE, PageState.CACHED)
        for page in cached:
            self._lru[page] = None

    def publish(self, page: int, digest: bytes) -> None:
        """Page holds the valid, complete KV of the prefix `digest`; others may share it from now on."""
        if self.state[page] is not PageState.LIVE:
            raise IntegrityError(f"page {page} is {self.state[page].name} and cannot be published")
        if self._hash_of[page] is None and digest not in self._by_hash:
            self._hash_of[page] = digest
            self._by_hash[digest] = page
            self.stored.append(digest)

    def news(self) -> tuple[list[bytes], list[bytes]]:
        """What the prefix cache has gained and lost since the last time, in `short` hashes; nothing that is in both."""
        lost = dict.fromkeys(self.removed)
        stored = [short(digest) for digest in self.stored if digest in self._by_hash]
        removed = [short(digest) for digest in lost if digest not in self._by_hash]
        self.stored.clear()
        self.removed.clear()
        return stored, removed

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of the longest cached prefix; takes no reference, so `hold` them before any allocation."""
        pages = []
        for digest in hashes:
            page = self._by_hash.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def check_integrity(self) -> None:
        """Every page in one state, sums equal the pool, references only on LIVE pages, hashes one to one."""
        members: list[list[int]] = [[] for _ in PageState]
        published = 0
        for page, (state, refs, digest) in enumerate(zip(self.state, self.refs, self._hash_of, strict=True)):
            members[state].append(page)
            if (refs > 0) is not (state is PageState.LIVE) or refs < 0:
                raise IntegrityError(f"page {page} is {state.name} with {refs} references")
            if digest is not None:
                published += 1
                if self._by_hash.get(digest) != page or state not in (PageState.LIVE, PageState.CACHED):
                    raise IntegrityError(f"page {page} is {state.name} and published")
        if self.counts != [len(pages) for pages in members]:
            raise IntegrityError(f"pages by state count {self.counts}, but {[len(pages) for pages in members]} are")
        if sorted(self._free) != members[PageState.FREE]:
            raise IntegrityError("the free list and the page states disagree")
        if sorted(self._lru) != members[PageState.CACHED]:
            raise IntegrityError("the LRU list and the page states disagree")
        if len(self._by_hash) != published:
            raise IntegrityError("a prefix hash names a page that does not carry it")

    def _take(self, count: int, state: PageState, refs: int) -> list[int] | None:
        if count > self.available:
            return None
        missing = count - len(self._free)
        if missing > 0:
            evicted = [self._lru.popitem(last=False)[0] for _ in range(missing)]
            for page in evicted:
                digest = self._hash_of[page]
                assert digest is not None
                del self._by_hash[digest]
                self._hash_of[page] = None
                self.removed.append(digest)
            self._move(evicted, PageState.CACHED, state)
            self._move(self._free, PageState.FREE, state)
            pages = sorted([*self._free, *evicted])
            self._free.clear()
        else:
            pages = [heapq.heappop(self._free) for _ in range(count)]
            self._move(pages, PageState.FREE, state)
        for page in pages:
            self.refs[page] = refs
        return pages

    def _move(self, pages: Sequence[int], old: PageState, new: PageState) -> None:
        """What becomes FREE is in the heap from now on; who takes from there has popped it."""
        state, free = self.state, new is PageState.FREE
        for page in pages:
            if state[page] is not old:
                raise IntegrityError(f"page {page} is {state[page].name}, not {old.name}")
            state[page] = new
            if free:
                heapq.heappush(self._free, page)
        self.counts[old] -= len(pages)
        self.counts[new] += len(pages)

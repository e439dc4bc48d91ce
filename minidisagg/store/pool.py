"""A content-addressed pool of KV pages over the tiers of one host, as Mooncake's (arXiv 2407.00079).

A page's digest (`core/blocks.py: page_hash`) stands for the model, the layout, the tenant and all tokens up to its end,
so equal names mean equal bytes: nothing is ever overwritten, and it does not matter who writes first. New pages go to
the first tier; what that one evicts goes to the next, and what is found there comes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from minidisagg.store.files import Files
from minidisagg.store.page import HEAD_BYTES, Verdict, judge, seal
from minidisagg.store.spec import TierSpec
from minidisagg.store.tier import Tier

MOST = 1 << 20  # pages that wait to be written back, of one that is never idle: the oldest have been evicted by then


class Put(NamedTuple):
    """What came of a page: whether it was written now, and which pages have left the pool since the `put` before."""

    written: bool
    evicted: tuple[bytes, ...] = ()


class Pool:
    """`tiers` from the fastest to the slowest; `layout` says what else two caches must share (`KVCache.fingerprint`).

    All but `has` is one thread's. What goes wrong with a file is a miss, or is not written.
    """

    def __init__(self, tiers: Sequence[TierSpec], layout: str, files: Files | None = None) -> None:
        self.layout, self.corrupt = layout, 0  # pages that were found damaged, and dropped
        self.tiers: list[Tier] = []
        self._files = files or Files()
        self._found: deque[str] = deque()  # in a slower tier
        self._gone: list[str] = []  # from one of the tiers at least
        for spec in reversed(tiers):
            self.tiers.insert(0, Tier(spec, self._files, self.tiers[0] if self.tiers else None, self._gone))
        self._fresh = deque(self.tiers[0].names if self.tiers[1:] else (), MOST)  # perhaps in the first tier only

    @property
    def failing(self) -> str:
        """Why a tier takes nothing for now; empty where all do."""
        return next((tier.failing for tier in self.tiers if tier.failing), "")

    def has(self, digest: bytes) -> bool:
        """Whether a `get` may find it."""
        return self._holds(digest.hex())

    def touch(self, digest: bytes) -> bool:
        """Whether a `get` may find it; it counts as used then."""
        return any([tier.touch(digest.hex()) for tier in self.tiers])

    def get(self, digest: bytes, into: memoryview) -> bool:
        """Fill `into`, as long as the page, and contiguous; after a miss there may be anything in it."""
        name, into = digest.hex(), into.cast("B")
        for tier in self.tiers:
            head = bytearray(HEAD_BYTES)
            size = tier.read(name, [head, into])
            if size is None:
                continue
            verdict = judge(head, size, self.layout, digest, into)
            if verdict is Verdict.GOOD:
                tier.touch(name)
                if tier is not self.tiers[0]:
                    self._found.append(name)
                return True
            if verdict is Verdict.BAD:
                self.corrupt += 1
                tier.drop(name)
        return False

    def put(self, digest: bytes, parts: Sequence[bytes | memoryview]) -> Put:
        """Store the page that consists of these bytes, unless it is there; then it counts as used."""
        name = digest.hex()
        written = False
        if not self.touch(digest):
            payload = memoryview(parts[0] if len(parts) == 1 else b"".join(parts)).cast("B")
            written = self._write(name, [seal(self.layout, digest, payload), payload])
        gone = dict.fromkeys(self._gone)
        self._gone.clear()
        return Put(written, tuple(bytes.fromhex(lost) for lost in gone if not self._holds(lost)))

    def promote(self) -> bool:
        """Copy a page that `get` has found in a slower tier to the first one; False where there is none to copy.

        Apart from `get`, as making room there may take a write to the disk, for which nobody who loads should wait.
        """
        if not self._found:
            return False
        name = self._found.popleft()
        data = next(filter(None, (tier.load(name) for tier in self.tiers)), None)
        if data is not None:
            self.tiers[0].add(name, [data])
        return True

    def write_back(self) -> bool:
        """Copy a page that is in the first tier only to the next one; False where there is none, or none is taken."""
        if not self._fresh or not self.tiers[1].ready:
            return False
        name = self._fresh.popleft()
        self.tiers[0].lower(name)
        if not self.tiers[1].ready:  # it was not written
            self._fresh.append(name)
        return True

    def close(self) -> None:
        """What is in files stays there."""

    def sink(self, until: float = math.inf) -> None:
        """At the engine's end, when no worker is left: what is in memory goes to the disk, if there is one, and as long
        as there is time (`time.monotonic()`)."""
        self.tiers[0].sink(until)

    def _write(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        """To the first tier that takes it."""
        for tier in self.tiers:
            if tier.add(name, parts):
                if tier is not self.tiers[-1]:
                    self._fresh.append(name)
                return True
            if tier.has(name):  # another worker's was faster
                return False
        return False

    def _holds(self, name: str) -> bool:
        return any(tier.has(name) for tier in self.tiers)

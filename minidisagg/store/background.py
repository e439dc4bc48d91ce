"""The thread in which a worker reads from its store and writes to it: what is waited for first, the rest later."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from minidisagg.store.pool import Put


class Store(Protocol):
    """Where pages are; `corrupt` counts those that were found damaged."""

    corrupt: int

    def has(self, digest: bytes) -> bool:
        """From any thread."""
        ...

    def get(self, digest: bytes, into: memoryview) -> bool:
        """Fill `into`, or a miss."""
        ...

    def put(self, digest: bytes, parts: Sequence[bytes | memoryview]) -> Put:
        """Store it, unless it is there."""
        ...

    def promote(self) -> bool:
        """Do a piece of what follows from loads and nobody waits for; False where there is none."""
        ...


class Loaded(NamedTuple):
    """Of the load `key`, so many pages are in place, from the first on: a prefix ends where a page is missing."""

    key: Hashable
    pages: int


class Saved(NamedTuple):
    """What came of a save."""

    digest: bytes
    put: Put


@dataclass
class Counters:
    """Since the start: pages, bytes of them, and seconds in which the thread was at work."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_loading: float = 0.0
    seconds_saving: float = 0.0
    evictions: int = 0
    dropped: int = 0  # saves
    corrupt: int = 0


class Background:
    """`wake` is called from the thread when `poll` has something; saves that wait hold at most `max_bytes`."""

    def __init__(self, store: Store, wake: Callable[[], None], max_bytes: int) -> None:
        self.counters = Counters()
        self._store, self._wake, self._max_bytes = store, wake, max_bytes
        self._loads: deque[tuple[Hashable, Sequence[bytes], Sequence[memoryview]]] = deque()
        self._saves: deque[tuple[bytes, memoryview]] = deque()
        self._waiting = 0  # bytes of saves, the one under way too
        self._closing = False
        self._changed = threading.Condition()
        self._done: deque[Loaded | Saved] = deque()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def load(self, key: Hashable, digests: Sequence[bytes], views: Sequence[memoryview]) -> None:
        """Read these pages of a prefix into the views, which stay the caller's to keep until it is polled."""
        with self._changed:
            self._loads.append((key, digests, views))
            self._changed.notify()

    def save(self, digest: bytes, data: bytes | memoryview) -> bool:
        """Write it some time; False, and nothing happens, where too much waits already."""
        data = memoryview(data).cast("B")
        with self._changed:
            if self._closing or self._waiting + len(data) > self._max_bytes:
                self.counters.dropped += 1
                return False
            self._waiting += len(data)
            self._saves.append((digest, data))
            self._changed.notify()
        return True

    def poll(self) -> list[Loaded | Saved]:
        """What was done since the last call, in order."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self, drain: bool = False, timeout: float = 10.0) -> None:
        """End the thread, after all that waits or after what is under way; waits at most `timeout` seconds for it."""
        with self._changed:
            self._closing = True
            if not drain:
                self.counters.dropped += len(self._saves)
                self._loads.clear()
                self._saves.clear()
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._loads or self._saves or self._closing)
                load = self._loads.popleft() if self._loads else None
                save = self._saves.popleft() if self._saves and load is None else None
            if load is not None:
                self._done.append(self._load(*load))
            elif save is not None:
                self._done.append(self._save(*save))
            else:
                return
            self.counters.corrupt = self._store.corrupt
            self._wake()
            while not self._loads and self._store.promote():
                pass

    def _load(self, key: Hashable, digests: Sequence[bytes], views: Sequence[memoryview]) -> Loaded:
        counters, began, pages = self.counters, time.monotonic(), 0
        for digest, view in zip(digests, views, strict=True):
            if not self._store.get(digest, view):
                break
            pages += 1
            counters.bytes_read += view.nbytes
        counters.hits += pages
        counters.misses += len(digests) - pages
        counters.seconds_loading += time.monotonic() - began
        return Loaded(key, pages)

    def _save(self, digest: bytes, data: memoryview) -> Saved:
        counters, began = self.counters, time.monotonic()
        put = self._store.put(digest, [data])
        counters.bytes_written += len(data) if put.written else 0
        counters.evictions += len(put.evicted)
        counters.seconds_saving += time.monotonic() - began
        with self._changed:
            self._waiting -= len(data)
        return Saved(digest, put)

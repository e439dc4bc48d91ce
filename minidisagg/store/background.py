"""The thread in which a worker reads from its store and writes to it: what is waited for first, the rest later."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from minidisagg.store.pool import Put

IDLE = 0.02  # seconds without a load or save after which what is in memory only begins to go to the disk


class Store(Protocol):
    """Where pages are; `corrupt` counts those that were found damaged."""

    corrupt: int

    @property
    def failing(self) -> str:
        """Why nothing is written for now; empty where it is."""
        ...

    def touch(self, digest: bytes) -> bool:
        """Whether it is there; it counts as used then."""
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

    def write_back(self) -> bool:
        """Do a piece of what makes a later start find more; False where there is none."""
        ...

    def close(self) -> None:
        """Give back what this process has of it."""
        ...


class Loaded(NamedTuple):
    """Of the load `key`, so many pages are in place, from the first on: a prefix ends where a page is missing."""

    key: Hashable
    pages: int


class Saved(NamedTuple):
    """What came of a save."""

    digest: bytes
    put: Put
    kept: bool  # it is there


@dataclass
class Counters:
    """Since the start: pages, bytes of them, and seconds in which the thread was at work."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    dropped: int = 0  # saves
    corrupt: int = 0
    failing: str = ""


Land = Callable[[int, memoryview], None]  # puts the i-th page of a load in its place
Read = Callable[[], memoryview]  # a page as it is


class Background:
    """`wake` is called from the thread when `poll` has something; pages have `page_bytes`."""

    def __init__(self, store: Store, wake: Callable[[], None], page_bytes: int) -> None:
        self.counters = Counters()
        self._store, self._wake = store, wake
        self._buffer = memoryview(bytearray(page_bytes))  # a page between file and cache
        self._loads: deque[tuple[Hashable, Sequence[bytes], Land]] = deque()
        self._saves: deque[tuple[bytes, Read]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._done: deque[Loaded | Saved] = deque()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def load(self, key: Hashable, digests: Sequence[bytes], land: Land) -> None:
        """Read these pages of a prefix; `land` gets each in turn, on this thread."""
        with self._changed:
            self._loads.append((key, digests, land))
            self._changed.notify()

    def save(self, digest: bytes, read: Read) -> None:
        """Write what `read` says on this thread, some time, unless it is there by then; the page stays as it is until
        this has been polled."""
        with self._changed:
            self._saves.append((digest, read))
            self._changed.notify()

    def poll(self) -> list[Loaded | Saved]:
        """What was done since the last call, in order."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self, timeout: float = 10.0) -> None:
        """End the thread, and the store with it, after what is under way; waits at most `timeout` seconds for it."""
        with self._changed:
            self._closing = True
            self.counters.dropped += len(self._saves)
            self._loads.clear()
            self._saves.clear()
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        pause: float | None = IDLE
        while True:
            with self._changed:
                asked = self._changed.wait_for(lambda: bool(self._loads or self._saves or self._closing), pause)
                load = self._loads.popleft() if self._loads else None
                save = self._saves.popleft() if self._saves and load is None else None
            if load is not None:
                self._done.append(self._load(*load))
            elif save is not None:
                self._done.append(self._save(*save))
            elif asked:
                return self._store.close()
            else:  # for at most half of the time, since the disk is others', too
                began = time.monotonic()
                more = self._store.write_back()
                pause = time.monotonic() - began if more else None
            self.counters.corrupt, self.counters.failing = self._store.corrupt, self._store.failing
            if asked:
                pause = IDLE
                self._wake()
            while not self._loads and self._store.promote():
                pass

    def _load(self, key: Hashable, digests: Sequence[bytes], land: Land) -> Loaded:
        counters, began, pages = self.counters, time.monotonic(), 0
        for digest in digests:
            if not self._store.get(digest, self._buffer):
                break
            land(pages, self._buffer)
            pages += 1
            counters.bytes_read += len(self._buffer)
        counters.hits += pages
        counters.misses += len(digests) - pages
        counters.read_seconds += time.monotonic() - began
        return Loaded(key, pages)

    def _save(self, digest: bytes, read: Read) -> Saved:
        counters, began = self.counters, time.monotonic()
        there = self._store.touch(digest)
        put = Put(False) if there else self._store.put(digest, [read()])
        counters.bytes_written += len(self._buffer) if put.written else 0
        counters.write_seconds += time.monotonic() - began
        return Saved(digest, put, there or put.written)

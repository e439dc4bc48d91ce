"""One directory of pages with a limit in bytes, which all workers of a host share.

A page is a file named by its digest. It is written under another name, made durable where that means something, and
renamed, so that a name stands for a whole page or for none, whenever its writer dies. Recency is the file's time.
Whoever has the lock evicts and keeps the count of bytes; readers need no lock. Nothing here raises because of a file.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minidisagg.store.files import Entry, Files, Tally
from minidisagg.store.spec import TierSpec

RETRY = 60.0  # seconds without writing after a write has failed
ABANDONED = 600.0  # seconds after which a temporary file has no writer, even if a process has its number
_PAGE = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.(\d+)-\d+\.tmp")

_serial = itertools.count(time.time_ns())  # in a container, a dead writer may have had this process's number


class Tier:
    """Pages that it evicts go to the tier `below`, if there is one, and their names to the list `gone`."""

    def __init__(self, spec: TierSpec, files: Files, below: Tier | None, gone: list[str]) -> None:
        self.spec, self.files = spec, files
        self.directory = Path(spec.directory)
        self._below, self._gone = below, gone
        self._lock = self.directory / "lock"
        self._oldest: deque[Entry] = deque()  # from the last look at the directory
        self.failing = ""  # why nothing is written here for now
        self._resumes = 0.0  # nothing is written before (`time.monotonic()`)
        self._open = False  # else the count of bytes may be anything
        try:
            self._begin()
        except OSError as error:
            self._failed(error)

    def has(self, name: str) -> bool:
        """Whether a page of this name is here; that it can be read is another matter."""
        return self.files.stat(self.directory / name) is not None

    def touch(self, name: str, used: int = 0) -> bool:
        """The page was used then (nanoseconds), or now; False where there is none."""
        try:
            self.files.touch(self.directory / name, used)
        except OSError:
            return False
        return True

    def read(self, name: str, buffers: Sequence[bytearray | memoryview]) -> int | None:
        """The file's size, or None where there is none that can be read."""
        try:
            return self.files.read(self.directory / name, buffers)
        except OSError:
            return None

    def load(self, name: str) -> bytearray | None:
        """The whole file, or None where there is none that can be read."""
        entry = self.files.stat(self.directory / name)
        data = bytearray(entry.size if entry else 0)
        return None if self.read(name, [data]) is None else data

    def drop(self, name: str) -> None:
        """A page that is good for nothing."""
        with suppress(OSError), self.files.lock(self._lock) as tally:
            self.files.unlink(self.directory / name)
            self._look(tally)  # it may have changed its size

    def add(self, name: str, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Whether it was written: it is not where it is here already, is too large, or writing fails."""
        size = sum(len(part) for part in parts)
        if size > self.spec.limit or not self.ready:
            return False
        path = self.directory / name
        temporary = self.directory / f"{name}.{self.files.pid}-{next(_serial)}.tmp"
        try:
            self._begin()
            self.files.write(temporary, parts)
            if self.spec.durable:
                self.files.fsync(temporary)  # before the rename: a name must never outlive its bytes
            with self.files.lock(self._lock) as tally:
                written = self.files.stat(path) is None
                if written:
                    self._make_room(tally, size)
                    self.files.rename(temporary, path)
                    tally.total += size
                else:
                    self.files.unlink(temporary)
            if written and self.spec.durable:
                self.files.fsync(self.directory)
        except OSError as error:
            with suppress(OSError):
                self.files.unlink(temporary)
            self._failed(error)
            return False
        self.failing = ""
        return written

    @property
    def names(self) -> list[str]:
        """Of the pages that were here at the last look at the directory, what was used last at the end."""
        return [entry.name for entry in self._oldest]

    @property
    def ready(self) -> bool:
        """It may be tried whether it takes a page."""
        return time.monotonic() >= self._resumes

    def lower(self, name: str) -> None:
        """A copy goes to the tier below, if there is one, unless it is there: used there when it was used here."""
        if self._below is not None and (entry := self.files.stat(self.directory / name)):
            if not self._below.has(name) and (data := self.load(name)):
                self._below.add(name, [data])
            self._below.touch(name, entry.used)

    def sink(self, until: float) -> None:
        """What is only here goes to the tier below, what was used last first, as long as there is room, and time
        (`time.monotonic()`)."""
        room = self._below.spec.limit if self._below else 0
        with suppress(OSError):
            for entry in sorted(self._pages(), key=lambda entry: -entry.used):
                room -= entry.size
                if room < 0 or time.monotonic() > until:
                    return
                self.lower(entry.name)

    def _make_room(self, tally: Tally, size: int) -> None:
        """Evict, the least recently used first, until `size` more bytes are within the limit.

        A list of the directory serves many evictions: whose time has not changed since is older than all that has come.
        """
        while tally.total + size > self.spec.limit:
            if not self._oldest:
                self._look(tally)
                continue
            entry = self._oldest.popleft()
            if self.files.stat(self.directory / entry.name) == entry:
                self._evict(entry)
                tally.total -= entry.size

    def _look(self, tally: Tally) -> None:
        pages = self._pages()
        tally.total = sum(entry.size for entry in pages)
        self._oldest = deque(sorted(pages, key=lambda entry: entry.used))

    def _pages(self) -> list[Entry]:
        return [entry for entry in self.files.list(self.directory) if _PAGE.fullmatch(entry.name)]

    def _evict(self, entry: Entry) -> None:
        self.lower(entry.name)
        self.files.unlink(self.directory / entry.name)
        self._gone.append(entry.name)

    def _begin(self) -> None:
        """At the start, and after whatever went wrong."""
        if self._open:
            return
        self.files.make(self.directory)
        self._clean()
        with self.files.lock(self._lock) as tally:
            self._look(tally)
        # Who made the directory, and those above it, may have died before this; where a page is, somebody has done it.
        for parent in self.directory.parents if self.spec.durable and not self._oldest else ():
            with suppress(OSError):  # another user's, who has made what is in it, or of a system that cannot
                self.files.fsync(parent)
        self._open = True

    def _clean(self) -> None:
        """What writers have left that are dead."""
        for entry in self.files.list(self.directory):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (not self.files.alive(int(match[1])) or time.time() - entry.used / 1e9 > ABANDONED):
                with suppress(OSError):
                    self.files.unlink(self.directory / entry.name)

    def _failed(self, error: OSError) -> None:
        self._open = False
        why = error.strerror or error
        self.failing = f"store: nothing is written to {self.directory} for now, what is there is read: {why}"
        self._resumes = time.monotonic() + RETRY

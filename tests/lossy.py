"""A file layer in memory that forgets what was not synced, fills up, and stops at any operation.

It is as unkind as POSIX allows: after a loss of power each name in a directory is, for itself, as it was synced or as
it was last, and bytes that were not synced are missing, zero or anything. With a directory goes all that is in it.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from minidisagg.store.files import Entry, Files, Tally


class Stop(BaseException):
    """The process ends here: nothing that catches errors may catch it."""


@dataclass
class Inode:
    """A file's bytes, and how they are on the disk."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None
    used: int = 0


class LossyFiles(Files):
    """`countdown` operations from now it stops, before the operation, after it, or in the middle of a write."""

    pid = 1

    def __init__(self, seed: int, volatile: Path) -> None:
        self.dice, self.volatile = random.Random(seed), volatile
        self.directories: dict[Path, bool] = {}  # those that were made, and whether their names are on the disk
        self.names: dict[Path, Inode] = {}
        self.synced: dict[Path, Inode] = {}
        self.tallies: dict[Path, int] = {}
        self.clock = time.time_ns()
        self.countdown = -1
        self.capacity, self.refusal = 1 << 40, errno.ENOSPC  # bytes of all files, and what is said beyond
        self.unlinked: set[str] = set()  # whoever wants to know empties it

    def kill(self) -> None:
        """The process is gone; the system lives on."""
        self.pid += 1
        self.countdown = -1

    def lose_power(self) -> None:
        """The system goes, too, and with it what is in memory or was not synced."""
        self.kill()
        lost = {path for path, synced in self.directories.items() if not synced and self.dice.random() < 0.5}
        self.directories = {path: True for path in self.directories if lost.isdisjoint((path, *path.parents))}
        names = {}
        for path in sorted(self.names.keys() | self.synced.keys()):
            inode = (self.names if self.dice.random() < 0.5 else self.synced).get(path)
            if inode is not None and path.parent in self.directories and path.parent != self.volatile:
                names[path] = inode
        for inode in names.values():
            if inode.synced != bytes(inode.data):
                self._lose(inode)
        self.names, self.synced = names, dict(names)
        for inode in names.values():
            inode.synced = bytes(inode.data)
        self.tallies = {path: self.dice.getrandbits(64) for path in self.tallies}

    def _lose(self, inode: Inode) -> None:
        size, kept = len(inode.data), self.dice.randint(0, len(inode.data))
        rest = self.dice.choice([b"", bytes(size - kept), self.dice.randbytes(size - kept)])
        inode.data = inode.data[:kept] + rest

    @contextmanager
    def _step(self) -> Iterator[None]:
        self.countdown -= 1
        if self.countdown == 0 and self.dice.random() < 0.5:
            raise Stop
        yield
        if self.countdown == 0:
            raise Stop

    def alive(self, pid: int) -> bool:
        return pid == self.pid

    def make(self, directory: Path) -> None:
        for path in reversed((directory, *directory.parents[:-1])):
            if path not in self.directories:
                with self._step():
                    self.directories[path] = False

    def list(self, directory: Path) -> list[Entry]:
        return [Entry(p.name, len(f.data), f.used) for p, f in self.names.items() if p.parent == directory]

    def stat(self, path: Path) -> Entry | None:
        inode = self.names.get(path)
        return Entry(path.name, len(inode.data), inode.used) if inode else None

    def write(self, path: Path, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        assert path not in self.names
        inode = self.names[path] = Inode()
        self.touch(path)
        for part in parts:
            self.countdown -= 1
            stops = self.countdown == 0
            inode.data += part[: self.dice.randint(0, len(part))] if stops else part
            if stops:
                raise Stop
            if sum(len(other.data) for other in self.names.values()) > self.capacity:
                del inode.data[-1:]
                raise OSError(self.refusal, os.strerror(self.refusal))

    def fsync(self, path: Path) -> None:
        with self._step():
            if path in self.names:
                self.names[path].synced = bytes(self.names[path].data)
            else:
                self.synced = {p: f for p, f in self.synced.items() if p.parent != path}
                self.synced |= {p: f for p, f in self.names.items() if p.parent == path}
                self.directories |= {one: True for one in self.directories if one.parent == path}

    def rename(self, path: Path, to: Path) -> None:
        with self._step():
            self.names[to] = self.names.pop(path)

    def unlink(self, path: Path) -> None:
        with self._step():
            self.unlinked.add(path.name)
            self.names.pop(path, None)

    def touch(self, path: Path, used: int = 0) -> None:
        self.clock += 1
        self._inode(path).used = used or self.clock

    def read(self, path: Path, buffers: Sequence[bytearray | memoryview]) -> int:
        data, first = self._inode(path).data, 0
        for buffer in buffers:
            part = data[first : first + len(buffer)]
            buffer[: len(part)] = part
            first += len(buffer)
        return len(data)

    @contextmanager
    def lock(self, path: Path) -> Iterator[Tally]:
        tally = Tally(self.tallies.get(path, 0))
        yield tally
        self.tallies[path] = tally.total

    def _inode(self, path: Path) -> Inode:
        if path not in self.names:
            raise FileNotFoundError(path)
        return self.names[path]

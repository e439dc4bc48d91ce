"""All that the store does to files, so that tests can put something in its place that forgets and fails.

Everything but `stat` raises `OSError`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PATIENCE = 5.0  # seconds that a lock is waited for: its owner may be stopped


class Entry(NamedTuple):
    """A file, its size in bytes, and when it was last used (nanoseconds)."""

    name: str
    size: int
    used: int


@dataclass
class Tally:
    """What a lock guards: the bytes in its directory, as the processes count them together."""

    total: int


class Files:
    """The operating system's."""

    @property
    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def alive(self, pid: int) -> bool:
        """Whether that process is there."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def make(self, directory: Path) -> None:
        """It is there afterwards; what people asked goes into it, so nobody else may look."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def list(self, directory: Path) -> list[Entry]:
        """In no order."""
        found = (self.stat(directory / name) for name in os.listdir(directory))
        return [entry for entry in found if entry]

    def stat(self, path: Path) -> Entry | None:
        """None where there is none that can be had."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        return Entry(path.name, status.st_size, status.st_mtime_ns)

    def write(self, path: Path, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """A new file of these parts."""
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            for part in parts:
                file.write(part)
        self.touch(path)

    def fsync(self, path: Path) -> None:
        """A file's bytes, or a directory's names, are on the disk afterwards."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, path: Path, to: Path) -> None:
        """In one step."""
        os.rename(path, to)

    def unlink(self, path: Path) -> None:
        """It is gone afterwards; whoever is reading it reads on."""
        path.unlink(missing_ok=True)

    def touch(self, path: Path, used: int = 0) -> None:
        """It was used then, or now, to the nanosecond: the kernel's own time stamps are some milliseconds coarse."""
        used = used or time.time_ns()
        os.utime(path, ns=(used, used))

    def read(self, path: Path, buffers: Sequence[bytearray | memoryview]) -> int:
        """Fill the buffers, one after another, from the beginning on; returns the file's size."""
        with open(path, "rb", buffering=0) as file:
            for buffer in buffers:
                file.readinto(buffer)
            return os.fstat(file.fileno()).st_size

    @contextmanager
    def lock(self, path: Path) -> Iterator[Tally]:
        """Nobody else on this host has it meanwhile; the file keeps the tally. A killed owner's lock is free."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._acquire(fd, path)
            tally = Tally(int.from_bytes(os.pread(fd, 8, 0), "little"))
            try:
                yield tally
            finally:
                os.pwrite(fd, max(0, tally.total).to_bytes(8, "little"), 0)
        finally:
            os.close(fd)

    def _acquire(self, fd: int, path: Path) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"{path} was locked for {PATIENCE:g} s") from None
            time.sleep(0.001)

"""What a worker is at work on, written down where its parent finds it when the worker has died.

Two notes for each process: the requests of the step that its device computes, and the one whose message its loop reads.
A note costs two system calls and outlives any death of the process, since what is written belongs to the kernel.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec

from minidisagg.core.plan import SeqKey

KINDS = ("step", "message")
_HEADER = 8  # bytes: the note's length, 0 while there is none


class Note:
    """One of a worker's two notes."""

    def __init__(self, run_dir: Path, worker: str, epoch: int, kind: str) -> None:
        self._file = os.open(_path(run_dir, worker, epoch, kind), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, requests: Iterable[SeqKey]) -> None:
        """From now on this is what the thread is at work on."""
        data = msgspec.msgpack.encode(list(requests))
        os.pwrite(self._file, len(data).to_bytes(_HEADER, "little") + data, 0)

    def clear(self) -> None:
        """It has come through."""
        os.pwrite(self._file, bytes(_HEADER), 0)


class StepNote(Note):
    """A device's: a GPU has several steps under way, which begin on one thread and end on another."""

    def __init__(self, run_dir: Path, worker: str, epoch: int, kind: str) -> None:
        super().__init__(run_dir, worker, epoch, kind)
        self._steps: dict[int, list[SeqKey]] = {}
        self._lock = threading.Lock()

    def begin(self, step_id: int, requests: list[SeqKey]) -> None:
        """This step is under way as well."""
        with self._lock:
            self._steps[step_id] = requests
            self.write(itertools.chain(*self._steps.values()))

    def end(self, step_id: int) -> None:
        """It has come through."""
        with self._lock:
            del self._steps[step_id]
            if self._steps:
                self.write(itertools.chain(*self._steps.values()))
            else:
                self.clear()


def read_notes(run_dir: Path, worker: str, epoch: int) -> set[SeqKey]:
    """What a dead process was at work on; empty if it was at work on nothing, or died while it wrote the note."""
    found: set[SeqKey] = set()
    for kind in KINDS:
        path = _path(run_dir, worker, epoch, kind)
        data = path.read_bytes() if path.exists() else b""
        size = int.from_bytes(data[:_HEADER], "little")
        if size and len(data) >= _HEADER + size:
            found.update(msgspec.msgpack.decode(data[_HEADER : _HEADER + size], type=list[SeqKey]))
    return found


def _path(run_dir: Path, worker: str, epoch: int, kind: str) -> Path:
    return run_dir / f"{worker}.{epoch}.{kind}"

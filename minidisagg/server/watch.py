"""`serve --watch`: a policy's file is taken again when it is saved, while requests run.

What is new is loaded and rehearsed in a process of its own first, which may fail, or never come back: `while
batch.waiting` in a `compose` would else stop the server. A file that does not pass changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from minidisagg.core.rehearsal import Workers
from minidisagg.policies import pinned
from minidisagg.runtime.frontend import Frontend

POLL = 0.5  # seconds; a file is read when it has stayed the same from one look to the next
LOOK = 0.05  # seconds between two looks at a rehearsal
PATIENCE = 15.0  # seconds for a process that gives up itself, with the line, after 10
Signature = tuple[int, int, int]  # time, size and number of a file


async def watch(frontend: Frontend, spec: str) -> None:
    """Until it is cancelled. `spec`: FILE.py:CLASS, with its settings, as the front end was started with it."""
    path, taken = Path(spec.partition(":")[0]), frontend.cluster.policy
    read: Signature | None = None
    known = _signature(path)
    while True:
        await asyncio.sleep(POLL)
        before, known = known, _signature(path)
        if known is None or known != before or known == read:  # gone for a moment, still being written, or read
            continue
        read = known
        try:
            source = pinned(spec)
            if source == taken:
                continue
            taken = source
            await check(source, frontend.roles)
            frontend.set_policy(source, rehearsed=True)
        except ValueError as error:
            frontend.tell(f"{spec} is not taken, what was there stays: {error}", logging.WARNING)


async def check(spec: str, workers: Workers) -> None:
    """Load and rehearse in another process. Raises `ValueError` in one line."""
    with _rehearsing(spec, workers) as (process, said):
        began = time.monotonic()
        while process.poll() is None:
            if time.monotonic() > began + PATIENCE:
                raise ValueError(f"a rehearsal of it does not end within {PATIENCE:.0f} s")
            await asyncio.sleep(LOOK)
        if process.returncode:
            said.seek(0)
            why = said.read().decode(errors="replace").strip()
            raise ValueError(why or f"it ends its process ({process.returncode})")


@contextmanager
def _rehearsing(spec: str, workers: Workers) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process that does, and what it says."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as said:
        asked.write(msgspec.json.encode((spec, workers)))
        asked.seek(0)
        with subprocess.Popen([sys.executable, "-m", "minidisagg.policies"], stdin=asked, stdout=said) as process:
            try:
                yield process, said
            finally:
                process.kill()


def _signature(path: Path) -> Signature | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

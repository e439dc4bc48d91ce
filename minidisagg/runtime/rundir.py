"""The directory of a front end's sockets, logs and notes, and who owns it, or another one of a front end's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

RUN_DIR, OWNER = "minidisagg-", "owner"


def make_run_dir() -> tuple[Path, int]:
    """A directory of mode 0700, and the lock that shows that its owner lives. Those of the dead are removed first.

    The path of a Unix socket has 107 bytes at most, so that a long $TMPDIR will not do.
    """
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 50 else "/tmp"
    sweep(Path(parent), RUN_DIR)
    made = Path(tempfile.mkdtemp(prefix=RUN_DIR, dir=parent))
    return made, own(made)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the directories of such names whose owner is dead."""
    for lock in parent.glob(f"{prefix}*/{OWNER}"):
        with contextlib.suppress(OSError):  # it lives, or is another user's
            os.close(_lock(lock))
            shutil.rmtree(lock.parent, True)


def own(directory: Path) -> int:
    """The lock that shows that the directory's owner lives. Raises `OSError`."""
    owner = _lock(directory / f"{OWNER}.new")
    (directory / f"{OWNER}.new").rename(directory / OWNER)  # locked before anybody can find it
    return owner


def _lock(path: Path) -> int:
    """The descriptor that holds the lock, which goes with its process. Raises `OSError` if somebody has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file

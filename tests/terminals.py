"""Commands in a pseudo-terminal, and what is then on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyte

ROOT = Path(__file__).parent.parent


class Terminal:
    """A command in a pseudo-terminal, under a shell that has exported its first size."""

    def __init__(self, command: Sequence[str], cwd: Path, width: int = 120, height: int = 40) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.screen, self.raw = pyte.Screen(width, height), b""
        self.stream = pyte.ByteStream(self.screen)
        self.resize(width, height, tell=False)
        env = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "COLUMNS": "60", "LINES": "18"}
        env["TMPDIR"] = str(cwd)  # what a killed one leaves goes with it
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=self.slave, stdout=self.slave, stderr=self.slave, cwd=cwd, env=env,
            start_new_session=True,
        )  # fmt: skip

    def resize(self, width: int, height: int, tell: bool = True) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.screen.resize(height, width)
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def read(self, seconds: float) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            data = os.read(self.master, 1 << 16)
            self.raw += data
            self.stream.feed(data)
            seconds = 0.0

    def press(self, keys: str, wanted: str = "") -> None:
        os.write(self.master, keys.encode())
        if wanted:
            self.wait(wanted)

    def wait(self, pattern: str, seconds: float = 60.0) -> None:
        """Until the screen shows it."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.text}"
            self.read(0.05)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def ended(self) -> int:
        """The exit code; the terminal must be as before."""
        end = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
            self.read(0.05)
        self.read(0.05)
        assert termios.tcgetattr(self.slave) == self.before
        assert self.raw.rfind(b"\x1b[?1049l") > self.raw.rfind(b"\x1b[?1049h") >= 0  # the alternate screen is left
        assert self.raw.rfind(b"\x1b[?25h") > self.raw.rfind(b"\x1b[?25l") >= 0  # the cursor is shown
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def terminal(
    *args: str | Path,
    cwd: Path,
    width: int = 120,
    height: int = 40,
    program: Sequence[str] = ("-m", "minidisagg", "monitor"),
) -> Iterator[Terminal]:
    opened = Terminal([*program, *map(str, args)], cwd, width, height)
    try:
        yield opened
    finally:
        opened.close()

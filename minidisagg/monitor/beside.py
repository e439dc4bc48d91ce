"""`minidisagg serve --monitor`: the server as a process of its own, and the monitor on this terminal."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from minidisagg.address import server_url
from minidisagg.monitor.app import MonitorOptions, run_monitor

START_TIMEOUT = 600.0  # seconds without a new line in the log: weights are downloaded and loaded
END_TIMEOUT = 20.0  # seconds for a server that was told to end
SERVING = re.compile(r"serving on http://\S+:(\d+)/v1")  # what it says once it listens


def serve_and_monitor(arguments: Sequence[str], host: str, options: MonitorOptions) -> None:
    """Run `minidisagg ARGUMENTS` (`serve --beside …`), watch it once it listens, and end it.

    Its address comes from its own log: whatever else listens on that port is never watched, nor killed with K. Raises
    `OSError` with the last line of that log where it does not come up, or ends before the monitor does.
    """
    with tempfile.NamedTemporaryFile("w+", prefix="minidisagg-serve-", suffix=".log") as file:
        log = Path(file.name)
        # SIGHUP ends the terminal's processes, which this one outlives by the time that its server takes to end.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGINT))
        # A session of its own: Ctrl-C is the monitor's, which then ends the server.
        server = subprocess.Popen(
            [sys.executable, "-m", "minidisagg", *arguments],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            port = _wait(server, log)
            name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            run_monitor(
                msgspec.structs.replace(
                    options,
                    url=server_url(name, port),
                    ended=lambda: "" if server.poll() is None else f"the server has ended, last: {_last_line(log)}",
                )
            )
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(END_TIMEOUT)
            server.kill()  # one that hangs


def _end_with_parent() -> None:
    """However this process ends: also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(server: subprocess.Popen[bytes], log: Path) -> str:
    """The port, once it listens; meanwhile, what it says."""
    before, since = "", time.monotonic()
    with Console(stderr=True).status("starting the server") as status:
        while server.poll() is None and time.monotonic() - since < START_TIMEOUT:
            text = log.read_text(errors="replace")
            if found := SERVING.search(text):
                return found[1]
            if text != before:
                before, since = text, time.monotonic()
                status.update(Text(f"starting the server: {_last_line(log)}"))
            time.sleep(0.05)
    silent = f"the server has said nothing for {START_TIMEOUT:g} s, last: " if server.poll() is None else ""
    raise OSError(silent + _last_line(log))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("minidisagg: error: ") if lines else "nothing"

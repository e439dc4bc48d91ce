"""`minidisagg serve --monitor`: the server as a process of its own, and the monitor on this terminal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from rich.console import Console

from minidisagg.monitor.app import MonitorOptions, run_monitor

OWN_FLAGS = ("--monitor", "--demo-load")


def serve_and_monitor(
    arguments: Sequence[str], host: str, port: int, api_keys: Sequence[str], demo_load: float | None
) -> None:
    """Start `minidisagg ARGUMENTS` without the monitor's flags, wait until it is healthy, watch it, and end it.

    Raises `OSError` with the last line of its log where it does not come up.
    """
    port = port or _free_port(host)
    command = [sys.executable, "-m", "minidisagg", *_without_own(arguments), "--port", str(port)]
    with tempfile.NamedTemporaryFile("w+", prefix="minidisagg-serve-", suffix=".log") as log:
        # A session of its own: Ctrl-C is the monitor's, which then ends the server.
        server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            _wait(server, url, log.name)
            run_monitor(MonitorOptions(url=url, api_key=api_keys[0] if api_keys else "", demo_load=demo_load))
        finally:
            server.terminate()
            if server.poll() is None:
                time.sleep(0.1)
                server.terminate()  # the second does not wait for the requests that run
            server.wait()


def _without_own(arguments: Sequence[str]) -> list[str]:
    """The command line less what is not the server's; its own --port follows, and the last one counts."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in OWN_FLAGS:
            kept.append(argument)
        skip = argument == "--demo-load"
    return kept


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], url: str, log: str) -> None:
    with Console(stderr=True).status("starting the server"):
        while server.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = file.read().strip().splitlines()
    raise OSError(lines[-1].removeprefix("minidisagg: error: ") if lines else f"the server ended with {os.EX_SOFTWARE}")

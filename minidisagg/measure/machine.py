"""Where and how a run was made: the command and the machine, as far as they can be told without a library."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SECRET = "--api-key"


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as it could be typed again, without the key of a server."""
    shown = [Path(sys.argv[0]).name, *sys.argv[1:]] if argv is None else list(argv)
    for i, word in enumerate(shown):
        if word.startswith(f"{SECRET}="):
            shown[i] = f"{SECRET}=..."
        elif i and shown[i - 1] == SECRET:
            shown[i] = "..."
    return shlex.join(shown)


def machine() -> dict[str, object]:
    """CPU, cores this process may use, memory, system and versions; what is not known is left out."""
    found: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": platform.machine()}
    lines = _lines("/proc/cpuinfo")
    if name := next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""):
        found["cpu"] = name
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    found["cores"] = len(affinity(0)) if affinity else os.cpu_count()
    if kib := next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), ""):
        found["memory_GiB"] = round(int(kib) / 2**20, 1)
    found["system"] = platform.platform()
    found["python"] = platform.python_version()
    for package in ("minidisagg", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a source tree
    return found


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(errors="replace").splitlines() if file.exists() else []

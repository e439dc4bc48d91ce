"""Where and how a run was made: command, machine and code, as far as the standard library and git can tell."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as it could be typed again, without the key of a server."""
    words = list(sys.argv if argv is None else argv)
    name = Path(words[0]).name
    script = ["python", words[0]] if name.endswith(".py") else [name]
    words[:1] = ["python", "-m", "minidisagg"] if name == "__main__.py" else script
    for i, word in enumerate(words):
        if word.startswith("--api-key="):
            words[i] = "--api-key=..."
        elif i and words[i - 1] == "--api-key":
            words[i] = "..."
    return shlex.join(words)


def machine() -> dict[str, object]:
    """Time, CPU, cores that this process may use, memory, system, versions, commit; what is not known is left out."""
    cpu = _field("/proc/cpuinfo", "model name") or platform.machine()
    memory = _field("/proc/meminfo", "MemTotal").removesuffix(" kB")
    found: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": cpu, "cores": cores()}
    found |= {"memory": f"{int(memory) / 2**20:.1f} GiB"} if memory else {}
    found |= {"system": platform.platform(), "python": platform.python_version()}
    for package in ("minidisagg", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a source tree
    return found | commit()


def commit(package: Path = PACKAGE) -> dict[str, object]:
    """`commit`, and `dirty`: whether the tree differs from it. Empty where the package is not from a git tree.

    That it lies in one is not enough: a virtual environment may lie in the tree of another project.
    """
    if not _git(package, "ls-files", "__init__.py"):
        return {}
    changed = _git(package, "status", "--porcelain", "--untracked-files=normal", ".", "../pyproject.toml")
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": bool(changed)}


def _git(where: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(where), *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # there is no git
    return done.stdout.strip()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _field(path: str, name: str) -> str:
    """The first value of `name` in a file of `name: value` lines; empty where there is none, as outside of Linux."""
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

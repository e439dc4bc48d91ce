"""A worker's process: what it is pinned to, whom it dies with, and the loop that it runs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys

import msgspec
import torch

from minidisagg.config import WorkerConfig, parse_cpus
from minidisagg.runtime.faults import DelayedWorker


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    """`python -m minidisagg.runtime.process CONFIG`, where CONFIG is a `WorkerConfig` as JSON."""
    _die_with_parent()
    config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle
    if config.settings.device == "cpu":
        cpus = parse_cpus(config.settings.cpus)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)
        torch.set_num_threads(len(cpus))
    runner: contextlib.AbstractContextManager[asyncio.Runner]
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:  # it has no build for this platform
        runner = asyncio.Runner()
    with runner as active:
        failure = active.run(_serve(config))
    # Daemon threads may still block in a link; nothing that matters is left to do.
    os._exit(1 if failure else 0)


async def _serve(config: WorkerConfig) -> str:
    worker = DelayedWorker(config)
    try:
        await worker.run()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return str(error)
    return worker.failure


if __name__ == "__main__":
    main()

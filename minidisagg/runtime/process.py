"""A worker's process: whom it dies with, what it is pinned to, and the loop that it runs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from typing import NoReturn

import msgspec
import torch

from minidisagg.config import WorkerConfig, parse_cpus
from minidisagg.runtime.faults import DelayedWorker

CUDA_HOST_THREADS = 4  # of torch, beside a GPU that computes


def main(text: str, parent: int) -> NoReturn:
    """`text`: a `WorkerConfig` as JSON; `parent`: the process whose death is this one's. Does not return."""
    config = msgspec.json.decode(text, type=WorkerConfig)
    _die_with(parent)
    _call_itself(config.name)
    if config.settings.device == "cpu":
        cpus = parse_cpus(config.settings.cpus)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)
        torch.set_num_threads(len(cpus))
    else:
        torch.set_num_threads(CUDA_HOST_THREADS)
        if config.settings.sms:  # CUDA reads it when it is first used
            os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = config.settings.sms.removesuffix("%")
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


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before this was said
        os._exit(1)


def _call_itself(name: str) -> None:
    """What `top` and `ps -o comm` show, cut to 15 bytes: the command line is the fork server's."""
    if sys.platform == "linux":
        pr_set_name = 15
        ctypes.CDLL(None).prctl(pr_set_name, name.encode())


async def _serve(config: WorkerConfig) -> str:
    worker = DelayedWorker(config)
    try:
        await worker.run()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return str(error)
    return worker.failure

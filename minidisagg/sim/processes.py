"""Runs side by side, each in a process: what is simulated does not depend on where."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context


def side_by_side(work: Callable[[bytes], bytes], tasks: Iterable[bytes], jobs: int) -> Iterator[tuple[int, bytes]]:
    """The number and the answer of each task, as they end. Raises what `work` raises."""
    quiet = signal.SIGINT, signal.SIG_DFL  # a terminal's Ctrl-C goes to all: these have nothing to say on it
    with ProcessPoolExecutor(jobs, get_context("forkserver"), signal.signal, quiet) as pool:
        numbers = {pool.submit(work, task): number for number, task in enumerate(tasks)}
        try:
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

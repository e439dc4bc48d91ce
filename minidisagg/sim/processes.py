"""Runs side by side, each in a process: what is simulated does not depend on where."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed


def side_by_side(work: Callable[[bytes], bytes], tasks: Iterable[bytes], jobs: int) -> Iterator[tuple[int, bytes]]:
    """The number and the answer of each task, as they end. Raises what `work` raises.

    Whoever stops half-way, by a signal or an error, waits for nobody: the processes are killed.
    """
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("forkserver"), _begin) as pool:
        try:
            numbers = {pool.submit(work, task): number for number, task in enumerate(tasks)}
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def _begin() -> None:
    """In each process: it ends with a terminal's Ctrl-C, which goes to all and is told by one, and with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # one that is killed closes no pool, and its workers would wait for tasks for ever
    os._exit(1)

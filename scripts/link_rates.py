"""What each kind of link moves on this machine: GB/s of one large piece between two processes, and what it costs.

    python scripts/link_rates.py
    python scripts/link_rates.py --kinds shm,unix --repeats 50

A piece of 64 MB, all pages consecutive (runs) or none (scattered, of 64 KiB each). Prints the best of the repetitions
and their median, beside a plain copy of as many bytes in one process, and the CPU time of both ends for a piece.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from linkpair import KINDS, LARGE, Pair

PAGES = LARGE[2]
ORDERS = {  # source pages, destination pages
    "runs": (list(range(PAGES)), list(range(PAGES))),
    "scattered": ([*range(0, PAGES, 2), *range(1, PAGES, 2)], list(range(PAGES))[::-1]),
}


def copy_seconds(repeats: int) -> list[float]:
    """A plain copy of such a cache."""
    source, target = torch.randn(LARGE), torch.empty(LARGE)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return seconds


def cpu_seconds(pid: int) -> float:
    """Used so far by a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(kind: str, repeats: int, run_dir: Path) -> None:
    """One kind of link, with both orders of pages."""
    pair = Pair(kind, run_dir, shape=LARGE)
    pair.connect()
    seq = 0
    for name, (source, target) in ORDERS.items():
        seconds = []
        cpu = time.process_time() + cpu_seconds(pair.child.pid or 0)
        for _ in range(repeats):
            began = time.perf_counter()
            (done,) = pair.move([(source, target, (0, LARGE[0]))], seq)
            seconds.append(time.perf_counter() - began)
            seq += 1
            if not done.ok:
                raise RuntimeError(done.error)
        cpu = time.process_time() + cpu_seconds(pair.child.pid or 0) - cpu
        show(f"{kind}, {name}", pair.kv.nbytes, seconds, f"{1e3 * cpu / repeats:6.1f} ms of CPU")
    pair.close()


def show(what: str, nbytes: int, seconds: list[float], more: str = "") -> None:
    best, median = nbytes / min(seconds) / 1e9, nbytes / statistics.median(seconds) / 1e9
    sys.stdout.write(f"{what:18s} best {best:6.2f}, median {median:6.2f} GB/s  {more}\n")
    sys.stdout.flush()


def main() -> None:
    """Prints a line for each."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    show("plain copy", 4 * torch.Size(LARGE).numel(), copy_seconds(arguments.repeats))
    for kind in arguments.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(kind, arguments.repeats, Path(folder))


if __name__ == "__main__":
    main()

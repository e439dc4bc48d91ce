"""How long does a simulation of many workers take, and does it grow in proportion to what is simulated?

    python scripts/scale_sim.py                                        # 1,000 workers, 200,000 requests: a quarter hour
    python scripts/scale_sim.py --workers 50 --requests 5000           # seconds
    python scripts/scale_sim.py --growth --out scale.json              # a quarter, half and all of the requests

Half of the workers prefill and half decode, an H100 with 8B each; requests are like `azure-code-2023`, as many a second
for each worker at all sizes. Each size has a process of its own: its peak memory is nobody else's. `--growth` prints
what a request has taken at each size: as much at all of them is linear growth.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
from msgspec import Struct, to_builtins
from rich import box
from rich.console import Console
from rich.table import Table

from minidisagg.measure.machine import command_line, machine
from minidisagg.sim.simulate import simulate
from minidisagg.workload.lengths import at_rate
from minidisagg.workload.synth import synth_items

SHARES = 4, 2, 1  # of the requests, with --growth: one in so many
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


class Size(Struct, frozen=True):
    """One simulation to be."""

    workers: int
    requests: int
    rate: float  # requests per second of all workers
    policy: str
    seed: int


class Taken(Struct, frozen=True):
    """What it took."""

    workers: int
    requests: int
    events: int
    steps: int
    simulated_s: float
    seconds: float  # of CPU: what else the machine does is not in them
    peak_bytes: int  # of its process

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds


def measure(size: Size) -> Taken:
    """Carry it out, in this process."""
    items = at_rate(synth_items("azure-code-2023", size.requests, size.seed), size.rate, seed=size.seed)
    half, began = size.workers // 2, time.process_time()
    result = simulate(size.policy, items, f"prefill={size.workers - half}@h100,decode={half}@h100")
    took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
    return Taken(
        size.workers, size.requests, result.events, result.steps, result.run.wall_s, took, peak
    )  # fmt: skip


def table_of(found: list[Taken]) -> Table:
    """A row per size."""
    table = Table(title=f"{found[0].workers:,} workers", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("requests", "events", "steps", "seconds", "events/s", "peak GB", "ms/request"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.requests:,}", f"{one.events:,}", f"{one.steps:,}", f"{one.seconds:.1f}",
            f"{one.events_per_second:,.0f}", f"{one.peak_bytes / 1e9:.2f}", f"{one.seconds / one.requests * 1e3:.2f}",
        )  # fmt: skip
    return table


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--workers", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--requests", type=click.IntRange(min=100), default=200_000, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=7.7, show_default=True,
              help="Requests per second for each worker.")  # fmt: skip
@click.option("--policy", default="fcfs", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--growth", is_flag=True, help="A quarter and half of the requests, too.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="JSON of what is printed.")
def main(workers: int, requests: int, rate: float, policy: str, seed: int, growth: bool, out: Path | None) -> None:
    counts = [requests // share for share in (SHARES if growth else SHARES[-1:])]
    sizes = [Size(workers, count, rate * workers, policy, seed) for count in counts]
    console, found = Console(), list[Taken]()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone:
        for one in alone.map(measure, sizes):
            console.print(f"{one.requests:,} requests: {one.seconds:.1f} s", style="dim", highlight=False)
            found.append(one)
    console.print(table_of(found))
    if out is not None:
        rows = [to_builtins(one) | {"events_per_second": round(one.events_per_second)} for one in found]
        made = {"command": command_line(), **machine()}
        out.write_text(json.dumps({"made": made, "sizes": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

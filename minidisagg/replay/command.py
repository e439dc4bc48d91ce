"""The command line of `minidisagg replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minidisagg.options import FiniteRange


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR")
@click.option("--run", default="", metavar="NAME", help="Which of several recorded runs.  [default: the last one]")
@click.option("--worker", default="", metavar="NAME", help="Begin there; of lines, those of this worker or the router.")
@click.option(
    "--at", type=FiniteRange(min=0), metavar="SECONDS", help="Begin there; of lines, each worker's step then."
)
@click.option("--ask", default="", metavar="NAME[:KEY=VAL,…]", help="Ask this policy, too: a name, or FILE.py:CLASS.")
@click.option("--plain", is_flag=True, help="Lines in place of the screen, as where stdout is no terminal.")
def replay(**flags: Any) -> None:
    """Step through a recorded run, and ask another policy what it would have done.

    \b
    minidisagg bench --mode both --record           # leaves its inputs in the run directory; so does simulate
    minidisagg replay bench-results/20250101-120000
    minidisagg replay DIR --ask ./mine.py:Mine      # n, p: to the decisions that it would have made differently
    minidisagg replay DIR --plain --worker decode-0 --at 1.5

    The production core gets the recorded inputs once more, under the recorded policy, and plans the same steps. With
    --ask, each hook of the other policy is asked wherever the recorded one is, about the same state, and its answer
    changes nothing. So it never sees the state that its own decisions would have led to: where many differ, run it.

    What is not asked: whether there is anything to decide. `accept` and `evict` are asked where the recorded run came
    to them; `order` where a request comes into a queue (steps are composed from queues in the other policy's own
    order); of equal steps that a simulation computed at once, the first. What is in caches and on links, and what
    steps have cost, is as recorded. A policy that keeps accounts of its own answers counts what was never done.
    """
    from minidisagg.replay.app import ReplayOptions, run_replay

    run_replay(ReplayOptions(**flags))

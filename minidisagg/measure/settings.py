"""How often is measured, what is looked for, and where the results go: for `bench` and `simulate` alike."""

from __future__ import annotations

import math

from msgspec import Struct

from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import TRIM

IN_RUN = "<the run directory>"  # what --record says without a value


class Trials(Struct, frozen=True, kw_only=True):
    """How often, and what is looked for. `planted`: each step of side B is slowed down by this share of its time."""

    repeats: int = 3
    find_goodput: bool = False
    slo: SLO | None = None
    preset: str = ""
    planted: float = 0.0


class ReportSettings(Struct, frozen=True, kw_only=True):
    """Where the results go. A dry run only says what would be done; `json` puts result.json on stdout, not a table.

    `name`: of the run's own directory in `directory`; empty: the time.
    """

    directory: str
    name: str = ""
    json: bool = False
    dry_run: bool = False


def check_measurable(prompts: int, warmups: int, at_once: bool) -> None:
    """Raises ValueError where warm-up and drain leave nothing of a run (see `stats.window_of`)."""
    cut = 0 if at_once else math.ceil(TRIM * prompts)
    if max(warmups, cut) >= prompts - cut:
        drain = f", and {cut} at the end left out" if cut else ""
        raise ValueError(
            f"--num-prompts {prompts} with --num-warmups {warmups} of them{drain}: nothing is left to measure"
        )

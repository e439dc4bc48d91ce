"""Whether another policy would have decided anything differently in runs that were recorded."""

from __future__ import annotations

from pathlib import Path

from minidisagg.policies import shown
from minidisagg.replay.records import find_records
from minidisagg.replay.steps import Run


def decided_alike(directory: Path, policy: str, other: str) -> bool:
    """Of all that `policy` decided in the runs recorded there, the other one would have decided nothing differently.

    What it would decide next hangs on nothing but the state, which is then the same: it would have made the same run.
    Raises `ValueError` and `OSError` where nothing is recorded, or a policy cannot be loaded.
    """
    asked = 0
    for record in find_records(directory):
        run = Run(record, other)
        if run.policies == [shown(policy)]:  # not the calibration's
            tallies = run.notes.tallies.values()
            asked += sum(tally.asked for tally in tallies)
            if any(tally.differ for tally in tallies):
                return False
    return asked > 0

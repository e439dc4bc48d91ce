"""Suspects of a crash on one worker share steps with their own cohort only: a step that fails accuses nobody else."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

from minidisagg.core.request import Request


class Cohorts(Counter[int]):
    """How many requests of each are here; 0 is the cohort of all who are trusted, and is not counted."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        super().__init__(counts or {})
        self.last = 0  # whose turn the last step was

    def suspect(self, request: Request) -> None:
        """A request is here."""
        if request.cohort:
            self[request.cohort] += 1

    def trust(self, request: Request) -> None:
        """It has survived a step of decode, or has left: its cohort is one less."""
        if request.cohort:
            self[request.cohort] -= 1
            if not self[request.cohort]:
                del self[request.cohort]
            request.cohort = 0

    def turns(self, requests: Iterable[Request]) -> list[int]:
        """Those that have work, beginning after the one whose turn it was."""
        if not self:
            return [0]
        cohorts = sorted({request.cohort for request in requests})
        after = bisect.bisect_right(cohorts, self.last)
        return (cohorts[after:] + cohorts[:after]) or [0]

"""Time that its owner has lived through.

A process that is stopped (a debugger, a suspended laptop, a disk that does not answer) finds afterwards that all others
have been silent for long. It has not listened, so that silence says nothing: patience is counted in time that passed
while its owner ran.
"""

from __future__ import annotations

STRIDE = 1.0  # seconds that can pass from one input to the next; whoever runs has a tick four times a second


class LivedTime:
    """Seconds, from 0 on."""

    def __init__(self) -> None:
        self._lived = self._last = 0.0
        self._begun = False

    def at(self, now: float) -> float:
        """The lived time at `now`, which is the time of an input."""
        if self._begun:
            self._lived += min(max(0.0, now - self._last), STRIDE)
        self._begun, self._last = True, now
        return self._lived

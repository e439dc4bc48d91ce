"""Time that its owner has lived through.

A process that is stopped (a debugger, a suspended laptop, a disk that does not answer) finds afterwards that all others
have been silent for long. It has not listened, so that silence says nothing: patience is counted in time that passed
while its owner ran.
"""

from __future__ import annotations

from dataclasses import dataclass

from minidisagg.core.messages import Stats

STRIDE = 1.0  # seconds that can pass from one input to the next; whoever runs has a tick four times a second


class LivedTime:
    """Seconds, from 0 on."""

    def __init__(self) -> None:
        self._lived = self._last = 0.0
        self._begun = False

    def at(self, now: float) -> float:
        """The lived time at `now`, which is the time of an input."""
        passed = now - self._last
        if passed > 0.0 and self._begun:
            self._lived += passed if passed < STRIDE else STRIDE
        self._begun, self._last = True, now
        return self._lived


@dataclass
class Heartbeat:
    """What the router knows of a worker's liveness, in time that the router itself has lived through."""

    heard_at: float
    steps: int = 0
    stepped_at: float = 0.0
    busy: bool = False

    def on_stats(self, stats: Stats, lived: float) -> None:
        """What waits for pages makes no steps, and is not stuck."""
        self.busy = stats.flying > 0
        if stats.steps != self.steps or not self.busy:
            self.steps, self.stepped_at = stats.steps, lived

    def stands_still(self, lived: float, seconds: float) -> bool:
        """Its step takes longer than this."""
        return self.busy and lived - self.stepped_at > seconds

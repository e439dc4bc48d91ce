"""An interconnect that is not there, around the link that is: to see on one machine when a handoff pays.

Pieces move on the real link at once. The emulated interconnect says when they count: a piece is complete, at either
end, at the later of its real end and its emulated arrival. So emulated time includes the real copy, and a real link
that is the slower of the two shows (`LinkStats.late`). A worker has one emulated NIC, which all links that leave it
share. Of two-sided links the trailer tells the destination the arrival; a one-sided one's piece is announced when the
source has completed it. What is not emulated: the way of control messages, and a NIC's bandwidth for what comes in.

Imports no torch: the command line reads interconnects too.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from minidisagg.core.inputs import PieceDone
from minidisagg.interconnect import PRESETS, Interconnect, parse_interconnect

COPY_BYTES = 32 << 20  # more than most caches hold


def announcement(text: str, interconnect: Interconnect) -> str:
    """One line for whoever starts an emulation, with what this host cannot show."""
    line = f"emulated {text} ({interconnect}{'; nominal' if text in PRESETS else ''})"
    host = copy_rate()
    if host < interconnect.bandwidth:
        line += f": this host copies memory at {host / 1e9:.1f} GB/s, so what is faster than that is not seen"
    return line


def copy_rate() -> float:
    """Bytes per second at which this process copies memory, at best: no link here is faster. Takes a few hundredths."""
    source, target = bytearray(b"\1") * COPY_BYTES, memoryview(bytearray(COPY_BYTES))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - began)
    return COPY_BYTES / best


class Slot(NamedTuple):
    """A piece's time on the emulated wire, of `time.monotonic()`; all processes of a host share that clock."""

    begins: float = 0.0
    arrives: float = 0.0


class Nic:
    """A worker's emulated network card. Pieces take turns on it, and each arrives a latency after its last byte."""

    def __init__(self, interconnect: Interconnect, seed: int = 0) -> None:
        self.interconnect = interconnect
        self._free = 0.0  # when the card has sent all that it was given
        self._dice = random.Random(seed)
        self._lock = threading.Lock()

    def admit(self, nbytes: int) -> Slot:
        """The time of a piece that is started now."""
        wire = self.interconnect
        with self._lock:
            begins = max(time.monotonic(), self._free)
            self._free = begins + nbytes / wire.bandwidth
            return Slot(begins, self._free + wire.latency + self._dice.uniform(0.0, wire.jitter))


def make_nic(text: str) -> Nic | None:
    """The card of a worker whose links are as `parse_interconnect` reads; None where nothing is emulated."""
    interconnect = parse_interconnect(text)
    return None if interconnect is None else Nic(interconnect)


class DelayLine:
    """Hands completions on in order, none before its time. A thread: an event loop's timers count milliseconds."""

    def __init__(self, deliver: Callable[[PieceDone], None]) -> None:
        self._deliver = deliver
        self._held: queue.SimpleQueue[tuple[PieceDone, float] | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="emulated-wire", daemon=True)
        self._thread.start()

    def put(self, done: PieceDone, arrives: float) -> None:
        """Hand it on at that time, and after all before it."""
        self._held.put((done, arrives))

    def finish(self) -> None:
        """Hand on at once all that is held, and end; whoever puts must have stopped."""
        self._hurry.set()
        self._held.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (held := self._held.get()) is not None:
            done, arrives = held
            if (early := arrives - time.monotonic()) > 0:
                self._hurry.wait(early)
            self._deliver(done)

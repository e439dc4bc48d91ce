"""A slower link than the one at hand, to draw "when does it pay" curves.

Only the source's end is wrapped. Each piece takes its turn on an emulated wire of a given bandwidth, travels for
the latency and a jitter, and is then started on the real link, which adds its own (small) time. Order is kept.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque

import msgspec

from minidisagg.core.inputs import PieceDone
from minidisagg.core.plan import Piece
from minidisagg.transfer.links import ThreadLink


class Emulation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The wire's properties."""

    bandwidth: float = 0.0  # bytes per second; 0: as fast as the real link
    latency: float = 0.0  # seconds
    jitter: float = 0.0  # seconds: uniform in [0, jitter] on top
    seed: int = 0


class EmulatedLink:
    """A `Link` around another one's source end."""

    def __init__(self, inner: ThreadLink, emulation: Emulation) -> None:
        self.one_sided = inner.one_sided
        self._inner, self._emulation = inner, emulation
        self._wire_free = 0.0  # when the emulated wire has taken all that was started
        self._arrival = 0.0  # of the last piece
        self._held: deque[tuple[float, Piece]] = deque()
        self._added: dict[int, float] = {}  # sequence number -> seconds on the emulated wire
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._release, name="emulated-wire", daemon=True)
        self._thread.start()

    def endpoint(self) -> str:
        """See `Link.endpoint`."""
        return self._inner.endpoint()

    def connect(self, endpoint: str) -> None:
        """See `Link.connect`."""
        self._inner.connect(endpoint)

    def start(self, piece: Piece) -> None:
        """Put the piece on the emulated wire."""
        wire, now = self._emulation, time.monotonic()
        dice = random.Random(f"{wire.seed}/{piece.link_epoch}/{piece.seq}")
        travel = wire.latency + dice.uniform(0.0, wire.jitter)
        sending = self._inner.wire_bytes(piece) / wire.bandwidth if wire.bandwidth else 0.0
        with self._changed:
            self._wire_free = max(now, self._wire_free) + sending
            self._arrival = max(self._arrival, self._wire_free + travel)
            self._added[piece.seq] = sending + travel
            self._held.append((self._arrival, piece))
            self._changed.notify()

    def poll(self) -> list[PieceDone]:
        """See `Link.poll`; `seconds` includes the time on the emulated wire."""
        done = self._inner.poll()
        return [msgspec.structs.replace(c, seconds=c.seconds + self._added.pop(c.seq, 0.0)) for c in done]

    def abort(self, peer_dead: bool) -> bool:
        """See `Link.abort`; what is still on the emulated wire completes as failed."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        stopped = self._inner.abort(peer_dead)
        while self._held:
            self._inner.start(self._held.popleft()[1])
        return stopped

    def _release(self) -> None:
        """Start each piece on the real link when it arrives."""
        with self._changed:
            while not self._closing:
                if not self._held:
                    self._changed.wait()
                elif (early := self._held[0][0] - time.monotonic()) > 0:
                    self._changed.wait(early)
                else:
                    self._inner.start(self._held.popleft()[1])

"""What an experiment or a test does to a worker and its links on purpose; they know nothing of it.

Injected delays make a stage of each request longer (`DelayedWorker`); `FaultyLink` loses and damages pieces.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from msgspec import Struct
from msgspec.structs import replace
from torch import Tensor

from minidisagg.core.inputs import PieceDone
from minidisagg.core.messages import Envelope, Submit
from minidisagg.core.plan import Piece
from minidisagg.runtime.device import Step, StepResult
from minidisagg.runtime.linkset import LinkHooks, LinkSet
from minidisagg.runtime.worker import Worker
from minidisagg.transfer.codec import Codec
from minidisagg.transfer.links import Link, LinkHost, ThreadLink
from minidisagg.transfer.rows import Block, Checksum

Later = Callable[[float, Callable[[], None]], object]  # a loop's `call_later`


class DelayedWorker(Worker):
    """Adds to each request the `RunSettings.delays` of its stages, in seconds, and to each step its `slowdown`.

    Every worker is one, as the run that comes next may have some.
    """

    @property
    def delays(self) -> dict[str, float]:
        """Of the run that this epoch is for."""
        return self.config.run.delays

    def _make_links(self) -> None:
        delay = self.delays.get("transfer", 0.0)
        self.make_links = partial(LateLinks, delay) if delay else LinkSet
        super()._make_links()

    def _on_message(self, envelope: Envelope) -> None:
        if isinstance(envelope.body, Submit) and "queue" in self.delays:
            self.loop.call_later(self.delays["queue"], super()._on_message, envelope)
        else:
            super()._on_message(envelope)

    def _carry_on(self) -> None:
        """Between a request's KV being complete and its first decode step nothing is planned."""
        now, delay = self.now(), self.delays.get("decode_wait", 0.0)
        for request in self.core.scheduler.running if delay else ():
            left = request.ready_at + delay - now
            if request.ready_at >= 0 and not request.introduced and left > 0:
                self._drain()
                self.loop.call_later(left, self._advance)
                return
        super()._carry_on()

    def _computed(self, step: Step, result: StepResult) -> StepResult:
        slowdown = self.config.run.slowdown
        delay = slowdown * result.seconds
        if slowdown:
            result = dataclasses.replace(result, seconds=result.seconds + delay)
        for item in step.plan.items if self.delays else ():
            if item.sample and item.index == 0:
                delay = max(delay, self.delays.get("prefill", 0.0))
            elif item.index == 2:  # the second decode step: the first one's time is told apart from waiting for it
                delay = max(delay, self.delays.get("decode", 0.0))
        if delay:
            time.sleep(delay)
        return result


class LateLinks(LinkSet):
    """Links whose pieces start `delay` seconds late."""

    def __init__(self, delay: float, name: str, host: LinkHost, hooks: LinkHooks) -> None:
        super().__init__(name, host, hooks)
        self._delay = delay

    def _make(self, peer: str, link_epoch: int, source: bool) -> Link:
        link = super()._make(peer, link_epoch, source)
        return LateLink(link, self._delay, self.loop.call_later) if source else link


class LateLink:
    """A source's end that hears of each piece `delay` seconds late, which makes the transfer stage so much longer."""

    def __init__(self, inner: Link, delay: float, later: Later) -> None:
        self.one_sided = inner.one_sided
        self.endpoint, self.connect, self.poll = inner.endpoint, inner.connect, inner.poll
        self._inner, self._delay, self._later = inner, delay, later
        self._held: deque[Piece] = deque()

    def start(self, piece: Piece) -> None:
        """Start it when its time has come."""
        self._held.append(piece)
        self._later(self._delay, self._start_next)

    def abort(self, peer_dead: bool) -> bool:
        """Give the inner link up; what has not started completes as failed."""
        stopped = self._inner.abort(peer_dead)
        while self._held:
            self._start_next()
        return stopped

    def _start_next(self) -> None:
        with suppress(IndexError):  # the abort, in a thread of its own, has been faster
            self._inner.start(self._held.popleft())


class Faults(Struct, frozen=True, kw_only=True):
    """The share of pieces that suffer; which ones is decided by the seed, the link's epoch and the sequence number."""

    drop: float = 0.0  # never sent, though the source believes so
    corrupt: float = 0.0  # arrives with a wrong bit
    seed: int = 0


class FaultyLink:
    """A source's end that loses and damages pieces."""

    def __init__(self, inner: ThreadLink, faults: Faults) -> None:
        self.one_sided = inner.one_sided
        self.endpoint, self.connect, self.abort = inner.endpoint, inner.connect, inner.abort
        inner.codecs |= {f"damaged {name}": Damaged(codec) for name, codec in inner.codecs.items()}
        self._inner, self._faults = inner, faults
        self._dropped: list[PieceDone] = []

    def start(self, piece: Piece) -> None:
        """Throw the dice for it."""
        dice = random.Random(f"{self._faults.seed}/{piece.link_epoch}/{piece.seq}")
        drop, corrupt = dice.random() < self._faults.drop, dice.random() < self._faults.corrupt
        if drop:
            self._dropped.append(PieceDone(piece.peer, piece.link_epoch, piece.seq, send=True, ok=True))
            self._inner.setup.wake()
        else:
            self._inner.start(replace(piece, codec=f"damaged {piece.codec}") if corrupt else piece)

    def poll(self) -> list[PieceDone]:
        """What the inner link has completed, and what was dropped."""
        dropped, self._dropped = self._dropped, []
        return dropped + self._inner.poll()


class Damaged(Codec):
    """Another codec, with a wrong bit on the wire that the checksum knows nothing of."""

    def __init__(self, inner: Codec) -> None:
        self.row_bytes, self.word, self.in_place = inner.row_bytes, inner.word, inner.in_place
        self._inner = inner

    def encode(self, rows: Tensor, out: Tensor) -> Tensor:
        """As the inner codec."""
        return self._inner.encode(rows, out)

    def decode(self, wire: Tensor, rows: Tensor) -> None:
        """As the inner codec."""
        self._inner.decode(wire, rows)

    def pack(self, checksum: Checksum, part: Block, rows: Tensor, out: Tensor) -> Tensor:
        """What is the cache's own is damaged in a copy."""
        wire = self._inner.pack(checksum, part, rows, out)
        if self.in_place:
            wire = wire.clone(memory_format=torch.contiguous_format)
        wire[0, 0, 0, 0] ^= 1
        return wire

"""What links between GPUs' caches have in common: a side stream, pieces in flight, and pages copied by one kernel.

A piece is given to the card and forgotten until its event has fired; the thread looks at the events, and sleeps in
between, so that it takes no time from the interpreter. A wait for the peer that runs out ends the link, as everywhere.

Checksums would read all bytes once more, and are off here unless asked for (`LinkHost.checksums`).
"""

from __future__ import annotations

import queue
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidisagg.core.plan import Piece
from minidisagg.transfer.emulate import Slot
from minidisagg.transfer.kernels import copy_rows
from minidisagg.transfer.links import Carried, CorruptError, LinkError, LinkSetup, ThreadLink

POLL = 50e-6  # seconds between two looks at the events
LISTS = 64  # of page numbers that are on their way
PROGRAMS = 64  # of a copy kernel: half of the multiprocessors keep NVLink busy, and leave room for what computes

Finish = Callable[[], Carried]  # once the event has fired; raises `CorruptError`


class Flying(NamedTuple):
    """A piece that the card has been given."""

    piece: Piece
    slot: Slot
    began: float
    event: torch.cuda.Event
    finish: Finish


class GpuLink(ThreadLink):
    """A family says how a piece is given to the card, and whether its peer is still there."""

    def __init__(self, setup: LinkSetup) -> None:
        self.device = setup.host.kv.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._flying: deque[Flying] = deque()
        self._pinned = torch.empty(LISTS, 2 * setup.host.kv.shape[2], dtype=torch.int64).pin_memory()
        self._there = torch.empty_like(self._pinned, device=self.device)
        self._lists = 0
        super().__init__(setup)

    @abstractmethod
    def _post(self, piece: Piece, arrives: float) -> Finish:
        """Give it to the card, on the current stream; returns before it has begun. `arrives`: see `_carry`."""

    @abstractmethod
    def _ready(self, piece: Piece) -> bool:
        """Whether it may be posted: nothing on this card may wait for a peer that has not begun. Never blocks."""

    @abstractmethod
    def _check_peer(self) -> None:
        """Raise `LinkError` where the peer's end is closed."""

    def _rest(self) -> None:
        """Until there may be something to see."""
        time.sleep(POLL)

    def _carry(self, piece: Piece, arrives: float) -> Carried:
        raise NotImplementedError  # `_run` overlaps pieces

    def _run(self) -> None:
        waiting: tuple[Piece, Slot] | None = None
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            while not self.closing:
                try:
                    if waiting is None and len(self._flying) < LISTS // 2:
                        waiting = self._next()
                    if waiting is not None and self._begin(*waiting):
                        waiting = None
                    elif self._flying and self._flying[0].event.query():  # type: ignore[no-untyped-call]
                        self._land(self._flying.popleft())
                    else:
                        self._watch(waiting)
                        self._rest()
                except CorruptError:
                    raise AssertionError("reported where it was found") from None
                except Exception as failure:  # the order on the link is lost
                    self._broken = str(failure).partition("\n")[0] or repr(failure)
                    self._fail_flying()
        if waiting is not None:
            self._report_failure(*waiting)
        self._broken = self._broken or "the link was aborted"
        self._fail_flying()
        while (op := self._ops.get()) is not None:
            self._report_failure(*op)
        if self._line is not None:
            self._line.finish()

    def _next(self) -> tuple[Piece, Slot] | None:
        """The next piece; waits where nothing is in flight. None at the end, and where there is none."""
        try:
            op = self._ops.get(block=not self._flying)
        except queue.Empty:
            return None
        if op is None:
            self._ops.put(None)  # for the end of `_run`
        else:
            self._since = time.monotonic()
        return op

    def _begin(self, piece: Piece, slot: Slot) -> bool:
        """Post it if that can be done."""
        # the peer's first piece can be announced before this end's `connect` has returned
        if not self._met.wait(self.host.timeout):
            self._broken = "the peer did not connect in time"
        if self._broken or self.closing:
            self._report_failure(piece, slot)
            return True
        if not self._ready(piece):
            return False
        self._check(piece)
        finish = self._post(piece, slot.arrives)
        event: torch.cuda.Event = self.stream.record_event()
        self._flying.append(Flying(piece, slot, time.monotonic(), event, finish))
        return True

    def _land(self, flying: Flying) -> None:
        carried, error = Carried(), ""
        try:
            carried = flying.finish()
        except CorruptError as failure:
            error = str(failure)
        began = max(flying.began, flying.slot.begins)
        self._complete(self._ended(flying.piece, error, began, carried), carried.arrives)

    def _watch(self, waiting: tuple[Piece, Slot] | None) -> None:
        self._check_peer()
        began = self._flying[0].began if self._flying else self._since
        if (self._flying or waiting) and time.monotonic() > began + self.host.timeout:
            raise LinkError(f"no progress for {self.host.timeout:.0f} s")

    def _fail_flying(self) -> None:
        while self._flying:
            flying = self._flying.popleft()
            self._report_failure(flying.piece, flying.slot)

    def _report_failure(self, piece: Piece, slot: Slot) -> None:
        why = self._broken or "the link was aborted"
        self._complete(self._ended(piece, why, time.monotonic(), Carried()), 0.0)

    def warm_up(self) -> None:
        """Compile and load the copy kernel: its first use would wait for whatever spins on the card."""
        page = torch.zeros(1, dtype=torch.int64, device=self.device)
        for source, target in (page, page), (page, None), (None, page):
            copy_rows(planes(self.rows[:1]), source, torch.empty_like(planes(self.rows[:1, :, :1])), target, PROGRAMS)
        self.stream.synchronize()

    def pages(self, *lists: Sequence[int]) -> Tensor:
        """Their numbers on the card, one row for each (equally long) list, until `LISTS` further pieces are posted."""
        count, slot = len(lists[0]), self._lists % LISTS
        if len(lists) * count > self._pinned.shape[1]:
            raise LinkError(f"a piece of {count} pages is too large")
        self._lists += 1
        pinned, there = (x[slot, : len(lists) * count].view(len(lists), count) for x in (self._pinned, self._there))
        pinned.numpy()[:] = lists
        return there.copy_(pinned, non_blocking=True)


def planes(rows: Tensor, layers: slice = slice(None), kinds: slice = slice(None)) -> Tensor:
    """Rows [layers, 2, pages, words] of some layers, or of one layer's keys or values, as [planes, pages, words]."""
    return rows[layers, kinds].view(-1, *rows.shape[2:])

"""What links between GPUs' caches have in common: a side stream, pieces in flight, and pages copied by one kernel.

A piece is given to the card and forgotten until its event has fired; the thread looks at the events, and sleeps in
between, so that it takes no time from the interpreter. A wait for the peer that runs out ends the link, as everywhere.

Checksums would read all bytes once more, and are off here unless asked for (`--gpu-checksums`).
"""

from __future__ import annotations

import queue
import socket
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Codec
from minidisagg.transfer.emulate import Slot
from minidisagg.transfer.kernels import copy_rows
from minidisagg.transfer.links import Carried, CorruptError, LinkError, LinkSetup, ThreadLink
from minidisagg.transfer.rows import Block, Checksum, cache_rows
from minidisagg.transfer.stream import UnixListener, shut_down

POLL = 50e-6  # seconds between two looks at the events
LISTS = 64  # of page numbers that are on their way
TOGETHER = 32  # pieces that go as one where they wait together; each costs its host a tenth of a millisecond
TOGETHER_BYTES = 128 << 20  # from here on a link is busy with one alone
CODED_BYTES = 16 << 20  # of a block whose wire rows are not the cache's: it needs ten times as much for a moment
PROGRAMS = 64  # of a copy kernel: half of the multiprocessors keep NVLink busy, and leave room for what computes

Waiting = list[tuple[Piece, Slot]]
Finish = Callable[[], Carried]  # once the event has fired; raises `CorruptError`


class Flying(NamedTuple):
    """Pieces that the card has been given as one."""

    pieces: Waiting
    began: float
    event: torch.cuda.Event
    finish: Finish


class Part(NamedTuple):
    """A part of a piece: some planes of some pages, by their numbers here and on the card."""

    codec: Codec
    planes: slice
    pages: Sequence[int]
    there: Tensor


class GpuLink(ThreadLink):
    """A family says how a piece is given to the card, and whether its peer is still there."""

    def __init__(self, setup: LinkSetup) -> None:
        self.device = setup.host.kv.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._flying: deque[Flying] = deque()
        self.planes = planes(cache_rows(setup.host.kv))
        self._pinned = torch.empty(LISTS, 2 * setup.host.kv.shape[2], dtype=torch.int64).pin_memory()
        self._lists_here = self._pinned.numpy()
        self._there = torch.empty_like(self._pinned, device=self.device)
        self._lists = 0
        self._listener = None if setup.source else UnixListener(setup)
        self._peer: socket.socket | None = None  # open as long as the peer lives
        super().__init__(setup)

    @abstractmethod
    def _post(self, piece: Piece, together: int, arrives: float) -> Finish:
        """Give it, which may be several as one, to the card, on the current stream; returns before it has begun.
        `arrives`: see `_carry`."""

    @abstractmethod
    def _ready(self, waiting: Waiting) -> int:
        """How many of those that wait are to be posted as one now. 0: not yet, since nothing on this card may wait for
        a peer that has not begun. Never blocks."""

    @abstractmethod
    def _check_peer(self) -> None:
        """Raise `LinkError` where the peer's end is closed."""

    def _rest(self) -> None:
        """Until there may be something to see."""
        time.sleep(POLL)

    def _carry(self, piece: Piece, arrives: float) -> Carried:
        raise NotImplementedError  # `_run` posts several before one has ended

    def _run(self) -> None:
        waiting: Waiting = []
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            while not self.closing:
                try:
                    if len(self._flying) < LISTS // 2:
                        self._take(waiting)
                    if waiting and (count := self._begin(waiting)):
                        del waiting[:count]
                    elif self._flying and self._flying[0].event.query():  # type: ignore[no-untyped-call]
                        self._land(self._flying.popleft())
                    else:
                        self._watch(waiting)
                        self._rest()
                except Exception as failure:  # the order on the link is lost
                    self._broken = str(failure).partition("\n")[0] or repr(failure)
                    self._fail_flying()
        self._broken = self._broken or "the link was aborted"
        self._fail_flying()
        self._fail(waiting)
        while (op := self._ops.get()) is not None:
            self._fail([op])
        if self._line is not None:
            self._line.finish()

    def _take(self, waiting: Waiting) -> None:
        """What has been started; waits where there is nothing else to do."""
        while len(waiting) < TOGETHER:
            try:
                op = self._ops.get(block=not (waiting or self._flying))
            except queue.Empty:
                return
            if op is None:
                return self._ops.put(None)  # for the end of `_run`
            waiting.append(op)
            self._since = time.monotonic()

    def together(self, waiting: Waiting) -> int:
        """How many of them, from the first on, a source can send as one: of the same layers, and not too large."""
        if self.host.nic is not None or self.host.checksums:  # each has a time, or a sum, of its own
            return 1
        first, size = waiting[0][0], 0
        for count, (piece, _) in enumerate(waiting):
            size += self.wire_bytes(piece)
            if count and (piece.layers != first.layers or piece.codec != first.codec or size > TOGETHER_BYTES):
                return count
        return len(waiting)

    def _begin(self, waiting: Waiting) -> int:
        """Post what can be posted, or report that nothing can be any more; returns of how many that was."""
        # the peer's first piece can be announced before this end's `connect` has returned
        if not self._met.wait(self.host.timeout):
            self._broken = "the peer did not connect in time"
        if self._broken or self.closing:
            self._fail(waiting)
            return len(waiting)
        if not (count := self._ready(waiting)):
            return 0
        pieces = waiting[:count]
        for piece, _ in pieces:
            self._check(piece)
        finish = self._post(_as_one([piece for piece, _ in pieces]), count, pieces[0][1].arrives)
        event: torch.cuda.Event = self.stream.record_event()
        self._flying.append(Flying(pieces, time.monotonic(), event, finish))
        return count

    def _land(self, flying: Flying) -> None:
        carried, error = Carried(), ""
        try:
            carried = flying.finish()
        except CorruptError as failure:
            error = str(failure)
        for piece, slot in flying.pieces:
            self._complete(self._ended(piece, error, max(flying.began, slot.begins), carried), carried.arrives)

    def _watch(self, waiting: Waiting) -> None:
        self._check_peer()
        began = self._flying[0].began if self._flying else self._since
        if (self._flying or waiting) and time.monotonic() > began + self.host.timeout:
            raise LinkError(f"no progress for {self.host.timeout:.0f} s")

    def _fail_flying(self) -> None:
        while self._flying:
            self._fail(self._flying.popleft().pieces)

    def _fail(self, pieces: Waiting) -> None:
        why = self._broken or "the link was aborted"
        for piece, _ in pieces:
            self._complete(self._ended(piece, why, time.monotonic(), Carried()), 0.0)

    def checksum(self, piece: Piece) -> Checksum | None:
        """Over the piece's pages as they are when the card gets there; None where nobody asks for it."""
        if not self.host.checksums or min(piece.pages) < 0:
            return None
        if not self.codec(piece).in_place:
            raise LinkError(f"checksums between GPUs are of pages as they are, and not of {piece.codec!r}")
        checksum = Checksum(piece)
        rows = self.rows[slice(*piece.layers)].index_select(2, self.pages(piece.pages)[0])
        checksum.add(Block(slice(0, len(rows)), slice(0, 2), slice(0, piece.count)), rows)
        return checksum

    def _interrupt(self) -> None:
        if self._listener is not None:
            self._listener.release()
        if self._peer is not None:
            shut_down(self._peer)

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.close()
        if self._listener is not None:
            self._listener.close()

    def parts(self, piece: Piece, there: Tensor, limit: int) -> Iterator[tuple[Block, Part]]:
        """The piece in blocks of at most `limit` bytes on the wire; `there`: its pages' numbers on the card."""
        codec = self.codec(piece)
        for block in self.blocks(piece, limit):
            layers, kinds, _ = block.shape
            first = 2 * (piece.layers[0] + block.layers.start) + block.kinds.start
            planes = slice(first, first + layers * kinds)
            yield block, Part(codec, planes, piece.pages[block.pages], there[block.pages])

    def gather(self, part: Part, wire: Tensor) -> None:
        """Fill `wire` [planes, pages, words] with what this part of the cache is on it."""
        cache = self.planes[part.planes]
        if part.codec.in_place:
            copy_rows(cache, part.there, wire, None, PROGRAMS)
        else:
            part.codec.encode(cache.index_select(1, part.there), wire)

    def scatter(self, part: Part, wire: Tensor) -> None:
        """Write what it means into the cache, but for pages that are -1."""
        cache, there = self.planes[part.planes], part.there
        if part.codec.in_place:
            copy_rows(wire, None, cache, there, PROGRAMS)
            return
        rows = torch.empty(*wire.shape[:2], cache.shape[2], dtype=cache.dtype, device=self.device)
        part.codec.decode(wire, rows)
        if -1 in part.pages:
            wanted = torch.tensor([i for i, page in enumerate(part.pages) if page >= 0], device=self.device)
            rows, there = rows.index_select(1, wanted), there[wanted]
        cache.index_copy_(1, there, rows)

    def warm_up(self) -> None:
        """Compile and load all that a transfer calls: its first use would wait for whatever spins on the card."""
        page, one = torch.zeros(1, dtype=torch.int64, device=self.device), torch.empty_like(self.planes[:1, :1])
        for source, target in (page, page), (page, None), (None, page):
            copy_rows(self.planes[:1], source, one, target, PROGRAMS)
        for codec in self.codecs.values():
            wire = torch.empty(1, 1, codec.row_bytes, dtype=torch.uint8, device=self.device).view(codec.word)
            codec.decode(codec.encode(self.planes[:1].index_select(1, page), wire), one)
            torch.empty_like(self.planes[:1, :1]).index_copy_(1, page, one)
        self.stream.synchronize()

    def pages(self, *lists: Sequence[int]) -> Tensor:
        """Their numbers on the card, one row for each (equally long) list, until `LISTS` further pieces are posted."""
        count, slot = len(lists[0]), self._lists % LISTS
        if len(lists) * count > self._pinned.shape[1]:
            raise LinkError(f"a piece of {count} pages is too large")
        self._lists += 1
        flat = len(lists) * count
        self._lists_here[slot, :flat] = np.concatenate(lists)
        there = self._there[slot, :flat].copy_(self._pinned[slot, :flat], non_blocking=True)
        return there.view(len(lists), count)


def _as_one(pieces: list[Piece]) -> Piece:
    """All of their pages. Those that nobody wants any more are -1, which `copy_rows` leaves out."""
    mine = [page for piece in pieces for page in piece.pages or [-1] * piece.count]
    remote = [page for piece in pieces for page in piece.remote]
    return replace(pieces[0], pages=mine, remote=remote, count=len(mine))


def planes(rows: Tensor) -> Tensor:
    """Rows [layers, kinds, pages, words] as [planes, pages, words]."""
    return rows.view(-1, *rows.shape[2:])

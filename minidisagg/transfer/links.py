"""The one interface of all links, and the thread that drives each of them.

A `Link` is one direction of one (source, destination) pair under its own epoch. It moves bytes of whole KV pages and
decides nothing: offers, grants, sequence numbers and deadlines are `core/`. Each link has one thread, which
takes the started pieces in order and blocks on them, so that all families share one queue, one fence and one way to
block; `wake` tells the event loop that `poll` has something.

The cache is one tensor [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim], contiguous.
"""

from __future__ import annotations

import math
import queue
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from minidisagg.core.inputs import PieceDone
from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Codec, codecs_for
from minidisagg.transfer.emulate import DelayLine, Nic, Slot
from minidisagg.transfer.rows import Block, cache_rows, cut

JOIN_SECONDS = 0.1
MAX_OUTSTANDING = 4096  # pieces started and not yet polled: the core keeps far fewer

Wake = Callable[[], None]


class LinkError(RuntimeError):
    """A piece failed and nothing after it on this link can be trusted; one line for a person."""


class CorruptError(LinkError):
    """The bytes of one piece are wrong, but the link is still in step."""


class Link(Protocol):
    """One direction of one pair. All methods but `connect` and `abort` return at once."""

    one_sided: bool

    def endpoint(self) -> str:
        """Destination only: where the source finds this end. Opaque to everyone else."""
        ...

    def connect(self, endpoint: str) -> None:
        """Source: reach the destination's end. Destination: wait for the source (`endpoint` is its own). Blocks.

        Raises `OSError` or `LinkError` when the peer does not come within the timeout; the link is then to be aborted.
        """
        ...

    def start(self, piece: Piece) -> None:
        """Queue one piece. Pieces are carried out in the order in which they were started, once connected.

        A source's pages must be complete by then: on a GPU, computed and not merely launched.
        After `abort`, after a failure that left the link out of step, and where more pieces wait than the core ever
        starts, it completes at once as failed.
        """
        ...

    def poll(self) -> list[PieceDone]:
        """Completions since the last call, in order: one for each started piece."""
        ...

    def abort(self, peer_dead: bool) -> bool:
        """Give the link up and block until nothing of it can touch this end's pages any more.

        Returns True when that is certain. A one-sided destination cannot know it of a living source and returns
        False unless `peer_dead`; it is then certain as soon as the source says so or is dead.
        """
        ...


@dataclass(frozen=True)
class LinkHost:
    """What all links of one worker have in common.

    `kv_fd` is the memfd whose bytes from 0 on are `kv`'s; `timeout` (seconds) bounds each single wait for the peer;
    with a `nic` what is sent takes its emulated time.
    """

    kind: str
    kv: Tensor
    kv_fd: int | None
    run_dir: Path
    timeout: float
    nic: Nic | None = None
    checksums: bool = False  # of links between GPUs too
    codecs: tuple[str, ...] = ()  # that this worker has for its cache


class Carried(NamedTuple):
    """What came of a piece: its checksum, and before when (`time.monotonic()`) it must not count as complete."""

    checksum: int = 0
    arrives: float = 0.0


@dataclass(frozen=True)
class LinkSetup:
    """What one end of a link is made from. `pair` and `link_epoch` are the same at both ends, and no other link's."""

    host: LinkHost
    source: bool
    pair: str
    link_epoch: int
    wake: Wake


class ThreadLink(ABC):
    """A link's queue, its thread, its completions. A family implements the opening, one piece, and the fence."""

    one_sided = False

    def __init__(self, setup: LinkSetup) -> None:
        self.setup = setup
        self.host = setup.host
        self.rows = cache_rows(self.host.kv)  # [layers, 2, pages, words]
        self.codecs = codecs_for(self.host.kv)  # a piece names its own
        self.patience = self.host.timeout + 2.0  # of `abort`: one wait for the peer, and the thread's own work
        self.closing = False
        self._broken = ""  # why nothing more can be carried
        self._met = threading.Event()  # connected, failed to, or aborted
        self._opening = threading.Lock()  # held by `connect`, so that `abort` cannot overtake it
        self._lock = threading.Lock()
        self._outstanding = 0
        self._ops: queue.SimpleQueue[tuple[Piece, Slot] | None] = queue.SimpleQueue()
        self._done: deque[PieceDone] = deque()
        self._line: DelayLine | None = None  # from the first piece on that has an emulated arrival
        self._thread = threading.Thread(target=self._run, name=f"link-{setup.pair}", daemon=True)
        self._thread.start()

    @abstractmethod
    def endpoint(self) -> str:
        """Destination only: where the source finds this end."""

    @abstractmethod
    def _open(self, endpoint: str) -> None:
        """Meet the peer, or raise within the timeout."""

    @abstractmethod
    def _carry(self, piece: Piece, arrives: float) -> Carried:
        """Do one piece; raise `CorruptError` if its bytes are wrong, anything else if nothing after it can be trusted.

        `arrives` is the source's, for the destination to be told.
        """

    @abstractmethod
    def _interrupt(self) -> None:
        """Release the thread from a wait, where the family can."""

    @abstractmethod
    def _drop(self) -> None:
        """Let go of everything shared with the peer; the thread has ended."""

    def connect(self, endpoint: str) -> None:
        """Meet the peer; an abort meanwhile waits for that to end."""
        with self._opening:
            if self.closing:
                raise LinkError("the link was aborted")
            try:
                self._open(endpoint)
            except Exception as failure:
                self._broken = f"the link was not connected: {failure}"
                raise
            finally:
                self._met.set()

    def codec(self, piece: Piece) -> Codec:
        """How this piece looks on the wire; raises `LinkError` where it names a codec that nobody knows."""
        if piece.codec not in self.codecs:
            raise LinkError(f"unknown codec {piece.codec!r}; known: {', '.join(self.codecs)}")
        return self.codecs[piece.codec]

    def wire_bytes(self, piece: Piece) -> int:
        """Payload bytes of this piece on the wire; raises as `codec` does."""
        return (piece.layers[1] - piece.layers[0]) * 2 * piece.count * self.codec(piece).row_bytes

    def blocks(self, piece: Piece, limit: int) -> Iterator[Block]:
        """The piece in blocks of at most `limit` bytes on the wire (at least one row): the same at both ends."""
        return cut(piece.layers[1] - piece.layers[0], piece.count, self.codec(piece).row_bytes, limit)

    def start(self, piece: Piece) -> None:
        """Into the queue, unless it is closed or full."""
        with self._lock:
            self._outstanding += 1
            full = self._outstanding > MAX_OUTSTANDING
            if not self.closing and not full:
                self._ops.put((piece, self._admit(piece)))
                return
        why = f"more than {MAX_OUTSTANDING} pieces on one link" if full else "the link was aborted"
        self._report(self._ended(piece, why, time.monotonic(), Carried()))

    def poll(self) -> list[PieceDone]:
        """What the thread has completed."""
        done = [self._done.popleft() for _ in range(len(self._done))]
        with self._lock:
            self._outstanding -= len(done)
        return done

    def abort(self, peer_dead: bool) -> bool:
        """Stop the thread. Takes at most two timeouts and a little; may be called again."""
        with self._lock:
            self.closing = True
            self._ops.put(None)
        self._met.set()
        self._interrupt()
        if not self._opening.acquire(timeout=self.patience):
            return False
        try:
            # In short waits: where this process is stopped in between, the thread's own wait has run out as well, and
            # it needs a moment to notice.
            for _ in range(math.ceil(self.patience / JOIN_SECONDS)):
                self._thread.join(JOIN_SECONDS)
                if not self._thread.is_alive():
                    break
            else:
                return False
            self._drop()
        finally:
            self._opening.release()
        return self._fenced(peer_dead)

    def _fenced(self, peer_dead: bool) -> bool:
        """Whether, the thread gone and all dropped, the peer cannot write here either."""
        return True

    def _admit(self, piece: Piece) -> Slot:
        """Its time on the emulated wire. A piece of an unknown codec gets none: it will fail."""
        nic = self.host.nic
        return nic.admit(self.wire_bytes(piece)) if nic is not None and piece.codec in self.codecs else Slot()

    def _run(self) -> None:
        while (op := self._ops.get()) is not None:
            piece, slot = op
            # the peer's first piece can be announced before this end's `connect` has returned
            if not self._met.wait(self.host.timeout):
                self._broken = "the peer did not connect in time"
            began, carried, error = (
                time.monotonic(),
                Carried(),
                "the link was aborted" if self.closing else self._broken,
            )
            if not error:
                try:
                    self._check(piece)
                    carried = self._carry(piece, slot.arrives)
                except CorruptError as failure:
                    error = str(failure)
                except Exception as failure:  # whatever it was, it is reported, and the order on the link is lost
                    error = self._broken = str(failure).partition("\n")[0] or repr(failure)
            self._complete(self._ended(piece, error, max(began, slot.begins), carried), carried.arrives)
        if self._line is not None:
            self._line.finish()

    def _check(self, piece: Piece) -> None:
        layers, _, pages = self.rows.shape[:3]
        if not 0 <= piece.layers[0] < piece.layers[1] <= layers:
            raise LinkError(f"layers {piece.layers} of {layers}")
        if piece.pages and (len(piece.pages) != piece.count or not 0 <= min(piece.pages) <= max(piece.pages) < pages):
            raise LinkError(f"pages are not {piece.count} of this cache's {pages}")
        if piece.send != self.setup.source or (piece.send and not piece.pages):
            raise LinkError("a source sends pages, a destination receives them")

    def _ended(self, piece: Piece, error: str, began: float, carried: Carried) -> PieceDone:
        ended = max(time.monotonic(), carried.arrives)
        return PieceDone(
            piece.peer,
            piece.link_epoch,
            piece.seq,
            piece.send,
            ok=not error,
            seconds=ended - began,
            nbytes=0 if error else self.wire_bytes(piece),
            checksum=carried.checksum,
            error=error,
            ended=ended,
        )

    def _complete(self, done: PieceDone, arrives: float) -> None:
        if arrives and self._line is None:
            self._line = DelayLine(self._report)
        if self._line is None:
            self._report(done)
        else:
            self._line.put(done, arrives)

    def _report(self, done: PieceDone) -> None:
        self._done.append(done)
        self.setup.wake()


class Trailer:
    """What follows the rows of each piece on a two-sided link, so that one skipped send cannot shift all others."""

    _FORMAT = struct.Struct("<QQQQd")  # sequence number, request, payload bytes, checksum, emulated arrival
    SIZE = _FORMAT.size

    @classmethod
    def pack(cls, piece: Piece, nbytes: int, carried: Carried) -> bytes:
        """The trailer of `piece`."""
        request = blake2b(f"{piece.request_id}/{piece.incarnation}".encode(), digest_size=8).digest()
        return cls._FORMAT.pack(piece.seq, int.from_bytes(request, "little"), nbytes, *carried)

    @classmethod
    def read(cls, data: bytes) -> Carried:
        """What the source says came of the piece."""
        *_, checksum, arrives = cls._FORMAT.unpack(data)
        return Carried(checksum, arrives)

    @classmethod
    def verify(cls, data: bytes, piece: Piece, nbytes: int, checksum: int) -> Carried:
        """Raise `LinkError` if it belongs to another piece, `CorruptError` if only the checksum differs."""
        seq, _, size, _, arrives = cls._FORMAT.unpack(data)
        carried = Carried(checksum, arrives)
        expected = cls.pack(piece, nbytes, carried)
        if data == expected:
            return carried
        if data[:24] == expected[:24]:
            raise CorruptError(f"checksum mismatch in piece {piece.seq}")
        raise LinkError(f"out of step: expected piece {piece.seq} of {nbytes} bytes, got piece {seq} of {size}")

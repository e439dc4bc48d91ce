"""`nccl`: torch.distributed point to point between GPUs, over a two-rank group that belongs to one link alone.

    source        gather pages into staging ─▶ send … ─▶ "launched" over a Unix socket
    destination   "launched" ─▶ receive into staging … ─▶ scatter into pages

A receive is a kernel that spins until its sender comes, and while it does, whatever has to load a module or to free
memory on that card waits for it: if the sender should in turn wait for this worker, for ever. So no receive is posted
before the source has said that the send is under way; and pairs are opened and given up one at a time on each card.

The destination receives into staging memory and copies from there: whatever a peer sends late lands in the staging
memory of a link that is gone, never in a page. The socket also tells of the peer's death at once; what spins then is
stopped by the group's abort.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore, Work

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Staging
from minidisagg.transfer.gpu import CODED_BYTES, POLL, TOGETHER, Finish, GpuLink, Part, Waiting, planes
from minidisagg.transfer.links import Carried, CorruptError, LinkError, LinkSetup, Trailer

# The wire takes 350 µs for one, more than the 200 to 300 that each costs its hosts: blocks of 64 MB came half as fast.
BLOCK_BYTES = 128 << 20
DEPTH = 3  # blocks in flight: gathering, sending and scattering overlap
SOURCE, DEST = 0, 1
WORD = Trailer.SIZE + 1  # what "launched" is: the trailer of what goes as one, and of how many pieces that is
# torch's watchdog would dump and kill; here every wait has a deadline and the caller decides.
ENVIRONMENT = {
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_FR_BUFFER_SIZE": "0",  # nor write down each call, with its stack
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",  # else dropping a group waits a minute for a dump
}
_one_at_a_time = threading.Lock()  # opening and aborting pairs, in this process and so on its card


class NcclLink(GpuLink):
    """One end of a pair."""

    def __init__(self, setup: LinkSetup) -> None:
        self._group: Any = None
        self._heard = b""  # of the next "launched"
        self._store: Any = None
        self._staging = [Staging(setup.host.kv.device, BLOCK_BYTES) for _ in range(DEPTH)]
        self._sent: list[Work | None] = [None] * DEPTH  # the last from each
        self._scattered: list[torch.cuda.Event | None] = [None] * DEPTH  # the last out of each
        # NCCL begins where its caller's stream is: on streams of their own a gather need not wait for the piece before
        # to be sent, nor a receive for a scatter.
        self._gathering = torch.cuda.Stream(setup.host.kv.device)  # type: ignore[no-untyped-call]
        self._receiving = torch.cuda.Stream(setup.host.kv.device)  # type: ignore[no-untyped-call]
        self._blocks = 0
        if not setup.source:
            listener = socket.create_server(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
            self._store = self._make_store(self._port, setup.host.timeout, listener.detach())
        super().__init__(setup)

    def endpoint(self) -> str:
        """`port:path` of the store and of the socket."""
        if self._listener is None:
            raise LinkError("only the destination's end has an endpoint")
        return f"{self._port}:{self._listener.path}"

    @staticmethod
    def _make_store(port: int, timeout: float, listen_fd: int | None) -> TCPStore:
        """The store's server on a socket that is bound to loopback (else it binds every interface), or a client."""
        return TCPStore(
            "127.0.0.1", port, is_master=listen_fd is not None, timeout=timedelta(seconds=timeout),
            wait_for_workers=False, master_listen_fd=listen_fd,
        )  # fmt: skip

    def _open(self, endpoint: str) -> None:
        port, _, path = endpoint.partition(":")
        if self._listener is not None:
            peer = self._peer = self._listener.accept()
        else:
            peer = self._peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(self.host.timeout)
            peer.connect(path)
            self._store = self._make_store(int(port), self.host.timeout, None)
        peer.settimeout(self.host.timeout)
        # First the destination takes its card's turn and then the source its own: a source that has its turn waits for
        # nobody, so no circle of pairs waits for one another.
        if self.setup.source and peer.recv(1) != b"+":
            raise LinkError("the destination closed its end")
        with self._turn(self.host.timeout):
            peer.sendall(b"+")
            if not self.setup.source and peer.recv(1) != b"+":
                raise LinkError("the source closed its end")
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                self.warm_up()
                self._group = self._make_group()
                # the first message sets connections up (a second), which no transfer should pay for
                self._transfer(torch.zeros(1, dtype=torch.uint8, device=self.device)).wait()
                opened = self.stream.record_event()
                deadline = time.monotonic() + self.host.timeout
                while not opened.query():
                    if time.monotonic() > deadline:
                        raise LinkError(f"nccl did not connect within {self.host.timeout:.0f} s")
                    time.sleep(POLL)

    @contextmanager
    def _turn(self, timeout: float) -> Iterator[None]:
        if not _one_at_a_time.acquire(timeout=timeout):
            raise LinkError("another pair of this card takes too long to open")
        try:
            yield
        finally:
            _one_at_a_time.release()

    def _make_group(self) -> Any:
        if self.closing:
            raise LinkError("the link was aborted")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from torch._C._distributed_c10d import ProcessGroupNCCL  # a build for CPUs has none

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self.host.timeout)
        store = PrefixStore(f"{self.setup.pair}/{self.setup.link_epoch}", self._store)
        return ProcessGroupNCCL(store, SOURCE if self.setup.source else DEST, 2, options)

    def _transfer(self, tensor: Tensor) -> Work:
        work: Work = self._group.send([tensor], DEST, 0) if self.setup.source else self._group.recv([tensor], SOURCE, 0)
        return work

    def _ready(self, waiting: Waiting) -> int:
        """A source goes ahead: its peer answers at once. A destination waits for the word, and what it names."""
        if self._group is None:
            raise LinkError("the link is not connected")
        if self.setup.source:
            return self.together(waiting)
        self._hear()
        named = self._heard[-1] if len(self._heard) == WORD else TOGETHER + 1
        return named if named <= len(waiting) else 0

    def _hear(self) -> None:
        self._heard += self._read(WORD - len(self._heard))

    def _read(self, size: int) -> bytes:
        """What has come of it by now."""
        assert self._peer is not None
        if not size or not select.select([self._peer], [], [], 0)[0]:
            return b""
        data = self._peer.recv(size)
        if not data:
            raise LinkError("the peer closed its end")
        return data

    def _post(self, piece: Piece, together: int, arrives: float) -> Finish:
        codec = self.codec(piece)
        said, word = Carried(0, arrives), b""
        if piece.send:
            if (checksum := self.checksum(piece)) is not None:
                said = Carried(checksum.value(), arrives)  # waits for the card: the word goes out before the last block
            word = Trailer.pack(piece, self.wire_bytes(piece), said) + bytes([together])
        else:
            said = Trailer.read(self._heard[: Trailer.SIZE])
            Trailer.verify(self._heard[: Trailer.SIZE], piece, self.wire_bytes(piece), said.checksum)
            self._heard = b""
        with torch.cuda.stream(self._gathering if piece.send else self.stream):
            (pages,) = self.pages(piece.pages)
        for block, part in self.parts(piece, pages, BLOCK_BYTES if codec.in_place else CODED_BYTES):
            index, self._blocks = self._blocks % DEPTH, self._blocks + 1
            wire = planes(self._staging[index].rows(codec, block))
            if piece.send:
                self._send(index, part, wire)
                self._say(word)
                word = b""
            else:
                self._receive(index, part, wire)
        if (last := self._sent[(self._blocks - 1) % DEPTH]) is not None:
            last.wait()  # on the stream, so that the piece's event comes after its sends, which end in order
        landed = None if piece.send else self.checksum(piece)

        def finish() -> Carried:
            if landed is not None and landed.value() != said.checksum:
                raise CorruptError(f"checksum mismatch in piece {piece.seq}")
            return said

        return finish

    def _send(self, index: int, part: Part, wire: Tensor) -> None:
        with torch.cuda.stream(self._gathering):
            if (work := self._sent[index]) is not None:
                work.wait()  # on the stream: this thread goes on
            self.gather(part, wire)
        self.stream.wait_stream(self._gathering)
        self._sent[index] = self._transfer(wire)

    def _receive(self, index: int, part: Part, wire: Tensor) -> None:
        if (scattered := self._scattered[index]) is not None:
            self._receiving.wait_event(scattered)
        with torch.cuda.stream(self._receiving):
            work = self._transfer(wire)
        work.wait()
        self.scatter(part, wire)
        self._scattered[index] = self.stream.record_event()

    def _say(self, word: bytes) -> None:
        """The piece is under way."""
        assert self._peer is not None
        if word:
            self._peer.sendall(word)

    def _check_peer(self) -> None:
        if self._peer is not None and self.setup.source and select.select([self._peer], [], [], 0)[0]:
            raise LinkError("the peer closed its end")
        if self._peer is not None and self._flying and not self.setup.source:
            self._hear()

    def _drop(self) -> None:
        with _one_at_a_time:
            if self._group is not None:
                self._group.abort()  # a transfer whose peer is gone is still a kernel on the card
            self._gathering.synchronize()
            self._receiving.synchronize()
            self.stream.synchronize()
        self._group = self._store = None
        self._staging, self._sent = [], []
        super()._drop()

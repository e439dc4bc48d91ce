"""`gloo`: torch.distributed point to point, over a two-rank process group that belongs to one link alone.

There is no world group: workers come and go, and a dead peer costs one link. The destination hosts a TCPStore on a
loopback socket, both ends build the group on a prefix of it that names the pair and the epoch.

Rows travel in blocks of bounded size, several in flight, followed by a trailer. The source sends a block from the cache
itself where it is one piece of memory, else packs it. The destination always receives into staging memory and copies
from there: whatever a peer writes late lands in the staging memory of a link that is gone, never in a page.
A wait that runs out ends the link. Nothing else does: `is_completed()` says nothing before `wait()`, and the group's
own `abort` does not release a waiter, so `abort` here waits until the thread's wait has run out.
"""

from __future__ import annotations

import socket
from collections import deque
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Codec, Staging
from minidisagg.transfer.links import Carried, LinkError, LinkSetup, ThreadLink, Trailer
from minidisagg.transfer.rows import Block, Checksum, run_views

BLOCK_BYTES = 2 << 20
DEPTH = 4  # blocks in flight: packing, sending and unpacking overlap
SOURCE, DEST = 0, 1


class PointToPoint(Protocol):
    """What is used of a process group."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work:
        """Post a send."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work:
        """Post a receive."""
        ...


class GlooLink(ThreadLink):
    """A two-rank group; its thread packs, sends and waits, or receives, waits and unpacks."""

    def __init__(self, setup: LinkSetup) -> None:
        self._timeout = timedelta(seconds=setup.host.timeout)
        self._group: PointToPoint | None = None
        self._store: Store | None = None
        self._staging: list[Staging] = []
        if not setup.source:
            listener = socket.create_server(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
            self._store = self._make_store(self._port, listener.detach())
        super().__init__(setup)

    def endpoint(self) -> str:
        """`host:port` of the store."""
        return f"127.0.0.1:{self._port}"

    def _make_store(self, port: int, listen_fd: int | None) -> TCPStore:
        """The store's server on a socket that is bound to loopback (else it binds every interface), or a client."""
        return TCPStore(
            "127.0.0.1",
            port,
            is_master=listen_fd is not None,
            timeout=self._timeout,
            wait_for_workers=False,
            master_listen_fd=listen_fd,
        )

    def _open(self, endpoint: str) -> None:
        if self._store is None:
            self._store = self._make_store(int(endpoint.rpartition(":")[2]), None)
        store = PrefixStore(f"{self.setup.pair}/{self.setup.link_epoch}", self._store)
        rank = SOURCE if self.setup.source else DEST
        self._group = self._make_group(store, rank)
        # gloo moves host memory, so a cache on a GPU is staged through the host
        self._staging = [Staging(torch.device("cpu"), BLOCK_BYTES) for _ in range(DEPTH)]
        # the first message sets connections up, which no transfer should pay for
        self._wait(self._post(torch.zeros(1, dtype=torch.uint8)))

    def _make_group(self, store: Store, rank: int) -> PointToPoint:
        if self.closing:
            raise LinkError("the link was aborted")
        gloo: Any = ProcessGroupGloo  # torch's stubs leave out the options and send and recv
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = self._timeout
        return cast(PointToPoint, gloo(store, rank, 2, options))

    def _carry(self, piece: Piece, arrives: float) -> Carried:
        return self._send(piece, arrives) if piece.send else self._receive(piece)

    def _send(self, piece: Piece, arrives: float) -> Carried:
        codec, checksum, posted = self.codec(piece), Checksum(piece), deque[Work]()
        for index, block in enumerate(self.blocks(piece, BLOCK_BYTES)):
            if len(posted) == DEPTH:
                self._wait(posted.popleft())
            posted.append(self._post(self._pack(codec, checksum, piece, block, self._staged(index, codec, block))))
        carried = Carried(checksum.value(), arrives)
        trailer = Trailer.pack(piece, self.wire_bytes(piece), carried)
        posted.append(self._post(torch.frombuffer(bytearray(trailer), dtype=torch.uint8)))
        while posted:
            self._wait(posted.popleft())
        return carried

    def _pack(self, codec: Codec, checksum: Checksum, piece: Piece, block: Block, out: Tensor) -> Tensor:
        """The block's wire rows as one piece of the group's memory: the cache's own where they are that, else `out`."""
        parts = list(run_views(block, piece.layers[0], (self.rows, piece.pages)))
        if not codec.in_place:
            for part, (rows,) in parts:
                codec.pack(checksum, part, rows, out[:, :, block.place(part)])
            return out
        rows = parts[0][1][0]
        if len(parts) > 1 or not rows.is_contiguous() or rows.device != out.device:
            for part, (run,) in parts:
                out[:, :, block.place(part)].copy_(run)
            rows = out
        return codec.pack(checksum, block, rows, out)

    def _receive(self, piece: Piece) -> Carried:
        codec, checksum, posted = self.codec(piece), Checksum(piece), deque[tuple[Work, Block, Tensor]]()
        for index, block in enumerate(self.blocks(piece, BLOCK_BYTES)):
            if len(posted) == DEPTH:
                self._unpack(codec, checksum, piece, *posted.popleft())
            wire = self._staged(index, codec, block)
            posted.append((self._post(wire), block, wire))
        trailer = torch.empty(Trailer.SIZE, dtype=torch.uint8)
        last = self._post(trailer)
        while posted:
            self._unpack(codec, checksum, piece, *posted.popleft())
        self._wait(last)
        return Trailer.verify(bytes(trailer.tolist()), piece, self.wire_bytes(piece), checksum.value())

    def _unpack(self, codec: Codec, checksum: Checksum, piece: Piece, work: Work, block: Block, wire: Tensor) -> None:
        self._wait(work)
        checksum.add(block, wire)
        if piece.pages:
            for part, (rows,) in run_views(block, piece.layers[0], (self.rows, piece.pages)):
                codec.decode(wire[:, :, block.place(part)], rows)

    def _staged(self, index: int, codec: Codec, block: Block) -> Tensor:
        return self._staging[index % DEPTH].rows(codec, block)

    def _post(self, tensor: Tensor) -> Work:
        if self._group is None:
            raise LinkError("the link is not connected")
        if self.setup.source:
            return self._group.send([tensor], DEST, 0)
        return self._group.recv([tensor], SOURCE, 0)

    def _wait(self, work: Work) -> None:
        if self.closing:
            raise LinkError("the link was aborted")
        try:
            work.wait(self._timeout)
        except RuntimeError as failure:
            raise LinkError(f"gloo: {str(failure).partition(chr(10))[0]}") from failure

    def _interrupt(self) -> None:
        """Nothing releases a waiter but its own timeout."""

    def _drop(self) -> None:
        self._group = self._store = None
        self._staging = []

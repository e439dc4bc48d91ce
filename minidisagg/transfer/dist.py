"""`nccl` and `gloo`: torch.distributed point to point, over a two-rank process group that belongs to one link alone.

There is no world group: workers come and go, and a dead peer costs one link. The destination hosts a TCPStore on a
loopback socket, both ends build the group on a prefix of it that names the pair and the epoch.

Rows travel in blocks of bounded size, several in flight, followed by a trailer. The source sends a block from the cache
itself where it is one piece of memory, else packs it. The destination always receives into staging memory and copies
from there: whatever a peer writes late lands in the staging memory of a link that is gone, never in a page.
A wait that runs out ends the link. Nothing else does: `is_completed()` says nothing before `wait()`, and the group's
own `abort` does not release a waiter, so `abort` here waits until the thread's wait has run out.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Block, Checksum, cut
from minidisagg.transfer.links import LinkError, LinkSetup, ThreadLink, Trailer

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

    def abort(self) -> None:
        """Stop what runs on the device."""
        ...


class DistLink(ThreadLink):
    """A two-rank group; its thread packs, sends and waits, or receives, waits and unpacks."""

    def __init__(self, setup: LinkSetup) -> None:
        self._timeout = timedelta(seconds=setup.timeout)
        # gloo moves host memory, so a cache on a GPU is staged through the host there
        self._device = setup.kv.device if setup.kind == "nccl" else torch.device("cpu")
        self._group: PointToPoint | None = None
        self._store: Store | None = None
        self._staging: list[Tensor] = []
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
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
        words = BLOCK_BYTES // self.codec.rows.element_size()
        words = max(words, self.codec.rows.shape[-1])  # a block holds one row at least
        with self._on_stream():
            self._group = self._make_group(store, rank)
            self._staging = [torch.empty(words, dtype=self.codec.rows.dtype, device=self._device) for _ in range(DEPTH)]
            # the first message sets connections up (seconds for nccl), which no transfer should pay for
            self._wait(self._post(torch.zeros(1, dtype=torch.uint8, device=self._device)))

    def _make_group(self, store: Store, rank: int) -> PointToPoint:
        if self.closing:
            raise LinkError("the link was aborted")
        if self.setup.kind == "gloo":
            gloo: Any = ProcessGroupGloo  # torch's stubs leave out the options and send and recv
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            options._timeout = self._timeout
            return cast(PointToPoint, gloo(store, rank, 2, options))
        # torch's watchdog would dump and kill; here every wait has a deadline and the caller decides
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "0"  # else dropping a group waits a minute for a dump
        from torch._C._distributed_c10d import ProcessGroupNCCL  # a build for CPUs has none

        nccl_options = ProcessGroupNCCL.Options()
        nccl_options._timeout = self._timeout
        return cast(PointToPoint, ProcessGroupNCCL(store, rank, 2, nccl_options))

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _carry(self, piece: Piece) -> int:
        with self._on_stream():
            return self._send(piece) if piece.send else self._receive(piece)

    def _send(self, piece: Piece) -> int:
        checksum, posted, fault = Checksum(piece, self._device), deque[Work](), self.damage.pop(piece.seq, "")
        if fault == "drop":
            return 0
        for index, block in enumerate(self._blocks(piece)):
            if len(posted) == DEPTH:
                self._wait(posted.popleft())
            staging = self._staged(index, block)
            rows = self.codec.encode(block, piece.layers[0], piece.pages, staging)
            checksum.add(block, rows)
            if fault and index == 0:
                rows = staging.copy_(rows)
                rows[0, 0, 0, 0] ^= 1
            posted.append(self._post(rows))
        trailer = Trailer.pack(piece, self.wire_bytes(piece), checksum.value())
        posted.append(self._post(torch.frombuffer(bytearray(trailer), dtype=torch.uint8).to(self._device)))
        while posted:
            self._wait(posted.popleft())
        return checksum.value()

    def _receive(self, piece: Piece) -> int:
        checksum, posted = Checksum(piece, self._device), deque[tuple[Work, Block, Tensor]]()
        for index, block in enumerate(self._blocks(piece)):
            if len(posted) == DEPTH:
                self._unpack(piece, checksum, *posted.popleft())
            rows = self._staged(index, block)
            posted.append((self._post(rows), block, rows))
        trailer = torch.empty(Trailer.SIZE, dtype=torch.uint8, device=self._device)
        last = self._post(trailer)
        while posted:
            self._unpack(piece, checksum, *posted.popleft())
        self._wait(last)
        if self._stream is not None:
            self._stream.synchronize()
        Trailer.verify(bytes(trailer.tolist()), piece, self.wire_bytes(piece), checksum.value())
        return checksum.value()

    def _unpack(self, piece: Piece, checksum: Checksum, work: Work, block: Block, rows: Tensor) -> None:
        self._wait(work)
        checksum.add(block, rows)
        if piece.pages:
            self.codec.decode(rows, block, piece.layers[0], piece.pages)

    def _blocks(self, piece: Piece) -> Iterator[Block]:
        return cut(piece.layers[1] - piece.layers[0], piece.count, self.codec.row_bytes, BLOCK_BYTES)

    def _staged(self, index: int, block: Block) -> Tensor:
        """Staging memory for the block, [layers, kinds, pages, words]."""
        layers, kinds, pages = block.shape
        words = self.codec.rows.shape[-1]
        return self._staging[index % DEPTH][: layers * kinds * pages * words].view(layers, kinds, pages, words)

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
            raise LinkError(f"{self.setup.kind}: {str(failure).partition(chr(10))[0]}") from failure

    def _interrupt(self) -> None:
        """Nothing releases a waiter but its own timeout."""

    def _drop(self) -> None:
        if self._group is not None and self.setup.kind == "nccl":
            self._group.abort()  # a receive that ran out is still a kernel on the device
        if self._stream is not None:
            self._stream.synchronize()  # no copy into a page is still under way
        self._group = self._store = None
        self._staging = []

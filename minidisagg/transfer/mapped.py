"""`shm`: one-sided. The source maps the destination's cache and writes its pages straight into the granted ones.

The cache lies in a memfd, whose descriptor the destination passes over a Unix socket: there is no name in the file
system that could be left behind, and the memory goes with its last user. The destination moves nothing; told that
a piece is there, it verifies the checksum that the source announced.

A mapping cannot be taken back: only the source's word that it has stopped, or its death, ends its access.
"""

from __future__ import annotations

import array
import mmap
import os
import socket

import msgspec
import torch
from torch import Tensor

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import head
from minidisagg.transfer.links import Carried, CorruptError, LinkError, LinkSetup, ThreadLink
from minidisagg.transfer.rows import Checksum, alike, cache_rows, run_views
from minidisagg.transfer.stream import UnixListener

BLOCK_BYTES = 4 << 20  # what was summed is still in the last-level cache when it is copied
DESCRIPTION_BYTES = 4096


class CacheDescription(msgspec.Struct, frozen=True):
    """What the destination says of the memory whose descriptor comes with it."""

    shape: tuple[int, ...]
    dtype: str
    link_epoch: int


class MappedLink(ThreadLink):
    """Writes into another process's cache; `_map` is how it gets there."""

    one_sided = True

    def __init__(self, setup: LinkSetup) -> None:
        self._remote: Tensor | None = None  # the destination's rows [layers, 2, pages, words]
        super().__init__(setup)

    def _carry(self, piece: Piece, arrives: float) -> Carried:
        return Carried(self._write(piece), arrives) if piece.send else Carried(self._verify(piece))

    def _write(self, piece: Piece) -> int:
        remote = self._remote
        if remote is None:
            raise LinkError("the link is not connected")
        if len(piece.remote) != piece.count or not 0 <= min(piece.remote) <= max(piece.remote) < remote.shape[2]:
            raise LinkError(f"remote pages are not {piece.count} of the peer's {remote.shape[2]}")
        codec, checksum = self.codec(piece), Checksum(piece)
        for block in self.blocks(piece, BLOCK_BYTES):
            sides = (self.rows, piece.pages), (remote, piece.remote)
            for part, (ours, theirs) in run_views(block, piece.layers[0], *sides):
                there = head(codec, theirs)
                wire = codec.pack(checksum, part, ours, there)
                if wire is not there:
                    there.copy_(wire)
        return checksum.value()

    def _verify(self, piece: Piece) -> int:
        if not piece.pages:
            return 0  # nothing is on a wire
        codec, checksum = self.codec(piece), Checksum(piece)
        for block in self.blocks(piece, BLOCK_BYTES):
            for part, (rows,) in run_views(block, piece.layers[0], (self.rows, piece.pages)):
                wire = head(codec, rows)
                checksum.add(part, wire)
                codec.decode(wire, rows)
        if checksum.value() != piece.checksum:
            raise CorruptError(f"checksum mismatch in piece {piece.seq}")
        return checksum.value()

    def _drop(self) -> None:
        self._remote = None  # the last reference: this unmaps

    def _fenced(self, peer_dead: bool) -> bool:
        return self.setup.source or peer_dead


class ShmLink(MappedLink):
    """The destination's cache lies in a memfd."""

    def __init__(self, setup: LinkSetup) -> None:
        if setup.host.kv_fd is None:
            raise ValueError("link 'shm' needs a cache in a memfd")
        self._kv_fd = setup.host.kv_fd
        self._listener = None if setup.source else UnixListener(setup)
        super().__init__(setup)

    def endpoint(self) -> str:
        """The path of the socket that passes the descriptor."""
        if self._listener is None:
            raise LinkError("only the destination's end has an endpoint")
        return str(self._listener.path)

    def _open(self, endpoint: str) -> None:
        if self._listener is not None:
            self._give(self._listener)
            return
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(self.host.timeout)
            peer.connect(endpoint)
            self._remote = self._map(peer)

    def _give(self, listener: UnixListener) -> None:
        kv = self.host.kv
        description = CacheDescription(tuple(kv.shape), str(kv.dtype), self.setup.link_epoch)
        with listener.accept() as peer:
            peer.settimeout(self.host.timeout)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._kv_fd]))
            peer.sendmsg([msgspec.msgpack.encode(description)], [rights])
            if peer.recv(1) != b"+":  # the source has mapped it
                raise LinkError("the source did not map the cache")

    def _map(self, peer: socket.socket) -> Tensor:
        """The destination's rows [layers, 2, pages, words], after a check that its cache is like ours."""
        data, fds, _, _ = socket.recv_fds(peer, DESCRIPTION_BYTES, 1)
        try:
            theirs = msgspec.msgpack.decode(data, type=CacheDescription)
            kv = self.host.kv
            if not alike(kv, theirs.shape, theirs.dtype) or theirs.link_epoch != self.setup.link_epoch or len(fds) != 1:
                raise LinkError(f"the destination's cache is {theirs.shape} {theirs.dtype}, not like this one")
            nbytes = kv[:, :, :1].nbytes * theirs.shape[2]
            populate = getattr(mmap, "MAP_POPULATE", 0)
            memory = mmap.mmap(fds[0], nbytes, flags=mmap.MAP_SHARED | populate)
        finally:
            for fd in fds:
                os.close(fd)
        peer.sendall(b"+")
        return cache_rows(torch.frombuffer(memory, dtype=kv.dtype).view(theirs.shape))

    def _interrupt(self) -> None:
        if self._listener is not None:
            self._listener.release()

    def _drop(self) -> None:
        super()._drop()
        if self._listener is not None:
            self._listener.close()

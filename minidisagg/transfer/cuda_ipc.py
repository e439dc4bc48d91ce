"""`cuda_ipc`: one-sided. The source maps the destination's cache, on whatever GPU of the host, and writes into it.

The peer's memory is opened on the *writer's* device, which makes it an ordinary tensor there, at the speed of NVLink;
opened on its owner's, as torch's own sharing does, copies take a tenth of it, and Triton refuses the pointer.

A mapping outlives its owner: after a SIGKILL the memory stays taken until the last writer lets go of it. So every
writer drops its mapping on the news of a death, and the next process waits for its memory (`KVCache`).
"""

from __future__ import annotations

import select
import socket

import msgspec
import torch
from torch import Tensor

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Staging, head
from minidisagg.transfer.gpu import CODED_BYTES, PROGRAMS, Finish, GpuLink, Waiting, planes
from minidisagg.transfer.kernels import copy_rows
from minidisagg.transfer.links import Carried, CorruptError, LinkError, LinkSetup
from minidisagg.transfer.rows import alike, cache_rows

DESCRIPTION_BYTES = 4096


class CacheHandle(msgspec.Struct, frozen=True):
    """What the destination says of its memory; `shared` is what torch's storages give and take."""

    shape: tuple[int, ...]
    dtype: str
    link_epoch: int
    shared: tuple[int, bytes, int, int, bytes, int, bytes, bool]


class CudaIpcLink(GpuLink):
    """The source has the destination's rows; the destination only waits to be told."""

    one_sided = True

    def __init__(self, setup: LinkSetup) -> None:
        self._remote: Tensor | None = None  # the destination's planes [2 * layers, pages, words]
        super().__init__(setup)

    def endpoint(self) -> str:
        """The path of the socket that passes the handle."""
        if self._listener is None:
            raise LinkError("only the destination's end has an endpoint")
        return str(self._listener.path)

    def _open(self, endpoint: str) -> None:
        if self._listener is not None:
            peer = self._peer = self._listener.accept()
            peer.settimeout(self.host.timeout)
            kv = self.host.kv
            shared = kv.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
            handle = CacheHandle(tuple(kv.shape), str(kv.dtype), self.setup.link_epoch, shared)
            peer.sendall(msgspec.msgpack.encode(handle))
            if peer.recv(1) != b"+":
                raise LinkError("the source did not map the cache")
            return
        peer = self._peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(self.host.timeout)
        peer.connect(endpoint)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self._remote = self._map(msgspec.msgpack.decode(peer.recv(DESCRIPTION_BYTES), type=CacheHandle))
            self._remote[:1, :1, :1].clone()  # the first access sets the mapping up
            self.warm_up()
        peer.sendall(b"+")

    def _map(self, theirs: CacheHandle) -> Tensor:
        kv = self.host.kv
        if not alike(kv, theirs.shape, theirs.dtype) or theirs.link_epoch != self.setup.link_epoch:
            raise LinkError(f"the destination's cache is {theirs.shape} {theirs.dtype}, not like this one")
        _, *rest = theirs.shared
        storage = torch.UntypedStorage._new_shared_cuda(self.device.index, *rest)
        remote = torch.empty(0, dtype=kv.dtype, device=self.device)
        stride = torch.empty(theirs.shape, device="meta").stride()
        return planes(cache_rows(remote.set_(storage, 0, theirs.shape, stride)))

    def _ready(self, waiting: Waiting) -> int:
        return self.together(waiting) if self.setup.source else 1

    def _post(self, piece: Piece, together: int, arrives: float) -> Finish:
        checksum, codec = self.checksum(piece), self.codec(piece)
        if piece.send:
            remote = self._remote
            if remote is None:
                raise LinkError("the link is not connected")
            if len(piece.remote) != piece.count or not 0 <= min(piece.remote) <= max(piece.remote) < remote.shape[1]:
                raise LinkError(f"remote pages are not {piece.count} of the peer's {remote.shape[1]}")
            mine, theirs = self.pages(piece.pages, piece.remote)
            if codec.in_place:
                layers = slice(2 * piece.layers[0], 2 * piece.layers[1])  # keys and values
                copy_rows(self.planes[layers], mine, remote[layers], theirs, PROGRAMS)
            else:
                for block, part in self.parts(piece, mine, CODED_BYTES):
                    wire = planes(Staging(self.device).rows(codec, block))
                    self.gather(part, wire)
                    head(codec, remote[part.planes]).index_copy_(1, theirs[block.pages], wire)
        elif not codec.in_place and -1 not in piece.pages:
            (mine,) = self.pages(piece.pages)
            for _, part in self.parts(piece, mine, CODED_BYTES):
                self.scatter(part, head(codec, self.planes[part.planes]).index_select(1, part.there))

        def finish() -> Carried:
            value = 0 if checksum is None else checksum.value()
            if checksum is not None and not piece.send and value != piece.checksum:
                raise CorruptError(f"checksum mismatch in piece {piece.seq}")
            return Carried(value, arrives)

        return finish

    def _rest(self) -> None:
        if self._flying:
            self._flying[0].event.synchronize()  # what writes waits for nobody: this ends, even if the peer is dead
        else:
            super()._rest()

    def _check_peer(self) -> None:
        if self._peer is not None and select.select([self._peer], [], [], 0)[0]:
            raise LinkError("the peer closed its end")

    def _drop(self) -> None:
        self.stream.synchronize()
        self._remote = None  # the last reference: this unmaps
        super()._drop()

    def _fenced(self, peer_dead: bool) -> bool:
        return self.setup.source or peer_dead

"""`tcp` and `unix`: sockets. The reference and the fallback.

Rows go from the source's pages to the destination's without a copy on either side (scatter and gather over the cache's
memory), followed by a trailer. Closing the socket releases the thread at once, and the kernel then takes nothing more
from the peer: that is the fence, and a peer's death is an end of file.
"""

from __future__ import annotations

import hmac
import re
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Codec, Staging
from minidisagg.transfer.links import Carried, LinkError, LinkSetup, ThreadLink, Trailer
from minidisagg.transfer.rows import Block, Checksum, run_views

BLOCK_BYTES = 4 << 20  # checksum and socket take turns on what is still in the CPU's cache
SOCKET_BUFFER = 4 << 20
IOV_MAX = 1024
TOKEN_BYTES = 16
TOKEN_SECONDS = 1.0  # the source shows it at once


class UnixListener:
    """A Unix socket in a private directory, waiting for one peer; its path is gone as soon as the peer has come."""

    def __init__(self, setup: LinkSetup) -> None:
        self.path = setup.host.run_dir / f"{re.sub(r'[^A-Za-z0-9]+', '-', setup.pair)}.{setup.link_epoch}.sock"
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self.socket.bind(str(self.path))
        except OSError as failure:
            self.socket.close()
            raise ValueError(f"cannot listen at {self.path}: {failure}") from failure
        self.socket.listen(1)
        self.socket.settimeout(setup.host.timeout)

    def accept(self) -> socket.socket:
        """The peer's connection; only this user can reach the directory."""
        peer, _ = self.socket.accept()
        self.close()
        return peer

    def release(self) -> None:
        """Make `accept` in another thread raise."""
        shut_down(self.socket)

    def close(self) -> None:
        """Stop listening and remove the path."""
        self.path.unlink(missing_ok=True)
        self.socket.close()


def shut_down(sock: socket.socket) -> None:
    """Wake whoever blocks on the socket. It is closed later, so that no thread meets another file under its number."""
    with suppress(OSError):  # not connected, or closed before: nobody blocks on it
        sock.shutdown(socket.SHUT_RDWR)


class TcpListener:
    """A loopback socket, waiting for the one peer that knows the token in the endpoint."""

    def __init__(self, setup: LinkSetup) -> None:
        self.token = secrets.token_hex(TOKEN_BYTES // 2).encode()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self._timeout = setup.host.timeout

    def accept(self) -> socket.socket:
        """The first connection that shows the token; others, of whatever process, are closed."""
        deadline = time.monotonic() + self._timeout
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            peer, _ = self.socket.accept()
            peer.settimeout(min(left, TOKEN_SECONDS))
            shown = bytearray(TOKEN_BYTES)
            with suppress(OSError, LinkError):  # whoever does not show it in time is not the source
                read_all(peer, [memoryview(shown)])
            if hmac.compare_digest(shown, self.token):
                self.close()
                return peer
            peer.close()
        raise LinkError("the source did not connect")

    def release(self) -> None:
        """Make `accept` in another thread raise."""
        shut_down(self.socket)

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()


class StreamLink(ThreadLink):
    """One connected socket; its thread blocks in sendmsg or recvmsg."""

    def __init__(self, setup: LinkSetup) -> None:
        self._socket: socket.socket | None = None
        self._listener: UnixListener | TcpListener | None = None
        if not setup.source:
            self._listener = UnixListener(setup) if setup.host.kind == "unix" else TcpListener(setup)
        self._staging = Staging(setup.host.kv.device)
        super().__init__(setup)

    def endpoint(self) -> str:
        """The socket's path, or `host:port/token`."""
        if isinstance(self._listener, UnixListener):
            return str(self._listener.path)
        if isinstance(self._listener, TcpListener):
            return f"127.0.0.1:{self._listener.socket.getsockname()[1]}/{self._listener.token.decode()}"
        raise LinkError("only the destination's end has an endpoint")

    def _open(self, endpoint: str) -> None:
        if self._listener is not None:
            peer = self._listener.accept()
        elif self.host.kind == "unix":
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(self.host.timeout)
            peer.connect(endpoint)
        else:
            address, _, token = endpoint.partition("/")
            host, _, port = address.rpartition(":")
            peer = socket.create_connection((host, int(port)), self.host.timeout)
            peer.sendall(token.encode())
        if self.host.kind == "tcp":
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        block_with_deadline(peer, self.host.timeout)
        self._socket = peer
        if self.closing:
            raise LinkError("the link was aborted")

    def _carry(self, piece: Piece, arrives: float) -> Carried:
        if self._socket is None:
            raise LinkError("the link is not connected")
        codec, checksum, nbytes = self.codec(piece), Checksum(piece), self.wire_bytes(piece)
        for block in self.blocks(piece, BLOCK_BYTES):
            if piece.send:
                self._send(self._socket, codec, checksum, piece, block)
            elif piece.pages:
                self._receive(self._socket, codec, checksum, piece, block)
            else:
                wire = self._staging.rows(codec, block)
                read_all(self._socket, slabs([wire]))
                checksum.add(block, wire)
        if piece.send:
            carried = Carried(checksum.value(), arrives)
            write_all(self._socket, [memoryview(Trailer.pack(piece, nbytes, carried))])
            return carried
        trailer = bytearray(Trailer.SIZE)
        read_all(self._socket, [memoryview(trailer)])
        return Trailer.verify(bytes(trailer), piece, nbytes, checksum.value())

    def _send(self, sock: socket.socket, codec: Codec, checksum: Checksum, piece: Piece, block: Block) -> None:
        runs = self._runs(codec, piece, block)
        write_all(sock, slabs([codec.pack(checksum, part, rows, room) for part, rows, room in runs]))

    def _receive(self, sock: socket.socket, codec: Codec, checksum: Checksum, piece: Piece, block: Block) -> None:
        runs = self._runs(codec, piece, block)
        read_all(sock, slabs([wire for _, _, wire in runs]))
        for part, rows, wire in runs:
            checksum.add(part, wire)
            codec.decode(wire, rows)

    def _runs(self, codec: Codec, piece: Piece, block: Block) -> list[tuple[Block, Tensor, Tensor]]:
        """The block's runs of pages: each part with its rows in the cache, and where its wire rows are or go."""
        found = run_views(block, piece.layers[0], (self.rows, piece.pages))
        if codec.in_place:
            return [(part, rows, rows) for part, (rows,) in found]
        room = self._staging.rows(codec, block)
        return [(part, rows, room[:, :, block.place(part)]) for part, (rows,) in found]

    def _interrupt(self) -> None:
        if self._listener is not None:
            self._listener.release()
        if self._socket is not None:
            shut_down(self._socket)

    def _drop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._socket is not None:
            self._socket.close()


def block_with_deadline(sock: socket.socket, seconds: float) -> None:
    """Let the kernel do the waiting: one call for a whole block, where Python's own timeouts poll before each part."""
    sock.settimeout(None)
    deadline = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, deadline)


def slabs(parts: Sequence[Tensor]) -> list[memoryview]:
    """The memory of the wire rows of a block's parts, in the order of the wire: layers, keys and values, pages."""
    arrays = [part.numpy() for part in parts]
    layers, kinds = arrays[0].shape[:2]
    return [
        memoryview(array[layer, kind]).cast("B") for layer in range(layers) for kind in range(kinds) for array in arrays
    ]


def move_all(step: Callable[[list[memoryview]], int], buffers: list[memoryview]) -> None:
    """Repeat `step` on what is left of the buffers until nothing is; raises `LinkError` at the end of the stream."""
    first = 0
    while first < len(buffers):
        try:
            moved = step(buffers[first : first + IOV_MAX])
        except BlockingIOError as failure:
            raise LinkError("the peer did not answer in time") from failure
        if moved == 0:
            raise LinkError("the peer closed the link")
        while first < len(buffers) and moved >= len(buffers[first]):
            moved -= len(buffers[first])
            first += 1
        if moved:
            buffers[first] = buffers[first][moved:]


def write_all(sock: socket.socket, buffers: list[memoryview]) -> None:
    """Gather the buffers into the socket; each wait in it is bounded by the socket's deadline."""
    move_all(sock.sendmsg, buffers)


def read_all(sock: socket.socket, buffers: list[memoryview]) -> None:
    """Scatter the stream over the buffers until they are full."""
    move_all(lambda left: sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0], buffers)

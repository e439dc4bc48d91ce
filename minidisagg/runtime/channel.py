"""Framed message channels over asyncio streams: FIFO per pair, bounded, one frame per `Envelope`.

A frame is a 4-byte little-endian length and a payload of `core/frames.py`. Sockets live in a directory of mode 0700.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

from msgspec import MsgspecError

from minidisagg.core.frames import decode, encode
from minidisagg.core.messages import Envelope
from minidisagg.formats import VersionError

MAX_FRAME = 64 << 20  # bytes
MAX_BACKLOG = 256 << 20  # bytes written and not yet taken by the peer: beyond that it is as good as dead
_LENGTH = struct.Struct("<I")


class ChannelError(ConnectionError):
    """The peer sent something that is no frame, or does not read."""


class Channel:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, envelope: Envelope) -> None:
        """Queue one message; never blocks. Raises `ChannelError` if the peer has not read for too long.

        What is sent after the connection has broken is dropped, as what was under way is.
        """
        data = encode(envelope)
        if len(data) > MAX_FRAME:
            raise ChannelError(f"a message of {len(data)} bytes exceeds a frame")
        if self._writer.transport.is_closing():
            return  # the peer is gone, and its parent will say so; uvloop would raise
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            raise ChannelError("the peer does not read")
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def __aiter__(self) -> AsyncIterator[Envelope]:
        """Messages until the peer closes; a connection that breaks ends the iteration too."""
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > MAX_FRAME:
                    raise ChannelError(f"a frame of {length} bytes is too large")
                yield decode(await self._reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
                return
            except VersionError as error:
                raise ChannelError(str(error)) from error
            except MsgspecError as error:
                raise ChannelError(f"malformed message: {error}") from error

    def close(self) -> None:
        """Close at once; what is queued may be lost."""
        self._writer.close()


async def connect(address: str) -> Channel:
    """Open a channel to `unix:PATH` or `tcp:HOST:PORT`."""
    kind, _, where = address.partition(":")
    if kind == "unix":
        return Channel(*await asyncio.open_unix_connection(where))
    host, _, port = where.rpartition(":")
    return Channel(*await asyncio.open_connection(host, int(port)))


async def listen(path: str, serve: Callable[[Channel], Awaitable[None]]) -> asyncio.Server:
    """Serve channels on a Unix socket; `serve` runs as one task per connection."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        try:
            await serve(channel)
        finally:
            channel.close()

    return await asyncio.start_unix_server(on_connection, path)

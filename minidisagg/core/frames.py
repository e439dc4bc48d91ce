"""A message as bytes: a byte that says the format's version, and msgpack."""

from __future__ import annotations

import msgspec

from minidisagg.core.messages import Envelope
from minidisagg.formats import check_version

FRAME_VERSION = 6

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    """One frame's payload."""
    return bytes([FRAME_VERSION]) + _encoder.encode(envelope)


def decode(data: bytes | bytearray | memoryview) -> Envelope:
    """Raises `VersionError`, and `msgspec.MsgspecError` on anything that is not a well-formed message."""
    check_version("a message", data[0] if data else None, FRAME_VERSION)
    return _decoder.decode(memoryview(data)[1:])

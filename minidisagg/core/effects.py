"""What a core asks of its driver besides running a step: send, move bytes, open or give up a link, kill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from msgspec import Struct

from minidisagg.core.messages import AnyMessage
from minidisagg.core.plan import Piece


class Send(Struct, frozen=True, array_like=True):
    """Put this message on the channel to `dest` (a worker's name or the router); FIFO per pair."""

    dest: str
    body: AnyMessage


class OpenLink(Struct, frozen=True, array_like=True):
    """Source: set up the link to `peer` under this epoch; transfers that are started meanwhile wait for it."""

    peer: str
    link_epoch: int


class StartPiece(Struct, frozen=True, array_like=True):
    """Start this piece; it comes back as `PieceDone`."""

    piece: Piece


class AbortLink(Struct, frozen=True, array_like=True):
    """Give the link up; `AbortConfirmed` says when nothing of it can touch this worker's pages any more."""

    peer: str
    link_epoch: int
    outgoing: bool
    peer_dead: bool


class LoadPages(Struct, frozen=True, array_like=True):
    """Fill these pages with what the store has under these digests, from the first on; `Loaded` says how far."""

    request_id: str
    incarnation: int
    digests: list[bytes]
    pages: list[int]


class SavePage(Struct, frozen=True, array_like=True):
    """Write the page to the store some time; until `Saved` it stays as it is."""

    digest: bytes
    page: int


Effect = Send | OpenLink | StartPiece | AbortLink | LoadPages | SavePage

E = TypeVar("E")


def drain(outbox: list[E]) -> Iterator[E]:
    """Take the effects out, those that carrying them out adds included."""
    while outbox:
        effects = outbox[:]
        outbox.clear()  # the list itself is what its owners emit into
        yield from effects

"""The ledger of pieces: what is on each link, in which order, since when, and whose it is.

A piece is some pages and some layers on one link. Its owner (a handoff) is told when it has landed, and when its link
is given up. Any failed piece gives up the whole link, since nothing behind it can be trusted; the next piece to that
peer opens the link under a new epoch. The ledger knows nothing of requests.

    source                                   destination
    KVPiece   ─────────────────────────────▶ receive posted, in the order of the link's sequence numbers
      bytes   ═══════════ link ════════════▶ (a one-sided link writes first, and announces then)

A page that a peer may still write to is free again in two ways only: what was started into it has landed, or the abort
of the link is confirmed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from minidisagg.core.effects import AbortLink, Effect, OpenLink, Send, StartPiece
from minidisagg.core.inputs import PieceDone
from minidisagg.core.messages import ROUTER, Fatal, KVPiece, LinkAborted
from minidisagg.core.plan import Piece, SeqKey
from minidisagg.core.spec import EngineSpec

EPOCH_BITS = 20  # a link epoch is the source's epoch and a count of this many bits


class Owner(Protocol):
    """Whose pieces they are. All pieces of one owner use one link epoch."""

    codec: str  # and one codec

    @property
    def key(self) -> SeqKey:
        """Names it at both ends."""
        ...

    def landed(self) -> None:
        """One of its pieces has left (source) or arrived (destination)."""
        ...

    def cut(self, reason: str) -> None:
        """Its link is being given up; its pages may still be touched."""
        ...

    def lost(self) -> None:
        """After `cut`: nothing can touch its pages any more."""
        ...


class Taker(Owner, Protocol):
    """An owner at the destination."""

    def expect(self, first: int, count: int, now: float) -> list[int]:
        """A piece is on its way: the pages where it goes, `count` from the owner's `first` on."""
        ...


@dataclass
class Outlet:
    """Source: the current link to one peer."""

    epoch: int
    next_seq: int = 0
    owners: dict[SeqKey, Owner] = field(default_factory=dict)
    flying: dict[int, tuple[Owner, KVPiece]] = field(default_factory=dict)  # by sequence number
    deadline: float = 0.0  # for the oldest piece


@dataclass
class Inlet:
    """Destination: one link epoch of one source."""

    next_seq: int = 0
    owners: dict[SeqKey, Taker] = field(default_factory=dict)
    early: dict[int, KVPiece] = field(default_factory=dict)  # announced out of order
    flying: dict[int, Taker | None] = field(default_factory=dict)
    deadline: float = 0.0


class SourceLedger:
    """All pieces that this worker sends."""

    def __init__(self, spec: EngineSpec, emit: Callable[[Effect], None]) -> None:
        self.links: dict[str, Outlet] = {}  # by peer
        self.aborting: dict[tuple[str, int], Outlet] = {}  # by peer and epoch
        self._spec, self._emit = spec, emit
        self._next_epoch = spec.epoch << EPOCH_BITS  # link epochs grow over a worker's restarts

    def join(self, owner: Owner, peer: str) -> int:
        """This owner will send pieces to `peer`; opens the link if there is none. Returns the link's epoch."""
        link = self.links.get(peer)
        if link is None:
            self._next_epoch += 1
            link = self.links[peer] = Outlet(self._next_epoch)
            self._emit(OpenLink(peer, link.epoch))
        link.owners[owner.key] = owner
        return link.epoch

    def leave(self, owner: Owner, peer: str) -> None:
        """It has no piece on the link, and starts none."""
        if peer in self.links:
            self.links[peer].owners.pop(owner.key, None)

    def start(
        self,
        owner: Owner,
        peer: str,
        first: int,
        pages: list[int],
        remote: list[int],
        layers: tuple[int, int],
        now: float,
    ) -> None:
        """Send these layers (half-open) of these pages, the owner's from `first` on, to the peer's pages `remote`."""
        link, (request_id, incarnation), count = self.links[peer], owner.key, len(pages)
        message = KVPiece(
            request_id, incarnation, link.epoch, link.next_seq, first, count, layers, codec=owner.codec
        )  # fmt: skip
        if not link.flying:
            link.deadline = now + self._spec.link_timeout
        link.flying[message.seq] = owner, message
        link.next_seq += 1
        if not self._spec.one_sided_links:
            self._emit(Send(peer, message))
        piece = Piece(
            peer, link.epoch, message.seq, True, request_id, incarnation, pages, remote, count, layers,
            codec=owner.codec,
        )  # fmt: skip
        self._emit(StartPiece(piece))

    def on_piece_done(self, done: PieceDone, now: float) -> None:
        """A piece has left, or the link is broken."""
        link = self.links.get(done.peer)
        if link is None or link.epoch != done.link_epoch:
            return  # of a link that is being aborted; its confirmation settles everything
        if not done.ok:
            self.abort(done.peer, peer_dead=False, reason=done.error)
        elif done.seq in link.flying:
            owner, message = link.flying.pop(done.seq)
            link.deadline = now + self._spec.link_timeout
            if self._spec.one_sided_links:
                self._emit(Send(done.peer, replace(message, checksum=done.checksum)))
            owner.landed()

    def abort(self, peer: str, peer_dead: bool, reason: str = "") -> None:
        """Give up the current link to `peer`."""
        link = self.links.pop(peer, None)
        if link is not None:
            for owner in link.owners.values():
                owner.cut(f"link to {peer} lost{reason and ': '}{reason}")
            self.aborting[peer, link.epoch] = link
            self._emit(AbortLink(peer, link.epoch, True, peer_dead))

    def on_peer_aborted(self, peer: str, link_epoch: int) -> None:
        """The destination has given the link up."""
        link = self.links.get(peer)
        if link is not None and link.epoch == link_epoch:
            self.abort(peer, peer_dead=False)
        elif (peer, link_epoch) not in self.aborting:
            self._emit(Send(peer, LinkAborted(link_epoch, True)))  # long over: it may have missed the answer

    def on_aborted(self, peer: str, link_epoch: int) -> None:
        """Nothing reads from or writes to the link any more."""
        link = self.aborting.pop((peer, link_epoch), None)
        for owner in link.owners.values() if link is not None else ():
            owner.lost()
        self._emit(Send(peer, LinkAborted(link_epoch, True)))

    def on_tick(self, now: float) -> None:
        """Abort links that have stood still."""
        for peer, link in list(self.links.items()):
            if link.flying and now > link.deadline:
                self.abort(peer, peer_dead=False, reason="no progress")


class DestinationLedger:
    """All pieces that come to this worker."""

    def __init__(self, spec: EngineSpec, emit: Callable[[Effect], None]) -> None:
        self.links: dict[tuple[str, int], Inlet] = {}  # by source and epoch
        self.aborting: dict[tuple[str, int], tuple[float, list[Taker]]] = {}  # until when the source may confirm it
        self._spec, self._emit = spec, emit
        self._dead: dict[str, int] = {}  # per source, the highest epoch of its process that is known to be dead
        self._oldest: dict[str, int] = {}  # per source, the lowest link epoch that is not given up

    def is_dead(self, source: str, link_epoch: int) -> bool:
        """This link epoch has been given up, or an epoch after it has."""
        return link_epoch < self._oldest.get(source, 0)

    def join(self, owner: Taker, source: str, link_epoch: int) -> None:
        """Pieces for this owner will come over this link."""
        self.links.setdefault((source, link_epoch), Inlet()).owners[owner.key] = owner

    def leave(self, owner: Taker, source: str, link_epoch: int) -> None:
        """All that was started for it has landed."""
        link = self.links.get((source, link_epoch))
        if link is not None:
            link.owners.pop(owner.key, None)
            if not (link.owners or link.early or link.next_seq):  # nothing has come through it: no use to give it up
                del self.links[source, link_epoch]

    def on_piece(self, peer: str, message: KVPiece, now: float) -> None:
        """Post the receive, strictly in the order of sequence numbers."""
        if self.is_dead(peer, message.link_epoch):
            return
        link = self.links.setdefault((peer, message.link_epoch), Inlet())
        if message.seq >= link.next_seq:
            link.early.setdefault(message.seq, message)
        while link.next_seq in link.early:
            message = link.early.pop(link.next_seq)
            owner = link.owners.get((message.request_id, message.incarnation))
            # of an owner that is gone the bytes still have to be taken off the wire
            pages = owner.expect(message.first, message.count, now) if owner is not None else []
            if not link.flying:
                link.deadline = now + self._spec.link_timeout
            link.flying[message.seq] = owner
            link.next_seq += 1
            piece = Piece(
                peer=peer,
                link_epoch=message.link_epoch,
                seq=message.seq,
                send=False,
                request_id=message.request_id,
                incarnation=message.incarnation,
                pages=pages,
                remote=[],
                count=message.count,
                layers=message.layers,
                checksum=message.checksum,
                codec=message.codec,
            )
            self._emit(StartPiece(piece))

    def on_piece_done(self, done: PieceDone, now: float) -> None:
        """A piece has landed, or the link is broken."""
        where = done.peer, done.link_epoch
        if not done.ok:  # of a link, it may be, over which nothing has come yet: it was not connected
            if not self.is_dead(*where):
                self.abort(*where, peer_dead=False, now=now)
        elif where in self.links:
            link = self.links[where]
            owner = link.flying.pop(done.seq, None)
            link.deadline = now + self._spec.link_timeout
            if owner is not None:
                owner.landed()

    def abort(self, peer: str, link_epoch: int, peer_dead: bool, now: float) -> None:
        """Give the link up: its owners quarantine every page that its source may still write to."""
        where = peer, link_epoch
        peer_dead = peer_dead or link_epoch >> EPOCH_BITS <= self._dead.get(peer, -1)
        owners = list(self.links.pop(where, Inlet()).owners.values())
        self._oldest[peer] = max(link_epoch + 1, self._oldest.get(peer, 0))
        for owner in owners:
            owner.cut("")
        _, before = self.aborting.get(where, (0.0, []))
        self.aborting[where] = now + self._spec.lease, before + owners
        if not peer_dead:
            self._emit(Send(peer, LinkAborted(link_epoch, False)))
        self._emit(AbortLink(peer, link_epoch, False, peer_dead))

    def on_aborted(self, peer: str, link_epoch: int) -> None:
        """Confirmed: the source will not write through this link again."""
        _, owners = self.aborting.pop((peer, link_epoch), (0.0, []))
        for owner in owners:
            owner.lost()

    def on_peer_aborted(self, peer: str, link_epoch: int, now: float) -> None:
        """The source has stopped for good: that confirms this end's abort too, or begins it."""
        if (peer, link_epoch) in self.aborting:
            self._emit(AbortLink(peer, link_epoch, False, True))
        elif (peer, link_epoch) in self.links or not self.is_dead(peer, link_epoch):
            self.abort(peer, link_epoch, True, now)

    def on_peer_down(self, peer: str, epoch: int, now: float) -> None:
        """The source's processes up to this epoch are dead; their links still have to be taken down at this end."""
        self._dead[peer] = max(epoch, self._dead.get(peer, -1))
        for source, link_epoch in self.aborting:
            if source == peer and link_epoch >> EPOCH_BITS <= epoch:
                self._emit(AbortLink(peer, link_epoch, False, True))
        for source, link_epoch in sorted(self.links):
            if source == peer and link_epoch >> EPOCH_BITS <= epoch:
                self.abort(peer, link_epoch, True, now)

    def on_tick(self, now: float) -> None:
        """Abort links whose pieces do not land, or do not come in order."""
        timeout = self._spec.link_timeout
        for (peer, link_epoch), link in list(self.links.items()):
            if (link.flying and now > link.deadline) or (link.early and now > link.deadline + timeout):
                self.abort(peer, link_epoch, peer_dead=False, now=now)

    def accuse(self, now: float) -> None:
        """A source that does not confirm that it has stopped must be killed."""
        for (peer, link_epoch), (deadline, owners) in list(self.aborting.items()):
            if now > deadline:
                self.aborting[peer, link_epoch] = now + self._spec.lease, owners
                reason = f"does not confirm the abort of link {link_epoch}"
                self._emit(Send(ROUTER, Fatal(reason, peer, link_epoch >> EPOCH_BITS)))

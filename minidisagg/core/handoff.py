"""The handoff of a request's KV between two workers: offer → grant → chunk … → done → ack.

    source                                   destination
    KVOffer   ─────────────────────────────▶ pages reserved (INFLIGHT), or the offer waits
              ◀───────────────────────────── KVWait, now and then, or KVGrant
    KVBusy    ─────────────────────────────▶ now and then, while the source computes
    KVPiece   ─────────────────────────────▶ receive posted, in the order of the link's sequence numbers
      bytes   ═══════════ link ════════════▶
    KVDone    ─────────────────────────────▶ all pieces landed: pages LIVE, the request decodes here
              ◀───────────────────────────── KVAck: the source releases its pages

A reserved page leaves INFLIGHT in three ways only: everything that the source ever started has landed (after `KVDone`
or `KVCancel`, which count the pieces), or the abort of the link is confirmed. Whoever wants out asks the other side
(`KVCancel`, `KVFailed`) and waits. Any failed piece gives up the whole link: all transfers on it are recomputed, and
the next one opens the link under a new epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from minidisagg.core.blocks import BlockPool
from minidisagg.core.effects import AbortLink, Effect, OpenLink, Send, StartPiece
from minidisagg.core.inputs import PieceDone
from minidisagg.core.messages import (
    ROUTER,
    Fatal,
    KVAck,
    KVBusy,
    KVCancel,
    KVDone,
    KVFailed,
    KVGrant,
    KVOffer,
    KVPiece,
    KVWait,
    LinkAborted,
)
from minidisagg.core.plan import Piece, SeqKey
from minidisagg.core.request import Request

REMEMBERED = 4096  # ended handoffs whose chunk count is still known
EPOCH_BITS = 20  # a link epoch is the source's epoch and a count of this many bits


@dataclass
class Outgoing:
    """Source side of one handoff."""

    request: Request
    peer: str
    link_epoch: int
    deadline: float
    pages: list[int] | None = None  # the destination's, once granted
    started: int = 0  # pages of the block table that the link has, or that the destination held before
    flying: int = 0  # pieces on the link
    pieces: int = 0  # pieces started
    first_token: int | None = None  # prefill is complete
    done: bool = False  # KVDone is sent
    acked: bool = False  # the destination has it; only completions at this end are missing
    stopping: bool = False  # KVCancel follows when the last piece has landed
    lost: str = ""  # why its link is being aborted: only the confirmation ends it


@dataclass
class Incoming:
    """Destination side of one handoff."""

    request: Request
    source: str
    link_epoch: int
    reserved: list[int]
    deadline: float
    posted: int = 0  # pieces whose receive has been started
    landed: int = 0  # and has ended
    expected: int | None = None  # pieces in all, known with KVDone or KVCancel
    first_token: int | None = None
    dropped: bool = False  # nobody wants the request any more
    quarantined: bool = False  # its link is being aborted


@dataclass
class OutLink:
    """The current link to one destination."""

    epoch: int
    next_seq: int = 0
    flying: dict[int, KVPiece] = field(default_factory=dict)
    deadline: float = 0.0  # for the oldest piece


@dataclass
class InLink:
    """One link epoch from one source."""

    next_seq: int = 0
    early: dict[int, KVPiece] = field(default_factory=dict)  # arrived out of order
    flying: dict[int, SeqKey] = field(default_factory=dict)
    deadline: float = 0.0


class Sender:
    """All handoffs for which this worker is the source."""

    def __init__(
        self,
        worker_epoch: int,
        page_size: int,
        num_layers: int,
        one_sided: bool,
        lease: float,
        timeout: float,
        emit: Callable[[Effect], None],
        ended: Callable[[Request, str], None],
    ) -> None:
        """`ended(request, failure)` is called when the pages are no longer needed; an empty failure means success."""
        self.page_size = page_size
        self.num_layers = num_layers
        self.one_sided = one_sided
        self.lease = lease
        self.timeout = timeout
        self._emit = emit
        self._ended = ended
        self._next_epoch = worker_epoch << EPOCH_BITS  # link epochs grow over a worker's restarts
        self.transfers: dict[SeqKey, Outgoing] = {}
        self.links: dict[str, OutLink] = {}
        self._aborting: dict[tuple[str, int], list[Outgoing]] = {}
        self._past: OrderedDict[SeqKey, int] = OrderedDict()  # pieces of handoffs that are over

    @property
    def busy(self) -> bool:
        """A handoff or an abort is under way."""
        return bool(self.transfers or self._aborting)

    def offer(self, request: Request, peer: str, now: float, fingerprint: str) -> None:
        """Ask `peer` for pages; called when the request's first chunk is scheduled, or later (late binding)."""
        link = self.links.get(peer)
        if link is None:
            self._next_epoch += 1
            link = self.links[peer] = OutLink(self._next_epoch)
            self._emit(OpenLink(peer, link.epoch))
        self.transfers[request.key] = Outgoing(request, peer, link.epoch, now + self.lease)
        spec = replace(request.spec, cohort=request.cohort)
        self._emit(Send(peer, KVOffer(*request.key, spec, fingerprint, link.epoch)))

    def on_grant(self, peer: str, message: KVGrant, now: float) -> None:
        """Start with what is computed already. A grant for a handoff that is over gets its `KVCancel` again."""
        key = message.request_id, message.incarnation
        transfer = self.transfers.get(key)
        if transfer is None:
            self._emit(Send(peer, KVCancel(*key, self._past.get(key, 0))))
        elif transfer.peer == peer and transfer.pages is None and not transfer.stopping:
            transfer.pages = message.pages
            transfer.started = message.skip
            self.advance(transfer.request, now)

    def on_wait(self, peer: str, message: KVWait, now: float) -> None:
        """The offer stands in the destination's queue: its lease begins anew."""
        transfer = self.transfers.get((message.request_id, message.incarnation))
        if transfer is not None and transfer.peer == peer:
            transfer.deadline = now + self.lease

    def advance(self, request: Request, now: float) -> None:
        """Push what has been computed since: whole pages, and the partial last one when prefill is complete."""
        transfer = self.transfers[request.key]
        transfer.deadline = now + self.lease
        if transfer.pages is None or transfer.stopping or transfer.done:
            return
        complete = request.num_computed >= request.prefill_len
        total = -(-request.prefill_len // self.page_size)
        ready = total if complete else request.num_computed // self.page_size
        if ready > transfer.started:
            self._start(transfer, ready - transfer.started, now)
        if transfer.first_token is not None and transfer.started == total:
            transfer.done = True
            self._emit(Send(transfer.peer, KVDone(*request.key, transfer.pieces, transfer.first_token)))

    def finish_prefill(self, request: Request, token: int, now: float) -> None:
        """The first token is known: the last pages go out, and `KVDone` with it."""
        self.transfers[request.key].first_token = token
        self.advance(request, now)

    def stop(self, request: Request) -> None:
        """End the handoff from this side: no new piece, `KVCancel` once those on the link have landed."""
        transfer = self.transfers[request.key]
        if not transfer.stopping:
            transfer.stopping = True
            self._settle(transfer)

    def on_failed(self, peer: str, message: KVFailed) -> str | None:
        """The destination wants out. Returns why if that concerns a live handoff, which is then to be stopped."""
        key = message.request_id, message.incarnation
        transfer = self.transfers.get(key)
        if transfer is None:
            self._emit(Send(peer, KVCancel(*key, self._past.get(key, 0))))
        elif transfer.peer == peer and not transfer.stopping:
            return message.reason
        return None

    def on_ack(self, peer: str, message: KVAck, _: float) -> None:
        """The destination has it all."""
        transfer = self.transfers.get((message.request_id, message.incarnation))
        if transfer is not None and transfer.peer == peer and transfer.done:
            # Its own completions may not have come in yet, and they read from the pages.
            transfer.acked = transfer.stopping = True
            self._settle(transfer)

    def on_piece_done(self, done: PieceDone, now: float) -> None:
        """A piece has left, or the link is broken."""
        link = self.links.get(done.peer)
        if link is None or link.epoch != done.link_epoch:
            return  # of a link that is being aborted; its confirmation settles everything
        if not done.ok:
            self.abort_link(done.peer, peer_dead=False, reason=done.error)
            return
        chunk = link.flying.pop(done.seq, None)
        if chunk is None:
            return
        link.deadline = now + self.timeout
        if self.one_sided:
            self._emit(Send(done.peer, KVPiece(
                chunk.request_id, chunk.incarnation, chunk.link_epoch, chunk.seq, chunk.first, chunk.count,
                chunk.layers, done.checksum,
            )))  # fmt: skip
        transfer = self.transfers.get((chunk.request_id, chunk.incarnation))
        if transfer is not None:
            transfer.flying -= 1
            if transfer.stopping:
                self._settle(transfer)

    def abort_link(self, peer: str, peer_dead: bool, reason: str = "") -> None:
        """Give up the current link to `peer`, and with it every handoff that uses it."""
        link = self.links.pop(peer, None)
        if link is not None:
            lost = [transfer for transfer in self.transfers.values() if transfer.link_epoch == link.epoch]
            for transfer in lost:
                transfer.stopping, transfer.lost = True, f"link to {peer} lost{reason and ': '}{reason}"
            self._aborting[peer, link.epoch] = lost
            self._emit(AbortLink(peer, link.epoch, True, peer_dead))

    def on_peer_aborted(self, peer: str, link_epoch: int) -> None:
        """The destination has given the link up."""
        link = self.links.get(peer)
        if link is not None and link.epoch == link_epoch:
            self.abort_link(peer, peer_dead=False)
        elif (peer, link_epoch) not in self._aborting:
            self._emit(Send(peer, LinkAborted(link_epoch, True)))  # long over: it may have missed the answer

    def on_aborted(self, peer: str, link_epoch: int) -> None:
        """Nothing reads from or writes to the link any more."""
        for transfer in self._aborting.pop((peer, link_epoch), ()):
            self._emit(Send(peer, KVCancel(*transfer.request.key, transfer.pieces)))
            self._forget(transfer, "" if transfer.acked else transfer.lost)
        self._emit(Send(peer, LinkAborted(link_epoch, True)))

    def renew(self) -> None:
        """Tell the destinations of what is still being computed that their pages are not forgotten."""
        for transfer in self.transfers.values():
            if transfer.pages is not None and transfer.first_token is None and not transfer.stopping:
                self._emit(Send(transfer.peer, KVBusy(*transfer.request.key)))

    def on_tick(self, now: float, computes: bool) -> list[Request]:
        """Abort links that have stood still; returns requests whose lease is over, which does not run while this
        worker `computes` what they are to hand over."""
        for transfer in self.transfers.values():
            if computes and transfer.first_token is None:
                transfer.deadline = now + self.lease
        for peer, link in list(self.links.items()):
            if link.flying and now > link.deadline:
                self.abort_link(peer, peer_dead=False, reason="no progress")
        return [
            transfer.request
            for transfer in self.transfers.values()
            if now > transfer.deadline and not transfer.stopping
        ]

    def _start(self, transfer: Outgoing, count: int, now: float) -> None:
        request, first = transfer.request, transfer.started
        assert transfer.pages is not None
        link = self.links[transfer.peer]
        chunk = KVPiece(*request.key, link.epoch, link.next_seq, first, count, (0, self.num_layers))
        if not link.flying:
            link.deadline = now + self.timeout
        link.flying[link.next_seq] = chunk
        link.next_seq += 1
        transfer.started += count
        transfer.pieces += 1
        transfer.flying += 1
        if not self.one_sided:
            self._emit(Send(transfer.peer, chunk))
        self._emit(StartPiece(Piece(
            peer=transfer.peer, link_epoch=link.epoch, seq=chunk.seq, send=True, request_id=request.request_id,
            incarnation=request.incarnation, pages=request.pages[first : first + count],
            remote=transfer.pages[first : first + count], count=count, layers=chunk.layers,
        )))  # fmt: skip

    def _settle(self, transfer: Outgoing) -> None:
        if not transfer.flying and not transfer.lost:
            if not transfer.acked:
                self._emit(Send(transfer.peer, KVCancel(*transfer.request.key, transfer.pieces)))
            self._forget(transfer, "")

    def _forget(self, transfer: Outgoing, failure: str) -> None:
        key = transfer.request.key
        del self.transfers[key]
        self._past[key] = transfer.pieces
        if len(self._past) > REMEMBERED:
            self._past.popitem(last=False)
        self._ended(transfer.request, failure)


class Receiver:
    """All handoffs for which this worker is the destination."""

    def __init__(
        self,
        pool: BlockPool,
        lease: float,
        timeout: float,
        emit: Callable[[Effect], None],
        ready: Callable[[Request, int], None],
        gone: Callable[[Request], None],
    ) -> None:
        """`ready(request, first_token)`: its KV is here, its pages LIVE. `gone(request)`: its pages are settled."""
        self.pool = pool
        self.lease = lease
        self.timeout = timeout
        self._emit = emit
        self._ready = ready
        self._gone = gone
        self.transfers: dict[SeqKey, Incoming] = {}
        self.links: dict[tuple[str, int], InLink] = {}
        self._dead: dict[str, int] = {}  # per source, the highest epoch of its process that is known to be dead
        self._oldest: dict[str, int] = {}  # per source, the lowest link epoch that is not given up
        self._aborting: dict[tuple[str, int], tuple[float, list[Incoming]]] = {}

    @property
    def busy(self) -> bool:
        """A handoff or an abort is under way."""
        return bool(self.transfers or self._aborting)

    def is_dead(self, source: str, link_epoch: int) -> bool:
        """This link epoch has been given up, or an epoch after it has."""
        return link_epoch < self._oldest.get(source, 0)

    def grant(self, request: Request, source: str, link_epoch: int, skip: int, reserved: list[int], now: float) -> None:
        """Tell the source where to write; `reserved` are this request's INFLIGHT pages after the `skip` it holds."""
        self.transfers[request.key] = Incoming(request, source, link_epoch, reserved, now + self.lease)
        self._emit(Send(source, KVGrant(*request.key, request.pages, skip)))

    def on_piece(self, peer: str, chunk: KVPiece, now: float) -> None:
        """Post the receive, strictly in the order of sequence numbers."""
        if self.is_dead(peer, chunk.link_epoch):
            return
        where = peer, chunk.link_epoch
        link = self.links.setdefault(where, InLink())
        if chunk.seq >= link.next_seq:
            link.early.setdefault(chunk.seq, chunk)
        while link.next_seq in link.early:
            chunk = link.early.pop(link.next_seq)
            transfer = self._find(peer, chunk.request_id, chunk.incarnation)
            pages: list[int] = []
            if transfer is not None:
                pages = transfer.request.pages[chunk.first : chunk.first + chunk.count]
                transfer.posted += 1
                transfer.deadline = now + self.lease
            if not link.flying:
                link.deadline = now + self.timeout
            link.flying[chunk.seq] = chunk.request_id, chunk.incarnation
            link.next_seq += 1
            self._emit(StartPiece(Piece(
                peer=peer, link_epoch=chunk.link_epoch, seq=chunk.seq, send=False, request_id=chunk.request_id,
                incarnation=chunk.incarnation, pages=pages, remote=[], count=chunk.count, layers=chunk.layers,
                checksum=chunk.checksum,
            )))  # fmt: skip

    def on_busy(self, peer: str, message: KVBusy, now: float) -> None:
        """The source lives, and computes."""
        transfer = self._find(peer, message.request_id, message.incarnation)
        if transfer is not None and not transfer.dropped:
            transfer.deadline = now + self.lease

    def on_done(self, peer: str, message: KVDone, _: float) -> None:
        """The source has started its last piece."""
        transfer = self._find(peer, message.request_id, message.incarnation)
        if transfer is not None and transfer.expected is None:
            transfer.expected = message.pieces
            transfer.first_token = message.first_token
            self._settle(transfer)

    def on_cancel(self, peer: str, message: KVCancel, _: float) -> None:
        """The source has stopped."""
        transfer = self._find(peer, message.request_id, message.incarnation)
        if transfer is not None:
            transfer.dropped = True
            if transfer.expected is None:
                transfer.expected = message.pieces
            self._settle(transfer)

    def drop(self, request: Request, reason: str) -> None:
        """Nobody wants it any more; its pages are free when the source has stopped writing into them."""
        transfer = self.transfers[request.key]
        if not transfer.dropped:
            transfer.dropped = True
            self._emit(Send(transfer.source, KVFailed(*request.key, reason)))
            self._settle(transfer)

    def on_piece_done(self, done: PieceDone, now: float) -> None:
        """A piece has landed, or the link is broken."""
        where = done.peer, done.link_epoch
        if not done.ok:  # of a link, it may be, over which nothing has come yet: it was not connected
            if not self.is_dead(*where):
                self.abort_link(*where, peer_dead=False, now=now)
            return
        link = self.links.get(where)
        if link is None:
            return
        key = link.flying.pop(done.seq, None)
        link.deadline = now + self.timeout
        transfer = self.transfers.get(key) if key is not None else None
        if transfer is not None:
            transfer.landed += 1
            self._settle(transfer)

    def abort_link(self, peer: str, link_epoch: int, peer_dead: bool, now: float) -> None:
        """Give the link up: every page that its source may still write to is quarantined until that is confirmed."""
        where = peer, link_epoch
        peer_dead = peer_dead or link_epoch >> EPOCH_BITS <= self._dead.get(peer, -1)
        self.links.pop(where, None)
        self._oldest[peer] = max(link_epoch + 1, self._oldest.get(peer, 0))
        lost = [t for t in self.transfers.values() if t.source == peer and t.link_epoch == link_epoch]
        for transfer in lost:
            del self.transfers[transfer.request.key]
            transfer.quarantined = True
            self.pool.quarantine(transfer.reserved)
        _, before = self._aborting.get(where, (0.0, []))
        self._aborting[where] = now + self.lease, before + lost
        if not peer_dead:
            self._emit(Send(peer, LinkAborted(link_epoch, False)))
        self._emit(AbortLink(peer, link_epoch, False, peer_dead))

    def on_aborted(self, peer: str, link_epoch: int) -> None:
        """Confirmed: the source will not write through this link again."""
        _, lost = self._aborting.pop((peer, link_epoch), (0.0, []))
        for transfer in lost:
            self._reuse(transfer)
            self._gone(transfer.request)

    def on_peer_aborted(self, peer: str, link_epoch: int, now: float) -> None:
        """The source has stopped for good: that confirms this end's abort too, or begins it."""
        if (peer, link_epoch) in self._aborting:
            self._emit(AbortLink(peer, link_epoch, False, True))
        elif not self.is_dead(peer, link_epoch):
            self.abort_link(peer, link_epoch, True, now)

    def on_peer_down(self, peer: str, epoch: int, now: float) -> None:
        """The source's processes up to this epoch are dead; their links still have to be taken down at this end."""
        self._dead[peer] = max(epoch, self._dead.get(peer, -1))
        for source, link_epoch in self._aborting:
            if source == peer and link_epoch >> EPOCH_BITS <= epoch:
                self._emit(AbortLink(peer, link_epoch, False, True))
        live = {link_epoch for source, link_epoch in self.links if source == peer}
        live |= {transfer.link_epoch for transfer in self.transfers.values() if transfer.source == peer}
        for link_epoch in sorted(live):
            if link_epoch >> EPOCH_BITS <= epoch:
                self.abort_link(peer, link_epoch, True, now)

    def on_tick(self, now: float) -> None:
        """Deadlines: of a piece, of a handoff, and of a source that does not confirm that it has stopped."""
        for (peer, link_epoch), link in list(self.links.items()):
            if (link.flying and now > link.deadline) or (link.early and now > link.deadline + self.timeout):
                self.abort_link(peer, link_epoch, peer_dead=False, now=now)
        for transfer in list(self.transfers.values()):
            if now > transfer.deadline and not transfer.quarantined:
                transfer.deadline = now + self.lease
                if not transfer.dropped:
                    self.drop(transfer.request, "no progress")
                else:
                    self.abort_link(transfer.source, transfer.link_epoch, False, now)
        for (peer, link_epoch), (deadline, lost) in list(self._aborting.items()):
            if now > deadline:
                self._aborting[peer, link_epoch] = now + self.lease, lost
                reason = f"does not confirm the abort of link {link_epoch}"
                self._emit(Send(ROUTER, Fatal(reason, peer, link_epoch >> EPOCH_BITS)))

    def _find(self, peer: str, request_id: str, incarnation: int) -> Incoming | None:
        transfer = self.transfers.get((request_id, incarnation))
        return transfer if transfer is not None and transfer.source == peer else None

    def _settle(self, transfer: Incoming) -> None:
        # A source that has forgotten the handoff counts too few: what was posted here must land in any case.
        if transfer.expected is None or transfer.landed < max(transfer.expected, transfer.posted):
            return
        request = transfer.request
        del self.transfers[request.key]
        if transfer.dropped:
            self._reuse(transfer)
            self._gone(request)
        else:
            assert transfer.first_token is not None
            self.pool.land(transfer.reserved)
            self._emit(Send(transfer.source, KVAck(*request.key)))
            self._ready(request, transfer.first_token)

    def _reuse(self, transfer: Incoming) -> None:
        """Give back what was reserved, and the references on the prefix that was held."""
        request = transfer.request
        held = request.pages[: len(request.pages) - len(transfer.reserved)]
        (self.pool.release if transfer.quarantined else self.pool.cancel)(transfer.reserved)
        self.pool.drop(held)
        request.pages = []

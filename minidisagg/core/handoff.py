"""The handoff of a request's KV between two workers: offer → grant → piece … → done → ack.

    source                                   destination
    KVOffer   ─────────────────────────────▶ pages reserved (INFLIGHT), or the offer waits
              ◀───────────────────────────── KVWait, now and then, or KVGrant
    KVBusy    ─────────────────────────────▶ now and then, while the source computes
    pieces    ════════ core/ledger.py ═════▶
    KVDone    ─────────────────────────────▶ all pieces landed: pages LIVE, the request decodes here
              ◀───────────────────────────── KVAck: the source releases its pages

How much is handed over is the request's `until`, a number of positions: the prompt, a part of it, or some tokens more.
That of a request which is running, and is to go on elsewhere, is open until there is little left to send (pre-copy, as
in the live migration of virtual machines: Clark et al., NSDI 2005; but what is written once stays, so that nothing is
sent twice). A prefix that is copied into a peer's cache is the same, of a request that is over.

Whoever wants out asks the other side (`KVCancel`, `KVFailed`) and waits: a started piece is never called back. `KVDone`
and `KVCancel` count the pieces, so that the destination knows when all that was started has landed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from minidisagg.core.blocks import BlockPool
from minidisagg.core.effects import Effect, Send
from minidisagg.core.ledger import DestinationLedger, SourceLedger
from minidisagg.core.messages import KVAck, KVBusy, KVCancel, KVDone, KVFailed, KVGrant, KVOffer, KVWait
from minidisagg.core.plan import RAW, PlanItem, SeqKey
from minidisagg.core.request import FOREVER, Request
from minidisagg.core.spec import EngineSpec

REMEMBERED = 4096  # ended handoffs whose count of pieces is still known


class Outgoing:
    """Source side of one handoff: the first `until` positions of a request."""

    def __init__(self, sender: Sender, request: Request, peer: str, anew: int, now: float) -> None:
        self.sender = sender
        self.request = request
        self.key = request.request_id, anew if anew >= 0 else request.incarnation  # its name at both ends
        self.peer = peer
        self.open = request.until == FOREVER  # it runs on until there is little left to send
        # Its spec there has all tokens whose KV is computed, so that the peer looks all of them up in its prefix cache.
        self.known = max(0, request.num_computed - len(request.prompt)) if self.open else len(request.spec.emitted)
        codec = request.codec or sender.spec.codec
        self.codec = codec if codec in sender.spec.codecs else RAW
        self.deadline = now + sender.spec.lease
        self.pages: list[int] | None = None  # the destination's, once granted
        self.sent = 0  # pages of the block table that the link has in full, or that the destination held before
        self.layers = 0  # and of those that are computed behind them, how many layers it has
        self.pieces = 0  # started
        self.flying = 0  # of them on the link
        self.tokens: list[int] | None = None  # it has left: what was sampled here beyond the offered spec
        self.done = False  # KVDone is sent
        self.acked = False  # the destination has it; only completions at this end are missing
        self.stopping = False  # KVCancel follows when the last piece has landed
        self.refusal = ""  # why the request stays here
        self.failure = ""  # why its link is being aborted: only the confirmation ends it

    def grant(self, pages: list[int], skip: int, now: float) -> None:
        """Start with what is computed already."""
        self.pages, self.sent = pages, skip
        if self.open:
            room = len(pages) * self.sender.spec.page_size
            if self.request.num_scheduled > room:  # it has waited so long that it has outgrown what was asked for
                self.stop("it has outgrown the room for it")
                return
            self.request.until = room
        self.push(self.request.num_computed, self.sender.spec.num_layers, now)

    def push(self, end: int, layer: int, now: float) -> None:
        """Positions [0, `end`) are computed in layers [0, `layer`): send what is new of it, in whole pages.

        The last page goes when all is computed, even if it is not full. Where some layers of a step's pages have
        been sent, the next call is about the same pages.
        """
        self.deadline = now + self.sender.spec.lease
        if self.pages is None or self.stopping or self.done:
            return
        size, num_layers = self.sender.spec.page_size, self.sender.spec.num_layers
        until = self.request.until
        total, whole = -(-until // size), self.sender.spec.granularity.whole and not self.open
        ready = total if end >= until else 0 if whole else end // size
        if ready > self.sent and layer > self.layers:
            mine, theirs = self.request.pages[self.sent : ready], self.pages[self.sent : ready]
            self.pieces += 1
            self.flying += 1
            self.sender.ledger.start(self, self.peer, self.sent, mine, theirs, (self.layers, layer), now)
            self.layers = layer
            if layer == num_layers:
                self.sent, self.layers = ready, 0
        if self.tokens is not None and self.sent == total:
            self.done = True
            spent = 0.0 if self.tokens else self.request.prefill_s
            self.sender.emit(Send(self.peer, KVDone(*self.key, self.pieces, self.tokens, spent)))
        self.catch_up()

    def catch_up(self) -> None:
        """A running request leaves when the peer has all its full pages: what remains is part of a page."""
        request = self.request
        if not self.open or self.pages is None or self.flying or self.stopping or self.tokens is not None:
            return
        if self.sent >= request.num_computed // self.sender.spec.page_size:
            request.until = request.num_scheduled
            if request.num_computed == request.until:  # else with the step that is under way
                self.sender.leave(request)

    def stop(self, refusal: str = "") -> None:
        """End the handoff from this side: no new piece, `KVCancel` once those on the link have landed."""
        if not self.stopping:
            self._stay()
            self.stopping, self.refusal = True, refusal
            self._settle()

    def _stay(self) -> None:
        """A request that has not left goes on here as if nothing had been."""
        if self.open and self.tokens is None:
            self.request.until = FOREVER

    def acknowledge(self) -> None:
        """The destination has it all; its own completions may not have come in yet, and they read from the pages."""
        self.acked = self.stopping = True
        self._settle()

    def landed(self) -> None:
        """A piece has left."""
        self.flying -= 1
        if self.stopping:
            self._settle()
        else:
            self.catch_up()

    def cut(self, reason: str) -> None:
        """No piece follows; the request is given back when the link is."""
        self._stay()
        self.stopping, self.failure = True, reason

    def lost(self) -> None:
        """Nothing reads from the pages any more."""
        self.sender.emit(Send(self.peer, KVCancel(*self.key, self.pieces)))
        self.sender.forget(self, "" if self.acked else self.failure)

    def _settle(self) -> None:
        if not self.flying and not self.failure:
            if not self.acked:
                self.sender.emit(Send(self.peer, KVCancel(*self.key, self.pieces)))
            self.sender.ledger.leave(self, self.peer)
            self.sender.forget(self, self.refusal)


class Sender:
    """All handoffs for which this worker is the source."""

    def __init__(
        self,
        spec: EngineSpec,
        ledger: SourceLedger,
        emit: Callable[[Effect], None],
        leave: Callable[[Request], None],
        ended: Callable[[Request, str], None],
    ) -> None:
        """`leave(request)`: a running request has nothing more to compute here. `ended(request, failure)`: the pages
        are no longer needed, or it stays; an empty failure means success."""
        self.spec = spec
        self.ledger = ledger
        self.emit = emit
        self.transfers: dict[SeqKey, Outgoing] = {}  # by the request's own key
        self._named: dict[SeqKey, Outgoing] = {}  # by the handoff's
        self.leave = leave
        self._ended = ended
        self._past: OrderedDict[SeqKey, int] = OrderedDict()  # pieces of handoffs that are over

    @property
    def busy(self) -> bool:
        """A handoff or an abort is under way."""
        return bool(self.transfers or self.ledger.aborting)

    def offer(self, request: Request, peer: str, now: float, anew: int = -1, prefix: bool = False) -> None:
        """Ask `peer` for pages; called when the request's first chunk is scheduled, or later: late binding, migration,
        the copy of a `prefix`."""
        transfer = self.transfers[request.key] = Outgoing(self, request, peer, anew, now)
        self._named[transfer.key] = transfer
        epoch = self.ledger.join(transfer, peer)
        length, size = request.until, self.spec.page_size
        if transfer.open:  # it grows while it moves, until a wire that copies a token in a fifth of a step has all
            pages = request.num_scheduled // size
            length = min((pages + 2 + pages // 4) * size, request.longest)
        spec = replace(request.spec, cohort=request.cohort, emitted=request.output[: transfer.known])
        layout, codec = self.spec.fingerprint, transfer.codec
        self.emit(Send(peer, KVOffer(*transfer.key, spec, layout, epoch, codec, length, prefix, transfer.open)))

    def on_grant(self, peer: str, message: KVGrant, now: float) -> None:
        """A grant for a handoff that is over gets its `KVCancel` again."""
        transfer = self._find_or_cancel(peer, message)
        if transfer is not None and transfer.pages is None and not transfer.stopping:
            transfer.grant(message.pages, message.skip, now)

    def on_wait(self, peer: str, message: KVWait, now: float) -> None:
        """The offer stands in the destination's queue: its lease begins anew."""
        transfer = self._named.get((message.request_id, message.incarnation))
        if transfer is not None and transfer.peer == peer:
            transfer.deadline = now + self.spec.lease

    def finish(self, request: Request, now: float) -> None:
        """All that is to be computed here is: the last pages go out, and `KVDone` with what was sampled."""
        transfer = self.transfers[request.key]
        transfer.tokens = request.output[transfer.known :]
        self.advance(request, now)

    def advance(self, request: Request, now: float) -> None:
        """A step has computed more of it."""
        self.transfers[request.key].push(request.num_computed, self.spec.num_layers, now)

    def reports(self, items: Sequence[PlanItem]) -> list[int]:
        """After which layers a step with these items is to be reported: the ends of the groups that leave alone."""
        spec, pages = self.spec, 0
        for transfer, item in self._prompts(items):
            if not transfer.stopping:
                pages = max(pages, -(-(item.start + item.count) // spec.page_size) - item.start // spec.page_size)
        return spec.granularity.ends(spec.num_layers, pages * spec.layer_bytes) if pages else []

    def advance_layers(self, items: Sequence[PlanItem], layer: int, now: float) -> None:
        """A step with these items has computed the KV of its prompts in layers [0, `layer`)."""
        for transfer, item in self._prompts(items):
            transfer.push(item.start + item.count, layer, now)

    def _prompts(self, items: Sequence[PlanItem]) -> list[tuple[Outgoing, PlanItem]]:
        """What a step computes of prompts that move. A decode's one token goes with its step: it may be a graph's."""
        moving = ((self.transfers.get((item.request_id, item.incarnation)), item) for item in items)
        return [(one, item) for one, item in moving if one is not None and item.start < one.request.prefill_len]

    def on_failed(self, peer: str, message: KVFailed) -> Request | None:
        """The destination wants out. Returns the request of a live handoff, which cannot go on: it has left. One that
        still runs here stays."""
        transfer = self._find_or_cancel(peer, message)
        if transfer is None or transfer.stopping:
            return None
        if transfer.open and transfer.tokens is None:
            transfer.stop(message.reason)
            return None
        return transfer.request

    def on_ack(self, peer: str, message: KVAck, _: float) -> None:
        """The destination has it all."""
        transfer = self._named.get((message.request_id, message.incarnation))
        if transfer is not None and transfer.peer == peer and transfer.done:
            transfer.acknowledge()

    def renew(self) -> None:
        """Tell the destinations of what is still being computed that their pages are not forgotten."""
        for transfer in self.transfers.values():
            if transfer.pages is not None and transfer.tokens is None and not transfer.stopping:
                self.emit(Send(transfer.peer, KVBusy(*transfer.key)))

    def on_tick(self, now: float, computes: bool) -> list[Request]:
        """Returns requests whose lease is over, which does not run while this worker `computes` what they are to hand
        over."""
        for transfer in self.transfers.values():
            if computes and transfer.tokens is None:
                transfer.deadline = now + self.spec.lease
        return [one.request for one in self.transfers.values() if now > one.deadline and not one.stopping]

    def forget(self, transfer: Outgoing, failure: str) -> None:
        """It is over."""
        del self.transfers[transfer.request.key], self._named[transfer.key]
        self._past[transfer.key] = transfer.pieces
        if len(self._past) > REMEMBERED:
            self._past.popitem(last=False)
        self._ended(transfer.request, failure)

    def _find_or_cancel(self, peer: str, message: KVGrant | KVFailed) -> Outgoing | None:
        """The handoff with this peer; one that is over is called off once more, since the word may have been lost."""
        key = message.request_id, message.incarnation
        transfer = self._named.get(key)
        if transfer is None:
            self.emit(Send(peer, KVCancel(*key, self._past.get(key, 0))))
        return transfer if transfer is not None and transfer.peer == peer else None


class Incoming:
    """Destination side of one handoff."""

    def __init__(
        self, receiver: Receiver, request: Request, source: str, link_epoch: int, reserved: list[int], now: float
    ) -> None:
        self.receiver = receiver
        self.request = request
        self.key = request.key
        self.source = source
        self.codec = request.codec
        self.link_epoch = link_epoch
        self.reserved = reserved
        self.deadline = now + receiver.spec.lease
        self.posted = 0  # pieces whose receive has been started
        self.arrived = 0  # and has ended
        self.expected: int | None = None  # pieces in all, known with KVDone or KVCancel
        self.done: KVDone | None = None
        self.dropped = False  # nobody wants the request any more

    def expect(self, first: int, count: int, now: float) -> list[int]:
        """A piece is on its way, so the source lives."""
        self.posted += 1
        self.deadline = now + self.receiver.spec.lease
        return self.request.pages[first : first + count]

    def landed(self) -> None:
        """A piece is in its pages."""
        self.arrived += 1
        self.settle()

    def cut(self, reason: str) -> None:
        """The source may still write to what was reserved: nobody gets it until that is ruled out."""
        del self.receiver.transfers[self.key]
        self.receiver.pool.quarantine(self.reserved)

    def lost(self) -> None:
        """That is ruled out."""
        self.receiver.pool.release(self.reserved)
        self.receiver.free(self)

    def settle(self) -> None:
        """Go on if all pieces have landed."""
        # A source that has forgotten the handoff counts too few: what was posted here must land in any case.
        if self.expected is None or self.arrived < max(self.expected, self.posted):
            return
        receiver = self.receiver
        del receiver.transfers[self.key]
        receiver.ledger.leave(self, self.source, self.link_epoch)
        if self.dropped:
            receiver.pool.cancel(self.reserved)
            receiver.free(self)
        else:
            assert self.done is not None
            receiver.pool.land(self.reserved)
            receiver.emit(Send(self.source, KVAck(*self.key)))
            receiver.ready(self.request, self.done)


class Receiver:
    """All handoffs for which this worker is the destination."""

    def __init__(
        self,
        spec: EngineSpec,
        pool: BlockPool,
        ledger: DestinationLedger,
        emit: Callable[[Effect], None],
        ready: Callable[[Request, KVDone], None],
        gone: Callable[[Request], None],
    ) -> None:
        """`ready(request, done)`: its KV is here, its pages LIVE. `gone(request)`: its pages are settled."""
        self.spec = spec
        self.pool = pool
        self.ledger = ledger
        self.emit = emit
        self.ready = ready
        self.transfers: dict[SeqKey, Incoming] = {}
        self._gone = gone

    @property
    def busy(self) -> bool:
        """A handoff or an abort is under way."""
        return bool(self.transfers or self.ledger.aborting)

    def grant(self, request: Request, source: str, link_epoch: int, reserved: list[int], now: float) -> None:
        """Tell the source where to write; `reserved` are the request's INFLIGHT pages, after those that it holds."""
        transfer = self.transfers[request.key] = Incoming(self, request, source, link_epoch, reserved, now)
        self.ledger.join(transfer, source, link_epoch)
        skip = len(request.pages) - len(reserved)
        self.emit(Send(source, KVGrant(*request.key, request.pages, skip)))

    def on_busy(self, peer: str, message: KVBusy, now: float) -> None:
        """The source lives, and computes."""
        transfer = self._find(peer, message)
        if transfer is not None and not transfer.dropped:
            transfer.deadline = now + self.spec.lease

    def on_done(self, peer: str, message: KVDone, _: float) -> None:
        """The source has started its last piece."""
        transfer = self._find(peer, message)
        if transfer is not None and transfer.expected is None:
            transfer.expected, transfer.done = message.pieces, message
            transfer.settle()

    def on_cancel(self, peer: str, message: KVCancel, _: float) -> None:
        """The source has stopped."""
        transfer = self._find(peer, message)
        if transfer is not None:
            transfer.dropped = True
            if transfer.expected is None:
                transfer.expected = message.pieces
            transfer.settle()

    def drop(self, request: Request, reason: str) -> None:
        """Nobody wants it any more; its pages are free when the source has stopped writing into them."""
        transfer = self.transfers[request.key]
        if not transfer.dropped:
            transfer.dropped = True
            self.emit(Send(transfer.source, KVFailed(*request.key, reason)))
            transfer.settle()

    def on_tick(self, now: float) -> None:
        """A handoff that stands still is dropped, and if its source does not answer to that, its link is given up."""
        for transfer in list(self.transfers.values()):
            if now > transfer.deadline and transfer.key in self.transfers:
                transfer.deadline = now + self.spec.lease
                if not transfer.dropped:
                    self.drop(transfer.request, "no progress")
                else:
                    self.ledger.abort(transfer.source, transfer.link_epoch, False, now)

    def free(self, transfer: Incoming) -> None:
        """What was reserved is given back: so are the references on the prefix that was held."""
        request = transfer.request
        self.pool.drop(request.pages[: len(request.pages) - len(transfer.reserved)])
        request.pages = []
        self._gone(request)

    def _find(self, peer: str, message: KVBusy | KVDone | KVCancel) -> Incoming | None:
        transfer = self.transfers.get((message.request_id, message.incarnation))
        return transfer if transfer is not None and transfer.source == peer else None

"""A worker's links: opened on the core's word, fed with its pieces, given up on its word.

The destination makes its end first and tells the source where it is (`LinkOpen` → `LinkReady`); pieces that the
core starts meanwhile wait. All that blocks (connecting, aborting) runs in threads; the core hears of the end of a
piece as `PieceDone`, and of a confirmed abort as `AbortConfirmed`, both through `on_news`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace

from minidisagg.config import ClusterSettings
from minidisagg.core.effects import AbortLink, Send
from minidisagg.core.inputs import AbortConfirmed, PieceDone
from minidisagg.core.ledger import EPOCH_BITS
from minidisagg.core.messages import LinkOpen, LinkReady, LinkStats, PieceSpan, Role
from minidisagg.core.plan import Piece
from minidisagg.runtime.load import worker_devices
from minidisagg.transfer.kinds import make_link, resolve_kind
from minidisagg.transfer.links import Link, LinkError, LinkHost, LinkSetup

MICROSECOND = 1e-6  # differences of times round
LinkKey = tuple[str, int, bool]  # peer, link epoch, outgoing


@dataclass
class Entry:
    """One end of one link epoch."""

    link: Link | None = None
    connected: bool = False
    closing: bool = False
    waiting: list[Piece] = field(default_factory=list)  # started before the link was there
    started: dict[int, tuple[float, str]] = field(default_factory=dict)  # seq → when it was handed over, request id


@dataclass(frozen=True)
class LinkHooks:
    """What a set of links does to its worker: messages for peers, news for the core, and the end on an error.

    With a `clock`, the worker's own, pieces are kept for `take_trace`.
    """

    send: Callable[[Send], None]
    on_news: Callable[[PieceDone | AbortConfirmed], None]
    on_failure: Callable[[BaseException], None]
    clock: Callable[[], float] | None = None


class LinkSet:
    """All links of one worker."""

    def __init__(self, name: str, host: LinkHost, hooks: LinkHooks) -> None:
        self.name = name
        self.host = host
        self._hooks = hooks
        self._trace: list[PieceSpan] = []
        self.loop = asyncio.get_running_loop()
        self._entries: dict[LinkKey, Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stats: dict[str, LinkStats] = {}  # of outgoing links, by peer

    def open(self, peer: str, link_epoch: int) -> None:
        """Source: ask the destination for its end."""
        self._entries[peer, link_epoch, True] = Entry()
        self._hooks.send(Send(peer, LinkOpen(self.host.kind, link_epoch, self.host.codecs)))

    def on_link_open(self, peer: str, message: LinkOpen) -> None:
        """Destination: make this end, tell the source, and wait for it."""
        key = peer, message.link_epoch, False
        entry = self._entries.setdefault(key, Entry())
        try:
            if message.kind != self.host.kind:
                raise LinkError(f"{self.name} speaks {self.host.kind}, not {message.kind}")
            if not set(message.codecs) <= set(self.host.codecs):
                sends, has = ", ".join(message.codecs), ", ".join(self.host.codecs)
                raise LinkError(f"{peer} sends the codecs {sends}, and {self.name} has {has}")
            entry.link = self._make(peer, message.link_epoch, source=False)
            endpoint = entry.link.endpoint()
        except (LinkError, OSError, ValueError, RuntimeError) as error:
            self._hooks.send(Send(peer, LinkReady(message.link_epoch, "", str(error))))
            return
        self._hooks.send(Send(peer, LinkReady(message.link_epoch, endpoint)))
        self._spawn(self._connect(key, entry, endpoint))

    def on_link_ready(self, peer: str, message: LinkReady) -> None:
        """Source: the destination's end is there; reach it."""
        key = peer, message.link_epoch, True
        entry = self._entries.get(key)
        if entry is None or entry.closing:
            return
        if message.error:
            self._fail(key, entry, message.error)
            return
        try:
            entry.link = self._make(peer, message.link_epoch, source=True)
        except (LinkError, OSError, ValueError, RuntimeError) as error:
            self._fail(key, entry, str(error).partition("\n")[0])
            return
        self._spawn(self._connect(key, entry, message.endpoint))

    def on_peer_down(self, peer: str, epoch: int) -> None:
        """Destination: take down what the dead process has opened and the core has never heard of."""
        for key, entry in self._entries.items():
            if key[0] == peer and not key[2] and key[1] >> EPOCH_BITS <= epoch and not entry.closing:
                self.abort(AbortLink(peer, key[1], False, True))

    def start(self, piece: Piece) -> None:
        """Start one piece, or let it wait for the link."""
        entry = self._entries.setdefault((piece.peer, piece.link_epoch, piece.send), Entry())
        if piece.send:
            self._count(piece.peer, backlog=1)
        entry.started[piece.seq] = time.monotonic(), piece.request_id
        if entry.connected and entry.link is not None and not entry.closing:
            entry.link.start(piece)
        else:
            entry.waiting.append(piece)

    def abort(self, effect: AbortLink) -> None:
        """Give the link up; `AbortConfirmed` follows once nothing of it can touch this worker's pages."""
        key = effect.peer, effect.link_epoch, effect.outgoing
        entry = self._entries.setdefault(key, Entry())
        entry.closing = True
        self._spawn(self._abort(key, entry, effect.peer_dead))

    def poll(self) -> None:
        """Hand finished pieces to the core; called when a link wakes the loop."""
        try:
            self._poll()
        except Exception as error:
            self._hooks.on_failure(error)

    def _poll(self) -> None:
        for entry in list(self._entries.values()):
            for completion in entry.link.poll() if entry.link is not None else ():
                started, request_id = entry.started.pop(completion.seq)
                elapsed = completion.ended - started
                if completion.send:
                    self._settle(completion, elapsed)
                if self._hooks.clock is not None:
                    self._trace.append(_span(completion, request_id, self._hooks.clock() - time.monotonic(), elapsed))
                if not entry.closing:
                    self._hooks.on_news(completion)

    async def close(self) -> None:
        """Give up all links; for the end of the process."""
        for key, entry in list(self._entries.items()):
            entry.closing = True
            self._spawn(self._abort(key, entry, peer_dead=True))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def _make(self, peer: str, link_epoch: int, source: bool) -> Link:
        pair = f"{self.name}-{peer}" if source else f"{peer}-{self.name}"
        return make_link(LinkSetup(self.host, source, pair, link_epoch, self._wake))

    def stats(self) -> list[LinkStats]:
        """What went out, by peer."""
        return list(self._stats.values())

    def take_trace(self) -> list[PieceSpan]:
        """The pieces that have ended since the last time, of either direction."""
        taken, self._trace = self._trace, []
        return taken

    def _settle(self, done: PieceDone, elapsed: float) -> None:
        if done.ok:
            nic = self.host.nic
            self._count(
                done.peer,
                transfers=1,
                bytes=done.nbytes,
                seconds=done.seconds,
                queue_seconds=max(0.0, elapsed - done.seconds),
                backlog=-1,
                late=nic is not None and done.seconds > nic.interconnect.slowest(done.nbytes) + MICROSECOND,
            )
        else:
            self._count(done.peer, failures=1, backlog=-1)

    def _count(self, peer: str, **more: float) -> None:
        old = self._stats.get(peer, LinkStats(peer, self.host.kind))
        self._stats[peer] = replace(old, **{name: getattr(old, name) + value for name, value in more.items()})

    def _wake(self) -> None:
        self.loop.call_soon_threadsafe(self.poll)

    async def _connect(self, key: LinkKey, entry: Entry, endpoint: str) -> None:
        assert entry.link is not None
        try:
            await asyncio.to_thread(entry.link.connect, endpoint)
        except (LinkError, OSError, RuntimeError) as error:
            self._fail(key, entry, str(error).partition("\n")[0])
            return
        entry.connected = True
        waiting, entry.waiting = entry.waiting, []
        for piece in waiting:
            entry.link.start(piece)

    async def _abort(self, key: LinkKey, entry: Entry, peer_dead: bool) -> None:
        link, confirmed = entry.link, True  # a link that was never made cannot write
        if link is not None:
            confirmed = await asyncio.to_thread(link.abort, peer_dead)
        self.poll()
        if key[2]:
            self._count(key[0], backlog=-len(entry.waiting))
        entry.waiting = []
        if confirmed and self._entries.pop(key, None) is not None:
            self._hooks.on_news(AbortConfirmed(*key))
        elif link is not None and not confirmed and (key[2] or not link.one_sided):
            # Nobody else can stop this end's own thread: the process ends, and with it all that it could still write.
            raise LinkError(f"the abort of the link with {key[0]} does not return")

    def _fail(self, key: LinkKey, entry: Entry, error: str) -> None:
        """The link never came about: whatever waited for it fails, which makes the core give it up."""
        waiting, entry.waiting = entry.waiting, []
        peer, link_epoch, outgoing = key
        if outgoing:
            self._count(peer, backlog=-len(waiting), failures=1)
        for seq in [piece.seq for piece in waiting] or [0]:
            self._hooks.on_news(PieceDone(peer, link_epoch, seq, outgoing, ok=False, error=error))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._hooks.on_failure(error)


def _span(done: PieceDone, request_id: str, clock_ahead: float, elapsed: float) -> PieceSpan:
    ended = done.ended + clock_ahead
    return PieceSpan(
        done.peer,
        done.link_epoch,
        done.seq,
        done.send,
        request_id,
        ended - elapsed,
        ended - done.seconds,
        ended,
        done.nbytes,
        done.ok,
    )


def link_kind(cluster: ClusterSettings) -> tuple[str, str]:
    """The kind of all links of a cluster, and why it is not the one that was asked for, if it is not.

    NCCL refuses two ranks on one GPU, and not every build of torch has it.
    """
    devices = worker_devices(cluster)
    kind = resolve_kind(cluster.link, *(device.type for device in devices))
    places = [(role, device) for (_, role, _), device in zip(cluster.roles(), devices, strict=True)]
    pairs = [(a, b) for a, b in itertools.combinations(places, 2) if a[0] != b[0] or a[0] is Role.BOTH]
    shared = any(a[1] == b[1] for a, b in pairs)
    if kind != "nccl":
        return kind, ""
    if shared and cluster.link == "auto":
        return "cuda_ipc", ""
    if shared:
        return "gloo", "nccl takes one worker a GPU"
    if not torch.distributed.is_nccl_available():
        return "gloo", f"torch {torch.__version__} was built without nccl"
    return "nccl", ""

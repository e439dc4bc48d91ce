"""A worker's links without sockets or processes: what is opened, handed to the core, and given up, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from minidisagg.core.effects import AbortLink, Send
from minidisagg.core.inputs import AbortConfirmed, PieceDone
from minidisagg.core.ledger import EPOCH_BITS
from minidisagg.core.messages import LinkOpen, LinkReady
from minidisagg.core.plan import Piece
from minidisagg.interconnect import Interconnect
from minidisagg.runtime import linkset
from minidisagg.runtime.faults import LateLinks
from minidisagg.runtime.linkset import LinkHooks, LinkSet
from minidisagg.transfer.emulate import Nic
from minidisagg.transfer.links import LinkHost, LinkSetup

EPOCH = 7


class FakeLink:
    """Does what the test says; `connect` and `abort` block until then."""

    def __init__(self, one_sided: bool) -> None:
        self.one_sided = one_sided
        self.started: list[Piece] = []
        self.done: list[PieceDone] = []
        self.reached, self.fenced = threading.Event(), threading.Event()
        self.aborts: list[bool] = []  # `peer_dead` of each call
        self.confirms = True

    def endpoint(self) -> str:
        return "here"

    def connect(self, endpoint: str) -> None:
        assert self.reached.wait(10.0)

    def start(self, op: Piece) -> None:
        self.started.append(op)

    def poll(self) -> list[PieceDone]:
        done, self.done = self.done, []
        return done

    def abort(self, peer_dead: bool) -> bool:
        self.aborts.append(peer_dead)
        assert self.fenced.wait(10.0)
        return self.confirms


class Fixture:
    """A set of fake links, and what it tells."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, one_sided: bool, delay: float, nic: Nic | None) -> None:
        self.links: list[FakeLink] = []
        self.sent: list[Send] = []
        self.completed: list[PieceDone] = []
        self.aborted: list[tuple[str, int, bool]] = []
        self.failures: list[BaseException] = []
        monkeypatch.setattr(linkset, "make_link", self._make)
        self.one_sided = one_sided
        host = LinkHost("unix", torch.empty(0), None, Path("."), 1.0, nic)
        hooks = LinkHooks(self.sent.append, self._hear, self.failures.append)
        self.set = LateLinks(delay, "w", host, hooks) if delay else LinkSet("w", host, hooks)

    def _hear(self, news: PieceDone | AbortConfirmed) -> None:
        if isinstance(news, PieceDone):
            self.completed.append(news)
        else:
            self.aborted.append((news.peer, news.link_epoch, news.outgoing))

    def _make(self, setup: LinkSetup) -> FakeLink:
        self.links.append(FakeLink(self.one_sided))
        return self.links[-1]

    async def opened(self, connected: bool = True) -> FakeLink:
        """An outgoing link to `d`."""
        self.set.open("d", EPOCH)
        self.set.on_link_ready("d", LinkReady(EPOCH, "there"))
        link = self.links[-1]
        if connected:
            link.reached.set()
            await until(lambda: self.set._entries["d", EPOCH, True].connected)
        return link

    async def accepted(self) -> FakeLink:
        """An incoming link from `d`, of the same epoch."""
        self.set.on_link_open("d", LinkOpen("unix", EPOCH))
        link = self.links[-1]
        link.reached.set()
        await until(lambda: self.set._entries["d", EPOCH, False].connected)
        return link

    def complete(self, link: FakeLink, seq: int, send: bool) -> PieceDone:
        """A piece has ended that the set had started."""
        self.set.start(Piece("d", EPOCH, seq, send, "r", 0, [0], [0], 1, (0, 1)))
        link.done.append(PieceDone("d", EPOCH, seq, send, True, ended=time.monotonic()))
        return link.done[-1]


def test_a_codec_that_the_peer_lacks_is_refused_at_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And both lists are named."""

    async def run() -> None:
        at = Fixture(monkeypatch, False, 0.0, None)
        at.set.host = dataclasses.replace(at.set.host, codecs=("raw",))
        at.set.open("d", EPOCH)
        at.set.on_link_open("e", LinkOpen("unix", EPOCH, ("raw",)))
        at.set.on_link_open("d", LinkOpen("unix", EPOCH, ("raw", "int8")))
        error = "d sends the codecs raw, int8, and w has raw"
        assert [send.body for send in at.sent] == [
            LinkOpen("unix", EPOCH, ("raw",)), LinkReady(EPOCH, "here"), LinkReady(EPOCH, "", error),
        ]  # fmt: skip
        at.links[-1].reached.set()
        at.links[-1].fenced.set()
        await at.set.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")


async def turns(count: int = 20) -> None:
    """Time for whatever would go on by itself."""
    for _ in range(count):
        await asyncio.sleep(0.001)


Scenario = Callable[[Fixture], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a scenario on a fresh set."""

    def run(scenario: Scenario, one_sided: bool = False, delay: float = 0.0, nic: Nic | None = None) -> None:
        async def main() -> None:
            fixture = Fixture(monkeypatch, one_sided, delay, nic)
            try:
                await scenario(fixture)
            finally:
                for link in fixture.links:
                    link.reached.set()
                    link.fenced.set()
                await fixture.set.close()

        asyncio.run(main())

    return run


def test_an_abort_is_confirmed_when_the_link_says_so_and_not_before(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        link = await at.opened()
        at.set.abort(AbortLink("d", EPOCH, True, True))
        await until(lambda: link.aborts == [True])
        await turns()
        assert at.aborted == []
        link.fenced.set()
        await until(lambda: at.aborted == [("d", EPOCH, True)])
        assert not at.failures

    play(scenario)


@pytest.mark.parametrize(("one_sided", "outgoing"), [(False, True), (False, False), (True, True), (True, False)])
def test_a_thread_that_does_not_stop_ends_the_process_unless_only_the_source_can_say(
    one_sided: bool, outgoing: bool, play: Callable[..., None]
) -> None:
    async def scenario(at: Fixture) -> None:
        link = await (at.opened() if outgoing else at.accepted())
        link.confirms = False
        link.fenced.set()
        at.set.abort(AbortLink("d", EPOCH, outgoing, False))
        await until(lambda: link.aborts == [False] and not at.set._tasks)
        assert at.aborted == []
        if one_sided and not outgoing:
            assert not at.failures
            link.confirms = True
            at.set.abort(AbortLink("d", EPOCH, False, True))
            await until(lambda: at.aborted == [("d", EPOCH, False)])
        else:
            assert "does not return" in str(at.failures)

    play(scenario, one_sided)


def test_a_link_that_was_never_made_is_given_up_at_once(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        at.set.open("d", EPOCH)
        at.set.start(Piece("d", EPOCH, 0, True, "r", 0, [0], [0], 1, (0, 1)))
        assert at.set.stats()[0].backlog == 1
        at.set.abort(AbortLink("d", EPOCH, True, False))
        await until(lambda: at.aborted == [("d", EPOCH, True)])
        assert at.set.stats()[0].backlog == 0 and not at.links

    play(scenario)


def test_what_ends_on_a_closing_link_is_not_told_to_the_core(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        outgoing, incoming = await at.opened(), await at.accepted()
        before = at.complete(outgoing, 0, True)
        at.set.poll()
        assert at.completed == [before]
        late, other = at.complete(outgoing, 1, True), at.complete(incoming, 0, False)
        last = at.complete(outgoing, 2, True)
        outgoing.done.remove(last)
        at.set.abort(AbortLink("d", EPOCH, True, False))
        at.set.poll()
        assert late not in at.completed and at.completed == [before, other], "the peer's own link goes on"
        outgoing.done.append(last)
        outgoing.fenced.set()
        await until(lambda: at.aborted == [("d", EPOCH, True)])
        assert at.completed == [before, other], "not with the confirmation either"
        assert at.set.stats()[0].backlog == 0

    play(scenario)


@pytest.mark.parametrize("fenced", [False, True])
def test_a_link_given_up_before_the_peer_answered_is_not_made(fenced: bool, play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        at.set.open("d", EPOCH)
        at.set.abort(AbortLink("d", EPOCH, True, False))
        if fenced:  # and its entry is gone
            await until(lambda: at.aborted == [("d", EPOCH, True)])
        at.set.on_link_ready("d", LinkReady(EPOCH, "there"))
        at.set.on_link_ready("d", LinkReady(EPOCH, "", "no such kind"))
        await turns()
        assert not at.links and not at.completed and not at.failures

    play(scenario)


def test_pieces_wait_for_the_link_and_fail_with_it(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        link = await at.opened(connected=False)
        ops = [Piece("d", EPOCH, seq, True, "r", 0, [0], [0], 1, (0, 1)) for seq in range(3)]
        for op in ops[:2]:
            at.set.start(op)
        assert link.started == []
        link.reached.set()
        await until(lambda: link.started == ops[:2])
        at.set.start(ops[2])
        assert link.started == ops
        at.set.open("e", EPOCH)
        at.set.start(Piece("e", EPOCH, 0, True, "r", 0, [0], [0], 1, (0, 1)))
        at.set.on_link_ready("e", LinkReady(EPOCH, "", "e speaks gloo"))
        assert at.completed == [PieceDone("e", EPOCH, 0, True, False, error="e speaks gloo")]

    play(scenario)


def test_a_link_that_cannot_be_made_fails_what_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, play: Callable[..., None]
) -> None:
    async def scenario(at: Fixture) -> None:
        at.set.open("d", EPOCH)
        at.set.start(Piece("d", EPOCH, 0, True, "r", 0, [0], [0], 1, (0, 1)))

        def refuse(setup: LinkSetup) -> FakeLink:
            raise OSError("too many open files")

        monkeypatch.setattr(linkset, "make_link", refuse)
        at.set.on_link_ready("d", LinkReady(EPOCH, "there"))
        assert at.completed == [PieceDone("d", EPOCH, 0, True, False, error="too many open files")]
        at.set.abort(AbortLink("d", EPOCH, True, False))
        await until(lambda: at.aborted == [("d", EPOCH, True)])
        assert not at.failures

    play(scenario)


def test_a_dead_source_takes_its_ends_along(play: Callable[..., None]) -> None:
    """Those that the core has never heard of, since nothing has been offered over them or granted yet."""

    async def scenario(at: Fixture) -> None:
        outgoing, incoming = await at.opened(), await at.accepted()
        outgoing.fenced.set()
        incoming.fenced.set()
        at.set.on_peer_down("e", 100)
        at.set.on_peer_down("d", (EPOCH >> EPOCH_BITS) - 1)
        await turns()
        assert not at.aborted
        at.set.on_peer_down("d", EPOCH >> EPOCH_BITS)
        at.set.on_peer_down("d", EPOCH >> EPOCH_BITS)
        await until(lambda: at.aborted == [("d", EPOCH, False)])
        assert incoming.aborts == [True] and not outgoing.aborts and not at.failures

    play(scenario)


def test_an_error_while_polling_ends_the_worker(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        link = await at.opened()
        link.done.append(PieceDone("d", EPOCH, 99, True, True))  # of a piece that was never started
        at.set.poll()
        assert [type(error) for error in at.failures] == [KeyError]

    play(scenario)


def test_pieces_that_the_emulated_interconnect_would_have_brought_sooner_are_counted(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        link = await at.opened()
        for seq, seconds in enumerate((1.0, 1.1, 3.0)):  # a second for so many bytes, and the latency
            done = at.complete(link, seq, True)
            link.done[-1] = replace(done, nbytes=1000, seconds=seconds)
        at.set.poll()
        assert at.set.stats()[0].late == 2

    play(scenario, nic=Nic(Interconnect(2000.0, 0.5)))


def test_a_delayed_piece_is_started_late_and_in_order_and_fails_with_an_abort(play: Callable[..., None]) -> None:
    async def scenario(at: Fixture) -> None:
        link = await at.opened()
        pieces = [Piece("d", EPOCH, seq, True, "r", 0, [0], [0], 1, (0, 1)) for seq in range(4)]
        begun = time.monotonic()
        for piece in pieces[:3]:
            at.set.start(piece)
        await turns(10)
        assert link.started == []
        await until(lambda: link.started == pieces[:3])
        assert 0.1 <= time.monotonic() - begun < 0.2
        at.set.start(pieces[3])
        link.fenced.set()
        at.set.abort(AbortLink("d", EPOCH, True, False))
        await until(lambda: at.aborted == [("d", EPOCH, True)])
        assert link.started == pieces, "after the abort, for the link to fail it"

    play(scenario, delay=0.1)

"""A worker's channels to its peers, without peers: what is kept for one that is not reached yet, and for how long."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerConfig, WorkerSettings
from minidisagg.core.checked import PolicyError
from minidisagg.core.inputs import Input, PieceDone, Received, Schedule
from minidisagg.core.messages import ROUTER, AnyMessage, Envelope, Fatal, KVWait, PeerDown, PeerUp, Role
from minidisagg.runtime import worker as module
from minidisagg.runtime.blackbox import read_notes
from minidisagg.runtime.worker import Worker


class FakeChannel:
    def __init__(self) -> None:
        self.sent: list[AnyMessage] = []
        self.closed = False

    def send(self, envelope: Envelope) -> None:
        self.sent.append(envelope.body)

    def close(self) -> None:
        self.closed = True


class IdleCore:
    """Takes everything, wants nothing."""

    def __init__(self) -> None:
        self.outbox: list[Any] = []

    def on(self, what: Input, now: float) -> None:
        """Nothing comes of it, and there is nothing to compute."""


class NoLinks:
    def on_peer_down(self, peer: str, epoch: int) -> None:
        """There are none."""


class Network:
    """Connections are made, or refused, when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
        self.asked: list[tuple[str, asyncio.Future[FakeChannel]]] = []
        monkeypatch.setattr(module, "connect", self.connect)
        config = WorkerConfig(
            index=0,
            name="w", epoch=1, role=Role.BOTH, model=ModelSettings(), settings=WorkerSettings(),
            cluster=ClusterSettings(), run=RunSettings(), run_dir=str(run_dir),
        )  # fmt: skip
        self.worker = Worker(config)
        core: Any = IdleCore()
        links: Any = NoLinks()
        self.worker.core, self.worker.links, self.worker.depth = core, links, 0

    async def connect(self, address: str) -> FakeChannel:
        self.asked.append((address, asyncio.get_running_loop().create_future()))
        return await self.asked[-1][1]

    def hear(self, *bodies: AnyMessage) -> None:
        for body in bodies:
            self.worker._on_message(Envelope(ROUTER, 0, body))

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        assert not self.worker.failure, self.worker.failure


Scenario = Callable[[Network], Awaitable[None]]
FIRST, SECOND, THIRD = (KVWait(name, 0) for name in ("first", "second", "third"))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Scenario], None]:
    def run(scenario: Scenario) -> None:
        async def main() -> None:
            await scenario(Network(monkeypatch, tmp_path))

        asyncio.run(main())

    return run


def test_messages_wait_for_the_peers_address_and_its_channel(play: Callable[[Scenario], None]) -> None:
    async def scenario(net: Network) -> None:
        net.worker._send("d", FIRST)
        await net.settle()
        assert not net.asked
        net.hear(PeerUp("d", 1, "unix:one"))
        net.worker._send("d", SECOND)
        await net.settle()
        [(address, made)] = net.asked
        assert address == "unix:one"
        channel = FakeChannel()
        made.set_result(channel)
        await net.settle()
        net.worker._send("d", THIRD)
        assert channel.sent == [FIRST, SECOND, THIRD] and not net.worker.unsent

    play(scenario)


def test_what_was_meant_for_a_dead_peer_is_not_sent_to_the_next(play: Callable[[Scenario], None]) -> None:
    async def scenario(net: Network) -> None:
        net.worker._send("d", FIRST)
        net.hear(PeerDown("d", 1), PeerUp("d", 2, "unix:two"))
        await net.settle()
        assert not net.asked and not net.worker.unsent
        net.worker._send("d", SECOND)
        await net.settle()
        channel = FakeChannel()
        net.asked[0][1].set_result(channel)
        await net.settle()
        assert channel.sent == [SECOND]
        net.hear(PeerDown("d", 2))
        assert channel.closed and "d" not in net.worker.channels

    play(scenario)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("old_first", [False, True])
def test_a_channel_to_a_peer_that_died_meanwhile_is_not_taken_for_its_successors(
    old_first: bool, refused: bool, play: Callable[[Scenario], None]
) -> None:
    async def scenario(net: Network) -> None:
        net.hear(PeerUp("d", 1, "unix:one"))
        net.worker._send("d", FIRST)
        await net.settle()
        net.hear(PeerDown("d", 1), PeerUp("d", 2, "unix:two"))
        net.worker._send("d", SECOND)
        await net.settle()
        assert [address for address, _ in net.asked] == ["unix:one", "unix:two"]
        old, new = FakeChannel(), FakeChannel()

        def answer_old() -> None:
            if refused:
                net.asked[0][1].set_exception(ConnectionRefusedError())
            else:
                net.asked[0][1].set_result(old)

        if old_first:
            answer_old()
            await net.settle()
        net.asked[1][1].set_result(new)
        await net.settle()
        if not old_first:
            answer_old()
            await net.settle()
        assert net.worker.channels == {"d": new} and new.sent == [SECOND] and not new.closed
        assert old.sent == [] and old.closed is not refused

    play(scenario)


class Harm(RuntimeError):
    """What nobody expected."""


@pytest.mark.parametrize("where", ["message", "peer", "piece", "planning", "callback", "thread", "task"])
def test_an_error_at_any_entrance_ends_the_worker_which_does_nothing_more(
    where: str, play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(net: Network) -> None:
        worker, core = net.worker, net.worker.core
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(sys, "excepthook", lambda *_: None)
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        worker.catch_all()

        def harm(*_: object) -> None:
            raise Harm("harm")

        async def peer() -> AsyncIterator[Envelope]:
            yield Envelope("d", 1, FIRST)
            harm()

        def refuse(kind: type[Input]) -> None:
            monkeypatch.setattr(core, "on", lambda what, now: harm() if isinstance(what, kind) else None)

        if where == "message":
            refuse(Received)
            net.hear(FIRST)
        elif where == "peer":
            await worker._serve_peer(peer())  # type: ignore[arg-type]
        elif where == "piece":
            refuse(PieceDone)
            worker._on_news(PieceDone("d", 1, 0, True, True))
        elif where == "planning":
            refuse(Schedule)
            loop.call_later(0, worker._advance)
        elif where == "callback":
            loop.call_soon(harm)
        elif where == "thread":
            thread = threading.Thread(target=harm)
            thread.start()
            await asyncio.to_thread(thread.join)
        else:

            async def task() -> None:
                harm()

            worker._spawn(task())
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert worker.failure == "Harm: harm" and worker.done.is_set()
        heard: list[Input] = []
        monkeypatch.setattr(core, "on", lambda what, now: heard.append(what))
        net.hear(SECOND)
        assert not heard

    play(scenario)


def test_a_note_says_what_the_worker_was_reading_when_it_failed(
    play: Callable[[Scenario], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(net: Network) -> None:
        monkeypatch.setattr(sys, "excepthook", lambda *_: None)
        net.hear(KVWait("well", 3))
        assert read_notes(tmp_path, "w", 1) == set()
        monkeypatch.setattr(net.worker.core, "on", lambda *_: 1 // 0)
        net.hear(KVWait("ill", 2))
        assert read_notes(tmp_path, "w", 1) == {("ill", 2)}
        note = net.worker.runner._note
        note.begin(7, [("a", 0), ("b", 1)])
        assert read_notes(tmp_path, "w", 1) == {("ill", 2), ("a", 0), ("b", 1)}
        note.begin(8, [("a", 0)])  # a GPU has two under way
        note.end(7)
        assert read_notes(tmp_path, "w", 1) == {("ill", 2), ("a", 0)}
        note.end(8)
        assert read_notes(tmp_path, "w", 1) == {("ill", 2)} and read_notes(tmp_path, "w", 2) == set()

    play(scenario)


def test_a_broken_policy_is_told_before_the_worker_ends(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(net: Network) -> None:
        def broken(what: Input, now: float) -> None:
            if isinstance(what, Schedule):
                raise PolicyError("policy Mine: compose raised KeyError: 5")

        monkeypatch.setattr(sys, "excepthook", lambda *_: None)
        monkeypatch.setattr(net.worker.core, "on", broken)
        router = FakeChannel()
        net.worker.channels[ROUTER] = router  # type: ignore[assignment]
        net.hear(FIRST)
        assert router.sent == [Fatal("policy Mine: compose raised KeyError: 5", "w", 1, hopeless=True)]

    play(scenario)

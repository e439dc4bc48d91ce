"""A worker's channels to its peers, without peers: what is kept for one that is not reached yet, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerConfig, WorkerSettings
from minidisagg.core.messages import ROUTER, AnyMessage, Envelope, KVWait, PeerDown, PeerUp, Role
from minidisagg.runtime import worker as module
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

    def on_message(self, envelope: Envelope, now: float) -> None:
        """Nothing comes of it."""

    def schedule(self, now: float) -> None:
        """Nothing to compute."""


class NoLinks:
    def on_peer_down(self, peer: str, epoch: int) -> None:
        """There are none."""


class Network:
    """Connections are made, or refused, when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
        self.asked: list[tuple[str, asyncio.Future[FakeChannel]]] = []
        monkeypatch.setattr(module, "connect", self.connect)
        config = WorkerConfig(
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

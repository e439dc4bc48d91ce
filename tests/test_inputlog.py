"""A recorded run gives the same plans again."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import simfuzz

from minidisagg.core.engine import EngineCore
from minidisagg.core.inputlog import RecordingCore, as_recorded, read_entries, read_log, replay
from minidisagg.core.inputs import Received, Schedule, Tick
from minidisagg.core.messages import ROUTER, Envelope, SetPolicy
from minidisagg.core.policy import Policy
from minidisagg.core.router import Router, RouterSpec
from minidisagg.core.routerlog import RecordingRouter, checksum, feed, read_router
from minidisagg.core.spec import EngineSpec
from minidisagg.formats import VersionError
from minidisagg.replay.asking import Asked, Asker, Notes
from minidisagg.sim import simulator


class Recorder:
    """Has the router and every engine of a simulation write a log."""

    def __init__(self) -> None:
        self.logs: list[io.BytesIO] = []
        self.router = io.BytesIO()

    def __call__(self, spec: EngineSpec, load_policy: Callable[[str], Policy]) -> RecordingCore:
        self.logs.append(io.BytesIO())
        return RecordingCore(spec, load_policy, self.logs[-1])

    def make_router(self, spec: RouterSpec, policy: Policy) -> RecordingRouter:
        return RecordingRouter(spec, policy, "first", self.router)


def record(seed: int, monkeypatch: pytest.MonkeyPatch, moving: bool = False) -> tuple[Recorder, Any]:
    recorder = Recorder()
    monkeypatch.setattr(simulator, "EngineCore", recorder)
    monkeypatch.setattr(simulator, "Router", recorder.make_router)
    sim = simfuzz.build(seed, moving=moving)
    assert not simfuzz.check(sim)
    return recorder, sim


@pytest.mark.parametrize(("seed", "moving"), [*((n, False) for n in range(12)), *((n, True) for n in range(3))])
def test_a_replay_gives_the_same_plans(seed: int, moving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what moves, also by an operator's hand."""
    recorder, sim = record(seed, monkeypatch, moving)
    plans = 0
    for log in recorder.logs:
        log.seek(0)
        for recorded, replayed in replay(log, lambda _: sim.make_policy()):
            assert recorded == replayed
            plans += recorded is not None
    assert plans > 20
    recorder.router.seek(0)
    head, entries = read_router(recorder.router)
    router, sums = Router(head.spec, sim.make_policy()), []
    for entry, recorded_sum in entries:
        sums.append(checksum(feed(router, entry, lambda _: sim.make_policy())))
        assert sums[-1] == recorded_sum, entry
    assert len(set(sums)) > 10 and not router.requests


@pytest.mark.parametrize("seed", range(12, 22))
def test_who_is_asked_beside_it_changes_nothing_and_is_of_its_own_mind(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is another instance of the same policy: on the same state it decides the same, whatever happens."""
    recorder, sim = record(seed, monkeypatch)
    notes = Notes()
    for log in recorder.logs:
        log.seek(0)
        spec, entries = read_entries(log)
        asker = Asker(spec.name, sim.make_policy(), notes)
        core = EngineCore(spec, lambda _, asker=asker: Asked(sim.make_policy(), asker))
        asker.sent = core.sender.transfers
        for entry, recorded in entries:
            plan = core.on(entry.what, entry.now)
            core.outbox.clear()
            assert not isinstance(entry.what, Schedule) or as_recorded(plan) == recorded
        assert asker.differences == []
    assert notes.tallies["compose"].asked > 20 and notes.tallies["order"].asked > 5


def test_another_policy_gives_other_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reversed(Policy):
        def order(self, request: Any, stage: Any, worker: Any) -> Any:
            return -request.arrival

    recorder, _ = record(1, monkeypatch)
    differs = False
    for log in recorder.logs:
        log.seek(0)
        try:
            differs |= any(recorded != replayed for recorded, replayed in replay(log, lambda _: Reversed()))
        except (KeyError, StopIteration, RuntimeError, ValueError):
            differs = True
    assert differs


def test_a_log_that_ends_in_mid_record_is_read_up_to_there() -> None:
    log = io.BytesIO()
    core = RecordingCore(replace(simfuzz.build(0).workers["w0"].core.spec), lambda _: Policy(), log)
    core.on(Tick(), 1.0)
    core.on(Tick(), 2.0)
    head, _, whole = log.getvalue().partition(b"\n")
    assert head == b"minidisagg inputs 8"
    for cut in (1, 3, 6):
        assert len(list(read_log(io.BytesIO(whole[:-cut])))) == 2
    assert len(list(read_log(io.BytesIO(whole)))) == 3


def test_the_policies_are_loaded_by_their_names() -> None:
    log, loaded = io.BytesIO(), list[str]()
    spec = replace(simfuzz.build(0).workers["w0"].core.spec, policy="first:k=1")
    core = RecordingCore(spec, lambda _: Policy(), log)
    core.on(Received(Envelope(ROUTER, 0, SetPolicy("second"))), 1.0)
    core.on(Schedule(), 2.0)

    def load(spec: str) -> Policy:
        loaded.append(spec)
        return Policy()

    log.seek(0)
    assert list(replay(log, load)) == [(None, None)] and loaded == ["first:k=1", "second"]


@pytest.mark.parametrize(
    ("head", "said"),
    [(b"minidisagg inputs 1\n", "version 1"), (b"", "no version"), (b"\x93\x00\x00", "no version"), (b"x 2\n", "no ")],
)
def test_another_version_is_refused(head: bytes, said: str) -> None:
    with pytest.raises(VersionError, match=f"this input log has {said}"):
        read_entries(io.BytesIO(head + b"\x01\x00\x00\x00\xc0"))

"""The core under faults, and bugs planted into it: a check that cannot fail proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from simfuzz import run_seeds

from minidisagg.core.blocks import BlockPool
from minidisagg.core.engine import EngineCore
from minidisagg.core.handoff import Outgoing, Receiver
from minidisagg.core.inputs import LayersDone, Received
from minidisagg.core.ledger import DestinationLedger
from minidisagg.core.messages import Abort, Envelope, KVAck, KVCancel, KVDone, KVFailed, KVGrant
from minidisagg.core.plan import StepPlan
from minidisagg.core.request import Request, State
from minidisagg.core.scheduler import BatchBuilder
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import SimWorker

SEEDS = 400
PART = 100  # of them, in one test
FULL = 10_000


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_faults_lose_nothing(first: int) -> None:
    failures, ends = run_seeds(first, first + PART)
    assert not failures
    assert ends["length"] > 5 * PART and ends["stop"] > PART and ends["preempted"] > PART / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_seeds() -> None:
    failures, _ = run_seeds(SEEDS, FULL)
    assert not failures


def free_at_end_with_a_step_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = EngineCore._retire_if_settled

    def early(self: EngineCore, request: Request) -> None:
        if request.state is not State.DONE and request.inflight and request.pages:
            self.pool.drop(request.pages)
            request.pages = []
        settle(self, request)

    monkeypatch.setattr(EngineCore, "_retire_if_settled", early)


def ignore_the_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of an earlier incarnation, late or twice, is taken for news of the present one."""
    on_received = EngineCore._on_received

    def any_incarnation(self: EngineCore, what: Received) -> None:
        body = what.envelope.body
        if isinstance(body, Abort | KVAck | KVCancel | KVDone | KVFailed | KVGrant):
            for request_id, incarnation in self.requests:
                if request_id == body.request_id:
                    body = msgspec.structs.replace(body, incarnation=incarnation)
        on_received(self, Received(Envelope(what.envelope.source, what.envelope.epoch, body)))

    monkeypatch.setattr(EngineCore, "_on_received", any_incarnation)


def lose_the_lease_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Receiver, "on_tick", lambda self, now: None)
    monkeypatch.setattr(EngineCore, "_on_tick", lambda self, tick: None)


def reuse_before_the_abort_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    abort = DestinationLedger.abort

    def hasty(self: DestinationLedger, peer: str, link_epoch: int, peer_dead: bool, now: float) -> None:
        abort(self, peer, link_epoch, peer_dead, now)
        self.on_aborted(peer, link_epoch)

    monkeypatch.setattr(DestinationLedger, "abort", hasty)


def free_granted_pages_when_the_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Receiver.drop

    def hasty(self: Receiver, request: Request, reason: str) -> None:
        self.transfers[request.key].expected = 0
        drop(self, request, reason)

    monkeypatch.setattr(Receiver, "drop", hasty)


def forget_to_release_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = BlockPool.drop

    def leaky(self: BlockPool, pages: Any) -> None:
        drop(self, pages[:-1] if len(pages) > 6 else pages)

    monkeypatch.setattr(BlockPool, "drop", leaky)


def publish_before_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    put = BatchBuilder._put

    def hasty(self: BatchBuilder, request: Request, start: int, count: int, index: int) -> None:
        put(self, request, start, count, index)
        known = min(request.num_scheduled, len(request.prompt) + len(request.output))
        confirmed, request.num_computed = request.num_computed, known
        self._scheduler.publish(request)
        request.num_computed = confirmed

    monkeypatch.setattr(BatchBuilder, "_put", hasty)


def report_layers_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Simulator, worker: SimWorker, plan: StepPlan, layer: int) -> None:
        def report() -> None:
            if worker.steps and worker.steps[0].plan is plan:
                worker.core.on(LayersDone(plan.step_id, layer), self.now)

        self._inside(worker, report)

    monkeypatch.setattr(Simulator, "_report_layers", hasty)


def take_some_layers_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    push = Outgoing.push

    def hasty(self: Outgoing, end: int, layer: int, now: float) -> None:
        push(self, end, layer, now)
        if self.layers:
            self.sent, self.layers = end // self.sender.spec.page_size, 0

    monkeypatch.setattr(Outgoing, "push", hasty)


@pytest.mark.parametrize(
    "plant",
    [
        report_layers_before_they_are_computed,
        take_some_layers_for_all,
        free_at_end_with_a_step_in_flight,
        ignore_the_incarnation,
        reuse_before_the_abort_is_confirmed,
        free_granted_pages_when_the_client_leaves,
        forget_to_release_a_prefix,
        publish_before_it_is_computed,
        lose_the_lease_sweep,
    ],
)
def test_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for first in range(0, SEEDS, 20):
        if run_seeds(first, first + 20)[0]:
            return
    pytest.fail(f"{SEEDS} seeds did not notice")

"""A worker's core and the store below it: what it asks, what it holds meanwhile, and a store that does not answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import simfuzz
from cluster import greedy
from msgspec import structs
from stepwise import spec

from minidisagg.core.blocks import PageState
from minidisagg.core.effects import LoadPages, SavePage
from minidisagg.core.inputs import Input
from minidisagg.core.messages import Role
from minidisagg.core.policy import Policy
from minidisagg.sim import shelf
from minidisagg.sim.devices import TimingOnly
from minidisagg.sim.shelf import Shelf
from minidisagg.sim.simulator import Simulator


def prompt(number: int, tokens: int = 40) -> list[int]:
    """Of its own."""
    return list(range(1000 * number, 1000 * number + tokens))


# ---------------------------------------------------------------- a store that does not answer


def test_a_store_that_hangs_costs_one_lease_and_no_more_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = Simulator([spec("w0", store=True, lease=2.0, num_pages=64)], Policy)
    monkeypatch.setattr(shelf, "SECONDS", 200.0)  # of each page
    for number in range(12):
        sim.submit(f"r{number}", prompt(number), greedy(4), 5.0 * number)
    sim.submit("meanwhile", prompt(12), greedy(4), 1.0)
    sim.run(until=100.0)
    waits = {name: one.token_times[0] - one.spec.arrival for name, one in sim.outcomes.items()}
    assert len(waits) == 13 and {one.finish for one in sim.outcomes.values()} == {"length"}
    assert all(waits.pop(name) < 3.0 for name in ("r0", "meanwhile")) and max(waits.values()) < 0.5
    core = sim.workers["w0"].core
    assert core.pool.counts[PageState.INFLIGHT] == 18 and core.pool.counts[PageState.LIVE] <= 20  # two prompts
    monkeypatch.setattr(shelf, "SECONDS", 0.003)
    sim.run(until=3000.0)  # it answers at last
    assert not core.tiers.busy and not core.tiers.silent
    before = len(sim.shelf.pages)
    sim.submit("again", prompt(13), greedy(4), sim.now)  # and is asked again
    sim.run()
    assert not simfuzz.verdict(sim) and len(sim.shelf.pages) == before + 10 and sim.outcomes["again"].finish == "length"


def test_saves_that_hang_hold_no_more_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out = Shelf.carry_out

    def hang(self: Shelf, device: TimingOnly, effect: LoadPages | SavePage) -> tuple[float, Callable[[], Input]]:
        seconds, what = carry_out(self, device, effect)
        return (1000.0 if isinstance(effect, SavePage) else seconds), what

    monkeypatch.setattr(Shelf, "carry_out", hang)
    sim = Simulator([spec("w0", store=True, lease=2.0, num_pages=64)], Policy)
    for number in range(12):
        sim.submit(f"r{number}", prompt(number), greedy(4), 5.0 * number)
    sim.run(until=100.0)
    assert {one.finish for one in sim.outcomes.values()} == {"length"} and len(sim.outcomes) == 12
    assert sim.workers["w0"].core.pool.counts[PageState.LIVE] == 10  # the first one's


def test_who_comes_within_the_lease_of_a_store_that_hangs_begins_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SECONDS", 1e6)  # of each page
    sim = Simulator([spec("w0", store=True, lease=2.0, num_pages=64)], Policy)
    for number in range(30):
        sim.submit(f"r{number}", prompt(number), greedy(4), 0.05 * number)
    sim.run(until=100.0)
    assert {one.finish for one in sim.outcomes.values()} == {"length"} and len(sim.outcomes) == 30
    assert max(one.token_times[-1] for one in sim.outcomes.values()) < 5.0
    assert sim.workers["w0"].core.pool.counts[PageState.INFLIGHT] <= 32  # half of the cache


def test_who_waits_for_others_loads_asks_again_when_one_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a store that answers all else, with room that a handoff has left meanwhile."""
    carry_out = Shelf.carry_out

    def hang(self: Shelf, device: TimingOnly, effect: LoadPages | SavePage) -> tuple[float, Callable[[], Input]]:
        seconds, what = carry_out(self, device, effect)
        return (30.0 if isinstance(effect, LoadPages) and effect.request_id == "r0" else seconds), what

    monkeypatch.setattr(Shelf, "carry_out", hang)
    sim = Simulator([spec("w0", store=True, lease=2.0, num_pages=256)], Policy)
    core = sim.workers["w0"].core
    coming = core.pool.reserve(115) or []
    sim.submit("runs", prompt(9, 8), greedy(400), 0.0)  # and saves a page now and then
    sim.submit("r0", prompt(0), greedy(4), 0.5)
    sim.submit("r1", prompt(1), greedy(4), 0.6)
    sim.plan(1.0, lambda: core.pool.cancel(coming))
    sim.run(until=1.5)
    assert [one.request.request_id for one in core.tiers.loading.values()] == ["r0"] and not core.tiers.silent
    sim.run(until=100.0)
    assert not simfuzz.verdict(sim) and {one.finish for one in sim.outcomes.values()} == {"length"}
    assert sim.outcomes["r1"].token_times[0] < 4.0


def test_who_comes_at_once_is_read_all_the_same() -> None:
    sim = Simulator([spec("w0", store=True, num_pages=64)], Policy)
    for again in "", "'":
        for number in range(6):
            sim.submit(f"r{number}{again}", prompt(number), greedy(4), sim.now)
        sim.run()
        for number in range(6, 12):  # push them out
            sim.submit(f"r{number}{again}", prompt(number), greedy(4), sim.now)
        sim.run()
    assert not simfuzz.verdict(sim)
    assert [sim.outcomes[f"r{number}'"].cached_tokens for number in range(6)] == [36] * 6


# ---------------------------------------------------------------- more pages than are written at once


@pytest.mark.parametrize("through", [False, True])
def test_all_pages_of_a_long_prompt_reach_the_store_a_quarter_of_the_cache_at_once(
    through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = Simulator([spec("w0", Role.BOTH, store=True, through_store=through, num_pages=64)], Policy)
    held, carry_out = list[int](), Shelf.carry_out

    def see(self: Shelf, device: TimingOnly, effect: LoadPages | SavePage) -> tuple[float, Callable[[], Input]]:
        held.append(len(sim.workers["w0"].core.tiers.saving))
        return carry_out(self, device, effect)

    monkeypatch.setattr(Shelf, "carry_out", see)
    sim.submit("a", prompt(1, 200), greedy(4), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim) and len(sim.shelf.pages) == 50 and max(held) == 16


def test_a_page_that_is_evicted_before_its_turn_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SECONDS", 0.5)
    sim = Simulator([spec("w0", store=True, num_pages=16)], Policy)
    for number in range(8):
        sim.submit(f"r{number}", prompt(number, 44), greedy(4), 0.01 * number)
    sim.run()
    assert not simfuzz.verdict(sim) and 4 < len(sim.shelf.pages) < 88
    assert {one.finish for one in sim.outcomes.values()} == {"length"}


# ---------------------------------------------------------------- what nobody asks for


@pytest.mark.parametrize("through", [False, True])
def test_a_prompt_whose_log_probabilities_are_told_is_saved_for_its_own_handoff_only(through: bool) -> None:
    roles = ("w0", Role.PREFILL), ("w1", Role.DECODE)
    sim = Simulator([spec(name, role, store=True, through_store=through) for name, role in roles], Policy)
    sim.submit("a", prompt(1), structs.replace(greedy(4), prompt_logprobs=0), 0.0, salt="a/nobody else's")
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["a"].finish == "length"
    assert bool(sim.shelf.pages) is through

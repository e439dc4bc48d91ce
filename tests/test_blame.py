"""Whose fault it was that a worker died: suspects are halved until one stands alone, and nobody else is charged."""

from __future__ import annotations

import math
import random

import pytest
from simfuzz import verdict

from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.spec import EngineSpec
from minidisagg.sim.simulator import Simulator, World

CLUSTERS = {"colocated": [3], "two": [3, 3], "1p1d": [1, 2], "2p2d": [1, 1, 2, 2]}


def build(roles: list[int], requests: int, depth: int, seed: int, options: WorkerOptions | None = None) -> Simulator:
    specs = [
        EngineSpec(
            f"w{i}", 1, Role(role), num_pages=400, page_size=4, num_layers=2, fingerprint="f", lease=5.0,
            options=options or WorkerOptions(),
        )
        for i, role in enumerate(roles)
    ]  # fmt: skip
    sim, rng = Simulator(specs, Policy, World(depth=depth, seed=seed, restart_after=0.1)), random.Random(seed)
    for index in range(requests):
        prompt = [rng.randrange(1000) for _ in range(rng.randint(4, 20))]
        sim.submit(f"r{index}", prompt, SamplingParams(max_tokens=40, temperature=0.0), rng.random() * 0.05)
    return sim


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("roles", CLUSTERS.values(), ids=CLUSTERS)
def test_a_poison_request_is_found_and_its_neighbours_are_not_charged(
    roles: list[int], depth: int, charged: dict[str, int]
) -> None:
    for seed in range(12):
        neighbours = random.Random(seed).choice([0, 1, 3, 8, 8, 15])
        sim = build(roles, neighbours + 1, depth, seed)
        guilty = f"r{seed % (neighbours + 1)}"
        sim.poison = {guilty}
        sim.run(until=700.0)
        outcome = sim.outcomes.pop(guilty)
        assert outcome.finish == "error" and outcome.error.startswith("failed 3 times, last: worker w"), outcome
        assert [o.finish for o in sim.outcomes.values()] == ["length"] * neighbours
        assert not verdict(sim)
        assert not any(charged[name] for name in sim.outcomes), (seed, charged)
        assert sim.deaths <= math.ceil(math.log2(neighbours + 1)) + 3, (seed, sim.deaths)


def test_two_poison_requests_are_both_found(charged: dict[str, int]) -> None:
    for seed in range(10):
        sim = build([3], 10, 0, seed)
        sim.poison = {"r2", "r7"}
        sim.run(until=700.0)
        assert {name for name, o in sim.outcomes.items() if o.finish == "error"} == sim.poison
        assert {name for name, failures in charged.items() if failures} == sim.poison
        assert sim.deaths <= 2 * (math.ceil(math.log2(10)) + 3)


def test_suspects_that_have_survived_share_steps_again() -> None:
    """Cohorts take turns, so that a request alone in its cohort would stay slow for as long as it runs."""
    sim = build([3], 8, 0, 1)
    sim.plan(0.2, lambda: sim.kill("w0"))
    seen: set[int] = set()
    shared: list[bool] = []

    def look() -> None:
        core = sim.workers["w0"].core
        seen.update(request.cohort for request in core.requests.values())
        shared.append(not core.scheduler.cohorts and len(core.scheduler.running) == 8)
        if not sim.settled:
            sim.at(sim.now + 0.01, look)

    sim.plan(0.2, look)
    sim.run(until=700.0)
    assert not verdict(sim) and {o.finish for o in sim.outcomes.values()} == {"length"}
    assert len(seen - {0}) == 2 and shared[-1] is False and any(shared), "halved, and trusted again"


def test_the_operators_own_kill_accuses_nobody(charged: dict[str, int]) -> None:
    sim = build([3], 4, 0, 2)

    def kill() -> None:
        epoch = sim.workers["w0"].core.spec.epoch
        sim.workers["w0"].steps.clear()
        sim.kill("w0")
        sim.router.on_worker_down("w0", epoch, sim.now, ())

    for second in range(1, 8):
        sim.plan(0.15 * second, kill)
    sim.run(until=700.0)
    assert {o.finish for o in sim.outcomes.values()} == {"length"} and not any(charged.values())

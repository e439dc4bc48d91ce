"""The simulator itself: its memory shows damage, its seeds replay, its times are those of its cost model."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import simfuzz
from stepwise import spec

from minidisagg.core.blocks import IntegrityError
from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.plan import Piece
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.sim.cost_model import LinearCost
from minidisagg.sim.memory import chain, oracle, sample
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import World

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def run(roles: list[int], **options: float) -> Simulator:
    sim = Simulator([spec(f"w{i}", Role(role), **options) for i, role in enumerate(roles)], Policy)
    sim.submit("a", PROMPT, SamplingParams(max_tokens=4), 0.0)
    sim.run()
    return sim


def test_the_oracle_depends_on_every_token_and_its_place() -> None:
    sampling = SamplingParams(max_tokens=4)
    outputs = {
        tuple(oracle(prompt, sampling, 1 << 16)) for prompt in (PROMPT, PROMPT[::-1], [*PROMPT[:-1], 7], PROMPT[1:])
    }
    assert len(outputs) == 4
    slots = [chain(0, 1), chain(chain(0, 1), 2)]
    assert sample(slots, 1 << 16) != sample(slots[::-1], 1 << 16)


@pytest.mark.parametrize("roles", [[3], [1, 2]])
@pytest.mark.parametrize("one_sided", [False, True])
def test_an_undisturbed_run_is_the_oracle(roles: list[int], one_sided: bool) -> None:
    sim = run(roles, one_sided_links=one_sided)
    assert not simfuzz.verdict(sim)
    outcome = sim.outcomes["a"]
    assert outcome.tokens == oracle(PROMPT, outcome.spec.sampling, sim.world.vocab) and outcome.finish == "length"


def test_times_are_those_of_the_cost_model() -> None:
    cost = LinearCost()
    outcome = run([3]).outcomes["a"]
    prefill = cost.step + len(PROMPT) * (cost.prefill_token + cost.context_token)
    assert outcome.token_times[0] == pytest.approx(prefill + 3 * cost.message, abs=1e-3)
    gaps = [b - a for a, b in zip(outcome.token_times, outcome.token_times[1:], strict=False)]
    assert gaps == pytest.approx([cost.step + cost.decode_seq + (9 + i) * cost.context_token for i in range(3)])
    times = run([1, 2]).outcomes["a"].times
    assert times is not None and times.transfer >= cost.transfer_seconds(2)


def test_a_damaged_slot_shows() -> None:
    sim = Simulator([spec("w0")], Policy, World(check=False))
    sim.submit("a", PROMPT, SamplingParams(max_tokens=8), 0.0)
    sim.plan(0.03, lambda: sim.workers["w0"].device.memory.planes[0][0].__setitem__(1, 0))
    sim.run()
    assert len(simfuzz.verdict(sim)) == 1


def test_a_write_into_a_page_of_someone_else_is_an_error() -> None:
    sim = Simulator([spec("w0")], Policy)
    with pytest.raises(IntegrityError, match="page 0 of w0 is in use while it is FREE"):
        device = sim.workers["w0"].device
        device.send(Piece("w0", 1, 0, True, "a", 0, [], [], 0, (0, 2)), device, [0])


def test_a_worker_that_was_stopped_twice_does_all_in_order() -> None:
    sim = Simulator([spec("w0")], Policy, World(depth=1))
    sim.submit("a", PROMPT, SamplingParams(max_tokens=8), 0.0)
    for at, seconds in ((0.005, 0.05), (0.03, 0.5), (0.5, 0.2)):
        sim.plan(at, partial(sim.stall, "w0", seconds))
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["a"].finish == "length"


def test_a_seed_replays_whatever_the_hash_seed() -> None:
    script = (
        "import hashlib, simfuzz\nseen = []\nfor seed in range(12):\n    sim = simfuzz.build(seed)\n"
        "    simfuzz.check(sim)\n    seen.append([(k, o.token_times) for k, o in sim.outcomes.items()])\n"
        "import sys; sys.stdout.write(hashlib.sha256(repr(seen).encode()).hexdigest())"
    )
    digests = set()
    for hash_seed in ("1", "3"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        digests.add(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True).stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("one_sided", [False, True])
def test_undisturbed_handoffs_give_up_no_link_and_compute_nothing_twice(one_sided: bool) -> None:
    """Recovery hides a broken handoff from every check of what clients get."""
    options = WorkerOptions(8, 8, 4)  # chunks, so that a handoff has several pieces
    specs = [
        spec(name, role, num_pages=64, page_size=2, one_sided_links=one_sided, options=options)
        for name, role in (("p", Role.PREFILL), ("d", Role.DECODE))
    ]
    sim, given_up = Simulator(specs, Policy), list[object]()
    sim._abort_link = lambda worker, effect: given_up.append(effect)  # type: ignore[method-assign]
    sim.router._resubmit = lambda *why: given_up.append(why)  # type: ignore[method-assign]
    for index in range(10):
        sim.submit(f"r{index}", [index, *PROMPT], SamplingParams(max_tokens=4), 0.3 * index)
    sim.run(60.0)
    assert not given_up and {outcome.finish for outcome in sim.outcomes.values()} == {"length"}

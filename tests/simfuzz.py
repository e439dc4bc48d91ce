"""Random clusters, loads and faults on the simulator, one seed each. `python tests/simfuzz.py SEED` replays one."""

from __future__ import annotations

import random
import sys
from collections import Counter

from minidisagg.core.engine import EngineSpec
from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.router import RouterSpec
from minidisagg.sim.cost_model import LinearCost
from minidisagg.sim.simulator import Chaos, Simulator, oracle

CLUSTERS = {"colocated": [3, 3], "1p1d": [1, 2], "2p1d": [1, 1, 2], "1p2d": [1, 2, 2], "mixed": [1, 2, 3]}


def build(seed: int) -> Simulator:
    """A cluster with its load and its faults, all drawn from the seed."""
    rng = random.Random(seed)
    one_sided = rng.random() < 0.5
    page_size = rng.choice([2, 4, 8])
    specs = [
        EngineSpec(
            f"w{index}", 1, Role(role), num_pages=rng.choice([24, 32, 64]), page_size=page_size, num_layers=2,
            fingerprint="f", one_sided_links=one_sided, prefix_caching=rng.random() < 0.8,
            lease=rng.choice([1.0, 5.0]), link_timeout=0.5,
            options=WorkerOptions(rng.choice([3, 8]), rng.choice([8, 32, 128]), rng.choice([0, 4, 16])),
        )
        for index, role in enumerate(CLUSTERS[rng.choice(sorted(CLUSTERS))])
    ]  # fmt: skip
    chaos = Chaos(
        reorder=rng.choice([0, 0, 0.1]), duplicate=rng.choice([0, 0.1]), break_transfer=rng.choice([0, 0, 0.02, 0.1]),
        abort_delay=rng.choice([0, 0.3, 1.0]),
    )  # fmt: skip
    sim = Simulator(
        specs, Policy, chaos=chaos, seed=seed, depth=rng.choice([0, 1]), vocab=rng.choice([8, 50]),
        cost=LinearCost(link_page=rng.choice([0.0005, 0.02])),
        router=RouterSpec(lost_after=rng.choice([2.0, 8.0]), stuck_after=10.0),
    )  # fmt: skip
    capacity = min(spec.num_pages for spec in specs) * page_size
    shared = [rng.randrange(1000) for _ in range(20)]
    count = rng.randint(5, 25)
    for index in range(count):
        length = rng.randint(1, capacity // 2)
        prompt = (shared[: rng.randint(0, 20)] + [rng.randrange(1000) for _ in range(length)])[:length]
        sampling = SamplingParams(
            max_tokens=rng.randint(1, max(1, min(30, capacity - length - 1))), temperature=0.0,
            stop_token_ids=tuple(rng.sample(range(8), rng.choice([0, 1]))), min_tokens=rng.choice([0, 0, 3]),
        )  # fmt: skip
        at = rng.random()
        sim.submit(f"r{index}", prompt, sampling, at)
        if rng.random() < 0.2:  # the client leaves
            sim.plan(at + rng.random() * rng.choice([0.05, 0.5]), lambda i=f"r{index}": sim.abort(i))
    for _ in range(rng.randint(0, 5)):
        name, at = f"w{rng.randrange(len(specs))}", rng.random() * 2.0
        if rng.random() < 0.4:
            sim.plan(at, lambda n=name: sim.kill(n))
        else:
            seconds = rng.choice([0.1, 0.7, 1.2, 2.4, 9.0])
            sim.plan(at, lambda n=name, s=seconds: sim.stall(n, s))
    return sim


def check(sim: Simulator) -> list[str]:
    """Run to the end; what is wrong, if anything: no end, other tokens than the oracle's, a leaked page."""
    sim.run(until=600.0)
    wrong = []
    for request_id, outcome in sim.outcomes.items():
        expected = oracle(outcome.prompt, outcome.sampling, sim.vocab)
        if not outcome.finish:
            wrong.append(f"{request_id} never ended")
        elif outcome.finish in ("stop", "length") and outcome.tokens != expected:
            wrong.append(f"{request_id} got {outcome.tokens}, not {expected}")
        elif outcome.tokens != expected[: len(outcome.tokens)]:
            wrong.append(f"{request_id} ended with {outcome.finish} after wrong tokens")
        elif outcome.times is not None:
            times = outcome.times
            stages = times.queue + times.prefill + times.transfer + times.decode_wait + times.decode
            if abs(stages - times.e2e) > 1e-9:
                wrong.append(f"{request_id}: stages add up to {stages}, not {times.e2e}")
    for name, worker in sim.workers.items():
        if worker.alive:
            free, live, cached, inflight, quarantined = worker.core.pool.counts
            if live or inflight or quarantined or free + cached != worker.core.num_pages:
                wrong.append(f"{name} leaks: {worker.core.pool.counts}")
    return wrong


def run_seeds(first: int, last: int) -> tuple[dict[int, list[str]], Counter[str]]:
    """Failing seeds with what was wrong, and how the requests of all seeds ended."""
    failures: dict[int, list[str]] = {}
    ends: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            sim = build(seed)
            wrong = check(sim)
            ends.update(outcome.finish for outcome in sim.outcomes.values())
            ends["preempted"] += sum(worker.core.preemptions for worker in sim.workers.values())
        except (AssertionError, RuntimeError, KeyError, ValueError, IndexError) as error:
            wrong = [repr(error)]
        if wrong:
            failures[seed] = wrong
    return failures, ends


if __name__ == "__main__":
    seeds = [int(argument) for argument in sys.argv[1:]]
    found, ended = run_seeds(seeds[0], seeds[1] if len(seeds) > 1 else seeds[0] + 1)
    sys.stdout.write(f"{len(found)} failing seeds {dict(list(found.items())[:5])}\n{dict(ended)}\n")

"""Random clusters, loads and faults on the simulator, one seed each. `python tests/simfuzz.py SEED` replays one;
`python tests/simfuzz.py digest FIRST LAST` says in one number what came of many, and
`python tests/simfuzz.py moving FIRST LAST` plays them with everything that moves KV."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from minidisagg.core.granularity import Granularity
from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.plan import CODECS
from minidisagg.core.policy import (
    Change,
    ClusterView,
    Migration,
    Placement,
    Policy,
    Reject,
    Replica,
    RequestView,
    RoleChange,
    Work,
    WorkerOptions,
)
from minidisagg.core.router import RouterSpec
from minidisagg.core.scheduler import BatchBuilder, View
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tracked import Stage, StageTimes
from minidisagg.policies.prefill_first import PrefillFirst
from minidisagg.policies.sarathi import Sarathi
from minidisagg.sim.cost_model import Chaos, LinearCost
from minidisagg.sim.memory import oracle
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import World

CLUSTERS = {
    "colocated": [3, 3], "1p1d": [1, 2], "2p1d": [1, 1, 2], "1p2d": [1, 2, 2], "mixed": [1, 2, 3],
    "2p3d": [1, 1, 2, 2, 2], "both": [3, 3, 3, 3],
}  # fmt: skip
LONG = 600.0  # seconds: no request takes so long unless it was lost
ENDS = "stop", "length", "abort", "reject", "error"
STAGES = ("queue", "prefill", "transfer", "decode_wait", "decode")


class LateBinding(Policy):
    """Names the decode worker, any of them, when prefill has ended."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Asked a second time, the request says where it is."""
        if not request.prefill:
            placement = super().place(request, cluster)
            return placement if isinstance(placement, Reject) else Placement(placement.prefill, None)
        decode = cluster.candidates(Role.DECODE)
        if not decode:
            return Reject(1.0, "no worker takes decode")
        return Placement(request.prefill, cluster.rng.choice(decode).name)


class Asked(Policy):
    """The defaults, and that each hook is given what it is promised."""

    PROMISED: ClassVar[dict[str, tuple[type, ...]]] = {
        "admit": (RequestView, ClusterView), "place": (RequestView, ClusterView), "rebalance": (ClusterView,),
        "accept": (Work, View), "order": (Work, str, View), "compose": (BatchBuilder, View),
        "evict": (View, list),
    }  # fmt: skip
    STAGES = "prefill", "transfer", "decode"

    def __init__(self) -> None:
        super().__init__()
        for hook in self.PROMISED:
            setattr(self, hook, partial(self._ask, hook, getattr(self, hook)))

    def _ask(self, hook: str, answer: Callable[..., Any], *given: Any) -> Any:
        assert len(given) == len(self.PROMISED[hook]) and all(map(isinstance, given, self.PROMISED[hook])), given
        assert hook != "order" or given[1] in self.STAGES, given
        return answer(*given)


class Mover(Policy):
    """Moves whatever can be moved, at random: handoffs at any token, migrations, copies of prefixes there and back."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Somewhere."""
        rng, prefill, decode = cluster.rng, cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return Reject(1.0, "no worker takes it")
        split = rng.choice([None, rng.randint(1, request.prefill_len + 5)])
        fetch = rng.choice([None, rng.choice(list(cluster.workers))])
        where, codec = (rng.choice(prefill).name, rng.choice(decode).name), rng.choice([None, *CODECS])
        if rng.random() < 0.1:
            return Placement(where[0], None, codec, None, fetch)
        return Placement(*where, codec, split, fetch, rng.random() < 0.5)

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        """Now and then."""
        answer = self.place(request, cluster) if cluster.rng.random() < 0.3 else None
        return answer if isinstance(answer, Placement) else None

    def rebalance(self, cluster: ClusterView) -> list[Change]:
        """Of what there is."""
        rng, changes = cluster.rng, list[Change]()
        names = list(cluster.workers)
        for request in cluster.requests() if names else []:
            if rng.random() < 0.5:
                changes.append(Migration(request, rng.choice(names)))
            if rng.random() < 0.1:
                changes.append(Replica(request, rng.choice(names), rng.choice(names)))
        return changes


POLICIES: list[Callable[[], Policy]] = [Policy, Asked, LateBinding, PrefillFirst, lambda: Sarathi(chunk=6)]


WHOLE = Granularity()
GRANULARITIES = WHOLE, Granularity(whole=True), Granularity(layers=1), Granularity(layers=2), Granularity(weight=6)


def build(seed: int, granularities: Sequence[Granularity] = (WHOLE,), moving: bool = False) -> Simulator:
    """A cluster with its load and its faults, all drawn from the seed, and one of these granularities.

    `moving`: its policy moves what it can.
    """
    rng = random.Random(seed)
    granularity = granularities[seed // 7 % len(granularities)]
    one_sided = rng.random() < 0.5
    page_size = rng.choice([1, 2, 2, 4, 4, 8, 16])
    roles = CLUSTERS[rng.choice(sorted(CLUSTERS))]
    sizes = rng.choice([[3], [6, 10], [6, 10], [24, 32], [24, 32, 64]])
    leases, link_timeout = rng.choice([([1.0, 5.0], 0.5), ([1.0, 5.0], 0.5), ([0.3], 4.0)])
    specs = [
        EngineSpec(
            f"w{index}", 1, Role(role), num_pages=rng.choice(sizes), page_size=page_size, num_layers=5,
            fingerprint="f", one_sided_links=one_sided, prefix_caching=rng.random() < 0.8,
            lease=rng.choice(leases), link_timeout=link_timeout, step_deadline=10.0,
            granularity=granularity, layer_bytes=1,
            options=WorkerOptions(rng.choice([1, 3, 8, 8]), rng.choice([8, 32, 128]), rng.choice([0, 4, 16])),
        )
        for index, role in enumerate(roles)
    ]  # fmt: skip
    chaos = Chaos(
        reorder=rng.choice([0, 0, 0.1]), duplicate=rng.choice([0, 0.1, 0.3]), delay=rng.choice([0.02, 0.5, 2.0]),
        drop=rng.choice([0, 0, 0.02]), break_transfer=rng.choice([0, 0, 0.02, 0.1]),
        abort_delay=rng.choice([0, 0.3, 1.0]),
    )  # fmt: skip
    router = RouterSpec(
        max_waiting=rng.choice([8, 1024, 1024]), request_timeout=rng.choice([4.0, LONG, LONG]),
        lost_after=rng.choice([2.0, 8.0]), stuck_after=10.0,
    )  # fmt: skip
    policy, depth, vocab = rng.choice(POLICIES), rng.choice([0, 1, 1, 2]), rng.choice([8, 50])
    cost = LinearCost(link_page=rng.choice([0.0005, 0.02]))
    if moving:
        policy = Mover
        store = random.Random(f"store {seed}").random() < 0.5
        after = [random.Random(f"{seed} {spec.name}").choice([1, 1, 4]) for spec in specs]
        specs = [
            replace(one, decode_after=n, store=store, through_store=store and seed % 3 == 0)
            for one, n in zip(specs, after, strict=True)
        ]
    sim = Simulator(specs, policy, World(cost, chaos, router, seed, vocab, depth))
    _load(sim, rng, min(spec.num_pages for spec in specs) * page_size, page_size)
    _faults(sim, rng, specs)
    if moving:
        for _ in range(240):
            sim.plan(rng.random() * 1.6, partial(_migrate, sim, rng))
    return sim


def _migrate(sim: Simulator, rng: random.Random) -> None:
    """Mostly to where it can go."""
    decoding = [request for request in sim.router.requests.values() if request.stage is Stage.DECODE]
    if decoding and sim.router.view.workers:
        one, names = rng.choice(decoding), list(sim.router.view.workers)
        others = [worker.name for worker in sim.router.view.candidates(Role.DECODE) if worker.name != one.decode]
        sim.router.migrate(one.request_id, rng.choice(others if others and rng.random() < 0.9 else names), sim.now)


def _load(sim: Simulator, rng: random.Random, capacity: int, page_size: int) -> None:
    """Prompts and outputs that fit the smallest worker, if need be alone: length + max_tokens <= capacity."""
    shared = [rng.randrange(1000) for _ in range(20)]
    one_token, whole_pages = rng.random() < 0.2, rng.random() < 0.3
    for index in range(rng.randint(5, 25)):
        length = rng.randint(1, capacity // 2 if rng.random() < 0.9 else capacity - 1)
        if whole_pages:
            length = max(page_size, length // page_size * page_size)
        prompt = (shared[: rng.randint(0, 20)] + [rng.randrange(1000) for _ in range(length)])[:length]
        longest = 1 if one_token and rng.random() < 0.5 else min(30, capacity - length)
        sampling = SamplingParams(
            max_tokens=rng.randint(1, longest), temperature=0.0,
            stop_token_ids=tuple(rng.sample(range(8), rng.choice([0, 1]))), min_tokens=rng.choice([0, 0, 3]),
        )  # fmt: skip
        at = rng.random()
        sim.submit(f"r{index}", prompt, sampling, at, salt=rng.choice(["", "", "b"]), priority=rng.choice([0, 0, 1]))
        if rng.random() < 0.2:  # the client leaves
            sim.plan(at + rng.random() * rng.choice([0.05, 0.5]), partial(sim.abort, f"r{index}"))


def _faults(sim: Simulator, rng: random.Random, specs: list[EngineSpec]) -> None:
    for _ in range(rng.randint(0, 5)):
        name, at = rng.choice(specs).name, rng.random() * 2.0
        if rng.random() < 0.4:
            sim.plan(at, partial(sim.kill, name))
        else:
            seconds = rng.choice([0.1, 0.7, 1.2, 2.4, 9.0])
            sim.plan(at, partial(sim.stall, name, seconds))
    if rng.random() < 0.3:  # roles flip under load, and all flip back
        for _ in range(3):
            change = RoleChange(rng.choice(specs).name, Role(rng.randint(1, 3)))
            sim.plan(rng.random() * 2.0, partial(_set_role, sim, change))
        for spec in specs:
            sim.plan(2.5, partial(_set_role, sim, RoleChange(spec.name, spec.role)))
    if rng.random() < 0.15:  # no worker survives a step with one of these
        sim.poison = {f"r{rng.randrange(25)}" for _ in range(rng.randint(1, 2))}


def _set_role(sim: Simulator, change: RoleChange) -> None:
    sim.router.set_role(change, sim.now)


def check(sim: Simulator) -> list[str]:
    """Run to the end, then the verdict."""
    sim.run(until=700.0)
    return verdict(sim)


def verdict(sim: Simulator) -> list[str]:
    """What is wrong, if anything: no end, other tokens than the oracle's, stages that do not add up, a leaked page."""
    wrong = []
    for request_id, outcome in sim.outcomes.items():
        expected = oracle(outcome.spec.prompt, outcome.spec.sampling, sim.world.vocab)
        if not outcome.finish:
            wrong.append(f"{request_id} never ended")
        elif outcome.finish not in ENDS:
            wrong.append(f"{request_id} ended with {outcome.finish}")
        elif "deadline" in outcome.error and sim.router.spec.request_timeout >= LONG:
            wrong.append(f"{request_id} was forgotten until its deadline")
        elif outcome.finish in ("stop", "length") and outcome.tokens != expected:
            wrong.append(f"{request_id} got {outcome.tokens}, not {expected}")
        elif outcome.tokens != expected[: len(outcome.tokens)]:
            wrong.append(f"{request_id} ended with {outcome.finish} after wrong tokens")
        elif outcome.times is not None and (complaint := check_times(outcome.times)):
            wrong.append(f"{request_id}: {complaint}")
    for name, worker in sim.workers.items():
        if worker.alive:
            free, live, cached, inflight, quarantined = worker.core.pool.counts
            if live or inflight or quarantined or free + cached != worker.core.spec.num_pages:
                wrong.append(f"{name} leaks: {worker.core.pool.counts}")
    return wrong


def check_times(times: StageTimes) -> str:
    """What is wrong with a request's stage times: one is negative, or they do not add up."""
    stages = [getattr(times, stage) for stage in STAGES]
    if min(stages) < -1e-9:
        return f"a stage is negative: {times}"
    return "" if abs(sum(stages) - times.e2e) < 1e-9 else f"stages add up to {sum(stages)}, not {times.e2e}"


def run_seeds(first: int, last: int, moving: bool = False) -> tuple[dict[int, list[str]], Counter[str]]:
    """Failing seeds with what was wrong, and how the requests of all seeds ended."""
    failures: dict[int, list[str]] = {}
    ends: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            sim = build(seed, GRANULARITIES, moving)
            wrong = check(sim)
            ends.update(outcome.finish for outcome in sim.outcomes.values())
            ends["migrated"] += sim.router.migrations
            ends["preempted"] += sum(worker.core.scheduler.preemptions for worker in sim.workers.values())
        except (AssertionError, RuntimeError, KeyError, ValueError, IndexError) as error:
            wrong = [repr(error)]
        if wrong:
            failures[seed] = wrong
    return failures, ends


def digest(first: int, last: int) -> str:
    """What came of these seeds, to the token and the time: equal before and after a change that changes nothing."""
    total = hashlib.sha256()
    for seed in range(first, last):
        sim = build(seed)
        sim.run(until=700.0)
        for request_id, outcome in sorted(sim.outcomes.items()):
            seen = seed, request_id, outcome.tokens, outcome.finish, outcome.error, outcome.token_times
            total.update(repr(seen).encode())
    return total.hexdigest()


if __name__ == "__main__":
    if sys.argv[1] == "digest":
        sys.exit(digest(int(sys.argv[2]), int(sys.argv[3])))
    moves = sys.argv[1] == "moving"
    seeds = [int(argument) for argument in sys.argv[1 + moves :]]
    found, ended = run_seeds(seeds[0], seeds[1] if len(seeds) > 1 else seeds[0] + 1, moves)
    sys.stdout.write(f"{len(found)} failing seeds {dict(list(found.items())[:5])}\n{dict(ended)}\n")

"""The published policies: what all of them owe (one conformance test), and for each its own rule (directed tests)."""

from __future__ import annotations

import math
import random
from collections import Counter
from copy import copy
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import simfuzz
from msgspec.structs import replace
from stepwise import spec
from test_engine import Hand, sizes, submit

from minidisagg.core.costs import StepCosts
from minidisagg.core.messages import RequestSpec, Role, SamplingParams
from minidisagg.core.policy import ClusterView, Hits, Placement, Reject, RoleChange, WorkerOptions, WorkerStatus
from minidisagg.core.predictor import PREDICTORS
from minidisagg.core.router import RouterSpec
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tracked import RequestView, Tracked
from minidisagg.policies import load_policy, names, rehearse
from minidisagg.policies.arrow import Arrow
from minidisagg.policies.deflection import Deflection
from minidisagg.policies.distserve import DistServe
from minidisagg.policies.dynamo import Dynamo
from minidisagg.policies.dynamo_conditional import DynamoConditional
from minidisagg.policies.early_rejection import EarlyRejection
from minidisagg.policies.eb_plus import EbPlus, threshold
from minidisagg.policies.polyserve import PolyServe
from minidisagg.policies.sjf import Sjf
from minidisagg.policies.splitwise import Splitwise
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import SimWorker, Step, World

CLUSTERS = {"colocated": [3, 3], "1p1d": [1, 2], "2p2d": [1, 1, 2, 2], "mixed": [1, 2, 3]}
REJECTS = {"early_rejection"}  # by design
# Settings under which a policy's rule comes into play on clusters as small as these.
SMALL = {
    "sarathi": "chunk=6", "eb_plus": "extra=5", "sjf": "ageing=50", "distserve": "waiting=0.2", "splitwise": "queue=30",
    "dynamo": "temperature=0.5,decay=1,active=1", "dynamo_conditional": "tokens=20,queue=1,budget=16",
    "arrow": "ttft=0.05,tpot=0.02", "deflection": "tbt=0.03,least=2", "polyserve": "tiers=0.015/0.02,ttft=0.1",
    "early_rejection": "ttft=0.3,tpot=0.05,fetch=1",
}  # fmt: skip


# ---------------------------------------------------------------- what all of them owe


class Watched(Simulator):
    """No step may exceed what its worker's options allow, as they were before any policy was shown them."""

    def __init__(self, specs: list[EngineSpec], *more: Any) -> None:
        self.options = {spec.name: copy(spec.options) for spec in specs}
        super().__init__(specs, *more)

    def _begin(self, worker: SimWorker, step: Step) -> None:
        options, items = self.options[worker.core.spec.name], step.plan.items
        assert len(items) <= options.max_num_seqs
        assert sum(item.count for item in items) <= options.max_num_batched_tokens
        assert not options.chunk or all(item.count <= options.chunk for item in items)
        super()._begin(worker, step)


def play(policy: str, seed: int) -> Simulator:
    """A small cluster, bursts of requests, and in every second seed a death; all but the policy drawn from the seed."""
    rng = random.Random(seed)
    page_size, pages = 4, rng.choice([16, 24, 64])
    options = [WorkerOptions(rng.choice([2, 4, 16]), rng.choice([16, 64]), rng.choice([0, 0, 8])) for _ in range(2)]
    specs = [
        EngineSpec(
            f"w{index}", 1, Role(role), pages, page_size, 2, "f", options=options[role == Role.PREFILL],
            prefix_caching=rng.random() < 0.8, layer_bytes=1,
        )
        for index, role in enumerate(CLUSTERS[sorted(CLUSTERS)[seed % len(CLUSTERS)]])
    ]  # fmt: skip
    router = RouterSpec(predictor=rng.choice(PREDICTORS), seed=seed)
    sim = Watched(specs, partial(load_policy, policy), World(router=router, seed=seed, vocab=50))
    shared = [[rng.randrange(1000) for _ in range(24)] for _ in range(2)]
    bursts = [rng.random() * 1.5 for _ in range(3)]
    for index in range(rng.randint(6, 16)):
        length, family = rng.randint(1, pages * page_size // 2), rng.randrange(3)
        prompt = [*(shared[family] if family < 2 else ()), *(rng.randrange(1000) for _ in range(length))][:length]
        stop = tuple(rng.sample(range(8), rng.choice([0, 1])))
        sampling = SamplingParams(max_tokens=rng.randint(1, 20), temperature=0.0, stop_token_ids=stop)
        at = rng.choice(bursts) + rng.choice([0.0, 0.0, 0.1]) * rng.random()
        request = RequestSpec(
            prompt=prompt, sampling=sampling, arrival=at, priority=rng.choice([0, 0, 0, 1]),
            slo_ttft=rng.choice([None, None, 0.2, 2.0]), slo_tpot=rng.choice([None, None, 0.02, 0.1]),
            session=rng.choice(["", f"s{family}"]),
        )  # fmt: skip
        sim.plan(at, partial(sim.send, f"r{index}", request))
    if seed % 2:
        sim.plan(rng.choice(bursts) + 0.3 * rng.random(), partial(sim.kill, rng.choice(specs).name))
    sim.run(until=700.0)
    return sim


def seen(sim: Simulator) -> list[object]:
    return [(name, o.tokens, o.token_times, o.finish, o.workers) for name, o in sorted(sim.outcomes.items())]


@cache
def patience(seed: int) -> float:
    """Seconds that nobody has to wait for a first token: a few times what first come, first served takes for all."""
    outcomes = play("fcfs", seed).outcomes.values()
    return 1.0 + 3.0 * max(outcome.token_times[-1] - outcome.spec.arrival for outcome in outcomes)


def complaints(policy: str, seed: int) -> list[str]:
    settings = f":{SMALL[policy]}" if policy in SMALL and seed % 3 else ""
    sim = play(policy + settings, seed)
    wrong = simfuzz.verdict(sim)
    ends = {"length", "stop"} | ({"reject"} if policy in REJECTS else set())
    for name, outcome in sim.outcomes.items():
        if outcome.finish not in ends:
            wrong.append(f"{name} ended with {outcome.finish}: {outcome.error}")
        elif outcome.tokens and outcome.token_times[0] - outcome.spec.arrival > patience(seed):
            wrong.append(f"{name} starved for {outcome.token_times[0] - outcome.spec.arrival:.1f} s")
    if seen(play(policy + settings, seed)) != seen(sim):
        wrong.append("a second run differs")
    return wrong


@pytest.mark.parametrize("policy", names())
def test_every_policy_serves_all_within_its_budgets_and_the_same_way_twice(policy: str) -> None:
    """Twenty workloads each: every cluster, with the settings and without; `simfuzz.verdict` looks at tokens, pages and
    stage times."""
    for seed in range(20):
        assert not complaints(policy, seed), seed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", names())
def test_every_policy_in_five_hundred_workloads(policy: str) -> None:
    wrong = {seed: found for seed in range(500) if (found := complaints(policy, seed))}
    assert not wrong


@pytest.mark.parametrize("policy", names())
def test_every_policy_is_rehearsed_with_settings_too(policy: str) -> None:
    for settings in {"", f":{SMALL.get(policy, '')}"}:
        for roles in CLUSTERS.values():
            rehearse(policy + settings, {f"w{i}": (Role(role), WorkerOptions(2, 8, 3)) for i, role in enumerate(roles)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("eb_plus:extra=-1", "extra must be a share, at least 0, not -1"),
        ("eb_plus:extra=much", "not much"),
        ("sjf:ageing=-1", "ageing must be tokens per second, at least 0, not -1"),
        ("sjf:ageing=nan", "not nan"),
        ("distserve:waiting=0", "waiting must be a share of the pages, above 0 and at most 1, not 0"),
        ("distserve:waiting=5", "not 5"),
        ("splitwise:queue=0", "queue must be a number of tokens, at least 1, not 0"),
        ("splitwise:queue=1.5", "not 1.5"),
        ("dynamo:overlap=2", "overlap must be a number, from 0 to 1, not 2"),
        ("dynamo:temperature=-1", "temperature must be a number, at least 0, not -1"),
        ("dynamo:scale=inf", "not inf"),
        ("dynamo_conditional:share=x", "share must be a number, at least 0, not x"),
        ("arrow:tpot=0", "tpot must be seconds, above 0, not 0"),
        ("deflection:tbt=0", "tbt must be seconds, above 0, not 0"),
        ("deflection:least=0", "least must be a number of tokens, at least 1, not 0"),
        ("polyserve:tiers=0.1/fast", "tiers must be seconds, above 0, as in 0.05/0.1, not 0.1/fast"),
        ("polyserve:tiers=0", "not 0"),
        ("polyserve:ttft=soon", "ttft must be seconds"),
        ("early_rejection:ttft=-3", "ttft must be seconds, above 0, not -3"),
        ("early_rejection:fetch=2", "fetch must be 0 or 1, not 2"),
        ("arrow:speed=1", "it has no setting speed; it has ttft, tpot"),
    ],
)
def test_nonsense_is_refused_in_one_line(settings: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_policy(settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- views made by hand

# 10 ms a step, 1 ms a prompt token, 1 ms a decode, 10 ns a token of context.
COSTS = StepCosts(step=0.01, prefill_tokens=1.0, decode_seqs=0.01, context_tokens=0.001)
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
Worker = tuple[Role, dict[str, Any]]  # and what differs from an idle one of 100 pages of 4 tokens
Workers = dict[str, Worker]


def cluster(workers: Workers, hits: dict[str, int] | None = None) -> ClusterView:
    known = {name: Hits(tokens) for name, tokens in (hits or {}).items()}
    statuses = {
        name: WorkerStatus(name, 1, role, 100, 4, **{"pages_free": 100, "costs": COSTS, **more})
        for name, (role, more) in workers.items()
    }
    return ClusterView(0.0, statuses, hits=lambda _: known)


def asked(length: int = 8, max_tokens: int = 8, at: tuple[str, str] = ("", ""), **more: Any) -> RequestView:
    """A request, as the router's hooks see it, that has just come, or was placed there."""
    sampling = SamplingParams(max_tokens=max_tokens)
    tracked = Tracked("a", RequestSpec(prompt=[1] * length, sampling=sampling, hints={}, **more), 0.0)
    tracked.prefill, tracked.decode = at
    return tracked.view


def flood(policy: str, roles: list[int], count: int, length: int, max_tokens: int, every: float = 0.001) -> Simulator:
    """Some requests of all sizes, by which costs are learnt, and two seconds later so many equal ones in a row."""
    options = WorkerOptions(8, 256, 0)
    specs = [spec(f"w{i}", Role(role), num_pages=256, options=options) for i, role in enumerate(roles)]
    sim = Simulator(specs, partial(load_policy, policy))
    for index in range(8):
        sim.submit(f"x{index}", [index] * (7 * index + 5), SamplingParams(max_tokens=3 * index + 2), 0.05 * index)
    for index in range(count):
        prompt = [1000 * index + place for place in range(length)]
        sim.submit(f"r{index}", prompt, SamplingParams(max_tokens=max_tokens), 2.0 + every * index)
    sim.run(until=600.0)
    assert not simfuzz.verdict(sim)
    return sim


def ttfts(sim: Simulator) -> list[float]:
    """Of those that came in a row and were served."""
    served = [o for name, o in sim.outcomes.items() if name.startswith("r") and o.tokens]
    return [outcome.token_times[0] - outcome.spec.arrival for outcome in served]


# ---------------------------------------------------------------- EB+


def batching(extra: float, max_num_seqs: int = 8, **decodes: int) -> Hand:
    """These decode, to so many tokens; two prompts have come since."""
    hand = Hand(spec("w", num_pages=64, options=WorkerOptions(max_num_seqs, 64, 0)), EbPlus(extra))
    hand.core.scheduler.learner = SimpleNamespace(costs=COSTS, learn=lambda _: None)  # type: ignore[assignment]
    hand.receive(*(submit(name, 4, max_tokens=output) for name, output in decodes.items()))
    hand.step()
    hand.step()
    hand.receive(submit("a", 6, max_tokens=7, arrival=1.0), submit("b", 5, max_tokens=7, arrival=2.0))
    return hand


def test_eb_plus_mixes_where_a_mixed_token_costs_no_more() -> None:
    assert sizes(batching(0.0, x=7, y=7).step()) == {"x": (5, 1), "y": (5, 1), "a": (0, 6), "b": (0, 5)}


def test_eb_plus_decodes_alone_until_enough_places_are_free_then_fills_them() -> None:
    assert int(threshold(39 / 6) * 6) == int(threshold(7.0) * 6) == 2
    hand = batching(100.0, max_num_seqs=6, v=4, w=7, x=7, y=7, z=7)
    for _ in range(2):
        assert set(sizes(hand.step())) == {"v", "w", "x", "y", "z"}, "one place of six is free: not enough"
    assert sizes(hand.step()) == {"a": (0, 6), "b": (0, 5)}, "two are"
    assert set(sizes(hand.step())) == {"a", "b", "w", "x", "y", "z"}


def test_eb_plus_finds_its_threshold_and_its_crossover() -> None:
    for output in (1.0, 10.0, 1000.0):
        theta = threshold(output)
        assert theta / (1 - theta) + math.log(1 - theta) == pytest.approx(1 / output, rel=1e-3)
    worker: Any = SimpleNamespace(costs=COSTS)
    theta = threshold(64.0)
    idle = 0.01 * ((1 - math.log(1 - theta) * 64) / theta - 65)
    crossover = idle / (0.2 * (1e-3 * 100 + (1e-3 + 1e-8 * 132) * 64))
    assert not EbPlus(0.2)._exclusive(math.floor(crossover), 100.0, 64.0, worker)
    assert EbPlus(0.2)._exclusive(math.ceil(crossover), 100.0, 64.0, worker)
    worker.costs = StepCosts()
    assert not EbPlus(0.2)._exclusive(32, 100.0, 64.0, worker), "nothing is known yet"


# ---------------------------------------------------------------- shortest job first


def test_sjf_takes_the_prompt_with_the_least_to_compute() -> None:
    hand = Hand(spec("w", options=WorkerOptions(max_num_seqs=1)), Sjf())
    cached = submit("cached", 12)
    hinted = replace(cached, spec=replace(cached.spec, hints={"cached": 9}))
    hand.receive(submit("long", 9), submit("short", 4), hinted)
    assert sizes(hand.step()) == {"cached": (0, 12)}
    request = asked()
    assert Sjf().place(request, cluster({"w": (B, {})}, {"w": 5})) == Placement("w", "w")
    assert request.hints == {"cached": 5}


@pytest.mark.parametrize(("ageing", "first"), [(0.0, "short"), (8.0, "short"), (12.0, "long")])
def test_sjf_lets_waiting_make_up_for_length(ageing: float, first: str) -> None:
    """The long one has 5 tokens more, and has waited half a second longer."""
    hand = Hand(spec("w", options=WorkerOptions(max_num_seqs=1)), Sjf(ageing))
    hand.receive(submit("long", 9))
    hand.now = 0.5
    hand.receive(submit("short", 4))
    assert set(sizes(hand.step())) == {first}


# ---------------------------------------------------------------- DistServe


def landed(pages: int, begun: bool) -> SimpleNamespace:
    return SimpleNamespace(num_pages=pages, prefill_len=4 * pages, num_scheduled=4 * pages + begun)


@pytest.mark.parametrize(
    ("running", "taken", "expected", "accepts"),
    [
        ([], 0, 0, True),
        ([landed(50, begun=True)], 50, 0, True),
        ([landed(4, begun=False)], 4, 0, True),
        ([landed(3, begun=False), landed(2, begun=False)], 5, 0, False),
        ([landed(10, begun=True)], 15, 1, False),  # 5 pages are on their way
        ([landed(10, begun=True)], 14, 1, True),
        ([landed(10, begun=True)], 15, 0, True),  # nothing is: they are somebody's that does not run
    ],
)
def test_distserve_accepts_while_little_waits_for_its_first_step(
    running: list[SimpleNamespace], taken: int, expected: int, accepts: bool
) -> None:
    worker: Any = SimpleNamespace(num_pages=100, free_pages=100 - taken, running=running, expected=expected)
    offer: Any = None
    assert DistServe().accept(offer, worker) is accepts


def test_distserve_hands_over_more_than_fits_the_batch() -> None:
    most = Counter[str]()

    class Looking(DistServe):
        def accept(self, offer: Any, worker: Any) -> bool:
            most["running"] = max(most["running"], len(worker.running))
            return super().accept(offer, worker)

    sim = Simulator([spec("p", P, num_pages=64), spec("d", D, num_pages=64, options=WorkerOptions(2, 64, 0))], Looking)
    for index in range(8):
        sim.submit(f"r{index}", [index] * 4, SamplingParams(max_tokens=16), 0.1)
    sim.run(until=60.0)
    assert not simfuzz.verdict(sim) and most["running"] > 2


# ---------------------------------------------------------------- Splitwise


@pytest.mark.parametrize(
    ("workers", "placement"),
    [
        ({"p": (P, {"queued_tokens": 9}), "q": (P, {}), "d": (D, {"context_tokens": 9}), "e": (D, {})}, ("q", "e")),
        # Full is who has some and would have more than the queue: then the mixed pool.
        ({"p": (P, {"queued_tokens": 93}), "b": (B, {"queued_tokens": 5}), "d": (D, {})}, ("b", "d")),
        ({"p": (P, {"queued_tokens": 92}), "b": (B, {"queued_tokens": 5}), "d": (D, {})}, ("p", "d")),
        # Then the least loaded of the other pool becomes mixed.
        ({"p": (P, {"queued_tokens": 93}), "d": (D, {"context_tokens": 9}), "e": (D, {})}, ("d", "e")),
        # A decode worker with prompts is mixed: not for decodes while one without has room.
        ({"p": (P, {"queued_tokens": 93}), "d": (D, {"queued_tokens": 5}), "e": (D, {"decoding": 9})}, ("d", "e")),
        # No room for the decode: the prefill worker becomes mixed.
        ({"p": (P, {}), "d": (D, {"context_tokens": 384})}, ("p", "p")),
        ({"p": (P, {}), "d": (D, {"pages_free": 4})}, ("p", "p")),
        ({"p": (P, {}), "d": (D, {"context_tokens": 383})}, ("p", "d")),
        ({"p": (P, {"pages_free": 50}), "q": (P, {"queued_tokens": 9}), "d": (D, {"pages_free": 4})}, ("p", "q")),
        # A prefill worker that decodes is mixed: prompts go to one that does not.
        ({"p": (P, {"decoding": 1}), "q": (P, {"queued_tokens": 9}), "d": (D, {})}, ("q", "d")),
        # No room anywhere: as colocated, where the least is queued.
        ({"b": (B, {"queued_tokens": 99}), "c": (B, {"queued_tokens": 98})}, ("c", "c")),
        ({"p": (P, {"flipping": D}), "q": (P, {"draining": True}), "d": (D, {})}, ("d", "d")),
    ],
)
def test_splitwise_pools(workers: Workers, placement: tuple[str, str]) -> None:
    assert Splitwise(queue=100).place(asked(), cluster(workers)) == Placement(*placement)


def test_splitwise_goes_by_the_predicted_length() -> None:
    view = cluster({"p": (P, {}), "d": (D, {"context_tokens": 300})})
    assert Splitwise().place(asked(max_tokens=200), view) == Placement("p", "p")
    assert Splitwise().place(asked(max_tokens=200, predicted_len=10), view) == Placement("p", "d")
    assert isinstance(Splitwise().place(asked(), cluster({})), Reject)


# ---------------------------------------------------------------- Dynamo


@pytest.mark.parametrize(
    ("settings", "a", "b", "first"),
    [
        # 80 tokens of the prompt are cached at `b`: worth as many as it holds more.
        ({}, {}, {"context_tokens": 76}, "b"),
        ({}, {}, {"context_tokens": 84}, "a"),
        ({"overlap": 0.5}, {}, {"context_tokens": 76}, "a"),
        ({"overlap": 0.5, "scale": 2.0}, {}, {"context_tokens": 76}, "b"),
        ({}, {}, {"context_tokens": 76, "decoding": 9}, "b"),
        ({"active": 1.0}, {}, {"context_tokens": 76, "decoding": 9}, "a"),
        ({}, {}, {"queued_tokens": 76}, "b"),
        ({"decay": 1.0}, {}, {"queued_tokens": 76}, "a"),  # a longer queue takes credit off
        ({"decay": 1.0}, {"queued_tokens": 76}, {"queued_tokens": 76}, "b"),
        ({"scale": 0.0}, {"context_tokens": 4}, {"queued_tokens": 900}, "b"),  # only what is held counts
    ],
)
def test_dynamo_weighs_what_is_cached_against_what_is_held(
    settings: dict[str, float], a: dict[str, Any], b: dict[str, Any], first: str
) -> None:
    view = cluster({"a": (B, a), "b": (B, b)}, {"b": 80})
    assert Dynamo(**settings).place(asked(400), view) == Placement(first, first)


def test_dynamo_chooses_a_decode_worker_by_its_load_alone() -> None:
    view = cluster({"p": (P, {}), "d": (D, {"context_tokens": 4}), "e": (D, {})}, {"d": 80})
    assert Dynamo().place(asked(100), view) == Placement("p", "e")
    assert isinstance(Dynamo().place(asked(), cluster({"p": (P, {})})), Reject)


def test_dynamo_draws_from_a_softmax_and_breaks_ties_at_random() -> None:
    def drawn(temperature: float, held: int) -> float:
        view, policy = cluster({"a": (B, {}), "b": (B, {"context_tokens": held})}), Dynamo(temperature=temperature)
        return sum(policy.place(asked(), view) == Placement("a", "a") for _ in range(4000)) / 4000

    assert drawn(0.0, 4) == 1.0
    assert drawn(0.0, 0) == pytest.approx(0.5, abs=0.03)
    assert drawn(0.5, 4) == drawn(0.5, 400) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03), "costs are scaled"


@pytest.mark.parametrize(
    ("length", "hits", "queued", "held", "here"),
    [
        (100, 52, 0, 0, True),
        (100, 48, 0, 0, False),  # more than half of it is left
        (180, 132, 0, 0, True),
        (180, 128, 0, 0, False),  # more than 50 tokens are left
        (100, 0, 200, 0, False),
        (100, 0, 201, 0, True),  # prefill is behind
        (100, 52, 0, 100, True),
        (100, 52, 0, 101, False),  # no room for a prompt
    ],
)
def test_dynamo_conditional_prefills_where_it_decodes(
    length: int, hits: int, queued: int, held: int, here: bool
) -> None:
    policy = DynamoConditional(tokens=50, share=0.5, queue=2.0, budget=100, busy=0.5)
    held_by_d, more = {"context_tokens": held}, {"context_tokens": 199}
    view = cluster({"p": (P, {"queued_tokens": queued}), "d": (D, held_by_d), "e": (D, more)}, {"d": hits})
    assert policy.place(asked(length), view) == Placement("d" if here else "p", "d")


def test_dynamo_conditional_decodes_where_what_is_cached_outweighs_what_is_held() -> None:
    policy = DynamoConditional()
    for held, second in ((39, "e"), (41, "d")):
        view = cluster({"p": (P, {}), "d": (D, {}), "e": (D, {"context_tokens": held})}, {"e": 40})
        assert policy.place(asked(200), view) == Placement("p", second)
    view = cluster({"b": (B, {}), "c": (B, {"context_tokens": 4})})
    assert policy.place(asked(100), view) == Placement("b", "b")
    view = cluster({"p": (P, {"queued_tokens": 2}), "q": (P, {"queued_tokens": 1}), "d": (D, {})})
    assert policy.place(asked(100), view) == Placement("q", "d"), "the least loaded prefills"
    assert isinstance(policy.place(asked(), cluster({"p": (P, {})})), Reject)


# ---------------------------------------------------------------- Arrow


def test_arrow_fills_the_first_decode_worker_that_is_in_time() -> None:
    policy = Arrow(tpot=0.0200001)  # 10 ms, and 1 ms for each that decodes
    workers: Workers = {"p": (P, {"queued_tokens": 5}), "q": (P, {}), "d": (D, {"decoding": 10}), "e": (D, {})}
    assert policy.place(asked(), cluster(workers)) == Placement("q", "e")
    workers["d"] = (D, {"decoding": 8})
    assert policy.place(asked(), cluster(workers)) == Placement("q", "d")
    assert policy.place(asked(slo_tpot=0.015), cluster(workers)) == Placement("q", "e")
    late = cluster({"p": (P, {}), "d": (D, {"decoding": 30}), "e": (D, {"decoding": 20})})
    assert policy.place(asked(), late) == Placement("p", "e"), "none is: the fastest"
    both = cluster({"b": (B, {"queued_tokens": 1}), "c": (B, {})})
    assert policy.place(asked(), both) == Placement("c", "c")
    assert isinstance(policy.place(asked(), cluster({"p": (P, {})})), Reject)


@pytest.mark.parametrize(
    ("queued", "decoding", "there", "slo", "first"),
    [
        (95, 3, 0, None, "e"),
        (85, 3, 0, None, "p"),  # it is in time
        (85, 3, 0, 0.05, "e"),
        (95, 5, 0, None, "p"),  # 16 ms of 30 are no slack with two of them
        (95, 3, 96, None, "p"),  # it has as much to do
    ],
)
def test_arrow_prefills_on_a_decode_worker_with_slack_where_prefill_is_late(
    queued: int, decoding: int, there: int, slo: float | None, first: str
) -> None:
    workers: Workers = {
        "p": (P, {"queued_tokens": queued}),
        "d": (D, {"decoding": 15}),
        "e": (D, {"decoding": decoding, "queued_tokens": there}),
    }
    assert Arrow(0.1, 0.030).place(asked(slo_ttft=slo), cluster(workers)) == Placement(first, "d")


LATE, BUSY, SOME, MUCH = {"decoding": 21}, {"decoding": 5}, {"queued_tokens": 9}, {"queued_tokens": 90}


@pytest.mark.parametrize(
    ("workers", "change"),
    [
        ({"p": (P, SOME), "q": (P, {}), "d": (D, LATE)}, ("q", D)),
        ({"p": (P, {}), "d": (D, LATE)}, None),  # the last one
        ({"p": (P, {}), "q": (P, {}), "d": (D, LATE), "e": (D, BUSY)}, None),  # one is in time
        ({"p": (P, MUCH), "q": (P, MUCH), "d": (D, LATE), "e": (D, LATE)}, None),  # prompts would be late
        ({"p": (P, MUCH), "q": (P, MUCH), "d": (D, LATE)}, ("p", D)),  # but there are more of them
        ({"p": (P, {}), "q": (P, {}), "d": (D, LATE), "e": (D, LATE)}, ("p", D)),
        ({"p": (P, {}), "q": (P, {}), "d": (D, LATE), "e": (D, {"flipping": P})}, None),
        ({"p": (P, SOME), "d": (D, BUSY), "e": (D, {})}, ("e", P)),
        ({"p": (P, {}), "d": (D, BUSY), "e": (D, {})}, None),  # no prompt waits
        ({"p": (P, SOME), "d": (D, LATE), "e": (D, {})}, None),  # it would change back
        ({"p": (P, SOME), "e": (D, {})}, None),  # the last one
    ],
)
def test_arrow_changes_sides_one_at_a_time_and_leaves_one_on_each(
    workers: Workers, change: tuple[str, Role] | None
) -> None:
    assert Arrow(0.1, 0.030).rebalance(cluster(workers)) == ([RoleChange(*change)] if change else [])


def test_arrow_adapts_to_a_flood_of_decodes() -> None:
    sim = flood("arrow:tpot=0.016", [1, 1, 1, 2], 24, 4, 60)
    roles = Counter(worker.core.scheduler.role for worker in sim.workers.values())
    assert roles[D] > 1 and roles[P] >= 1


# ---------------------------------------------------------------- prefill deflection


@pytest.mark.parametrize(
    ("queued", "there", "chunk"),
    [
        # Ten decodes take 20 ms, so that 30 tokens fit a step of 50 ms, and 60 take 100 ms.
        (95, {"decoding": 10}, 30),
        (80, {"decoding": 10}, None),  # 96 ms, with the transfer
        (95, {"decoding": 10, "queued_tokens": 1}, None),  # three steps
        (900, {"decoding": 25}, None),  # 15 tokens a step are too few
        (900, {"decoding": 10, "pages_free": 14}, None),
        (95, {"decoding": 10, "costs": StepCosts(step=0.01, decode_seqs=0.01)}, 30),  # as fast as others
    ],
)
def test_deflection_moves_what_is_sooner_done_in_chunks_beside_decodes(
    queued: int, there: dict[str, Any], chunk: int | None
) -> None:
    request = asked(60, at=("p", "d"))
    view = cluster({"p": (P, {"queued_tokens": queued, "t_kv_token": 1e-4}), "d": (D, there)})
    placement = Deflection(tbt=0.0501, least=16).replace(request, view)
    assert placement == (Placement("d", "d") if chunk else None) and request.hints.get("chunk") == chunk


def test_deflection_leaves_alone_what_does_not_wait_for_a_prefill_worker() -> None:
    view, policy = cluster({"p": (P, {"queued_tokens": 900}), "e": (D, MUCH), "d": (D, {})}), Deflection()
    assert policy.replace(asked(90, at=("p", "e")), view) == Placement("d", "d"), "the soonest"
    assert policy.replace(asked(90, at=("d", "d")), view) is None
    assert policy.replace(asked(90, at=("gone", "d")), view) is None
    request = asked()
    request.hints["chunk"] = 5
    policy.place(request, view)
    assert request.hints == {}


def test_deflection_composes_chunks_of_what_was_deflected() -> None:
    hand = Hand(spec("w"), Deflection())
    hand.receive(submit("old", 4))
    hand.step()
    guests = [submit("a", 6, arrival=1.0), submit("b", 9, arrival=2.0)]
    hand.receive(*(replace(one, spec=replace(one.spec, hints={"chunk": 5})) for one in guests))
    assert sizes(hand.step()) == {"old": (4, 1), "a": (0, 5)}
    assert sizes(hand.step()) == {"old": (5, 1), "a": (5, 1), "b": (0, 4)}


def test_deflection_brings_first_tokens_sooner_in_a_burst() -> None:
    plain, deflected = (flood(policy, [1, 2], 40, 60, 4) for policy in ("fcfs", "deflection:tbt=0.2"))
    assert sum(not outcome.handoffs for outcome in deflected.outcomes.values()) > 3
    assert sum(ttfts(deflected)) < 0.9 * sum(ttfts(plain))


# ---------------------------------------------------------------- PolyServe


def test_polyserve_bins_by_the_time_per_token() -> None:
    policy, view = PolyServe("0.1/0.020"), cluster({"p": (P, {}), "d": (D, {}), "e": (D, {})})
    for slo, second in ((0.020, "d"), (0.090, "d"), (0.001, "d"), (0.100, "e"), (None, "e")):
        assert policy.place(asked(slo_tpot=slo), view) == Placement("p", second), slo


def test_polyserve_takes_the_most_loaded_that_is_still_in_time() -> None:
    policy = PolyServe(0.0300001, ttft=0.1000001)
    decode: Workers = {"d": (D, {"decoding": 3}), "e": (D, {"decoding": 18}), "f": (D, {"decoding": 20})}
    prefill: Workers = {name: (P, {"queued_tokens": n}) for name, n in (("p", 5), ("q", 81), ("r", 83))}
    assert policy.place(asked(), cluster(prefill | decode)) == Placement("q", "e")
    late: Workers = {n: (role, {k: v + 90 for k, v in more.items()}) for n, (role, more) in (prefill | decode).items()}
    assert policy.place(asked(), cluster(late)) == Placement("p", "d"), "all are late: the least loaded"
    both = cluster({"a": (B, {"decoding": 9, "queued_tokens": 83}), "b": (B, {"decoding": 5})})
    assert policy.place(asked(), both) == Placement("b", "b"), "the first token counts where prompts run too"


def test_polyserve_lends_tighter_servers_and_never_looser_ones() -> None:
    policy, full = PolyServe("0.030/0.060"), {"decoding": 50}
    view = cluster({"p": (P, {}), "d": (D, {"decoding": 18}), "e": (D, full)})
    assert policy.place(asked(), view) == Placement("p", "d"), "its own are full"
    view = cluster({"p": (P, {}), "d": (D, {"decoding": 20}), "e": (D, full)})
    assert policy.place(asked(), view) == Placement("p", "e"), "it would make the tighter ones late"
    view = cluster({"p": (P, {}), "d": (D, full), "e": (D, {})})
    assert policy.place(asked(slo_tpot=0.030), view) == Placement("p", "d"), "looser requests would make it late"


# ---------------------------------------------------------------- early rejection


def test_early_rejection_places_where_the_first_token_is_soonest() -> None:
    policy, decode = EarlyRejection(), {"d": (D, {"decoding": 2}), "e": (D, {})}
    workers: Workers = {"p": (P, {"queued_tokens": 30}), "q": (P, {"queued_tokens": 50}), **decode}
    assert policy.place(asked(60), cluster(workers)) == Placement("p", "e")
    assert policy.place(asked(60), cluster(workers, {"q": 24})) == Placement("q", "e"), "it has more of it"
    workers["p"] = P, {"queued_tokens": 30, "t_kv_token": 4e-4}
    assert policy.place(asked(60), cluster(workers)) == Placement("q", "e"), "its link is slow"
    assert isinstance(policy.place(asked(), cluster({"p": (P, {})})), Reject)


def test_early_rejection_fetches_what_takes_longer_to_compute() -> None:
    workers: Workers = {"p": (P, {}), "q": (P, {"queued_tokens": 90}), "e": (D, {})}
    view = cluster(workers, {"q": 48})
    assert EarlyRejection().place(asked(60), view) == Placement("p", "e")
    assert EarlyRejection(fetch=1).place(asked(60), view) == Placement("p", "e", fetch_from="q")
    assert EarlyRejection(fetch=1).place(asked(60), cluster(workers, {"q": 48, "p": 48})) == Placement("p", "e")
    assert EarlyRejection(fetch=1).place(asked(60), cluster(workers, {"e": 48})) == Placement("p", "e", fetch_from="e")
    workers["q"] = P, {"queued_tokens": 90, "t_kv_token": 4e-3}
    assert EarlyRejection(fetch=1).place(asked(60), cluster(workers, {"q": 48})) == Placement("p", "e"), "a slow link"


def test_early_rejection_turns_away_what_would_be_late() -> None:
    policy = EarlyRejection(ttft=0.1, tpot=0.019)
    view = cluster({"p": (P, {"queued_tokens": 50}), "d": (D, {"decoding": 9})})
    verdict = policy.admit(asked(60, slo_tpot=1.0), view)
    assert isinstance(verdict, Reject) and verdict.reason == "the first token would take 0.12 s, more than 0.1 s"
    assert verdict.retry_after == pytest.approx(0.02, abs=1e-4)
    verdict = policy.admit(asked(30), view)
    assert isinstance(verdict, Reject) and verdict.reason == "a token would take 0.02 s, more than 0.019 s"
    assert policy.admit(asked(60, slo_ttft=0.2, slo_tpot=0.03), view) is None, "limits of its own"
    assert (
        policy.admit(asked(60, slo_tpot=1.0), cluster({"p": (P, {"queued_tokens": 50}), "d": (D, {})}, {"p": 24}))
        is None
    )
    assert (
        policy.admit(asked(60), cluster({"p": (P, {"costs": StepCosts()}), "d": (D, {"costs": StepCosts()})})) is None
    )
    assert policy.admit(asked(60), cluster({"p": (P, {})})) is None, "nobody decodes: it waits"
    assert isinstance(policy.admit(asked(30, slo_tpot=1.0), ClusterView(0.0, view.workers, waiting=1024)), Reject)
    assert policy.place(asked(60), view) == Placement("p", "d"), "what was taken in is served"


def test_early_rejection_keeps_the_rest_in_time() -> None:
    """Three times as many as one worker can serve."""
    late, kept = (flood(policy, [3], 60, 60, 2, every=0.02) for policy in ("fcfs", "early_rejection:ttft=0.5,tpot=1"))
    ends = Counter(outcome.finish for outcome in kept.outcomes.values())
    assert ends["reject"] > 10 and ends["length"] > 10
    assert max(ttfts(late)) > 1.0 and max(ttfts(kept)) < 0.7

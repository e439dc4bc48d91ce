"""Every shipped policy keeps what all promise (everything ends, with the right tokens, soon enough, the same again), on
any cluster, under a death too; and each does what its paper says."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache, partial
from math import log
from types import SimpleNamespace
from typing import Any

import pytest
from simfuzz import verdict
from stepwise import spec
from test_engine import Hand, sizes, submit

from minidisagg.core.costs import StepCosts
from minidisagg.core.messages import RequestSpec, Role, SamplingParams
from minidisagg.core.policy import (
    ClusterView,
    Hits,
    Placement,
    Policy,
    Reject,
    RequestView,
    RoleChange,
    WorkerOptions,
    WorkerStatus,
)
from minidisagg.core.request import Request
from minidisagg.core.router import RouterSpec
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tracked import Stage, Tracked
from minidisagg.policies import load_policy, names, rehearse
from minidisagg.policies.eb_plus import threshold
from minidisagg.sim.cost_model import LinearCost
from minidisagg.sim.simulate import simulate
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import World
from minidisagg.workload.lengths import random_items, with_arrivals

CLUSTERS = {"colocated": [3, 3], "1p1d": [1, 2], "2p2d": [1, 1, 2, 2], "mixed": [1, 2, 3]}
# So that each rule acts on loads as small as these.
SHARP = {
    "arrow": "ttft=0.1,tpot=0.016,patience=1",
    "deflection": "tpot=0.03",
    "distserve": "waiting=0.3",
    "dynamo": "weight=3,temperature=0.5",
    "dynamo_conditional": "max_local=40,max_queued=30,ratio=0.9",
    "early_rejection": "ttft=0.2,tpot=0.03",
    "eb_plus": "extra=9",
    "polyserve": "tpot=0.02",
    "sarathi": "chunk=6",
    "sjf": "ageing=10",
    "splitwise": "threshold=20",
}
SPECS = [*names(), *(f"{name}:{settings}" for name, settings in SHARP.items())]
SUITE, LONG = 20, 500  # workloads
END = 600.0


# ---------------------------------------------------------------- what all promise


def build(policy: str, seed: int, death: bool = False) -> Simulator:
    """A small cluster with bursts of requests, all drawn from the seed."""
    rng = random.Random(seed)
    page_size, pages = rng.choice([2, 4, 8]), rng.choice([16, 24, 48])
    roles = CLUSTERS[sorted(CLUSTERS)[seed % len(CLUSTERS)]]
    options = WorkerOptions(rng.choice([3, 8, 16]), rng.choice([32, 128]), rng.choice([0, 0, 16]))
    specs = [
        EngineSpec(
            f"w{n}",
            1,
            Role(role),
            pages,
            page_size,
            2,
            "f",
            options=options,
            lease=5.0,
            layer_bytes=1,
            link_timeout=2.0,
        )
        for n, role in enumerate(roles)
    ]
    cost = LinearCost(link_page=rng.choice([0.0005, 0.01]))
    world = World(cost, router=RouterSpec(request_timeout=END), seed=seed, vocab=50, depth=rng.choice([0, 1]))
    sim = Simulator(specs, partial(load_policy, policy), world)
    prefixes = [[rng.randrange(50) for _ in range(24)] for _ in range(2)]
    for burst in range(rng.randint(1, 3)):
        for number in range(rng.randint(3, 10)):
            at, length = burst * rng.choice([0.3, 1.0]) + rng.random() * 0.1, rng.randint(1, page_size * pages // 2)
            prompt = rng.choice(prefixes)[: rng.randint(0, 24)] + [rng.randrange(50) for _ in range(length)]
            sampling = SamplingParams(
                max_tokens=rng.randint(1, min(20, page_size * pages - length)), temperature=0.0,
                stop_token_ids=tuple(rng.sample(range(8), rng.choice([0, 1]))),
            )  # fmt: skip
            request = RequestSpec(
                prompt=prompt[:length], sampling=sampling, arrival=at, priority=rng.choice([0, 0, 1]),
                slo_ttft=rng.choice([None, 0.1, 1.0]), slo_tpot=rng.choice([None, 0.015, 0.03]),
            )  # fmt: skip
            sim.plan(at, partial(sim.send, f"{burst}-{number}", request))
    if death:
        sim.plan(0.05 + rng.random(), partial(sim.kill, rng.choice(specs).name))
    return sim


def ran(policy: str, seed: int, death: bool = False) -> Simulator:
    """To the end, and everybody is well."""
    sim = build(policy, seed, death)
    sim.run(until=END + 10.0)
    may = {"length", "stop", *(["reject"] if policy.startswith("early_rejection") else [])}
    ends = {outcome.finish for outcome in sim.outcomes.values()}
    assert not verdict(sim) and ends <= may, (policy, seed, verdict(sim), ends)
    return sim


def seen(sim: Simulator) -> list[object]:
    return [(name, o.tokens, o.token_times, o.finish, o.workers) for name, o in sim.outcomes.items()]


@cache
def makespan(seed: int) -> float:
    return max(outcome.token_times[-1] for outcome in ran("fcfs", seed).outcomes.values())


def conforms(policy: str, seed: int) -> None:
    sim = ran(policy, seed)
    longest = max((o.token_times[-1] - o.spec.arrival for o in sim.outcomes.values() if o.token_times), default=0.0)
    assert longest <= 20 * makespan(seed), (policy, seed, longest)
    assert seen(sim) == seen(ran(policy, seed)), (policy, seed)
    assert ran(policy, seed, death=True).deaths == 1


@pytest.mark.parametrize("seed", range(SUITE))
def test_everything_ends_well_and_the_same_again(seed: int) -> None:
    """Each policy and each of its sharp variants gets a few of the workloads."""
    for policy in SPECS[seed % 5 :: 5]:
        conforms(policy, seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SUITE, SUITE + LONG, 50))
def test_everything_ends_well_on_many_more(first: int) -> None:
    for seed in range(first, first + 50):
        conforms(SPECS[seed % len(SPECS)], seed)


@pytest.mark.parametrize("policy", SPECS)
def test_each_is_rehearsed(policy: str) -> None:
    for roles in CLUSTERS.values():
        rehearse(policy, {f"w{n}": (Role(role), WorkerOptions()) for n, role in enumerate(roles)})


def test_sharp_variants_decide_otherwise_than_the_defaults() -> None:
    """Else the workloads would test the default hooks only."""
    default = {seed: seen(ran("fcfs", seed)) for seed in range(1, 12)}
    for name, settings in SHARP.items():
        if name != "deflection":  # on its ticks these short queues have passed: below
            assert any(seen(ran(f"{name}:{settings}", seed)) != default[seed] for seed in default), name


def test_deflection_shortens_the_wait_where_a_queue_stands() -> None:
    items = with_arrivals(random_items(40, 4000, 60, 0.5, 1), [number / 14 for number in range(40)])
    means = {}
    for policy in ("fcfs", "deflection", "deflection:tpot=0.02"):
        means[policy] = simulate(policy, items, "prefill=1@h100,decode=1@h100").values["mean_ttft"]
    assert means["deflection"] < 0.8 * means["fcfs"] and means["deflection:tpot=0.02"] < 0.8 * means["fcfs"], means


# ---------------------------------------------------------------- what each says

COSTS = StepCosts(step=0.01, prefill_tokens=0.1, decode_seqs=0.01)  # 10 ms + 0.1 ms per prompt token + 1 ms per decode


def view(held: dict[str, int] | None = None, **workers: dict[str, Any]) -> ClusterView:
    """`p0`, `d0`, `b0`: prefill, decode, both; they hold so many tokens of every prompt."""
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}
    statuses = {
        name: WorkerStatus(name, 1, roles[name[0]], 1000, 10, **{"costs": COSTS, **values})
        for name, values in workers.items()
    }
    hits = {name: Hits((held or {}).get(name, 0)) for name in statuses}
    return ClusterView(0.0, statuses, rng=random.Random(0), hits=lambda _: hits)


def asks(length: int = 100, prefill: str = "", **values: Any) -> RequestView:
    request = RequestSpec(prompt=[1] * length, sampling=SamplingParams(), hints={}, **values)
    return Tracked("a", request, 0.0, stage=Stage.PREFILL, prefill=prefill).view


def placed(policy: str | Policy, cluster: ClusterView, request: RequestView | None = None) -> tuple[str, str]:
    policy = load_policy(policy) if isinstance(policy, str) else policy
    placement = policy.place(request or asks(), cluster)
    assert isinstance(placement, Placement) and placement.decode
    return placement.prefill, placement.decode


@pytest.mark.parametrize("policy", names())
def test_without_candidates_a_request_is_turned_away(policy: str) -> None:
    for cluster in (view(d0={}), view(p0={}), view(p0={"draining": True}, d0={})):
        answer = load_policy(policy).place(asks(), cluster)
        assert isinstance(answer, Reject) and answer.reason.startswith("no worker takes")


def costly(policy: str, decodes: int) -> set[str]:
    """So many requests decode, two prompts have come: who is in the next step."""
    hand = Hand(spec("w", num_pages=64, options=WorkerOptions(16, 64)), load_policy(policy))
    hand.receive(*(submit(f"d{n}", 4) for n in range(decodes)))
    hand.step()
    hand.receive(submit("a", 5, arrival=1.0), submit("b", 6, arrival=2.0))
    hand.core.scheduler.learner._costs = COSTS
    return set(sizes(hand.step()))


def test_eb_plus_runs_prompts_and_decodes_apart_where_that_pays() -> None:
    theta = threshold(8)
    assert theta / (1 - theta) + log(1 - theta) == pytest.approx(1 / 8)
    assert costly("eb_plus:extra=0", 2) == {"d0", "d1", "a", "b"}
    assert costly("eb_plus:extra=50", 2) == {"a", "b"}, "half of the places are free, more than theta"
    assert costly("eb_plus:extra=50", 8) == {f"d{n}" for n in range(8)}, "a fifth of them are"
    # With 4 places, prompts of 4.75 tokens and outputs of 8: exclusive from this extra on.
    idle = (1 - log(1 - theta) * 8) / theta - 1 - 8
    edge = 0.01 * idle / (4 * (1e-4 * 4.75 + 1e-3 * 8))
    assert costly(f"eb_plus:extra={0.99 * edge}", 2) == {"d0", "d1", "a", "b"}
    assert costly(f"eb_plus:extra={1.01 * edge}", 2) == {"a", "b"}


def test_sjf_takes_the_fewest_uncached_tokens_and_those_that_waited() -> None:
    for ageing, first in ((0, "short"), (1, "short"), (3, "long")):
        hand = Hand(spec("w", options=WorkerOptions(max_num_seqs=1)), load_policy(f"sjf:ageing={ageing}"))
        hand.receive(submit("long", 9, arrival=0.0), submit("short", 4, arrival=2.0))
        assert set(sizes(hand.step())) == {first}, "5 tokens more, 2 s longer"
    request, policy = asks(50), load_policy("sjf:ageing=0")
    assert placed(policy, view({"b0": 48}, b0={}), request) == ("b0", "b0") and request.hints == {"cached": 48}
    message = submit("x", 50)
    work = Request(message, "f", 0.0).view
    work.hints.update(request.hints)
    order = partial(policy.order, stage="prefill", worker=None)  # type: ignore[arg-type]
    shorter, uncached = (Request(submit(name, length), "f", 0.0).view for name, length in (("y", 3), ("z", 50)))
    assert order(work) < order(shorter) < order(uncached), "2, 3 and 50 tokens are to be computed"


def test_distserve_pulls_while_little_waits() -> None:
    policy = load_policy("distserve")
    running = [SimpleNamespace(num_pages=20), SimpleNamespace(num_pages=10)]

    def accepts(expected: int, free: int, seqs: int = 8) -> bool:
        options = WorkerOptions(max_num_seqs=seqs)
        worker = SimpleNamespace(num_pages=100, free_pages=free, running=running, expected=expected, options=options)
        return policy.accept(None, worker)  # type: ignore[arg-type]

    assert accepts(1, 66) and not accepts(1, 65), "4 of 100 pages wait, 5 do"
    assert accepts(0, 0), "what else is held is no reason where nothing is on its way"
    assert not accepts(1, 70, seqs=3)


def test_splitwise_overflows_into_the_mixed_pool() -> None:
    policy = "splitwise:threshold=300"
    idle = {"d0": {"context_tokens": 5}, "d1": {"context_tokens": 9}}
    assert placed(policy, view(p0={"queued_tokens": 200}, p1={"queued_tokens": 201}, **idle)) == ("p0", "d0")
    assert placed(policy, view(p0={"queued_tokens": 201}, **idle)) == ("d0", "d0")
    mixed = {"d0": {"context_tokens": 5}, "d1": {"context_tokens": 9, "queued_tokens": 200}}
    assert placed(policy, view(p0={"queued_tokens": 201}, **mixed)) == ("d1", "d0"), "a mixed one has room"
    full = {"d0": {"context_tokens": 5}, "d1": {"queued_tokens": 201}}
    assert placed(policy, view(p0={"queued_tokens": 201}, **full)) == ("d0", "d0"), "another becomes mixed"
    assert placed(policy, view(p0={}, **idle), asks(1000)) == ("p0", "d0"), "an empty queue is never too long"
    assert placed(policy, view(p0={}, d0={"context_tokens": 99}, d1={"queued_tokens": 1}))[1] == "d0", "not a mixed one"


def test_dynamo_takes_the_fewest_blocks() -> None:
    cluster = partial(view, b0={"queued_tokens": 30}, b1={"context_tokens": 50})
    assert placed("dynamo", cluster()) == ("b0", "b0"), "13 + 10 blocks against 10 + 15"
    assert placed("dynamo", cluster({"b1": 40})) == ("b1", "b1"), "6 + 15"
    assert placed("dynamo:weight=2", cluster()) == ("b1", "b1"), "26 + 10 against 20 + 15"
    assert placed("dynamo", view(p0={}, d0={"context_tokens": 20}, d1={"context_tokens": 10})) == ("p0", "d1")
    tie, policy = view(b0={}, b1={}), load_policy("dynamo")
    assert {placed(policy, tie)[0] for _ in range(20)} == {"b0", "b1"}
    warm, skewed = load_policy("dynamo:temperature=0.5"), view(b0={}, b1={"queued_tokens": 100})
    share = sum(placed(warm, skewed)[0] == "b1" for _ in range(2000)) / 2000
    assert share == pytest.approx(0.119, abs=0.03), "1 / (1 + e²)"


def test_dynamo_conditional_keeps_short_and_cached_prompts_local() -> None:
    policy = "dynamo_conditional:max_local=50,max_queued=1000"
    cluster = partial(view, p0={}, d0={}, d1={"decoding": 3})
    assert placed(policy, cluster({"d1": 60})) == ("d1", "d1"), "40 of 100 are left"
    assert placed(policy, cluster({"d1": 50})) == ("p0", "d0"), "50 are left"
    assert placed(policy, cluster({"d1": 12}), asks(40)) == ("p0", "d0"), "28 are left: 0.7 of the prompt"
    assert placed(policy, cluster({"d1": 13}), asks(40)) == ("d1", "d1")
    assert placed(policy, view(p0={"queued_tokens": 1001}, d0={}, d1={"decoding": 3})) == ("d0", "d0")
    assert placed(policy, view({"d1": 60}, p0={}, d0={}, d1={"context_tokens": 8901})) == ("p0", "d0"), "d1 is full"


def test_arrow_takes_the_first_that_attains_and_borrows_decode_workers() -> None:
    busy = {"d0": {"decoding": 9}, "d1": {"decoding": 4}, "d2": {"decoding": 1}}
    asked = partial(asks, slo_tpot=0.0155)
    assert placed("arrow", view(p0={}, **busy), asked()) == ("p0", "d1"), "20, 15 and 12 ms"
    assert placed("arrow", view(p0={}, **busy), asks(slo_tpot=0.001)) == ("p0", "d2"), "none attains"
    assert placed("arrow", view(p0={}, **busy)) == ("p0", "d2"), "no limit"
    behind = {"p0": {"queued_tokens": 2000}, **busy}  # 0.22 s
    assert placed("arrow", view(**behind), asked(slo_ttft=0.3)) == ("p0", "d1")
    assert placed("arrow", view(**behind), asked(slo_ttft=0.2)) == ("d1", "d1")
    assert placed("arrow", view(**behind), asks(slo_tpot=0.001, slo_ttft=0.2)) == ("p0", "d2"), "no slack"
    unknown = {"costs": StepCosts()}
    assert placed("arrow", view(p0=unknown, d0=unknown | {"decoding": 1}, d1=unknown), asked()) == ("p0", "d1")


def test_arrow_flips_with_patience_and_keeps_one_of_each() -> None:
    policy = load_policy("arrow:tpot=0.03,patience=3")
    late = view(p0={"queued_tokens": 5}, p1={}, d0={"decoding": 30})
    assert [policy.rebalance(late) for _ in range(4)] == [[], [], [RoleChange("p1", Role.DECODE)], []]
    late.workers["p1"].changed(flipping=Role.DECODE)
    assert not any(policy.rebalance(late) for _ in range(9)), "one at a time"
    late.workers["p1"].changed(flipping=None, role=Role.DECODE)
    late.workers["d0"].changed(decoding=6)  # 16 ms: well, but not by far
    assert not any(policy.rebalance(late) for _ in range(9))
    late.workers["d0"].changed(decoding=2)
    assert [policy.rebalance(late) for _ in range(4)] == [[], [], [RoleChange("p1", Role.PREFILL)], []]
    policy = load_policy("arrow:tpot=0.03,patience=1")
    assert not policy.rebalance(view(p0={}, d0={"decoding": 30})), "the last one stays"
    assert not policy.rebalance(view(p0={}, d0={}, d1={})), "what was decode from the start stays so"


def test_deflection_moves_who_would_be_sooner_elsewhere() -> None:
    policy = load_policy("deflection:tpot=0.02")

    def moved(queued: int, decoding: int, prefill: str = "p0", length: int = 100) -> tuple[Placement | None, object]:
        cluster = view(p0={"queued_tokens": queued}, d0={"decoding": decoding}, d1={"decoding": 99})
        request = asks(length, prefill)
        return policy.replace(request, cluster), request.hints.get("chunk")

    there = Placement("d0", "d0")
    # d0 has room for chunks of (20 - 15) / 0.1 = 50 tokens: two steps of 20 ms; p0 takes 10 ms + 0.1 ms per token.
    assert moved(301, 5) == (there, 50) and moved(299, 5) == (None, None)
    assert moved(9999, 10) == (None, None), "its steps take 20 ms as they are"
    assert moved(9999, 5, "d1") == (None, None), "nobody moves twice"
    hand = Hand(spec("w", num_pages=64), policy)
    one, two = submit("a", 9), submit("b", 9, arrival=1.0)
    one.spec.hints["chunk"] = two.spec.hints["chunk"] = 12  # type: ignore[index]
    hand.receive(one, two)
    assert sizes(hand.step()) == {"a": (0, 9), "b": (0, 3)} and sizes(hand.step()) == {"a": (9, 1), "b": (3, 6)}


def test_polyserve_packs_by_bins() -> None:
    policy = load_policy("polyserve")
    cluster = view(p0={}, d0={}, d1={}, d2={})

    def decodes(slo: float | None) -> str:
        name = placed(policy, cluster, asks(slo_tpot=slo))[1]
        status = cluster.workers[name]
        status.changed(decoding=status.decoding + 1)
        return name

    # 10 ms and 1 ms per decode: 2 fit in 12.5 ms, 4 in 14.5 ms.
    assert [decodes(0.0145) for _ in range(3)] == ["d0"] * 3
    assert [decodes(0.0125) for _ in range(3)] == ["d1", "d1", "d2"], "a tighter one has a worker of its own"
    assert [decodes(0.0145) for _ in range(2)] == ["d0", "d2"], "its own is full: it borrows, as long as that attains"
    assert decodes(0.0145) == "d1" and decodes(None) == "d2", "none attains, or there is no limit: the least loaded"
    unknown = {"costs": StepCosts()}
    assert placed(policy, view(p0=unknown, d7=unknown | {"decoding": 1}, d8=unknown), asks(slo_tpot=1.0))[1] == "d8"


def test_early_rejection_turns_away_who_would_miss() -> None:
    policy = load_policy("early_rejection")
    cluster = view({"p1": 60}, p0={}, p1={"queued_tokens": 50}, d0={"decoding": 4}, d1={"decoding": 3})
    assert placed(policy, cluster) == ("p1", "d1"), "90 tokens against 100"
    assert policy.admit(asks(slo_ttft=0.0191), cluster) is None
    late = policy.admit(asks(slo_ttft=0.018), cluster)
    assert isinstance(late, Reject) and late.retry_after == pytest.approx(0.001) and "0.019 s" in late.reason
    assert policy.admit(asks(slo_tpot=0.0141), cluster) is None
    assert isinstance(policy.admit(asks(slo_tpot=0.0139), cluster), Reject)
    assert isinstance(load_policy("early_rejection:ttft=0.01").admit(asks(), cluster), Reject)
    cluster.workers["p1"].changed(t_kv_token=1e-4)
    assert placed(policy, cluster) == ("p0", "d1"), "its link takes 10 ms"
    unknown = view(p0={"costs": StepCosts()}, d0={"costs": StepCosts()})
    assert policy.admit(asks(slo_ttft=1e-9, slo_tpot=1e-9), unknown) is None


BAD: dict[str, Iterable[str]] = {
    "arrow": ("ttft=-1", "tpot=x", "patience=0", "patience=1.5"),
    "deflection": ("tpot=-0.1", "tpot=inf"),
    "distserve": ("waiting=0", "waiting=1.1"),
    "dynamo": ("weight=-1", "temperature=hot", "temperature=nan"),
    "dynamo_conditional": ("max_local=-1", "max_queued=0.5", "ratio=2", "full=x"),
    "early_rejection": ("ttft=soon", "tpot=-1"),
    "eb_plus": ("extra=-0.5", "extra=inf"),
    "polyserve": ("tpot=-1",),
    "sarathi": ("chunk=0",),
    "sjf": ("ageing=-1", "ageing=old"),
    "splitwise": ("threshold=0", "threshold=1e3"),
}


@pytest.mark.parametrize("spec", [f"{name}:{bad}" for name, settings in BAD.items() for bad in settings])
def test_a_bad_setting_is_told_in_one_line(spec: str) -> None:
    name, _, setting = spec.partition(":")
    with pytest.raises(ValueError) as caught:
        load_policy(spec)
    said = str(caught.value)
    assert said.startswith(f"{name}: {setting.partition('=')[0]} must be") and "\n" not in said
    with pytest.raises(ValueError, match="unexpected keyword argument"):
        load_policy(f"{name}:nope=1")

"""Workloads on simulated clusters: equal steps at one event change nothing, seeds repeat, wires are shared, and what
`minidisagg simulate` says and leaves behind."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from minidisagg.cli import cli
from minidisagg.core.checked import PolicyError
from minidisagg.core.messages import Role
from minidisagg.core.plan import Piece, PlanItem, StepPlan
from minidisagg.core.policy import ClusterView, Migration, Placement, Policy, Reject, RequestView
from minidisagg.core.scheduler import Scheduler
from minidisagg.core.spec import EngineSpec
from minidisagg.interconnect import Interconnect
from minidisagg.measure.comparison import DASH, Comparison
from minidisagg.measure.contest import Contest
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import ORACLE
from minidisagg.measure.run_directory import read_result
from minidisagg.policies import load_policy
from minidisagg.sim.devices import TimingOnly
from minidisagg.sim.machines import ClusterSpec, Group, MachineCosts, find_profile, parse_cluster, parse_options
from minidisagg.sim.profile import Profile, load_profile
from minidisagg.sim.simulate import Result, simulate
from minidisagg.sim.simulation import Settings, Simulation, derived_slo, page_names, profiles_of
from minidisagg.sim.study import SimSide, calibrated, colocated, parse_sides
from minidisagg.workload.lengths import WorkItem, random_items, with_arrivals
from minidisagg.workload.synth import synth_items

SPREAD = [0.9, 0.95, 1.0, 1.0, 1.1, 1.3]


def spec(text: str, **changes: Any) -> ClusterSpec:
    return ClusterSpec(groups=parse_cluster(text), **changes)


def load(count: int, rate: float, seed: int = 0) -> list[WorkItem]:
    items = random_items(count, 900, 60, 0.9, seed)
    return with_arrivals(items, [number / rate for number in range(count)])


def seen(result: Result) -> list[object]:
    return [(r.request_id, r.token_times, r.stages, r.workers, r.cached_tokens) for r in result.run.requests]


# ---------------------------------------------------------------- equal steps at one event


class Moves(Policy):
    """On each tick the oldest requests go on decoding elsewhere."""

    def rebalance(self, cluster: ClusterView) -> list[Migration]:
        names = [worker.name for worker in cluster.candidates(Role.DECODE)]
        oldest = [request for request in cluster.requests() if request.decode in names][:6]
        return [Migration(one, names[(names.index(one.decode) + 1) % len(names)]) for one in oldest]


class ByCosts(Policy):
    """Places by all that the router learns of steps, links and caches, so that a late word shows."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        hits = cluster.hits(request)
        prefill = min(
            cluster.candidates(Role.PREFILL),
            key=lambda w: cluster.t_prefill(request.prefill_len - hits[w.name].device, w),
        )
        decode = min(
            cluster.candidates(Role.DECODE),
            key=lambda w: (cluster.t_decode(w, 1, request.prefill_len) - 1e-9 * w.pages_free, w.t_kv_token),
        )
        return Placement(prefill.name, decode.name)


Done = set[tuple[object, ...]]


@pytest.fixture
def steps_done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """What every step has computed, and into which pages, whatever plan it came from."""
    done: Done = set()
    finish, grow = TimingOnly.finish, Scheduler.grow

    def note(items: Sequence[PlanItem], steps: int) -> None:
        for n in range(steps):
            for item in items:
                pages = tuple(item.pages[: -(-(item.start + n + item.count) // 64)])
                done.add((item.request_id, item.incarnation, item.start + n, item.count, item.index + n, pages))

    def finished(self: TimingOnly, plan: StepPlan, steps: int) -> list[int]:
        if plan.repeat == 1:
            note(plan.items, steps)
        return finish(self, plan, steps)

    def grown(self: Scheduler, items: Sequence[PlanItem], steps: int) -> None:
        grow(self, items, steps)
        note(items, steps)  # the one under way, too: it is finished alone, with the same pages

    monkeypatch.setattr(TimingOnly, "finish", finished)
    monkeypatch.setattr(Scheduler, "grow", grown)
    return done


@pytest.mark.parametrize(
    ("text", "policy", "changes"),
    [
        ("both=2@h100", "fcfs", {}),
        ("prefill=1@h100,decode=2@h200", "sarathi:chunk=300", {"granularity": "layers:8"}),
        ("prefill=2@h100,decode=1@h100", "costs", {"wire": Interconnect(1e9, 1e-3)}),
        ("both=1@h100,prefill=1@a100,decode=1@h100", "prefill_first", {"granularity": "request"}),
        ("prefill=1@h100,decode=2@h100", "moves", {}),
        ("prefill=1@h100,decode=2@h100", "moves", {"wire": Interconnect(1e9, 1e-3), "pages": 60}),
        ("prefill=1@h100,decode=1@h100", "fcfs", {"pages": 40}),  # preemptions, and a prefix cache that is full
    ],
)
def test_equal_steps_at_one_event_change_no_plan_no_token_and_no_time(
    text: str, policy: str, changes: dict[str, Any], steps_done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile("h100_sxm", "llama-8b")
    monkeypatch.setattr(
        "minidisagg.sim.simulation.find_profile", lambda *key: replace(find_profile(*key), residuals=SPREAD)
    )
    assert not profile.residuals
    results, done = [], []
    for equal in (True, False):
        make = {"costs": ByCosts, "moves": Moves}.get(policy) or (lambda: load_policy(policy))
        results.append(simulate(make, load(60, 12.0), spec(text, **changes), Settings(equal_steps=equal, seed=3)))
        done.append(set(steps_done))
        steps_done.clear()
    once, one_by_one = results
    assert seen(once) == seen(one_by_one) and once.values == one_by_one.values
    assert done[0] == done[1] and len(done[0]) >= 60 and once.steps == one_by_one.steps
    assert all(len(r.token_times) == r.output_len for r in once.run.requests)
    assert once.events < (1.0 if "pages" in changes else 0.7) * one_by_one.events
    if policy == "moves":
        assert sum(len(r.handoffs) > 1 for r in once.run.requests) > 10
    elif "pages" in changes:
        assert any(len(r.workers) > 2 for r in once.run.requests), "nobody was preempted"


def test_a_policy_that_says_nothing_of_its_compose_is_asked_for_each_step() -> None:
    class Counts(Policy):
        asked = 0

        def compose(self, batch: Any, worker: Any) -> None:
            Counts.asked += bool(batch.running or batch.waiting)
            super().compose(batch, worker)

    result = simulate(Counts, load(5, 1.0), "both=1@h100")
    assert Counts.asked >= result.steps and not Counts.equal_steps and load_policy("sarathi").equal_steps


# ---------------------------------------------------------------- what a simulation is


def test_a_seed_repeats_and_another_does_not() -> None:
    one, same = (simulate("fcfs", load(30, 20.0), "prefill=1@h100,decode=1@h100") for _ in range(2))
    assert seen(one) == seen(same) and one.score == same.score > 0
    other = simulate("fcfs", load(30, 20.0, seed=1), "prefill=1@h100,decode=1@h100")
    assert seen(one) != seen(other)


def test_times_are_those_of_the_profile_and_the_wire() -> None:
    cluster = spec("prefill=1@h100,decode=1@h100", wire=Interconnect(2e9, 1e-3), granularity="request")
    [request] = simulate("fcfs", [WorkItem(index=0, prompt_len=2000, output_len=3)], cluster, Settings()).run.requests
    profile = load_profile("h100_sxm", "llama-8b")
    prefill = profile.step_seconds([(0, 2000)], 0, 0)
    assert request.token_times[0] == pytest.approx(prefill, abs=1e-3)
    pages = -(-2000 // 64)
    wire = pages * 64 * profile.kv_bytes_per_token / 2e9 + 1e-3
    second = profile.step_seconds((), 1, 2001)
    assert request.token_times[1] - request.token_times[0] == pytest.approx(wire + second, abs=2e-3)
    assert request.token_times[2] - request.token_times[1] == pytest.approx(profile.step_seconds((), 1, 2002), abs=1e-9)
    assert request.handoffs == [0] and request.stages["transfer"] > 0.9 * wire


def test_layer_groups_hide_most_of_a_slow_wire() -> None:
    item = [WorkItem(index=0, prompt_len=8000, output_len=2)]
    took = {}
    for granularity in ("request", "layers:4"):
        cluster = spec("prefill=1@h100,decode=1@h100", wire=Interconnect(10e9), granularity=granularity)
        times = simulate("fcfs", item, cluster).run.requests[0].token_times
        took[granularity] = times[1] - times[0]
    assert took["layers:4"] < 0.3 * took["request"]


def piece(count: int) -> Piece:
    return Piece("d", 1, 0, True, "r", 0, list(range(count)), [], count, (0, 2))


def test_a_card_sends_and_receives_one_piece_after_the_other() -> None:
    profile = load_profile("h100_sxm", "llama-8b")
    names = {name: profile for name in ("a", "b", "d", "e")}
    costs = MachineCosts(names, Interconnect(1000.0, 0.5))
    source = {name: EngineSpec(name, 1, Role.PREFILL, 9, 1, 2, "", layer_bytes=50) for name in "ab"}
    assert costs.transfer(source["a"], "d", piece(10), 0.0) == (0.0, 1.5)
    assert costs.transfer(source["b"], "d", piece(10), 0.0) == (1.0, 2.5), "incast: the receiver's card is busy"
    assert costs.transfer(source["a"], "e", piece(10), 0.0) == (1.0, 2.5), "the sender's card is"
    assert costs.transfer(source["b"], "e", piece(10), 0.0) == (0.0, 1.5), "while it waits for one, it sends to another"
    assert costs.transfer(source["b"], "d", piece(2), 0.0) == (2.0, 2.7), "pieces of a link stay in order"
    assert costs.transfer(source["a"], "e", piece(10), 9.0) == (9.0, 10.5)


def test_cards_do_one_thing_at_a_time_however_long_their_queues() -> None:
    profile = load_profile("h100_sxm", "llama-8b")
    costs = MachineCosts({name: profile for name in "abcdef"}, Interconnect(1000.0))
    rng, moved, now = Random(0), dict[tuple[str, bool], list[tuple[float, float]]](), 0.0
    for _ in range(3000):
        now += rng.random() * 0.2
        source, dest = rng.choice("abc"), rng.choice("def")
        spec = EngineSpec(source, 1, Role.PREFILL, 9, 1, 2, "", layer_bytes=50)
        span = costs.transfer(spec, dest, piece(rng.randint(1, 9)), now)
        for card in (source, True), (dest, False):
            moved.setdefault(card, []).append(span)
    for spans in moved.values():
        assert all(after[0] >= before[1] for before, after in pairwise(sorted(spans)))
    assert sum(begins > now for begins, _ in moved["a", True]) > 3 * len(costs._sends["a"]), "spans, not pieces"


def test_more_cards_have_more_wires() -> None:
    four = load_profile("h100_sxm", "llama-70b", "fp8", 4)
    costs = MachineCosts({"a": four, "d": four}, Interconnect(1000.0))
    assert costs.transfer(EngineSpec("a", 1, Role.PREFILL, 9, 1, 2, "", layer_bytes=50), "d", piece(10), 0.0)[1] == 0.25


def test_an_infinite_cache_hits_what_the_hashes_of_a_trace_imply() -> None:
    """One request after the other, in a cache that forgets nothing."""
    items = synth_items("mooncake-conversation", 300)
    known: set[int] = set()
    implied = 0
    for item in items:
        full = item.blocks[: (item.prompt_len - 1) // 512]  # of whole blocks; one token at least is computed
        implied += 512 * next((n for n, block in enumerate(full) if block not in known), len(full))
        known.update(item.blocks[: item.prompt_len // 512])
    cluster = spec("both=1@h100", page_size=512, pages=20_000)
    result = simulate("fcfs", items, cluster, Settings(max_concurrency=1))
    assert sum(request.cached_tokens for request in result.run.requests) == implied > 0


def test_pages_of_a_trace_are_its_blocks() -> None:
    item = WorkItem(index=1, prompt_len=1200, output_len=1, blocks=(7, 9, 4), block_size=512)
    other = replace(item, index=2, blocks=(7, 8, 4))
    one, two = page_names(item, 256), page_names(other, 256)
    assert len(one) == 4 and one[:2] == two[:2] and not set(one[2:]) & set(two)
    alone = [page_names(WorkItem(index=n, prompt_len=300, output_len=1), 64) for n in (0, 1)]
    assert len({name for names in alone for name in names}) == 8


def test_a_closed_loop_keeps_as_many_under_way() -> None:
    result = simulate("fcfs", random_items(30, 500, 40, 0.5), "both=1@h100", Settings(max_concurrency=4))
    ends = sorted(request.token_times[-1] for request in result.run.requests)
    starts = sorted(request.sent for request in result.run.requests)
    assert len(starts) == 30 and starts[3] < 0.001 < starts[4], "when the workers have said hello, and then"
    under_way = [sum(start <= at for start in starts) - sum(end <= at for end in ends) for at in starts]
    assert max(under_way) == 4


def test_a_closed_loop_goes_on_though_its_first_requests_are_refused() -> None:
    class AdmitsTwo(Policy):
        def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
            return Reject(1.0, "two are enough") if cluster.waiting >= 2 else None

    result = simulate(AdmitsTwo, random_items(100, 500, 4), "both=1@h100", Settings(max_concurrency=64))
    assert len(result.run.requests) == 100
    assert {request.finish_reason for request in result.run.requests} == {"length", "reject"}


def test_an_slo_is_of_the_workers_that_do_such_work() -> None:
    items = random_items(9, 2000, 100)

    def derived(text: str) -> SLO:
        cluster = spec(text)
        return derived_slo(cluster, profiles_of(cluster), items)

    fast, slow = derived("prefill=1@h100,decode=1@h100"), derived("both=2@a100")
    assert fast.ttft and slow.ttft and fast.tpot and slow.tpot and fast.ttft < slow.ttft and fast.tpot < slow.tpot
    assert derived("prefill=1@h100,decode=3@a100") == SLO(ttft=fast.ttft, tpot=slow.tpot)
    assert derived("prefill=1@a100,decode=3@h100") == SLO(ttft=slow.ttft, tpot=fast.tpot)
    assert derived("both=1@h100,both=1@a100") == derived("both=1@a100,both=1@h100") == slow
    sides = parse_sides("colocated,disagg", spec("prefill=1@h100,decode=3@a100"))
    assert calibrated(sides).mode == "disagg" and calibrated(sides[:1]).mode == "colocated"


def test_policies_see_the_limit_and_the_prediction() -> None:
    lengths = Counter[tuple[int, int | None]]()

    class Nosy(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
            lengths[request.max_tokens, request.predicted_len] += 1
            assert request.slo_ttft == 0.5 and request.slo_tpot is None
            return super().place(request, cluster)

    items = random_items(10, 100, 20, 0.9)
    from minidisagg.measure.goodput import SLO

    for predictor in ("none", "oracle"):
        settings = Settings(predictor=predictor, slo=SLO(ttft=500))  # type: ignore[arg-type]
        run = simulate(Nosy, items, "both=1@h100", settings).run
        assert bool(run.marks) == (predictor == "oracle")
    longest = max(item.output_len for item in items)
    assert lengths == Counter([(longest, None)] * 10) + Counter((longest, item.output_len) for item in items)


def test_many_workers_that_have_nothing_to_do_cost_little() -> None:
    """They are not introduced to each other, and nothing happens after the last request."""
    simulation = Simulation(
        spec("prefill=20@h100,decode=20@h100"), lambda: load_policy("fcfs"),
        [WorkItem(index=0, prompt_len=500, output_len=3)], Settings(),
    )  # fmt: skip
    simulation.play(0.0, None)
    assert simulation.sim.happened == simulation.ended[1] < 40 * 39


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not ROLE=COUNT@DEVICE[xN]"),
        ("prefill=0@h100,decode=1@h100", "'prefill=0@h100' is not"),
        ("prefil=1@h100", "'prefil=1@h100' is not"),
        ("both=1@h100x0", "is not ROLE=COUNT@DEVICE"),
        ("prefill=1@h100", "has no worker for decode"),
        ("decode=2@h100", "has no worker for prefill"),
    ],
)
def test_a_cluster_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_cluster(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_clusters_and_sides_are_read() -> None:
    assert parse_cluster("prefill=2@h100, decode=3@a100x4") == (
        Group(Role.PREFILL, 2, "h100"), Group(Role.DECODE, 3, "a100", 4),
    )  # fmt: skip
    cluster = spec("prefill=1@h100,decode=1@h100")
    sides = parse_sides("colocated:sarathi:chunk=5,x=2,./mine.py:Mine:depth=3,fcfs", cluster)
    assert sides == (
        SimSide(label="colocated sarathi:chunk=5,x=2", cluster=colocated(cluster), policy="sarathi:chunk=5,x=2"),
        SimSide(label="disagg Mine:depth=3", cluster=cluster, policy="./mine.py:Mine:depth=3"),
        SimSide(label="disagg", cluster=cluster, policy="fcfs"),
    )
    assert [side.label for side in parse_sides("fcfs,disagg", cluster)] == ["fcfs 1", "fcfs 2"]
    assert [side.label for side in parse_sides("fcfs,./a.py:Mine", cluster)] == ["fcfs", "Mine"]
    with pytest.raises(ValueError, match="no workers of prefill or decode alone"):
        parse_sides("disagg", colocated(cluster))
    assert parse_options("decode", "max_num_seqs=8,chunk=0").max_num_seqs == 8
    with pytest.raises(ValueError, match="--decode 'chunk=x'"):
        parse_options("decode", "chunk=x")


@pytest.mark.parametrize(
    ("items", "changes", "message"),
    [
        ([], {}, "the workload has no requests"),
        ([WorkItem(index=0, prompt_len=10**7, output_len=1)], {}, "more than the KV cache of a worker"),
        ([WorkItem(index=0, prompt_len=51, output_len=1, blocks=(1,), block_size=51)], {}, "51: give --block-size 51"),
        ([WorkItem(index=0, prompt_len=5, output_len=1)], {"model": "gpt-9"}, "has no profile of gpt-9"),
        ([WorkItem(index=0, prompt_len=5, output_len=1)], {"model": "llama-70b"}, "has no profile of llama-70b"),
    ],
)
def test_what_cannot_be_simulated(items: list[WorkItem], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate("fcfs", items, spec("both=1@h100", **changes))


def test_a_time_limit_holds() -> None:
    with pytest.raises(TimeoutError, match="more than 0"):
        simulate("fcfs", load(500, 100.0), "both=1@h100", Settings(time_limit=0.001))


# ---------------------------------------------------------------- the command


def command(tmp_path: Path, *args: str) -> Path:
    """Run it; the run directory."""
    cli.main(["simulate", "--result-dir", str(tmp_path), "--num-prompts", "60", *args], standalone_mode=False)
    [directory] = tmp_path.iterdir()
    return directory


def test_two_sides_leave_what_a_benchmark_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = command(tmp_path, "--repeats", "2", "-j", "2")
    names = {"options.json", "result.json", "requests.jsonl", "steps.jsonl", "trace.json", "report.html", "files"}
    assert {path.name for path in directory.iterdir()} == names
    result = read_result(directory)
    assert isinstance(result, Comparison) and result.b is not None
    assert [side.label for side in result.sides] == ["colocated", "disagg"] and len(result.a.runs) == 2
    assert all(len(run.requests) == 60 for side in result.sides for run in side.runs)
    assert result.b.runs[0].links[0].bytes > 0 and result.a.runs[0].workers[0].busy_s > 0
    out = capsys.readouterr().out
    assert "front end" not in out and "bandwidth" not in out, "what a simulation has not"
    assert "colocated: 2 both on h100," in out and "1 prefill on h100 + 1 decode on h100" in out
    assert result.verdict.split(":")[0] in " ".join(out.split())
    trace = json.loads((directory / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in trace if event["name"] == "process_name"} >= {
        "colocated worker-0", "disagg prefill-0", "disagg decode-0",
    }  # fmt: skip


def test_jobs_change_nothing(tmp_path: Path) -> None:
    found = []
    for jobs in ("1", "2"):
        directory = command(tmp_path / jobs, "--compare", "fcfs,sarathi:chunk=256", "-j", jobs)
        found.append((directory / "requests.jsonl").read_bytes())
    assert found[0] == found[1]


def test_several_sides_are_a_contest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = command(tmp_path, "--compare", "colocated,disagg,disagg:prefill_first", "--request-rate", "0.9x")
    result = read_result(directory)
    assert isinstance(result, Contest) and len(result.sides) == 3 and len(result.ratios) == len(result.best) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "disagg and disagg prefill_first decided alike throughout: this load does not tell them apart" in said
    assert result.verdict in said
    assert "Against the baseline" in (directory / "report.html").read_text()


def test_a_trace_keeps_its_own_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    rows = [f"2023-11-16 18:15:{n:02}.0000000,{300 + n},{20}" for n in range(60)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    where = ["--dataset-name", "azure", "--dataset-path", str(trace), "--policy", "fcfs"]
    command(tmp_path / "a", *where)
    out = " ".join(capsys.readouterr().out.split())
    assert "60 requests over 59.0 s, 0 skipped, 0 clamped" in out and "60 requests at the trace's own times" in out
    loads = r"own times, ([\d.]+)x of one prefill worker's capacity"
    command(tmp_path / "f", *where, "--trace-speedup", "400")
    found = re.search(loads, out), re.search(loads, " ".join(capsys.readouterr().out.split()))
    assert found[0] and found[1] and float(found[1][1]) == pytest.approx(400 * float(found[0][1]), rel=0.05)
    command(tmp_path / "b", *where, "--find-goodput")
    assert "60 requests, 0 skipped, 0 clamped" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="trace speedup and length scale must be positive"):
        command(tmp_path / "b", *where, "--trace-speedup", "0")
    command(tmp_path / "c", "--policy", "fcfs")
    assert "own times" not in capsys.readouterr().out
    command(tmp_path / "d", "--policy", "fcfs", "--request-rate", "trace", "--trace-speedup", "4")
    assert "60 requests at the trace's own times" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--request-rate trace: random has no times of its own"):
        command(tmp_path / "e", "--dataset-name", "random", "--request-rate", "trace")


def test_a_sweep_and_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = command(tmp_path / "a", "--max-concurrency", "1,4", "--dataset-name", "random")
    assert isinstance(read_result(swept), dict)
    command(tmp_path / "b", "--find-goodput", "--policy", "fcfs")
    assert "fails from" in capsys.readouterr().out


def test_a_sweep_shows_what_it_lacks_and_what_limits_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from minidisagg import Policy\n"
        "from minidisagg.core.policy import Reject\n"
        "class Mine(Policy):\n"
        "    def admit(self, request, cluster):\n"
        "        return Reject(1.0, 'closed')\n"
    )
    sweep = ["--max-concurrency", "2", "--random-output-len", "1"]  # no request has a time per further token
    command(tmp_path / "a", *sweep, "--predict-lengths", "oracle")
    said = capsys.readouterr().out
    [row] = [line for line in said.splitlines() if "TPOT, ms" in line]
    assert row.count(DASH) == 3 and f"note: {ORACLE}" in said
    command(tmp_path / "b", *sweep, "--compare", f"fcfs,{tmp_path}/mine.py:Mine")
    said = " ".join(capsys.readouterr().out.split())
    assert "60 of 60 requests were rejected" in said and "nan" not in said
    assert "Mine is worse than fcfs: goodput" in said, "though it was through with all of them in no time"


def test_repetitions_of_a_trace_are_its_next_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    rows = [f"{n},{300 + n},20" for n in range(130)]
    trace.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    where = ["--dataset-name", "azure", "--dataset-path", str(trace), "--policy", "fcfs"]
    result = read_result(command(tmp_path / "out", *where, "--repeats", "3"))
    assert isinstance(result, Comparison)
    lengths = [[request.prompt_len for request in run.requests] for run in result.a.runs]
    assert lengths == [[*range(300, 360)], [*range(360, 420)], [*range(300, 360)]]
    note = "the trace has requests for 2 repetitions, and those after have the same ones again"
    assert note in result.marks and note in " ".join(capsys.readouterr().out.split())
    result = read_result(command(tmp_path / "two", *where, "--repeats", "2"))
    assert isinstance(result, Comparison) and note not in result.marks


def test_no_noise_is_assumed_where_there_is_none(tmp_path: Path) -> None:
    for sides in ("fcfs,sjf", "fcfs,sjf,sarathi"):
        result = read_result(command(tmp_path / sides, "--compare", sides))
        assert isinstance(result, Comparison | Contest) and "1 repetition (< 3)" in result.marks


def test_a_slow_policy_is_noticed_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from minidisagg import Policy\n"
        "class Mine(Policy):\n"
        "    def place(self, request, cluster):\n"
        "        return 1 / (request.prompt_len - 6)\n"
    )
    with pytest.raises(ValueError, match="policy Mine: place raised ZeroDivisionError"):
        command(tmp_path / "out", "--policy", f"{tmp_path}/mine.py:Mine")


def test_a_policy_that_fails_for_some_wins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from minidisagg import Policy\n"
        "class Mine(Policy):\n"
        "    def place(self, request, cluster):\n"
        "        if cluster.now > 1.0 and request.request_id.endswith('7'):\n"
        "            raise KeyError(request.prompt_len)\n"
        "        return super().place(request, cluster)\n"
    )
    args = ["--compare", f"fcfs,{tmp_path}/mine.py:Mine", "--num-prompts", "60", "--result-dir", str(tmp_path / "out")]
    assert cli.main(["simulate", *args], standalone_mode=False) == 1
    result = read_result(next((tmp_path / "out").iterdir()))
    assert isinstance(result, Comparison) and result.verdict == "Void, no verdict."
    [why] = result.void
    assert re.match(r"Mine: \d requests failed, since policy Mine: place raised KeyError: ", why)
    assert why.endswith(f"({tmp_path}/mine.py, line 5)")
    assert " ".join(capsys.readouterr().out.split()).count("place raised KeyError") == 1, "it is told once"


@pytest.mark.parametrize(("policy", "told"), [("sarathi", 1), ("sarathi:chunk=512", 0), ("fcfs", 0)])
def test_a_chunk_that_is_for_other_devices_is_told_of(
    policy: str, told: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(tmp_path, "--policy", policy)
    assert " ".join(capsys.readouterr().out.split()).count("chunk=64 is for a CPU, on GPUs 512") == told


def test_nothing_is_said_of_a_handful(tmp_path: Path) -> None:
    result = read_result(command(tmp_path, "--num-prompts", "12", "--dataset-name", "random"))
    assert isinstance(result, Comparison) and result.verdict.startswith("No winner: nothing to compare")


def test_an_earlier_record_is_not_overwritten(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    command(tmp_path / "a", "--policy", "fcfs", "--record", log)
    for flag, args in (("--record", ["--policy", "sjf"]), ("--record", ["--compare", "fcfs,sjf"])):
        with pytest.raises(ValueError, match="has the record of an earlier run"):
            command(tmp_path / "b", flag, log, *args)
    command(tmp_path / "c", "--compare", "fcfs,sjf", "--log-decisions", log)
    with pytest.raises(ValueError, match="has the decisions of an earlier run"):
        command(tmp_path / "d", "--policy", "fcfs", "--log-decisions", log)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset-path", __file__], "--dataset-path is of sharegpt, azure, mooncake, burstgpt, text: say which"),
        (["--cluster", "both=1"], "is not ROLE=COUNT"),
        (["--link", "none"], "a simulated wire needs a bandwidth"),
        (["--link", "25Gbps,20us,5us"], "a simulated wire has no jitter, give BANDWIDTH,LATENCY"),
        (["--trace-speedup", "4"], "--trace-speedup divides a trace's own times"),
        (["--trace-speedup", "4", "--request-rate", "trace", "--max-concurrency", "2"], "a closed loop replaces"),
        (["--random-input-len", "9", "--trace-speedup", "4"], "is of traces and synth:NAME: for random, use --request"),
        (["--dataset-name", "multiturn", "--trace-scale-len", "2"], "for multiturn, use the flags of its lengths"),
        (["--policy", "fcfs", "--compare", "fcfs"], "--policy is of one side"),
        (["--compare", "fcfs,fcfs,fcfs", "--max-concurrency", "2"], "a sweep takes two"),
        (["--model", "nope"], "has no profile of nope"),
        (["--cluster", "both=1@tpu"], "no profiles of 'tpu'; there are a100_sxm"),
        (["--transfer-granularity", "layer"], "transfer granularity 'layer'"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        command(tmp_path, *args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_profiles_are_found_by_the_beginning_of_a_name() -> None:
    assert find_profile("h100", "llama-8b", "bfloat16", 1).name == "h100_sxm"
    found: Profile = find_profile("dgx-h100", "llama2-70b", "bfloat16", 8)
    assert found.name == "dgx-h100"


def test_a_policy_that_leaves_requests_waiting_for_ever_is_told_so() -> None:
    class Refuses(Policy):
        def accept(self, offer: Any, worker: Any) -> bool:
            return False

    with pytest.raises(PolicyError, match=r"^3 requests .* Refuses: accept refuses it though worker decode-0 is empty"):
        simulate(Refuses, load(3, 1.0), "prefill=1@h100,decode=1@h100")

    class Forgets(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
            return Reject(1.0, "later") if request.num_output else Placement("prefill-0", None)

    with pytest.raises(PolicyError, match="policy Forgets: 3 requests would wait for ever"):
        simulate(Forgets, load(3, 1.0), "prefill=1@h100,decode=1@h100")

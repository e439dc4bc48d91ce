"""Sessions: what their turns are made of, when they come, and what prefix caches have of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cluster import MODEL, PAGE, PAGE_BYTES, cluster, greedy, needs_two_cores, settings
from msgspec.structs import replace

from minidisagg.bench.client import LoadGenerator
from minidisagg.cli import main
from minidisagg.core.messages import SamplingParams
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView
from minidisagg.core.tracked import Emit
from minidisagg.measure.comparison import compare_runs
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import NOT_SENT, UNSENT, RequestRecord, RunRecord
from minidisagg.measure.report import turn_table
from minidisagg.measure.run_directory import RequestLine, read_lines
from minidisagg.measure.stats import by_schedule, samples_of, send_lag, unsteady, value_of, window_of
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.simulate import simulate
from minidisagg.sim.simulation import Settings
from minidisagg.workload.lengths import WorkItem, at_rate, random_items, with_prompts
from minidisagg.workload.multiturn import Multiturn, multiturn_items, rests
from minidisagg.workload.settings import Workload, build_items, check_length, describe_workload
from minidisagg.workload.traces import load_trace

VOCAB, BLOCK = 512, 16
SHORT = Multiturn(system_len=20, turns=3, input_len=24, turn_len=10, output_len=9, think_time=0.02)
QUIET = replace(SHORT, think_time=0.0)
Lengths = list[tuple[int, int, int, int]]


def lengths(records: Sequence[RequestRecord]) -> Lengths:
    return sorted((r.index, r.turn, r.prompt_len, r.output_len) for r in records)


def expected_hits(items: Sequence[WorkItem], page: int = BLOCK) -> list[int]:
    """Of a cache that forgets nothing, one session after another on one worker."""
    hits = []
    for before, item in pairwise([None, *items]):
        assert item is not None
        # The token that was sampled last is known, but no step has computed its KV.
        known = before.prompt_len + before.output_len - 1 if before and item.turn else item.system_len
        hits.append(known // page * page if before else 0)
    return hits


# ---------------------------------------------------------------- the workload


def test_sessions_grow_by_answers_and_new_words() -> None:
    items = multiturn_items(200, SHORT, seed=3)
    assert [item.index for item in items] == list(range(200))
    for before, item in pairwise(items):
        if item.turn:
            assert (item.session, item.turn) == (before.session, before.turn + 1)
            assert item.prompt_len == before.prompt_len + before.output_len + item.new_len
            assert item.system_len == 0 and item.think_s > 0.0
        else:
            assert item.session != before.session and item.prompt_len == 20 + item.new_len and item.think_s == 0.0
    turns = Counter(Counter(item.session for item in items[:190]).values())
    assert set(turns) <= {1, 2, 3, 4, 5} and len(turns) > 2
    assert {item.new_len for item in items if not item.turn} <= set(range(12, 37))
    assert {item.new_len for item in items if item.turn} == set(range(5, 16))
    assert max(item.prompt_len + item.output_len for item in items) <= SHORT.longest
    think = [item.think_s for item in multiturn_items(6000, SHORT) if item.turn]
    assert sum(think) / len(think) == pytest.approx(0.02, rel=0.05)
    assert sum(t > 0.02 for t in think) / len(think) == pytest.approx(math.exp(-1), abs=0.02)  # exponential


def test_a_turn_depends_on_seed_session_and_turn_only() -> None:
    long, short = multiturn_items(60, SHORT, seed=1), multiturn_items(20, SHORT, seed=1)
    assert short == long[:20]  # the last session is cut short, not made otherwise
    assert multiturn_items(20, SHORT, seed=2) != short
    drawn = [
        {
            (i.session, i.turn): (i.new_len, i.output_len, i.think_s)
            for i in multiturn_items(60, replace(SHORT, turns=n))
        }
        for n in (3, 9)
    ]
    assert len(both := drawn[0].keys() & drawn[1].keys()) > 15
    assert all(drawn[0][key] == drawn[1][key] for key in both)
    a, b = (
        with_prompts(long, VOCAB, seed=1),
        with_prompts([replace(item, index=item.index + 7) for item in long], VOCAB, 1),
    )
    assert [item.prompt for item in a] == [item.prompt for item in b]
    firsts = [item.prompt or [] for item in a if not item.turn]
    assert len({tuple(prompt[:20]) for prompt in firsts}) == 1 and len({tuple(prompt[20:32]) for prompt in firsts}) > 10
    assert [len(item.prompt or []) for item in a] == [item.system_len + item.new_len for item in a]
    assert len({tuple(item.prompt or []) for item in a}) == 60


@pytest.mark.parametrize(
    "changes, why",
    [({"turns": 0}, "at least 1"), ({"system_len": -1}, "at least 0"), ({"range_ratio": 1.0}, "range ratio"),
     ({"think_time": math.inf}, "finite"), ({"think_time": -1.0}, "not negative")],
)  # fmt: skip
def test_bad_sessions(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        multiturn_items(4, replace(SHORT, **changes))


def test_settings_build_describe_and_limit_sessions() -> None:
    workload = Workload(dataset_name="multiturn", multiturn=SHORT)
    assert build_items(workload, 30, seed=4) == (multiturn_items(30, SHORT, 4), None)
    assert "sessions of 3 turns, 20 + 24 in, then 10 more each, 9 out ± 50%" in describe_workload(workload)
    check_length(workload, SHORT.longest)
    with pytest.raises(ValueError, match=f"grow to {SHORT.longest} tokens, more than the limit of 99"):
        check_length(workload, 99)


def test_a_rate_counts_all_turns() -> None:
    items = at_rate(multiturn_items(120, SHORT), 40.0, seed=2)
    firsts = [item.arrival_s for item in items if not item.turn]
    assert firsts == sorted(firsts) and firsts[-1] == pytest.approx(120 / 40.0)
    assert {item.arrival_s for item in items if item.turn} == {0.0}
    single = [item.arrival_s for item in at_rate(random_items(50, 9, 9), 7.3, 0.5, 3)]
    assert single[-1] == pytest.approx(50 / 7.3)


# ---------------------------------------------------------------- the bench's client


class Engine:
    """A front end whose answers follow from their prompts. A session in `broken` fails in its second turn."""

    max_model_len = 4096

    def __init__(self, seconds: float = 0.004, broken: str = "") -> None:
        self.seconds, self.broken = seconds, broken
        self.sent: dict[tuple[str, int], list[int]] = {}  # (session, turn) → prompt
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.most = 0  # sessions at once
        self._turns: Counter[str] = Counter()
        self._open: set[str] = set()

    def submit(
        self, prompt: list[int], sampling: SamplingParams, on_emit: Any, *, session: str, ends_after: int, **_: Any
    ) -> str:
        key = session, self._turns[session]
        self._turns[session] += 1
        self.sent[key] = prompt
        self.answers[key] = [(sum(prompt) + n) % VOCAB for n in range(ends_after)]
        self._open.add(session)
        self.most = max(self.most, len(self._open))
        asyncio.get_running_loop().call_later(self.seconds, self._answer, key, on_emit)
        return f"{session}.{key[1]}"

    def _answer(self, key: tuple[str, int], on_emit: Any) -> None:
        now = time.monotonic()
        if key == (self.broken, 1):
            on_emit(Emit("r", finish="error", error="it broke"), now)
            self._open.discard(key[0])
            return
        tokens = self.answers[key]
        on_emit(Emit("r", index=0, tokens=tokens[:1], cached_tokens=3), now)
        on_emit(Emit("r", index=1, tokens=tokens[1:], finish="length"), now)

    def closed(self, session: str) -> None:
        self._open.discard(session)

    def workers_of(self, request_id: str) -> list[str]:
        return ["w"]


def measured(engine: Engine, items: list[WorkItem], concurrency: int | None = None) -> list[RequestRecord]:
    ended: list[int] = []

    async def run() -> list[RequestRecord]:
        load = LoadGenerator(engine, with_prompts(items, VOCAB), 0, ended.append)  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            return await load.run(concurrency)

    records = asyncio.run(run())
    assert sum(ended) == len(items) == len(records)
    return sorted(records, key=lambda record: record.index)


def test_a_turn_has_all_that_was_said_before_it() -> None:
    items = multiturn_items(40, SHORT, seed=5)
    engine = Engine()
    records = measured(engine, items)
    words = {(item.session, item.turn): item.prompt or [] for item in with_prompts(items, VOCAB)}
    for item in items:
        before = item.session, item.turn - 1
        past = [*engine.sent[before], *engine.answers[before]] if item.turn else []
        assert engine.sent[item.session, item.turn] == [*past, *words[item.session, item.turn]]
    assert lengths(records) == planned(items)
    assert all(record.ok and record.cached_tokens in (0, 3) for record in records)


def test_users_think_after_the_last_token() -> None:
    items = multiturn_items(30, SHORT, seed=6)
    records = measured(Engine(), items)
    for item, (before, record) in zip(items[1:], pairwise(records), strict=True):
        if item.turn:
            assert record.scheduled == pytest.approx(before.token_times[-1] + item.think_s, abs=1e-9)
        assert record.sent >= record.scheduled - 1e-6


def test_a_slow_side_is_offered_the_same() -> None:
    items = at_rate(multiturn_items(40, SHORT, seed=7), 400.0)
    fast, slow = Engine(0.001), Engine(0.02)
    a, b = measured(fast, items), measured(slow, items)
    assert fast.sent == slow.sent and lengths(a) == lengths(b)
    runs = [RunRecord(label=name, requests=one, num_warmups=2) for name, one in (("a", a), ("b", b))]
    assert [r.index for r in by_schedule(runs[0])] == [r.index for r in by_schedule(runs[1])]
    assert (window_of(runs[0]).first, window_of(runs[0]).last) == (window_of(runs[1]).first, window_of(runs[1]).last)


@pytest.mark.parametrize("users", [1, 3])
def test_closed_loops_are_of_sessions(users: int) -> None:
    items = multiturn_items(24, SHORT, seed=8)
    engine = Engine()
    records = measured(engine, items, users)
    last = {item.session: records[item.index].token_times[-1] for item in items}
    began = {item.session: records[item.index].scheduled for item in items if not item.turn}
    at_once = [sum(began[s] <= began[session] < last[s] for s in last) for session in began]
    assert max(at_once) == users and at_once[users:].count(users) == len(began) - users


def test_what_comes_after_a_failure_is_no_success() -> None:
    items = multiturn_items(40, replace(QUIET, turns=4, range_ratio=0.0), seed=9)
    engine = Engine(broken="session-3")
    for concurrency in (None, 2):
        engine = Engine(broken="session-3")
        records = measured(engine, items, concurrency)
        of = records[12:16]
        assert [r.finish_reason for r in of] == ["length", "error", UNSENT, UNSENT]
        assert [r.error for r in of] == ["", "it broke", NOT_SENT, NOT_SENT]
        assert lengths(of) == planned(items[12:16])
        assert ("session-3", 2) not in engine.sent and sum(r.ok for r in records) == 37
        assert not any(r.rejected for r in of)
    run = RunRecord(label="a", requests=records, wall_s=1.0)
    met = samples_of(run, SLO(e2el=1e6), trim=0.0).metrics["attainment"].values
    assert met.mean() == 37 / 40  # what was never sent counts as missed
    late = [replace(r, sent=r.scheduled + 1.0) if r.finish_reason != UNSENT else r for r in records]
    assert send_lag(late, 1.0) == pytest.approx(1.0)  # and not as sent in time


# ---------------------------------------------------------------- the simulation


def spec(text: str = "both=1@h100", **changes: Any) -> ClusterSpec:
    return ClusterSpec(groups=parse_cluster(text), page_size=BLOCK, **changes)


@pytest.mark.parametrize("equal_steps", [True, False])
def test_simulated_hits_are_all_that_was_computed(equal_steps: bool) -> None:
    items = multiturn_items(60, replace(SHORT, output_len=40, system_len=100), seed=1)
    settings = Settings(max_concurrency=1, equal_steps=equal_steps)
    requests = simulate("fcfs", items, spec(), settings).run.requests
    assert [r.cached_tokens for r in requests] == expected_hits(items)
    assert sum(r.cached_tokens for r in requests) > 0.5 * sum(r.prompt_len for r in requests)
    without = simulate("fcfs", items, spec(prefix_caching=False), settings).run.requests
    assert not any(r.cached_tokens for r in without)


def test_what_is_decoded_goes_back_to_where_the_next_turn_begins() -> None:
    items = multiturn_items(60, replace(SHORT, output_len=40, think_time=1.0), seed=2)
    run = simulate("fcfs", items, spec("prefill=1@h100,decode=1@h100"), Settings(max_concurrency=1)).run
    slow = [(before, item) for before, item in pairwise(items) if item.turn and item.think_s > 0.2]
    assert len(slow) > 20  # whose user has thought for longer than a copy takes
    for before, item in slow:
        known = before.prompt_len + before.output_len - 1
        assert run.requests[item.index].cached_tokens == known // BLOCK * BLOCK


class Blind(Policy):
    """The default, if no worker told what it has."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        return super().place(request, dataclasses.replace(cluster, hits=lambda _: {}))


def test_turns_go_to_the_prefill_worker_that_has_what_was_said_before() -> None:
    talk = Multiturn(system_len=100, turns=5, input_len=4000, turn_len=400, output_len=40, think_time=2.0)
    items = at_rate(multiturn_items(300, talk, seed=4), 12.0)

    def play(policy: type[Policy], **changes: Any) -> tuple[float, float]:
        """The share of turns that begin where the one before them did, and the mean TTFT."""
        run = simulate(policy, items, spec("prefill=2@h100,decode=2@h100", **changes)).run
        requests = sorted(run.requests, key=lambda r: r.index)
        turns = [before.workers[0] == one.workers[0] for before, one in pairwise(requests) if one.turn]
        assert {one.workers[0] for one in requests} == {"prefill-0", "prefill-1"}
        return sum(turns) / len(turns), sum(one.token_times[0] - one.scheduled for one in requests) / len(requests)

    (back, ttft), (by_chance, blind) = play(Policy), play(Blind)
    assert back > 0.9 > 0.75 > by_chance and ttft < 0.85 * blind
    assert play(Policy, prefix_caching=False) == play(Blind, prefix_caching=False)
    assert ttft < 0.3 * play(Policy, prefix_caching=False)[1]


def test_simulated_turns_come_when_their_users_have_thought() -> None:
    items = at_rate(multiturn_items(200, replace(SHORT, think_time=1.5)), 20.0)
    for shape in (spec("both=2@h100"), spec("prefill=1@h100,decode=1@h100")):
        run = simulate("fcfs", items, shape).run
        requests = sorted(run.requests, key=lambda r: r.index)
        assert lengths(requests) == planned(items)
        for item, (before, one) in zip(items[1:], pairwise(requests), strict=True):
            due = before.token_times[-1] + item.think_s if item.turn else item.arrival_s
            assert one.scheduled == pytest.approx(due, abs=1e-9)
    swept = simulate("fcfs", items, spec("both=2@h100"), Settings(max_concurrency=4)).run.requests
    swept = sorted(swept, key=lambda r: r.index)
    spans = [(swept[i.index].scheduled, swept[i.index + len(rests(items)[i.index])]) for i in items if not i.turn]
    assert max(sum(a <= began < b.token_times[-1] for a, b in spans) for began, _ in spans) == 4


class Refuses(Policy):
    """Longer prompts than 60 tokens."""

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        return Reject(1.0, "too long") if request.prefill_len > 60 else None


@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_refused_turn_ends_its_session(concurrency: int | None) -> None:
    items = at_rate(multiturn_items(80, SHORT, seed=3), 30.0)
    run = simulate(Refuses, items, spec(), Settings(max_concurrency=concurrency)).run
    requests = sorted(run.requests, key=lambda r: r.index)
    assert len(requests) == 80
    for item, one in zip(items, requests, strict=True):
        longer = [other for other in items[: item.index] if other.session == item.session and other.prompt_len > 60]
        assert one.finish_reason == (UNSENT if longer else "reject" if item.prompt_len > 60 else "length")
        assert one.rejected == (one.finish_reason == "reject") and one.ok == (one.finish_reason == "length")
    assert {r.finish_reason for r in requests} == {UNSENT, "reject", "length"}


def test_blocks_of_a_trace_are_still_shared(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000 * n, "input_length": 512 * (n + 2), "output_length": 20, "hash_ids": list(range(n + 2))}
        for n in range(4)
    ]
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    items, _ = load_trace("mooncake", file)
    requests = simulate("fcfs", items, spec()).run.requests
    assert [r.cached_tokens for r in requests] == [0, 1024, 1536, 2048]
    assert rests(items) == {n: [] for n in range(4)}


# ---------------------------------------------------------------- figures


def test_ttft_by_turn_in_result_and_table() -> None:
    items = at_rate(multiturn_items(240, replace(SHORT, think_time=0.1)), 60.0)
    slo = SLO(ttft=1000)
    a, b = (simulate("fcfs", items, spec(text)).run for text in ("both=2@h100", "prefill=1@h100,decode=1@h100"))
    found = compare_runs([a], [b], slo, run_noise=0.0)
    kept = by_schedule(a)[window_of(a).first : window_of(a).last]
    for turn in range(5):
        waits = sorted(1e3 * (r.token_times[0] - r.scheduled) for r in kept if r.turn == turn)
        assert min(waits) <= found.a.results[0][f"p50_ttft_turn_{turn + 1}_ms"] <= max(waits)  # type: ignore[operator]
        assert found.a.results[0][f"mean_ttft_turn_{turn + 1}_ms"] == pytest.approx(sum(waits) / len(waits))
        assert f"p50_ttft_turn_{turn + 1}" in found.ratios
    table = turn_table(found)
    assert table is not None and table.row_count == 5
    cells = [list(column.cells) for column in table.columns]
    first = [r for r in a.requests if r.turn == 0]
    assert cells[3][0] == f"{sum(r.cached_tokens for r in first) / sum(r.prompt_len for r in first):.1%}"
    single = simulate("fcfs", at_rate(random_items(40, 50, 9), 60.0), spec()).run
    assert turn_table(compare_runs([single], slo=slo)) is None
    assert not any("turn" in name for name in samples_of(single, slo).metrics)


def test_short_runs_of_long_sessions_are_marked() -> None:
    items = at_rate(multiturn_items(200, replace(SHORT, think_time=1.0)), 40.0)
    run = simulate("fcfs", items, spec()).run
    assert "more --num-prompts" in unsteady(run) and unsteady(run) in compare_runs([run], slo=SLO(ttft=9)).marks
    assert not unsteady(simulate("fcfs", at_rate(items, 4.0), spec()).run)
    assert not unsteady(simulate("fcfs", at_rate(random_items(60, 50, 9), 1e3), spec()).run)
    # What was due later than the window is no goodput of it, though its latencies count.
    window, goodput = window_of(run), samples_of(run, SLO(ttft=1e6)).metrics["request_goodput"]
    due = [r for r in run.requests if window.start <= r.scheduled < window.end]
    assert value_of(goodput) == pytest.approx(len(due) / window.seconds) and len(due) < 150


def test_all_sessions_at_once_have_no_drain_to_leave_out() -> None:
    run = RunRecord(label="a", requests=measured(Engine(), multiturn_items(24, SHORT), 50), max_concurrency=50)
    assert (window_of(run).first, window_of(run).last) == (0, 24) and window_of(run).seconds > 0.01


# ---------------------------------------------------------------- the commands

FLAGS = "--multiturn-system-len=20", "--multiturn-turns=3", "--multiturn-input-len=24", "--multiturn-turn-len=10"
FLAGS += "--multiturn-output-len=9", "--multiturn-think-time=0.02"


def command(capsys: pytest.CaptureFixture[str], directory: Path, *args: str) -> tuple[str, Path]:
    with pytest.raises(SystemExit) as ended:
        main([*args, "--num-warmups", "2", "--repeats", "1", "--result-dir", str(directory)])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    [made] = directory.iterdir()
    return " ".join(told.out.split()), made


def requests_in(path: Path, side: str = "A") -> list[RequestLine]:
    found = [line for line in read_lines(path / "requests.jsonl", RequestLine) if line.side == side]
    return sorted(found, key=lambda line: line.index)


def planned(items: Sequence[WorkItem]) -> Lengths:
    return [(item.index, item.turn, item.prompt_len, item.output_len) for item in items]


def test_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, made = command(capsys, tmp_path, "simulate", *FLAGS, "--num-prompts", "120", "--request-rate", "30")
    assert "TTFT by turn (ms)" in out and "sessions of 3 turns, 20 + 24 in" in out
    for side in "AB":
        assert lengths(requests_in(made, side)) == planned(multiturn_items(120, SHORT))
    assert json.loads((made / "options.json").read_text())["workload"]["multiturn"]["think_time"] == 0.02


@needs_two_cores
def test_bench_and_simulation_hit_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = (
        "--mode",
        "colocated",
        "--prefill-workers",
        "1",
        "--decode-workers",
        "0",
        "--block-size",
        str(BLOCK),
        "--prefill",
        "cpus=0",
    )
    load = *FLAGS, "--num-prompts", "20", "--max-concurrency", "1", "--goodput", "e2el:5000"
    _, made = command(capsys, tmp_path, "bench", "dummy:tiny,std=0.15", *shape, *load)
    items = multiturn_items(20, SHORT)
    requests = requests_in(made / "concurrency-1")
    assert lengths(requests) == planned(items)
    assert [r.cached_tokens for r in requests] == expected_hits(items)
    simulated = simulate("fcfs", items, spec(), Settings(max_concurrency=1)).run.requests
    assert [r.cached_tokens for r in simulated] == expected_hits(items)


@needs_two_cores
def test_bench_of_both_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = *FLAGS, "--num-prompts", "24", "--request-rate", "40", "--goodput", "ttft:2000"
    load = *load, "--kv-store", "local:DRAM=64M", "--block-size", "16"
    out, made = command(capsys, tmp_path, "bench", "dummy:tiny,std=0.15", "--mode", "both", "--link", "unix", *load)
    assert "TTFT by turn (ms)" in out
    for side in "AB":
        assert lengths(requests_in(made, side)) == planned(multiturn_items(24, SHORT))
        assert all(len(r.token_times) == r.output_len for r in requests_in(made, side))
    result = json.loads((made / "result.json").read_text())
    assert {"p50_ttft_turn_1", "p50_ttft_turn_3"} <= result["sides"]["disagg"]["values"].keys()
    # Two colocated workers find each other's turns in the store; what returns to prefill has no need of it.
    for row in (r"worker-0 → store", r"worker-1 → store", r"store → worker-[01]"):
        assert re.search(row + r" +store +[1-9]\d* +\d", out), row


@pytest.mark.parametrize(
    "args, why",
    [
        (("bench", "--base-url", "http://127.0.0.1:1", "--dataset-name", "multiturn"), "a server answers in text"),
        (("simulate", "--dataset-name", "random", "--multiturn-turns", "4"), "--multiturn-turns is of --dataset-name"),
        (("simulate", "--random-input-len", "9", "--multiturn-turns", "4"), "--multiturn-turns is of --dataset-name"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    args: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*args, "--result-dir", str(tmp_path)])
    assert ended.value.code and why in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what moves


@pytest.mark.parametrize("decode", [2, 4])
def test_turns_decode_where_the_history_is(decode: int) -> None:
    """Or all of it would move again with each turn."""
    talk = Multiturn(turns=6, input_len=1000, turn_len=100, output_len=100, think_time=2.0)
    items = at_rate(multiturn_items(240, talk, seed=4), 8.0)

    def forward(workers: int) -> int:
        run = simulate("fcfs", items, spec(f"prefill=1@h100,decode={workers}@h100")).run
        assert len({one.workers[-1] for one in run.requests}) == workers
        return sum(link.bytes for link in run.links if link.source.startswith("prefill"))

    assert forward(decode) < 1.1 * forward(1)


@needs_two_cores
def test_a_turn_moves_what_is_new_and_not_the_history() -> None:
    turns, added, output = 6, 40, 24

    async def pages_by_turn(reuse: bool) -> list[int]:
        """What has gone over all links in each turn, what goes back included."""
        moved, prompt = list[int](), list[int]()
        async with cluster(settings("disagg", "shm", 400), model=replace(MODEL, prefix_caching=reuse)) as frontend:
            for turn in range(turns):
                prompt = prompt + [(turn * 31 + n * 7) % VOCAB for n in range(added)]
                answer, ended = list[int](), asyncio.Event()

                def on_emit(emit: Emit, _: float, answer: list[int] = answer, ended: asyncio.Event = ended) -> None:
                    answer += emit.tokens
                    if emit.finish:
                        ended.set()

                frontend.submit(prompt, greedy(output), on_emit, session="one")
                await ended.wait()
                await asyncio.sleep(0.2)  # what goes back
                stats = await frontend.fresh_stats()
                moved.append(sum(link.bytes for worker in stats.values() for link in worker.links))
                prompt = prompt + answer
        return [(b - a) // PAGE_BYTES["float64"] for a, b in pairwise([0, *moved])]

    pages = asyncio.run(pages_by_turn(True))
    # New words go forward and the answer back, in whole pages, of which the last of each may be full later.
    assert (added + output) // PAGE - 2 <= min(pages) <= max(pages) <= (added + output) // PAGE + 3, pages
    pages = asyncio.run(pages_by_turn(False))
    assert pages[-1] > turns * added // PAGE and sorted(pages) == pages, pages

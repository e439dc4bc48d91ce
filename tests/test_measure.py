from __future__ import annotations

import asyncio
import io
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from minidisagg.measure.comparison import (
    TIMES,
    Comparison,
    alike_marks,
    compare_runs,
    goodput_verdict,
    verdict_of,
    worker_usage,
)
from minidisagg.measure.goodput import (
    SLO,
    GoodputResult,
    Trial,
    attainment,
    find_goodput,
    monotone_fit,
    parse_slo,
)
from minidisagg.measure.intervals import Ratio, block_weights, compare, resampled, share_error, student_t
from minidisagg.measure.records import TRIM, LinkRecord, RequestRecord, RunRecord, WorkerRecord
from minidisagg.measure.report import render
from minidisagg.measure.run_directory import to_dict, write_run_directory
from minidisagg.measure.stats import Sample, Samples, Window, samples_of, send_lag, summarize, void_reasons, window_of
from minidisagg.workload.arrivals import arrival_times


def summary(run: RunRecord, slo: SLO | None = None, trim: float = TRIM) -> dict[str, object]:
    return summarize(run, samples_of(run, slo, trim), slo)


def record(index: int, scheduled: float, *tokens: float, **more: Any) -> RequestRecord:
    fields: dict[str, Any] = {"sent": scheduled, "prompt_len": 10, "output_len": len(tokens), **more}
    return RequestRecord(request_id=str(index), index=index, scheduled=scheduled, token_times=list(tokens), **fields)


# ---------------------------------------------------------------- statistics of one run


def test_latencies_by_hand() -> None:
    run = RunRecord(
        label="x",
        requests=[
            record(0, 0.0, 1.0, 1.5, 1.6, 1.8, sent=0.2, handoffs=[0], stages={"queue": 0.3, "prefill": 0.7}),
            record(1, 0.0, 2.0, 2.1, stages={"queue": 0.5, "prefill": 1.5}),
            record(2, 0.0, 4.0),  # one token: no second token, no TPOT, no gaps
            record(3, 0.0, error="connection lost"),
            record(4, 0.0, rejected=True),
        ],
    )
    result = summary(run, SLO(ttft=2000, tpot=300))
    assert result["mean_ttft_ms"] == pytest.approx(7000 / 3)  # from the scheduled arrival, not from `sent`
    assert result["median_ttft_ms"] == result["p50_ttft_ms"] == pytest.approx(2000)
    assert result["p90_ttft_ms"] == pytest.approx(3600)
    assert result["std_ttft_ms"] == pytest.approx(np.std([1000, 2000, 4000]))
    assert result["mean_ttst_ms"] == pytest.approx(1800)  # 1.5 and 2.1
    assert result["mean_tpot_ms"] == pytest.approx((0.8 / 3 + 0.1) / 2 * 1000)
    assert result["mean_itl_ms"] == pytest.approx((0.1 + 0.2 + 0.1) / 3 * 1000)  # pooled, without the handoff
    assert result["mean_handoff_ms"] == pytest.approx(500)
    assert result["mean_max_itl_ms"] == pytest.approx(300)  # the handoff counts: (0.5 + 0.1) / 2
    assert result["mean_e2el_ms"] == pytest.approx((1.8 + 2.1 + 4.0) / 3 * 1000)
    assert result["mean_stage_queue_ms"] == pytest.approx(400)
    assert (result["completed"], result["failed"], result["rejected"], result["measured"]) == (3, 1, 1, 5)
    assert result["duration"] == pytest.approx(4.0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 7)
    assert result["request_throughput"] == pytest.approx(3 / 4)
    assert result["output_throughput"] == pytest.approx(7 / 4)
    assert result["total_token_throughput"] == pytest.approx(37 / 4)
    assert result["slo_attainment"] == pytest.approx(2 / 5)  # failed and rejected ones miss
    assert result["request_goodput"] == pytest.approx(2 / 4)


def test_result_has_vllms_keys() -> None:
    run = RunRecord(label="x", requests=[record(i, i, i + 0.5, i + 0.6, i + 0.7) for i in range(20)])
    keys = set(summary(run, SLO(ttft=600)))
    expected = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "num_prompts"}
    expected |= {"request_throughput", "request_goodput", "output_throughput", "total_token_throughput"}
    expected |= {"request_rate", "burstiness", "max_concurrency", "model_id", "label"}
    for metric in ("ttft", "tpot", "itl", "e2el"):
        expected |= {f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p50", "p90", "p99")}
    assert expected <= keys
    assert "mean_handoff_ms" not in keys
    json.dumps(summary(run))


def test_window_drops_warm_up_and_drain_by_schedule() -> None:
    requests = [record(i, float(i), i + 1.5, i + 1.75) for i in range(40)]
    window = window_of(RunRecord(label="x", requests=requests[::-1]))  # order of completion does not matter
    assert (window.first, window.last, window.start, window.end) == (2, 38, 2.0, 38.0)
    assert window_of(RunRecord(label="x", requests=requests, num_warmups=10)).first == 10
    result = summary(RunRecord(label="x", requests=requests))
    # In [2, 38) every second has one first token and one last token, also of requests that were dropped.
    assert result["measured"] == result["completed"] == 36
    assert result["total_output_tokens"] == 72 and result["output_throughput"] == pytest.approx(2.0)
    whole = summary(RunRecord(label="x", requests=requests), trim=0.0)  # vLLM's way: all of it
    assert (whole["completed"], whole["duration"]) == (40, pytest.approx(40.75))
    with pytest.raises(ValueError, match="nothing to measure"):
        window_of(RunRecord(label="x", requests=requests, num_warmups=40))
    with pytest.raises(ValueError, match="nothing to measure"):
        window_of(RunRecord(label="x"))
    with pytest.raises(ValueError, match="too few"):
        window_of(RunRecord(label="x", requests=requests[:2]))


def test_void_reasons() -> None:
    late = RunRecord(label="x", requests=[record(i, 0.0, 1.0, sent=0.011) for i in range(10)])
    assert send_lag(late.requests) == pytest.approx(0.011)
    assert void_reasons(late, SLO(ttft=220.1)) == []
    assert void_reasons(late) == []
    (reason,) = void_reasons(late, SLO(ttft=200))
    assert "11.0 ms" in reason and "TTFT SLO" in reason
    late.frontend_cpu_share = 0.21
    assert len(void_reasons(late, SLO(ttft=200))) == 2


# ---------------------------------------------------------------- SLOs and goodput


def test_parse_slo() -> None:
    assert parse_slo(["ttft:200", "tpot:50"]) == SLO(ttft=200.0, tpot=50.0)
    assert parse_slo(["ttft:200 e2e:1e3 itl:5"]) == SLO(ttft=200.0, e2el=1000.0, itl=5.0)
    assert str(SLO(ttft=200.0, tpot=0.5)) == "ttft:200 tpot:0.5"
    for bad in (["ttft"], ["ttft:x"], ["tps:3"], ["ttft:-1"], ["ttft:inf"], ["ttft:nan"], ["ttft:1", "ttft:2"], []):
        with pytest.raises(ValueError, match="SLO"):
            parse_slo(bad)


def test_slo_is_met_by_all_limits() -> None:
    request = record(0, 1.0, 1.25, 1.5, 2.5)
    for name, seen in {"ttft": 250, "tpot": 625, "itl": 1000, "e2el": 1500}.items():
        assert SLO(**{name: float(seen)}).met_by(request)
        assert not SLO(**{name: seen - 0.1}).met_by(request)
    assert SLO(tpot=1.0, itl=1.0).met_by(record(0, 0.0, 9.0))
    assert attainment([request, record(1, 0.0, error="x"), record(2, 0.0, 0.1, rejected=True)], SLO(ttft=999)) == 1 / 3
    assert math.isnan(attainment([], SLO()))


def test_monotone_fit_pools_violators() -> None:
    fit = monotone_fit([Trial(4.0, 0.2), Trial(1.0, 0.9), Trial(2.0, 1.0), Trial(2.0, 0.8), Trial(3.0, 0.5)])
    assert [(t.rate, t.attainment) for t in fit] == [
        (1.0, pytest.approx(0.9)),
        (2.0, pytest.approx(0.9)),
        (3.0, 0.5),
        (4.0, 0.2),
    ]


def md1_met(rate: float, service: float = 0.1, limit: float = 0.3, n: int = 400, seed: int = 0) -> np.ndarray:
    """Which customers of an M/D/1 queue are done within the limit, as ones and zeros."""
    done, met = 0.0, []
    for arrival in arrival_times(n, rate, seed=seed):
        done = max(done, arrival) + service
        met.append(float(done - arrival <= limit))
    return np.array(met)


def md1_attainment(rate: float, seed: int | None = None) -> float:
    """Their share; without a seed, of a long run."""
    return float(md1_met(rate, n=40_000 if seed is None else 400, seed=seed or 0).mean())


def searched(run: Callable[[float], float], start: float, **options: Any) -> GoodputResult:
    """The search over a function that is certain of what it says."""

    async def attained(rate: float) -> tuple[float, float]:
        await asyncio.sleep(0)
        return run(rate), 0.0

    return asyncio.run(find_goodput(attained, start, **options))


@pytest.fixture(scope="module")
def md1_rate() -> float:
    low, high = 1.0, 10.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if md1_attainment(middle) >= 0.9 else (low, middle)
    return low


@pytest.mark.parametrize("start", [0.5, 6.0, 40.0])
def test_goodput_search_finds_the_md1_rate(md1_rate: float, start: float) -> None:
    found = searched(md1_attainment, start, tolerance=0.03)
    assert found.converged and found.attainment >= 0.9
    assert found.rate <= md1_rate * 1.001 <= found.upper <= found.rate * 1.0301 * 1.001


def test_goodput_search_survives_noise(md1_rate: float) -> None:
    for seed in range(8):
        runs = itertools.count(1 + 1000 * seed)
        found = searched(lambda rate, runs=runs: md1_attainment(rate, seed=next(runs)), 2.0)  # type: ignore[misc]
        assert found.rate == pytest.approx(md1_rate, rel=0.12)
        assert len(found.trials) <= 16


def test_goodput_search_ends() -> None:
    never = searched(lambda rate: 0.0, 8.0, max_runs=4)
    assert (never.rate, never.converged, [t.rate for t in never.trials]) == (0.0, False, [8.0, 4.0, 2.0, 1.0])
    refused = searched(lambda rate: 0.0, 128.0)  # at a rate of next to nothing a run takes for ever
    assert (refused.rate, refused.converged, refused.upper) == (0.0, False, 1.0)
    always = searched(lambda rate: 1.0, 8.0, max_runs=3)
    assert (always.rate, always.upper, always.converged) == (32.0, math.inf, False)
    seen: list[float] = []

    def lucky(rate: float) -> float:  # the first run at 8 passes by chance
        seen.append(rate)
        return 0.91 if seen == [8.0] else float(rate <= 6.0)

    assert searched(lucky, 8.0).rate == pytest.approx(6.0, rel=0.05)
    with pytest.raises(ValueError, match="goodput search"):
        searched(md1_attainment, 0.0)


def test_what_surely_holds_and_what_surely_fails() -> None:
    trials = [Trial(1.0, 1.0), Trial(2.0, 0.93, 0.03), Trial(2.1, 0.87, 0.03), Trial(4.0, 0.5, 0.05)]
    found = GoodputResult(2.0, 2.1, 0.93, 0.9, True, trials)
    assert found.sure == (1.0, 4.0)
    certain = GoodputResult(2.0, 2.1, 0.93, 0.9, True, [Trial(2.0, 0.93), Trial(2.1, 0.87)])
    assert certain.sure == (2.0, 2.1)
    noisy = [Trial(1.0, 1.0), Trial(2.0, 0.5), Trial(3.0, 1.0), Trial(4.0, 0.0)]  # 2 fails although 3 holds
    assert GoodputResult(1.0, 2.0, 1.0, 0.9, True, noisy).sure == (1.0, 4.0)
    assert GoodputResult(1.0, math.inf, 1.0, 0.9, False, [Trial(1.0, 0.95, 0.1)]).sure == (0.0, math.inf)


def test_a_few_that_all_met_prove_little() -> None:
    few, many = share_error(np.ones(9)), share_error(np.ones(300))
    assert 0.2 > few > 5 * many > 0
    clustered, spread = (share_error(np.array(met)) for met in ([0.0] * 30 + [1.0] * 270, ([0.0] + [1.0] * 9) * 30))
    assert clustered > 1.5 * spread


def md1_search(service: float, seed: int) -> GoodputResult:
    """A search as the bench makes it, each run with a workload of its own."""
    runs = itertools.count(100 * seed)

    async def attained(rate: float) -> tuple[float, float]:
        met = md1_met(rate, service, n=300, seed=next(runs))
        return float(met.mean()), share_error(met)

    return asyncio.run(find_goodput(attained, 2.0))


def test_a_goodput_of_equals_names_no_winner_and_a_real_one_is_found() -> None:
    wins = 0
    for seed in range(10):
        a, same, better = (md1_search(service, 3 * seed + i) for i, service in enumerate((0.1, 0.1, 0.06)))
        assert 0 < a.sure[0] <= a.rate < a.upper <= a.sure[1] < math.inf
        ratio, verdict = goodput_verdict({"x A": a, "x B": same}, [])
        wins += ratio.clear
        assert ratio.clear or verdict.startswith("No winner: no clear difference in goodput between x A and x B. x B /")
        ratio, verdict = goodput_verdict({"x": a, "y": better}, [])
        assert ratio.clear and verdict.startswith("y is better than x: goodput ")
        assert ratio.low > 1.0
    assert wins <= 1
    assert goodput_verdict({"x": a, "y": better}, ["x: late"])[1] == "Void, no verdict."
    nothing = GoodputResult(0.0, 1.0, 0.0, 0.9, False, [Trial(1.0, 0.0)])
    assert goodput_verdict({"x": nothing, "y": nothing}, [])[1].startswith("No winner")
    assert goodput_verdict({"x": nothing, "y": better}, [])[1].startswith("y is better than x: goodput inf")


# ---------------------------------------------------------------- intervals


def test_weights_are_whole_blocks() -> None:
    weights = block_weights(100, 50, np.random.default_rng(0))
    assert weights.shape == (50, 100) and (weights.sum(axis=1) == 100).all()
    changes = (np.diff(weights, axis=1) != 0).sum(axis=1)
    assert changes.max() <= 20  # ten blocks of ten have at most twenty ends
    assert weights.mean(axis=0) == pytest.approx(1.0, abs=0.6)


def test_resampled_statistics_are_exact() -> None:
    values, owner = np.array([5.0, 1.0, 3.0, 2.0]), np.array([0, 0, 1, 2])
    weights = np.array([[1, 1, 1], [2, 0, 1], [0, 0, 0]], dtype=np.float32)
    out = resampled(Sample(values, owner), weights)
    assert out[0].tolist() == [2.75, 2.0, 5.0, 5.0]
    assert out[1].tolist() == [pytest.approx(14 / 5), 2.0, 5.0, 5.0]  # 1 1 2 5 5
    assert np.isnan(out[2]).all()
    assert resampled(Sample(values, owner, seconds=2.0), weights)[:, 0].tolist() == [5.5, 7.0, 0.0]


def test_student_t() -> None:
    for degrees, point in {2: 4.303, 9: 2.262, 12: 2.179, 30: 2.042, 1000: 1.962}.items():
        assert student_t(degrees) == pytest.approx(point, abs=0.01)
    for degrees, point in {2: 6.965, 9: 2.821, 12: 2.681, 30: 2.457, 1000: 2.330}.items():
        assert student_t(degrees, clear=True) == pytest.approx(point, abs=0.01)


def synthetic(rng: np.random.Generator, factor: float, run_noise: float, shared: np.ndarray) -> Samples:
    """A run of one metric: bursts in common with the other side, noise correlated in time, and a slow machine."""
    noise = np.convolve(rng.normal(0, 0.4, len(shared) + 9), np.ones(10) / math.sqrt(10), "valid")
    values = factor * math.exp(rng.normal(0, run_noise)) * np.exp(shared + noise)
    schedule = [(i, float(i), 1, 1) for i in range(len(values))]
    return Samples(Window(0, len(values), 0.0, 1.0), schedule, {"ttft": Sample(values, np.arange(len(values)))})


@pytest.mark.parametrize("run_noise", [0.0, 0.15])
@pytest.mark.parametrize("repetitions", [3, 6])
def test_intervals_cover(repetitions: int, run_noise: float) -> None:
    covered, trials, names = 0, 80, ("mean_ttft", "p50_ttft", "p99_ttft")
    for trial in range(trials):
        rng = np.random.default_rng([trial, repetitions])
        a, b = [], []
        for _ in range(repetitions):
            shared = np.repeat(rng.normal(0, 0.5, 10), 10)
            a.append(synthetic(rng, 1.0, run_noise, shared))
            b.append(synthetic(rng, 1.3, run_noise, shared))
        found = compare(a, b, seed=trial, resamples=100)
        covered += sum(found[name].low <= 1.3 <= found[name].high for name in names)
    assert covered / (trials * len(names)) >= 0.925  # 95 % less two standard errors


def test_a_big_difference_is_found_and_one_repetition_is_cautious() -> None:
    rng = np.random.default_rng(0)
    shared = np.zeros(100)
    a, b = ([synthetic(rng, f, 0.03, shared) for _ in range(3)] for f in (1.0, 2.0))
    ratio = compare(a, b)["mean_ttft"]
    assert ratio.clear and 1.2 < ratio.low < 2.0 < ratio.high < 3.0
    assert ratio.ratio == pytest.approx(ratio.b / ratio.a)
    one = compare(a[:1], b[:1])["mean_ttft"]
    assert one.high / one.low > 2 * ratio.high / ratio.low
    with pytest.raises(ValueError, match="same number of repetitions"):
        compare(a, b[:2])


# ---------------------------------------------------------------- reports


def fake_run(label: str, seed: int, rng: random.Random, service: float = 0.1, stall: float = 0.0) -> RunRecord:
    """One queue in front of prefill, then tokens with now and then a stall; the machine is slow or fast as a whole."""
    slow, free, requests = math.exp(rng.gauss(0, 0.08)), 0.0, []
    for index, arrival in enumerate(arrival_times(60, 5.0, seed=seed)):
        free = max(free, arrival) + service * slow * rng.uniform(0.9, 1.1)
        times = [free]
        for _ in range(15):
            times.append(times[-1] + slow * (0.02 * rng.uniform(0.9, 1.1) + 0.2 * (rng.random() < stall)))
        stages = {"queue": 0.0, "prefill": free - arrival, "decode": times[-1] - free}
        requests.append(record(index, arrival, *times, stages=stages))
    return RunRecord(label=label, requests=requests, wall_s=15.0)


def test_of_long_rows_a_name_gives_way_and_no_number() -> None:
    run = fake_run("x", 0, random.Random(0))
    pair = {"source": "prefill-15", "dest": "decode-15", "kind": "simulated"}
    run.links = [LinkRecord(**pair, bytes=197 * 10**9, seconds=3.94, transfers=79_123)]  # type: ignore[arg-type]
    text = to_text(compare_runs([run]), width=80)
    row = next(line for line in text.splitlines() if "prefill-15" in line)
    assert row.split()[-7:] == ["simulated", "79,123", "197,000", "3.94", "50.0", "26.3%", "0"]
    assert "decode-15" in text and "…" not in text


def test_sides_that_decided_alike_are_named_together() -> None:
    marks = alike_marks([("a", "b"), ("c", "d"), ("b", "e"), ("a", "e")])
    assert marks == [
        f"{names} decided alike throughout: this load does not tell them apart" for names in ("a, b and e", "c and d")
    ]


def test_a_against_a_names_no_winner() -> None:
    winners = []
    for seed in range(10):
        rng = random.Random(seed)
        a, b = ([fake_run("disagg", 10 * seed + r, rng, stall=0.02) for r in range(3)] for _ in range(2))
        winners.append("No winner" not in compare_runs(a, b, SLO(ttft=300, tpot=30), resamples=200).verdict)
    assert sum(winners) <= 1


def test_identical_runs_are_equal() -> None:
    runs = [fake_run("sim", r, random.Random(r)) for r in range(3)]
    comparison = compare_runs(runs, runs, SLO(ttft=300), run_noise=0.0)
    assert comparison.verdict.startswith("No winner") and "sim A and sim B" in comparison.verdict
    assert not any(r.differs or r.clear for r in comparison.ratios.values())
    assert comparison.ratios["p99_itl"].ratio == 1.0


def to_text(comparison: Comparison, width: int = 100) -> str:
    """The report without colours."""
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(render(comparison))
    return console.export_text()


@pytest.fixture(scope="module")
def sides() -> tuple[list[RunRecord], list[RunRecord]]:
    rng = random.Random(0)
    a = [fake_run("colocated", r, rng, 0.02, stall=0.05) for r in range(3)]
    b = [fake_run("disagg", r, rng, 0.1) for r in range(3)]
    for run in b:
        run.workers = [
            WorkerRecord(
                name="p0", role="prefill", busy_s=7.5, flops=6e12, bytes_read=1e9, peak_flops=1e12, peak_bytes=1e9
            )
        ]
        run.links = [LinkRecord(source="p0", dest="d0", kind="shm", bytes=10**9, seconds=0.5, transfers=60)]
        for request in run.requests:
            request.handoffs = [0]
    return a, b


def test_split_verdict_and_tables(sides: tuple[list[RunRecord], list[RunRecord]]) -> None:
    comparison = compare_runs(*sides, SLO(ttft=300, tpot=30))
    verdict = comparison.verdict
    assert verdict.startswith("No overall winner, disagg against colocated: better p99 ITL 0.1")
    assert "but worse p90 TTFT" in verdict and "no clear difference in" in verdict
    for width in (80, 120):
        text = to_text(comparison, width)
        assert max(map(len, text.splitlines())) <= width
        for word in (
            "TTFT",
            "2nd token",
            "handoff gap",
            "max ITL",
            "p0 → d0",
            "Stages",
            "60 requests",
        ):
            assert word in text
        assert "87% bandwidth" in text and "…" not in text
    (usage,) = worker_usage(sides[1])
    assert [usage.busy, usage.compute, usage.bandwidth] == pytest.approx([0.5, 0.8, 1 / 7.5])
    assert "60 requests a run (< 300)" in comparison.marks


def test_void_run_has_no_verdict(sides: tuple[list[RunRecord], list[RunRecord]]) -> None:
    a, b = sides
    a[0].frontend_cpu_share = 0.5
    comparison = compare_runs(a, b)
    a[0].frontend_cpu_share = 0.0
    assert comparison.verdict.startswith("Void") and "0.1" not in comparison.verdict
    assert "void: colocated: the front end took 50% of a core" in to_text(comparison)


def test_verdict_wording() -> None:
    def ratio(value: float, clear: bool = True) -> Ratio:
        return Ratio(1.0, value, value, value * 0.9, value * 1.1, clear)

    def wording(*arguments: Any) -> str:
        return verdict_of(*arguments).replace(TIMES, "x")

    itl, ttft, rate = ratio(0.3), ratio(1.9), ratio(1.02, clear=False)
    both = {"p99_itl": itl, "p90_ttft": ttft, "output_throughput": rate}
    assert wording("colocated", "disagg", both) == (
        "No overall winner, disagg against colocated: better p99 ITL 0.30x [0.27, 0.33], "
        "but worse p90 TTFT 1.90x [1.71, 2.09]; no clear difference in throughput."
    )
    better = wording("colocated", "disagg", {"p99_itl": itl, "output_throughput": ratio(1.5)})
    assert better == "disagg is better than colocated: p99 ITL 0.30x [0.27, 0.33] and throughput 1.50x [1.35, 1.65]."
    assert wording("a", "b", {"output_throughput": ratio(0.5)}) == "b is worse than a: throughput 0.50x [0.45, 0.55]."
    none = wording("a", "b", {"p99_itl": rate, "output_throughput": rate})
    assert none == "No winner: no clear difference in p99 ITL and throughput between a and b."
    assert wording("a", "b", {}) == "No winner: nothing to compare between a and b."


def test_one_result_over_all_repetitions(sides: tuple[list[RunRecord], list[RunRecord]]) -> None:
    alone = compare_runs(sides[0], slo=SLO(ttft=300))
    one, each = to_dict(alone), alone.a.results
    assert one["repetitions"] == 3 and "repetition" not in one and one["label"] == "colocated"
    for key in ("completed", "num_prompts", "total_output_tokens", "duration", "wall"):
        assert one[key] == pytest.approx(sum(result[key] for result in each)), key  # type: ignore[misc]
    for key, name in (("p99_itl_ms", "p99_itl"), ("mean_ttft_ms", "mean_ttft"), ("median_tpot_ms", "p50_tpot")):
        assert one[key] == pytest.approx(alone.a.values[name] * 1000)  # as in the table
    assert one["output_throughput"] == pytest.approx(alone.a.values["output_throughput"])
    assert (one["seed"], one["slo"], one["burstiness"]) == (0, "ttft:300", 1.0)


def test_what_measuring_took_stands_beside_its_limits(sides: tuple[list[RunRecord], list[RunRecord]]) -> None:
    sides[1][2].frontend_cpu_share = 0.125
    text = to_text(compare_runs(*sides, SLO(ttft=300)))
    sides[1][2].frontend_cpu_share = 0.0
    assert "void above 20% of a core, or 5% of the TTFT SLO" in text
    assert "disagg: 12.5% of a core, p99 send lag 0.00 ms" in text


def test_one_side_alone_and_files(sides: tuple[list[RunRecord], list[RunRecord]], tmp_path: Path) -> None:
    alone = compare_runs(sides[1][:1], slo=SLO(ttft=300))
    assert alone.verdict.startswith("disagg: p90 TTFT ") and "within the SLO" in alone.verdict
    assert "B / A" not in to_text(alone)
    write_run_directory(tmp_path / "one", alone)
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["mean_ttft_ms"] == pytest.approx(alone.a.values["mean_ttft"] * 1000)
    both = compare_runs(*sides)
    path = write_run_directory(tmp_path / "two", both)
    result = json.loads((path / "result.json").read_text())
    assert set(result["sides"]) == {"colocated", "disagg"} and len(result["sides"]["disagg"]["repetitions"]) == 3
    assert result["ratios"]["p99_itl"]["high"] < 1 and result["verdict"] == both.verdict == to_dict(both)["verdict"]
    lines = (path / "requests.jsonl").read_text().splitlines()
    assert len(lines) == 360 and json.loads(lines[-1])["side"] == "B" and len(json.loads(lines[0])["token_times"]) == 16


def test_failed_requests_are_marked() -> None:
    run = fake_run("x", 0, random.Random(0))
    run.requests[30] = record(30, run.requests[30].scheduled, error="gone")
    assert "x: 1 of 60 requests failed, the first of them by: gone" in compare_runs([run]).marks
    run.requests[31] = record(31, run.requests[31].scheduled, error="full", rejected=True)
    assert "x: 1 of 60 requests were rejected" in compare_runs([run]).marks
    assert len(samples_of(run).metrics["ttft"].values) == 52  # 60, less 3 at each end, less those two


def test_a_run_in_which_everything_failed_still_reports() -> None:
    dead = RunRecord(label="dead", wall_s=2.0, requests=[record(i, 0.0, error="refused") for i in range(10)])
    alive = RunRecord(label="alive", requests=[record(i, 0.0, 1.0, 1.1) for i in range(10)])
    comparison = compare_runs([dead], [alive], SLO(ttft=5000))
    assert comparison.a.results[0]["failed"] == 10 and comparison.a.results[0]["slo_attainment"] == 0.0
    assert "dead: 10 of 10 requests failed, the first of them by: refused" in " ".join(to_text(comparison).split())
    assert comparison.verdict.startswith("alive is better than dead: goodput")
    assert "No winner" in compare_runs([dead], [dead], SLO(ttft=5000)).verdict

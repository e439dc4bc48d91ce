"""The bench as its users run it: real clusters of a tiny model, and all that a run leaves behind."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import needs_two_cores
from msgspec.structs import replace

from minidisagg.analysis import OF_RUN, load_run
from minidisagg.bench import runs, sides
from minidisagg.bench.compare import SEARCH
from minidisagg.bench.runs import quick_prompts
from minidisagg.bench.settings import BenchOptions
from minidisagg.cli import main
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.inputlog import read_entries, replay
from minidisagg.measure.settings import Trials
from minidisagg.policies import load_policy
from minidisagg.replay.records import find_records
from minidisagg.replay.steps import Run
from minidisagg.runtime.frontend import Frontend
from minidisagg.workload.settings import Arrivals

pytestmark = needs_two_cores
RECORDS = {"requests.jsonl", "steps.jsonl"}
FILES = {"options.json", "report.html", "result.json", "trace.json", "files", *RECORDS}
SHORT = "dummy:tiny,std=0.15", "--num-warmups", "2", "--goodput", "ttft:2000", "tpot:500", "--link", "unix"
LENGTHS = "--random-input-len", "24", "--random-output-len", "4"  # where the data set has none of its own


class Done:
    """What came of one command."""

    def __init__(self, out: str, directory: Path) -> None:
        self.out = out
        self.flat = " ".join(out.split())  # as if the terminal were wide
        self.directory = directory
        self.result: dict[str, Any] = json.loads((directory / "result.json").read_bytes())
        self.options: dict[str, Any] = json.loads((directory / "options.json").read_bytes())
        self.files = {path.name for path in directory.iterdir()}

    def requests(self, name: str = "requests.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs `minidisagg bench` on the tiny model in this process, to its end."""
    monkeypatch.delenv("MINIDISAGG_DEBUG", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            lengths = () if "--dataset-name" in args else LENGTHS
            main(["bench", *SHORT, *lengths, "--result-dir", str(tmp_path), *args])
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        (directory,) = tmp_path.iterdir()
        return Done(captured.out, directory)

    yield run
    signal.signal(signal.SIGTERM, before)


Bench = Callable[..., Done]


def test_both_modes(bench: Bench) -> None:
    done = bench("--request-rate", "60", "--num-prompts", "24", "--repeats", "1", "--record")
    for part in (
        "unloaded, disagg under fcfs: prefill", "SLO ttft:2000 tpot:500", "Latency (ms) and throughput", "2nd token",
        "handoff gap", "Stages of a request", "KV on the wire", "void above 20% of a core, or 5% of the TTFT SLO",
        "24 requests a run (< 300)", "1 repetition (< 3)",
    ):  # fmt: skip
        assert part in done.flat, part
    assert done.files == FILES | {"record"}
    runs = {run.name: Run(run, "") for run in find_records(done.directory)}
    assert {name[0] for name in runs} == {"A", "B"} and len(runs) == 3  # and the calibration
    for run in runs.values():
        assert [lane.name for lane in run.lanes] == ["router", "worker-0", "worker-1"][: len(run.lanes)]
        assert run.summary()[0].endswith("all as recorded") and len(run.lanes) > 1
    result = done.result
    assert result["verdict"] in done.flat
    assert result["void"] or "colocated" in result["verdict"]
    assert set(result["sides"]) == {"colocated", "disagg"} and "mean_ttft_ms" not in result
    for side in result["sides"].values():
        (one,) = side["repetitions"]
        assert one["failed"] == one["rejected"] == 0 and one["num_prompts"] == 24
        assert {"p99_itl_ms", "median_ttft_ms", "mean_stage_queue_ms", "output_throughput"} <= one.keys()
    assert result["ratios"]["p99_itl"]["low"] <= result["ratios"]["p99_itl"]["high"]
    requests = done.requests()
    assert [(r["side"], len(r["token_times"])) for r in requests] == [("A", 4)] * 24 + [("B", 4)] * 24
    assert {tuple(r["workers"]) for r in requests if r["side"] == "B"} == {("worker-0", "worker-1")}
    assert {tuple(r["workers"]) for r in requests if r["side"] == "A"} == {("worker-0",), ("worker-1",)}
    assert done.options["command"] and done.options["machine"]["cpu"]
    assert "one set of workers is each side in turn: worker-0, worker-1 …" in done.flat
    assert done.options["workers"] == "one set"
    used = {label: [(w["name"], w["role"]) for w in side["workers"]] for label, side in result["sides"].items()}
    assert used["colocated"] == [("worker-0", "both"), ("worker-1", "both")]
    assert used["disagg"] == [("worker-0", "prefill"), ("worker-1", "decode")]
    events = json.loads((done.directory / "trace.json").read_text())["traceEvents"]
    labels = {tuple(event["args"].values()) for event in events if event["ph"] == "M"}
    assert {("disagg worker-0",), ("prefill",), ("colocated worker-1",), ("both",)} <= labels
    report = (done.directory / "report.html").read_text()
    assert result["verdict"] in report and "disagg worker-1, decode: time of a step" in report


def test_a_control_calibrates_under_fcfs_whatever_its_policy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told, change = [], Frontend.reconfigure

    async def reconfigure(self: Frontend, cluster: ClusterSettings, run: RunSettings) -> None:
        told.append(cluster.policy)
        await change(self, cluster, run)

    monkeypatch.setattr(Frontend, "reconfigure", reconfigure)
    sarathi = "sarathi:chunk=16"
    done = bench("--mode", "colocated", "--policy", sarathi, "--against", "colocated", "--request-rate", "0.2x",
                 "--preset", "quick", "--num-prompts", "21", "--repeats", "1", "--json")  # fmt: skip
    assert told == ["fcfs", sarathi, sarathi]  # each run begins as after a start
    result = json.loads(done.out)
    assert result == done.result
    assert set(result["sides"]) == {f"colocated {sarathi} A", f"colocated {sarathi} B"}
    assert f"colocated {sarathi} A and colocated {sarathi} B" in result["verdict"] or result["void"]
    assert "quick preset, not for publication" in result["marks"]
    assert done.options["workload"]["num_prompts"] == 21  # what is asked for wins over the preset
    assert len(done.requests()) == 42 and done.files == FILES


MINE = """
from minidisagg import Policy


class Mine(Policy):
    pass
"""


def test_one_mode_alone_over_its_repetitions_and_a_trace_and_again(
    bench: Bench, tmp_path_factory: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path_factory.mktemp("trace") / "trace.csv"
    mine, logs, again = (trace.with_name(name) for name in ("mine.py", "logs", "again"))
    mine.write_text(MINE)
    rows = [f"{0.01 * i},{0 if i == 5 else 4000 if i == 6 else 20},4" for i in range(31)]
    trace.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    done = bench("--mode", "disagg", "--repeats", "2", "--dataset-name", "azure", "--dataset-path", str(trace),
                 "--num-prompts", "30", "--seed", "7", "--policy", f"{mine}:Mine", "--record", str(logs),
                 "--log-decisions", str(logs))  # fmt: skip
    assert done.flat.count("30 requests over 0.3 s, 1 skipped, 1 clamped") == 1
    result, each = done.result, done.result["sides"]["disagg Mine"]["repetitions"]
    assert [one["repetition"] for one in each] == [0, 1] and result["repetitions"] == 2
    assert result["num_prompts"] == 60 and result["completed"] == sum(one["completed"] for one in each)
    assert min(one["p90_ttft_ms"] for one in each) <= result["p90_ttft_ms"] <= max(one["p90_ttft_ms"] for one in each)
    assert result["verdict"] in done.flat and result["request_rate"] == "trace"
    # Again, up to where the measuring begins: `tests/test_rerun.py` has the rest.
    asked: list[BenchOptions] = []

    def run(options: BenchOptions, api_key: str) -> int:
        asked.append(options)
        shutil.copytree(done.directory, Path(options.report.directory) / options.report.name)
        return 0

    monkeypatch.setattr("minidisagg.bench.compare.run", run)
    mine.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["rerun", str(done.directory), "--out", str(again)])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and f"{mine} is gone: the copy of then is used" in out
    rows = [line.split() for line in out.splitlines()]
    assert any(row[-5:-3] == ["TPOT,", "ms"] and row[-3] == row[-2] and row[-1] == "1.00" for row in rows)
    [options] = asked
    assert options.sides[0].policy == f"{done.directory}/files/mine.py:Mine" and options.sides[0].mode == "disagg"
    assert (options.workload.dataset_path, options.workload.num_prompts, options.run.seed) == (str(trace), 30, 7)
    assert (options.run.decision_dir, options.run.record_dir) == (f"{again}/decisions", f"{again}/record")
    assert (options.model.model, options.trials.repeats) == ("dummy:tiny,std=0.15", 2)


def test_a_search_for_goodput(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCH, "quick", {"max_runs": 3, "tolerance": 0.5})
    done = bench("--find-goodput", "--preset", "quick", "--num-prompts", "24", "--request-rate", "200",
                 "--goodput", "e2el:60")  # fmt: skip
    result = done.result
    assert set(result["goodput"]) == {"0: colocated", "1: disagg"}
    for key, one in result["goodput"].items():
        label, trials = key.partition(": ")[2], one["trials"]
        assert 1 <= len(trials) <= 3 and all(0 <= trial["attainment"] <= 1 for trial in trials)
        assert all(trial["error"] > 0 for trial in trials)
        for number, trial in enumerate(trials, 1):
            told = f"{label} run {number} of at most 3, {trial['rate']:.2f} req/s: {trial['attainment']:.1%} within"
            assert told in done.flat
    # Warm-up and drain are left out; of the least number of requests, 24, two at each end.
    first = result["goodput"]["1: disagg"]["trials"][0]
    asked = max(24, math.ceil(first["rate"] * 10 * 0.060))  # a run lasts ten times the limit on E2E
    met = first["attainment"] * (asked - 2 * math.ceil(0.05 * asked))
    assert met == pytest.approx(round(met))
    assert result["verdict"] in done.flat and "quick preset, not for publication" in done.flat
    assert result["slo"] == "ttft:2000 tpot:500 e2el:60"
    ratio = result["ratio"]
    assert ratio["clear"] == (ratio["low"] > 1 or (ratio["high"] or 2) < 1)  # JSON has no infinity
    assert result["void"] or ratio["clear"] or result["verdict"].startswith("No winner")
    assert done.files == FILES - RECORDS
    run = load_run(done.directory)
    assert not any(len(getattr(run, name)) for name in ("requests", "steps", "links", "decisions"))
    assert list(run.requests)[:4] == list(OF_RUN) == list(run.links)[:4] and run.result == result


def test_a_sweep_of_concurrencies(bench: Bench) -> None:
    done = bench("--mode", "disagg", "--max-concurrency", "1,2", "--num-prompts", "20", "--repeats", "1")
    assert done.result["version"] == 2 and set(done.result["sweep"]) == {"1", "2"}
    for users, one in done.result["sweep"].items():
        assert f"{users} at a time: {one['verdict']}" in done.flat
        assert len(done.requests(f"concurrency-{users}/requests.jsonl")) == 20
        assert one["sides"]["disagg"]["repetitions"][0]["max_concurrency"] == int(users)
    assert "20 requests a run (< 300)" in done.flat
    assert done.files == (FILES | {"concurrency-1", "concurrency-2"}) - RECORDS
    run = load_run(done.directory)
    for frame in (run.requests, run.steps, run.links):
        assert sorted(set(frame.concurrency)) == [1, 2] and set(frame.side) == {"A"}
    assert run.requests.groupby("concurrency").size().to_dict() == {1: 20, 2: 20}


def test_the_quick_preset_asks_for_what_the_rate_can_fill() -> None:
    def options(**more: Any) -> BenchOptions:
        trials, arrivals = Trials(preset="quick", **more), Arrivals()
        fields: dict[str, Any] = dict.fromkeys(("model", "sides", "run", "workload", "report"))
        return BenchOptions(**fields, arrivals=arrivals, trials=trials)

    assert [quick_prompts(options(), rate) for rate in (0.1, 2.5, 50.0, float("inf"), float("nan"))] == [
        14, 32, 60, 40, 40,
    ]  # fmt: skip
    assert quick_prompts(options(find_goodput=True), 0.1) == 40


# ---------------------------------------------------------------- the workers behind the sides


def test_both_sides_records_replay(bench: Bench, tmp_path_factory: Any) -> None:
    logs = tmp_path_factory.mktemp("logs")
    done = bench("--request-rate", "60", "--num-prompts", "20", "--repeats", "2", "--record", str(logs),
                 "--log-decisions", str(logs), "--baseline", "chunk=16,max_num_seqs=4")  # fmt: skip
    assert "chunk=16" in done.flat and done.options["workers"] == "one set"
    assert set(done.result["sides"]) == {"colocated max_num_seqs=4 chunk=16", "disagg max_num_seqs=32 chunk=0"}
    roles: dict[str, set[tuple[str, str, int]]] = {"A": set(), "B": set()}
    for side, seen in roles.items():
        paths = sorted((logs / side).glob("worker-*.inputs"))
        assert len(paths) == 4 + 2 * (side == "B")  # two workers, two repetitions, and the calibration
        for path in paths:
            with path.open("rb") as log:
                plans = list(replay(log, load_policy))
            assert all(recorded == replayed for recorded, replayed in plans)
            assert sum(recorded is not None for recorded, _ in plans) > 5, path
            with path.open("rb") as log:
                spec = read_entries(log)[0]
            seen.add((spec.name, spec.role.name, spec.options.chunk))
        for repetition in ("0", "1"):
            assert {path.name for path in (logs / side / repetition).glob("*.jsonl")} == {
                "router.jsonl", "worker-0.jsonl", "worker-1.jsonl",
            }  # fmt: skip
    check_frames(done)
    assert roles["A"] == {("worker-0", "BOTH", 16), ("worker-1", "BOTH", 16)}
    assert roles["B"] == {("worker-0", "PREFILL", 0), ("worker-1", "DECODE", 0)}


def check_frames(done: Done) -> None:
    """What `load_run` reads of two sides and two repetitions with decisions: all that was there, in one coordinate."""
    run = load_run(done.directory)
    each = [(side, repetition) for side in "AB" for repetition in (0, 1)]
    for frame in (run.requests, run.steps, run.decisions):
        assert sorted(set(zip(frame.side, frame.repetition, strict=True))) == each and frame.concurrency.isna().all()
    assert run.requests.groupby(["side", "repetition"]).size().tolist() == [20] * 4
    assert set(zip(run.links.side, run.links.source, run.links.dest, strict=True)) == {("B", "worker-0", "worker-1")}
    assert run.links.transfers.tolist() == [20, 20] and (run.links.bytes > 0).all()
    # Steps and decisions name requests as the engine does, and are on their clock.
    asked = run.decisions[run.decisions.hook == "place"].merge(run.requests, on=[*OF_RUN, "engine_id"])
    assert len(asked) == 80 and ((asked.clock - asked.sent).abs() < 0.1).all()
    tokens = run.steps.explode("requests").rename(columns={"requests": "engine_id"}).merge(run.requests, on="engine_id")
    assert len(tokens) == run.requests.tokens.sum() == 80 * 4
    assert (tokens.begin > tokens.sent).all() and (tokens.end < tokens.scheduled + tokens.e2el + 0.05).all()
    assert run.steps.groupby("side").prefill_tokens.sum().tolist() == [40 * 24] * 2
    for record in (record for side in done.result["sides"].values() for record in side["runs"]):
        own = run.steps[(run.steps.label == record["label"]) & (run.steps.repetition == record["repetition"])]
        assert own.seconds.sum() == pytest.approx(sum(worker["busy_s"] for worker in record["workers"]), rel=1e-6)


def test_sides_whose_workers_are_built_differently_have_a_set_each(bench: Bench) -> None:
    done = bench("--mode", "colocated", "--against", "colocated", "--baseline", "dtype=float64",
                 "--prefill-workers", "1", "--decode-workers", "0", "--request-rate", "60", "--num-prompts", "20",
                 "--repeats", "1")  # fmt: skip
    assert "workers of different kinds, a set for each side: worker-0 + worker-0 …" in done.flat
    assert done.options["workers"] == "side by side"
    assert set(done.result["sides"]) == {"colocated dtype=float64", "colocated dtype=auto"}
    assert [len(side["repetitions"]) for side in done.result["sides"].values()] == [1, 1]


@pytest.mark.slow
def test_what_one_device_cannot_hold_takes_turns(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    logs, up, most = tmp_path_factory.mktemp("logs"), set[Frontend](), [0]
    start, stop = Frontend.start, Frontend.stop

    async def started(*args: Any, **options: Any) -> Frontend:
        up.add(frontend := await start(*args, **options))
        most.append(len(up))
        return frontend

    async def stopped(self: Frontend) -> None:
        up.discard(self)
        await stop(self)

    monkeypatch.setattr(sides, "arrangement", lambda *_: "in turn")
    monkeypatch.setattr(Frontend, "start", started)
    monkeypatch.setattr(Frontend, "stop", stopped)
    done = bench("--mode", "both", "--request-rate", "60", "--num-prompts", "20", "--repeats", "2", "--record",
                 str(logs))  # fmt: skip
    assert "of which one device holds one set at a time: worker-0, worker-1 + prefill-0, decode-0" in done.flat
    assert done.options["workers"] == "in turn"
    assert max(most) == 1 and len(most) == 1 + 4  # A for its limits, B for the calibration, A's runs, B's runs
    assert [len(list((logs / side).rglob("worker-0.*.inputs"))) for side in "AB"] == [3, 0]
    assert {tuple(r["workers"]) for r in done.requests() if r["side"] == "B"} == {("prefill-0", "decode-0")}


def test_who_shares_workers_and_who_has_room_beside_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    def cluster(mode: Any = "colocated", **settings: Any) -> ClusterSettings:
        worker = WorkerSettings(**settings)
        return ClusterSettings(mode=mode, prefill=worker, decode=worker)

    model, base = ModelSettings(model="dummy:tiny"), cluster()
    for other in (cluster("disagg"), cluster(max_num_seqs=3, max_num_batched_tokens=64, chunk=16)):
        assert sides.arrangement(model, [base, other]) == "one set"
    assert sides.arrangement(model, [base]) == "one set"
    for other in (cluster(dtype="float32"), cluster(kv_cache_memory=1 << 20), replace(base, link="shm")):
        assert sides.arrangement(model, [base, other]) == "side by side"  # on CPUs there is always room

    gib = 1 << 30
    one, two = cluster(device="cuda", kv_cache_memory=8 * gib), cluster(device="cuda:0", kv_cache_memory=9 * gib)
    need = (sides.memory_on_gpus(model, one, [80 * gib]) + sides.memory_on_gpus(model, two, [80 * gib]))[0]
    assert 34 * gib + 4 * sides.OVERHEAD < need < 35 * gib + 4 * sides.OVERHEAD
    for memory, how in ((need, "side by side"), (need - 1, "in turn")):
        monkeypatch.setattr(sides, "gpu_sizes", lambda memory=memory: [memory])
        assert sides.arrangement(model, [one, two]) == how
    assert set(sides.memory_on_gpus(model, one, [80 * gib] * 4)) == {0, 1}  # one GPU after the other
    monkeypatch.setattr(sides, "gpu_sizes", lambda: [80 * gib] * 2)
    assert sides.arrangement(model, [one, cluster(device="cuda")]) == "in turn"  # who is not told takes all
    monkeypatch.setattr(sides, "gpu_sizes", lambda: [])
    with pytest.raises(ValueError, match="'cuda:0' is asked for, and torch sees 0 GPUs"):
        sides.arrangement(model, [two, cluster(device="cuda:0", dtype="float32")])
    monkeypatch.setattr(sides, "gpu_sizes", lambda: [need - 1])
    workers, _ = sides.make_workers(model, [one, two])
    assert workers[0].rivals == [workers[1]] and workers[1].rivals == [workers[0]]
    assert sides.labels([one, two]) == [
        f"colocated device=cuda kv_cache_memory={8 * gib}", f"colocated device=cuda:0 kv_cache_memory={9 * gib}",
    ]  # fmt: skip
    assert sides.labels([base, cluster("disagg")]) == ["colocated", "disagg"]


def test_a_planted_slowdown_is_of_side_b_and_is_told(bench: Bench) -> None:
    done = bench("--mode", "colocated", "--against", "colocated", "--request-rate", "30", "--num-prompts", "40",
                 "--repeats", "2", "--plant-slowdown", "150%", "--random-output-len", "16")  # fmt: skip
    assert "B is slowed down by 150% on purpose" in done.result["marks"]
    assert done.result["ratios"]["mean_tpot"]["ratio"] > 1.3, done.result["ratios"]["mean_tpot"]


def test_the_quick_preset_shortens_what_a_slow_machine_would_take_too_long_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "QUICK_SECONDS", 0.02)  # in which no machine gets far
    monkeypatch.setattr(runs, "QUICK_PROMPTS", (20, 24))
    args = ("--mode", "colocated", "--preset", "quick", "--repeats", "1")
    monkeypatch.setattr("test_bench.LENGTHS", ())
    done = bench(*args)
    assert "a slow machine for the quick preset: random 64 in, 16 out" in done.flat
    assert (done.options["workload"]["input_len"], done.options["workload"]["output_len"]) == (64, 16)
    assert {(r["prompt_len"], len(r["token_times"])) for r in done.requests()} == {(64, 16)}


NOSY = """
from minidisagg import Policy

class Nosy(Policy):
    def place(self, request, cluster):
        seen = request.max_tokens, request.predicted_len, request.slo_ttft, request.slo_tpot
        if request.slo_ttft is not None:  # else it calibrates or warms up
            with open(__file__ + ".seen", "a") as file:
                print(*seen, file=file)
        return super().place(request, cluster)
"""


def test_any_number_of_sides_and_what_their_policies_see(bench: Bench, tmp_path_factory: Any) -> None:
    mine = tmp_path_factory.mktemp("mine") / "mine.py"
    mine.write_text(NOSY)
    sides = f"colocated,disagg:sarathi:chunk=16,{mine}:Nosy"
    done = bench(
        "--compare", sides, "--request-rate", "60", "--num-prompts", "20", "--repeats", "1",
        "--random-range-ratio", "0.9", "--predict-lengths", "oracle",
    )  # fmt: skip
    assert "one set of workers is each side in turn: worker-0, worker-1" in done.flat
    assert [side["label"] for side in done.result["contest"]] == [
        "colocated", "disagg sarathi:chunk=16", "disagg Nosy",
    ]  # fmt: skip
    assert done.result["verdict"] in done.flat and len(done.result["ratios"]) == 2
    assert "oracle: the policies knew how long each output would be" in done.flat
    assert load_run(done.directory).requests.groupby(["side", "label"]).size().to_dict() == {
        ("A", "colocated"): 20, ("B", "disagg sarathi:chunk=16"): 20, ("C", "disagg Nosy"): 20,
    }  # fmt: skip
    lines = done.requests()
    assert [sum(line["side"] == letter for line in lines) for letter in "ABC"] == [20, 20, 20]
    assert all(line["finish_reason"] == "length" and len(line["token_times"]) == line["output_len"] for line in lines)
    seen = [line.split() for line in Path(f"{mine}.seen").read_text().splitlines()]
    lengths = sorted(line["output_len"] for line in lines if line["side"] == "C")
    measured = [line for line in seen if line[0] == str(max(lengths))]  # one limit for all; warm-up has its own
    assert sorted(int(predicted) for _, predicted, _, _ in measured) == lengths and len(set(lengths)) > 1
    assert all(slo == ["2.0", "0.5"] for _, _, *slo in seen)


@pytest.mark.parametrize(("policy", "told"), [("sarathi:chunk=4096", True), ("sarathi:chunk=8", False)])
def test_sides_that_decided_alike_are_told_where_the_runs_are_recorded(bench: Bench, policy: str, told: bool) -> None:
    alike = "decided alike throughout: this load does not tell them apart"
    done = bench("--mode", "disagg", "--against", f"disagg:{policy}", "--record", "--num-prompts", "20",
                 "--repeats", "1", "--request-rate", "60")  # fmt: skip
    assert (alike in done.flat) is told and any(alike in mark for mark in done.result["marks"]) is told

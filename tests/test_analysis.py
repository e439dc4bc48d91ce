"""Run directories as frames: nothing of a simulation is lost or changed on the way, and the tables come out again.

`tests/test_bench.py` reads those of real runs.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from minidisagg.analysis import OF_RUN, load_run
from minidisagg.cli import cli
from minidisagg.formats import VersionError
from minidisagg.measure.timeline import read_timeline


def simulated(out: Path, *args: str) -> Path:
    cli.main(["simulate", "--result-dir", str(out), "--num-prompts", "40", *args], standalone_mode=False)
    [directory] = out.iterdir()
    return directory


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run directory, and its decisions."""
    out, log = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("log") / "decisions"
    sides = "colocated:sarathi:chunk=256,disagg"
    return simulated(out, "--repeats", "2", "--compare", sides, "--log-decisions", str(log), "-j", "2"), log


def test_the_tables_come_out_again(two_sides: tuple[Path, Path]) -> None:
    run = load_run(two_sides[0])
    assert run.options["trials"]["repeats"] == 2 and len(run.requests) == 2 * 2 * 40
    for (_, label, repetition), own in run.requests.groupby(["side", "label", "repetition"]):
        kept, told = own[own.measured], run.result["sides"][label]["repetitions"][repetition]
        for name in ("ttft", "ttst", "tpot", "max_itl", "e2el"):
            assert kept[name].mean() * 1e3 == pytest.approx(told[f"mean_{name}_ms"]), name
        assert kept.decode.quantile(0.9) * 1e3 == pytest.approx(told["p90_stage_decode_ms"])
        assert (len(kept), own.tokens.sum()) == (told["measured"], own.output_len.sum())
    stages = run.requests[["queue", "prefill", "transfer", "decode_wait", "decode"]]
    assert stages.sum(axis=1).tolist() == pytest.approx(run.requests.e2el.tolist())


def test_every_step_is_a_row_even_of_those_that_were_taken_at_once(two_sides: tuple[Path, Path]) -> None:
    run = load_run(two_sides[0])
    lines = (two_sides[0] / "steps.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 0.9 * len(run.steps), "none was taken at once"
    assert (run.steps.end > run.steps.begin).all() and (run.steps.seconds > 0).all()
    assert run.steps[run.steps.kind == "decode"].prefill_tokens.eq(0).all()
    for side in run.result["sides"].values():
        for record in side["runs"]:
            own = run.steps[(run.steps.label == record["label"]) & (run.steps.repetition == record["repetition"])]
            for worker in record["workers"]:
                mine = own[own.worker == worker["name"]].sort_values("begin")
                assert mine.seconds.sum() == pytest.approx(worker["busy_s"])
                assert (mine.begin[1:].to_numpy() >= mine.end[:-1].to_numpy() - 1e-9).all(), "two at a time"
    # Each request is in as many steps as it has tokens, and its tokens are there when those end.
    told = run.steps.explode("requests").rename(columns={"requests": "engine_id"}).merge(
        run.requests, on=[*OF_RUN, "engine_id"]
    )  # fmt: skip
    counts = told.groupby([*OF_RUN[:2], "repetition", "engine_id"]).size()
    assert counts.sum() == run.requests.tokens.sum() and len(counts) == len(run.requests)
    assert told.groupby(["side", "repetition", "engine_id"]).end.max().tolist() == pytest.approx(
        [times[-1] for times in run.requests.sort_values(["side", "repetition", "engine_id"]).token_times]
    )
    # Of decode steps at once each reads one token more of each of its sequences.
    decode = run.steps[(run.steps.side == "B") & (run.steps.kind == "decode") & (run.steps.repetition == 0)]
    one = decode[decode.requests.map(lambda names: names == [decode.requests.iloc[0][0]])].context_tokens
    assert (one.diff()[1:] == 1).mean() > 0.9


def test_steps_are_those_of_the_timeline(two_sides: tuple[Path, Path]) -> None:
    run, events = load_run(two_sides[0]), read_timeline(two_sides[0] / "trace.json")
    drawn = sum(event["dur"] for event in events if event.get("cat") == "step")
    first = run.steps[run.steps.repetition == 0]
    assert first.seconds.sum() == pytest.approx(drawn / 1e6)


def test_links_and_decisions(two_sides: tuple[Path, Path]) -> None:
    directory, log = two_sides
    run = load_run(directory)
    assert run.links[["side", "repetition", "source", "dest"]].to_numpy().tolist() == [
        ["B", 0, "prefill-0", "decode-0"], ["B", 1, "prefill-0", "decode-0"],
    ]  # fmt: skip
    lines = [path.read_text().count("\n") for path in log.rglob("*.jsonl")]
    assert len(lines) == 12 and sum(lines) == len(run.decisions)
    placed = run.decisions[run.decisions.hook == "place"].merge(run.requests, on=[*OF_RUN, "engine_id"])
    assert len(placed) == 160 and (placed.clock == placed.sent).all()
    assert [answer["prefill"] for answer in placed.answer] == [workers[0] for workers in placed.workers]
    assert {"request", "cluster"} <= set(placed.asked[0]) and not {"answer", "version"} & set(placed.asked[0])
    composed = run.decisions[(run.decisions.hook == "compose") & (run.decisions.side == "A")]
    assert max(count for answer in composed.answer for _, _, count in answer) == 256


def test_decisions_change_nothing_and_are_found_where_they_were_moved(
    two_sides: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, log = two_sides
    same = simulated(tmp_path / "same", "--repeats", "2", "--compare", "colocated:sarathi:chunk=256,disagg")
    assert (same / "requests.jsonl").read_bytes() == (directory / "requests.jsonl").read_bytes()
    assert (same / "steps.jsonl").read_bytes() == (directory / "steps.jsonl").read_bytes()
    moved = tmp_path / "moved"
    with warnings.catch_warnings(record=True):
        assert len(load_run(same).decisions) == 0
    assert len(load_run(same, decisions=log).decisions) == len(load_run(directory).decisions) > 0
    with pytest.warns(UserWarning, match=rf"the decisions are not in {moved} any more: say where"):
        load_run(directory, decisions=moved)
    with pytest.raises(ValueError, match="has the decisions of an earlier run"):
        simulated(tmp_path / "again", "--policy", "fcfs", "--log-decisions", str(log / "A"))
    with pytest.raises(ValueError, match="--find-goodput keeps none"):
        simulated(tmp_path / "search", "--find-goodput", "--log-decisions", str(moved))


def test_a_sweep(tmp_path: Path) -> None:
    log = tmp_path / "log"
    swept = load_run(simulated(tmp_path / "a", "--max-concurrency", "1,4", "--dataset-name", "random",
                               "--policy", "fcfs", "--log-decisions", str(log)))  # fmt: skip
    assert swept.requests.groupby("concurrency").size().to_dict() == {1: 40, 4: 40}
    for frame in (swept.steps, swept.links, swept.decisions):
        assert sorted(set(frame.concurrency)) == [1, 4]


def test_what_is_no_run_directory_is_one_line(two_sides: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: there is no .*options\.json"):
        load_run(tmp_path)
    (tmp_path / "options.json").write_text('{"version": 2}')
    (tmp_path / "result.json").write_text('{"version": 2, "goodput": {"a": {}}}')
    with pytest.raises(ValueError, match="not a run directory of this version") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "options.json").write_text('{"version": 1}')
    with pytest.raises(VersionError, match="has version 1, and this minidisagg reads version 2"):
        load_run(tmp_path)


def test_without_pandas_it_says_which_extra() -> None:
    code = "import sys; sys.modules['pandas'] = None; import minidisagg.analysis"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = "ImportError: minidisagg.analysis needs pandas: pip install -e '.[analysis]'"
    assert done.stderr.splitlines()[-1] == said and "During handling" not in done.stderr

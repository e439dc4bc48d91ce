"""`minidisagg league`: who plays, under which rates, who shares a place, and what a stopped command leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click import Abort
from msgspec.structs import replace

from minidisagg.cli import cli
from minidisagg.measure.goodput import SLO
from minidisagg.measure.intervals import Drawn, ratio_of_shares
from minidisagg.measure.standings import mean_of, standings
from minidisagg.policies import load_policy, names
from minidisagg.sim import league
from minidisagg.sim.league import Games, LeagueOptions, ideal_rate, key_of, line_up, parse_workload
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.profile import load_profile
from minidisagg.workload.lengths import WorkItem, random_items

DISAGG = ClusterSpec(groups=parse_cluster("prefill=1@h100,decode=1@h100"), page_size=512)


def command(out: Path, *args: str) -> dict[str, Any]:
    """Two policies in both modes, two workloads, one load; league.json."""
    small = ["--cluster", "prefill=1@h100,decode=1@h100", "--num-prompts", "30", "--loads", "0.9", "--repeats", "2"]
    what = ["--policies", "fcfs,sarathi:chunk=300", "--workload", "synth:azure-conv-2023", "--workload", "random"]
    cli.main(["league", "--out", str(out), *what, *small, *args], standalone_mode=False)
    found: dict[str, Any] = json.loads((out / "league.json").read_text())
    return found


# ---------------------------------------------------------------- who plays


def test_everybody_plays_where_the_rule_means_something() -> None:
    labels = [side.label for side in line_up(DISAGG, "", [])]
    expected = [
        f"{mode} {name}" for name in names() for mode in ("colocated", "disagg") if load_policy(name).only in ("", mode)
    ]
    assert [label.replace(":chunk=512", "") for label in labels] == expected
    assert "disagg arrow" in labels and "colocated arrow" not in labels
    assert "colocated eb_plus" in labels and "disagg eb_plus" not in labels
    alone = line_up(ClusterSpec(groups=parse_cluster("both=2@h100")), "", [])
    assert alone and all(side.label.startswith("colocated ") for side in alone)


def test_a_mode_that_is_named_is_played_and_settings_are_the_slo() -> None:
    sides = line_up(DISAGG, "colocated:arrow,disagg", ["disagg:polyserve:tiers={tpot},ttft={ttft}"])
    assert [(side.label, side.cluster.mode) for side in sides] == [
        ("colocated arrow", "colocated"), ("disagg fcfs", "disagg"), ("disagg polyserve", "disagg"),
    ]  # fmt: skip
    options = LeagueOptions(
        sides=sides, workloads=(parse_workload("random", 30),), loads=(0.5,), repeats=1, slo=SLO(ttft=300, tpot=20),
        out="nowhere",
    )  # fmt: skip
    assert Games(options).runs[0, 0, 2].side.policy == "polyserve:tiers=0.02,ttft=0.3"
    with pytest.raises(ValueError, match="of which --goodput says nothing"):
        Games(replace(options, slo=SLO(ttft=300)))


# ---------------------------------------------------------------- rates


def test_the_ideal_rate_is_what_the_devices_do_when_none_waits() -> None:
    profile, both = load_profile("h100_sxm", "llama-8b"), ClusterSpec(groups=parse_cluster("both=3@h100"))
    items = random_items(4, 2000, 101)
    prompt, context = profile.step_seconds([(0, 2000)], 0, 0), 2000 + 101 / 2
    [tpot] = [profile.step_seconds((), 20, int(20 * context))]  # just as long as twenty at once take
    expected = 3 / (prompt + 101 * tpot / 20)
    assert ideal_rate(both, items, tpot) == pytest.approx(expected, rel=1e-9)
    assert ideal_rate(both, items, 1e-9) < expected < ideal_rate(both, items, None)
    split = ClusterSpec(groups=parse_cluster("prefill=2@h100,decode=1@h100"))
    assert ideal_rate(split, items, tpot) == ideal_rate(both, items, tpot), "whatever the devices' roles"


def test_what_a_prefix_cache_would_have_is_not_counted() -> None:
    blocks = tuple(range(8))
    items = [WorkItem(index=n, prompt_len=4096, output_len=1, blocks=blocks, block_size=512) for n in range(10)]
    one = ClusterSpec(groups=parse_cluster("both=1@h100"))
    cold = ideal_rate(replace(one, prefix_caching=False), items, None)
    assert ideal_rate(one, items, None) > 5 * cold


# ---------------------------------------------------------------- places


def drawn(share: float, noise: float = 0.0, repeats: int = 4, seed: int = 0) -> Drawn:
    rng = np.random.default_rng(seed)
    values = share + noise * rng.standard_normal(repeats)
    return Drawn(values, values[:, None] + noise * rng.standard_normal((repeats, 50)), 0.001)


def places(*sides: Drawn) -> list[tuple[int, str]]:
    return [(one.side, one.place) for one in standings([sides])]


def test_who_cannot_be_told_apart_shares_a_place() -> None:
    best, noisy, worst = drawn(0.9), drawn(0.85, noise=0.2, seed=1), drawn(0.3)
    assert places(worst, noisy, best) == [(2, "1="), (1, "1="), (0, "3")]
    assert places(worst, drawn(0.85), best) == [(2, "1"), (1, "2"), (0, "3")]
    assert places(drawn(0.895), best) == [(1, "1="), (0, "1=")], "less than a hundredth is no difference"
    first, *_, last = standings([[worst, best]])
    assert first.against is None and last.against is not None and last.against.high < 0.5 and last.against.clear


def test_a_pair_is_compared_by_its_own_difference() -> None:
    """Both have good and bad runs; the same ones, so that one is surely better."""
    base = drawn(0.6, noise=0.1)
    better = Drawn(base.values * 1.1, base.draws * 1.1, base.half)
    ratio = ratio_of_shares(base, better)
    assert ratio.clear and 1.09 < ratio.low <= ratio.ratio <= ratio.high < 1.11
    assert not ratio_of_shares(base, drawn(0.66, noise=0.1, seed=2)).clear
    low, high = base.interval[1:]
    assert 0.0 <= low < 0.5 and 0.7 < high <= 1.0


def test_conditions_weigh_alike() -> None:
    one = mean_of([Drawn(np.ones(1), np.full((1, 50), 0.8), 0.5 / 10), drawn(0.0, repeats=1)])
    assert one.values.tolist() == [0.5] and one.draws[0, 0] == 0.4 and one.half == pytest.approx(0.5 / 510)


# ---------------------------------------------------------------- the command


def test_jobs_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [command(tmp_path / jobs, "-j", jobs) for jobs in ("1", "2")]
    made = [one.pop("made") for one in found]
    assert found[0] == found[1] and all("command" in one and "cpu" in one for one in made)
    assert (tmp_path / "1" / "league.svg").read_bytes() == (tmp_path / "2" / "league.svg").read_bytes()
    assert len(found[0]["cells"]) == 4 * 2 * 2 and set(found[0]["standings"]) == {
        "overall", "like azure-conv-2023", "random 256 in, 64 out",
    }  # fmt: skip
    assert {cell["load"] for cell in found[0]["cells"]} == {0.9} and len(found[0]["conditions"]) == 2
    rates = {cell["side"]: cell["attainment"] for cell in found[0]["cells"]}
    assert set(rates) == set(found[0]["sides"]) and all(0 <= rate <= 1 for rate in rates.values())
    said, text = " ".join(capsys.readouterr().out.split()), (tmp_path / "1" / "league.md").read_text()
    assert "16 of 16 runs to do, 2 at a time" in said
    assert "## Overall" in text and "![League](league.svg)" in text
    drawn = (tmp_path / "1" / "league.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and "colocated sarathi:chunk=300" in drawn


def test_the_same_command_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--policies", "fcfs", "--workload", "random", "--repeats", "1", "-j", "1"]

    def stops(work: Any, tasks: list[bytes], jobs: int) -> Iterator[tuple[int, bytes]]:
        yield 2, work(tasks[2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(league, "side_by_side", stops)
        with pytest.raises(Abort):
            command(tmp_path / "a", *one)
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped: 1 of 4 runs are kept in" in said and "the same command goes on" in said
    kept = tmp_path / "a" / "runs.jsonl"
    whole = kept.read_bytes()
    kept.write_bytes(whole + whole[:40])  # a command that was killed while it wrote
    resumed = command(tmp_path / "a", *one)
    assert "3 of 4 runs to do" in capsys.readouterr().out
    assert kept.read_bytes().startswith(whole) and kept.read_bytes().count(b"\n") == 4
    fresh = command(tmp_path / "b", *one)
    del resumed["made"], fresh["made"]
    assert resumed == fresh
    command(tmp_path / "a", *one)
    assert "0 of 4 runs to do" in capsys.readouterr().out
    command(tmp_path / "a", *one, "--seed", "1")
    assert "4 of 4 runs to do" in capsys.readouterr().out


def test_a_policy_that_has_changed_plays_again(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from minidisagg import Policy\nclass Mine(Policy):\n    only = 'disagg'\n")
    sides = line_up(DISAGG, f"{mine}:Mine", [])
    assert [side.label for side in sides] == ["disagg Mine"]
    options = LeagueOptions(sides=sides, workloads=(parse_workload("random", 30),), loads=(0.5,), repeats=1, out="no")
    [run] = Games(options).runs.values()
    before = key_of(run)
    assert key_of(replace(run, time_limit=9.0)) == before != key_of(replace(run, rate=run.rate * 2))
    mine.write_text(mine.read_text() + "    equal_steps = False\n")
    league._content.cache_clear()
    assert key_of(run) != before


def test_what_is_refused_is_left_out_of_no_table(tmp_path: Path) -> None:
    found = command(tmp_path, "--policies", "disagg:early_rejection", "--loads", "3", "--num-prompts", "60")
    refused = [cell["rejected"] for cell in found["cells"]]
    assert max(refused) > 0.1 and "refused" in (tmp_path / "league.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loads", "0.5,x"], "--loads '0.5,x': expected positive numbers"),
        (["--loads", "0"], "expected positive numbers"),
        (["--workload", "azure"], "--workload 'azure': choose from random"),
        (["--workload", "mooncake:nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--policy", "disagg", "--cluster", "both=1@h100"], "no workers of prefill or decode alone"),
        (["--policy", "nobody"], "unknown policy 'nobody'"),
        (["--policy", "sjf:ageing=-1"], "ageing must be tokens per second"),
        (["--num-prompts", "8"], "nothing is left to measure"),
    ],
    ids=["no number", "zero", "no file given", "no file", "no mode", "no policy", "setting", "too few"],
)
def test_mistakes_on_the_command_line(args: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        command(tmp_path / "out", *args)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing is left of it"


def test_a_trace_can_be_its_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        {"timestamp": 1000 * n, "input_length": 700, "output_length": 5, "hash_ids": [n, n + 1]} for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    workload = parse_workload(f"mooncake:{path}", 30)
    assert workload.dataset_name == "mooncake" and workload.dataset_path == str(path) and workload.num_prompts == 30


def test_repetitions_of_a_trace_are_its_next_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    rows = [f"{n},{300 + n},{5 * (n > 0)}" for n in range(61)]
    path.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    only = ["--policies", "disagg", "--workload", f"azure:{path}"]
    out = tmp_path / "out"
    cli.main(["league", "--out", str(out), *only, "--num-prompts", "30", "--loads", "0.5", "--repeats", "3", "-j", "1"],
             standalone_mode=False)  # fmt: skip
    note = "azure trace t.csv: the trace has requests for 2 repetitions, and those after have the same ones again"
    assert json.loads((out / "league.json").read_text())["notes"] == [note]
    said = " ".join(capsys.readouterr().out.split())
    assert note in said and "azure trace t.csv: 30 requests, 1 skipped, 0 clamped" in said
    options = LeagueOptions(
        sides=line_up(DISAGG, "disagg", []), workloads=(parse_workload(f"azure:{path}", 30),), loads=(0.5,), repeats=3,
        out=str(out),
    )  # fmt: skip
    assert [run.repetition for run in Games(options).runs.values()] == [0, 1, 2]

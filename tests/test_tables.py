"""The tables of a report fit into 80 columns: no name is cut in the middle, no number at all."""

from __future__ import annotations

import io
import random

import pytest
from msgspec.structs import replace
from rich.console import Console
from test_measure import fake_run

from minidisagg.measure.comparison import Comparison, compare_runs
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import LinkRecord, RunRecord, WorkerRecord
from minidisagg.measure.report import link_table, render, worker_table


def runs(label: str, workers: int = 0) -> list[RunRecord]:
    """Three repetitions; with so many workers of each role, and a link from each to each."""
    found = [fake_run("disagg", rep, random.Random(rep), 0.02) for rep in range(3)]
    for one in found:
        one.label = label
        one.workers = [
            WorkerRecord(name=f"{role}-{i}", role=role, busy_s=1.0 + i, flops=0.0, bytes_read=0.0)
            for role in ("prefill", "decode") for i in range(workers)
        ]  # fmt: skip
        one.links = [
            LinkRecord(source=f"prefill-{i}", dest=f"decode-{j}", kind="shm", bytes=10**9, seconds=0.1 + i, transfers=2)
            for i in range(workers) for j in range(workers)
        ]  # fmt: skip
    return found


def shown(comparison: Comparison) -> list[str]:
    console = Console(width=80, file=io.StringIO(), record=True, color_system=None)
    console.print(render(comparison))
    return console.export_text().splitlines()


def slower(side: list[RunRecord]) -> list[RunRecord]:
    """Each further token 5 ms later, so that each side has something to win."""
    return [
        replace(one, requests=[
            replace(r, token_times=[time + 0.005 * i - 0.001 for i, time in enumerate(r.token_times)])
            for r in one.requests
        ])
        for one in side
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "heads"),
    [
        ("fcfs", "ShortestFirst", ("fcfs  ShortestFirst",)),
        ("disagg sarathi:chunk=512", "colocated sarathi:chunk=512,budget=64", ("sarathi:", "chunk=512", "budget=64")),
    ],
    ids=["class", "settings"],
)  # fmt: skip
def test_long_names_have_a_letter(a: str, b: str, heads: tuple[str, ...]) -> None:
    lines = shown(compare_runs(runs(a), slower(runs(b)), SLO(ttft=300, tpot=30), resamples=100))
    top = next(i for i, line in enumerate(lines) if line.startswith("Latency"))
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    head = " ".join(lines[top:rule])
    assert "A:" in head and "B:" in head and all(word in head for word in heads)
    rows = lines[rule + 1 : next(i for i, line in enumerate(lines) if line.startswith("=: no difference"))]
    tpot = next(row for row in rows if row.startswith("TPOT"))
    assert tpot.split()[-1] == "A" and tpot.count("[") == tpot.count("]") == 1
    assert all(len(row.split()) > 2 for row in rows if row.strip())  # nothing has gone on in a second line


def test_short_names_stand_for_themselves() -> None:
    lines = shown(compare_runs(runs("colocated"), slower(runs("disagg")), SLO(ttft=300), resamples=100))
    assert any(line.startswith("TPOT") and line.split()[-1] == "colocated" for line in lines)
    assert not any("A:" in line and "B:" in line for line in lines)


def test_both_rates_say_what_they_count() -> None:
    text = " ".join(" ".join(shown(compare_runs(runs("disagg"), (), SLO(ttft=300)))).split())
    for term in ("requests/s: that ended while", "goodput: that came then", "handoff gap:", "max ITL:", "2nd token:",
                 "count: pieces", "of wall: share", "busy: share"):  # fmt: skip
        assert (term in text) == (not term.startswith(("count", "of wall", "busy"))), term
    text = " ".join(" ".join(shown(compare_runs(runs("disagg", 2)))).split())
    assert "count: pieces" in text and "of wall: share" in text and "busy: share" in text


def test_many_workers_and_links_are_summed_up() -> None:
    """What a terminal leaves out is in the tables of the report."""
    comparison = compare_runs(runs("disagg", 8))
    lines = shown(comparison)
    (summed,) = (line.split() for line in lines if "64 links" in line)
    assert summed[-6:] == ["384", "192,000", "691", "0.28", summed[-2], "0"]
    busiest = lines[next(i for i, line in enumerate(lines) if "64 links" in line) + 1].split()
    assert busiest[:3] == ["prefill-7", "→", "decode-0"] and busiest[4] == "6"
    assert len([line for line in lines if "→" in line]) == 1
    workers = [line.split() for line in lines if line.startswith(("  prefill-", "  decode-", "  mean of 8"))]
    assert [row[0] for row in workers[:6]] == ["prefill-0", "mean", "prefill-7", "decode-0", "mean", "decode-7"]
    assert sum("report.html has all" in line for line in lines) == 2
    for table, rows in (link_table(comparison), 65), (worker_table(comparison), 17):
        assert table is not None and table.row_count == rows

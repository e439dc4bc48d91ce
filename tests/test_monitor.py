"""The monitor: its numbers against the events they come from, its frames, and the program in a pseudo-terminal."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from cluster import needs_two_cores
from fake_engine import fake_engine
from rich.cells import cell_len
from rich.console import Console
from serving import Serving, serving
from terminals import ROOT, Terminal, terminal

from minidisagg.admin_schema import (
    STAGES,
    VERSION,
    EndRecord,
    EventRecord,
    LinkState,
    RequestState,
    Snapshot,
    Stage,
    StepRecord,
    StoreState,
    WorkerState,
    WorkerStats,
)
from minidisagg.core.messages import Envelope, LinkStats, SamplingParams, Stats, StepOutput, StoreStats
from minidisagg.core.tracked import Stage as TrackedStage
from minidisagg.monitor.app import MonitorError, MonitorOptions, read_events, run_monitor
from minidisagg.monitor.keys import POLICIES, Post, SetLoad, Ui, press
from minidisagg.monitor.load import DemoLoad
from minidisagg.monitor.panels import duration, split
from minidisagg.monitor.state import BUCKET, DEFAULT_SLO, NOTHING, SPAN, State, decode
from minidisagg.monitor.view import frame
from minidisagg.server.history import Recent

RECORDED = ROOT / "docs/data/monitor.jsonl.gz"
SIZES = ((80, 24), (120, 40), (200, 60), (40, 12), (20, 4))
SLO = {"ttft": 100.0, "tpot": 5.0}


def a_step(seq: int, clock: float, worker: str, seconds: float, prefill_tokens: int, decode_tokens: int) -> StepRecord:
    return StepRecord(
        seq=seq,
        clock=clock,
        worker=worker,
        seconds=seconds,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        context_tokens=0,
    )


def an_end(
    seq: int,
    clock: float,
    name: str,
    finish: str,
    *,
    tokens: tuple[int, int] = (0, 0),
    ttft: float = 0.0,
    tpot: float = 0.0,
    max_itl: float = 0.0,
    **stages: float,
) -> EndRecord:
    return EndRecord(
        seq=seq,
        clock=clock,
        id=name,
        finish=finish,
        prompt_tokens=tokens[0],
        output_tokens=tokens[1],
        ttft=ttft,
        tpot=tpot,
        max_itl=max_itl,
        e2e=sum(stages.values()),
        stages=stages,
    )


def an_event(seq: int, clock: float, text: str) -> EventRecord:
    return EventRecord(seq=seq, clock=clock, text=text)


def a_link(peer: str, transfers: int, moved: int, seconds: float, failures: int = 0, backlog: int = 0) -> LinkState:
    return LinkState(
        peer=peer,
        kind="shm",
        transfers=transfers,
        bytes=moved,
        seconds=seconds,
        queue_seconds=0.0,
        failures=failures,
        backlog=backlog,
    )


def some_stats(links: Sequence[LinkState] = (), **given: float) -> WorkerStats:
    zeros: dict[str, Any] = dict.fromkeys(WorkerStats.__struct_fields__, 0)
    return WorkerStats(**(zeros | {"store": None} | given | {"links": list(links)}))


def a_worker(
    name: str,
    role: str = "",
    state: Any = "down",
    epoch: int = 0,
    pid: Any = msgspec.UNSET,
    stats: WorkerStats | None = None,
) -> WorkerState:
    return WorkerState(name=name, role=role, state=state, epoch=epoch, pid=pid, stats=stats)


def live_request(name: str, stage: Stage, age: float, in_stage: float) -> RequestState:
    return RequestState(
        id=name,
        stage=stage,
        age=age,
        in_stage=in_stage,
        prompt_tokens=0,
        output_tokens=0,
        max_tokens=0,
        workers=[],
        incarnation=0,
    )


def snapshot(clock: float = 100.0, seq: int = 10, **fields: Any) -> Snapshot:
    stats = some_stats(
        [a_link("decode-0", 10, 10**9, 0.5, failures=3, backlog=6)],
        running=7,
        waiting=2,
        offers=1,
        pages_free=50,
        pages_live=30,
        pages_cached=15,
        pages_inflight=4,
        pages_quarantined=1,
        clock=clock,
    )
    workers = [a_worker("prefill-0", "prefill", "up", 1, 77, stats), a_worker("decode-0", state="down", epoch=4)]
    given: dict[str, Any] = {
        "model": "a/model",
        "mode": "disagg",
        "policy": "fcfs",
        "workers": workers,
        "stages": {"waiting": 11, "prefilling": 2, "transferring": 3, "decode_waiting": 1, "decoding": 24},
        "oldest": {"waiting": 1.5, "decoding": 4.25},
        "latencies": {"ttft": [0.0123, 0.08, 0.345], "tpot": [], "itl": []},
        **fields,
    }
    return msgspec.structs.replace(NOTHING, clock=clock, seq=seq, **given)


def text_of(state: State, ui: Ui | None = None, width: int = 120, height: int = 40) -> str:
    """The frame as plain text; every line is exactly as wide as asked."""
    console = Console(file=io.StringIO(), width=width, height=height, record=True, force_terminal=True)
    console.print(frame(state, ui or Ui(), width, height), end="")
    lines = console.export_text().splitlines()
    assert len(lines) == height
    assert [cell_len(line) for line in lines] == [width] * height
    return "\n".join(lines)


def state_of(*snapshots: Snapshot, slo: dict[str, float] | None = None) -> State:
    state = State(slo)
    for one in snapshots:
        state.apply(one)
    return state


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


# ---------------------------------------------------------------- state


@pytest.fixture(scope="module")
def recorded() -> list[bytes]:
    return list(read_events(RECORDED))


def test_numbers_are_those_of_the_recorded_events(recorded: list[bytes]) -> None:
    """Computed again, from the raw JSON and all of it at once."""
    state = State(SLO)
    for data in recorded:
        state.apply(decode(data))
    raw = [json.loads(data) for data in recorded]
    steps, ends, log = ([r for one in raw for r in one[name]] for name in ("steps", "ends", "events"))
    first, last = raw[0], raw[-1]
    assert len(steps) > 1000 and len(ends) > 100 and len(log) == 2

    assert [event.text for event in state.log] == [event["text"] for event in log]
    assert [end.id for end in state.ends] == [end["id"] for end in ends][-500:]
    met = sum(end["ttft"] <= 0.1 and end["tpot"] <= 0.005 and end["finish"] == "length" for end in ends)
    since = min(first["clock"], *(end["clock"] for end in ends))
    assert last["clock"] - 60 < since
    assert state.goodput() == pytest.approx((met / (last["clock"] - since), met / len(ends), len(ends)))

    window = [one for one in raw if one["clock"] > last["clock"] - SPAN]
    before = raw[len(raw) - len(window) - 1]
    for name, rate in zip(("prompt_tokens", "generation_tokens"), state.tokens.rates(), strict=True):
        assert rate == pytest.approx((last[name] - before[name]) / (last["clock"] - before["clock"]))

    newest = int(last["clock"] / BUCKET)
    for worker in state.now.workers:
        mine = [step for step in steps if step["worker"] == worker.name]
        recent = [s for s in mine if newest - SPAN / BUCKET <= int(s["clock"] / BUCKET) < newest]
        tokens = sum(step["prefill_tokens"] + step["decode_tokens"] for step in recent)
        assert state.worker_tokens(worker.name) == pytest.approx(tokens / SPAN) and tokens
        longest: dict[int, float] = {}
        for step in mine:
            index = int(step["clock"] / BUCKET)
            longest[index] = max(longest.get(index, 0.0), step["seconds"])
        assert {b.index: b.longest.seconds for b in state.buckets[worker.name]} == longest

    links = [(one["clock"], link) for one in raw for w in one["workers"] if w["stats"] for link in w["stats"]["links"]]
    assert links[-1][1]["transfers"] > 10
    sender = state.now.workers[0]
    assert sender.stats is not None and sender.stats.links[0].bytes == links[-1][1]["bytes"]
    speed, wire, piece = state.link_rates(sender, sender.stats.links[0])
    assert 1e4 < speed < 1e9 and wire is not None and wire > speed and piece is not None and 1e-5 < piece < 1.0
    assert {(name, text) for _, name, text in state.marks} == {
        ("", "disagg"), ("worker-0", "prefill"), ("worker-1", "decode"),
    }  # fmt: skip


def test_rates_of_links_and_busy_share() -> None:
    def at(clock: float, moved: int, pieces: int, seconds: float, busy: float) -> Snapshot:
        stats = some_stats([a_link("b", pieces, moved, seconds)], clock=clock, busy_seconds=busy)
        return snapshot(clock, workers=[a_worker("a", "prefill", "up", 1, 7, stats=stats)])

    state = state_of(at(0.0, 0, 0, 0.0, 0.0), at(2.0, 0, 0, 0.0, 0.0))
    worker = state.now.workers[0]
    assert worker.stats is not None
    assert state.link_rates(worker, worker.stats.links[0]) == (0.0, None, None)
    for clock in (3.0, 7.5, 8.0):
        state.apply(at(clock, int(clock * 1e9), int(clock * 100), clock * 0.25, clock * 0.5))
    worker = state.now.workers[0]
    assert worker.stats is not None
    # Of 3.0 to 8.0 alone; it has sent for a quarter of that time.
    assert state.link_rates(worker, worker.stats.links[0]) == pytest.approx((1e9, 4e9, 0.0025))
    assert state.worker_busy(worker) == pytest.approx(0.5)
    state.apply(at(9.0, 0, 0, 0.0, 0.0))  # its counters start anew
    assert state.worker_busy(worker) is None


def test_a_reconnection_counts_nothing_twice_and_another_server_starts_anew() -> None:
    steps = [a_step(n, 99.0, "a", 0.01, 0, 5) for n in (1, 2, 3)]
    ends = [an_end(4, 99.5, "x", "length")]
    events = [an_event(5, 99.6, "hello")]
    state = state_of(snapshot(seq=5, steps=steps, ends=ends, events=events))
    state.apply(snapshot(100.1, 6, steps=steps, ends=ends, events=[*events, an_event(6, 100.0, "again")]))
    assert state.worker_tokens("a") == 15 / SPAN and state.goodput()[2] == 1
    assert [event.text for event in state.log] == ["hello", "again"]
    state.apply(snapshot(101.0, 2, events=[an_event(1, 100.9, "new")]))
    assert [event.text for event in state.log] == ["new"] and not state.ends and not state.buckets
    worker = a_worker("prefill-0", "prefill", "up", 1, 78)
    state.apply(snapshot(101.5, 9, workers=[worker]))  # more records than before, but another process
    assert not state.log


def test_goodput_is_of_the_last_minute_and_leaves_aborted_requests_out() -> None:
    ends = [
        an_end(1, 10.0, "old", "length", ttft=0.01),
        an_end(2, 50.0, "good", "stop", ttft=0.1, tpot=0.005),
        an_end(3, 50.0, "late", "stop", ttft=0.1001),
        an_end(4, 50.0, "gone", "abort", ttft=0.01),
        an_end(5, 50.0, "error", "error"),
    ]
    assert state_of(snapshot(20.0, 5, ends=ends), slo=SLO).goodput() == (2 / 10, 2 / 4, 4)
    assert state_of(snapshot(71.0, 5, ends=ends), slo=SLO).goodput() == (1 / 60, 1 / 3, 3)
    assert state_of(snapshot(), slo=SLO).goodput() == (0.0, 0.0, 0)
    assert state_of(snapshot()).slo == DEFAULT_SLO


def test_changes_of_role_are_marked_once() -> None:
    def at(clock: float, mode: str, *roles: str) -> Snapshot:
        return snapshot(clock, mode=mode, workers=[a_worker(f"w{n}", role, "up") for n, role in enumerate(roles)])

    state = state_of(
        at(1.0, "colocated", "both", "both"), at(2.0, "disagg", "both", "both"), at(3.0, "disagg", "prefill", "both"),
        at(4.0, "disagg", "", "decode"), at(5.0, "disagg", "prefill", "decode"),
    )  # fmt: skip
    assert list(state.marks) == [(2.0, "", "disagg"), (3.0, "w0", "prefill"), (4.0, "w1", "decode")]
    strip = text_of(state, Ui(panel=5), 120, 20)
    assert [strip.count(word) for word in ("│", "│disagg", "now")] == [4 * 7 + 1, 1, 1]


# ---------------------------------------------------------------- view


@pytest.mark.parametrize("size", SIZES)
def test_no_line_is_wider_than_the_terminal(recorded: list[bytes], size: tuple[int, int]) -> None:
    state = state_of(*map(decode, recorded), slo=SLO)
    states = [State(), state_of(snapshot(workers=[])), state_of(snapshot(model="長い" * 99)), state]
    uis = [Ui(), Ui(load=5.0, lost="server gone"), Ui(mode="help"), Ui(mode="details"), Ui(mode="kill")]
    for one in states:
        for ui in [*uis, Ui(mode="filter", filter="x" * 300), *(Ui(panel=n) for n in range(1, 8))]:
            text_of(one, ui, *size)


def test_the_header_drops_what_is_worth_least_and_keeps_its_gaps() -> None:
    """At any width: whole fields, and a space before the load."""
    ui, policy = Ui(load=1.0, live="live"), "prefill_first"
    told = [
        text_of(state_of(snapshot(mode="disagg", policy=policy, link="gloo")), ui, width, 4) for width in range(46, 90)
    ]
    heads = [text.splitlines()[0] for text in told]
    assert all(head.endswith(" load 1/s  \u25cf live ") for head in heads), heads
    fields = [head.partition(" load ")[0].split() for head in heads]
    left = [line[line.index("disagg") :] if "disagg" in line else [] for line in fields]
    assert {*map(tuple, left)} == {("disagg",), ("disagg", policy), ("disagg", policy, "gloo")}
    assert [*map(len, left)] == sorted(map(len, left))


def test_the_panels_show_the_numbers() -> None:
    ends = [
        an_end(
            3, 99.0, "cmpl-1", "length", tokens=(256, 64), ttft=0.05, tpot=0.004, max_itl=0.01, queue=0.25, decode=0.75
        ),
        an_end(
            4, 99.0, "cmpl-2", "length", tokens=(256, 64), ttft=0.05, tpot=0.004, max_itl=0.01, prefill=1.0, decode=1.0
        ),
    ]
    steps = [a_step(1, 99.2, "prefill-0", 0.0123, 256, 0), a_step(2, 99.3, "prefill-0", 0.045, 200, 300)]
    events = [an_event(5, 88.0, "prefill-0 is up"), an_event(6, 90.0, "evil \x1b[2J name")]
    state = state_of(
        snapshot(95.0, 0, prompt_tokens=1000, generation_tokens=50),
        snapshot(prompt_tokens=6000, generation_tokens=5050, steps=steps, ends=ends, events=events), slo=SLO,
    )  # fmt: skip
    text = text_of(state)
    assert re.search(r"^ 11 +█+\S? +2 +\S+ +3 +\S+ +1 +\S+ +24 +█{10,}", text, re.M)
    assert "oldest 1.50 s" in text and "oldest 4.25 s" in text
    assert re.search(r"TTFT +12.3 ms +80.0 ms +345 ms +≤ 100 ms", text)
    assert re.search(r"TPOT +- +- +- +≤ 5.00 ms", text)
    assert re.search(r"tokens +1,000 prompt/s +1,000 output/s", text)
    assert re.search(r"goodput +0.40 req/s +100.0% of 2 requests", text)
    row = line_with(text, "▸ prefill-0")
    assert re.search(r"prefill +up +1 +█+▓+▒+x+·+ +35% +7/3 +151 ", row)  # (256 + 500) tokens in 5 s
    assert re.search(r"decode-0 +down +4 +·+ *$", line_with(text, "  decode-0"))
    assert re.search(r"p0→d0 +0.00K +2.00G +50\.0 ms +6 +3 *$", line_with(text, "p0→d0"))
    links = text_of(state, Ui(panel=4))
    assert re.search(r"now +wire .*\n prefill-0 → decode-0 shm +0.00 KB/s +2.00 GB/s +50\.0 ms +6 +3 *\n", links)
    assert "max 45.0 ms" in text and "high: 50.0 ms" in text
    assert "12 s ago  prefill-0 is up" in text and "evil ·[2J name" in text
    assert "evil" not in text_of(state, Ui(filter="IS UP"))
    details = text_of(state, Ui(mode="details", request="cmpl-1"))
    assert "256 prompt tokens, 64 output tokens" in details
    assert re.search(r"queue +250 ms +25.0%", details) and re.search(r"end to end +1.00 s", details)


def test_each_panel_alone_shows_the_last_recorded_event(recorded: list[bytes]) -> None:
    """Read from the screen, compared with the raw JSON."""
    state, last = state_of(*map(decode, recorded)), json.loads(recorded[-1])

    def lines(panel: int) -> list[str]:
        return text_of(state, Ui(panel=panel), 140, 60).splitlines()[2:-1]

    counts, ages = re.findall(r"(?<!\S)\d+(?!\S)", lines(1)[1]), re.findall(r"oldest [\d.]+ m?s|-", lines(1)[2])
    assert list(map(int, counts)) == [last["stages"][stage] for stage in STAGES]
    assert ages == [f"oldest {duration(last['oldest'][name])}" if last["stages"][name] else "-" for name in STAGES]

    for name, line in zip(("ttft", "tpot", "itl"), lines(2), strict=False):
        assert re.findall(r"[\d.]+ m?s", line)[:3] == [duration(seconds) for seconds in last["latencies"][name]]

    workers, grid = last["workers"], "\n".join(lines(3))
    for worker in workers:
        stats = worker["stats"]
        pages = [stats[f"pages_{name}"] for name in ("live", "inflight", "cached", "quarantined", "free")]
        used = (pages[0] + pages[1] + pages[3]) / sum(pages)
        row = rf"{worker['name']} +{worker['role']} +{worker['state']} +{worker['epoch']} .* +{used:.0%} +"
        assert re.search(row + rf"{stats['running']}/{stats['waiting'] + stats['offers']} ", grid)
        said = "{} live, {} in flight, {} cached, {} quarantined, {} free".format(*pages)
        found = re.search(rf"{worker['name']} KV pages by state, (\d+) a cell: {said} *\n((?: +[█▓▒x·]+ *\n?)+)", grid)
        assert found is not None
        each, cells = int(found[1]), found[2].split()
        for glyph, count in zip("█▓▒x·", pages, strict=True):
            assert sum(line.count(glyph) for line in cells) == pytest.approx(count / each, abs=3)
        assert sum(map(len, cells)) == -(-sum(pages) // each)

    links = [(worker["name"], link) for worker in workers for link in worker["stats"]["links"]]
    for (source, link), line in zip(links, lines(4)[1:], strict=False):
        assert re.search(rf"{source} → {link['peer']} {link['kind']} ", line)
        assert list(map(int, line.split()[-2:])) == [link["backlog"], link["failures"]]

    newest = int(last["clock"] / BUCKET)
    strips = "\n".join(lines(5))
    for worker in workers:
        shown = [
            step["seconds"]
            for one in recorded
            for step in json.loads(one)["steps"]
            if step["worker"] == worker["name"] and int(step["clock"] / BUCKET) > newest - 126
        ]
        assert f" {worker['name']} " in strips and f"max {duration(max(shown))}" in strips

    rows = lines(6)
    for request, line in zip(reversed(last["requests"]), rows, strict=False):
        assert request["id"] in line
    ends = [end for one in recorded for end in json.loads(one)["ends"]]
    for end, line in zip(reversed(ends), rows[len(last["requests"]) : -1], strict=False):
        assert end["id"] in line and line.rstrip().endswith(duration(end["e2e"]))
    assert len(rows) > 50

    events = [event for one in recorded for event in json.loads(one)["events"]]
    for event, line in zip(reversed(events), lines(7), strict=False):
        assert line.split("ago")[1].strip() == event["text"]


def test_a_small_terminal_keeps_the_panels_of_worth(recorded: list[bytes]) -> None:
    state = state_of(*map(decode, recorded))
    small, large = text_of(state, width=80, height=24), text_of(state)
    shown = [name for name in ("pipeline", "latency", "workers", "links", "interference", "requests", "log")
             if re.search(rf"\d {name} ", small)]  # fmt: skip
    assert shown == ["pipeline", "latency", "workers", "links", "interference"]
    assert all(re.search(rf"{n} {name} ", large) for n, name in ((6, "requests"), (7, "log")))
    assert text_of(state, Ui(panel=6), 80, 24).splitlines()[1].startswith("─ 6 requests")
    high = text_of(state, width=90, height=40)  # too narrow for two side by side, but high enough for both
    assert all(re.search(rf"^─ {n} {name} ", high, re.M) for n, name in ((5, "interference"), (6, "requests")))
    assert "open fail" in small and "≤ 60.0 ms" in small and re.search(r"w0→w1 +[\d.]+[KMG] +[\d.]+[KMG] ", small)


def test_requests_lie_on_one_axis_of_time() -> None:
    ends = [
        an_end(
            3,
            99.0,
            "first",
            "length",
            tokens=(9, 9),
            ttft=0.1,
            tpot=0.004,
            max_itl=0.01,
            queue=1.0,
            prefill=1.0,
            decode=2.0,
        ),
        an_end(
            4, 100.0, "second", "length", tokens=(9, 9), ttft=0.1, tpot=0.004, max_itl=0.01, prefill=1.0, transfer=1.0
        ),
    ]
    live = [live_request("third", "decoding", 3.0, 1.0), live_request("fourth", "waiting", 0.5, 0.5)]
    state = state_of(snapshot(100.0, ends=ends, requests=live))
    lines = text_of(state, Ui(panel=6), 22 + 100, 12).splitlines()  # 20 columns to the second
    rows = {line.split()[0]: line[11:111] for line in lines[2:6]}
    assert list(rows) == ["fourth", "third", "second", "first"]  # those that run on top, then the newest
    assert rows["first"] == "·" * 20 + "█" * 20 + "▄" * 40 + " " * 20
    assert rows["second"] == " " * 60 + "█" * 20 + "▒" * 20
    assert rows["third"] == " " * 40 + "─" * 40 + "▄" * 20
    assert rows["fourth"] == " " * 90 + "·" * 10
    assert [line.split()[-1] for line in lines[2:4]] == ["queue", "decode"]
    assert lines[6].split() == ["-5.00", "s", "now"]
    chosen = text_of(state, Ui(panel=6, request="first"), 122, 12)
    assert "third" not in chosen and "▸first" in chosen
    nothing = state_of(snapshot())
    assert "no request yet" in text_of(nothing, Ui(panel=6))
    ui = Ui()
    assert press(ui, "c-m", nothing) is None and (ui.mode, ui.status) == ("", "no request yet")


def test_a_stage_that_no_worker_takes_is_said() -> None:
    def title(*workers: WorkerState) -> str:
        return text_of(state_of(snapshot(workers=list(workers)))).splitlines()[1]

    both, prefill = a_worker("a", "both", "up"), a_worker("b", "prefill", "up")
    assert "no worker" not in title(both) + title(prefill, a_worker("c", "decode", "up"))
    assert "no worker takes decode: new requests wait" in title(prefill, a_worker("c", "decode", "down"))
    assert "no worker takes prefill or decode" in title(a_worker("a", "both", "flipping"))


def test_the_default_slo_is_said() -> None:
    default, given = text_of(state_of(snapshot())), text_of(state_of(snapshot(), slo=SLO))
    assert "(default)" in line_with(default, "2 latency") and "≤ 2.50 s" in default and "≤ 60.0 ms" in default
    assert "(default)" not in given and re.search(r"goodput +0.00 req/s +- of 0 requests", given)


def test_glyphs_and_colours_of_the_strip_tell_what_was_in_a_step() -> None:
    kinds = [(0, "·", "green"), (1, "░", "yellow"), (64, "░", "yellow"), (65, "▒", "magenta"), (300, "█", "red")]
    steps = [a_step(n, 90.0 + n, "prefill-0", 0.01, kind[0], 9) for n, kind in enumerate(kinds, 1)]
    state = state_of(snapshot(steps=steps))
    drawn = frame(state, Ui(panel=5), 120, 20)
    at = next(n for n, line in enumerate(drawn.lines) if any("░" in s.text for s in line[1:]) and n > 1)
    for line in drawn.lines[at - 1 : at + 1]:  # the bars, and what was in them
        assert [s.style.color.name for s in line if s.style and s.style.color] == [kind[2] for kind in kinds]
    assert "".join(s.text for s in drawn.lines[at]).split() == [kind[1] for kind in kinds]
    assert re.search(r"-15 s +-10 s +-5 s +now *$", text_of(state, Ui(panel=5), 80, 20), re.M)


def test_colours_are_the_terminals_own(recorded: list[bytes]) -> None:
    """Neither black nor white, which vanish on one background or the other, nor any that a theme does not set."""
    state = state_of(*map(decode, recorded), slo=SLO)
    for ui in (Ui(lost="gone", load=1.0), Ui(mode="help"), Ui(mode="details"), Ui(mode="kill")):
        styles = {segment.style for line in frame(state, ui, 120, 40).lines for segment in line if segment.style}
        assert not any(style.bold and style.color and style.color.name in ("yellow", "cyan") for style in styles)
        colours = {style.color.name for style in styles if style.color}
        assert colours <= {"red", "green", "yellow", "blue", "magenta", "cyan"}
        assert not any(style.bgcolor for style in styles)


def test_small_helpers() -> None:
    assert [duration(s) for s in (0.00042, 0.0123, 0.9996, 59.94, 599.0, 660.0, None)] == [
        "0.42 ms", "12.3 ms", "1.00 s", "59.9 s", "599 s", "11 min", "-",
    ]  # fmt: skip
    assert split([1, 0, 999, 1], 10) == [1, 0, 8, 1] and split([0, 0], 10) == [0, 0]
    assert split([1, 0, 999, 1], 10, least=0) == [0, 0, 10, 0]
    for cells in range(1, 30):
        for values in ([5, 1, 1, 1, 90], [1, 1, 1, 1, 1], [0, 0, 3, 0, 0], [1e-9, 1, 0, 0, 1e9]):
            assert sum(split(values, cells)) == cells


# ---------------------------------------------------------------- keys


def test_keys_ask_for_the_actions() -> None:
    state, ui = state_of(snapshot(ends=[an_end(n, 99.0, str(n), "stop") for n in (1, 2, 3)])), Ui(load=5.0)
    assert press(ui, " ", state) == Post("pause", "pause admission")
    assert press(ui, "m", state) == Post("mode", "mode colocated", {"mode": "colocated"})
    assert press(ui, "p", state) == Post("policy", "policy prefill_first", {"policy": "prefill_first"})
    assert press(ui, "f", state) == Post("workers/prefill-0/role", "prefill-0 becomes decode", {"role": "decode"})
    assert press(ui, "R", state) == Post("workers/prefill-0/restart", "restart prefill-0")
    assert press(ui, "K", state) is None and ui.mode == "kill"
    assert press(ui, "q", state) is None and ui.mode == "" and ui.status == "not killed"
    press(ui, "down", state), press(ui, "down", state), press(ui, "K", state)
    assert press(ui, "y", state) == Post("workers/decode-0/kill", "kill decode-0")
    assert press(ui, "+", state) == SetLoad(8.0) and press(ui, "-", state) == SetLoad(3.0)
    assert press(Ui(load=0.0), "-", state) == SetLoad(0.0)
    assert press(Ui(), "+", state) == SetLoad(0.5) and press(Ui(), "-", state) == SetLoad(0.0)
    assert [press(ui, key, state) for key in ("s", "q", "c-c")] == ["save", "quit", "quit"]
    for key, request in (("left", "2"), ("left", "1"), ("left", "1"), ("right", "2"), ("escape", "")):
        press(ui, key, state)
        assert ui.request == request
    for key, panel in (("7", 7), ("7", 0), ("3", 3), ("1", 1), ("escape", 0)):
        press(ui, key, state)
        assert ui.panel == panel
    for key in "/a q":
        assert press(ui, key, state) is None
    press(ui, "c-h", state)
    assert ui.filter == "a "
    paused = state_of(snapshot(paused=True, mode="colocated", policy="sarathi:chunk=9"))
    assert press(Ui(), " ", paused) == Post("resume", "resume admission")
    assert press(Ui(), "m", paused) == Post("mode", "mode disagg", {"mode": "disagg"})
    assert press(Ui(), "p", paused) == Post("policy", f"policy {POLICIES[0]}", {"policy": POLICIES[0]})
    assert [press(Ui(), key, State()) for key in " mpfRK"] == [None] * 6  # nothing is known yet


# ---------------------------------------------------------------- load


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(partial(fake_engine, 100.0, workers=2)) as running:
        yield running


def test_demo_load_sends_at_its_rate(served: Serving) -> None:
    async def run() -> tuple[list[int], int, float]:
        """Requests sent by the end of each phase, failures, and the seconds of the one with a load."""
        connector, sent = aiohttp.TCPConnector(limit=0), []
        async with aiohttp.ClientSession(served.url, connector=connector) as session:
            load = DemoLoad(session, 0.0)
            task, set_at = asyncio.create_task(load.run()), []
            # What fell due before the rate became 0 is still sent: the last phase is the silent one.
            for rate, seconds in ((0.0, 0.05), (100.0, 0.8), (0.0, 0.2), (0.0, 0.2)):
                set_at.append(time.monotonic())
                load.set_rate(rate)
                await asyncio.sleep(seconds)
                sent.append(load.sent)
            await asyncio.gather(*load._running)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return sent, load.failed, set_at[2] - set_at[1]

    before = sum(worker.seen for worker in served.frontend.workers.values())
    (none, _, some, same), failed, seconds = asyncio.run(run())
    assert none == 0 and 70 * seconds < some < 130 * seconds and same == some and failed == 0
    assert sum(worker.seen for worker in served.frontend.workers.values()) - before == some


# ---------------------------------------------------------------- the program


def test_every_key(served: Serving, tmp_path: Path) -> None:
    router = served.frontend.router
    record = tmp_path / "all.jsonl"
    flags = ("--goodput", "ttft:100", "tpot:5", "--demo-load", "5", "--record", record)
    with terminal(served.url, *flags, cwd=tmp_path) as tty:
        tty.wait(r"load 5/s +● live")
        tty.press("+", "load 8/s")
        tty.press("-", "load 5/s")
        tty.press(" ", "admission paused")
        assert router.paused
        tty.press(" ", "resume admission: done")
        assert not router.paused
        tty.press("m", "mode disagg: done")
        tty.wait(r"worker-0 prefill +up[\s\S]*worker-1 decode +up")
        tty.press("p", "policy prefill_first: done")
        assert router.policy_spec == "prefill_first"
        tty.press("f", "worker-0 becomes decode: that would leave no worker for prefill")
        tty.press("m", "mode colocated: done")
        tty.wait(r"worker-0 both +up[\s\S]*worker-1 both +up")
        tty.press("f", "worker-0 becomes prefill: done")
        tty.wait("worker-0 prefill +up")
        tty.press("f", "worker-0 becomes decode: done")
        tty.wait("worker-0 decode +up")
        tty.press("\x1b[B", "▸ worker-1")
        tty.press("K", r"kill worker-1\?.*y/n")
        tty.press("n", "not killed")
        tty.press("K", r"kill worker-1\?")
        tty.press("y", "kill worker-1: done")
        tty.wait("worker-1 is up, epoch 2")
        tty.press("R", "restart worker-1: done")
        tty.wait("worker-1 is up, epoch 3")
        tty.press("\x1b[A", "▸ worker-0")
        tty.wait(r"0000\d{4} +[·█▄].* s")
        tty.press("\x1b[D", "▸0000")
        tty.press("\r", "256 prompt tokens, 64 output tokens, end: length")
        tty.press("\x1b[C", "256 prompt tokens")
        tty.press("\x1b", "1 pipeline")
        for number, name in enumerate(
            ("pipeline", "latency", "workers", "links", "interference", "requests", "log"), 1
        ):
            tty.press(str(number), rf"^.*\n─ {number} {name} [^\n]*\n(?![\s\S]*─ \d)")
        tty.press("7", "1 pipeline")
        tty.press("/", "filter the log:")
        tty.press("paused\r", r"/paused 1 of \d+")
        assert "epoch 2" not in tty.text
        tty.press("?", "pause or resume admission: new requests wait")
        tty.press("?", "1 pipeline")
        tty.press("s", r"saved \d+ events: monitor-.*\.jsonl and \.trace\.json")
        tty.wait(r"\n +space pause +m mode", 8)  # the footer's hints are back
        tty.press("q")
        assert tty.ended() == 0
    trace = json.loads(next(tmp_path.glob("monitor-*.trace.json")).read_bytes())["traceEvents"]
    assert {"step", "request", "stage"} <= {event.get("cat") for event in trace if event["ph"] == "X"}
    saved = list(read_events(next(tmp_path.glob("monitor-*.jsonl"))))
    received = list(read_events(record))
    assert saved == received[: len(saved)] and len(received) > 20
    assert "admission paused" in [event.text for event in state_of(*map(decode, received)).log]


def test_resizing(served: Serving, tmp_path: Path) -> None:
    with terminal(served.url, cwd=tmp_path) as tty:
        tty.wait("7 log")
        tty.resize(80, 24)
        tty.wait(r"^(?=.{73}● live)(?![\s\S]*7 log)")
        tty.resize(150, 45)
        tty.wait(r"^(?=.{143}● live)(?=[\s\S]*7 log)")
        os.kill(tty.process.pid, signal.SIGTERM)
        assert tty.ended() == 0


def test_whatever_ends_it_restores_the_terminal(served: Serving, tmp_path: Path, recorded: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:  # side by side
        open_one = partial(terminal, cwd=tmp_path)
        ttys = [stack.enter_context(open_one(served.url)) for _ in range(4)]
        for tty in ttys:
            tty.wait("live")
        ttys[0].press("\x03")
        for tty, number in zip(ttys[1:], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), strict=True):
            tty.process.send_signal(number)
        for tty in ttys:
            assert tty.ended() == 0
    broken = (
        "import minidisagg.monitor.app as app; from minidisagg.cli import main\n"
        "frames = [app.frame] * 3; app.frame = lambda *args: frames.pop()(*args); main()"
    )
    with terminal("monitor", served.url, cwd=tmp_path, program=("-c", broken)) as tty:
        assert tty.ended() == 1
        assert b"internal error, IndexError: pop from empty list" in tty.raw
    (tmp_path / "bad.jsonl").write_bytes(recorded[0] + b"\nnot JSON\n")
    with terminal("--replay", tmp_path / "bad.jsonl", cwd=tmp_path) as tty:
        assert tty.ended() == 2
        assert b"bad.jsonl, line 2: not an event" in tty.raw


def test_a_server_that_goes_and_comes_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    engine = partial(fake_engine, 30.0)
    with contextlib.ExitStack() as stack:
        with serving(engine, port=port) as first:
            tty = stack.enter_context(terminal(first.url, cwd=tmp_path))
            tty.wait("● live")
        tty.wait("server gone, reconnecting")
        tty.press(" ", "pause admission: Cannot connect")
        with serving(engine, port=port):
            tty.wait("● live")
            tty.wait("connected again")
            tty.press(" ", "pause admission: done")
        tty.wait("server gone, reconnecting")
        with serving(engine, port=port, api_keys=("secret",)):  # trying again is of no use
            assert tty.ended() == 1
        assert b"answers 401: the API key is missing or wrong (--api-key or $MINIDISAGG_API_KEY)" in tty.raw


def test_replay(tmp_path: Path, recorded: list[bytes]) -> None:
    (tmp_path / "short.jsonl").write_bytes(b"\n".join(recorded[-8:]))
    with terminal("--replay", tmp_path / "short.jsonl", cwd=tmp_path, width=80, height=24) as tty:
        tty.wait("the replay has ended")
        tty.press(" ", "this is a replay: nothing is done")
        tty.press("q")
        assert tty.ended() == 0


def test_once(served: Serving, recorded: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_monitor(MonitorOptions(url=served.url, once=True))
    text = capsys.readouterr().out
    assert "1 pipeline" in text and "worker-1" in text and "\x1b" not in text
    run_monitor(MonitorOptions(url=served.url, once=True, as_json=True))
    assert [worker["name"] for worker in json.loads(capsys.readouterr().out)["workers"]] == ["worker-0", "worker-1"]
    run_monitor(MonitorOptions(replay=RECORDED, once=True, as_json=True))
    assert json.loads(capsys.readouterr().out) == json.loads(recorded[-1])
    run_monitor(MonitorOptions(replay=RECORDED, once=True))
    last = json.loads(recorded[-1])
    assert re.search(rf"decoding[\s\S]*\b{last['stages']['decoding']}\b", capsys.readouterr().out)
    (tmp_path / "empty").write_bytes(b"")
    record = tmp_path / "made.jsonl.gz"
    with pytest.raises(MonitorError):
        run_monitor(MonitorOptions(url="http://127.0.0.1:9", once=True, as_json=True, record=record))
    assert not record.exists()  # nothing has come
    run_monitor(MonitorOptions(replay=RECORDED, once=True, record=record))
    assert list(read_events(record)) == recorded and len(record.read_bytes()) < 200_000
    record.write_bytes(record.read_bytes()[:50_000])  # its writer was killed
    assert 10 < len(list(read_events(record))) < len(recorded)
    for options, error in (
        (MonitorOptions(url="localhost:8000"), "not the address of a server"),
        (MonitorOptions(url=served.url + "/path"), "not the address of a server"),
        (MonitorOptions(as_json=True), "--json needs --once"),
        (MonitorOptions(demo_load=1.0, once=True), "--demo-load needs a live monitor"),
        (MonitorOptions(), "needs a terminal"),
        (MonitorOptions(once=True, replay=tmp_path / "empty"), "holds no event"),
        (MonitorOptions(replay=record, record=tmp_path / "." / record.name), "would overwrite what --replay reads"),
    ):
        with pytest.raises(ValueError, match=error):
            run_monitor(options)
    with pytest.raises(MonitorError, match=r"no server answers at http://127.0.0.1:9 \(minidisagg serve starts one"):
        run_monitor(MonitorOptions(url="http://127.0.0.1:9", once=True))


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The URL of some program that answers 200 to everything: with these bodies in turn, and the last for ever."""
    bodies = [*answers]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.pop(0) if len(bodies) > 1 else bodies[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_another_program_on_the_port(tmp_path: Path, recorded: list[bytes]) -> None:
    for body in (b"<html>hello</html>", b"[1]", b"\xff\xfe", b"{}"):
        with answering(body) as url, pytest.raises(MonitorError, match=rf"{url} is no minidisagg server"):
            run_monitor(MonitorOptions(url=url, once=True))
    event = b"data: " + recorded[-1] + b"\n\n"
    with answering(recorded[-1], event, b"<html>hello</html>") as url, terminal(url, cwd=tmp_path) as tty:
        tty.wait("server gone: not an event of the monitor")
        tty.press("q")
        assert tty.ended() == 0


def test_another_version_is_refused_in_one_line(tmp_path: Path, recorded: list[bytes]) -> None:
    ours = b'"version":%d,' % VERSION
    newer, older = (recorded[-1].replace(ours, other, 1) for other in (b'"version":99,', b""))
    for body, said in ((newer, "version 99"), (older, "no version")):
        said = f"the event has {said}, and this minidisagg reads version {VERSION}"
        with answering(body) as url, pytest.raises(MonitorError, match=f"^{url}: {said}"):
            run_monitor(MonitorOptions(url=url, once=True))
        (tmp_path / "other.jsonl").write_bytes(body)
        with pytest.raises(ValueError, match=rf"other\.jsonl, line 1: {said}"):
            run_monitor(MonitorOptions(replay=tmp_path / "other.jsonl", once=True))
    first, second = (b"data: " + event + b"\n\n" for event in (recorded[-1], newer))
    with answering(recorded[-1], first, second) as url, terminal(url, cwd=tmp_path) as tty:  # it was restarted
        assert tty.ended() == 1
        assert b"the event has version 99" in tty.raw


def test_the_schema_has_all_that_workers_say() -> None:
    for ours, theirs in ((WorkerStats, Stats), (LinkState, LinkStats), (StoreState, StoreStats)):
        assert ours.__struct_fields__ == theirs.__struct_fields__


def test_a_load_that_fails_is_counted() -> None:
    async def trouble(url: str) -> str:
        async with aiohttp.ClientSession(url) as session:
            load = DemoLoad(session, 100.0)
            task = asyncio.create_task(load.run())
            async with asyncio.timeout(30):
                while not load.failed:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return load.trouble

    for body in (b"{}", b"[]", b"hello", b'{"vocab_size": "many"}'):
        with answering(body) as url:
            assert re.fullmatch(r"\d+ failed", asyncio.run(trouble(url)))
    assert "3 failed" in text_of(state_of(snapshot()), Ui(load=1.0, trouble="3 failed"))


def test_migrations_are_counted_beside_the_links() -> None:
    assert "migrated" not in text_of(state_of(snapshot()))
    assert re.search(r"4 links 12 migrated ─", text_of(state_of(snapshot(migrations=12))))


def test_the_first_plus_starts_a_load(served: Serving, tmp_path: Path) -> None:
    with terminal(served.url, cwd=tmp_path) as tty:
        tty.wait("● live")
        tty.press("+", r"load 0.5/s +● live")
        tty.press("+", "load 1/s")
        tty.press("-", "load 0.5 requests/s")
        tty.press("q")
        assert tty.ended() == 0


# ---------------------------------------------------------------- serve --monitor


def family(pid: int) -> list[int]:
    """The processes below this one, its children first."""
    try:
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []
    return children + [one for child in children for one in family(child)]


def until_gone(pids: list[int]) -> None:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + 60
    while left := list(filter(runs, pids)):
        assert time.monotonic() < end, f"{left} are left"
        time.sleep(0.05)


SERVE = ("-m", "minidisagg", "serve", "dummy:tiny", "--monitor", "--demo-load")


@needs_two_cores
def test_serve_with_a_monitor_and_a_load(tmp_path: Path) -> None:
    with terminal("--port", "0", cwd=tmp_path, program=SERVE) as tty:
        tty.wait(r"load 1/s +● live[\s\S]*worker-0 both +up +1[\s\S]*worker-1 both +up +1")
        pids = family(tty.process.pid)
        assert len(pids) >= 3  # the server and two workers
        tty.press("+", "load 2/s")
        tty.press("m", "mode disagg: done")
        tty.wait(r"worker-0 prefill +up[\s\S]*worker-1 decode +up")
        tty.wait(r"w0→w1 |worker-0 → worker-1 ")
        tty.wait("│disagg")
        tty.press("f", "worker-0 becomes decode: that would leave no worker for prefill")
        tty.press("m", r"worker-0 both +up")
        tty.press("f", r"worker-0 prefill +up")
        tty.press("K", r"kill worker-0\?.*y/n")
        tty.press("y", "kill worker-0: done")
        tty.wait(r"worker-0 is up, epoch 2[\s\S]*worker-0 is down, epoch 1")
        tty.wait(r"worker-0 \w+ +up +2")
        pids += family(tty.process.pid)
        os.kill(pids[0], signal.SIGSTOP)
        tty.wait("server hangs: no event for 5 s")
        assert "server hangs, reconnecting" in tty.text
        os.kill(pids[0], signal.SIGCONT)
        tty.wait("connected again")
        tty.press("q")
        assert tty.ended() == 0
    until_gone(pids)


@needs_two_cores
def test_whatever_ends_it_ends_the_server(tmp_path: Path) -> None:
    def started(tty: Terminal) -> list[int]:
        tty.wait("starting the server")
        end = time.monotonic() + 60
        while not (pids := family(tty.process.pid)):
            assert time.monotonic() < end
            time.sleep(0.05)
        return pids

    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        terminal("--port", str(other.getsockname()[1]), cwd=tmp_path, program=SERVE) as taken,
        terminal("--port", "0", cwd=tmp_path, program=SERVE) as hung_up,
        terminal("--port", "0", cwd=tmp_path, program=SERVE) as killed,
        terminal("--port", "0", cwd=tmp_path, program=SERVE) as loses,
    ):
        pids = started(hung_up) + started(killed)
        hung_up.process.send_signal(signal.SIGHUP)
        killed.process.kill()
        assert hung_up.process.wait(60) == 130
        assert taken.process.wait(60) == 1
        taken.read(0.1)
        assert re.search(rb"minidisagg: error: cannot listen on 127.0.0.1:\d+: Address already in use", taken.raw)
        until_gone(pids)
        loses.wait("● live")
        pids = family(loses.process.pid)
        os.kill(pids[0], signal.SIGKILL)
        assert loses.ended() == 1
        assert re.search(rb"minidisagg: error: the server has ended, last: .*\d", loses.raw)
        until_gone(pids)


# ---------------------------------------------------------------- what the server says


def test_requests_that_a_worker_has_queued_are_waiting() -> None:
    with serving(partial(fake_engine, 4.0)) as served:
        worker = served.frontend.workers["worker-0"]
        worker.max_num_seqs = 2

        async def submit() -> None:
            for _ in range(5):
                served.frontend.submit([1, 2], SamplingParams(max_tokens=50), lambda *_: None)

        async def state() -> Any:
            await served.frontend.fresh_stats()
            return served.server.admin.snapshot()

        served.call(submit())
        began = time.monotonic()
        now = served.call(state())
        assert now.stages == {"waiting": 3, "prefilling": 0, "transferring": 0, "decode_waiting": 0, "decoding": 2}
        assert [request.stage for request in now.requests] == ["decoding"] * 2 + ["waiting"] * 3
        assert now.oldest["waiting"] == pytest.approx(time.monotonic() - began, abs=0.2)
        assert now.oldest["decoding"] == pytest.approx(now.oldest["waiting"] - 0.25, abs=0.15)  # since its first token
        assert all(request.in_stage <= request.age for request in now.requests)


def test_ages_are_of_the_stage() -> None:
    """A request is followed through all stages, by snapshots of a router whose workers say what is told here."""
    with serving(partial(fake_engine, 0.001, workers=2)) as served:
        admin, router = served.server.admin, served.frontend.router

        async def follow() -> None:
            served.frontend.submit([1, 2], SamplingParams(max_tokens=50), lambda *_: None)
            request = next(iter(router.requests.values()))
            worker, begin = request.prefill, request.arrival

            def at(clock: float, waiting: int = 0, held: int = 0, **fields: Any) -> tuple[str, float]:
                router.stats[worker] = msgspec.structs.replace(router.stats[worker], waiting=waiting, held=held)
                for name, value in fields.items():
                    setattr(request, name, value)
                state = admin._requests(begin + clock)[0]
                return state.stage, round(state.in_stage, 3)

            assert at(1.0, waiting=1) == ("waiting", 1.0)
            assert at(1.5) == ("prefilling", 0.0)
            assert at(2.0) == ("prefilling", 0.5)
            moved = {"stage": TrackedStage.TRANSFER, "stage_at": begin + 2.1}
            assert at(2.5, held=1, **moved) == ("transferring", 0.4)
            assert at(2.8) == ("decode_waiting", 0.0)
            assert at(3.0) == ("decode_waiting", 0.2)
            there = {"stage": TrackedStage.DECODE, "stage_at": begin + 3.1}
            assert at(3.5, **there) == ("decoding", 0.4)
            assert at(9.0, stage=TrackedStage.TRANSFER) == ("decode_waiting", 5.9)  # nobody has watched

        served.call(follow())


def test_a_late_listener_gets_the_last_ends_and_events(served: Serving) -> None:
    history = served.server.history

    async def fill() -> None:
        served.frontend.pause(True)
        served.frontend.pause(False)
        done = asyncio.Event()
        served.frontend.submit([1, 2], SamplingParams(max_tokens=1), lambda emit, _: done.set())
        await done.wait()
        for _ in range(600):  # more steps than it gets
            history.on_message(Envelope("worker-0", 1, StepOutput(1, [])), time.monotonic())

    async def first() -> Snapshot:
        async with aiohttp.ClientSession() as session, session.get(f"{served.url}/admin/events?hz=20") as answer:
            return decode((await answer.content.readuntil(b"\n\n")).removeprefix(b"data: "))

    served.call(fill())
    event = asyncio.run(first())
    assert "admission resumed" in [one.text for one in event.events]
    assert len(event.steps) <= 512


def test_percentiles_are_of_the_last_minute_and_right_to_a_percent() -> None:
    recent, rng = Recent(), random.Random(3)
    assert recent.percentiles(5.0) == []
    for n in range(400):  # outlived
        recent.add(50.0, n * 0.1)
    values = [rng.lognormvariate(-4.0, 1.0) for _ in range(100_000)]
    for n, value in enumerate(values):
        recent.add(value, 101.0 + n * 58.0 / len(values))
    expected = [sorted(values)[int(share * len(values))] for share in (0.5, 0.9, 0.99)]
    assert recent.percentiles(159.0) == pytest.approx(expected, rel=0.01)
    assert recent.percentiles(300.0) == []
    assert sum(len(counts) for _, counts in recent._seconds) < 60 * 1000


def test_the_recording_is_small() -> None:
    assert RECORDED.stat().st_size < 200_000
    with gzip.open(RECORDED) as lines:
        assert sum(1 for _ in lines) > 100

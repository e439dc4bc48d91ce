"""The timeline of a real disaggregated run: what it must contain, and that clocks do not matter."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import cluster
import pytest
from cluster import needs_two_cores

from minidisagg.config import RunSettings
from minidisagg.core.messages import Envelope, PieceSpan, PieceSpans, Role, Stats, StepOutput, TokenOut
from minidisagg.core.tracked import Emit, StageTimes
from minidisagg.measure.timeline import STAGES, Timeline, write_timeline

Events = list[dict[str, Any]]
NEAR = 2e-3  # seconds


def of(events: Events, **wanted: Any) -> Events:
    return [event for event in events if all(event.get(key) == value for key, value in wanted.items())]


def ends(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def assert_nested(events: Events) -> None:
    """On each track a span lies in another or beside it, in whole nanoseconds; flows bind to spans of their tracks."""
    tracks = defaultdict(list)
    for event in of(events, ph="X"):
        begin = round(event["ts"] * 1e3)
        assert abs(event["ts"] * 1e3 - begin) < 0.3, "nanoseconds"
        tracks[event["pid"], event["tid"]].append((begin, begin + round(event["dur"] * 1e3)))
    for spans in tracks.values():
        spans.sort(key=lambda span: (span[0], -span[1]))
        around: list[int] = []  # ends of the spans around the next one
        for begin, end in spans:
            assert begin < end
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1], (begin, end, around)
            around.append(end)
    for flow in (event for event in events if event["ph"] in "sf"):
        at, spans = round(flow["ts"] * 1e3), tracks[flow["pid"], flow["tid"]]
        assert any(begin <= at < end and (flow["ph"] == "s" or begin < at) for begin, end in spans)


class Told(Timeline):
    """A timeline that remembers what it heard, and when."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.heard: list[tuple[str, float, Any]] = []

    def on_message(self, envelope: Envelope, now: float) -> None:
        super().on_message(envelope, now)
        self.heard.append((envelope.source, now, envelope.body))


async def run(path: Path, offsets: dict[str, float]) -> Told:
    settings = RunSettings(trace=True, clock_offsets=offsets)
    async with cluster.cluster(cluster.settings("disagg", link="unix"), settings) as frontend:
        timeline = Told("disagg")
        frontend.observers.append(timeline)
        load = cluster.Load(frontend)
        for prompt in cluster.prompts(24, longest=200):
            load.submit(prompt, cluster.greedy(20))
        await load.finished()
        await frontend.fresh_stats()
    write_timeline(path, [timeline])
    return timeline


@needs_two_cores
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_spans_nest_add_up_and_line_up(tmp_path: Path, offset: float) -> None:
    path = tmp_path / "trace.json"
    told = asyncio.run(run(path, {"decode-0": offset}))
    document = json.loads(path.read_text())
    assert list(document) == ["otherData", "displayTimeUnit", "traceEvents"] and document["otherData"] == {"version": 1}
    events: Events = document["traceEvents"]
    assert_nested(events)

    requests = of(events, cat="request")
    assert len(requests) == 24
    for request in requests:
        stages = of(events, cat="stage", tid=request["tid"])
        assert sum(stage["dur"] for stage in stages) == pytest.approx(request["dur"], abs=0.01)
        assert [stage["name"] for stage in stages] == [name for name in STAGES if name in {s["name"] for s in stages}]
        assert stages[0]["ts"] == request["ts"]
        assert all(ends(one) == pytest.approx(two["ts"], abs=0.001) for one, two in pairwise(stages))

    names = {event["args"]["name"]: event["pid"] for event in of(events, name="process_name")}
    front, prefill, decode = names["disagg requests"], names["disagg prefill-0"], names["disagg decode-0"]
    steps = of(events, cat="step")
    assert sum(step["args"]["prefill_tokens"] for step in of(steps, pid=prefill)) >= 24 * 8
    assert {step["name"] for step in of(steps, pid=decode)} == {"decode"}
    assert of(events, ph="C", name="queue", pid=prefill) and of(events, ph="C", name="pages", pid=decode)
    waiting = [event["args"]["requests"] for event in of(events, ph="C", name="waiting", pid=front)]
    assert len(waiting) == 48 and max(waiting) >= 12 and min(waiting) == waiting[-1] == 0

    starts, finishes = of(events, ph="s"), of(events, ph="f")
    assert len(starts) >= 24 and {flow["id"] for flow in starts} == {flow["id"] for flow in finishes}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in of(events, name="thread_name")}
    sends, receives = of(events, cat="transfer", ph="X", pid=prefill), of(events, cat="transfer", ph="X", pid=decode)
    assert {tracks[prefill, e["tid"]] for e in sends} == {"sends to decode-0"}
    assert {tracks[decode, e["tid"]] for e in receives} == {"receives from prefill-0"}
    sent = {(e["args"]["request"], e["args"]["seq"]): e for e in sends}
    for received in receives:
        piece = sent[received["args"]["request"], received["args"]["seq"]]
        assert received["args"]["bytes"] == piece["args"]["bytes"] > 0
        assert ends(received) > piece["ts"] - 1e6 * NEAR, "nothing lands before it is sent"

    # All processes of a host share one clock, so the injected offset is the truth.
    true = {"prefill-0": 0.0, "decode-0": offset}
    for (name, _), ahead in told.ahead.items():
        assert ahead == pytest.approx(true[name], abs=NEAR)
    late, pieces = [], defaultdict(list)
    reports = {pid: iter(of(steps, pid=pid)) for pid in (prefill, decode)}
    for name, now, body in told.heard:
        if isinstance(body, StepOutput):
            step = next(reports[names[f"disagg {name}"]])
            assert [token.request_id for token in body.tokens] == step["args"]["requests"]
            assert ends(step) / 1e6 == pytest.approx(body.clock - true[name], abs=NEAR)
            late.append(now - ends(step) / 1e6)
        elif isinstance(body, PieceSpans):
            pieces[name] += [piece.ended - true[name] for piece in body.spans]
    assert not any(list(left) for left in reports.values())
    assert -1e-6 < min(late) and median(late) < NEAR, "a step ends as its report comes, and not after it"
    for name, events_of in (("prefill-0", sends), ("decode-0", receives)):
        assert [ends(e) / 1e6 for e in events_of] == pytest.approx(sorted(pieces[name]), abs=NEAR)
    # A request's steps end in its span, on the front end's clock.
    for request in requests:
        name = request["name"].split()[1]
        own = [step for step in steps if name in step["args"]["requests"]]
        assert own and all(request["ts"] < step["ts"] and ends(step) < ends(request) for step in own)


def report(worker: str, clock: float, *tokens: str, role: Role = Role.BOTH) -> tuple[Envelope, Envelope]:
    """A step of 10 ms that ended at `clock`, and statistics."""
    out = [TokenOut(name, 0, 0, 0) for name in tokens]
    step = StepOutput(1, out, 0.01, 0, len(out), clock=clock)
    return Envelope(worker, 1, step), Envelope(worker, 1, Stats(role, *[0] * 11, clock=clock))


def test_the_least_delayed_report_sets_the_clock() -> None:
    timeline = Timeline()
    for sent, delay in ((1.0, 0.5), (2.0, 0.001), (3.0, 0.2)):
        timeline.on_message(report("w", sent + 7.0)[0], sent + delay)
    timeline.on_message(report("w", 11.0)[1], 4.3)
    found = of(timeline.events(), cat="step")
    assert [round(ends(step) / 1e6, 6) for step in found[:3]] == [1.001, 2.001, 3.001]


@pytest.mark.parametrize("latency", [0.0, 0.02])
def test_every_track_nests_with_one_prefill_and_two_decode_workers(latency: float) -> None:
    """Each link carries one piece at a time (unless its latency is emulated), and two of them work side by side."""
    rng, timeline = random.Random(1), Timeline("disagg")
    for name in ("p", "d0", "d1"):
        for message in report(name, 1e6 + 7.0):
            timeline.on_message(message, 1e6)
        at = 1e6
        for _ in range(200):  # a step ahead: the news of the one before may be stamped late
            at += 0.01
            timeline.on_message(report(name, at + 7.0 + 0.003 * rng.random())[0], at + 0.01)
    seq = 0
    for peer in ("d0", "d1"):
        ended = 1e6 + 7.0
        for _ in range(300):
            seq, begun = seq + 1, ended + rng.choice((0.0, 0.001)) * rng.random()
            ended = begun + rng.choice((0.0, 1e-3)) * rng.random()
            for name, other, send in (("p", peer, True), (peer, "p", False)):
                piece = PieceSpan(other, 1, seq, send, "r", begun, begun - latency * send, ended, 9, True)
                timeline.on_message(Envelope(name, 1, PieceSpans([piece])), 1e6 + 9.0)
    for number in range(300):
        stages = [rng.choice((0.0, rng.random())) for _ in STAGES]
        times = StageTimes(*stages, e2e=sum(reversed(stages)))  # the same but for its last digit
        timeline.on_emit(Emit(str(number), finish="length", times=times), 1e6 + 10.0 + rng.random())
    events = timeline.events()
    assert_nested(events)
    names = {event["args"]["name"] for event in of(events, name="thread_name", pid=4)}
    assert {"steps", "sends to d0", "sends to d1"} <= names
    assert (len(names) == 3) == (not latency), "what overlaps on one link has a track beside it"
    assert of(events, ph="C", name="waiting")[-1]["args"]["requests"] == 0


def test_deaths_flips_and_changes_of_policy_are_instants() -> None:
    timeline = Timeline()
    for role in (Role.PREFILL, Role.PREFILL, Role.BOTH):
        timeline.on_message(report("w", 1.0, role=role)[1], 1.0)
    timeline.on_event("policy sarathi")
    timeline.on_event("w is down, epoch 1")
    instants = of(timeline.events(), ph="i", pid=1)
    assert [event["name"] for event in instants] == ["w is both now", "policy sarathi", "w is down, epoch 1"]
    assert instants[0]["ts"] == 1e6 < instants[1]["ts"] <= instants[2]["ts"]

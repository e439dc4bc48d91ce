"""The timeline of a real disaggregated run: what it must contain, and that clocks do not matter."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import cluster
import pytest
from cluster import needs_two_cores

from minidisagg.config import RunSettings
from minidisagg.core.messages import Envelope, Role, Stats, StepOutput
from minidisagg.measure.timeline import STAGES, Timeline, write_timeline

Events = list[dict[str, Any]]


def of(events: Events, **wanted: Any) -> Events:
    return [event for event in events if all(event.get(key) == value for key, value in wanted.items())]


def ends(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


async def run(path: Path, offsets: dict[str, float]) -> None:
    settings = RunSettings(trace=True, clock_offsets=offsets)
    async with cluster.cluster(cluster.settings("disagg", link="unix"), settings) as frontend:
        timeline = Timeline("disagg")
        frontend.observers.append(timeline)
        load = cluster.Load(frontend)
        for prompt in cluster.prompts(24, longest=200):
            load.submit(prompt, cluster.greedy(20))
        await load.finished()
        await frontend.fresh_stats()
    write_timeline(path, [timeline])


@needs_two_cores
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_spans_nest_add_up_and_line_up(tmp_path: Path, offset: float) -> None:
    path = tmp_path / "trace.json"
    asyncio.run(run(path, {"decode-0": offset}))
    events: Events = json.loads(path.read_text())["traceEvents"]

    requests = of(events, cat="request")
    assert len(requests) == 24
    for request in requests:
        stages = of(events, cat="stage", tid=request["tid"])
        assert sum(stage["dur"] for stage in stages) == pytest.approx(request["dur"], abs=1.0)
        assert [stage["name"] for stage in stages] == [name for name in STAGES if name in {s["name"] for s in stages}]
        assert stages[0]["ts"] == pytest.approx(request["ts"], abs=1.0) and ends(stages[-1]) <= ends(request) + 1.0

    names = {event["args"]["name"]: event["pid"] for event in of(events, name="process_name")}
    prefill, decode = names["disagg prefill-0"], names["disagg decode-0"]
    steps = of(events, cat="step")
    assert sum(step["args"]["prefill_tokens"] for step in of(steps, pid=prefill)) >= 24 * 8
    assert {step["name"] for step in of(steps, pid=decode)} == {"decode"}

    starts, finishes = of(events, ph="s"), of(events, ph="f")
    assert len(starts) >= 24 and {flow["id"] for flow in starts} == {flow["id"] for flow in finishes}
    sent = {(e["args"]["request"], e["args"]["seq"]): e for e in of(events, cat="transfer", ph="X", pid=prefill)}
    for received in of(events, cat="transfer", ph="X", pid=decode):
        piece = sent[received["args"]["request"], received["args"]["seq"]]
        assert received["args"]["bytes"] == piece["args"]["bytes"] > 0
        # No piece arrives before it is sent, and none takes long: within 2 ms whatever the clocks say.
        assert ends(received) > piece["ts"] - 2000
        assert ends(received) < ends(piece) + 100_000
    # A request's first decode step ends in its decode stages, on the front end's clock.
    for request in requests:
        name = request["name"].split()[1]
        own = [step for step in steps if name in step["args"]["requests"]]
        assert own and all(request["ts"] - 2000 <= step["ts"] and ends(step) <= ends(request) + 2000 for step in own)
    assert of(events, ph="C", name="queue", pid=prefill) and of(events, ph="C", name="pages", pid=decode)


def test_the_least_delayed_report_sets_the_clock() -> None:
    timeline = Timeline()
    for sent, delay in ((1.0, 0.5), (2.0, 0.001), (3.0, 0.2)):
        body = StepOutput(1, [], 0.1, 0, 4, clock=sent + 7.0)
        timeline.on_message(Envelope("w", 1, body), sent + delay)
    timeline.on_message(Envelope("w", 1, Stats(Role.BOTH, *[0] * 11, clock=11.0)), 4.3)
    found = of(timeline.events(), cat="step")
    assert [round(ends(step) / 1e6, 6) for step in found[:3]] == [1.001, 2.001, 3.001]

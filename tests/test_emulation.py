"""The emulated interconnect: how it is written, when pieces count, and that the time of the real link is part of it."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
import torch
from cluster import Load, cluster, greedy, needs_two_cores, random_prompt, run_to_end, settings
from linkpair import TWO_SIDED, MakePair, Pair, bits, collect, make_cache, open_link
from msgspec.structs import replace

from minidisagg.core.inputs import PieceDone
from minidisagg.core.plan import Piece
from minidisagg.core.tracked import StageTimes
from minidisagg.interconnect import PRESETS, Interconnect, parse_interconnect
from minidisagg.transfer import emulate
from minidisagg.transfer.emulate import DelayLine, Nic, announcement, make_nic

PAGES = [1, 2]
COUNT = 4
SENDING, LATENCY = 0.05, 0.1  # seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25Gbps,20us", Interconnect(25e9 / 8, 20e-6)),
        ("25 Gbit/s, 20 µs, 5us", Interconnect(25e9 / 8, 20e-6, 5e-6)),
        ("4.5GBps", Interconnect(4.5e9)),
        (".5GB/s,1.5ms", Interconnect(0.5e9, 1.5e-3)),
        ("800MB/s,0us,1s", Interconnect(800e6, 0.0, 1.0)),
        ("100kbps", Interconnect(12.5e3)),
        ("100g-roce", Interconnect(12.5e9, 5e-6)),
    ],
)
def test_interconnects_are_read(text: str, expected: Interconnect) -> None:
    read = parse_interconnect(text)
    assert read is not None
    values = [(read.bandwidth, expected.bandwidth), (read.latency, expected.latency), (read.jitter, expected.jitter)]
    assert all(value == pytest.approx(wanted) for value, wanted in values)


@pytest.mark.parametrize(
    "text",
    ["foo", "", "25", "25Gb", "25Gbps,20", "25Gbps,", "0Gbps", "-1Gbps", "nanGbps", "20us", "1Gbps,1s,1s,1s", "NVLINK"],
)
def test_what_is_no_interconnect_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_interconnect(text)
    assert str(refused.value) == (
        f"no interconnect {text!r}; known: none, 10g-tcp, 100g-roce, 400g-ib, nvlink, "
        "or BANDWIDTH,LATENCY[,JITTER] as in 25Gbps,20us"
    )


def test_nothing_is_emulated_unless_asked_for() -> None:
    assert parse_interconnect("none") is None and make_nic("none") is None
    nic = make_nic("10g-tcp")
    assert nic is not None and nic.interconnect == PRESETS["10g-tcp"]


def test_what_this_host_cannot_show_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulate, "copy_rate", lambda: 9.87e9)
    assert announcement("10g-tcp", PRESETS["10g-tcp"]) == "emulated 10g-tcp (1.25 GB/s, 50 µs; nominal)"
    assert announcement("1GB/s,2ms,1ms", Interconnect(1e9, 2e-3, 1e-3)) == (
        "emulated 1GB/s,2ms,1ms (1 GB/s, 2e+03 µs + 1e+03 µs)"
    )
    assert announcement("400g-ib", PRESETS["400g-ib"]) == (
        "emulated 400g-ib (50 GB/s, 3 µs; nominal): this host copies memory at 9.9 GB/s, "
        "so what is faster than that is not seen"
    )


def test_the_copy_rate_of_a_host_is_measured() -> None:
    assert 1e8 < emulate.copy_rate() < 1e12


def test_pieces_take_turns_on_the_card_and_travel_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(emulate.time, "monotonic", lambda: now)
    nic = Nic(Interconnect(1000.0, 5.0))
    assert nic.admit(2000) == (100.0, 107.0)
    assert nic.admit(1000) == (102.0, 108.0), "sent after the first, while that one travels"
    now = 110.0
    assert nic.admit(1000) == (110.0, 116.0), "an idle card saves nothing up"
    assert nic.interconnect.slowest(1000) == 6.0


def test_jitter_comes_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulate.time, "monotonic", lambda: 0.0)
    nic = Nic(Interconnect(1e9, 1.0, 0.5))
    extra = [nic.admit(0).arrives - 1.0 for _ in range(200)]
    assert 0.0 <= min(extra) < 0.05 and 0.45 < max(extra) <= 0.5


def piece_done(seq: int) -> PieceDone:
    return PieceDone("d", 1, seq, True, True)


def test_a_delay_line_keeps_the_order_and_no_time_is_early() -> None:
    heard: list[tuple[int, float]] = []
    line = DelayLine(lambda done: heard.append((done.seq, time.monotonic())))
    now = time.monotonic()
    due = [now + 0.06, now + 0.02, 0.0, now + 0.1]
    for seq, arrives in enumerate(due):
        line.put(piece_done(seq), arrives)
    while len(heard) < COUNT:
        time.sleep(0.001)
    line.finish()
    assert [seq for seq, _ in heard] == [0, 1, 2, 3]
    assert all(at >= arrives for (_, at), arrives in zip(heard, due, strict=True))
    assert heard[2][1] - due[0] < 0.03 and heard[3][1] - due[3] < 0.03


def test_a_delay_line_that_ends_holds_nothing_back() -> None:
    heard: list[int] = []
    line = DelayLine(lambda done: heard.append(done.seq))
    for seq in range(3):
        line.put(piece_done(seq), time.monotonic() + 60.0)
    line.finish()
    assert heard == [0, 1, 2]


def started(pair: Pair, first: int = 0) -> float:
    """`COUNT` pieces sent at once, from this number on; returns when."""
    assert pair.link is not None
    numbers = range(first, first + COUNT)
    if not pair.link.one_sided:
        for seq in numbers:
            pair.link.start(pair.op(seq, False, [5, 6], PAGES, (0, 3)))
    begun = time.monotonic()
    pair.tell("start", [pair.op(seq, True, PAGES, [5, 6], (0, 3)) for seq in numbers])
    return begun


def wire(pair: Pair) -> Interconnect:
    return Interconnect(bits(pair.sent[:, :, PAGES]).numel() / SENDING, LATENCY)


@pytest.mark.parametrize("kind", ["gloo", "shm", "unix"])
def test_both_ends_take_the_time_that_the_interconnect_does(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    link = pair.connect(wire(pair))
    started(pair)  # whoever sends and receives for the first time is slow
    if not link.one_sided:
        collect(link, COUNT)
    pair.tell("wait", COUNT)
    begun = started(pair, COUNT)
    heard: list[float] = []
    ends: list[list[PieceDone]] = []
    if not link.one_sided:
        ends.append([])
        for _ in range(COUNT):
            ends[0] += collect(link, 1)
            heard.append(time.monotonic())
    ends.append(pair.tell("wait", COUNT))
    for done in ends:
        assert all(c.ok for c in done)
        after = [c.ended - begun - LATENCY - (c.seq - COUNT + 1) * SENDING for c in done]
        # None is early, whatever else; how late they are is what the child takes to start them, and a host that stands
        # still for a moment adds to that for some.
        assert min(after) >= 0.0 and min(after) < 0.03, after
    assert all(at >= c.ended for c, at in zip(ends[0], heard, strict=False)), "not told before"
    took = [c.seconds - SENDING - LATENCY for c in ends[-1]]
    # Its thread may pick one up after it has begun on the wire, which takes that much off.
    assert max(took) == pytest.approx(0.0, abs=1e-3) and min(took) > -0.03, took


def test_a_real_link_that_is_slower_shows(make_pair: MakePair) -> None:
    pair = make_pair("unix")
    pair.connect(Interconnect(1e15))
    begun = started(pair)
    assert pair.link is not None
    for done in (*pair.tell("wait", COUNT), *collect(pair.link, COUNT)):
        assert done.ok and done.ended > begun and done.seconds > Interconnect(1e15).slowest(done.nbytes)


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_an_abort_waits_for_no_emulated_arrival(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    link = pair.connect(Interconnect(1e3))
    started(pair)
    while bool((bits(pair.kv[:, :, 6]) != bits(pair.sent[:, :, 2])).any()):
        time.sleep(0.001)
    time.sleep(0.05)
    assert link.poll() == [], "it is there, but does not count yet"
    begun = time.monotonic()
    assert pair.tell("abort") and link.abort(False)
    assert [c.seq for c in collect(link, COUNT, 1.0)] == [c.seq for c in pair.tell("wait", COUNT)] == list(range(COUNT))
    assert time.monotonic() - begun < 1.0
    assert not [thread for thread in threading.enumerate() if thread.name == "emulated-wire"]


def test_a_piece_of_an_unknown_codec_takes_no_time_of_the_card(make_pair: MakePair) -> None:
    pair = make_pair("unix")
    kv, fd = make_cache(pair.shape, torch.float32, 1)
    nic = Nic(Interconnect(1.0))
    link = open_link("unix", True, 1, kv, fd, pair.run_dir, 0.1, nic)
    link.start(Piece("peer", 1, 0, True, "r", 1, [1], [1], 1, (0, 3), codec="zip"))
    assert not collect(link, 1)[0].ok and nic.admit(0).begins <= time.monotonic()
    assert link.abort(True)


async def handoffs(kind: str, interconnect: str) -> list[StageTimes]:
    """Of a few requests, each alone, all of it after the prefill."""
    rng, times = random.Random(0), list[StageTimes]()
    async with cluster(replace(settings("disagg", kind, granularity="request"), emulate_link=interconnect)) as frontend:
        await run_to_end(frontend, [random_prompt(rng, 30)], greedy(4))  # opens the link
        for _ in range(3):
            load = Load(frontend)
            result = load.submit(random_prompt(rng, 30), greedy(4))
            await load.finished()
            assert result.times is not None
            times.append(result.times)
        stats = await frontend.fresh_stats()
        assert "as " + interconnect in str(frontend.hellos["prefill-0"].info["link"])
    assert sum(link.late for worker in stats.values() for link in worker.links) == 0
    return times


@needs_two_cores
@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_handoff_takes_the_emulated_time(kind: str) -> None:
    times = [stages.transfer for stages in asyncio.run(handoffs(kind, "320kB/s,100ms"))]
    # 4 pages of 8 KiB: 102 ms and 100 ms. A busy host may tell of one request's first or second token late.
    assert min(times) < 0.202 + 0.03 and max(times) > 0.202 - 0.03, times

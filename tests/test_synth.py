from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from minidisagg.workload.lengths import WorkItem, with_prompts
from minidisagg.workload.synth import GRID, SYNTH, Lengths, statistics, synth_items
from minidisagg.workload.traces import MOONCAKE_BLOCK, load_trace

COUNT = 12_000  # about the length of the Mooncake conversation trace: the share of hits grows with the past
SEEDS = (0, 1, 2)


def _shape(items: list[WorkItem]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(item.prompt_len, item.output_len, item.blocks) for item in items]


def _idle_seconds(items: list[WorkItem]) -> float:
    return 1 - len({int(item.arrival_s) for item in items}) / items[-1].arrival_s


@pytest.mark.parametrize("name", SYNTH)
def test_synthetic_statistics_are_those_of_the_trace(name: str) -> None:
    real = SYNTH[name].real
    for seed in SEEDS:
        items = synth_items(name, COUNT, seed)
        found = statistics(items)
        for made, published in ((found.prompt, real.prompt), (found.output, real.output)):
            assert made.mean == pytest.approx(published.mean, rel=0.1)
            for ours, theirs in ((made.p50, published.p50), (made.p90, published.p90)):
                assert math.isnan(theirs) or ours == pytest.approx(theirs, rel=0.1)
            assert math.isnan(published.p99) or made.p99 == pytest.approx(published.p99, rel=0.25)  # of 120 requests
        assert found.hit_rate == pytest.approx(real.hit_rate, abs=0.05)
        assert found.gap_cv == pytest.approx(real.gap_cv, rel=0.15, nan_ok=True)
        if math.isfinite(rate := SYNTH[name].arrivals.request_rate):
            assert items[-1].arrival_s == pytest.approx(COUNT / rate, abs=3.0)  # a tick of Mooncake's
        if name == "azure-code-2023":
            assert _idle_seconds(items) == pytest.approx(0.73, abs=0.05)


@pytest.mark.parametrize("name", SYNTH)
def test_tables_are_whole(name: str) -> None:
    for kind in SYNTH[name].kinds:
        for table in (kind.prompt, kind.output):
            assert len(table) == len(GRID) and table[0] >= 1 and list(table) == sorted(table)
        assert kind.system_blocks * MOONCAKE_BLOCK <= kind.prompt[0]  # no prompt is shorter than its beginning
    assert sum(kind.share for kind in SYNTH[name].kinds) == pytest.approx(1)
    assert SYNTH[name].file.startswith("https://") and SYNTH[name].about.strip()


@pytest.mark.parametrize("name", SYNTH)
def test_an_item_depends_on_name_seed_and_index_only(name: str) -> None:
    items = synth_items(name, 1500, seed=7)
    assert synth_items(name, 1500, seed=7) == items
    assert _shape(synth_items(name, 600, seed=7)) == _shape(items)[:600]
    assert _shape(synth_items(name, 600, seed=7, request_rate=3.0)) == _shape(items)[:600]
    assert _shape(synth_items(name, 600, seed=8)) != _shape(items)[:600]
    assert [item.index for item in items] == list(range(1500))
    assert all(item.prompt_len >= 1 and item.output_len >= 1 for item in items)
    assert synth_items(name, 0) == []


def test_a_rate_stretches_the_same_pattern() -> None:
    for name in SYNTH:
        slow, fast = (synth_items(name, 500, seed=3, request_rate=rate) for rate in (2.0, 8.0))
        times = [item.arrival_s for item in slow]
        assert times == sorted(times) and 0 < times[-1] <= 250.0
        assert [item.arrival_s for item in fast] == pytest.approx([t / 4 for t in times])
        assert {item.arrival_s for item in synth_items(name, 9, request_rate=math.inf)} == {0.0}
    assert {item.arrival_s for item in synth_items("sharegpt", 9)} == {0.0}  # it has no times of its own
    with pytest.raises(ValueError, match="rate must be positive"):
        synth_items("burstgpt", 3, request_rate=0.0)


def test_unknown_names_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError) as caught:
        synth_items("azure-conv", 1)
    message = str(caught.value)
    assert message.startswith("unknown synthetic workload 'azure-conv', choose from azure-code-2023, azure-conv-2023,")
    assert all(name in message for name in SYNTH) and "\n" not in message


def test_ranks_correlate_as_they_should() -> None:
    items = synth_items("azure-conv-2024", COUNT)

    def ranks(values: list[int]) -> list[float]:
        places: dict[int, list[int]] = {}
        for place, value in enumerate(sorted(values)):
            places.setdefault(value, []).append(place)
        middle = (len(values) - 1) / 2
        return [(places[value][0] + places[value][-1]) / 2 - middle for value in values]

    a, b = ranks([item.prompt_len for item in items]), ranks([item.output_len for item in items])
    spearman = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    assert spearman == pytest.approx(0.39, abs=0.03)


def test_mooncake_shares_prompts_as_the_trace_does() -> None:
    items = synth_items("mooncake-conversation", COUNT, seed=1)
    assert {item.blocks[0] for item in items} == {0}  # one system prompt
    assert all(len(item.blocks) == math.ceil(item.prompt_len / MOONCAKE_BLOCK) for item in items)
    seen: set[int] = set()
    shared = []  # of those that are a turn of something: which share of the prompt's blocks was there
    for item in items:
        hits = sum(block in seen for block in item.blocks)
        assert item.blocks[:hits] == tuple(block for block in item.blocks if block in seen)  # a prefix, no islands
        assert hits < len(item.blocks)
        seen.update(item.blocks)
        if hits > 1:
            shared.append(hits / len(item.blocks))
    assert len(shared) / len(items) == pytest.approx(0.387, abs=0.03)  # as in the file
    assert sorted(shared)[len(shared) // 2] == pytest.approx(0.80, abs=0.03)
    assert statistics(items[:1000]).hit_rate == pytest.approx(0.212, abs=0.05)  # its caches begin cold, too
    assert len({item.arrival_s for item in items}) == pytest.approx(len(items) / 10.2, rel=0.02)  # ticks

    tools = synth_items("mooncake-toolagent", COUNT, seed=1)
    roots = Counter(item.blocks[0] for item in tools)
    assert [roots[block] / len(tools) for block in (0, 1, 13)] == pytest.approx([0.463, 0.39, 0.146], abs=0.02)
    first, second, *_ = with_prompts([item for item in tools if item.blocks[0] == 1][:2], 5000)
    assert (first.prompt or [])[:6144] == (second.prompt or [])[:6144]


def test_statistics_of_a_trace(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 1000, "input_length": 1500, "output_length": 6, "hash_ids": [7, 8, 10]},
        {"timestamp": 4000, "input_length": 600, "output_length": 7, "hash_ids": [3, 7]},  # 7 is no prefix there
    ]
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    items, _ = load_trace("mooncake", file)
    found = statistics(items)
    assert statistics(items[::-1]) == found  # by arrival, not by place
    assert (found.output.mean, found.output.p50, found.output.p90) == pytest.approx((6.0, 6.0, 6.8))
    assert found.prompt.p99 == pytest.approx(1492.0)
    assert (found.gap_cv, found.hit_rate) == pytest.approx((0.5, 2 / 8))
    alone = statistics([WorkItem(index=0, prompt_len=3, output_len=4)] * 2)
    assert alone.prompt == Lengths(3, 3, 3, 3) and math.isnan(alone.gap_cv) and alone.hit_rate == 0
    with pytest.raises(ValueError, match="at least two"):
        statistics(items[:1])


def test_twenty_thousand_requests() -> None:
    items = synth_items("mooncake-toolagent", 20_000)
    assert len(items) == 20_000
    assert sum(len(item.blocks) for item in items) > 300_000

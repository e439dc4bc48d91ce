from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from minidisagg.workload.arrivals import arrival_times
from minidisagg.workload.lengths import prompt_tokens, random_items, text_items, with_arrivals, with_prompts
from minidisagg.workload.traces import load_trace


def test_arrivals_have_the_exact_rate_and_scale_with_it() -> None:
    slow, fast = arrival_times(200, 2.0, seed=3), arrival_times(200, 8.0, seed=3)
    assert slow[-1] == pytest.approx(100.0)
    assert fast == pytest.approx([t / 4 for t in slow])
    assert slow == sorted(slow)
    assert slow != arrival_times(200, 2.0, seed=4)
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]
    assert arrival_times(4, 2.0, burstiness=math.inf) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert arrival_times(0, 2.0) == []


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_gamma_shape(burstiness: float) -> None:
    times = arrival_times(20_000, 1.0, burstiness, seed=1)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.1)  # a gamma's squared variation is 1 / shape


@pytest.mark.parametrize("rate, burstiness", [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_bad_arrivals(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        arrival_times(2, rate, burstiness)


def test_random_lengths() -> None:
    exact = random_items(5, 100, 7)
    assert [(i.index, i.prompt_len, i.output_len) for i in exact] == [(n, 100, 7) for n in range(5)]
    ranged = random_items(500, 100, 10, range_ratio=0.5, seed=1)
    assert {min(i.prompt_len for i in ranged), max(i.prompt_len for i in ranged)} == {50, 150}
    assert {i.output_len for i in ranged} == set(range(5, 16))
    assert random_items(3, 100, 10, 0.5, seed=1) == ranged[:3]  # an item depends on its index, not on the count
    for arguments in [(0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0), (1, 1, -0.1)]:
        with pytest.raises(ValueError, match="random"):
            random_items(1, *arguments)


def test_prompts_depend_on_seed_and_index_only() -> None:
    long, short = random_items(3, 64, 1), random_items(3, 16, 1)
    assert prompt_tokens(short[2], 1000, seed=5) == prompt_tokens(long[2], 1000, seed=5)[:16]
    assert prompt_tokens(long[1], 1000, seed=5) != prompt_tokens(long[2], 1000, seed=5)
    assert prompt_tokens(long[1], 1000, seed=5) != prompt_tokens(long[1], 1000, seed=6)
    tokens = prompt_tokens(random_items(1, 5000, 1)[0], 7)
    assert set(tokens) == set(range(7))


def test_prompts_are_the_same_in_every_process() -> None:
    code = (
        "from minidisagg.workload.lengths import *; from minidisagg.workload.arrivals import arrival_times\n"
        "import sys; items = random_items(3, 20, 5, 0.3, seed=9)\n"
        "sys.stdout.write(repr([prompt_tokens(i, 49152, 9) for i in items] + [arrival_times(3, 1.0, seed=9)]\n"
        "  + [i.prompt_text for i in text_items(6, 5, seed=9)]))"
    )

    def output(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout

    first = output("1")
    assert first == output("2")
    here = [prompt_tokens(i, 49152, 9) for i in random_items(3, 20, 5, 0.3, seed=9)]
    assert first.startswith(repr(here)[:-1])


def test_text_prompts_vary_and_are_real() -> None:
    items = text_items(30, 16, encode=lambda text: [ord(c) for c in text])
    assert len({item.prompt_text for item in items}) >= 25
    lengths = sorted(item.prompt_len for item in items)
    assert lengths[0] < 200 and lengths[-1] > 2000
    assert all(item.prompt is not None and item.prompt_len == len(item.prompt) for item in items)
    estimated = text_items(1, 16)[0]
    assert estimated.prompt is None and estimated.prompt_len == len(estimated.prompt_text or "") // 4


def test_with_arrivals() -> None:
    items = with_arrivals(random_items(2, 3, 4), [0.5, 1.5])
    assert [(i.index, i.arrival_s) for i in items] == [(0, 0.5), (1, 1.5)]
    with pytest.raises(ValueError):
        with_arrivals(items, [0.0])


def test_azure_both_headers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,0,9\n"
        "2023-11-16 18:15:48.1805900,10,2\n"
    )
    items, report = load_trace("azure", file, speedup=3.0)
    assert [(i.index, i.prompt_len, i.output_len) for i in items] == [(0, 374, 44), (1, 10, 2)]
    assert [i.arrival_s for i in items] == pytest.approx([0.0, 0.5])
    assert (report.used, report.skipped, report.clamped) == (2, 1, 0)
    file.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,100,40\n2.5,7,3\n")
    items, report = load_trace("azure", file, scale_len=0.5, max_model_len=60, count=1)
    assert [(i.arrival_s, i.prompt_len, i.output_len) for i in items] == [(0.0, 40, 20)]
    assert str(report) == "1 requests over 0.0 s, 0 skipped, 1 clamped"


def test_clamp_cuts_output_first_but_not_below_half(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,500\n1,500,10\n2,500,500\n3,90,10\n")
    items, report = load_trace("azure", file, max_model_len=100)
    assert [(i.prompt_len, i.output_len) for i in items] == [(10, 90), (90, 10), (50, 50), (90, 10)]
    assert report.clamped == 3


def test_mooncake_equal_hash_ids_are_equal_blocks(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 2500, "input_length": 1500, "output_length": 6, "hash_ids": [7, 8, 10]},
        {"timestamp": 3000, "input_length": 600, "output_length": 6, "hash_ids": [8, 7]},
    ]
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    items, _ = load_trace("mooncake", file)
    assert [i.arrival_s for i in items] == [0.0, 2.5, 3.0]
    a, b, c = (item.prompt or [] for item in with_prompts(items, 5000, seed=1))
    assert [len(a), len(b), len(c)] == [1100, 1500, 600]
    assert a[:1024] == b[:1024] and a[1024:] != b[1024:1100]
    assert c[:512] == a[512:1024] and c[512:] == a[:88]
    scaled, report = load_trace("mooncake", file, scale_len=0.1, max_model_len=100)
    assert (scaled[0].prompt_len, scaled[0].block_size, scaled[0].blocks) == (99, 51, (7, 8))
    assert report.clamped == 2
    x, y = (item.prompt or [] for item in with_prompts(scaled[:2], 5000))
    assert x[:98] == y[:98]


def test_burstgpt(tmp_path: Path) -> None:
    file = tmp_path / "b.csv"
    file.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,s1,1.0,ChatGPT,472,18,490,Conversation log\n45,s2,1.0,ChatGPT,1087,0,1087,Conversation log\n"
    )
    items, report = load_trace("burstgpt", file)
    assert [(i.prompt_len, i.output_len, i.session) for i in items] == [(472, 18, "s1")]
    assert report.skipped == 1


def test_sharegpt(tmp_path: Path) -> None:
    def talk(*turns: str) -> dict[str, object]:
        return {"conversations": [{"from": "x", "value": turn} for turn in turns]}

    file = tmp_path / "s.json"
    file.write_text(json.dumps([talk("a" * 40, "b" * 12), talk("alone"), talk("x", "y" * 99)]))
    items, report = load_trace("sharegpt", file, encode=lambda text: list(text.encode()), max_model_len=30)
    assert (report.used, report.skipped, report.clamped) == (1, 2, 1)
    assert (items[0].prompt, items[0].prompt_text, items[0].output_len) == ([97] * 18, "a" * 18, 12)


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("azure", "arrived_at,num_prefill_tokens,num_decode_tokens\n1,2,3\n1,x,3\n", ":3: bad row"),
        ("azure", "arrived_at,num_prefill_tokens,num_decode_tokens\n1,2\n", ":2: bad row"),
        ("azure", "arrived_at,num_prefill_tokens,num_decode_tokens\n1,-2,3\n", ":2: bad row"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,2,3\n", ":2: bad row"),
        ("azure", "a,b\n1,2\n", ":1: header"),
        ("azure", "", ":1: header"),
        ("burstgpt", "arrived_at\n", ":1: header"),
        ("mooncake", '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]}\n{"a"\n', ":2: not a"),
        ("mooncake", '{"timestamp": 0, "input_length": 999, "output_length": 1, "hash_ids": [1]}', ":1: 1 hash ids"),
        ("mooncake", '{"timestamp": 0, "input_length": "9"}', ":1: not a"),
        ("mooncake", "\n", "no requests"),
        ("sharegpt", "[\n{\n", ":3: not JSON"),
        ("sharegpt", "{}", "not a list"),
        ("sharegpt", '[{"conversation": 1}]', "conversation 1 has no"),
        ("other", "", "unknown trace kind"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, kind: str, text: str, message: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_trace(kind, file)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if kind != "other":
        assert str(file) in str(caught.value)

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidisagg.sim.simulation import page_names
from minidisagg.workload.arrivals import arrival_times
from minidisagg.workload.lengths import prompt_tokens, random_items, text_items, with_arrivals, with_prompts
from minidisagg.workload.settings import Workload, build_items, describe_workload
from minidisagg.workload.traces import MAX_SECONDS, MAX_TOKENS, load_trace


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


def test_prompts_that_are_pieces_of_a_text(tmp_path: Path) -> None:
    alice = Path(__file__).parent / "data" / "alice29.txt"
    whole = "\n\n".join(" ".join(part.split()) for part in alice.read_text().split("\n\n") if part.strip())
    texts = [item.prompt_text or "" for item in text_items(200, 16, seed=2, path=str(alice))]
    assert len(set(texts)) == 200 and all(text in whole for text in texts)
    assert min(map(len, texts)) < 200 and max(map(len, texts)) > 2000
    assert texts[:9] == [item.prompt_text for item in text_items(9, 16, seed=2, path=str(alice))]
    workload = Workload(dataset_name="text", dataset_path=str(alice))
    assert build_items(workload, 9, 2)[0][8].prompt_text == texts[8] and "alice29.txt" in describe_workload(workload)
    bad = tmp_path / "bad.txt"
    for content, message in (b" \n\n", "bad.txt: no text"), (b"\xff\xfe", "bad.txt: not a text in UTF-8"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text_items(1, 16, path=str(bad))


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
    assert str(report) == "1 requests, 0 skipped, 1 clamped"


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
    assert (scaled[0].prompt_len, scaled[0].block_size, scaled[0].blocks) == (99, 51, (0, 1))
    assert report.clamped == 2
    x, y = (item.prompt or [] for item in with_prompts(scaled[:2], 5000))
    assert x[:98] == y[:98]


def test_hash_ids_may_be_any_integers(tmp_path: Path) -> None:
    rows = [
        {"timestamp": n, "input_length": 1000, "output_length": 5, "hash_ids": ids}
        for n, ids in enumerate([[(1 << 64) - 1, -3], [(1 << 64) - 1, 1 << 61], [-(1 << 63), -3]])
    ]
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    items, _ = load_trace("mooncake", file)
    assert [item.blocks for item in items] == [(0, 1), (0, 2), (3, 1)]
    assert page_names(items[0], 64)[:8] == page_names(items[1], 64)[:8]


def test_windows_of_a_trace_follow_one_another(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(VIDUR + "".join(f"{n},{n + 1},{n % 5}\n" for n in range(31)))  # every fifth is skipped
    windows = [load_trace("azure", file, count=10, window=n, speedup=2.0) for n in range(5)]
    lengths = [[item.prompt_len for item in items] for items, _ in windows]
    usable = [n + 1 for n in range(31) if n % 5]
    assert lengths == [usable[:10], usable[10:20], *[usable[:10], usable[10:20]], usable[:10]]
    assert all(items[0].arrival_s == 0.0 and items[-1].arrival_s == 5.5 for items, _ in windows)
    assert [report.windows for _, report in windows] == [0, 0, 2, 2, 2] and windows[1][1].skipped == 7
    assert windows[2][1].marks == ["the trace has requests for 2 repetitions, and those after have the same ones again"]
    items, report = load_trace("azure", file, count=99, window=1)
    assert len(items) == 24 and report.windows == 1 and "1 repetition, and" in report.marks[0]
    workload = Workload(dataset_name="azure", dataset_path=str(file))
    assert [item.prompt_len for item in build_items(workload, 10, window=1)[0]] == usable[10:20]


def test_burstgpt(tmp_path: Path) -> None:
    file = tmp_path / "b.csv"
    file.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,s1,1.0,ChatGPT,472,18,490,Conversation log\n45,s2,1.0,ChatGPT,1087,0,1087,Conversation log\n"
    )
    items, report = load_trace("burstgpt", file)
    assert [(i.prompt_len, i.output_len) for i in items] == [(472, 18)]
    assert not items[0].session, "nothing tells what the prompts of its sessions share"
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


VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
TALK = [{"value": "What is the sea made of?"}, {"value": "Of water, salt and time."}]


@pytest.mark.parametrize(
    ("times", "arrivals"),
    [
        (["2024-05-10 01:00:00+01:00", "2024-05-10 00:00:01+00:00"], [0.0, 1.0]),
        (["2024-05-10T00:00:02.5Z", "2024-05-09 19:00:01.25-05:00"], [0.0, 1.25]),
        (["2024-05-10 05:30:00.1234567+05:30", "2024-05-10 00:00:00Z"], [0.0, 0.1234567]),
        (["2024-05-10 01:00:00.1234567891", "2024-05-10 01:00:00.5", "2024-05-10 01:00:01"], [0.0, 0.376543, 0.876543]),
        (["2.5", "1e0", " .5", "+1.75"], [0.0, 0.5, 1.25, 2.0]),
    ],
)
def test_times_are_read_as_they_are_meant_and_sorted(tmp_path: Path, times: list[str], arrivals: list[float]) -> None:
    file = tmp_path / "a.csv"
    file.write_text(VIDUR + "".join(f"{time},7,3\n" for time in times))
    items, _ = load_trace("azure", file)
    assert [item.arrival_s for item in items] == pytest.approx(arrivals, abs=2e-6)


def test_a_file_may_be_written_by_other_tools(tmp_path: Path) -> None:
    """Windows (a byte order mark, CR LF), pandas (37.0), empty lines, fields that nobody reads."""
    file = tmp_path / "trace"
    bom = b"\xef\xbb\xbf"
    file.write_bytes(bom + VIDUR.encode().replace(b"\n", b"\r\n") + b"0.0,37.0,4.0\r\n\r\n1,3.7e1,4,\r\n")
    items, _ = load_trace("azure", file)
    assert [(i.arrival_s, i.prompt_len, i.output_len) for i in items] == [(0.0, 37, 4), (1.0, 37, 4)]
    line = b'{"timestamp": 5, "input_length": 37.0, "output_length": 4, "hash_ids": [1], "more": [null, {"a": null}]}'
    file.write_bytes(bom + line + b"\r\n\r\n" + line)
    items, _ = load_trace("mooncake", file)
    assert [(i.arrival_s, i.prompt_len, i.output_len) for i in items] == [(0.0, 37, 4)] * 2
    file.write_bytes(bom + json.dumps([{"conversations": TALK, "id": None}]).encode())
    assert len(load_trace("sharegpt", file)[0]) == 1


def test_mooncake_without_hash_ids_shares_nothing(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    line = {"timestamp": 0, "input_length": 600, "output_length": 4}
    rows = [line, line | {"hash_ids": None}, line | {"hash_ids": [5, 6]}, line | {"hash_ids": [5, 6]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    items, report = load_trace("mooncake", file)
    assert str(report).endswith(", 0 skipped, 0 clamped, 2 without hash_ids")
    a, b, c, d = (item.prompt or [] for item in with_prompts(items, 5000))
    assert [len(a), len(b), len(c)] == [600] * 3
    assert c == d and len({a[0], b[0], c[0]}) == 3


def _csv(*rows: str) -> bytes:
    return (VIDUR + "".join(f"{row}\n" for row in rows)).encode()


def _line(**fields: object) -> bytes:
    return b"\n" + json.dumps({"timestamp": 0, "input_length": 9, "output_length": 1} | fields).encode()


@pytest.mark.parametrize(
    ("kind", "data", "where"),
    [
        *[("azure", _csv("0,2,3", f"{time},2,3"), ":3: bad row: ") for time in (
            "nan", "NaN", "inf", "-inf", "-1", "1e400", "1e30", "True", "1_0", "", "\u0661", "2024-05-10",
            "2024-13-01 00:00:00", "2024-05-10 00:00:00+25:00",
        )],
        *[("azure", _csv("0,2,3", f"1,{length},3"), ":3: bad row: ") for length in (
            "nan", "inf", "-2", "37.5", "1e400", "1" + "0" * 30, "9" * 5000, "true", "None", "", "0x10", "1_0", "1\t0",
        )],
        ("azure", _csv("2024-05-10 01:00:00,2,3", "2024-05-10 01:00:01Z,2,3"), ":3: bad row: time is a date with an"),
        ("azure", _csv("2024-05-10 01:00:00Z,2,3", "2024-05-10 01:00:01,2,3"), ":3: bad row: time is a date without"),
        ("azure", _csv("1,5,2,3"), ":2: bad row: 4 fields"),
        ("azure", _csv('0,"2,3'), ":2: not a CSV file"),
        ("azure", _csv("0,2,3", "1,2\0,3"), ":3: not a CSV file"),
        ("azure", _csv("0,2,3").replace(b"2", b"\xe9"), ":2: not UTF-8"),
        ("azure", VIDUR.encode("utf-16"), ":1: not "),
        ("azure", VIDUR.replace("arrived_at", "arrived_at,arrived_at").encode(), ":1: header"),
        ("azure", b"\xef\xbb\xbf", ":1: header"),
        *[("mooncake", _line() + _line(**fields), ":3: ") for fields in (
            {"timestamp": math.nan}, {"timestamp": math.inf}, {"timestamp": -1}, {"timestamp": 1e30},
            {"timestamp": 10**30}, {"timestamp": True}, {"timestamp": None}, {"timestamp": "0"},
            {"input_length": 9.5}, {"input_length": -9}, {"input_length": True}, {"input_length": None},
            {"input_length": 10**30}, {"output_length": 10**400}, {"output_length": math.inf}, {"hash_ids": [None]},
            {"hash_ids": []}, {"hash_ids": [1, 2]}, {"hash_ids": 1},
        )],
        ("mooncake", _line() + _line().replace(b"9", b"1e400"), ":3: "),
        ("mooncake", _line() + b"\n\0", ":3: "),
        ("mooncake", b"[" * 100_000, ":1: "),
        ("sharegpt", b"", ":1: not JSON"),
        ("sharegpt", b"[" * 100_000, "not JSON"),
        ("sharegpt", b"[" + b"9" * 5000 + b"]", "not JSON"),
        ("sharegpt", b'["\xff"]', "not UTF-8"),
        *[("sharegpt", json.dumps([{"conversations": TALK}, entry]).encode(), "conversation 2") for entry in (
            None, [], "ab", 5, {"conversations": None}, {"conversations": "ab"}, {"conversations": {}},
            {"conversations": [None, None]}, {"conversations": [{"value": None}, {"value": "b"}]},
            {"conversations": [{"value": 5}, {"value": "b"}]}, {"conversations": [{"value": "cut \ud83d"}, TALK[1]]},
            {"conversations": [TALK[0], {"value": "\ude00 cut"}]},
        )],
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, kind: str, data: bytes, where: str) -> None:
    file = tmp_path / "trace"
    file.write_bytes(data)
    for encode in (None, lambda text: list(text.encode())):
        with pytest.raises(ValueError) as caught:
            load_trace(kind, file, encode=encode)
        message = str(caught.value)
        assert message.startswith(f"{file}") and where in message, message
        assert "\n" not in message and len(message) < 300 + len(str(file))


@pytest.mark.parametrize(("name", "value"), [("speedup", math.inf), ("speedup", 1e-12), ("scale_len", 1e300)])
def test_no_scale_makes_what_a_file_may_not_hold(tmp_path: Path, name: str, value: float) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(_csv("0,2,3", "1,2,3"))
    with pytest.raises(ValueError, match=r"speedup|scale"):
        load_trace("azure", file, **{name: value})  # type: ignore[arg-type]


NUMBERS = st.sampled_from(
    ["0", "1.5", "37.0", "37.5", "-1", "nan", "inf", "1e400", "1" + "0" * 30, "true", "null", "", "\0", "1,5", '"', "é",
     "2024-05-10 00:00:00", "2024-05-10T00:00:00.5+01:00", "0001-01-01T00:00:00+23:59", "9999-12-31Z", "\r", "\u2028"]
)  # fmt: skip
TIMED = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=4)
JSONS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["conversations", "value", "timestamp", "hash_ids"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FILES = st.one_of(
    st.binary(max_size=60),
    TIMED.map(lambda rows: (VIDUR + "\n".join(map(",".join, rows))).encode()),
    TIMED.map(
        lambda rows: "\n".join(
            f'{{"timestamp": {a}, "input_length": {b}, "output_length": {c}}}' for a, b, c in rows
        ).encode()
    ),
    JSONS.map(lambda value: json.dumps(value).encode()),
    JSONS.map(lambda value: json.dumps([{"conversations": TALK}, {"conversations": [{"value": value}] * 2}]).encode()),
).flatmap(lambda data: st.sampled_from([data, b"\xef\xbb\xbf" + data, data.decode(errors="ignore").encode("utf-16")]))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["azure", "burstgpt", "mooncake", "sharegpt"]), FILES)
def test_whatever_a_file_holds_it_is_read_or_named(kind: str, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(prefix="minidisagg-trace-") as file:
        burst = b"Timestamp,Request tokens,Response tokens\n"
        file.write(data.replace(VIDUR.encode(), burst) if kind == "burstgpt" else data)
        file.flush()
        try:
            items, report = load_trace(kind, file.name)
        except ValueError as error:
            assert str(error).startswith(file.name) and len(str(error).splitlines()) == 1
            return
    assert report.used == len(items) > 0
    assert items[0].arrival_s == 0.0 and [i.arrival_s for i in items] == sorted(i.arrival_s for i in items)
    assert all(0 <= i.arrival_s <= MAX_SECONDS and 1 <= min(i.prompt_len, i.output_len) for i in items)
    assert all(max(i.prompt_len, i.output_len) <= MAX_TOKENS for i in items)

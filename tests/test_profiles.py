"""Profiles: tables are hit, costs only grow, decode steps at once cost what they do one by one, and what ships predicts
what was measured."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import random
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from minidisagg.sim.profile import Curve, Grid, Profile, devices, load_profile, names

GPUS = ("a100_sxm", "h100_sxm", "h200_sxm")
SMALL = Profile(
    version=1,
    name="toy",
    model="m",
    dtype="bfloat16",
    tensor_parallel=2,
    source="made up",
    licence="none",
    constant=0.5,
    linear=Curve([1, 4, 16], [1.0, 2.0, 8.0]),
    head=Curve([1, 8], [0.25, 0.5]),
    prefill_attention=Grid([0, 10], [1, 8], [[0.0, 2.0], [1.0, 6.0]]),
    decode_attention=Grid([1, 4], [16, 64], [[0.0, 3.0], [0.0, 12.0]]),
    num_layers=2,
    kv_bytes_per_token=10,
    weight_bytes=100,
    memory_bytes=1000,
)


def shipped() -> list[Profile]:
    return [
        load_profile(device, model, dtype, int(tp.removeprefix("tp")))
        for device, model, dtype, tp in map(str.split, names())
    ]


def converter() -> ModuleType:
    """The script, which knows the measured figures."""
    path = Path(__file__).parent.parent / "scripts" / "convert_profiles.py"
    spec = importlib.util.spec_from_file_location("convert_profiles", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------ interpolation


def test_tables_are_hit_and_extended() -> None:
    curve, grid = SMALL.linear, SMALL.prefill_attention
    assert [curve.at(x) for x in (1, 4, 16)] == [1.0, 2.0, 8.0]
    assert [curve.at(x) for x in (0, 10, 32)] == [1.0, 5.0, 16.0]  # clamped, between, in proportion
    assert [[grid.at(row, column) for column in (1, 8)] for row in (0, 10)] == grid.seconds
    assert grid.at(5, 8) == 4.0 and grid.at(20, 8) == 12.0 and grid.at(10, 16) == 12.0 and grid.at(0, 0) == 0.0
    assert Grid([0], [1], [[3.0]]).at(0, 1) == 3.0


def test_a_step_is_the_sum_of_its_parts() -> None:
    prompts = [(0, 8), (10, 4)]
    dense = 0.5 + SMALL.linear.at(8 + 4 + 4) + SMALL.head.at(6)
    assert SMALL.step_seconds(prompts, 4, 4 * 64) == pytest.approx(
        dense + 2.0 + SMALL.prefill_attention.at(10, 4) + 12.0
    )
    assert SMALL.step_seconds([], 1, 40) == 0.5 + 1.0 + 0.25 + 1.5
    assert SMALL.step_seconds([], 4, 4 * 128) == 0.5 + 2.0 + SMALL.head.at(4) + 24.0


def test_every_point_of_a_shipped_decode_table() -> None:
    profile = load_profile("h100_sxm", "llama-8b")
    grid = profile.decode_attention
    for (i, seqs), (j, context) in itertools.product(enumerate(grid.rows), enumerate(grid.columns)):
        dense = profile.constant + profile.linear.at(seqs) + profile.head.at(seqs)
        assert profile.step_seconds((), seqs, seqs * context) == pytest.approx(dense + grid.seconds[i][j], rel=1e-12)


def test_many_decode_steps_cost_exactly_what_they_do_one_by_one() -> None:
    rng = random.Random(0)
    for profile in [SMALL, *shipped()]:
        for _ in range(4):
            seqs, steps = rng.choice((1, 2, 3, 17, 64, 300, 5000)), rng.randrange(200)
            context = rng.choice((0, seqs, seqs * rng.randrange(1, 300_000)))
            expected = [profile.step_seconds((), seqs, context + i * seqs) for i in range(steps)]
            assert profile.decode_seconds(seqs, context, steps) == expected


def test_costs_only_grow() -> None:
    rng = random.Random(1)
    slack = 1 - 1e-12  # pieces of a line meet but for their last bit
    for profile in shipped():
        for _ in range(20):
            past, new = rng.randrange(200_000), rng.randrange(1, 40_000)
            more = rng.randrange(1, 2000)
            step = profile.step_seconds([(past, new)], 0, 0)
            assert profile.step_seconds([(past + more, new)], 0, 0) >= step * slack
            assert profile.step_seconds([(past, new + more)], 0, 0) >= step * slack
            seqs, context = rng.randrange(1, 3000), rng.randrange(1, 200_000)
            step = profile.step_seconds((), seqs, seqs * context)
            assert profile.step_seconds((), seqs, seqs * context + more) >= step * slack
            assert profile.step_seconds((), seqs + more, (seqs + more) * context) >= step * slack
            assert profile.step_seconds([(past, new)], seqs, seqs * context) > step


def test_a_prompt_in_chunks_costs_at_least_a_whole_one() -> None:
    for device in GPUS:
        profile = load_profile(device, "llama-8b")
        whole = profile.step_seconds([(0, 8192)], 0, 0)
        chunks = sum(profile.step_seconds([(past, 512)], 0, 0) for past in range(0, 8192, 512))
        assert whole <= chunks < 2 * whole


# ------------------------------------------------------------ files


def test_what_ships() -> None:
    assert set(GPUS) < set(devices())
    profiles = shipped()
    assert len(profiles) == len(set(names()))
    for profile in profiles:
        tables = (
            profile.linear.points,
            profile.head.points,
            profile.decode_attention.rows,
            profile.prefill_attention.columns,
        )
        assert all(list(points) == sorted(set(points)) for points in tables)
        assert profile.pages(16) > 0 and profile.source and profile.licence in ("Apache-2.0", "MIT")
        assert profile.name in devices()


def test_tensor_parallel_is_faster_and_has_more_memory() -> None:
    for device in ("h100_sxm", "h200_sxm"):
        one, two, eight = (load_profile(device, "qwen3-32b", "bfloat16", tp) for tp in (1, 2, 8))
        for seqs in (1, 64):
            steps = [p.step_seconds((), seqs, seqs * 2048) for p in (one, two, eight)]
            assert steps == sorted(steps, reverse=True)
        assert one.pages(16) < two.pages(16) < eight.pages(16)
        assert load_profile(device, "qwen3-32b", "fp8").step_seconds((), 1, 2048) < one.step_seconds((), 1, 2048)


def test_pages() -> None:
    assert SMALL.pages(10) == (2 * 900 - 100) // 100
    with pytest.raises(ValueError, match=r"0.0 GB for its weights, and 5% of 2 x toy leaves no page"):
        SMALL.pages(1, 0.05)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    data = msgspec.json.encode([SMALL])
    for name, content in (("own.json", data), ("own.json.gz", gzip.compress(data))):
        path = tmp_path / name
        path.write_bytes(content)
        assert load_profile(str(path), "m", tensor_parallel=2) == SMALL


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("h300", b"", "no profiles of 'h300'; there are a100_sxm, "),
        ("h100_sxm", b"", "h100_sxm has no profile of m bfloat16 tp1; there are qwen3-0.6b (bfloat16 tp1, "),
        ("none.json", b"", "no profiles of "),
        ("bad.json", b"{}", "bad.json: Expected `array`, got `object`; a profile is a file that `minidisagg profile`"),
        ("bad.json.gz", b"no gzip", "bad.json.gz: Not a gzipped file"),
        ("cut.json.gz", gzip.compress(b"[]" * 1000, mtime=0)[:-12], "cut.json.gz: "),
        ("new.json", msgspec.json.encode([SMALL]).replace(b'"version":1', b'"version":2'), r"Invalid enum value 2"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    device = name
    if "." in name:
        path = tmp_path / name
        device = str(path)
        if content:
            path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_profile(device, "m")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------ against what vLLM measured


def test_predictions() -> None:
    """Within 10 % of vLLM 0.22.1 but for one: a lone decode of a small model is all launches, and that H100's host was
    faster than the H200's, from which the constant comes."""
    module = converter()
    errors = {
        (device, model, what): ours / theirs - 1
        for (device, model), measured in module.MEASURED.items()
        for what, ours, theirs in zip(
            ("batch 1", "batch 64", "prefill"), module.predict(load_profile(device, model)), measured, strict=True
        )
    }
    missed = {key: error for key, error in errors.items() if abs(error) > 0.10}
    assert missed == {("h100_sxm", "qwen3-0.6b", "batch 1"): pytest.approx(0.235, abs=0.01)}
    assert sum(abs(error) for error in errors.values()) / len(errors) < 0.06


def test_splitwise() -> None:
    """Its medians come back: a prompt of 8192 and of 512 tokens, and a decode."""
    profile = load_profile("dgx-h100", "llama2-70b", tensor_parallel=8)
    assert profile.step_seconds([(0, 512)], 0, 0) == pytest.approx(0.0539, rel=0.03)
    assert profile.step_seconds((), 1, 1024) == pytest.approx(0.0303, rel=0.03)
    old = load_profile("dgx-a100", "llama2-70b", tensor_parallel=8)
    assert old.step_seconds([(0, 2048)], 0, 0) > 1.5 * profile.step_seconds([(0, 2048)], 0, 0)


def test_growing_curves_of_the_converter() -> None:
    module = converter()
    assert module.isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert module.shrunk([1, 2, 3, 10, 20], [1.0, 2.0, 3.0, 10.0, 50.0]) == Curve([1, 10, 20], [1.0, 10.0, 50.0])

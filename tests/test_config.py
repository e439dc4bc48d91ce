"""Config structs and the flags that make them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from minidisagg.bench.settings import make_sides
from minidisagg.config import (
    STAGES,
    ClusterSettings,
    RunSettings,
    WorkerConfig,
    WorkerSettings,
    assign_cpus,
    parse_cpus,
    parse_worker,
)
from minidisagg.core.messages import Role, SamplingParams
from minidisagg.measure.records import STAGES as RECORD_STAGES
from minidisagg.options import (
    DTYPES,
    Engine,
    engine_options,
    mode_option,
    read_engine,
    read_sampling,
    sampling_options,
)
from minidisagg.sizes import parse_size
from minidisagg.workload.settings import parse_rate

# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("1.5GiB", 3 << 29), ("4096", 4096), ("2k", 2048), (" 1tb ", 1 << 40), ("10B", 10)],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "x", "12Q", "-1M", "0", "1.2.3G"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size"):
        parse_size(text)


def test_cpus() -> None:
    assert parse_cpus("0-3+8") == [0, 1, 2, 3, 8]
    for text in ("", "a", "0+", "-1", "1-b"):
        with pytest.raises(ValueError, match="cpus="):
            parse_cpus(text)


def test_worker_overrides() -> None:
    base = WorkerSettings(max_num_seqs=4)
    worker = parse_worker("kv-cache-memory=1G,max_num_batched_tokens=64,dtype=float32", base)
    assert worker == WorkerSettings(max_num_seqs=4, kv_cache_memory=1 << 30, max_num_batched_tokens=64, dtype="float32")
    assert parse_worker("", base) == base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=3", "a key of cpus, device"),
        ("max_num_seqs", "KEY=VAL"),
        ("max_num_seqs=many", "whole number"),
        ("max_num_seqs=0", "at least 1"),
        ("dtype=int4", "not one of auto"),
        ("device=tpu", "neither cpu nor cuda"),
        ("kv_cache_memory=lots", "not a size"),
    ],
)
def test_bad_worker_overrides(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_worker(text, WorkerSettings())


# ---------------------------------------------------------------- clusters


def test_roles_are_equal_in_number_in_both_modes() -> None:
    disagg = ClusterSettings(mode="disagg", prefill_workers=1, decode_workers=2)
    assert [(name, role) for name, role, _ in disagg.roles()] == [
        ("prefill-0", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("decode-1", Role.DECODE),
    ]
    colocated = msgspec.structs.replace(disagg, mode="colocated")
    assert [(name, role) for name, role, _ in colocated.roles()] == [(f"worker-{i}", Role.BOTH) for i in range(3)]


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


@pytest.mark.usefixtures("four_cores")
def test_cores_are_shared_out() -> None:
    assert assign_cpus(ClusterSettings()) == [[0, 1], [2, 3]]
    asked = ClusterSettings(decode=WorkerSettings(cpus="1-3"))
    assert assign_cpus(asked) == [[0], [1, 2, 3]]
    shared = ClusterSettings(prefill_workers=2, prefill=WorkerSettings(cpus="0-1"), decode=WorkerSettings(cpus="2-3"))
    assert assign_cpus(shared) == [[0], [1], [2, 3]]


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (ClusterSettings(prefill_workers=5), "6 workers need a core each, and this process may use 4"),
        (ClusterSettings(decode=WorkerSettings(cpus="0-3")), "need a core each"),
        (ClusterSettings(decode=WorkerSettings(cpus="7")), "core 7, but this process may use"),
        (ClusterSettings(decode_workers=2, decode=WorkerSettings(cpus="1")), "fewer cores than the 2 workers"),
        (
            ClusterSettings(prefill=WorkerSettings(cpus="0-1"), decode=WorkerSettings(cpus="1")),
            "core 1, which another worker has",
        ),
    ],
)
def test_cores_that_are_not_there(cluster: ClusterSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_cpus(cluster)


def test_a_worker_gets_its_config_as_json() -> None:
    config = WorkerConfig(
        index=0,
        name="prefill-0", epoch=3, role=Role.PREFILL, model=Engine(*read()).model, settings=WorkerSettings(cpus="0"),
        cluster=ClusterSettings(mode="disagg"), run=RunSettings(delays={"transfer": 0.1}), run_dir="/tmp/x",
    )  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(config), type=WorkerConfig) == config


# ---------------------------------------------------------------- flags


def read(*args: str, one_worker: bool = False) -> Engine:
    """The engine of these flags."""
    got: list[Engine] = []

    @click.command()
    @mode_option
    @engine_options
    def command(mode: str, **flags: Any) -> None:
        got.append(read_engine("dummy:tiny", flags, mode, one_worker))
        assert not flags, "a flag that nobody reads"

    result = CliRunner().invoke(command, args, catch_exceptions=True)
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return got[0]


def test_no_flags_are_the_defaults_of_the_structs() -> None:
    model, cluster, run = read()
    assert cluster == ClusterSettings()
    assert run == RunSettings()
    assert (model.max_model_len, model.block_size, model.prefix_caching) == (0, 128, True)


def test_flags_reach_the_structs(tmp_path: Path) -> None:
    model, cluster, run = read(
        "--mode", "disagg", "--prefill-workers", "2", "--decode-workers", "3", "--max-num-seqs", "7",
        "--kv-cache-memory", "1M", "--decode", "max_num_seqs=9,kv_cache_memory=2M", "--prefill", "chunk=16",
        "--policy", "sarathi", "--link", "shm", "--seed", "5", "--no-prefix-caching", "--max-model-len", "99",
        "--inject-delay", "transfer=250", "--inject-delay", "decode-wait=1", "--record", str(tmp_path / "logs"),
        "--emulate-link", "25Gbps,20us",
    )  # fmt: skip
    assert (cluster.mode, cluster.prefill_workers, cluster.decode_workers) == ("disagg", 2, 3)
    assert (cluster.policy, cluster.link, cluster.emulate_link) == ("sarathi", "shm", "25Gbps,20us")
    assert (cluster.prefill.max_num_seqs, cluster.prefill.chunk, cluster.prefill.kv_cache_memory) == (7, 16, 1 << 20)
    assert (cluster.decode.max_num_seqs, cluster.decode.chunk, cluster.decode.kv_cache_memory) == (9, 0, 2 << 20)
    assert (model.max_model_len, model.prefix_caching) == (99, False)
    assert (run.seed, run.delays) == (5, {"transfer": 0.25, "decode_wait": 0.001})
    assert Path(run.record_dir).is_dir()


def test_one_worker_unless_told_otherwise() -> None:
    assert len(read(one_worker=True).cluster.roles()) == 1
    assert len(read("--mode", "disagg", one_worker=True).cluster.roles()) == 2
    assert len(read("--decode-workers", "2", one_worker=True).cluster.roles()) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mode", "disagg", "--decode-workers", "0"], "at least one prefill worker and one decode worker"),
        (["--prefill-workers", "0", "--decode-workers", "0"], "at least one worker"),
        (["--inject-delay", "lunch=5"], "a stage of queue"),
        (["--inject-delay", "decode=soon"], "STAGE=MS"),
        (["--kv-cache-memory", "lots"], "not a size"),
        (["--handoff", "store"], "--handoff store goes through --kv-store, and none is given"),
        (
            ["--handoff", "store", "--kv-store", "local:DRAM=1M", "--kv-codec", "int8"],
            "^--handoff store hands over pages as they are, and the codec is int8$",
        ),
        (["--emulate-link", "foo"], "no interconnect 'foo'; known: none, 10g-tcp, .* as in 25Gbps,20us"),
    ],
)
def test_bad_flags(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*args)


def read_sampling_of(*args: str) -> SamplingParams:
    """The sampling parameters of these flags."""
    got: list[SamplingParams] = []

    @click.command()
    @sampling_options(temperature=0.5, max_tokens=9)
    def command(**flags: Any) -> None:
        got.append(read_sampling(flags))
        assert not flags

    result = CliRunner().invoke(command, args)
    if isinstance(result.exception, ValueError):
        raise result.exception
    return got[0]


def test_sampling_flags() -> None:
    assert read_sampling_of() == SamplingParams(temperature=0.5, max_tokens=9)
    assert read_sampling_of("--stop", "a", "--stop", "b", "--top-k", "3", "--ignore-eos") == SamplingParams(
        temperature=0.5, max_tokens=9, stop=("a", "b"), top_k=3, ignore_eos=True
    )


def test_sampling_flag_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^--top-p: expected"):
        read_sampling_of("--top-p", "1.5")
    with pytest.raises(ValueError, match=r"^--max-tokens: expected"):
        read_sampling_of("--max-tokens", "0")


def test_choices_are_those_of_the_engine() -> None:
    """The flag's choices are repeated in `options`, because their owner needs torch."""
    torch = pytest.importorskip("torch")
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES if name != "auto")
    assert STAGES == RECORD_STAGES


# ---------------------------------------------------------------- bench


def test_sides() -> None:
    cluster = ClusterSettings(policy="fcfs")
    assert [side.mode for side in make_sides("both", "", cluster)] == ["colocated", "disagg"]
    assert [side.mode for side in make_sides("disagg", "", cluster)] == ["disagg"]
    sides = make_sides("disagg", "colocated:sarathi:chunk=64", cluster)
    assert [(side.mode, side.policy) for side in sides] == [("colocated", "sarathi:chunk=64"), ("disagg", "fcfs")]
    assert len({len(side.roles()) for side in sides}) == 1
    for mode, against in (("both", "disagg"), ("disagg", "elsewhere")):
        with pytest.raises(ValueError, match="against"):
            make_sides(mode, against, cluster)


def test_rates() -> None:
    assert parse_rate("2.5") == (2.5, False)
    assert parse_rate("inf") == (math.inf, False)
    assert parse_rate("0.5x") == (0.5, True)
    for text in ("0", "-1", "nan", "x", "infx", "fast", ""):
        with pytest.raises(ValueError, match="request rate"):
            parse_rate(text)

"""Where workers compute, and what of a GPU is left for a cache: what can be said without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerConfig, WorkerSettings
from minidisagg.core.messages import Role
from minidisagg.model.loader import load_config
from minidisagg.runtime.load import CONTEXT, PAIR_BYTES, _left_on, load_device, most_seqs, worker_devices

GIB = 1 << 30
MODEL = ModelSettings(model="dummy:tiny")


def config(index: int, role: Role, prefill: WorkerSettings, decode: WorkerSettings, path: Path) -> WorkerConfig:
    cluster = ClusterSettings(mode="disagg", prefill=prefill, decode=decode, decode_workers=2)
    settings = prefill if role is Role.PREFILL else decode
    return WorkerConfig(
        name="w", index=index, epoch=1, role=role, model=MODEL, settings=settings, cluster=cluster, run=RunSettings(),
        run_dir=str(path),
    )  # fmt: skip


def test_cuda_alone_is_one_gpu_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = WorkerSettings(device="cuda", max_num_seqs=7)
    shape = config(0, Role.PREFILL, cuda, cuda, tmp_path).cluster
    assert list(map(str, worker_devices(shape))) == ["cuda:0", "cuda:1", "cuda:0"]
    shape = config(0, Role.PREFILL, WorkerSettings(max_num_seqs=9), cuda, tmp_path).cluster
    assert list(map(str, worker_devices(shape))) == ["cpu", "cuda:0", "cuda:1"]
    assert most_seqs(shape) == 9


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    asked = config(1, Role.DECODE, WorkerSettings(), WorkerSettings(device="cuda:99"), tmp_path)
    with pytest.raises(ValueError, match=r"device 'cuda:99' is asked for, but torch .* sees \d+ GPUs"):
        load_device(asked, load_config(MODEL.model), lambda *_: None)


def test_a_cache_is_what_a_workers_share_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However much is free just now: a dead worker's memory comes back a moment later."""
    gpu, model = torch.device("cuda", 0), load_config(MODEL.model)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * GIB)
    half = WorkerSettings(device="cuda", gpu_memory_utilization=0.5)
    sizes = []
    for role, peers in ((Role.PREFILL, 2), (Role.DECODE, 1)):
        for free in (79, 10):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * GIB, 80 * GIB))
            sizes.append(_left_on(gpu, config(0, role, half, half, tmp_path), model))
            rest = 0.5 * 80 * GIB / 3 - 2 * GIB - CONTEXT - peers * PAIR_BYTES  # three workers share it
            assert rest - 64 * 2**20 < sizes[-1] < rest
    assert sizes[0] == sizes[1] and sizes[2] - sizes[0] == PAIR_BYTES
    little = WorkerSettings(device="cuda", gpu_memory_utilization=0.1)
    with pytest.raises(ValueError, match=r"leaves nothing for a KV cache on cuda:0: 10.0 of 80.0 GiB are free"):
        _left_on(gpu, config(0, Role.PREFILL, little, little, tmp_path), model)

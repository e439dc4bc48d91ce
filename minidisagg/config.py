"""What a run is made of: a few small frozen structs, read from flags once and sent to each worker as JSON."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from minidisagg.core.messages import Role
from minidisagg.core.plan import CODECS, RAW
from minidisagg.core.policy import WorkerOptions
from minidisagg.core.predictor import Predictor
from minidisagg.sizes import parse_size

DEFAULT_MODEL = "smollm2-135m"
Mode = Literal["colocated", "disagg"]
MODES: tuple[Mode, ...] = ("colocated", "disagg")
STAGES = ("queue", "prefill", "transfer", "decode_wait", "decode")


class ModelSettings(Struct, frozen=True, kw_only=True):
    """What is served."""

    model: str = DEFAULT_MODEL
    max_model_len: int = 0  # tokens of prompt and output; 0: the model's own limit, or what the cache holds
    block_size: int = 128  # tokens of a KV page
    prefix_caching: bool = True


class WorkerSettings(Struct, frozen=True, kw_only=True):
    """What can be set for a worker, and so per role with `--prefill KEY=VAL,…` and `--decode KEY=VAL,…`."""

    cpus: str = ""  # "0-3+8": the cores that are this worker's device; empty: an equal share
    device: str = "cpu"
    dtype: str = "auto"
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    chunk: int = 0
    kv_cache_memory: int = 0  # bytes; 0: 512 MiB on a CPU, on a GPU what is left of the worker's share of its memory
    gpu_memory_utilization: float = 0.9  # of a GPU's memory, for all workers on it together
    sms: str = ""  # "60%": of a GPU's multiprocessors, where an MPS daemon runs

    def options(self) -> WorkerOptions:
        """The part that the scheduler sees."""
        return WorkerOptions(self.max_num_seqs, self.max_num_batched_tokens, self.chunk)


class ClusterSettings(Struct, frozen=True, kw_only=True):
    """How many workers there are, what they do, and how KV moves between them."""

    mode: Mode = "colocated"
    prefill_workers: int = 1
    decode_workers: int = 1
    prefill: WorkerSettings = WorkerSettings()
    decode: WorkerSettings = WorkerSettings()
    policy: str = "fcfs"
    link: str = "auto"
    transfer_granularity: str = "auto"
    kv_store: str = ""  # below the prefix caches of all workers: local:DRAM=2GiB,SSD=/path:20GiB
    handoff: Literal["direct", "store"] = "direct"  # of a prefill: point to point, or through that store
    kv_codec: str = RAW  # how KV looks on the wire, where a placement does not say
    decode_after: int = 1  # tokens that a prefill worker samples before a decode worker goes on, likewise
    gpu_checksums: bool = False  # of what crosses between GPUs, where all bytes would be read once more at either end
    emulate_link: str = "none"  # an interconnect of `transfer/emulate.py` that the link is made to be as slow as

    def roles(self) -> list[tuple[str, Role, WorkerSettings]]:
        """Name, role and settings of each worker; colocated mode has as many workers, and each does both."""
        colocated = self.mode == "colocated"
        prefill = [
            (f"worker-{i}" if colocated else f"prefill-{i}", Role.BOTH if colocated else Role.PREFILL, self.prefill)
            for i in range(self.prefill_workers)
        ]
        decode = [
            (f"worker-{i + self.prefill_workers}", Role.BOTH, self.decode)
            if colocated
            else (f"decode-{i}", Role.DECODE, self.decode)
            for i in range(self.decode_workers)
        ]
        return prefill + decode


class RunSettings(Struct, frozen=True, kw_only=True):
    """What a run adds: seed, records, injected delays and offsets."""

    seed: int = 0
    record_dir: str = ""  # write each worker's input log here
    decision_dir: str = ""  # write what each policy hook was asked and answered here
    delays: dict[str, float] = {}  # seconds added to a stage of each request
    slowdown: float = 0.0  # each step takes longer by this share of its time: what a control has to notice
    step_ahead: int = -1  # steps planned ahead; -1: 1 on a GPU, 0 on a CPU
    link_timeout: float = 10.0
    lease: float = 30.0
    step_deadline: float = 120.0  # seconds after which a worker's step is taken to hang
    trace: bool = False  # workers report each piece on their links, for a timeline
    clock_offsets: dict[str, float] = {}  # worker → seconds that its clock is ahead: to test what must not depend on it
    predictor: Predictor = "none"  # of output lengths, for policies
    ceilings: bool = False  # measure each device's read bandwidth and matmul rate at its first start (a second)


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """All that a worker process needs to know at its start."""

    name: str
    index: int  # among the cluster's workers, in the order of `roles()`; names stay where a cluster becomes another
    epoch: int
    role: Role
    model: ModelSettings
    settings: WorkerSettings
    cluster: ClusterSettings
    run: RunSettings
    run_dir: str


def parse_cpus(text: str) -> list[int]:
    """ "0-3+8" → [0, 1, 2, 3, 8]."""
    cpus: set[int] = set()
    for part in text.split("+"):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"cpus={text!r}: write a core, a range 0-3, or several joined by +")
        cpus.update(range(int(first), int(last or first) + 1))
    return sorted(cpus)


def parse_worker(text: str, base: WorkerSettings) -> WorkerSettings:
    """`KEY=VAL,KEY=VAL` over `base`; raises `ValueError` naming the key that is unknown or out of range."""
    known = {field.name: field.type for field in msgspec.structs.fields(WorkerSettings)}
    changes: dict[str, str | int | float] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if key not in known or not equals:
            raise ValueError(f"{part!r}: expected KEY=VAL with a key of {', '.join(known)}")
        if key == "kv_cache_memory":
            changes[key] = parse_size(value)
        elif known[key] is int:
            if not value.isdigit():
                raise ValueError(f"{part!r}: expected a whole number")
            changes[key] = int(value)
        elif known[key] is float:
            try:
                changes[key] = float(value)
            except ValueError:
                raise ValueError(f"{part!r}: expected a number") from None
        else:
            changes[key] = value
    return check_worker(msgspec.structs.replace(base, **changes))


def check_worker(settings: WorkerSettings) -> WorkerSettings:
    """Ranges that no type says; raises `ValueError`."""
    if settings.max_num_seqs < 1:
        raise ValueError("max_num_seqs must be at least 1")
    if settings.max_num_batched_tokens < 1:
        raise ValueError("max_num_batched_tokens must be at least 1")
    if settings.dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype {settings.dtype!r} is not one of auto, float32, bfloat16, float16, float64")
    if settings.device != "cpu" and not settings.device.startswith("cuda"):
        raise ValueError(f"device {settings.device!r} is neither cpu nor cuda[:N]")
    if not 0 < settings.gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must be a share of 1, not {settings.gpu_memory_utilization:g}")
    if settings.sms and not re.fullmatch(r"(100|[1-9]\d?)%", settings.sms):
        raise ValueError(f"sms={settings.sms}: write a percentage, as in sms=60%")
    return settings


def check_moves(cluster: ClusterSettings, prefix_caching: bool) -> ClusterSettings:
    """Raises ValueError where KV cannot move as it is asked to."""
    codec = f"the codec is {cluster.kv_codec}"
    if cluster.kv_codec not in CODECS:
        raise ValueError(f"{codec}: expected one of {', '.join(CODECS)}")
    if cluster.decode_after < 1:
        raise ValueError(f"a decode worker goes on after a token at the earliest, not {cluster.decode_after}")
    if cluster.handoff == "store" and not cluster.kv_store:
        raise ValueError("--handoff store goes through --kv-store, and none is given")
    if cluster.kv_store and not prefix_caching:
        raise ValueError("--kv-store keeps what the prefix caches know, and there are none")
    if cluster.kv_codec != RAW and cluster.handoff == "store":
        raise ValueError(f"--handoff store hands over pages as they are, and {codec}")
    if cluster.kv_codec != RAW and cluster.gpu_checksums:
        raise ValueError(f"--gpu-checksums are of pages as they are, and {codec}")
    return cluster


def built_alike(one: ClusterSettings, other: ClusterSettings) -> bool:
    """Whether the same worker processes can be either cluster: all that differs can change while they run.

    Raises `ValueError` where there are too few cores.
    """
    return _built_from(one) == _built_from(other)


def _built_from(cluster: ClusterSettings) -> tuple[object, ...]:
    free = msgspec.structs.asdict(WorkerSettings())
    free = {key: free[key] for key in (*WorkerOptions.__dataclass_fields__, "cpus")}
    workers = [msgspec.structs.replace(settings, **free) for _, _, settings in cluster.roles()]
    return workers, assign_cpus(cluster), cluster.link, cluster.emulate_link, cluster.gpu_checksums


def assign_cpus(cluster: ClusterSettings) -> list[list[int]]:
    """The cores of each worker, in the order of `roles()`: what was asked for, else equal shares of the rest.

    On a CPU a worker's cores are its device, so no two share one. Raises `ValueError` if there are too few.
    """
    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    )
    workers = cluster.roles()
    asked: list[list[int]] = []
    for role, count in (cluster.prefill, cluster.prefill_workers), (cluster.decode, cluster.decode_workers):
        asked += _split(parse_cpus(role.cpus) if role.cpus else [], count, role.cpus)
    taken: set[int] = set()
    for (name, _, settings), cpus in zip(workers, asked, strict=True):
        if missing := [cpu for cpu in cpus if cpu not in available]:
            raise ValueError(f"{name} asks for core {missing[0]}, but this process may use {available}")
        if settings.device == "cpu" and taken & set(cpus):
            raise ValueError(f"{name} asks for core {min(taken & set(cpus))}, which another worker has")
        taken |= set(cpus)
    free = [cpu for cpu in available if cpu not in taken]
    open_workers = [i for i, (_, _, s) in enumerate(workers) if not asked[i] and s.device == "cpu"]
    if len(open_workers) > len(free):
        raise ValueError(
            f"{len(workers)} workers need a core each, and this process may use {len(available)}; "
            "start fewer with --prefill-workers and --decode-workers"
        )
    for index, cpus in zip(open_workers, _split(free, len(open_workers), ""), strict=True):
        asked[index] = cpus
    return [cpus or available for cpus in asked]


def _split(cpus: list[int], workers: int, text: str) -> list[list[int]]:
    """Equal shares of the cores."""
    share = len(cpus) // workers if workers else 0
    if text and workers and not share:
        raise ValueError(f"cpus={text} are fewer cores than the {workers} workers of that role")
    return [cpus[turn * share : (turn + 1) * share] for turn in range(workers)]


def mps_daemon() -> bool:
    """Whether CUDA's processes share a GPU through NVIDIA's multi-process service, and need not take turns."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()

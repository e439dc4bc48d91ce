"""The sides of a benchmark, and the workers behind them.

Equal hardware means the same processes, pages and memory. So one set of workers is one side after the other, wherever
the sides differ in nothing that a worker is built from (`config.built_alike`). Else each side has a set of its own; the
one that is not measured sleeps, or where one device cannot hold both is not there.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

from msgspec.structs import asdict, replace

from minidisagg.bench.client import LoadGenerator, Progress
from minidisagg.bench.settings import LINK_KEYS, BenchOptions
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, built_alike
from minidisagg.core.messages import ROUTER, Hello, Stats
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import ORACLE, RequestRecord
from minidisagg.measure.run_directory import LETTERS
from minidisagg.model.loader import load_config
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.policies import make_policy
from minidisagg.runtime.frontend import Frontend
from minidisagg.sides import numbered, short
from minidisagg.starting import StartBars
from minidisagg.workload.lengths import Encode, WorkItem

Arrangement = Literal["one set", "side by side", "in turn"]
TOLD: dict[Arrangement, str] = {  # what it means where there are two sides
    "one set": "one set of workers is each side in turn",
    "side by side": "workers of different kinds, a set for each side",
    "in turn": "workers of different kinds, of which one device holds one set at a time",
}
OVERHEAD = 2 << 30  # bytes that a worker takes on a GPU beside weights and cache: its context, a step's temporaries
ITEM_BYTES = {"float64": 8, "float32": 4}  # else 2
# In another process, since whoever asks CUDA keeps some hundred MB of the device.
ASK_DEVICES = "from torch.cuda import *; print(*(get_device_properties(i).total_memory for i in range(device_count())))"


class Workers:
    """One set of worker processes, started when it is first needed."""

    def __init__(self, model: ModelSettings, shape: ClusterSettings) -> None:
        """`shape`: what they are started as, which gives them their names."""
        self.model = model
        self.shape = shape
        self.frontend: Frontend | None = None
        self.rivals: list[Workers] = []  # which have to be gone before
        self._starts = 0

    @property
    def names(self) -> list[str]:
        """Theirs, whatever they are at the time."""
        return [name for name, _, _ in self.shape.roles()]

    async def become(self, cluster: ClusterSettings, run: RunSettings) -> Frontend:
        """That cluster, as after a start."""
        if self.frontend is None:
            for rival in self.rivals:
                await rival.stop()
            self._starts += 1
            started = replace(run, record_dir="", decision_dir="")
            with StartBars() as bars:
                self.frontend = await Frontend.start(self.model, self.shape, started, on_starting=bars.tell)
        if run.record_dir and self._starts > 1:  # the epochs, by which logs are named, have begun anew
            run = replace(run, record_dir=_apart(run.record_dir, f"start-{self._starts}"))
        await self.frontend.reconfigure(cluster, run)
        return self.frontend

    async def stop(self) -> None:
        """Nothing of them is left."""
        if self.frontend is not None:
            frontend, self.frontend = self.frontend, None
            await frontend.stop()


class Side:
    """One side: the cluster that its workers are made to be before each run of it."""

    def __init__(
        self, label: str, cluster: ClusterSettings, run: RunSettings, workers: Workers, tokenizer: Tokenizer
    ) -> None:
        self.label = label
        self.cluster = cluster
        self.run = run
        self.workers = workers
        self.mode: str = cluster.mode
        self.policy = cluster.policy
        self.model = workers.model.model
        self.max_model_len = workers.model.max_model_len or load_config(self.model).max_model_len
        self.encode: Encode | None = tokenizer.encode
        self.vocab_size = tokenizer.vocab_size
        self.slo: SLO | None = None  # of each request, which policies see
        self.remarks = [f"B is slowed down by {run.slowdown:.0%} on purpose"] if run.slowdown else []
        self.remarks += [ORACLE] if run.predictor == "oracle" else []

    async def begin(self, policy: str = "", name: str = "") -> None:
        """As after a start: pools empty, policies and estimators new. `policy`: another one than the side's.

        `name`: of the run, for its decisions; what is decided before any has no directory of its own.
        """
        run = self.run
        if run.decision_dir and name:
            run = replace(run, decision_dir=f"{run.decision_dir}/{name}")
        self.frontend = await self.workers.become(replace(self.cluster, policy=policy or self.policy), run)
        self.max_model_len = self.frontend.max_model_len

    @property
    def hellos(self) -> dict[str, Hello]:
        """What each live worker said of itself."""
        return self.frontend.hellos

    async def fresh_stats(self) -> dict[str, Stats]:
        """What each live worker has counted up to now."""
        return await self.frontend.fresh_stats()

    def load(self, items: Sequence[WorkItem], seed: int, on_done: Progress | None) -> LoadGenerator:
        """One run to be."""
        return LoadGenerator(self.frontend, items, seed, on_done, self.slo)

    def notes(self, records: Sequence[RequestRecord]) -> list[str]:
        """What a reader of the numbers must know, one line each."""
        return self.remarks


def make_sides(options: BenchOptions, stack: AsyncExitStack) -> tuple[list[Side], Arrangement]:
    """The sides that are asked for; `stack` ends their workers. Raises ValueError."""
    clusters, tokenizer = options.sides, Tokenizer.load(options.model.model)
    sets, how = make_workers(options.model, clusters)
    for workers in dict.fromkeys(sets):
        stack.push_async_callback(workers.stop)
    sides = []
    for index, (label, cluster, workers) in enumerate(zip(labels(clusters), clusters, sets, strict=True)):
        run = replace(options.run, ceilings=True, trace=True, slowdown=options.trials.planted * index)
        letter = LETTERS[index] if len(clusters) > 1 else ""  # each side's logs apart
        record, decisions = _apart(run.record_dir, letter), _apart(run.decision_dir, letter)
        run = replace(run, record_dir=record, decision_dir=decisions)
        make_policy(cluster.policy, ROUTER, run.decision_dir)  # refuses the decisions of an earlier run
        sides.append(Side(label, cluster, run, workers, tokenizer))
    return sides, how


def make_workers(model: ModelSettings, clusters: Sequence[ClusterSettings]) -> tuple[list[Workers], Arrangement]:
    """The workers of each side, none of them started. Raises ValueError."""
    how = arrangement(model, clusters)
    sets = [Workers(model, cluster) for cluster in clusters]
    if how == "one set":
        # `worker-0` is both or prefill; `prefill-0` would be a misnomer on one of the sides.
        colocated = [workers for workers in sets if workers.shape.mode == "colocated"]
        sets = [*colocated, *sets][:1] * len(sets)
    elif how == "in turn":
        sets[0].rivals, sets[1].rivals = [sets[1]], [sets[0]]
    return sets, how


def describe(sets: Sequence[Workers], how: Arrangement) -> str:
    """One line for a person."""
    names = " + ".join(", ".join(workers.names) for workers in dict.fromkeys(sets))
    return names if len(sets) < 2 else f"{TOLD[how]}: {names}"


def arrangement(model: ModelSettings, clusters: Sequence[ClusterSettings]) -> Arrangement:
    """How the sides come by their workers."""
    if all(built_alike(clusters[0], other) for other in clusters[1:]):
        return "one set"
    if len(clusters) > 2:
        raise ValueError("more than two sides have to be built alike, but these differ in more than mode and policy")
    if not any(settings.device != "cpu" for cluster in clusters for _, _, settings in cluster.roles()):
        return "side by side"
    sizes = gpu_sizes()
    need = sum((memory_on_gpus(model, cluster, sizes) for cluster in clusters), Counter[int]())
    return "side by side" if all(size <= sizes[gpu] for gpu, size in need.items()) else "in turn"


def memory_on_gpus(model: ModelSettings, cluster: ClusterSettings, sizes: Sequence[int]) -> Counter[int]:
    """Bytes that a cluster's workers take, by GPU: about, and none for those on CPUs, which share what there is."""
    config, need, free = load_config(model.model), Counter[int](), itertools.cycle(range(len(sizes)))
    for _, _, settings in cluster.roles():
        if settings.device != "cpu":
            dtype = config.dtype if settings.dtype == "auto" else settings.dtype
            weights = config.num_parameters * ITEM_BYTES.get(dtype, 2)
            gpu = int(settings.device.partition(":")[2] or next(free))
            if gpu >= len(sizes):
                raise ValueError(f"device {settings.device!r} is asked for, and torch sees {len(sizes)} GPUs")
            need[gpu] += weights + (settings.kv_cache_memory or sizes[gpu]) + OVERHEAD  # not told: all that is left
    return need


def gpu_sizes() -> list[int]:
    """Bytes of each GPU; raises ValueError where there is none."""
    done = subprocess.run([sys.executable, "-c", ASK_DEVICES], capture_output=True, text=True, check=False)
    if not (sizes := done.stdout.split()):
        why = done.stderr.strip().splitlines()[-1:] or ["torch sees none"]
        raise ValueError(f"a GPU is asked for, but cannot be had: {why[0]}")
    return list(map(int, sizes))


# ---------------------------------------------------------------- names


def labels(clusters: Sequence[ClusterSettings]) -> list[str]:
    """The sides' names in tables: mode, policy where it is not fcfs, and the settings in which they differ."""
    names = []
    for index, cluster in enumerate(clusters):
        words = [cluster.mode] if cluster.policy == "fcfs" else [cluster.mode, short(cluster.policy)]
        others = [other for n, other in enumerate(clusters) if n != index]
        names.append(" ".join([*words, *dict.fromkeys(word for other in others for word in _apart_by(cluster, other))]))
    return names if len(names) < 3 else numbered(names)  # of two, A and B tell them apart


def _apart_by(cluster: ClusterSettings, other: ClusterSettings) -> list[str]:
    words = [f"{key}={getattr(cluster, key)}" for key in LINK_KEYS if getattr(cluster, key) != getattr(other, key)]
    for mine, theirs in (cluster.prefill, other.prefill), (cluster.decode, other.decode):
        values: dict[str, object] = asdict(mine)
        words += [f"{key}={value}" for key, value in values.items() if value != getattr(theirs, key)]
    return words


def _apart(directory: str, name: str) -> str:
    if not directory:
        return ""
    path = Path(directory) / name
    path.mkdir(parents=True, exist_ok=True)
    return str(path)

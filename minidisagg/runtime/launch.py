"""Starts worker processes, waits for them, and starts a dead one again under the next epoch.

Only the supervisor knows for certain that a process is dead, from the fork server, which has waited for it.
That knowledge is what frees pages that a dead peer might have written to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerConfig, WorkerSettings, assign_cpus
from minidisagg.core.messages import Role
from minidisagg.core.plan import SeqKey
from minidisagg.model.loader import load_config
from minidisagg.runtime.blackbox import read_notes
from minidisagg.runtime.forkserver import Child, ForkServer, fork_server
from minidisagg.runtime.rundir import own, sweep
from minidisagg.store.lifetime import sink_store, tiers_of
from minidisagg.store.spec import MEMORY, SHARED_MEMORY

# Weights on huge pages: a decode step streams all of them. What a step frees stays in the process, since the next step
# would fault it in again, zeroed: together 1.5 times the throughput of 16 sequences on two cores. One arena, since a
# further thread's own consists of heaps of 64 MiB, each unmapped whenever it falls empty: where the temporaries of a
# layer happened to begin a heap, steps took twice the time for seconds. Ignored elsewhere.
MALLOC_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456:"
    "glibc.malloc.arena_max=1"
)
# torch and oneDNN each keep what they made for the last 1,024 shapes of a matmul: 700 MiB after some 10,000 prompts of
# different lengths. With a quarter of that, prefill is as fast.
SHAPE_CACHES = {"LRU_CACHE_CAPACITY": "256", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
BACKOFF = (0.1, 0.5, 2.0, 5.0)  # seconds before each further restart of a worker that dies before it has said hello
HELLO_TIMEOUT = 300.0  # seconds for a worker to load and say hello
STOP_GRACE = 3.0  # seconds between asking a worker to stop and killing it
logger = logging.getLogger("minidisagg")


class Supervisor:
    """The parent of all worker processes of one front end."""

    def __init__(
        self,
        model: ModelSettings,
        cluster: ClusterSettings,
        run: RunSettings,
        run_dir: Path,
        on_down: Callable[[str, int, bool, Collection[SeqKey] | None], None],
    ) -> None:
        """`on_down(name, epoch, early, suspects)` follows the wait for the process; `early`: its first start has
        failed; `suspects`: see `Router.on_worker_down`."""
        load_config(model.model)  # a wrong name or a broken config is told before any process is started
        self.run_dir = run_dir
        self._on_down = on_down
        self._configs = {
            name: WorkerConfig(
                name=name,
                index=index,
                epoch=0,
                role=role,
                model=model,
                settings=settings,
                cluster=cluster,
                run=run,
                run_dir=str(run_dir),
            )
            for index, ((name, _, _), (role, settings)) in enumerate(
                zip(cluster.roles(), _pinned(cluster), strict=True)
            )
        }
        self.processes: dict[str, Child] = {}
        self._forks: ForkServer | None = None
        self.greeted: set[tuple[str, int]] = set()  # workers that said hello
        self.restarts = dict.fromkeys(self._configs, 0)  # since it last said hello
        self._wanted: set[tuple[str, int]] = set()  # deaths that an operator asked for
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._tiers = tiers_of(cluster.kv_store, str(run_dir))  # one store is all workers'
        self._memory = [Path(tier.directory) for tier in self._tiers if not tier.durable]
        self._owners: list[int] = []  # of that

    @property
    def names(self) -> list[str]:
        """All workers, dead or alive."""
        return list(self._configs)

    async def start(self) -> None:
        """Start every worker; they report to the front end by themselves."""
        sweep(SHARED_MEMORY, MEMORY)
        with suppress(OSError):  # the workers say what is wrong with it
            for memory in self._memory:
                memory.mkdir(0o700, exist_ok=True)
                self._owners.append(own(memory))
        for name in self._configs:
            await self._start(name)

    def reconfigure(self, cluster: ClusterSettings, run: RunSettings) -> dict[str, WorkerConfig]:
        """Every worker's next epoch, in the order of `roles()`: for its process to go on with, or for its next one."""
        for config, (role, settings) in zip(list(self._configs.values()), _pinned(cluster), strict=True):
            self._configs[config.name] = msgspec.structs.replace(
                config, epoch=config.epoch + 1, role=role, settings=settings, cluster=cluster, run=run
            )
        return dict(self._configs)

    def kill(self, name: str, epoch: int, wanted: bool = False) -> None:
        """SIGKILL, if that epoch still runs; no request is to blame where an operator `wanted` it."""
        process = self.processes.get(name)
        if process is not None and process.returncode is None and self._configs[name].epoch == epoch:
            if wanted:
                self._wanted.add((name, epoch))
            process.kill()

    def log_tail(self, name: str) -> str:
        """The last line that the worker wrote to its log, for an error message."""
        path = self.run_dir / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1] if lines else ""

    async def stop(self) -> None:
        """Terminate all workers and wait for them; nothing of them is left."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        alive = [process for process in self.processes.values() if process.returncode is None]
        for name, process in self.processes.items():
            if process.returncode is None and (name, self._configs[name].epoch) not in self.greeted:
                process.kill()  # it still loads, and has nothing to lose
            elif process.returncode is None:
                process.send_signal(signal.SIGCONT)  # a stopped one would not even notice
        waiting = [asyncio.ensure_future(process.wait()) for process in alive]

        def kill() -> None:
            for process in alive:
                if process.returncode is None:
                    process.kill()

        try:
            if waiting:
                _, late = await asyncio.wait(waiting, timeout=STOP_GRACE)
                if late:
                    kill()
                    await asyncio.wait(waiting)
            self._release()
            await sink_store(self._tiers)
        finally:  # who does not wait leaves no memory behind either
            kill()
            for memory in self._memory:
                shutil.rmtree(memory, True)
            while self._owners:
                os.close(self._owners.pop())

    async def _start(self, name: str) -> None:
        config = msgspec.structs.replace(self._configs[name], epoch=self._configs[name].epoch + 1)
        self._configs[name] = config
        if self._forks is None or not self._forks.alive:
            self._release()
            self._forks = fork_server(_environment())
        with (self.run_dir / f"{name}.log").open("ab") as log:
            process = await self._forks.fork(msgspec.json.encode(config).decode(), log.fileno())
        self.processes[name] = process
        for work in self._watch(name, config.epoch, process), self._kill_if_silent(name, config.epoch, HELLO_TIMEOUT):
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _release(self) -> None:
        if self._forks is not None:
            self._forks.release()
            self._forks = None

    async def _kill_if_silent(self, name: str, epoch: int, seconds: float) -> None:
        for _ in range(round(seconds)):  # that this process lives through
            await asyncio.sleep(1.0)
            if (name, epoch) in self.greeted:
                return
        self.kill(name, epoch)

    async def _watch(self, name: str, epoch: int, process: Child) -> None:
        """`epoch`: of the process's start; it may have been told since to begin others (`reconfigure`)."""
        code = await process.wait()
        if self._stopping:
            return
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if (name, epoch) in self.greeted:
            self.restarts[name] = 0
        early = epoch == 1 and (name, epoch) not in self.greeted
        last = self._configs[name].epoch
        if not early:  # else the front end's error says it
            logger.warning("worker %s (epoch %d) is dead: %s %s", name, last, how, self.log_tail(name))
        suspects = () if (name, last) in self._wanted else read_notes(self.run_dir, name, epoch) or None
        self._sweep(name, epoch)
        self._on_down(name, last, early, suspects)
        while not early:  # a first start that fails would fail again; a restart is tried again
            await asyncio.sleep(BACKOFF[min(self.restarts[name], len(BACKOFF) - 1)])
            self.restarts[name] += 1
            try:
                return await self._start(name)
            except (OSError, MemoryError) as error:  # no memory or no process number to be had: later there may be
                logger.warning("worker %s cannot be started: %s", name, error)

    def _sweep(self, name: str, epoch: int) -> None:
        """Remove what the dead process had in the run directory: its sockets, those of its links' ends, its notes."""
        for pattern in f"{name}.{epoch}.*", f"*-{name}.*.sock":
            for path in self.run_dir.glob(pattern):
                path.unlink(missing_ok=True)


def _pinned(cluster: ClusterSettings) -> list[tuple[Role, WorkerSettings]]:
    """Role and settings of each worker, with the cores that it gets."""
    return [
        (role, msgspec.structs.replace(settings, cpus="+".join(map(str, cpus))))
        for (_, role, settings), cpus in zip(cluster.roles(), assign_cpus(cluster), strict=True)
    ]


def role_name(role: Role) -> str:
    """ "prefill", "decode" or "both"."""
    return role.name.lower()


def _environment() -> dict[str, str]:
    return {
        "GLIBC_TUNABLES": MALLOC_TUNABLES,
        **SHAPE_CACHES,
        **os.environ,  # whoever has set these knows why
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",  # a worker says how many it wants; the fork server must have no thread but its own
        "MKL_NUM_THREADS": "1",
    }

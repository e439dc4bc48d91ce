"""Real clusters for tests: started, loaded, hurt, and checked to be clean when idle and gone when stopped."""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from minidisagg.config import ClusterSettings, Mode, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.router import RouterSpec
from minidisagg.core.tracked import Emit, StageTimes, Tracked
from minidisagg.runtime import forkserver
from minidisagg.runtime.frontend import Frontend
from minidisagg.store.lifetime import store_of

PAGE = 8
MODEL = ModelSettings(model="dummy:tiny,std=0.15", block_size=PAGE)
PAGE_BYTES = {"float64": 8192, "float32": 4096}  # 8 tokens of 2 layers, K and V, 2 heads of 16
STORES_OF_TESTS = "minidisagg-store-test-"  # directories in shared memory, which tests beside this one may have, too
DEADLINE = 120.0  # seconds for any load in these tests

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) < 2,
    reason="a prefill and a decode worker need a core each",
)


def greedy(max_tokens: int) -> SamplingParams:
    """Deterministic and of a known length."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def settings(
    mode: Mode, link: str = "auto", pages: int = 256, dtype: str = "float64", policy: str = "fcfs",
    max_num_seqs: int = 48, chunk: int = 32, granularity: str = "auto",
) -> ClusterSettings:  # fmt: skip
    """One worker, or a prefill and a decode worker, of one core each."""
    worker = WorkerSettings(
        dtype=dtype, kv_cache_memory=pages * PAGE_BYTES[dtype], max_num_seqs=max_num_seqs, chunk=chunk,
        max_num_batched_tokens=512, cpus="0" if mode == "colocated" and 0 in os.sched_getaffinity(0) else "",
    )  # fmt: skip
    return ClusterSettings(
        mode=mode, prefill_workers=1, decode_workers=int(mode == "disagg"), prefill=worker, decode=worker, link=link,
        policy=policy, transfer_granularity=granularity,
    )  # fmt: skip


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """`length` tokens of the tiny vocabulary."""
    return [rng.randrange(512) for _ in range(length)]


def prompts(count: int, seed: int = 0, shortest: int = 8, longest: int = 512) -> list[list[int]]:
    """Lengths uniform on a log scale; every fifth prompt shares its first three pages with others."""
    rng = random.Random(seed)
    shared = [random_prompt(rng, 3 * PAGE) for _ in range(3)]
    made = []
    for index in range(count):
        prompt = random_prompt(rng, round(shortest * (longest / shortest) ** rng.random()))
        made.append((shared[index % 3] + prompt)[:longest] if index % 5 == 0 else prompt)
    return made


@cache
def policy_file(source: str) -> str:
    """`FILE.py:CLASS` of the one policy in this text; workers load it from there too."""
    path = Path(tempfile.mkdtemp(prefix="policy-")) / "policy.py"
    atexit.register(shutil.rmtree, path.parent)
    path.write_text(source)
    (name,) = re.findall(r"^class (\w+)", source, re.MULTILINE)
    return f"{path}:{name}"


@dataclass
class Result:
    """What the client of one request saw."""

    request_id: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # when each token came
    finish: str = ""
    error: str = ""
    times: StageTimes | None = None
    handoffs: int = 0
    submitted: float = 0.0


class Load:
    """Requests in flight on one front end. Every emission is checked: indices contiguous, one end."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.results: list[Result] = []
        self.open: set[str] = set()
        self.problems: list[str] = []
        self._changed = asyncio.Event()

    def submit(self, prompt: list[int], sampling: SamplingParams) -> Result:
        """Send one request."""
        result = Result("", prompt, submitted=time.monotonic())

        def on_emit(emit: Emit, now: float) -> None:
            if result.finish:
                self.problems.append(f"{emit} after the end")
            if emit.tokens and emit.index != len(result.tokens):
                self.problems.append(f"{emit} after {len(result.tokens)} tokens")
            result.tokens += emit.tokens
            result.at += [now] * len(emit.tokens)
            result.handoffs += emit.handoff
            if emit.finish:
                result.finish, result.error, result.times = emit.finish, emit.error, emit.times
                self.open.discard(emit.request_id)
            self._changed.set()

        result.request_id = self.frontend.submit(prompt, sampling, on_emit)
        if not result.finish:
            self.open.add(result.request_id)
        self.results.append(result)
        return result

    def submit_all(self, many: Sequence[list[int]], sampling: SamplingParams) -> list[Result]:
        """Send them all at once."""
        return [self.submit(prompt, sampling) for prompt in many]

    async def until(self, condition: Callable[[], bool], within: float = DEADLINE) -> None:
        """Wait for something that a token or an end brings."""
        deadline = time.monotonic() + within
        while not condition():
            self._changed.clear()
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.open)} requests are open: {sorted(self.open)[:5]}; {self.frontend.stats}"
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 0.01))
            except TimeoutError:
                continue

    async def finished(self, within: float = DEADLINE) -> list[Result]:
        """Wait for every end, and raise what was wrong on the way."""
        await self.until(lambda: not self.open, within)
        assert not self.problems, self.problems[:5]
        return self.results

    def tracked(self) -> list[Tracked]:
        """What the router knows of the open requests."""
        return [self.frontend.router.requests[name] for name in self.open]


async def run_to_end(frontend: Frontend, many: Sequence[list[int]], sampling: SamplingParams) -> list[list[int]]:
    """The output tokens of all prompts, each of which ends by its length."""
    load = Load(frontend)
    load.submit_all(many, sampling)
    results = await load.finished()
    assert {result.finish for result in results} == {"length"}, [r.error for r in results if r.error][:3]
    return [result.tokens for result in results]


async def all_up(frontend: Frontend, within: float = 60.0) -> None:
    """Wait until every worker is there (again)."""
    deadline = time.monotonic() + within
    while len(frontend.hellos) < len(frontend.supervisor.names):
        assert time.monotonic() < deadline, f"only {list(frontend.hellos)} came up"
        await asyncio.sleep(0.02)


def send_signal(frontend: Frontend, name: str, number: signal.Signals) -> int:
    """To a live worker; returns its process id."""
    pid = frontend.hellos[name].pid
    os.kill(pid, number)
    return pid


async def assert_clean(frontend: Frontend, within: float = 3.0) -> None:
    """No request is left anywhere, and LIVE = INFLIGHT = QUARANTINED = 0, FREE + CACHED = pool on every worker."""
    await all_up(frontend)
    assert not frontend.router.requests
    frontend.router.check_integrity()
    deadline = time.monotonic() + within
    while True:
        stats = await frontend.fresh_stats()
        wrong = [
            (name, s)
            for name, s in stats.items()
            if s.running or s.waiting or s.held or s.offers or s.pages_live or s.pages_inflight or s.pages_quarantined
            or s.pages_free + s.pages_cached != frontend.hellos[name].num_pages
        ]  # fmt: skip
        if not wrong and len(stats) == len(frontend.hellos):
            return
        assert time.monotonic() < deadline, wrong


def descendants(pid: int) -> set[int]:
    """Processes below this one, zombies included; its fork servers are above its workers."""
    found = set[int]()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found |= {int(child) for child in (task / "children").read_text().split()}
    except OSError:  # it is gone
        return found
    return found.union(*map(descendants, found))


def gone(pid: int) -> bool:
    """No process has this id, or only a zombie whose parent has not waited yet."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def in_shared_memory() -> set[str]:
    """What an engine could have left there: no store, whose name says which engine's it is, and no semaphore.

    Tests that run beside this one make both: pools of processes have semaphores.
    """
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("minidisagg-store-", "sem."))}


def assert_left_no_shared_memory(before: set[str], within: float = 5.0) -> None:
    """What is new since `before` goes away: what a test beside this one has made does, what was forgotten does not."""
    deadline = time.monotonic() + within
    while left := in_shared_memory() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@asynccontextmanager
async def cluster(
    shape: ClusterSettings,
    run: RunSettings | None = None,
    router: RouterSpec | None = None,
    model: ModelSettings = MODEL,
) -> AsyncIterator[Frontend]:  # fmt: skip
    """A started front end; at the end no child, no shared memory, no socket and no directory of it may be left."""
    before, shared = descendants(os.getpid()), in_shared_memory()
    frontend = await Frontend.start(model, shape, run or RunSettings(), router)
    try:
        yield frontend
    finally:
        await frontend.stop()
    kept = {server._process.pid for server in forkserver._servers.values()}  # tests/conftest.py
    assert descendants(os.getpid()) <= before | kept
    assert not frontend.run_dir.exists()
    assert_left_no_shared_memory(shared)
    if shape.kv_store:
        tiers = store_of(shape.kv_store, str(frontend.run_dir)).tiers()
        assert not any(os.path.exists(tier.directory) for tier in tiers if not tier.durable)  # noqa: ASYNC240

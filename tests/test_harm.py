"""Worker processes that fail where no range and no check can catch it: in a step, in a handler, in a callback."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cluster import (
    MODEL,
    STORES_OF_TESTS,
    Load,
    all_up,
    assert_clean,
    cluster,
    greedy,
    needs_two_cores,
    prompts,
    run_to_end,
    send_signal,
    settings,
)
from msgspec.structs import replace

from minidisagg.config import ClusterSettings, Mode, RunSettings
from minidisagg.core.router import Router
from minidisagg.core.tracked import Emit
from minidisagg.runtime.forkserver import Child, ForkServer
from minidisagg.runtime.frontend import EngineError, Frontend, StartError
from minidisagg.runtime.launch import Supervisor
from minidisagg.runtime.rundir import make_run_dir, own
from minidisagg.store.files import Files
from minidisagg.store.pool import Pool
from minidisagg.store.spec import SHARED_MEMORY

HOOKS = str(Path(__file__).parent / "hooks")
PROMPTS = prompts(9, seed=4, shortest=12, longest=40)
GUILTY = "00000004"


@pytest.fixture(autouse=True)
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.runtime.launch.BACKOFF", (0.0,))
    monkeypatch.syspath_prepend(HOOKS)  # the supervisor hands its path on to the workers


async def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    """Wait for what brings no token."""
    deadline = time.monotonic() + within
    while not condition():
        await asyncio.sleep(0.01)
        assert time.monotonic() < deadline


async def one_of_many(shape: ClusterSettings, count: int) -> tuple[Frontend, list[list[int]]]:
    async with cluster(shape) as frontend:
        load = Load(frontend)
        results = load.submit_all(PROMPTS[:count], greedy(12))
        await load.finished()
        guilty = next(result for result in results if result.request_id == GUILTY)
        assert guilty.finish == "error" and guilty.error.startswith("failed 3 times, last: worker"), guilty
        results.remove(guilty)
        assert [result.finish for result in results] == ["length"] * (count - 1), [r.error for r in results]
        assert await run_to_end(frontend, PROMPTS[:4], greedy(4)), "and the engine goes on"
        await assert_clean(frontend, within=15.0)  # an abort over gloo lasts as long as its wait, 10 s
        return frontend, [result.tokens for result in results]


@pytest.mark.parametrize(
    ("mode", "count", "harm"),
    [
        ("colocated", 5, f"in_step('{GUILTY}', leave)"),
        *(
            pytest.param(mode, 9, f"in_step('{GUILTY}', {how})", marks=[pytest.mark.slow, needs_two_cores])
            for mode in ("colocated", "disagg")
            for how in ("fail", "leave")
        ),
    ],
)
def test_a_request_that_no_step_survives_is_found(
    mode: Mode, count: int, harm: str, monkeypatch: pytest.MonkeyPatch, charged: dict[str, int]
) -> None:
    monkeypatch.setenv("HARM", harm)
    frontend, _ = asyncio.run(one_of_many(settings(mode), count))
    assert [name for name, failures in charged.items() if failures] == [GUILTY]
    assert 2 < len(frontend.restarted) <= math.ceil(math.log2(count)) + 3


HARMS = {
    "a handler of the router's message": "minidisagg.core.engine:EngineCore._on_submit",
    "a handler of a peer's message": "minidisagg.core.handoff:Sender.advance",
    "a completion": "minidisagg.core.engine:EngineCore._on_piece_done",
    "a poll of the links": "minidisagg.runtime.linkset:LinkSet._settle",
    "an injected delay": "minidisagg.runtime.faults:LateLink._start_next",
    "the planning of a step": "minidisagg.core.cohorts:Cohorts.turns",
    "a callback of the loop": "minidisagg.core.engine:EngineCore.stats",
    "a thread of a link": "minidisagg.transfer.links:ThreadLink._complete",
}


@needs_two_cores
@pytest.mark.slow  # nine processes; tests/test_worker.py asks the same of one worker without its process
def test_an_error_anywhere_ends_the_worker_and_no_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harm = "import asyncio\n"
    for number, (where, place) in enumerate(HARMS.items()):
        later = where == "a callback of the loop"
        what = "lambda *_: asyncio.get_running_loop().call_soon({0})" if later else "lambda *_: {0}()"
        harm += f"at({place!r}, {what.format(f'armed({str(tmp_path / str(number))!r}, fail)')})\n"
    monkeypatch.setenv("HARM", harm)

    async def run() -> None:
        run = RunSettings(delays={"decode_wait": 0.01, "transfer": 0.01})
        async with cluster(settings("disagg", "unix"), run) as frontend:
            for number in range(len(HARMS)):
                (tmp_path / str(number)).touch()
                assert len(await run_to_end(frontend, PROMPTS[:4], greedy(6))) == 4
                await until(lambda n=number: not (tmp_path / str(n)).exists())  # type: ignore[misc]
                await until(lambda n=number: len(frontend.restarted) == n + 1)  # type: ignore[misc]
                await assert_clean(frontend)

    asyncio.run(run())


POLICY = """
from minidisagg import Policy
class Mine(Policy):
    def {hook}(self, *arguments):
        {body}
        return super().{hook}(*arguments)
"""


def policy(tmp_path: Path, hook: str, body: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(POLICY.format(hook=hook, body=body))
    return f"{path}:Mine"


PICKY = """
from minidisagg import Policy
class Mine(Policy):
    def place(self, request, cluster):
        return super().place(request, cluster) if request.priority != 7 else {}[7]
    def order(self, request, stage, worker):
        if request.priority == 8 and stage == "prefill" or request.priority == 9 and stage == "transfer":
            return "never"  # which no tuple is less than
        return super().order(request, stage, worker)
    def accept(self, offer, worker):
        return super().accept(offer, worker) if offer.priority != 10 else "yes"
"""


@needs_two_cores
def test_a_request_that_the_policy_cannot_answer_for_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PICKY)

    async def run() -> None:
        async with cluster(settings("disagg", policy=f"{tmp_path / 'mine.py'}:Mine", max_num_seqs=2)) as frontend:
            load = Load(frontend)
            results = load.submit_all(PROMPTS[:5], greedy(100))
            ends: dict[int, str] = {}
            for priority in range(7, 11):

                def on_emit(emit: Emit, _: float, priority: int = priority) -> None:
                    if emit.finish:
                        ends[priority] = f"{emit.finish}: {emit.error}"

                frontend.submit(PROMPTS[5], greedy(8), on_emit, priority=priority)
            await load.until(lambda: len(ends) == 4)
            assert ends[7].startswith("error: policy Mine: place raised KeyError: 7 (")
            compared = "error: policy Mine: order raised TypeError: "
            assert ends[8].startswith(compared) and ends[9].startswith(compared)
            assert ends[10].startswith("error: policy Mine: accept answered 'yes', not True or False (")
            await load.finished()
            assert {result.finish for result in results} == {"length"}
            await assert_clean(frontend)
            assert not frontend.restarted

    asyncio.run(run())


@pytest.mark.parametrize(
    ("hook", "body", "words"),
    [
        ("compose", "return None", "policy Mine plans nothing"),
        ("place", "return 5", "policy Mine: place answered 5, not Placement or Reject"),
    ],
)
def test_nonsense_from_a_policy_is_a_line_at_the_start(hook: str, body: str, words: str, tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(ValueError) as error:
            async with cluster(settings("disagg", policy=policy(tmp_path, hook, body))):
                pass
        assert words in str(error.value) and "\n" not in str(error.value)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("hook", "body", "words"),
    [
        ("rebalance", "raise OSError('disk')", "the router failed: policy Mine: rebalance raised OSError: disk"),
        ("compose", "raise OSError('disk')", "policy Mine: compose raised OSError: disk"),
    ],
)
def test_a_policy_that_breaks_for_all_ends_every_request_and_takes_no_new_one(
    hook: str, body: str, words: str, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"

    async def run() -> None:
        spec = policy(tmp_path, hook, f"import os; os.path.exists({str(flag)!r}) and exec({body!r})")
        async with cluster(settings("colocated", policy=spec)) as frontend:
            load = Load(frontend)
            results = load.submit_all(PROMPTS[:3], greedy(400))
            await load.until(lambda: all(result.tokens for result in results))
            flag.touch()
            await load.finished()
            assert {result.error.partition(" (")[0] for result in results} == {words}
            with pytest.raises(EngineError, match=words):
                frontend.submit(PROMPTS[0], greedy(4), lambda *_: None)

    asyncio.run(run())


def test_a_policy_that_stalls_on_a_request_fails_that_request(tmp_path: Path) -> None:
    """Here with the longest prompt: it is tried again on another process, and the engine lives."""
    (tmp_path / "mine.py").write_text(
        "from minidisagg import Policy\n"
        "class Mine(Policy):\n"
        "    def compose(self, batch, worker):\n"
        "        if all(one.prompt_len < 70 for one in batch.waiting):\n"
        "            super().compose(batch, worker)\n"
    )

    async def run() -> None:
        async with cluster(settings("colocated", policy=f"{tmp_path / 'mine.py'}:Mine")) as frontend:
            load = Load(frontend)
            (long,) = load.submit_all([[1] * 90], greedy(4))
            await load.finished()
            assert long.finish == "error" and "failed 3 times" in long.error, long
            (short,) = load.submit_all([[1] * 20], greedy(4))
            await load.finished()
            assert short.finish == "length" and frontend.restarted

    asyncio.run(run())


# ---------------------------------------------------------------- time in which somebody did not run


PAUSED = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from cluster import Load, MODEL, greedy, prompts, settings
from minidisagg.config import RunSettings
from minidisagg.core.router import RouterSpec
from minidisagg.runtime.frontend import Frontend

async def main():
    router = RouterSpec(lost_after=1.0)
    async with await Frontend.start(MODEL, settings("colocated"), RunSettings(), router) as frontend:
        load = Load(frontend)
        load.submit_all(prompts(3, longest=64), greedy(300))
        await load.until(lambda: all(result.tokens for result in load.results))
        sys.stdout.write("go\\n")
        sys.stdout.flush()
        await asyncio.sleep(2.5)  # is stopped in this time
        results = await load.finished()
        sys.stdout.write(f"{[r.finish for r in results]} {frontend.restarted}\\n")

asyncio.run(main())
"""


def test_a_front_end_that_was_stopped_kills_nobody() -> None:
    command = [sys.executable, "-c", PAUSED, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "['length', 'length', 'length'] []\n"


@needs_two_cores
def test_a_step_longer_than_the_lease_keeps_the_handoff(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first step takes 1.5 s, the lease is 0.3 s, and nothing is computed twice."""
    path = tmp_path / "slow"
    path.touch()
    slow = f"armed({str(path)!r}, lambda: time.sleep(1.5))"
    monkeypatch.setenv("HARM", f"import time; at('minidisagg.runtime.device:Device.collect', lambda *_: {slow}())")

    async def run() -> None:
        async with cluster(settings("disagg", "unix"), RunSettings(lease=0.3, link_timeout=5.0)) as frontend:
            monkeypatch.setattr(Router, "_resubmit", lambda *_: pytest.fail("resubmitted"))
            assert len(await run_to_end(frontend, PROMPTS[:2], greedy(2))) == 2
            assert not frontend.restarted and not path.exists()
            await assert_clean(frontend)

    asyncio.run(run())


# ---------------------------------------------------------------- what the dead leave behind


@needs_two_cores
@pytest.mark.parametrize("link", ["unix", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gloo", "shm"))])
def test_sources_that_die_while_their_offers_wait_leave_nothing(link: str, tmp_path: Path) -> None:
    def used(frontend: Frontend) -> tuple[int, int, list[str]]:
        """Descriptors and threads of the destination, and what lies in the run directory."""
        pid = frontend.hellos["decode-0"].pid
        files = [re.sub(r"\d+\.", "N.", path.name) for path in frontend.run_dir.iterdir()]
        return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), sorted(files)

    closed = tmp_path / "closed"
    spec = policy(tmp_path, "accept", f"import os\n        if os.path.exists({str(closed)!r}): return False")

    async def run() -> None:
        async with cluster(settings("disagg", link, policy=spec)) as frontend:
            load = Load(frontend)
            closed.touch()
            found = []
            for _ in range(2):
                load.submit(PROMPTS[1], greedy(2))
                await until(lambda: "decode-0" in frontend.stats and frontend.stats["decode-0"].offers > 0)
                await asyncio.sleep(0.2)  # the link comes up
                send_signal(frontend, "prefill-0", signal.SIGKILL)
                frontend.abort(load.results[-1].request_id)
                await until(lambda: "prefill-0" not in frontend.hellos)
                await all_up(frontend)
                await asyncio.sleep(0.3)
                found.append(used(frontend))
            assert found[0] == found[1], found

    asyncio.run(run())


def test_the_next_start_sweeps_what_a_killed_front_end_has_left() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        made, _ = make_run_dir()
        (made / "worker-0.log").touch()
        os.write(writer, str(made).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = Path(os.read(reader, 1000).decode())
    os.close(reader), os.close(writer)
    assert (left / "worker-0.log").exists()
    first, lock = make_run_dir()
    assert not left.exists()
    second, other = make_run_dir()
    assert first.exists(), "its owner lives"
    for directory, file in (first, lock), (second, other):
        shutil.rmtree(directory)
        os.close(file)


def memory_of(frontend: Frontend) -> Path:
    """Of its store."""
    (memory,) = frontend.supervisor._memory
    return memory


def test_the_next_start_sweeps_the_memory_of_a_dead_engine_s_store_and_no_other() -> None:
    left = Path(tempfile.mkdtemp(prefix=STORES_OF_TESTS, dir=SHARED_MEMORY))
    child = os.fork()
    if not child:
        own(left)
        (left / "a page").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (left / "a page").exists()
    made = replace(settings("colocated"), kv_store="local:DRAM=8M")

    async def run() -> None:
        async with cluster(made) as first:
            assert not left.exists()  # noqa: ASYNC240
            async with cluster(made) as second:
                assert memory_of(first) != memory_of(second) and memory_of(first).exists(), "its owner lives"

    asyncio.run(run())


def test_who_does_not_wait_for_an_engine_s_end_leaves_no_memory_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Stuck(Files):
        def fsync(self, path: Path) -> None:
            begun.set()
            go_on.wait(10)

    monkeypatch.setattr("minidisagg.store.lifetime.Pool", partial(Pool, files=Stuck()))
    made = replace(settings("colocated"), kv_store=f"local:DRAM=8M,SSD={tmp_path}:8M")

    async def run() -> None:
        frontend = await Frontend.start(MODEL, made, RunSettings())
        await run_to_end(frontend, PROMPTS[:3], greedy(2))
        memory = memory_of(frontend)
        await until(lambda: len(os.listdir(memory)) > 3)
        stopping = asyncio.create_task(frontend.stop())
        await until(begun.is_set)
        assert memory.exists()
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert not memory.exists()
        go_on.set()
        await frontend.stop()  # the rest

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["colocated", "disagg"])
def test_a_store_that_is_not_there_ends_the_start_in_one_line(mode: Mode) -> None:
    made = replace(settings(mode), kv_store="mooncake:127.0.0.1:1")

    async def run() -> None:
        with pytest.raises(StartError, match=r"^\w+-0: Mooncake('s master at 127.0.0.1:1| cannot be used: ).*[^\n]$"):
            await Frontend.start(MODEL, made, RunSettings())

    asyncio.run(run())


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fork, failures = ForkServer.fork, [OSError("no process number"), MemoryError("no memory")]
    down: list[tuple[str, int]] = []

    async def reluctant(self: ForkServer, config: str, log: int) -> Child:
        if down and failures:
            raise failures.pop()
        return await fork(self, config, log)

    monkeypatch.setattr(ForkServer, "fork", reluctant)

    async def run() -> None:
        supervisor = Supervisor(
            MODEL, settings("colocated"), RunSettings(), tmp_path, lambda n, e, *_: down.append((n, e))
        )
        await supervisor.start()
        supervisor.greeted.add(("worker-0", 1))
        first = supervisor.processes["worker-0"]
        first.kill()
        await until(lambda: supervisor.processes["worker-0"] is not first)
        assert down == [("worker-0", 1)] and not failures
        await supervisor.stop()

    asyncio.run(run())


@pytest.mark.slow  # the simulator's operator does the same in tests/test_blame.py
def test_an_operators_kill_is_nobodys_fault() -> None:
    async def run() -> None:
        async with cluster(settings("colocated")) as frontend:
            load = Load(frontend)
            results = load.submit_all(PROMPTS[:3], greedy(300))
            await load.until(lambda: all(result.tokens for result in results))
            frontend.kill("worker-0")
            await load.until(lambda: bool(frontend.restarted))
            assert [(r.incarnation, r.failures, r.cohort) for r in load.tracked()] == [(1, 0, 0)] * 3
            await load.finished()
            assert {result.finish for result in results} == {"length"}

    asyncio.run(run())

"""The same workers as another cluster: as after a start of it, with nothing left of what they were."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from cluster import (
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
from minidisagg.core.costs import StepCosts
from minidisagg.core.inputlog import read_entries, replay
from minidisagg.core.messages import Role
from minidisagg.policies import load_policy
from minidisagg.runtime.frontend import Frontend

pytestmark = needs_two_cores
SHARED = prompts(20, seed=1, longest=200)  # of whose prefixes some are the same
TWO = settings("disagg", link="shm")


def shape(mode: Mode, link: str = "shm", **options: int) -> ClusterSettings:
    """Two workers; colocated or disaggregated, they are built alike."""
    worker = replace(TWO.prefill, **options)  # type: ignore[arg-type]
    return replace(TWO, mode=mode, prefill=worker, decode=worker, link=link)


async def assert_as_after_a_start(frontend: Frontend) -> None:
    """Every page is FREE, nothing was computed, and nobody has an estimate."""
    stats = await frontend.fresh_stats()
    assert len(stats) == 2
    for name, one in stats.items():
        assert one.pages_free == frontend.hellos[name].num_pages and one.pages_cached == 0
        assert one.steps == one.prefix_queries == one.preemptions == 0
    assert not frontend.requests and frontend.view.waiting == 0
    for status in frontend.view.workers.values():
        assert status.costs == StepCosts()
        assert status.queued_tokens == status.decoding == status.context_tokens == 0


def roles(frontend: Frontend) -> dict[str, Role]:
    return {name: status.role for name, status in frontend.view.workers.items()}


@pytest.mark.parametrize("link", ["shm", "gloo", "unix"])
def test_nothing_is_left_and_each_log_replays_by_itself(link: str, tmp_path: Path) -> None:
    clusters = {"A": shape("colocated", link), "B": shape("disagg", link, chunk=16)}
    runs = {side: RunSettings(record_dir=str(tmp_path / side), decision_dir="") for side in clusters}
    for side in clusters:
        (tmp_path / side).mkdir()

    async def run() -> None:
        answers = []
        async with cluster(clusters["A"]) as frontend:
            pids = {name: hello.pid for name, hello in frontend.hellos.items()}
            dice = frontend.view.rng
            for side in "ABBA":
                before = frontend.router.policy
                await frontend.reconfigure(clusters[side], runs[side])
                assert frontend.router.policy.asks is not before.asks and frontend.view.rng is not dice
                await assert_as_after_a_start(frontend)
                answers.append(await run_to_end(frontend, SHARED, greedy(6)))
                await frontend.fresh_stats()
                assert all(status.costs.predict(100) > 0 for status in frontend.view.workers.values())
                await assert_clean(frontend)
                assert sum(one.prefix_hits for one in frontend.stats.values()) > 0 or side == "A"
                expected = [Role.BOTH, Role.BOTH] if side == "A" else [Role.PREFILL, Role.DECODE]
                assert [roles(frontend)[name] for name in ("worker-0", "worker-1")] == expected
            assert {name: hello.pid for name, hello in frontend.hellos.items()} == pids
        assert answers[0] == answers[1] == answers[2] == answers[3]

    asyncio.run(run())
    for side in clusters:
        paths = sorted((tmp_path / side).glob("worker-*"))
        assert len(paths) == 4  # two workers, twice
        for path in paths:
            with path.open("rb") as log:
                plans = list(replay(log, load_policy))
            assert plans and all(recorded == replayed for recorded, replayed in plans), path
            with path.open("rb") as log:
                spec, _ = read_entries(log)
            assert spec.options.chunk == clusters[side].prefill.chunk


def test_a_worker_that_dies_afterwards_comes_back_as_what_it_is_now() -> None:
    async def run() -> None:
        async with cluster(shape("colocated")) as frontend:
            await frontend.reconfigure(shape("disagg", max_num_seqs=5), RunSettings())
            load = Load(frontend)
            load.submit_all(SHARED, greedy(24))
            await load.until(lambda: len(load.open) < 15)
            send_signal(frontend, "worker-1", signal.SIGKILL)
            results = await load.finished()
            assert {result.finish for result in results} == {"length"}
            await all_up(frontend)
            assert roles(frontend) == {"worker-0": Role.PREFILL, "worker-1": Role.DECODE}
            await assert_clean(frontend)
            await frontend.reconfigure(shape("colocated"), RunSettings())
            assert set(roles(frontend).values()) == {Role.BOTH}
            await assert_as_after_a_start(frontend)
            assert await run_to_end(frontend, SHARED, greedy(24)) == [result.tokens for result in results]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("mode", "victim", "other"), [("colocated", "worker-0", "worker-1"), ("disagg", "decode-0", "prefill-0")]
)
def test_a_worker_that_dies_on_the_way_does_not_stop_it(mode: Mode, victim: str, other: str) -> None:
    async def run() -> None:
        async with cluster(shape(mode)) as frontend:
            await run_to_end(frontend, SHARED, greedy(4))  # they have talked, if there was something to say
            send_signal(frontend, victim, signal.SIGSTOP)  # it will not hear of it
            change = asyncio.create_task(frontend.reconfigure(shape("disagg"), RunSettings()))
            await asyncio.sleep(0.1)
            assert not change.done()
            frontend.supervisor.processes[victim].kill()
            await change
            assert set(roles(frontend).values()) == {Role.PREFILL, Role.DECODE} and {*roles(frontend)} == {
                victim,
                other,
            }
            load = Load(frontend)
            load.submit_all(SHARED, greedy(4))
            await load.finished(within=10.0)  # less than a lease
            await assert_clean(frontend)

    asyncio.run(run())


def test_delays_are_those_of_the_run() -> None:
    async def first_token(frontend: Frontend) -> float:
        times = []
        for _ in range(3):
            load = Load(frontend)
            result = load.submit(SHARED[0], greedy(1))
            await load.finished()
            times.append(result.at[0] - result.submitted)
        return min(times)

    async def run() -> None:
        async with cluster(shape("colocated")) as frontend:
            seen: list[float] = []
            for delays in ({}, {"prefill": 0.2}, {}, {"queue": 0.2}, {}):
                await frontend.reconfigure(shape("colocated"), RunSettings(delays=delays))
                seen.append(await first_token(frontend))
            assert [seconds > 0.2 for seconds in seen] == [False, True, False, True, False], seen

    asyncio.run(run())


def test_what_takes_other_workers_is_refused() -> None:
    async def run() -> None:
        async with cluster(shape("colocated")) as frontend:
            fewer: Any = replace(shape("colocated"), decode_workers=0)
            for other in (shape("colocated", "unix"), shape("colocated", kv_cache_memory=1 << 20), fewer):
                with pytest.raises(ValueError, match="it takes others"):
                    await frontend.reconfigure(other, RunSettings())
            load = Load(frontend)
            load.submit(SHARED[0], greedy(200))
            with pytest.raises(ValueError, match="1 requests are running"):
                await frontend.reconfigure(shape("disagg"), RunSettings())
            await load.finished()
            with pytest.raises(ValueError, match="nonsense"):
                await frontend.reconfigure(replace(shape("disagg"), policy="nonsense"), RunSettings())
            assert set(roles(frontend).values()) == {Role.BOTH}  # none of that has changed anything
            await run_to_end(frontend, SHARED, greedy(4))

    asyncio.run(run())

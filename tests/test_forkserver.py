"""Where workers come from: who shares a fork server, who waits for whom, and what is left when somebody dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cluster import MODEL, Load, all_up, assert_clean, cluster, descendants, gone, greedy, prompts, run_to_end, settings

from minidisagg.config import RunSettings
from minidisagg.runtime import forkserver
from minidisagg.runtime.forkserver import fork_server
from minidisagg.runtime.launch import Supervisor

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


async def until(condition: Callable[[], bool], within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_front_ends_share_one_until_the_last_has_gone() -> None:
    mine = {**ENVIRONMENT, "OF": "this test"}
    first, second, other = fork_server(mine), fork_server(dict(mine)), fork_server({**mine, "OF": "nobody"})
    assert first is second and first is not other
    first.release()
    assert second.alive and fork_server(mine) is second
    for server in second, second, other:
        server.release()
    assert not second.alive and not other.alive
    assert not any(server in (second, other) for server in forkserver._servers.values())


def test_a_config_that_nobody_understands_ends_the_child_alone(tmp_path: Path) -> None:
    async def run() -> None:
        server = fork_server(ENVIRONMENT | {"OF": "this test"})
        try:
            for _ in range(2):
                with (tmp_path / "log").open("wb") as log:
                    child = await server.fork("{}", log.fileno())
                    assert await child.wait() == child.returncode == 1
                child.kill()  # of a dead one nothing happens
                assert "ValidationError" in (tmp_path / "log").read_text()
            assert server.alive
        finally:
            server.release()
        with (tmp_path / "log").open("wb") as log, pytest.raises(OSError):
            await server.fork("{}", log.fileno())

    asyncio.run(run())


def test_who_gives_up_waiting_leaves_no_worker_behind(tmp_path: Path) -> None:
    """A front end that vanishes without stopping what it started, and one that is cancelled while it starts."""

    async def run() -> None:
        supervisor = Supervisor(MODEL, settings("colocated"), RunSettings(), tmp_path, lambda *_: None)
        config = msgspec.json.encode(supervisor._configs["worker-0"]).decode()
        connected = list[asyncio.StreamWriter]()
        listening = await asyncio.start_unix_server(lambda _, end: connected.append(end), tmp_path / "frontend.sock")
        server = fork_server(ENVIRONMENT | {"OF": "this test"})
        try:
            with (tmp_path / "log").open("wb") as log:
                child = await server.fork(config, log.fileno())
                await until(lambda: len(connected) == 1)
                assert descendants(server._process.pid) == {child.pid}
                child._pipe.close()
                await until(lambda: not descendants(server._process.pid))

                server._process.send_signal(signal.SIGSTOP)
                starting = asyncio.create_task(server.fork(config, log.fileno()))
                await asyncio.sleep(0.05)
                starting.cancel()
                await asyncio.wait([starting])
                server._process.send_signal(signal.SIGCONT)
                child = await server.fork(config, log.fileno())  # taken after the other
                await until(lambda: descendants(server._process.pid) == {child.pid})
                await until(lambda: len(connected) == 2)
                child.kill()
                assert await child.wait() == -signal.SIGKILL
        finally:
            server.release()
            listening.close()
            for end in connected:
                end.close()
            await asyncio.sleep(0.05)  # they close on the loop

    asyncio.run(run())


def test_the_death_of_the_fork_server_is_that_of_its_workers_and_of_no_request() -> None:
    async def run() -> None:
        async with cluster(settings("disagg", "unix"), RunSettings(delays={"decode_wait": 0.05})) as frontend:
            alone = await run_to_end(frontend, prompts(4), greedy(8))
            load = Load(frontend)
            results = load.submit_all(prompts(4), greedy(8))
            await load.until(lambda: any(result.tokens for result in results))
            pids = [process.pid for process in frontend.supervisor.processes.values()]
            server = frontend.supervisor._forks
            assert server is not None
            server._process.kill()
            await until(lambda: all(map(gone, pids)))
            assert [result.tokens for result in await load.finished()] == alone
            await all_up(frontend)
            assert len(frontend.restarted) == 2 and frontend.supervisor._forks is not server
            await assert_clean(frontend)

    asyncio.run(run())


def command_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_workers_have_names_of_their_own() -> None:
    async def run() -> None:
        async with cluster(settings("disagg", "unix")) as frontend:
            for name, process in frontend.supervisor.processes.items():
                assert command_name(process.pid) == name[:15]

    asyncio.run(run())

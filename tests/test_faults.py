"""Real processes are killed, stopped and abandoned at each stage: every request completes with the right tokens,
every page comes back, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import (
    Load,
    Result,
    all_up,
    assert_clean,
    assert_left_no_shared_memory,
    cluster,
    gone,
    greedy,
    in_shared_memory,
    needs_two_cores,
    prompts,
    random_prompt,
    run_to_end,
    send_signal,
    settings,
)

from minidisagg.config import Mode, RunSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.router import RouterSpec
from minidisagg.core.tracked import Stage

STAGE = 0.2  # seconds that each stage is made to last, so that a fault can be aimed at it
PROMPTS = prompts(6, seed=1, shortest=12, longest=40)
OUTPUT = 16
DISAGG = ["prefill-0", "decode-0"]


async def reach(load: Load, stage: str) -> None:
    """Wait until the requests, just submitted, are in this stage."""
    if stage == "queued":
        await asyncio.sleep(0.4 * STAGE)
        assert all(request.computing for request in load.tracked())
    elif stage == "prefilling":
        await asyncio.sleep(1.5 * STAGE)
        assert any(request.computing for request in load.tracked())
    elif stage == "transferring":
        await load.until(lambda: any(r.stage is Stage.TRANSFER for r in load.tracked()))
        await asyncio.sleep(0.4 * STAGE)
        assert any(request.stage in (Stage.PREFILL, Stage.TRANSFER) for request in load.tracked())
    else:
        await load.until(lambda: any(len(request.emitted) >= 6 for request in load.tracked()))


async def kill_at(mode: Mode, link: str, faults: list[tuple[str, str]]) -> None:
    """One cluster; for each (stage, worker) a few requests and a SIGKILL in the middle of them."""
    delays = dict.fromkeys(["queue", "prefill", "transfer", "decode_wait"], STAGE)
    async with cluster(settings(mode, link), RunSettings(delays=delays)) as frontend:
        want = await run_to_end(frontend, PROMPTS, greedy(OUTPUT))
        for stage, worker in faults:
            load = Load(frontend)
            load.submit_all(PROMPTS, greedy(OUTPUT))
            await reach(load, stage)
            send_signal(frontend, worker, signal.SIGKILL)
            results = await load.finished()
            assert [r.tokens for r in results] == want, (stage, worker, [r.error for r in results])
            await assert_clean(frontend)
        assert [name for _, name in frontend.restarted] == [worker for _, worker in faults]


@needs_two_cores
def test_killed_at_each_stage_disagg() -> None:
    faults = [
        ("queued", "prefill-0"), ("transferring", "prefill-0"), ("transferring", "decode-0"), ("decoding", "decode-0"),
    ]  # fmt: skip
    asyncio.run(kill_at("disagg", "gloo", faults))


def test_killed_at_each_stage_colocated() -> None:
    faults = [(stage, "worker-0") for stage in ("prefilling", "decoding")]
    asyncio.run(kill_at("colocated", "auto", faults))


def test_a_worker_killed_while_it_restarts_is_started_again() -> None:
    async def run() -> None:
        async with cluster(settings("colocated"), RunSettings(delays={"prefill": STAGE})) as frontend:
            load = Load(frontend)
            load.submit_all(PROMPTS, greedy(4))
            first = send_signal(frontend, "worker-0", signal.SIGKILL)
            processes = frontend.supervisor.processes
            await load.until(lambda: processes["worker-0"].pid != first)
            processes["worker-0"].kill()
            assert {result.finish for result in await load.finished()} == {"length"}
            assert len(frontend.restarted) == 2
            await assert_clean(frontend)

    asyncio.run(run())


def test_a_stop_in_the_middle_of_work_and_of_a_restart_ends_both() -> None:
    async def run() -> list[Result]:
        async with cluster(settings("colocated"), RunSettings(delays={"prefill": STAGE})) as frontend:
            load = Load(frontend)
            load.submit_all(PROMPTS, greedy(4))
            first = send_signal(frontend, "worker-0", signal.SIGKILL)
            await load.until(lambda: frontend.supervisor.processes["worker-0"].pid != first)
        return load.results  # what `cluster` checks: the new process is gone as well

    for result in asyncio.run(run()):
        assert (result.finish, result.error) == ("error", "the engine is stopping")


@needs_two_cores
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["queued", "prefilling", "transferring", "decoding"])
@pytest.mark.parametrize("link", ["gloo", "shm", "unix"])
def test_killed_twenty_times_at_each_stage(stage: str, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.runtime.launch.BACKOFF", (0.0,))
    victims = ["decode-0"] if stage == "decoding" else DISAGG
    asyncio.run(kill_at("disagg", link, [(stage, victims[i % len(victims)]) for i in range(20)]))


@pytest.mark.slow
def test_a_request_that_was_there_three_times_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.runtime.launch.BACKOFF", (0.0,))

    async def run() -> None:
        async with cluster(settings("colocated"), RunSettings(delays={"prefill": STAGE})) as frontend:
            load = Load(frontend)
            load.submit_all(PROMPTS[:1], greedy(200))
            for _ in range(3):
                await all_up(frontend)
                await load.until(lambda: bool(load.tracked()[0].prefill))
                send_signal(frontend, "worker-0", signal.SIGKILL)
                await asyncio.sleep(0.2)
            [result] = await load.finished()
            assert (result.finish, result.error) == ("error", "failed 3 times, last: worker worker-0 failed")
            await all_up(frontend)
            assert len(await run_to_end(frontend, PROMPTS, greedy(4))) == len(PROMPTS)
            await assert_clean(frontend)

    asyncio.run(run())


# ---------------------------------------------------------------- stopped workers


async def stopped(worker: str, link: str, stage: str, seconds: float) -> tuple[bool, list[str]]:
    """SIGSTOP at a stage, SIGCONT after `seconds`; whether the tokens were right, and who was restarted."""
    delays = dict.fromkeys(["queue", "prefill", "transfer"], STAGE)
    router = RouterSpec(lost_after=1.5)
    async with cluster(settings("disagg", link), RunSettings(delays=delays), router) as frontend:
        want = await run_to_end(frontend, PROMPTS, greedy(OUTPUT))
        load = Load(frontend)
        load.submit_all(PROMPTS, greedy(OUTPUT))
        await reach(load, stage)
        pid = send_signal(frontend, worker, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        if not gone(pid):
            os.kill(pid, signal.SIGCONT)
        results = await load.finished()
        await assert_clean(frontend)
        return [r.tokens for r in results] == want, [name for _, name in frontend.restarted]


@needs_two_cores
def test_a_stopped_worker_is_killed_and_replaced() -> None:
    """The source of a one-sided link: until it is dead, nobody may use the pages that it could still write to."""
    assert asyncio.run(stopped("prefill-0", "shm", "transferring", 2.5)) == (True, ["prefill-0"])


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize("link", ["gloo", "shm", "unix", "tcp"])
@pytest.mark.parametrize("worker", DISAGG)
@pytest.mark.parametrize("stage", ["prefilling", "transferring", "decoding"])
def test_stopped_at_each_stage(worker: str, link: str, stage: str) -> None:
    assert asyncio.run(stopped(worker, link, stage, 2.5)) == (True, [worker])
    assert asyncio.run(stopped(worker, link, stage, 0.3)) == (True, [])


# ---------------------------------------------------------------- clients that leave


async def aborts(mode: Mode, link: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    many = prompts(count, seed, longest=200)
    async with cluster(settings(mode, link, pages=80), RunSettings(delays={"transfer": 0.01})) as frontend:
        want = await run_to_end(frontend, many, greedy(24))
        load = Load(frontend)
        results = load.submit_all(many, greedy(24))
        left = rng.sample(results, k=count * 2 // 5)
        aims = {id(result): rng.choice([0, 0, 1, 1, 2, 8, 20]) for result in left}  # tokens to see before leaving
        for result in left[: count // 10]:
            frontend.abort(result.request_id)  # before the workers can have heard of it
        while pending := [r for r in left if not r.finish]:
            for result in pending:
                if len(result.tokens) >= aims[id(result)] and rng.random() < 0.2:
                    frontend.abort(result.request_id)
            await asyncio.sleep(0.002)
        await load.finished()
        assert sum(result.finish == "abort" for result in left) > 0.8 * len(left)
        assert all(result.tokens == tokens for result, tokens in zip(results, want, strict=True) if result not in left)
        assert all(r.tokens == tokens[: len(r.tokens)] for r, tokens in zip(results, want, strict=True))
        await assert_clean(frontend)


@needs_two_cores
def test_clients_leave_at_random_stages_disagg() -> None:
    asyncio.run(aborts("disagg", "gloo", 100, 0))


def test_clients_leave_at_random_stages_colocated() -> None:
    asyncio.run(aborts("colocated", "auto", 60, 1))


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize("link", ["gloo", "shm", "unix", "tcp"])
@pytest.mark.parametrize("seed", [2, 3])
def test_many_clients_leave(link: str, seed: int) -> None:
    asyncio.run(aborts("disagg", link, 300, seed))


# ---------------------------------------------------------------- a thousand, and the end of it all


@needs_two_cores
def test_a_thousand_requests_leave_no_page_behind() -> None:
    rng = random.Random(0)
    many = [random_prompt(rng, rng.randint(4, 24)) for _ in range(1000)]

    async def run() -> None:
        async with cluster(settings("disagg", "shm")) as frontend:
            tokens = await run_to_end(frontend, many, greedy(4))
            assert all(len(out) == 4 for out in tokens)
            await assert_clean(frontend)

    asyncio.run(run())


SCRIPT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from cluster import Load, MODEL, greedy, prompts, settings
from minidisagg.config import RunSettings
from minidisagg.runtime.frontend import Frontend

async def main():
    async with await Frontend.start(MODEL, settings("disagg", "unix"), RunSettings()) as frontend:
        load = Load(frontend)
        load.submit_all(prompts(1000, longest=64), greedy(32))
        await load.until(lambda: len(load.open) <= 950)
        sys.stdout.write(" ".join([str(frontend.run_dir), *(str(h.pid) for h in frontend.hellos.values())]) + "\\n")
        sys.stdout.flush()
        await load.finished()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""


@needs_two_cores
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_front_end_is_interrupted_in_the_middle_of_a_thousand_requests(number: signal.Signals) -> None:
    shared = in_shared_memory()
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        run_dir, *pids = process.stdout.readline().split()
        assert len(pids) == 2
        process.send_signal(number)
        began = time.monotonic()
        process.wait(20)
        assert time.monotonic() - began < 4.0
        errors = process.stderr.read()
    deadline = time.monotonic() + 2.0
    while not all(gone(int(pid)) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive the front end"
        time.sleep(0.02)
    assert_left_no_shared_memory(shared)
    if number == signal.SIGINT:  # nobody can tidy up after a SIGKILL, but the workers die with their parent
        assert process.returncode == 130, errors
        assert errors == ""
        assert not Path(run_dir).exists()


def test_a_request_beyond_the_limits_is_turned_away_in_one_line() -> None:
    async def run() -> None:
        router = RouterSpec(max_waiting=4)
        async with cluster(settings("colocated"), router=router) as frontend:
            load = Load(frontend)
            results = load.submit_all(prompts(12, longest=64), greedy(8))
            await load.finished()
            assert [r.finish for r in results] == ["length"] * 4 + ["reject"] * 8
            assert results[4].error == "4 requests are waiting already"
            for prompt, params, message in [
                ([], SamplingParams(), "the prompt is empty"),
                ([512], SamplingParams(), "token ids must be below the vocabulary's size of 512"),
                ([1] * 2000, SamplingParams(max_tokens=100), "together more than the limit of 2048"),
            ]:
                with pytest.raises(ValueError, match=message):
                    frontend.submit(prompt, params, lambda *_: None)
            await assert_clean(frontend)

    asyncio.run(run())


def test_a_restarted_worker_that_hangs_before_its_hello_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.runtime.launch.BACKOFF", (0.0,))

    async def run() -> None:
        async with cluster(settings("colocated")) as frontend:
            monkeypatch.setattr("minidisagg.runtime.launch.HELLO_TIMEOUT", 1.0)
            first = send_signal(frontend, "worker-0", signal.SIGKILL)
            supervisor = frontend.supervisor
            for _ in range(10_000):
                if supervisor.processes["worker-0"].pid != first:
                    break
                await asyncio.sleep(0.001)
            monkeypatch.setattr("minidisagg.runtime.launch.HELLO_TIMEOUT", 60.0)
            hung = supervisor.processes["worker-0"].pid
            os.kill(hung, signal.SIGSTOP)
            await all_up(frontend)
            assert frontend.hellos["worker-0"].pid not in (first, hung)
            await run_to_end(frontend, prompts(4), greedy(8))

    asyncio.run(run())

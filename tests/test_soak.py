"""Ten thousand requests on real workers, of which three in ten leave: nothing grows, nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import cluster
import pytest
from cluster import needs_two_cores
from test_serve import Command, serve_command

WARM_UP = 5_000  # requests: the server remembers the ends of 4,096
REQUESTS = 10_000
SLOTS = 40  # clients at a time
LEAVE = 0.3
PAGES, PAGE = 256, 16  # of each worker; the model can take as many tokens as fit in all of them
PAGE_BYTES = PAGE * 512  # dummy:tiny in float32: two layers of keys and values with two heads of 16
TOLERANCE = 1.1  # of the resident memory in the last tenth of the requests to that in the second
TOKENS_AT = {0: "queued or prefilling", 1: "transferring or waiting for decode"}  # else decoding


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def workers(command: Command, session: aiohttp.ClientSession) -> dict[str, dict[str, Any]]:
    """What each worker last said of itself."""
    async with session.get(command.url + "/admin/workers") as answer:
        return {worker["name"]: worker["stats"] for worker in await answer.json()}


async def watch_ends(command: Command, session: aiohttp.ClientSession, left_at: Counter[str]) -> None:
    """Counts where the requests were that ended because their client left."""
    async with session.get(command.url + "/admin/events?hz=4") as events:
        async for line in events.content:
            if line.startswith(b"data: "):
                for end in json.loads(line[6:])["ends"]:
                    if end["finish"] == "abort":
                        left_at[TOKENS_AT.get(end["output_tokens"], "decoding")] += 1


async def soak(
    command: Command, session: aiohttp.ClientSession, requests: int
) -> tuple[Counter[str], dict[int, list[float]]]:
    """How the clients ended, and the memory of each process at every hundredth of the way."""
    rng, ends, done, typical = random.Random(7), Counter[str](), 0, 0.3  # seconds that a request takes
    memory: dict[int, list[float]] = {pid: [] for pid in command.family()}
    shared, url = cluster.random_prompt(rng, 3 * PAGE), command.url + "/v1/completions"
    numbers = iter(range(requests))

    async def client() -> None:
        nonlocal done, typical
        for _ in numbers:
            prompt = [*(shared if rng.random() < 0.2 else ()), *cluster.random_prompt(rng, rng.randint(4, 200))]
            leaves = rng.random() < LEAVE  # while a request of the usual length would run
            patience = rng.random() * typical if leaves else 60.0
            body = {
                "prompt": prompt, "max_tokens": 200 if leaves else rng.randint(1, 40), "ignore_eos": True,
                "stream": rng.random() < 0.7,
            }  # fmt: skip
            began = time.monotonic()
            try:
                async with asyncio.timeout(patience), session.post(url, json=body) as answer:
                    await answer.read()
                    ends["ended" if answer.status == 200 else f"status {answer.status}"] += 1
                    typical += 0.05 * (time.monotonic() - began - typical)
            except TimeoutError:
                ends["left"] += 1
            done += 1
            if done % (requests // 100) == 0:
                for pid, found in memory.items():
                    found.append(resident(pid))

    await asyncio.gather(*(client() for _ in range(SLOTS)))
    return ends, memory


async def settled(command: Command, session: aiohttp.ClientSession) -> dict[str, dict[str, Any]]:
    """The workers' statistics once no page is in use, or after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        found = await workers(command, session)
        used = sum(s[f"pages_{state}"] for s in found.values() for state in ("live", "inflight", "quarantined"))
        if not used or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.3)


async def run(command: Command) -> None:
    """The soak, the figures, and the checks."""
    left_at = Counter[str]()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await soak(command, session, WARM_UP)
        watching = asyncio.create_task(watch_ends(command, session, left_at))
        began = time.monotonic()
        ends, memory = await soak(command, session, REQUESTS)
        took = time.monotonic() - began
        stats = await settled(command, session)
        await asyncio.sleep(0.5)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

        sys.stdout.write(f"\n{ends.total()} requests in {took:.0f} s: {dict(ends)}; they left while {dict(left_at)}\n")
        growth = {}
        for pid, name in sorted((pid, _name(pid)) for pid in memory):
            tenths = [statistics.fmean(memory[pid][at : at + 10]) for at in range(0, 100, 10)]
            growth[name] = tenths[9] / tenths[1]
            shown = " ".join(f"{value:.1f}" for value in tenths)
            sys.stdout.write(f"  {name}: MiB by tenth {shown}; last to second {growth[name]:.3f}\n")
        for name, s in stats.items():
            pages = {state: s[f"pages_{state}"] for state in ("free", "cached", "live", "inflight", "quarantined")}
            sys.stdout.write(f"  {name}: pages {pages}, {s['preemptions']} preemptions\n")
            assert pages["live"] == pages["inflight"] == pages["quarantined"] == 0, name
            assert pages["free"] + pages["cached"] == PAGES, name
            assert s["running"] == s["waiting"] == s["held"] == s["offers"] == 0, name

        whole = {"prompt": cluster.random_prompt(random.Random(8), PAGES * PAGE - 4), "max_tokens": 4}
        async with session.post(command.url + "/v1/completions", json=whole | {"ignore_eos": True}) as answer:
            assert answer.status == 200, await answer.text()  # it needs every page of each worker
        await settled(command, session)
    assert set(ends) == {"ended", "left"} and ends["left"] > 0.28 * REQUESTS
    assert left_at.keys() == {*TOKENS_AT.values(), "decoding"} and min(left_at.values()) >= REQUESTS // 100
    assert len(growth) == 4 and max(growth.values()) < TOLERANCE, growth


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    name = Path(f"/proc/{pid}/comm").read_text().strip()  # a worker's own; its command line is the fork server's
    return "front end" if "serve" in words else name if "-" in name else "fork server"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_two_cores
def test_ten_thousand_requests_of_which_three_in_ten_leave(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What torch and oneDNN keep for each shape of a matmul is bounded, but would grow for most of this run, and hide
    # what it is to find.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, os.environ.get(name, "64"))
    settings = (
        "--block-size", str(PAGE), "--kv-cache-memory", str(PAGES * PAGE_BYTES), "--dtype", "float32",
        "--inject-delay", "transfer=20",
    )  # fmt: skip
    with serve_command(*settings, model=f"dummy:tiny,max_len={PAGES * PAGE}") as command, capsys.disabled():
        asyncio.run(run(command))

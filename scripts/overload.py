"""Twice as many requests as the server can do, for a minute: what the accepted ones feel, and how it recovers.

    python scripts/overload.py --mode disagg --seconds 60 --max-waiting 4

Starts `minidisagg serve`, finds its capacity with a closed loop, then sends at capacity and at twice that (Poisson
arrivals) and waits until nothing waits any more. Goodput counts accepted requests whose TTFT is within 1.5 times the
p99 at capacity.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass
class Outcome:
    """One request. `ttft` counts from its scheduled arrival; of a rejection it is the time until that was said."""

    status: int
    ttft: float
    ended: float


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, arguments: Namespace) -> None:
        self.session, self.url, self.arguments = session, url, arguments
        self.rng = random.Random(arguments.seed)
        self.outcomes: list[Outcome] = []

    async def one(self, scheduled: float) -> Outcome:
        a = self.arguments
        prompt = [self.rng.randrange(1000, 40000) for _ in range(a.input_len)]
        body = {"prompt": prompt, "max_tokens": a.output_len, "ignore_eos": True, "stream": True, "temperature": 0}
        ttft = 0.0
        async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
            async for line in answer.content:
                if not ttft and (answer.status != 200 or line.startswith(b"data: {")):
                    ttft = time.monotonic() - scheduled
        outcome = Outcome(answer.status, ttft, time.monotonic())
        self.outcomes.append(outcome)
        return outcome

    async def closed(self, concurrency: int, seconds: float) -> float:
        """Requests completed per second with `concurrency` at a time, the first quarter of the time left out."""
        began, done = time.monotonic(), 0

        async def loop() -> None:
            nonlocal done
            while time.monotonic() < began + seconds:
                outcome = await self.one(time.monotonic())
                if outcome.status != 200:
                    await asyncio.sleep(0.05)
                done += outcome.status == 200 and began + seconds * 0.25 < outcome.ended < began + seconds

        await asyncio.gather(*(loop() for _ in range(concurrency)))
        return done / (seconds * 0.75)

    async def open(self, rate: float, seconds: float) -> list[Outcome]:
        """Poisson arrivals at `rate` for `seconds`; waits for all ends."""
        began, tasks, at = time.monotonic(), [], 0.0
        while (at := at + self.rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(began + at)))
        self.last_arrival = time.monotonic()
        return await asyncio.gather(*tasks)

    async def recovery(self) -> float:
        """Seconds from the last arrival until nothing waits for a first token."""
        while True:
            async with self.session.get(f"{self.url}/admin/state") as answer:
                if (await answer.json())["waiting"] == 0:
                    return time.monotonic() - self.last_arrival
            await asyncio.sleep(0.1)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def good(outcomes: list[Outcome], slo: float, seconds: float) -> float:
    return sum(o.status == 200 and o.ttft <= slo for o in outcomes) / seconds


async def run(arguments: Namespace, port: int) -> dict[str, Any]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, f"http://127.0.0.1:{port}", arguments)
        await client.closed(2, 5.0)
        capacity = await client.closed(arguments.max_waiting * 2, arguments.seconds / 2)
        sys.stdout.write(f"capacity {capacity:.2f} requests/s\n")
        at_capacity = await client.open(capacity, arguments.seconds)
        slo = 1.5 * quantile([o.ttft for o in at_capacity if o.status == 200], 0.99)
        overload = asyncio.create_task(client.open(2 * capacity, arguments.seconds))
        await asyncio.sleep(arguments.seconds)
        recovered = await client.recovery()
        over = await overload
        accepted = [o.ttft for o in over if o.status == 200]
        refused = [o.ttft for o in over if o.status == 429]
        peak, goodput = good(at_capacity, slo, arguments.seconds), good(over, slo, arguments.seconds)
        return {
            "capacity_rps": capacity, "p99_ttft_at_capacity_s": slo / 1.5, "accepted": len(accepted),
            "rejected": len(refused), "other": len(over) - len(accepted) - len(refused),
            "p99_ttft_s": quantile(accepted, 0.99), "p99_ttft_ratio": quantile(accepted, 0.99) / (slo / 1.5),
            "goodput_rps": goodput, "goodput_of_peak": goodput / peak,
            "rejection_ms_p50": 1e3 * quantile(refused, 0.5), "rejection_ms_p99": 1e3 * quantile(refused, 0.99),
            "recovered_s": recovered,
        }  # fmt: skip


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--mode", default="disagg", choices=["colocated", "disagg"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-waiting", type=int, default=4)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    server = subprocess.Popen([
        sys.executable, "-m", "minidisagg", "serve", arguments.model, "--mode", arguments.mode, "--prefill-workers",
        "1", "--decode-workers", "1", "--port", str(arguments.port), "--max-waiting", str(arguments.max_waiting),
    ], stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if "serving on" in line:
                break
        else:
            sys.stderr.write("the server did not start\n")
            return 1
        result = asyncio.run(run(arguments, arguments.port))
    finally:
        server.terminate()
        server.communicate()
    for key, value in result.items():
        sys.stdout.write(f"{key:24} {value:.3f}\n" if isinstance(value, float) else f"{key:24} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

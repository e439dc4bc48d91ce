"""Twice as many requests as the server can do, for a minute: what the accepted ones feel, and how it recovers.

    python scripts/overload.py                                   # both modes, six minutes each
    python scripts/overload.py --mode disagg --seconds 20 --probe-seconds 8

For each mode: starts `minidisagg serve` over a prefill and a decode worker (or two that do both) and offers more and
more requests until goodput grows no further: the best of it is the capacity. Then it offers just as many, and twice as
many, for a minute each, and at the end probes until a request is served as at capacity. Arrivals are Poisson, as many
as the rate says; an accepted request is good if its first token came within the SLO, by default 8 times an unloaded
one. TTFT counts from when the request was due. With few that may wait, some are rejected below capacity too.

Exit status 1, with a line for each, if a bar of docs/reliability.md, figure 5, is missed: p99 TTFT of accepted requests
at most 1.5 times that at capacity, goodput at least 90 % of the peak, rejected in less than 50 ms, recovered in
less than 10 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from minidisagg.measure.machine import command_line, machine

MODES = ("colocated", "disagg")
GROWTH = 1.35  # from one offered rate to the next
GREW = 1.05  # times the best goodput so far: it still grows
GIVE_UP = 60.0  # seconds of probing
PROBE_EVERY = 0.2  # seconds


@dataclass
class Outcome:
    """One request, in seconds. `ttft` counts from its scheduled arrival, `refused` from when it was sent."""

    status: int
    ttft: float = float("inf")
    refused: float = 0.0
    late: float = 0.0  # this client's own delay
    ended: float = 0.0


@dataclass
class Offered:
    """What came of requests at one rate."""

    rate: float
    seconds: float
    outcomes: list[Outcome]

    @property
    def accepted(self) -> list[float]:
        """TTFTs."""
        return [o.ttft for o in self.outcomes if o.status == 200]

    @property
    def refused(self) -> list[float]:
        """Times until that was said."""
        return [o.refused for o in self.outcomes if o.status == 429]

    def goodput(self, slo: float) -> float:
        """Requests per second whose first token came in time."""
        return sum(ttft <= slo for ttft in self.accepted) / self.seconds

    def as_dict(self, slo: float) -> dict[str, float]:
        """For the JSON."""
        return {
            "rate": self.rate, "requests": len(self.outcomes), "rejected": len(self.refused) / len(self.outcomes),
            "goodput": self.goodput(slo), "ttft_p50_s": quantile(self.accepted, 0.5),
            "ttft_p99_s": quantile(self.accepted, 0.99),
            "client_late_p99_s": quantile([o.late for o in self.outcomes], 0.99),
        }  # fmt: skip


class Client:
    """Sends completions of random tokens."""

    def __init__(self, session: aiohttp.ClientSession, url: str, arguments: Namespace) -> None:
        self.session, self.url, self.arguments = session, url, arguments
        self.rng = random.Random(arguments.seed)

    async def one(self, due: float) -> Outcome:
        """A request, streamed to its end."""
        a = self.arguments
        prompt = [self.rng.randrange(1000, 40000) for _ in range(a.input_len)]
        body = {"prompt": prompt, "max_tokens": a.output_len, "ignore_eos": True, "stream": True, "temperature": 0}
        sent = time.monotonic()
        async with self.session.post(f"{self.url}/completions", json=body) as answer:
            outcome = Outcome(answer.status, late=sent - due)
            if answer.status == 429:
                outcome.refused = time.monotonic() - sent
            async for line in answer.content:
                if answer.status == 200 and line.startswith(b"data: {") and outcome.ttft == float("inf"):
                    outcome.ttft = time.monotonic() - due
        outcome.ended = time.monotonic()
        return outcome

    async def offer(self, rate: float, seconds: float) -> list[asyncio.Task[Outcome]]:
        """`rate * seconds` requests at random times; returns after the last has been sent."""
        began, tasks = time.monotonic(), []
        for at in sorted(self.rng.uniform(0, seconds) for _ in range(max(1, round(rate * seconds)))):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(began + at)))
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
        return tasks

    async def offered(self, rate: float, seconds: float) -> Offered:
        """The same, to the end of all."""
        return Offered(rate, seconds, await asyncio.gather(*await self.offer(rate, seconds)))

    async def recovery(self, ttft: float) -> float:
        """Seconds from now until a request has been served within `ttft`; each is sent whether or not others wait."""
        began, done = time.monotonic(), asyncio.Event()
        recovered = float("inf")

        async def probe() -> None:
            nonlocal recovered
            outcome = await self.one(sent := time.monotonic())
            if outcome.ttft <= ttft and not done.is_set():
                recovered = sent + outcome.ttft - began
                done.set()

        async with asyncio.TaskGroup() as tasks:
            while not done.is_set() and time.monotonic() < began + GIVE_UP:
                tasks.create_task(probe())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), PROBE_EVERY)
        return recovered


def quantile(values: list[float], q: float) -> float:
    """Of what there is; not a number where there is nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def finite(value: Any) -> Any:
    """With null for what is no number, as JSON has it."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(line: str) -> None:
    """How it goes; the result alone is for stdout."""
    sys.stderr.write(line + "\n")


async def sweep(client: Client, arguments: Namespace, slo: float, first: float) -> list[Offered]:
    """Rates upwards from `first`, until two in a row bring no more goodput."""
    tried: list[Offered] = []
    rate, best, worse = first, 0.0, 0
    while worse < 2:
        tried.append(await client.offered(rate, arguments.probe_seconds))
        now = tried[-1].goodput(slo)
        rejected = len(tried[-1].refused) / len(tried[-1].outcomes)
        say(f"  offered {rate:6.2f}/s: goodput {now:6.2f}/s, {rejected:4.0%} rejected, "
            f"p99 TTFT {1e3 * quantile(tried[-1].accepted, 0.99):5.0f} ms")  # fmt: skip
        worse = 0 if now > GREW * best else worse + 1
        best = max(best, now)
        rate *= GROWTH
    return tried


async def measure(arguments: Namespace, url: str) -> dict[str, Any]:
    """One server's figures."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, url, arguments)
        await client.one(time.monotonic())
        alone = [await client.one(time.monotonic()) for _ in range(8)]
        unloaded = quantile([o.ttft for o in alone], 0.5)
        slo = arguments.slo_ttft_ms / 1e3 if arguments.slo_ttft_ms else 8 * unloaded
        say(f"  unloaded: TTFT {1e3 * unloaded:.0f} ms; SLO {1e3 * slo:.0f} ms")
        tried = await sweep(client, arguments, slo, 0.5 / unloaded)
        capacity = max(offered.goodput(slo) for offered in tried)
        await asyncio.sleep(1.0)
        at_capacity = await client.offered(capacity, arguments.seconds)
        ttft = quantile(at_capacity.accepted, 0.99)
        say(f"  capacity {capacity:.2f}/s, {arguments.seconds:.0f} s: p99 TTFT {1e3 * ttft:.0f} ms; now twice that")
        await asyncio.sleep(1.0)
        tasks = await client.offer(2 * capacity, arguments.seconds)
        recovered = await client.recovery(ttft)
        over = Offered(2 * capacity, arguments.seconds, await asyncio.gather(*tasks))
    peak = max(capacity, at_capacity.goodput(slo))
    outcomes = (*at_capacity.outcomes, *over.outcomes)
    return {
        "slo_ttft_s": slo, "unloaded_ttft_s": unloaded, "capacity_rps": capacity, "peak_goodput_rps": peak,
        "rates": [offered.as_dict(slo) for offered in tried], "at_capacity": at_capacity.as_dict(slo),
        "overload": over.as_dict(slo), "p99_ttft_ratio": quantile(over.accepted, 0.99) / ttft,
        "goodput_of_peak": over.goodput(slo) / peak, "rejection_ms_p50": 1e3 * quantile(over.refused, 0.5),
        "rejection_ms_p99": 1e3 * quantile(over.refused, 0.99), "recovered_s": recovered,
        "failed": sum(o.status not in (200, 429) for o in outcomes),
    }  # fmt: skip


def missed(figures: dict[str, Any]) -> list[str]:
    """A line for each bar that is."""
    bars = (
        ("p99 TTFT of accepted requests, over that at capacity", "p99_ttft_ratio", "at most", 1.5),
        ("goodput, over its peak", "goodput_of_peak", "at least", 0.9),
        ("time of a rejection, p99, ms", "rejection_ms_p99", "less than", 50.0),
        ("recovered after, s", "recovered_s", "less than", 10.0),
        ("requests that failed", "failed", "at most", 0),
    )
    lines = []
    for what, key, how, bar in bars:
        value = figures[key]
        held = {"at most": value <= bar, "at least": value >= bar, "less than": value < bar}[how]
        if not held:
            lines.append(f"{what}: {value:.2f}, should be {how} {bar}")
    return lines


@contextlib.contextmanager
def serve(arguments: Namespace, mode: str) -> Iterator[str]:
    """The base URL of a server, whose log goes to a file: an unread pipe would stop it."""
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        log = Path(folder) / "server.log"
        command = [
            sys.executable, "-m", "minidisagg", "serve", arguments.model, "--mode", mode, "--prefill-workers", "1",
            "--decode-workers", "1", "--port", "0", "--max-waiting", str(arguments.max_waiting),
        ]  # fmt: skip
        with log.open("w") as out:
            server = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            while "serving on " not in log.read_text():
                if server.poll() is not None:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")
                time.sleep(0.1)
            yield log.read_text().partition("serving on ")[2].split()[0]
        finally:
            server.terminate()
            server.wait()


def table(mode: str, figures: dict[str, Any]) -> str:
    """What a reader wants to see."""
    calm, over = figures["at_capacity"], figures["overload"]
    return "\n".join((
        f"{mode}: capacity {figures['capacity_rps']:.2f} requests/s, SLO TTFT {1e3 * figures['slo_ttft_s']:.0f} ms",
        "                       at capacity   at twice that",
        f"  rejected             {calm['rejected']:11.1%}   {over['rejected']:13.1%}",
        f"  p50 TTFT, accepted   {1e3 * calm['ttft_p50_s']:8.0f} ms   {1e3 * over['ttft_p50_s']:10.0f} ms",
        f"  p99 TTFT, accepted   {1e3 * calm['ttft_p99_s']:8.0f} ms   {1e3 * over['ttft_p99_s']:10.0f} ms"
        f"   {figures['p99_ttft_ratio']:.2f}x",
        f"  goodput              {calm['goodput']:9.2f}/s   {over['goodput']:11.2f}/s"
        f"   {figures['goodput_of_peak']:.0%} of the peak, {figures['peak_goodput_rps']:.2f}/s",
        f"  time of a rejection  p50 {figures['rejection_ms_p50']:.1f} ms, p99 {figures['rejection_ms_p99']:.1f} ms",
        f"  recovered after      {figures['recovered_s']:.2f} s",
    ))  # fmt: skip


def main() -> int:
    """Measures, prints a table and then JSON."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--mode", default="both", choices=[*MODES, "both"])
    parser.add_argument("--seconds", type=float, default=60.0, help="at capacity, and at twice that")
    parser.add_argument("--probe-seconds", type=float, default=20.0, help="at each rate of the search")
    parser.add_argument("--max-waiting", type=int, default=4)
    parser.add_argument("--slo-ttft-ms", type=float, default=0.0, help="0: 8 times that of an unloaded server")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    results: dict[str, Any] = {}
    for mode in MODES if arguments.mode == "both" else (arguments.mode,):
        say(f"{mode}:")
        with serve(arguments, mode) as url:
            results[mode] = asyncio.run(measure(arguments, url))
        sys.stdout.write(table(mode, results[mode]) + "\n")
        sys.stdout.flush()
    failed = [f"{mode}: {line}" for mode, figures in results.items() for line in missed(figures)]
    made = {"command": command_line(), "machine": machine(), "arguments": vars(arguments)}
    sys.stdout.write(json.dumps(finite(made | {"modes": results, "missed": failed})) + "\n")
    for line in failed:
        say(f"missed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

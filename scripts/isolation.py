"""How equal and how separate the two "devices" of a CPU are: the decode step with its neighbour idle and prefilling.

    python scripts/isolation.py --seconds 15

Eight requests decode on one worker, pinned to its cores, while the prefill worker beside it (a) sleeps, (b) prefills
without a pause. Prints the inter-token latency in both cases, and the front end's share of a core. Then the same load
in colocated mode, where both workers do both: what the separation is worth, and the front end's share there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time

from minidisagg.config import ClusterSettings, Mode, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.tracked import Emit
from minidisagg.measure.machine import command_line, machine
from minidisagg.runtime.frontend import Frontend

PROMPT, STREAMS = 256, 8


class Stream:
    """The times of one request's tokens; another one takes its place when it ends."""

    def __init__(self, frontend: Frontend, rng: random.Random, max_tokens: int) -> None:
        self.frontend, self.rng, self.max_tokens = frontend, rng, max_tokens
        self.gaps: list[float] = []
        self.stopped = False
        self.warm = asyncio.Event()
        self._last = 0.0
        self.go()

    def go(self) -> None:
        prompt = [self.rng.randrange(1000, 40000) for _ in range(PROMPT)]
        self._last = 0.0
        sampling = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, ignore_eos=True)
        self.frontend.submit(prompt, sampling, self.hear)

    def hear(self, emit: Emit, now: float) -> None:
        if self._last and not emit.handoff:
            self.gaps.append(now - self._last)
        self._last = now
        if len(self.gaps) >= 5:
            self.warm.set()
        if emit.finish and not self.stopped:
            self.go()


async def measure(mode: Mode, seconds: float) -> dict[str, float]:
    """One cluster under the two loads."""
    rng = random.Random(0)
    worker = WorkerSettings(dtype="bfloat16")
    cluster = ClusterSettings(mode=mode, prefill=worker, decode=worker, link="shm")
    async with await Frontend.start(ModelSettings(prefix_caching=False), cluster, RunSettings()) as frontend:
        streams = [Stream(frontend, rng, 1500) for _ in range(STREAMS)]
        await asyncio.gather(*(stream.warm.wait() for stream in streams))

        async def watch() -> tuple[list[float], float]:
            for stream in streams:
                stream.gaps.clear()
            cpu, began = time.process_time(), time.monotonic()
            await asyncio.sleep(seconds)
            share = (time.process_time() - cpu) / (time.monotonic() - began)
            return sorted(gap for stream in streams for gap in stream.gaps), share

        idle, idle_share = await watch()
        prefills = [Stream(frontend, rng, 1) for _ in range(2)]  # one token each: nothing reaches the decode worker
        await asyncio.sleep(1.0)
        busy, busy_share = await watch()
        for stream in streams + prefills:
            stream.stopped = True
        stats = frontend.stats
        result = {
            "idle_p50_ms": statistics.median(idle) * 1e3, "idle_p99_ms": idle[int(len(idle) * 0.99)] * 1e3,
            "prefilling_p50_ms": statistics.median(busy) * 1e3, "prefilling_p99_ms": busy[int(len(busy) * 0.99)] * 1e3,
            "ratio_p50": statistics.median(busy) / statistics.median(idle),
            "frontend_cpu_idle": idle_share, "frontend_cpu_prefilling": busy_share,
            "prefill_steps": float(stats["prefill-0"].steps if mode == "disagg" else 0),
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    seconds = parser.parse_args().seconds
    found = asyncio.run(measure("disagg", seconds))
    beside = asyncio.run(measure("colocated", seconds))
    found |= {f"colocated_{name}": value for name, value in beside.items() if name != "prefill_steps"}
    for name, value in found.items():
        sys.stdout.write(f"{name:36s} {value:8.2f}\n")
    sys.stdout.write(json.dumps({"command": command_line(), "machine": machine(), **found}) + "\n")


if __name__ == "__main__":
    main()

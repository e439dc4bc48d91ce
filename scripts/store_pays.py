"""From how long a prefix on does a hit beat computing it, and what does a handoff through the store cost?

    python scripts/store_pays.py                                     # SmolLM2's shape, some five minutes
    python scripts/store_pays.py --lengths 32,64,128,256,512,1024 --repeats 7 --out store-pays

Two colocated workers with a store; requests alone, of prompts that nobody has seen. Each prompt comes three times: to
one worker, which computes it; to the other, which finds it in the store; and to the second again, which has it in its
cache. Then a prefill and a decode worker: the gap between first and second token of a handoff from point to point, and
through the store. Medians. What is on the disk is still in the host's page cache, as after any write of less than the
memory.

Writes OUT.svg and OUT.json, and says where the lines cross.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.tracked import Emit
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.plots import Axis, Figure, Panel, Series, standalone
from minidisagg.model.pull import ensure
from minidisagg.runtime.frontend import Frontend

PLACER = '''
from minidisagg import Policy
from minidisagg.core.policy import Placement


class Placer(Policy):
    """To the worker that the request's priority numbers."""

    def place(self, request, cluster):
        name = f"worker-{request.priority % 2}"
        return Placement(name, name)
'''
SAVED = 0.4  # seconds in which a prompt's pages have reached the store
COMPUTED, CACHED, DIRECT = "computed", "in the worker's cache", "point to point"
COLORS = {COMPUTED: "prefill", CACHED: "b", DIRECT: "a", "DRAM": "transfer", "SSD": "wait"}
Seconds = dict[str, dict[int, float]]  # of each way, by length


async def ask(frontend: Frontend, prompt: list[int], worker: int = 0) -> tuple[float, float]:
    """One request: seconds to its first token, and from there to its second."""
    ended, times = asyncio.Event(), list[float]()
    errors: list[str] = []

    def hear(emit: Emit, now: float) -> None:
        times.extend([now] * len(emit.tokens))
        if emit.finish:
            errors.extend([emit.error] if emit.error else [])
            ended.set()

    began = time.monotonic()
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    frontend.submit(prompt, sampling, hear, priority=worker)
    await ended.wait()
    if errors or len(times) < 2:
        raise RuntimeError(errors[0] if errors else "a request ended before its second token")
    return times[0] - began, times[1] - times[0]


def drawn(rng: random.Random, frontend: Frontend, length: int) -> list[int]:
    return [rng.randrange(frontend.vocab_size) for _ in range(length)]


async def hits(model: ModelSettings, tier: str, store: str, policy: str, lengths: list[int], repeats: int) -> Seconds:
    """TTFT by way and length."""
    worker, rng = WorkerSettings(max_num_seqs=4), random.Random(0)
    cluster = ClusterSettings(mode="colocated", prefill=worker, decode=worker, policy=policy, kv_store=store)
    found: Seconds = {COMPUTED: {}, tier: {}, CACHED: {}}
    async with await Frontend.start(model, cluster, RunSettings()) as frontend:
        await ask(frontend, drawn(rng, frontend, lengths[0]))
        await ask(frontend, drawn(rng, frontend, lengths[0]), 1)
        for length in lengths:
            seen: dict[str, list[float]] = {way: [] for way in found}
            for _ in range(repeats):
                prompt = drawn(rng, frontend, length)
                for way, one in zip(found, (0, 1, 1), strict=True):
                    seen[way].append((await ask(frontend, prompt, one))[0])
                    await asyncio.sleep(SAVED)
            for way, values in seen.items():
                found[way][length] = statistics.median(values)
    return found


async def handoffs(
    model: ModelSettings, cluster: ClusterSettings, lengths: list[int], repeats: int
) -> dict[int, float]:
    """Gap between first and second token, by length."""
    rng, found = random.Random(1), dict[int, float]()
    async with await Frontend.start(model, cluster, RunSettings()) as frontend:
        await ask(frontend, drawn(rng, frontend, lengths[0]))
        for length in lengths:
            gaps = [(await ask(frontend, drawn(rng, frontend, length)))[1] for _ in range(repeats)]
            found[length] = statistics.median(gaps)
    return found


async def measure(model: ModelSettings, link: str, lengths: list[int], repeats: int) -> tuple[Seconds, Seconds]:
    """TTFTs of hits, and gaps of handoffs."""
    worker = WorkerSettings(max_num_seqs=4)
    shape = ClusterSettings(mode="disagg", prefill=worker, decode=worker, link=link)
    ttfts: Seconds = {}
    gaps: Seconds = {DIRECT: await handoffs(model, shape, lengths, repeats)}
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        (directory / "placer.py").write_text(PLACER)
        for tier, store in ("DRAM", "local:DRAM=2GiB"), ("SSD", f"local:SSD={directory / 'kv'}:8GiB"):
            of_tier = await hits(model, tier, store, f"{directory}/placer.py:Placer", lengths, repeats)
            ttfts |= of_tier if not ttfts else {tier: of_tier[tier]}
            through = replace(shape, kv_store=store, handoff="store")
            gaps[tier] = await handoffs(model, through, lengths, repeats)
    return ttfts, gaps


def crossing(slower: dict[int, float], faster: dict[int, float]) -> float | None:
    """The length from which on the second is below the first, between measured ones by a line; None: nowhere."""
    over = [(length, slower[length] - faster[length]) for length in sorted(slower)]
    if over[-1][1] <= 0:
        return None
    for (a, below), (b, above) in reversed(list(pairwise(over))):
        if below <= 0:
            return a + (b - a) * -below / (above - below)
    return float(over[0][0])


def figure(model: str, ttfts: Seconds, gaps: Seconds) -> Figure:
    """Two panels over the prompt's length."""
    lengths = sorted(next(iter(gaps.values())))
    x = Axis("tokens of the prompt", lengths[0] / 1.2, lengths[-1] * 1.2, log=True)
    panels = []
    for title, ways in ("TTFT of a prompt that is", ttfts), ("From first to second token, handed over", gaps):
        low, high = (f(s for way in ways.values() for s in way.values()) * 1e3 for f in (min, max))
        series = [
            Series(kind, COLORS[name], [float(n) for n in way], [s * 1e3 for s in way.values()],
                   _label(name) if kind == "points" else "", size=6.0 if kind == "points" else 1.6)
            for name, way in ways.items() for kind in ("line", "points")
        ]  # fmt: skip
        panels.append(Panel(title, x, Axis("ms", low / 1.3, high * 1.3, log=True), series))
    return Figure("What the store saves, and costs", f"{model}, requests alone, medians.", panels, columns=2)


def _label(name: str) -> str:
    return f"in the store ({name})" if name in ("DRAM", "SSD") else name


def table(title: str, ways: Seconds) -> Table:
    found = Table("tokens", title=title, title_justify="left")
    for name in ways:
        found.add_column(f"{_label(name)}, ms", justify="right")
    for length in next(iter(ways.values())):
        found.add_row(str(length), *(f"{way[length] * 1e3:.0f}" for way in ways.values()))
    return found


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--link", default="shm", show_default=True)
@click.option("--lengths", default="64,128,256,512,1024", show_default=True, help="tokens of prompts")
@click.option("--repeats", default=5, show_default=True)
@click.option("--block-size", default=32, show_default=True, help="tokens of a page: what is found is whole pages")
@click.option("--out", default="store-pays", show_default=True, help="path of the two files, without their endings")
def main(model: str, link: str, lengths: str, repeats: int, block_size: int, out: str) -> None:
    console = Console()
    ensure(model, console.print)
    settings = ModelSettings(model=model, block_size=block_size)
    ttfts, gaps = asyncio.run(measure(settings, link, sorted(map(int, lengths.split(","))), repeats))
    console.print(table("TTFT", ttfts), table("From first to second token", gaps))
    crossings: dict[str, float | None] = {}
    for tier in ("DRAM", "SSD"):
        crossings[tier] = at = crossing(ttfts[COMPUTED], ttfts[tier])
        said = "at none of these lengths" if at is None else f"from {at:.0f} tokens on"
        console.print(f"a hit in {tier} beats computing {said}", highlight=False)
    Path(f"{out}.svg").write_text(standalone(figure(model, ttfts, gaps)), encoding="utf-8")
    found: dict[str, Any] = {"command": command_line(), "machine": machine(), "model": model}
    found |= {"ttft_s": ttfts, "gap_s": gaps, "beats_from_tokens": crossings}
    Path(f"{out}.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{out}.svg\n{out}.json", highlight=False)


if __name__ == "__main__":
    sys.exit(main())

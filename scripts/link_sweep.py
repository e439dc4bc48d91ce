"""What an interconnect's bandwidth does to disaggregated requests, by their length and by how finely KV is sent.

    python scripts/link_sweep.py --quick                                      # one length, three bandwidths: 3 minutes
    python scripts/link_sweep.py                                              # smollm2-135m, half an hour
    python scripts/link_sweep.py --link shm --bandwidths 0.5Gbps,2Gbps,8Gbps --lengths 128,1024
    python scripts/link_sweep.py --model dummy:tiny --bandwidths 1Mbps,10Mbps --lengths 64,256 --out tiny
    python scripts/link_sweep.py --granularities request,request+int8 --lengths 512 --loaded 0    # does a codec pay?

For each bandwidth and granularity it starts a prefill and a decode worker over an emulated interconnect, and once more
over the real link alone. For each length of prompts: requests one at a time, whose medians are TTFT and time to the
second token (the handoff is between the two); then Poisson arrivals at half of what the prefill worker does, for the
goodput: requests per second whose second token came within the SLO, three times its time over the real link alone.
The hidden share is 1 - (gap - gap over the real link alone) / (bytes / bandwidth + latency), of the gap between first
and second token: clusters are started one after another, and on a shared machine their prefills differ by more than a
transfer takes. What a transfer does to the prefill beside it shows in TTFT. A granularity may have a codec behind a
plus; bytes are of the cache as it is all the same. Beside the same without one it is printed what the codec does to the
second token, and the bandwidth at which it stops paying.
Arrivals and prompts are the same for all points of a length.

Writes OUT.html (one figure, in SVG, that needs nothing to open) and OUT.json. Faded points are those that the real link
was too slow to show: most of their pieces came later than over the interconnect. Times on a shared machine are noisy:
look at how curves bend, not at single points.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.granularity import parse_granularity
from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import CODECS, RAW
from minidisagg.core.router import Emit
from minidisagg.interconnect import NONE, parse_interconnect
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.page import Content, page
from minidisagg.measure.plots import Axis, Figure, Panel, Series
from minidisagg.model.pull import ensure
from minidisagg.runtime.frontend import Frontend
from minidisagg.transfer.kinds import KINDS

GRANULARITIES = "request,chunk,layers:4,layers:1"
COLORS = ("a", "b", "transfer", "prefill", "handoff", "wait")
METRICS = (
    ("ttft", "TTFT", "ms", 1e3),
    ("second", "second token", "ms", 1e3),
    ("goodput", "goodput", "requests/s", 1.0),
    ("hidden", "hidden share of the transfer", "%", 1e2),
)
LOADED_TOKENS = 16  # of each answer


@dataclass
class Plan:
    """What is varied, and how much is asked of each point."""

    bandwidths: list[str]
    granularities: list[str]
    lengths: list[int]
    alone: int  # requests one at a time
    loaded: int  # requests under load


@dataclass
class Point:
    """What requests of one length saw over one interconnect. Seconds, and requests per second."""

    interconnect: str  # `none`: the real link alone
    granularity: str
    length: int
    ttft: float
    second: float
    goodput: float = 0.0
    attained: float = 0.0  # share of the loaded requests within the SLO
    wire: float = 0.0  # seconds that the interconnect takes for a request's KV, with nothing else on it
    gap: float = 0.0  # median of the time between the two
    hidden: float = 0.0  # share of that which the second token does not wait for
    late: float = 0.0  # share of the pieces that the real link brought later than the interconnect would have

    @property
    def gbits(self) -> float:
        """Bandwidth in Gbit/s."""
        wire = parse_interconnect(self.interconnect)
        return 8e-9 * wire.bandwidth if wire is not None else 0.0


def say(line: str) -> None:
    """How it goes."""
    sys.stderr.write(line + "\n")


async def ask(frontend: Frontend, prompt: list[int], max_tokens: int) -> tuple[float, float]:
    """One request: seconds to its first and to its second token."""
    ended: asyncio.Future[Emit] = asyncio.get_running_loop().create_future()
    times: list[float] = []

    def hear(emit: Emit, now: float) -> None:
        times.extend([now] * len(emit.tokens))
        if emit.finish and not ended.done():
            ended.set_result(emit)

    began = time.monotonic()
    frontend.submit(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True), hear)
    last = await ended
    if last.error or len(times) < 2:
        raise RuntimeError(last.error or "a request ended before its second token")
    return times[0] - began, times[1] - began


class Sweep:
    """Points, in the order in which they are measured; the first ones are those of the real link."""

    def __init__(self, arguments: Namespace, plan: Plan) -> None:
        self.arguments, self.plan = arguments, plan
        self.points: list[Point] = []

    async def run(self) -> list[Point]:
        """All of them."""
        shapes = [(wire, grain) for wire in (NONE, *self.plan.bandwidths) for grain in self.plan.granularities]
        for turn, (wire, grain) in enumerate(shapes, 1):
            name = "the real link alone" if wire == NONE else wire
            say(f"[{turn}/{len(shapes)}] {name}, {grain}")
            async with await Frontend.start(self._model(), self._cluster(wire, grain), RunSettings()) as frontend:
                await ask(
                    frontend, self._prompt(random.Random(-1), frontend, self.plan.lengths[0]), 4
                )  # opens the link
                for length in self.plan.lengths:
                    self.points.append(await self._point(frontend, wire, grain, length))
        return self.points

    def _model(self) -> ModelSettings:
        return ModelSettings(model=self.arguments.model, prefix_caching=False)

    def _cluster(self, wire: str, grain: str) -> ClusterSettings:
        worker = WorkerSettings(chunk=self.arguments.chunk, dtype=self.arguments.dtype)
        return ClusterSettings(
            mode="disagg",
            prefill=worker,
            decode=worker,
            link=self.arguments.link,
            transfer_granularity=grain.partition("+")[0],
            kv_codec=grain.partition("+")[2] or RAW,
            emulate_link=wire,
        )

    def _prompt(self, rng: random.Random, frontend: Frontend, length: int) -> list[int]:
        return [rng.randrange(frontend.vocab_size // 2) for _ in range(length)]

    async def _point(self, frontend: Frontend, wire: str, grain: str, length: int) -> Point:
        rng = random.Random(length)
        before = await pieces(frontend)
        alone = [await ask(frontend, self._prompt(rng, frontend, length), 2) for _ in range(self.plan.alone)]
        point = Point(wire, grain, length, *(statistics.median(column) for column in zip(*alone, strict=True)))
        point.gap = statistics.median(second - first for first, second in alone)
        self._hide(frontend, point)
        await self._load(frontend, point, rng)
        after = await pieces(frontend)
        point.late = (after[1] - before[1]) / max(1, after[0] - before[0])
        say(
            f"    {length:5} tokens: TTFT {1e3 * point.ttft:5.0f} ms, second token {1e3 * point.second:5.0f} ms, "
            f"goodput {point.goodput:.2f}/s ({point.attained:.0%} in time)"
            + (f", hidden {point.hidden:4.0%} of {1e3 * point.wire:.0f} ms" if point.wire else "")
            + (", slower than emulated" if point.late > 0.5 else "")
        )
        return point

    def _hide(self, frontend: Frontend, point: Point) -> None:
        """What the second token has to wait for, against the same granularity over the real link alone."""
        interconnect = parse_interconnect(point.interconnect)
        if interconnect is None:
            return
        hello = next(iter(frontend.hellos.values()))
        tokens = -(-point.length // hello.page_size) * hello.page_size
        point.wire = interconnect.slowest(tokens * hello.kv_bytes_per_token)
        alone = next(
            p
            for p in self.points
            if (p.interconnect, p.granularity, p.length) == (NONE, point.granularity, point.length)
        )
        point.hidden = 1.0 - (point.gap - alone.gap) / point.wire

    async def _load(self, frontend: Frontend, point: Point, rng: random.Random) -> None:
        """Poisson arrivals at a share of the capacity that the real link's point has shown."""
        if not self.plan.loaded:
            return
        reference = next((p for p in self.points if p.length == point.length), point)
        rate, limit = self.arguments.load / reference.ttft, self.arguments.slo * reference.second
        tasks, began = [], time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.loaded):
                prompt = self._prompt(rng, frontend, point.length)
                tasks.append(group.create_task(ask(frontend, prompt, LOADED_TOKENS)))
                await asyncio.sleep(rng.expovariate(rate))
        seconds = [task.result()[1] for task in tasks]
        good = sum(second <= limit for second in seconds)
        point.attained, point.goodput = good / len(seconds), good / (time.monotonic() - began)


async def pieces(frontend: Frontend) -> tuple[int, int]:
    """How many have left the prefill worker, and how many of them were late."""
    links = (await frontend.fresh_stats())["prefill-0"].links
    return sum(link.transfers for link in links), sum(link.late for link in links)


def codecs(points: Sequence[Point]) -> list[str]:
    """What each codec does to the second token and to the gap before it, and where that gap is the same without it:
    between two bandwidths their ratio is taken to follow the logarithm. The real link alone stands for no bandwidth."""
    said = []
    raw = {(p.interconnect, p.granularity, p.length): p for p in points}
    for grain, length in dict.fromkeys((p.granularity, p.length) for p in points if "+" in p.granularity):
        last: tuple[float, float] | None = None
        own = [p for p in points if (p.granularity, p.length) == (grain, length)]
        for point in sorted(own, key=lambda point: point.gbits or math.inf):
            plain = raw.get((point.interconnect, grain.partition("+")[0], length))
            if plain is None:
                continue
            ratio, x = point.gap / plain.gap, math.log(point.gbits) if point.gbits else math.inf
            where = f"{point.gbits:g} Gbit/s" if point.gbits else "the real link alone"
            said.append(
                f"{grain}, {length} tokens, {where}: second token {point.second / plain.second:.2f} x, "
                f"after the first {1e3 * plain.gap:.0f} → {1e3 * point.gap:.0f} ms, {ratio:.2f} x"
            )
            if last is not None and last[1] < 1 <= ratio:
                level = last[0] + (1 - last[1]) / (ratio - last[1]) * (x - last[0])
                at = f"at {math.exp(level):.2g}" if point.gbits else f"above {math.exp(last[0]):g}"
                said.append(f"{grain}, {length} tokens: stops paying {at} Gbit/s")
            last = x, ratio
    return said


# ---------------------------------------------------------------- the figure


def figure(points: Sequence[Point], slo: float) -> Figure:
    """A row of panels per length: TTFT, second token, goodput, hidden share over bandwidth; a curve per granularity."""
    emulated = [point for point in points if point.interconnect != NONE]
    bandwidths = [point.gbits for point in emulated]
    x = Axis("emulated bandwidth, Gbit/s", min(bandwidths) / 1.3, max(bandwidths) * 1.3, log=True)
    panels = []
    for length in sorted({point.length for point in points}):
        for name, title, unit, scale in METRICS:
            here = [point for point in points if point.length == length]
            top = 1e2 if name == "hidden" else max(getattr(point, name) for point in here) * scale
            series = [curve for row in lines(here, name, scale, x) for curve in row]
            panels.append(Panel(f"{length} tokens: {title}", x, Axis(unit, 0.0, 1.08 * top or 1.0), series))
    caption = (
        "TTFT and second token: medians of requests one at a time. Goodput: requests per second whose second token "
        f"came within {slo:g} times its time over the real link alone. Broken lines: the real link alone. "
        "Faded points: the real link was slower than the emulated one. Hidden share: of the time that the "
        "interconnect takes for a request's KV, what its second token does not wait for; g groups of layers can hide "
        "1 - 1/g where compute takes longer. Over shared memory alone there is nothing to hide."
    )
    return Figure("Over the interconnect's bandwidth", caption, panels, columns=2)


def lines(points: Sequence[Point], name: str, scale: float, x: Axis) -> list[list[Series]]:
    """For each granularity: what the real link alone does, a curve, and its points."""
    found = []
    grains = list(dict.fromkeys(point.granularity for point in points))
    for grain, color in zip(grains, COLORS, strict=False):
        own = sorted((p for p in points if p.granularity == grain), key=lambda point: point.gbits)
        real = [scale * getattr(p, name) for p in own if p.interconnect == NONE and name != "hidden"]
        kept = [(p.gbits, scale * getattr(p, name), p.late > 0.5) for p in own if p.interconnect != NONE]
        row = [Series("line", color, [x.low, x.high], real * 2, size=1.2, marker="dash")] if real else []
        row.append(Series("line", color, [at for at, _, _ in kept], [value for _, value, _ in kept], size=1.6))
        for late, opacity, label in ((False, 1.0, grain), (True, 0.35, "")):
            dots = [(at, value) for at, value, slow in kept if slow == late]
            x_values, y_values = [at for at, _ in dots], [value for _, value in dots]
            row.append(Series("points", color, x_values, y_values, label, size=7.0, opacity=opacity))
        found.append(row)
    return found


def write(points: Sequence[Point], arguments: Namespace, out: str) -> None:
    """OUT.json and OUT.html."""
    made: dict[str, Any] = {"command": command_line(), "machine": machine(), "arguments": vars(arguments)}
    Path(f"{out}.json").write_text(json.dumps(made | {"points": [asdict(point) for point in points]}, indent=1) + "\n")
    title = f"{arguments.model}, disaggregated over {arguments.link}"
    content = Content(title, "", [figure(points, arguments.slo)])
    Path(f"{out}.html").write_text(page(content, made, ""), encoding="utf-8")


def read_arguments(words: Sequence[str] | None = None) -> tuple[Namespace, Plan]:
    """The command line; raises `ValueError` for a bandwidth that is none."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", help="of model and KV; float32 where a CPU is slow in bfloat16")
    parser.add_argument("--link", default="gloo", choices=KINDS)
    parser.add_argument("--bandwidths", default="", help="[default: 0.1Gbps,0.3Gbps,1Gbps,3Gbps,10Gbps]")
    parser.add_argument("--latency", default="50us", help="of each of them")
    parser.add_argument("--granularities", default=GRANULARITIES)
    parser.add_argument("--lengths", default="", help="of prompts, in tokens  [default: 128,512,1024]")
    parser.add_argument("--chunk", type=int, default=256, help="tokens that a step computes of a prompt; 0: all")
    parser.add_argument("--load", type=float, default=0.5, help="arrivals, over what the prefill worker does alone")
    parser.add_argument("--loaded", type=int, default=24, help="requests under load of each point; 0: none")
    parser.add_argument("--slo", type=float, default=3.0, help="times the second token's time over the real link")
    parser.add_argument("--quick", action="store_true", help="few points of few requests")
    parser.add_argument("--out", default="link-sweep", help="path of the two files, without their endings")
    arguments = parser.parse_args(words)
    quick = arguments.quick
    bandwidths = arguments.bandwidths or ("0.1Gbps,0.5Gbps,4Gbps" if quick else "0.1Gbps,0.3Gbps,1Gbps,3Gbps,10Gbps")
    plan = Plan(
        bandwidths=[f"{bandwidth.strip()},{arguments.latency}" for bandwidth in bandwidths.split(",")],
        granularities=arguments.granularities.split(","),
        lengths=[int(length) for length in (arguments.lengths or ("256" if quick else "128,512,1024")).split(",")],
        alone=3 if quick else 7,
        loaded=min(6, arguments.loaded) if quick else arguments.loaded,
    )
    for wire in plan.bandwidths:
        parse_interconnect(wire)
    for grain in plan.granularities:
        grain, plus, codec = grain.partition("+")
        parse_granularity(grain, 1)
        if plus and codec not in CODECS:
            raise ValueError(f"no codec {codec!r}; there are {', '.join(CODECS)}")
    return arguments, plan


def main() -> int:
    """Measures and writes; returns the exit status."""
    try:
        arguments, plan = read_arguments()
    except ValueError as error:
        say(str(error))
        return 2
    ensure(arguments.model)
    try:
        points = asyncio.run(Sweep(arguments, plan).run())
    except KeyboardInterrupt:
        return 130
    write(points, arguments, arguments.out)
    sys.stdout.write("".join(line + "\n" for line in codecs(points)))
    sys.stdout.write(f"{arguments.out}.html\n{arguments.out}.json\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

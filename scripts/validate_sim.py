"""Is the simulator right about this machine? The engine measured, the same loads simulated, and the error of each
quantile beside what two runs of the engine differ by: no simulator can be closer than that.

    python scripts/validate_sim.py --seed 7 [--cases 10] [--model smollm2-135m] [--requests 80] [--out validation.json]

1. One worker alone is measured (`minidisagg profile`).
2. Loads are drawn from the seed: lengths, rate, policy. Each is run twice on the engine, colocated and disaggregated.
   Before each, one of three fixed loads is run: a machine's speed changes within an hour.
3. The steps of the five fixed loads about it adjust the profile for a drawn load, in each mode: beside a
   neighbour that computes, too, in mixed steps and with messages to answer, steps take longer than alone. The wire is
   what the links did. Then the drawn loads are simulated with nothing else fitted; a figure predicted is the mean of a
   few simulations' (their steps scatter).

The default model is SmolLM2's shape with a fifth of its layers: five times as many requests in the same time, and tails
are of many requests. An idle machine with two cores or more; 3 to 5 minutes a case, by how fast it is.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from minidisagg.bench.client import LoadGenerator, worker_records
from minidisagg.bench.profiler import KEPT, Watch, error_table, grouped, measure
from minidisagg.bench.sides import Workers
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import Role, StepOutput, WorkerOptions
from minidisagg.interconnect import Interconnect
from minidisagg.measure.goodput import SLO, attainment
from minidisagg.measure.records import RequestRecord, RunRecord
from minidisagg.measure.stats import by_schedule, window_of
from minidisagg.model.pull import ensure
from minidisagg.policies import load_policy
from minidisagg.sim.machines import ClusterSpec, Group
from minidisagg.sim.profile import Curve, Grid, Profile
from minidisagg.sim.simulation import Settings, Simulation
from minidisagg.workload.arrivals import arrival_times
from minidisagg.workload.lengths import WorkItem, random_items, with_arrivals, with_prompts

MODES = ("colocated", "disagg")
POLICIES = ("fcfs", "sarathi:chunk=64", "prefill_first")
SEQS, BUDGET, PAGE = 16, 1024, 128
SIMULATIONS = 5  # of each load
FIT = (11, 0.6, "fcfs"), (12, 0.3, "fcfs"), (13, 0.45, "sarathi:chunk=64")  # seeds, rates, policies of fixed loads
NEAR = 5  # fixed loads by which a drawn one is scaled: each kind once at least, and all of the same few minutes
LEAST = 8  # prompts of about one length whose median is believed
QUANTILES = (("ttft", 50), ("ttft", 90), ("ttft", 99), ("tpot", 50), ("tpot", 90))
BARS = {"p99 ttft": (0.15, 0.0), "attainment": (0.05, 0.0)}  # else 10 %, or 1.5 times what the engine differs by


class Case(NamedTuple):
    """A load; `rate` of what one worker sustains that only prefills or only decodes, whichever is less."""

    seed: int
    prompt: int
    output: int
    spread: float
    rate: float
    policy: str
    requests: int

    def items(self, profile: Profile) -> list[WorkItem]:
        """Its requests, for a worker of this profile."""
        prefill = profile.step_seconds([(0, self.prompt)], 0, 0)
        decode = self.output * profile.step_seconds((), SEQS, SEQS * (self.prompt + self.output // 2)) / SEQS
        items = random_items(self.requests, self.prompt, self.output, self.spread, self.seed)
        rate = self.rate / max(prefill, decode)
        return with_arrivals(items, arrival_times(self.requests, rate, 1.0, self.seed))

    def slo(self, profile: Profile) -> SLO:
        """Eight prefills, two steps alone."""
        prefill, step = profile.step_seconds([(0, self.prompt)], 0, 0), profile.step_seconds((), 1, self.prompt)
        return SLO(ttft=8e3 * prefill, tpot=2e3 * step)


def draw(seed: int, number: int, requests: int) -> Case:
    """The number-th case of a seed."""
    rng = random.Random(f"{seed} {number}")
    return Case(
        seed * 1000 + number, rng.choice((64, 128, 256)), rng.choice((16, 32, 64)), rng.choice((0.0, 0.5)),
        rng.uniform(0.3, 0.7), rng.choice(POLICIES), requests,
    )  # fmt: skip


class Measured(NamedTuple):
    """What the engine made of a case, once or twice."""

    case: Case
    mode: str
    items: list[WorkItem]
    slo: SLO
    seen: list[dict[str, float]]


class Engine:
    """Two workers of one core each."""

    def __init__(self, model: ModelSettings, workers: Workers) -> None:
        self.model = model
        self.workers = workers

    async def run(self, mode: str, policy: str, items: list[WorkItem]) -> tuple[list[RequestRecord], Watch, float]:
        """One run: its requests, its steps, and bytes per second on its links (0: none)."""
        cluster = replace(self.workers.shape, mode=mode, policy=policy)
        frontend = await self.workers.become(cluster, RunSettings())
        vocab, watch = frontend.vocab_size, Watch()
        warm = with_prompts([WorkItem(index=n, prompt_len=32, output_len=4, salt="warm") for n in range(4)], vocab)
        await LoadGenerator(frontend, warm, 0, None).run(4)
        before = await frontend.fresh_stats()
        frontend.observers.append(watch)
        records = await LoadGenerator(frontend, with_prompts(items, vocab), 0, None).run(None)
        frontend.observers.clear()
        _, links = worker_records(dict(frontend.hellos), before, await frontend.fresh_stats())
        seconds = sum(link.seconds for link in links)
        return records, watch, sum(link.bytes for link in links) / seconds if seconds else 0.0


# ---------------------------------------------------------------- fitting


def scaled(profile: Profile, watches: list[Watch]) -> Profile:
    """The profile with the steps of loaded workers: decodes by their median ratio to it, prompts by that of those that
    are about as long: beside a neighbour that reads memory a short one, which reads as many weights, loses more."""
    steps = [step for watch in watches for step in watch.steps if step.prefill_tokens or step.decode_tokens]
    ratios = [(step, step.seconds / predicted(profile, step)) for step in steps]
    prompts = [(step.prefill_tokens + step.decode_tokens, ratio) for step, ratio in ratios if step.prefill_tokens]
    decodes = [ratio for step, ratio in ratios if not step.prefill_tokens]
    decode, most, table = statistics.median(decodes or [1.0]), profile.decode_attention.rows[-1], profile.linear
    near = grouped((round(2 * math.log2(tokens)), (tokens, ratio)) for tokens, ratio in prompts).values()
    known = sorted(tuple(map(statistics.median, zip(*some, strict=True))) for some in near if len(some) >= LEAST)
    lengths, ratios = zip(*(known or [(1, 1.0)]), strict=True)
    factors = [decode if t <= most else float(np.interp(math.log(t), np.log(lengths), ratios)) for t in table.points]
    # The head is scaled as decodes are; what it takes more at the end of a prompt stays in the prompt.
    head = profile.head.at(1)
    linear = [
        s * factor + (head * (factor - decode) if t > most else 0.0)
        for t, s, factor in zip(table.points, table.seconds, factors, strict=True)
    ]
    for i in range(1, len(linear)):
        linear[i] = max(linear[i], linear[i - 1])
    fitted = replace(
        profile,
        linear=Curve(table.points, linear),
        head=Curve(profile.head.points, [s * decode for s in profile.head.seconds]),
        decode_attention=by(profile.decode_attention, decode),
    )
    left = grouped((bool(step.prefill_tokens), step.seconds / predicted(fitted, step)) for step in steps)
    some = {kind: random.Random(0).sample(ratios, min(KEPT, len(ratios))) for kind, ratios in left.items()}
    return replace(fitted, residuals=some.get(False, []), prompt_residuals=some.get(True, []))


def predicted(profile: Profile, step: StepOutput) -> float:
    """Of a step as its worker tells of it, its prompts taken for one that begins; as many end as there are tokens."""
    prompts = [(0, step.prefill_tokens)] if step.prefill_tokens else []
    context, last = max(0, step.context_tokens - step.prefill_tokens), len(step.tokens) - step.decode_tokens
    return profile.step_seconds(prompts, step.decode_tokens, context, last) - profile.constant


def by(grid: Grid, factor: float) -> Grid:
    """Of so many times the seconds."""
    return Grid(grid.rows, grid.columns, [[factor * s for s in row] for row in grid.seconds])


# ---------------------------------------------------------------- comparing


def figures(records: list[RequestRecord], slo: SLO) -> dict[str, float]:
    """What is compared; of the measured window, as everywhere."""
    run = RunRecord(label="", requests=records)
    window = window_of(run)
    kept = [r for r in by_schedule(run)[window.first : window.last] if r.ok]
    values = {
        "ttft": [r.token_times[0] - r.scheduled for r in kept],
        "tpot": [(r.token_times[-1] - r.token_times[0]) / max(1, len(r.token_times) - 1) for r in kept],
    }
    found = {f"p{q} {name}": float(np.percentile(values[name], q)) for name, q in QUANTILES}
    return found | {"attainment": attainment(kept, slo)}


def simulated(
    profile: Profile, wire: Interconnect, mode: str, case: Case, items: list[WorkItem], slo: SLO
) -> dict[str, float]:
    """The figures of the same load on the same cluster, in no time."""
    roles = [Role.BOTH] * 2 if mode == "colocated" else [Role.PREFILL, Role.DECODE]
    options = WorkerOptions(SEQS, BUDGET, 0)
    cluster = ClusterSpec(
        groups=tuple(Group(role, 1, "here") for role in roles), model=profile.model, dtype=profile.dtype,
        page_size=PAGE, wire=wire, prefill=options, decode=options,
    )  # fmt: skip
    found = []
    for number in range(SIMULATIONS):
        settings = Settings(seed=case.seed + number)
        simulation = Simulation(cluster, partial(load_policy, case.policy), items, settings, {"here": profile})
        simulation.play(0.0, None)
        found.append(figures(simulation.record(case.policy).requests, slo))
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


async def validate(model: ModelSettings, seed: int, cases: int, requests: int, console: Console) -> dict[str, object]:
    """All of it."""
    began = time.monotonic()
    worker = WorkerSettings(max_num_seqs=SEQS, max_num_batched_tokens=BUDGET)
    one = replace(worker, cpus="0")
    alone = ClusterSettings(prefill_workers=1, decode_workers=0, prefill=one, decode=one)
    without = replace(model, prefix_caching=False)
    profile, decodes, prompts = await measure(without, alone, RunSettings(), "here", 120.0, console)
    console.print(error_table(profile, decodes, prompts))
    shape = ClusterSettings(mode="colocated", prefill=worker, decode=worker)

    watches: dict[str, list[Watch]] = {mode: [] for mode in MODES}
    rates, fits, drawn = list[float](), list[Measured](), list[Measured]()
    async with AsyncExitStack() as stack:
        engine = Engine(model, Workers(model, shape))
        stack.push_async_callback(engine.workers.stop)
        for number in range(cases):
            fit_seed, rate, policy = FIT[number % len(FIT)]
            for case in (Case(fit_seed, 128, 32, 0.5, rate, policy, requests), draw(seed, number, requests)):
                # How loads are drawn and where their limits lie must not hang on the mode: from the worker alone.
                items, slo, fitted = case.items(profile), case.slo(profile), case.seed == fit_seed
                for mode in MODES:
                    seen = []
                    for _ in range(1 if fitted else 2):
                        records, watch, bandwidth = await engine.run(mode, case.policy, items)
                        seen.append(figures(records, slo))
                        if fitted:
                            watches[mode].append(watch)
                            rates += [bandwidth] if bandwidth else []
                    (fits if fitted else drawn).append(Measured(case, mode, items, slo, seen))
            console.print(f"{time.monotonic() - began:4.0f} s  case {number + 1} of {cases}: {case}", style="dim")
    # By the fixed loads about each: the machine's speed changes by a fifth within the hour.
    near = [max(0, min(number - NEAR // 2, cases - NEAR)) for number in range(cases)]
    loaded = {mode: [scaled(profile, watches[mode][n : n + NEAR]) for n in near] for mode in MODES}
    wire = Interconnect(statistics.median(rates), 200e-6)

    def rows(measured: list[Measured]) -> list[dict[str, object]]:
        return [
            {"case": m.case._asdict(), "mode": m.mode, "engine": m.seen,
             "simulated": simulated(loaded[m.mode][place // len(MODES)], wire, m.mode, m.case, m.items, m.slo)}
            for place, m in enumerate(measured)
        ]  # fmt: skip

    found = {"seed": seed, "model": model.model, "fitted": rows(fits), "rows": rows(drawn), "wire": str(wire)}
    console.print(f"fitted: wire {wire}", style="dim")
    console.print(summary(found["fitted"], "The loads that were fitted: simulated against one run of the engine"))
    console.print(summary(found["rows"], "Drawn loads: simulated against the engine"))
    steps = {mode: [step for watch in watches[mode] for step in watch.steps] for mode in MODES}
    return found | {"alone": profile, "profiles": loaded, "steps": steps}  # enough to fit again


def summary(rows: list[dict[str, object]], title: str) -> Table:
    """Median and worst error of each figure, beside the floor."""
    table = Table(title=title, title_justify="left")
    for head in ("", "|error| median", "90 %", "engine against itself, median", "90 %", "within bar", "right winner"):
        table.add_column(head, justify="right" if head else "left")
    for name in [f"p{q} {name}" for name, q in QUANTILES] + ["attainment"]:
        errors, floor = list[float](), list[float]()
        for row in rows:
            one, two = (row["engine"][at][name] for at in (0, -1))  # type: ignore[index, union-attr]
            guess, mean = row["simulated"][name], (one + two) / 2  # type: ignore[index]
            scale = 1.0 if name == "attainment" else mean
            errors.append(abs(guess - mean) / scale)
            floor.append(abs(one - two) / scale)
        cells = [f"{np.percentile(values, q):.1%}" for values in (errors, floor) for q in (50, 90)]
        least, times = BARS.get(name, (0.10, 1.5))
        within = sum(error <= max(least, times * own) for error, own in zip(errors, floor, strict=True))
        right, decided = winners(rows, name)
        table.add_row(name, *cells, f"{within} of {len(rows)}", f"{right} of {decided} decided")
    return table


def winners(rows: list[dict[str, object]], name: str) -> tuple[int, int]:
    """In how many cases the simulator names the better mode, of those in which all runs of the engine agree on it."""
    right = decided = 0
    for colocated, disagg in zip(rows[::2], rows[1::2], strict=True):
        a, b = ([run[name] for run in row["engine"]] for row in (colocated, disagg))  # type: ignore[attr-defined]
        guessed = colocated["simulated"][name] < disagg["simulated"][name]  # type: ignore[index]
        if max(a) < min(b) or max(b) < min(a):
            decided += 1
            right += guessed == (max(a) < min(b))
    return right, decided


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--model", default="dummy:smollm2-135m,layers=6")
    parser.add_argument("--requests", type=int, default=120, help="of each run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console = Console(stderr=True)
    ensure(args.model, lambda text: console.print(text))
    result = asyncio.run(validate(ModelSettings(model=args.model), args.seed, args.cases, args.requests, console))
    if args.out:
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


if __name__ == "__main__":
    sys.exit(main())

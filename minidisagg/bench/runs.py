"""The runs of a benchmark: the same arrivals on every side, interleaved.

    calibrate   a few requests one at a time, under fcfs: unloaded prefill and step time → capacity, default SLOs
    measure     for each repetition: a workload of its own; both sides run it, A B B A …

Every run on workers of the bench's own begins as after their start, and warm: see `sides`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from minidisagg.bench.client import worker_records
from minidisagg.bench.http_client import HttpServer
from minidisagg.bench.settings import BenchOptions, ServerAddress
from minidisagg.bench.sides import Arrangement, Side, describe, make_sides
from minidisagg.measure.comparison import Comparison, compare_runs
from minidisagg.measure.contest import Contest, contest
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import RequestRecord, RunRecord
from minidisagg.measure.run_directory import run_name
from minidisagg.measure.settings import check_measurable
from minidisagg.measure.timeline import Timeline
from minidisagg.replay.alike import decided_alike
from minidisagg.workload.lengths import WorkItem, at_rate, with_prompts
from minidisagg.workload.settings import TEXTS, build_items, check_length, describe_workload
from minidisagg.workload.traces import TraceReport

CALIBRATION, QUICK_CALIBRATION, LOOK = 6, 4, 2  # requests one at a time; the last for a first look
CALIBRATION_OUTPUT = 17  # most tokens of such a request
WARM_PROMPT, WARM_OUTPUT = 32, 4  # most tokens of a request that warms up: its links, since the process has run before
TTFT_SLO, TPOT_SLO = 8.0, 2.0  # times the unloaded prefill and decode step
QUICK_SECONDS = 13.0  # of arrivals per run under the quick preset
QUICK_PROMPTS = 14, 60  # least and most of a run there
QUICK_HALVINGS = 2  # of random lengths at most, where a run of the fewest prompts would take longer
REPEAT_SEED = 1_000_003  # repetition r of seed s draws its workload from s + r · this


class Unloaded(Struct, frozen=True):
    """One request alone: medians over the calibration."""

    prefill: float  # seconds
    step: float  # seconds per decode step

    @property
    def capacity(self) -> float:
        """Requests per second that one prefill worker sustains."""
        return 1.0 / self.prefill


Target = Side | HttpServer  # what is measured


class Bench:
    """One benchmark under way."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.targets: list[Target] = []
        self.arrangement: Arrangement = "one set"
        self.unloaded = Unloaded(0.0, 0.0)
        self.slo = SLO()
        self.timelines: dict[int, Timeline] = {}  # of each side's first run
        self._runs = itertools.count()
        self._trace_report: TraceReport | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    # ------------------------------------------------------------ set-up

    async def start(self, stack: AsyncExitStack, api_key: str) -> None:
        """Bring the workers up, or find the server; then calibrate."""
        if self.options.server is None:
            await self._make_sides(stack)
        else:
            await self._connect(stack, self.options.server, api_key)
        if self.options.workload.fit and self.options.arrivals.relative:
            await self._fit()
        quick = self.options.trials.preset == "quick"
        where = await self._calibrate(QUICK_CALIBRATION if quick else CALIBRATION)
        if not self.options.workload.num_prompts:
            count = quick_prompts(self.options, self.rate)
            self.options = replace(self.options, workload=replace(self.options.workload, num_prompts=count))
        given, alone = self.options.trials.slo, self.unloaded
        self.slo = given or SLO(ttft=_limit(TTFT_SLO * alone.prefill), tpot=_limit(TPOT_SLO * alone.step))
        for target in self.targets:
            if isinstance(target, Side):
                target.slo = self.slo
        sustains = "one prefill worker sustains" if self.options.sides else "one prefill after another makes"
        self._say(
            f"unloaded, {where}: prefill {alone.prefill * 1e3:.0f} ms, decode step {alone.step * 1e3:.1f} ms, "
            f"so {sustains} {alone.capacity:.2f} requests/s; "
            f"SLO {self.slo}{'' if given else ' (derived)'}"
        )

    async def _connect(self, stack: AsyncExitStack, settings: ServerAddress, api_key: str) -> None:
        server = HttpServer(settings.base_url, settings.model, settings.tokenizer, api_key)
        await (await stack.enter_async_context(server)).connect()
        workload = self.options.workload.dataset_name
        if not server.vocab_size and workload not in TEXTS:
            raise ValueError(
                f"{settings.base_url} does not tell the vocabulary of {server.model}, which --dataset-name {workload} "
                f"needs: give --tokenizer MODEL, or a data set of {' or '.join(TEXTS)}"
            )
        self.targets.append(server)
        self._say(f"{server.model} at {settings.base_url}")
        check_length(self.options.workload, server.max_model_len)
        await self._calibrate(LOOK)  # to warm up

    async def _make_sides(self, stack: AsyncExitStack) -> None:
        """One set of workers is up after it, or all sets that can be at a time, and each has told its limits."""
        sides, self.arrangement = make_sides(self.options, stack)
        self.options = replace(self.options, workers=self.arrangement)
        self.targets += sides
        told = describe([side.workers for side in sides], self.arrangement)
        self._say(f"starting {' and '.join(side.label for side in sides)}: {told} …")
        first = self._calibrated()
        for side in [side for side in sides if self.arrangement != "one set" and side is not first] + [first]:
            await self._begin(side, "fcfs")
        hello = next(iter(first.hellos.values()))
        self._say(
            f"link {hello.info['link']}, {hello.info['dtype']}, {hello.info['threads']} thread(s) a worker; "
            f"ceilings {hello.info['bandwidth'] / 1e9:.1f} GB/s and {hello.info['flops'] / 1e9:.0f} GFLOP/s"  # type: ignore[operator]
        )
        check_length(self.options.workload, self.limit)

    def _calibrated(self) -> Target:
        """The disaggregated side, if there is one."""
        return next((target for target in self.targets if target.mode == "disagg"), self.targets[0])

    async def _calibrate(self, count: int, longest: int = CALIBRATION_OUTPUT) -> str:
        """Requests like the workload's, of `longest` tokens at most, one at a time; says where it was.

        Under fcfs: neither rates nor SLOs depend on the policies that are compared.
        """
        target = self._calibrated()
        items = [replace(item, output_len=min(item.output_len, longest)) for item in self._items(-1, count)]
        records = await self._alone(target, items, 1)
        prefill = statistics.median(record.token_times[0] - record.sent for record in records)
        steps = [
            (r.token_times[-1] - r.token_times[1]) / (len(r.token_times) - 2) for r in records if len(r.token_times) > 2
        ]
        self.unloaded = Unloaded(prefill, statistics.median(steps) if steps else prefill)
        return f"{target.mode} under fcfs" if isinstance(target, Side) else target.label

    async def _fit(self) -> None:
        """Halve the workload's lengths, where the fewest prompts of the quick preset would take longer than a run."""
        asked = self.options.workload
        for halvings in range(1, QUICK_HALVINGS + 1):
            await self._calibrate(LOOK, WARM_OUTPUT)
            if QUICK_PROMPTS[0] <= self.rate * QUICK_SECONDS:
                break
            shorter = replace(asked, input_len=asked.input_len >> halvings, output_len=asked.output_len >> halvings)
            self.options = replace(self.options, workload=shorter)
        if self.options.workload != asked:
            self._say(f"a slow machine for the quick preset: {describe_workload(self.options.workload)}")

    async def _begin(self, target: Target, policy: str = "", name: str = "") -> None:
        """Every run begins as after a start and warm: a request for each worker, at once, opens the links too."""
        if isinstance(target, Side):
            await target.begin(policy, name)
            longest = min(WARM_PROMPT, target.max_model_len - WARM_OUTPUT)
            items = [
                replace(item, prompt=(item.prompt or [])[:longest], output_len=WARM_OUTPUT)
                for item in self._items(-1, len(target.hellos))
            ]
            await self._alone(target, items, len(items))

    async def _alone(self, target: Target, items: Sequence[WorkItem], concurrency: int) -> list[RequestRecord]:
        """Raises RuntimeError where a request fails: what goes wrong alone would go wrong under load."""
        alone = [replace(item, salt="calibration") for item in items]
        records = await target.load(alone, 0, None).run(concurrency)
        if failed := next((record for record in records if not record.ok), None):
            raise RuntimeError(f"{target.label}: a request alone failed: {failed.error or 'no tokens'}")
        return records

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)

    # ------------------------------------------------------------ measuring

    @property
    def rate(self) -> float:
        """Requests per second; nan where the trace says when its requests arrive."""
        arrivals = self.options.arrivals
        if not arrivals.request_rate:
            return math.nan
        return arrivals.request_rate * (self.unloaded.capacity if arrivals.relative else 1.0)

    @property
    def limit(self) -> int:
        """Tokens of prompt and output that every side can hold."""
        return min(target.max_model_len for target in self.targets)

    def _items(self, repetition: int, number: int | None = None) -> list[WorkItem]:
        workload, seed = self.options.workload, self.options.run.seed + REPEAT_SEED * repetition
        target = self.targets[0]
        items, report = build_items(workload, number or workload.num_prompts, seed, target.encode, self.limit)
        if repetition < 0:  # alone, a turn has its whole prompt to itself: nothing of it is in a cache
            items = [replace(item, turn=0, new_len=0, session="") for item in items]
        elif report != self._trace_report:  # it is the same for all runs
            self._trace_report = report
            self._say(f"{workload.dataset_path}: {report}")
        # A salt of its own keeps the prefix cache of earlier runs out of this one, those of a sweep too.
        run = next(self._runs)
        salted = [replace(item, salt=f"{item.salt}#{run}") for item in items]
        if target.encode is None and workload.dataset_name in TEXTS:
            return salted  # the server has a tokenizer
        return with_prompts(salted, target.vocab_size, seed)

    async def one_run(
        self, side: int, repetition: int, rate: float, concurrency: int | None, title: str, least: int = 0
    ) -> RunRecord:
        """One side, one repetition, of at least so many requests, under a progress bar."""
        options, target = self.options, self.targets[side]
        items = self._items(repetition, max(least, options.workload.num_prompts))
        check_measurable(len(items), options.arrivals.num_warmups, math.isinf(rate))
        if not math.isnan(rate) and concurrency is None:
            seed = options.run.seed + REPEAT_SEED * repetition
            items = at_rate(items, rate, options.arrivals.burstiness, seed)
        await self._begin(target, name=run_name(repetition, concurrency))
        before = await target.fresh_stats()
        cpu, started = time.process_time(), time.monotonic()
        timeline = Timeline(target.label)
        if isinstance(target, Side):
            self.timelines.setdefault(side, timeline)
            target.frontend.observers.append(timeline)
        task = self.progress.add_task(f"{target.label} {title}", total=len(items))
        requests = await target.load(items, options.run.seed, partial(self.progress.advance, task)).run(concurrency)
        self.progress.remove_task(task)
        if isinstance(target, Side):
            target.frontend.observers.clear()
        wall, cpu = time.monotonic() - started, time.process_time() - cpu
        workers, links = worker_records(target.hellos, before, await target.fresh_stats())
        quick = ["quick preset, not for publication"] if options.trials.preset == "quick" else []
        return RunRecord(
            label=target.label,
            mode=target.mode,
            policy=target.policy,
            model=target.model,
            workload=describe_workload(options.workload),
            request_rate=_plain(rate),
            burstiness=options.arrivals.burstiness,
            max_concurrency=concurrency,
            seed=options.run.seed,
            repetition=repetition,
            num_warmups=options.arrivals.num_warmups,
            requests=requests,
            steps=timeline.steps(),
            workers=workers,
            links=links,
            frontend_cpu_share=cpu / wall,
            wall_s=wall,
            marks=[*quick, *target.notes(requests)],
        )

    async def interleaved(self, rate: float, concurrency: int | None = None) -> Comparison | Contest:
        """All repetitions of all sides, A B B A …, as one comparison, or a contest of more than two.

        Where only one side can be there at a time, A A … B B …: each change of sides takes a start.
        """
        repeats = self.options.trials.repeats
        runs: list[list[RunRecord]] = [[] for _ in self.targets]
        turns = [(rep, side) for rep in range(repeats) for side in range(len(runs))[:: -1 if rep % 2 else 1]]
        if self.arrangement == "in turn":
            turns.sort(key=lambda turn: turn[1])
        what = f"{concurrency} at a time" if concurrency else f"{rate:.2f} req/s"
        for repetition, side in turns:
            title = f"{repetition + 1}/{repeats}, {what}"
            runs[side].append(await self.one_run(side, repetition, rate, concurrency, title))
        alike = await asyncio.to_thread(self._alike)
        if len(runs) > 2:
            return await asyncio.to_thread(contest, runs, self.slo, seed=self.options.run.seed, alike=alike)
        other = runs[1] if len(runs) > 1 else ()
        return await asyncio.to_thread(compare_runs, runs[0], other, self.slo, seed=self.options.run.seed, alike=alike)

    def _alike(self) -> list[tuple[str, str]]:
        """Sides that differ in the policy only and decided alike throughout, where `--record` lets it be asked."""
        return [
            (one.label, other.label)
            for one, other in itertools.combinations(self.targets, 2)
            if isinstance(one, Side) and isinstance(other, Side) and one.run.record_dir
            and one.policy != other.policy and replace(one.cluster, policy=other.policy) == other.cluster
            and decided_alike(Path(one.run.record_dir), one.policy, other.policy)
        ]  # fmt: skip


def quick_prompts(options: BenchOptions, rate: float) -> int:
    """How many requests a run has under the quick preset; a search needs some to tell 90 % from less."""
    if options.trials.find_goodput or not math.isfinite(rate):
        return 40
    least, most = QUICK_PROMPTS
    return 20 if options.arrivals.max_concurrency else max(least, min(most, round(rate * QUICK_SECONDS)))


def _limit(seconds: float) -> int:
    return max(1, round(seconds * 1e3))


def _plain(rate: float) -> float | str:
    return "trace" if math.isnan(rate) else "inf" if math.isinf(rate) else round(rate, 4)

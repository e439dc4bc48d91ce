"""`minidisagg bench`: the same arrivals on one or two clusters, interleaved, and what the difference is.

With `--base-url` the one side is a server that runs already.

    calibrate   a few requests one at a time: unloaded prefill and step time → capacity, default SLOs
    measure     for each repetition: a workload of its own; both sides run it, A B B A …
    report      tables, verdict, run directory

All clusters stay up for the whole benchmark, each worker pinned to its cores; the one that is not measured sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from minidisagg.bench.client import Load, worker_records
from minidisagg.bench.client import Progress as OnDone
from minidisagg.bench.http_client import HttpServer
from minidisagg.bench.options import TEXTS, TRACES, BenchOptions, Server, Workload
from minidisagg.config import ClusterSettings
from minidisagg.core.messages import Hello, Stats
from minidisagg.measure.comparison import TIMES, Comparison, compare_runs
from minidisagg.measure.goodput import SLO, GoodputResult, attainment, find_goodput_async
from minidisagg.measure.html import write_html
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.records import RequestRecord, RunRecord
from minidisagg.measure.report import render, to_dict, write_run_directory
from minidisagg.measure.timeline import Timeline, write_timeline
from minidisagg.model.pull import ensure
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.frontend import Frontend
from minidisagg.workload.arrivals import arrival_times
from minidisagg.workload.lengths import Encode, WorkItem, random_items, text_items, with_arrivals, with_prompts
from minidisagg.workload.traces import load_trace

CALIBRATION = 6  # requests one at a time, after two to warm up
TTFT_SLO, TPOT_SLO = 8.0, 2.0  # times the unloaded prefill and decode step
QUICK_SECONDS = 18.0  # of arrivals per run under the quick preset
REPEAT_SEED = 1_000_003  # repetition r of seed s draws its workload from s + r · this


class Unloaded(Struct, frozen=True):
    """One request alone: medians over the calibration."""

    prefill: float  # seconds
    step: float  # seconds per decode step

    @property
    def capacity(self) -> float:
        """Requests per second that one prefill worker sustains."""
        return 1.0 / self.prefill


class Target(Protocol):
    """What is measured: a cluster of this process, or a server. `mode` and `policy` only go into the records."""

    label: str
    mode: str
    policy: str
    model: str
    max_model_len: int
    encode: Encode | None  # None: no tokenizer is at hand, and texts are sent as they are
    vocab_size: int  # 0: not known
    hellos: dict[str, Hello]

    def load(self, items: Sequence[WorkItem], seed: int, on_done: OnDone | None) -> Load:
        """One run of a workload."""

    async def fresh_stats(self) -> dict[str, Stats]:
        """The counters of its workers, as far as it tells."""

    def notes(self, records: Sequence[RequestRecord]) -> list[str]:
        """Remarks on a run."""


class Cluster:
    """A cluster that the bench has started."""

    def __init__(self, frontend: Frontend, spec: ClusterSettings, tokenizer: Tokenizer) -> None:
        self.frontend = frontend
        self.label, self.policy = label_of(spec), spec.policy
        self.mode: str = spec.mode
        self.model, self.max_model_len = frontend.model.model, frontend.max_model_len
        self.encode: Encode | None = tokenizer.encode
        self.vocab_size = tokenizer.vocab_size
        self.hellos = frontend.hellos
        self.fresh_stats = frontend.fresh_stats

    def load(self, items: Sequence[WorkItem], seed: int, on_done: OnDone | None) -> Load:
        return Load(self.frontend, items, seed, on_done)

    def notes(self, records: Sequence[RequestRecord]) -> list[str]:
        return []

    @contextmanager
    def recorded(self, timeline: Timeline) -> Iterator[None]:
        """What happens within goes into the timeline."""
        self.frontend.observers.append(timeline)
        try:
            yield
        finally:
            self.frontend.observers.remove(timeline)


class Bench:
    """One benchmark under way."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.targets: list[Target] = []
        self.unloaded = Unloaded(0.0, 0.0)
        self.slo = SLO()
        self.timelines: dict[str, Timeline] = {}  # of each side's first run
        self._runs = itertools.count()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip

    # ------------------------------------------------------------ set-up

    async def start(self, stack: AsyncExitStack, api_key: str) -> None:
        """Bring up one cluster per side, one after the other, or find the server; then calibrate."""
        if self.options.server is None:
            await self._start_clusters(stack)
        else:
            await self._connect(stack, self.options.server, api_key)
        await self._calibrate()
        given, alone = self.options.trials.slo, self.unloaded
        self.slo = given or SLO(ttft=_limit(TTFT_SLO * alone.prefill), tpot=_limit(TPOT_SLO * alone.step))
        sustains = "one prefill worker sustains" if self.options.sides else "one prefill after another makes"
        self.console.print(
            f"unloaded: prefill {alone.prefill * 1e3:.0f} ms, decode step {alone.step * 1e3:.1f} ms, "
            f"so {sustains} {alone.capacity:.2f} requests/s; "
            f"SLO {self.slo}{'' if given else ' (derived)'}",
            style="dim", highlight=False,
        )  # fmt: skip

    async def _connect(self, stack: AsyncExitStack, settings: Server, api_key: str) -> None:
        server = HttpServer(settings.base_url, settings.model, settings.tokenizer, api_key)
        await (await stack.enter_async_context(server)).connect()
        workload = self.options.workload.dataset_name
        if not server.vocab_size and workload not in TEXTS:
            raise ValueError(
                f"{settings.base_url} does not tell the vocabulary of {server.model}, which --dataset-name {workload} "
                f"needs: give --tokenizer MODEL, or a data set of {' or '.join(TEXTS)}"
            )
        self.targets.append(server)
        self.console.print(f"{server.model} at {settings.base_url}", style="dim", highlight=False)

    async def _start_clusters(self, stack: AsyncExitStack) -> None:
        tokenizer = Tokenizer.load(self.options.model.model)
        for side in self.options.sides:
            self.console.print(f"starting {label_of(side)}: {_workers(side)} …", style="dim", highlight=False)
            frontend = await Frontend.start(
                self.options.model, side, replace(self.options.run, ceilings=True, trace=True)
            )
            self.targets.append(Cluster(await stack.enter_async_context(frontend), side, tokenizer))
        hello = next(iter(self.targets[0].hellos.values()))
        self.console.print(
            f"link {hello.info['link']}, {hello.info['dtype']}, {hello.info['threads']} thread(s) a worker; "
            f"ceilings {hello.info['bandwidth'] / 1e9:.1f} GB/s and {hello.info['flops'] / 1e9:.0f} GFLOP/s",  # type: ignore[operator]
            style="dim", highlight=False,
        )  # fmt: skip

    async def _calibrate(self) -> None:
        """Requests like the workload's, one at a time; the other clusters are warmed up with two as well.

        Raises RuntimeError where one fails: what goes wrong alone would go wrong under load.
        """
        items = self._items(-1, CALIBRATION + 2)
        for target in reversed(self.targets):
            count = len(items) if target is self.targets[0] else 2
            short = [replace(item, output_len=min(item.output_len, 17), salt="calibration") for item in items[:count]]
            records = await target.load(short, 0, None).run(1)
            if failed := next((record for record in records if not record.ok), None):
                raise RuntimeError(f"{target.label}: a request alone failed: {failed.error or 'no tokens'}")
        records = records[2:]
        prefill = statistics.median(record.token_times[0] - record.sent for record in records)
        steps = [
            (r.token_times[-1] - r.token_times[1]) / (len(r.token_times) - 2) for r in records if len(r.token_times) > 2
        ]
        self.unloaded = Unloaded(prefill, statistics.median(steps) if steps else prefill)

    # ------------------------------------------------------------ measuring

    @property
    def rate(self) -> float:
        """Requests per second; nan where the trace says when its requests arrive."""
        arrivals = self.options.arrivals
        if has_arrivals(self.options.workload) and (arrivals.relative or not arrivals.request_rate):
            return math.nan
        return arrivals.request_rate * (self.unloaded.capacity if arrivals.relative else 1.0)

    def _items(self, repetition: int, number: int | None = None) -> list[WorkItem]:
        workload, seed = self.options.workload, self.options.run.seed + REPEAT_SEED * repetition
        target = self.targets[0]
        limit = target.max_model_len
        items = build_items(workload, number or workload.num_prompts, seed, target.encode, limit)
        if not items:
            raise ValueError(f"{workload.dataset_path}: no request fits into {limit} tokens")
        # A salt of its own keeps the prefix cache of earlier runs out of this one, those of a sweep too.
        run = next(self._runs)
        salted = [replace(item, salt=f"{item.salt}#{run}") for item in items]
        if target.encode is None and workload.dataset_name in TEXTS:
            return salted  # the server has a tokenizer
        return with_prompts(salted, target.vocab_size, seed)

    async def one_run(
        self, side: int, repetition: int, rate: float, concurrency: int | None, on_done: Callable[[int], None] | None
    ) -> RunRecord:
        """One side, one repetition."""
        options, target = self.options, self.targets[side]
        items = self._items(repetition)
        if not math.isnan(rate) and concurrency is None:
            seed = options.run.seed + REPEAT_SEED * repetition
            items = with_arrivals(items, arrival_times(len(items), rate, options.arrivals.burstiness, seed))
        before = await target.fresh_stats()
        cpu, started = time.process_time(), time.monotonic()
        recorded: AbstractContextManager[None] = nullcontext()
        if isinstance(target, Cluster) and target.label not in self.timelines:
            timeline = self.timelines[target.label] = Timeline(target.label)
            recorded = target.recorded(timeline)
        with recorded:
            requests = await target.load(items, options.run.seed, on_done).run(concurrency)
        wall, cpu = time.monotonic() - started, time.process_time() - cpu
        workers, links = worker_records(target.hellos, before, await target.fresh_stats())
        quick = ["quick preset, not for publication"] if options.trials.preset == "quick" else []
        return RunRecord(
            label=target.label, mode=target.mode, policy=target.policy, model=target.model,
            workload=describe_workload(options.workload), request_rate=_plain(rate),
            burstiness=options.arrivals.burstiness, max_concurrency=concurrency, seed=options.run.seed,
            repetition=repetition, num_warmups=options.arrivals.num_warmups, requests=requests, workers=workers,
            links=links, frontend_cpu_share=cpu / wall, wall_s=wall,
            marks=[*quick, *target.notes(requests)],
        )  # fmt: skip

    async def interleaved(self, rate: float, concurrency: int | None = None) -> Comparison:
        """All repetitions of all sides, A B B A …, as one comparison."""
        runs: list[list[RunRecord]] = [[] for _ in self.targets]
        what = f"{concurrency} at a time" if concurrency else f"{rate:.2f} req/s"
        with self.progress as progress:
            for repetition in range(self.options.trials.repeats):
                order = range(len(self.targets)) if repetition % 2 == 0 else reversed(range(len(self.targets)))
                for side in order:
                    name = self.targets[side].label
                    label = f"{name} {repetition + 1}/{self.options.trials.repeats}, {what}"
                    task = progress.add_task(label, total=self.options.workload.num_prompts)
                    advance = partial(progress.advance, task)
                    runs[side].append(await self.one_run(side, repetition, rate, concurrency, advance))
                    progress.remove_task(task)
        return await asyncio.to_thread(
            compare_runs, runs[0], runs[1] if len(runs) > 1 else (), self.slo, seed=self.options.run.seed
        )


def build_items(workload: Workload, count: int, seed: int, encode: Encode | None, max_model_len: int) -> list[WorkItem]:
    """The workload's requests; traces bring their own arrival times."""
    if workload.dataset_name == "random":
        return random_items(count, workload.input_len, workload.output_len, workload.range_ratio, seed)
    if workload.dataset_name == "text":
        return text_items(count, workload.output_len, encode, seed)
    items, report = load_trace(
        workload.dataset_name, workload.dataset_path, count=count, speedup=workload.trace_speedup,
        scale_len=workload.trace_scale_len, max_model_len=max_model_len, encode=encode,
    )  # fmt: skip
    if seed == 0:
        sys.stderr.write(f"{report}\n")
    return items


def describe_workload(workload: Workload) -> str:
    """One line for a person."""
    if workload.dataset_name == "random":
        spread = f" ± {workload.range_ratio:.0%}" if workload.range_ratio else ""
        return f"random {workload.input_len} in, {workload.output_len} out{spread}"
    if workload.dataset_name == "text":
        return f"English text, {workload.output_len} out"
    return f"{workload.dataset_name} trace {Path(workload.dataset_path).name}"


def has_arrivals(workload: Workload) -> bool:
    """The data set says itself when its requests arrive."""
    return workload.dataset_name in TRACES and workload.dataset_name != "sharegpt"


# ---------------------------------------------------------------- the three kinds of benchmark


async def at_one_rate(bench: Bench) -> Comparison:
    """The usual benchmark: one offered load."""
    options = bench.options
    rate = bench.rate
    if options.trials.preset == "quick" and math.isfinite(rate):
        fewer = replace(options.workload, num_prompts=max(20, min(60, round(rate * QUICK_SECONDS))))
        bench.options = replace(options, workload=fewer)
    return await bench.interleaved(rate)


async def goodput(bench: Bench) -> dict[str, object]:
    """The highest rate at 90 % attainment, per side. The sides' runs take turns, so that both see the same machine."""
    turn = asyncio.Lock()

    async def search(index: int) -> GoodputResult:
        repetition = 0

        async def attained(rate: float) -> float:
            nonlocal repetition
            repetition += 1
            async with turn:
                run = await bench.one_run(index, repetition, rate, None, None)
            share = attainment(run.requests, bench.slo)
            bench.console.print(f"{run.label} at {rate:.2f}/s: {share:.1%}", style="dim", highlight=False)
            return share

        return await find_goodput_async(attained, bench.rate)

    results = await asyncio.gather(*(search(index) for index in range(len(bench.targets))))
    found = {}
    table = Table(title=f"Goodput: highest rate with 90 % of requests within {bench.slo}", title_justify="left")
    for head in ("", "requests/s", "fails from", "attainment", "runs"):
        table.add_column(head, justify="right" if head else "left")
    for index, (target, result) in enumerate(zip(bench.targets, results, strict=True)):
        found[f"{index}: {target.label}"] = result
        cells = f"{result.rate:.2f}", f"{result.upper:.2f}", f"{result.attainment:.1%}", str(len(result.trials))
        table.add_row(target.label, *cells)
    bench.console.print(table)
    rates = [result.rate for result in found.values()]
    if len(rates) == 2 and rates[0]:
        names = " / ".join(target.label for target in reversed(bench.targets))
        verdict = f"goodput of {names}: {rates[1] / rates[0]:.2f}{TIMES}"
        bench.console.print(verdict, style="bold", highlight=False)
    return {"goodput": {name: msgspec.to_builtins(result) for name, result in found.items()}}


async def sweep(bench: Bench) -> list[tuple[int, Comparison]]:
    """A handful of users: closed loop, so many requests at a time."""
    return [(n, await bench.interleaved(math.nan, n)) for n in bench.options.arrivals.max_concurrency]


def sweep_table(comparisons: list[tuple[int, Comparison]]) -> Table:
    """Three lines per concurrency."""
    table = Table(title="A handful of users (closed loop)", title_justify="left")
    first = comparisons[0][1]
    table.add_column("at a time", justify="right")
    table.add_column("")
    for side in first.sides:
        table.add_column(side.label, justify="right")
    if first.b is not None:
        table.add_column("B / A [95 %]", justify="right")
    metrics = ("TTFT p50, ms", "p50_ttft", 1e3), ("TPOT, ms", "mean_tpot", 1e3), ("tok/s", "output_throughput", 1.0)
    for concurrency, comparison in comparisons:
        for row, (title, name, scale) in enumerate(metrics):
            cells = [str(concurrency) if row == 0 else "", title]
            cells += [f"{side.values.get(name, math.nan) * scale:.1f}" for side in comparison.sides]
            if comparison.b is not None:
                ratio = comparison.ratios[name]
                cells.append(f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
            table.add_row(*cells, end_section=row == len(metrics) - 1)
    return table


# ---------------------------------------------------------------- entry


def run(options: BenchOptions, api_key: str = "") -> int:
    """Carry the benchmark out; returns the exit status. Raises `ValueError`, `OSError` or `StartError` in one line.

    `api_key` is the server's; it is no part of the options, which are written to the run directory.
    """
    console = Console(stderr=options.output.json)
    if options.output.dry_run:
        console.print(_dry_run(options), highlight=False)
        return 0
    if options.server is None:
        ensure(options.model.model, lambda line: console.print(line, style="dim", highlight=False))
    return asyncio.run(_run(options, console, api_key))


async def _run(options: BenchOptions, console: Console, api_key: str) -> int:
    async with AsyncExitStack() as stack:
        bench = Bench(options, console)
        await bench.start(stack, api_key)
        directory = Path(options.output.directory) / datetime.now().strftime("%Y%m%d-%H%M%S")
        if options.trials.find_goodput:
            result = await goodput(bench)
            _write(directory, options, result)
        elif options.arrivals.max_concurrency:
            comparisons = await sweep(bench)
            console.print(sweep_table(comparisons))
            for concurrency, comparison in comparisons:
                write_run_directory(directory / f"concurrency-{concurrency}", comparison)
            result = {str(n): to_dict(comparison) for n, comparison in comparisons}
            _write(directory, options, result)
        else:
            comparison = await at_one_rate(bench)
            console.print(render(comparison))
            write_run_directory(directory, comparison)
            result = to_dict(comparison)
            _write(directory, options, {})
        if bench.timelines:
            write_timeline(directory / "trace.json", list(bench.timelines.values()))
        write_html(directory)
        console.print(f"report: {directory}", highlight=False)
        if options.output.json:
            sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        return 0


def _write(directory: Path, options: BenchOptions, result: dict[str, object]) -> None:
    """The exact question beside the answer; and the answer, where `write_run_directory` has not written it."""
    directory.mkdir(parents=True, exist_ok=True)
    asked = {"command": command_line(), "machine": machine(), **msgspec.to_builtins(options)}
    (directory / "options.json").write_bytes(msgspec.json.format(msgspec.json.encode(asked), indent=2))
    if result:
        (directory / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2))


def _dry_run(options: BenchOptions) -> str:
    count, repeats = options.workload.num_prompts, options.trials.repeats
    lines = [f"would run {describe_workload(options.workload)}, {count} requests {TIMES} {repeats}, on"]
    lines += [f"  {label_of(side)}: {_workers(side)}" for side in options.sides]
    lines += [f"  {options.server.base_url}"] if options.server is not None else []
    return "\n".join(lines)


def label_of(side: ClusterSettings) -> str:
    """A side's name in tables."""
    return side.mode if side.policy == "fcfs" else f"{side.mode} {side.policy}"


def _workers(side: ClusterSettings) -> str:
    return ", ".join(name for name, _, _ in side.roles())


def _limit(seconds: float) -> int:
    return max(1, round(seconds * 1e3))


def _plain(rate: float) -> float | str:
    return "trace" if math.isnan(rate) else "inf" if math.isinf(rate) else round(rate, 4)

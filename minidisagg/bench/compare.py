"""`minidisagg bench`: the same arrivals on one or two clusters, interleaved, and what the difference is.

With `--base-url` the one side is a server that runs already.

    calibrate   a few requests one at a time, under fcfs: unloaded prefill and step time → capacity, default SLOs
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
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from minidisagg.bench.client import Load, worker_records
from minidisagg.bench.client import Progress as OnDone
from minidisagg.bench.http_client import HttpServer
from minidisagg.bench.options import TEXTS, BenchOptions, Server, Workload, check_length, check_measurable
from minidisagg.config import ClusterSettings
from minidisagg.measure.comparison import TIMES, Comparison, compare_runs, marks_of
from minidisagg.measure.goodput import SLO, GoodputResult, find_goodput
from minidisagg.measure.html import write_html
from minidisagg.measure.intervals import share_error
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.records import RequestRecord, RunRecord
from minidisagg.measure.report import goodput_table, marks_text, render
from minidisagg.measure.run_directory import (
    search_to_dict,
    sweep_to_dict,
    to_dict,
    write_json,
    write_options,
    write_run_directory,
)
from minidisagg.measure.stats import samples_of, void_reasons
from minidisagg.measure.timeline import Timeline, write_timeline
from minidisagg.model.loader import load_config
from minidisagg.model.pull import ensure
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.policies import load_policy
from minidisagg.runtime.frontend import Frontend
from minidisagg.workload.arrivals import arrival_times
from minidisagg.workload.lengths import Encode, WorkItem, random_items, text_items, with_arrivals, with_prompts
from minidisagg.workload.traces import load_trace

CALIBRATION = 6  # requests one at a time, after two to warm up
TTFT_SLO, TPOT_SLO = 8.0, 2.0  # times the unloaded prefill and decode step
QUICK_SECONDS = 18.0  # of arrivals per run under the quick preset
SEARCH = {"": {"max_runs": 16, "tolerance": 0.05}, "quick": {"max_runs": 10, "tolerance": 0.1}}  # by preset
REPEAT_SEED = 1_000_003  # repetition r of seed s draws its workload from s + r · this


class Unloaded(Struct, frozen=True):
    """One request alone: medians over the calibration."""

    prefill: float  # seconds
    step: float  # seconds per decode step

    @property
    def capacity(self) -> float:
        """Requests per second that one prefill worker sustains."""
        return 1.0 / self.prefill


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


Target = Cluster | HttpServer  # what is measured


class Bench:
    """One benchmark under way."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.targets: list[Target] = []
        self.unloaded = Unloaded(0.0, 0.0)
        self.slo = SLO()
        self.timelines: dict[int, Timeline] = {}  # of each side's first run
        self._runs = itertools.count()
        self._trace_report = ""
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    # ------------------------------------------------------------ set-up

    async def start(self, stack: AsyncExitStack, api_key: str) -> None:
        """Bring up one cluster per side, one after the other, or find the server; then calibrate."""
        if self.options.server is None:
            await self._start_clusters(stack)
        else:
            await self._connect(stack, self.options.server, api_key)
        check_length(self.options.workload, self.targets[0].max_model_len)
        where = await self._calibrate()
        if not self.options.workload.num_prompts:
            count = quick_prompts(self.options, self.rate)
            self.options = replace(self.options, workload=replace(self.options.workload, num_prompts=count))
        given, alone = self.options.trials.slo, self.unloaded
        self.slo = given or SLO(ttft=_limit(TTFT_SLO * alone.prefill), tpot=_limit(TPOT_SLO * alone.step))
        sustains = "one prefill worker sustains" if self.options.sides else "one prefill after another makes"
        self.console.print(
            f"unloaded, {where}: prefill {alone.prefill * 1e3:.0f} ms, decode step {alone.step * 1e3:.1f} ms, "
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
        for letter, side in zip("AB", self.options.sides, strict=False):
            self.console.print(f"starting {label_of(side)}: {_workers(side)} …", style="dim", highlight=False)
            run = replace(self.options.run, ceilings=True, trace=True)
            if len(self.options.sides) > 1:  # each side's logs apart
                record, decisions = _apart(run.record_dir, letter), _apart(run.decision_dir, letter)
                run = replace(run, record_dir=record, decision_dir=decisions)
            frontend = await Frontend.start(self.options.model, side, run)
            self.targets.append(Cluster(await stack.enter_async_context(frontend), side, tokenizer))
        hello = next(iter(self.targets[0].hellos.values()))
        self.console.print(
            f"link {hello.info['link']}, {hello.info['dtype']}, {hello.info['threads']} thread(s) a worker; "
            f"ceilings {hello.info['bandwidth'] / 1e9:.1f} GB/s and {hello.info['flops'] / 1e9:.0f} GFLOP/s",  # type: ignore[operator]
            style="dim", highlight=False,
        )  # fmt: skip

    async def _calibrate(self) -> str:
        """Requests like the workload's, one at a time, after two on each side to warm up; says where it was.

        Under fcfs, and on the disaggregated side if there is one: neither rates nor SLOs depend on the policies that
        are compared.
        """
        items = self._items(-1, CALIBRATION + 2)
        for target in self.targets:
            await self._alone(target, items[:2])
        target = next((target for target in self.targets if target.mode == "disagg"), self.targets[0])
        if isinstance(target, Cluster):
            target.frontend.set_policy("fcfs")
        records = await self._alone(target, items[2:])
        if isinstance(target, Cluster):
            target.frontend.set_policy(target.policy)
        prefill = statistics.median(record.token_times[0] - record.sent for record in records)
        steps = [
            (r.token_times[-1] - r.token_times[1]) / (len(r.token_times) - 2) for r in records if len(r.token_times) > 2
        ]
        self.unloaded = Unloaded(prefill, statistics.median(steps) if steps else prefill)
        return f"{target.mode} under fcfs" if isinstance(target, Cluster) else target.label

    async def _alone(self, target: Target, items: Sequence[WorkItem]) -> list[RequestRecord]:
        """Raises RuntimeError where a request fails: what goes wrong alone would go wrong under load."""
        short = [replace(item, output_len=min(item.output_len, 17), salt="calibration") for item in items]
        records = await target.load(short, 0, None).run(1)
        if failed := next((record for record in records if not record.ok), None):
            raise RuntimeError(f"{target.label}: a request alone failed: {failed.error or 'no tokens'}")
        return records

    # ------------------------------------------------------------ measuring

    @property
    def rate(self) -> float:
        """Requests per second; nan where the trace says when its requests arrive."""
        arrivals = self.options.arrivals
        if not arrivals.request_rate:
            return math.nan
        return arrivals.request_rate * (self.unloaded.capacity if arrivals.relative else 1.0)

    def _items(self, repetition: int, number: int | None = None) -> list[WorkItem]:
        workload, seed = self.options.workload, self.options.run.seed + REPEAT_SEED * repetition
        target = self.targets[0]
        limit = target.max_model_len
        items, report = build_items(workload, number or workload.num_prompts, seed, target.encode, limit)
        if number is None and report != self._trace_report:  # it is the same for all runs
            self._trace_report = report
            self.console.print(f"{workload.dataset_path}: {report}", style="dim", highlight=False)
        # A salt of its own keeps the prefix cache of earlier runs out of this one, those of a sweep too.
        run = next(self._runs)
        salted = [replace(item, salt=f"{item.salt}#{run}") for item in items]
        if target.encode is None and workload.dataset_name in TEXTS:
            return salted  # the server has a tokenizer
        return with_prompts(salted, target.vocab_size, seed)

    async def one_run(self, side: int, repetition: int, rate: float, concurrency: int | None, title: str) -> RunRecord:
        """One side, one repetition, under a progress bar."""
        options, target = self.options, self.targets[side]
        items = self._items(repetition)
        check_measurable(len(items), options.arrivals.num_warmups, math.isinf(rate))
        if not math.isnan(rate) and concurrency is None:
            seed = options.run.seed + REPEAT_SEED * repetition
            items = with_arrivals(items, arrival_times(len(items), rate, options.arrivals.burstiness, seed))
        before = await target.fresh_stats()
        cpu, started = time.process_time(), time.monotonic()
        if isinstance(target, Cluster) and side not in self.timelines:
            self.timelines[side] = Timeline(target.label)
            target.frontend.observers.append(self.timelines[side])
        task = self.progress.add_task(f"{target.label} {title}", total=len(items))
        requests = await target.load(items, options.run.seed, partial(self.progress.advance, task)).run(concurrency)
        self.progress.remove_task(task)
        if isinstance(target, Cluster):
            target.frontend.observers.clear()
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
        for repetition in range(self.options.trials.repeats):
            for side in range(len(runs))[:: -1 if repetition % 2 else 1]:
                title = f"{repetition + 1}/{self.options.trials.repeats}, {what}"
                runs[side].append(await self.one_run(side, repetition, rate, concurrency, title))
        return await asyncio.to_thread(
            compare_runs, runs[0], runs[1] if len(runs) > 1 else (), self.slo, seed=self.options.run.seed
        )


def build_items(
    workload: Workload, count: int, seed: int = 0, encode: Encode | None = None, max_model_len: int | None = None
) -> tuple[list[WorkItem], str]:
    """The workload's requests, and what was left out of a trace; traces bring their own arrival times."""
    if workload.dataset_name == "random":
        return random_items(count, workload.input_len, workload.output_len, workload.range_ratio, seed), ""
    if workload.dataset_name == "text":
        return text_items(count, workload.output_len, encode, seed), ""
    items, report = load_trace(
        workload.dataset_name, workload.dataset_path, count=count, speedup=workload.trace_speedup,
        scale_len=workload.trace_scale_len, max_model_len=max_model_len, encode=encode,
    )  # fmt: skip
    return items, str(report)


def describe_workload(workload: Workload) -> str:
    """One line for a person."""
    if workload.dataset_name == "random":
        spread = f" ± {workload.range_ratio:.0%}" if workload.range_ratio else ""
        return f"random {workload.input_len} in, {workload.output_len} out{spread}"
    if workload.dataset_name == "text":
        return f"English text, {workload.output_len} out"
    return f"{workload.dataset_name} trace {Path(workload.dataset_path).name}"


def quick_prompts(options: BenchOptions, rate: float) -> int:
    """How many requests a run has under the quick preset; a search needs some to tell 90 % from less."""
    if options.trials.find_goodput or not math.isfinite(rate):
        return 40
    return 20 if options.arrivals.max_concurrency else max(20, min(60, round(rate * QUICK_SECONDS)))


# ---------------------------------------------------------------- the three kinds of benchmark


async def goodput(bench: Bench) -> dict[str, object]:
    """The highest rate at 90 % attainment, per side. The sides' runs take turns, so that both see the same machine."""
    turn, began = asyncio.Lock(), time.monotonic()
    runs: list[RunRecord] = []
    limits = SEARCH[bench.options.trials.preset]

    async def search(side: int) -> GoodputResult:
        numbers = itertools.count(1)

        async def attained(rate: float) -> tuple[float, float]:
            number = next(numbers)
            title = f"run {number} of at most {limits['max_runs']}, {rate:.2f} req/s"
            async with turn:
                runs.append(run := await bench.one_run(side, number, rate, None, title))
            met = samples_of(run, bench.slo).metrics["attainment"].values  # without warm-up and drain
            line = f"{time.monotonic() - began:4.0f} s  {run.label} {title}: {met.mean():.1%} within the SLO"
            bench.console.print(line, style="dim", highlight=False)
            return float(met.mean()), share_error(met)

        return await find_goodput(attained, bench.rate, **limits)

    results = await asyncio.gather(*(search(side) for side in range(len(bench.targets))))
    labels = [target.label for target in bench.targets]
    if len(set(labels)) < len(labels):
        labels = [f"{label} {letter}" for label, letter in zip(labels, "AB", strict=True)]
    found = dict(zip(labels, results, strict=True))
    voids = {run.label: reason for run in runs for reason in void_reasons(run, bench.slo)}  # one per side will do
    void = [f"{label}: {reason}" for label, reason in voids.items()]
    early = [f"{label}: the search did not converge" for label, one in found.items() if not one.converged]
    marks = [*marks_of(runs, len(runs)), *early]
    bench.console.print(goodput_table(found), marks_text(marks, void))
    result = search_to_dict(found, bench.slo, void, marks)
    if "verdict" in result:
        bench.console.print(result["verdict"], style="bold", highlight=False)
    return result


async def sweep(bench: Bench, directory: Path) -> dict[str, object]:
    """A handful of users: closed loop, so many requests at a time."""
    steps = [(n, await bench.interleaved(math.nan, n)) for n in bench.options.arrivals.max_concurrency]
    marks = marks_text([mark for _, one in steps for mark in one.marks], [why for _, one in steps for why in one.void])
    bench.console.print(sweep_table(steps), marks)
    for n, one in steps:
        bench.console.print(f"{n} at a time: {one.verdict}", style="bold", highlight=False)
        write_run_directory(directory / f"concurrency-{n}", one)
    return sweep_to_dict(dict(steps))


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
    # What can be known to be wrong is told before anything is started.
    arrival_times(1, 1.0, options.arrivals.burstiness)
    items, _ = build_items(options.workload, options.workload.num_prompts or quick_prompts(options, math.nan))
    at_once = math.isinf(options.arrivals.request_rate) and not options.arrivals.max_concurrency
    check_measurable(len(items), options.arrivals.num_warmups, at_once)  # a trace may hold fewer than were asked for
    for side in options.sides:
        load_policy(side.policy)
    if options.output.dry_run:
        console.print(_dry_run(options, items[-1].arrival_s), highlight=False)
        return 0
    directory = Path(options.output.directory) / datetime.now().strftime("%Y%m%d-%H%M%S")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if options.server is None:
            ensure(options.model.model, lambda line: console.print(line, style="dim", highlight=False))
            limit = options.model.max_model_len or load_config(options.model.model).max_model_len
            check_length(options.workload, limit)
        return asyncio.run(_run(options, console, api_key, directory))
    finally:
        with suppress(OSError):
            directory.rmdir()  # where nothing was measured it is empty


async def _run(options: BenchOptions, console: Console, api_key: str, directory: Path) -> int:
    async with AsyncExitStack() as stack:
        bench = Bench(options, console)
        await bench.start(stack, api_key)
        with bench.progress:
            if options.trials.find_goodput:
                result = await goodput(bench)
            elif options.arrivals.max_concurrency:
                result = await sweep(bench, directory)
            else:
                comparison = await bench.interleaved(bench.rate)
                console.print(render(comparison))
                write_run_directory(directory, comparison)
                result = to_dict(comparison)
        write_options(directory, command_line(), machine(), bench.options)
        write_json(directory / "result.json", result)
        if bench.timelines:
            write_timeline(directory / "trace.json", list(bench.timelines.values()))
        write_html(directory)
        console.print(f"report: {directory}", highlight=False)
        if options.output.json:
            sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        return 0


def _dry_run(options: BenchOptions, trace_s: float) -> str:
    """What would be done and how long it would take. `trace_s` is from a trace's first to its last arrival."""
    workload, arrivals, trials = options.workload, options.arrivals, options.trials
    rate, most, at_first = arrivals.request_rate or math.nan, "", ""
    runs = max(1, len(options.sides)) * trials.repeats * max(1, len(arrivals.max_concurrency))
    if trials.find_goodput:
        runs = max(1, len(options.sides)) * int(SEARCH[trials.preset]["max_runs"])
        most, at_first = "at most ", ", at the first rate that the search tries"
    known = workload.num_prompts or not arrivals.relative or trials.find_goodput or arrivals.max_concurrency
    count = workload.num_prompts or quick_prompts(options, rate)
    if arrivals.max_concurrency or math.isinf(rate):
        each = "each until the last request has ended"
    elif known and arrivals.relative:
        each = f"each {count} / ({rate:g} {TIMES} capacity) s of arrivals, where calibration decides on the capacity"
        each += ": 1 / seconds of a prefill alone"
    else:
        seconds = QUICK_SECONDS if not known else trace_s if math.isnan(rate) else count / rate
        each = f"each {seconds:.0f} s of arrivals, {runs * seconds:.0f} s in all"
    lines = [f"would run {describe_workload(workload)} on"]
    lines += [f"  {label_of(side)}: {_workers(side)}" for side in options.sides]
    lines += [f"  {options.server.base_url}"] if options.server is not None else []
    lines.append(f"{most}{runs} runs of {count if known else '20 to 60'} requests, {each}{at_first};")
    return "\n".join([*lines, "and the start, the calibration, and what the last requests of each run take"])


def label_of(side: ClusterSettings) -> str:
    """A side's name in tables."""
    return side.mode if side.policy == "fcfs" else f"{side.mode} {side.policy}"


def _workers(side: ClusterSettings) -> str:
    return ", ".join(name for name, _, _ in side.roles())


def _apart(directory: str, letter: str) -> str:
    if not directory:
        return ""
    path = Path(directory) / letter
    path.mkdir(exist_ok=True)
    return str(path)


def _limit(seconds: float) -> int:
    return max(1, round(seconds * 1e3))


def _plain(rate: float) -> float | str:
    return "trace" if math.isnan(rate) else "inf" if math.isinf(rate) else round(rate, 4)

"""`minidisagg bench`: one or two sides measured at a rate, at several concurrencies, or for their goodput.

    runs      calibration and the runs themselves
    report    tables, verdict, run directory

With `--base-url` the one side is a server that runs already.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
from msgspec.structs import replace
from rich.console import Console

from minidisagg.bench.runs import QUICK_PROMPTS, QUICK_SECONDS, Bench, quick_prompts
from minidisagg.bench.settings import BenchOptions
from minidisagg.bench.sides import describe, labels, make_workers
from minidisagg.measure import contest
from minidisagg.measure.comparison import Comparison, marks_of
from minidisagg.measure.files import Files
from minidisagg.measure.goodput import GoodputResult, find_goodput, least_requests
from minidisagg.measure.html import write_html
from minidisagg.measure.intervals import share_error
from minidisagg.measure.records import RunRecord
from minidisagg.measure.report import goodput_table, marks_text, render, render_sweep
from minidisagg.measure.run_directory import (
    RECORD,
    contest_to_dict,
    new_directory,
    remove_if_empty,
    search_to_dict,
    sweep_to_dict,
    to_dict,
    write_json,
    write_options,
    write_run_directory,
)
from minidisagg.measure.settings import IN_RUN, check_measurable
from minidisagg.measure.stats import samples_of, void_reasons
from minidisagg.measure.timeline import write_timeline
from minidisagg.model.loader import load_config
from minidisagg.model.pull import ensure
from minidisagg.policies import rehearse
from minidisagg.sides import numbered
from minidisagg.workload.multiturn import MULTITURN
from minidisagg.workload.settings import build_items, check_length, describe_workload

SEARCH = {"": {"max_runs": 16, "tolerance": 0.05}, "quick": {"max_runs": 10, "tolerance": 0.1}}  # by preset


# ---------------------------------------------------------------- the three kinds of benchmark


async def goodput(bench: Bench) -> dict[str, object]:
    """The highest rate at 90 % attainment, per side.

    The sides' runs take turns, so that both see the same machine, unless each change of sides would take a start.
    """
    turn, began = asyncio.Lock(), time.monotonic()
    runs: list[RunRecord] = []
    limits = SEARCH[bench.options.trials.preset]

    async def search(side: int) -> GoodputResult:
        numbers = itertools.count(1)

        async def attained(rate: float) -> tuple[float, float]:
            number = next(numbers)
            title = f"run {number} of at most {limits['max_runs']}, {rate:.2f} req/s"
            async with turn:
                least = least_requests(bench.slo, rate)
                runs.append(run := await bench.one_run(side, number, rate, None, title, least))
            met = samples_of(run, bench.slo).metrics["attainment"].values  # without warm-up and drain
            line = f"{time.monotonic() - began:4.0f} s  {run.label} {title}: {met.mean():.1%} within the SLO"
            bench.console.print(line, style="dim", highlight=False)
            return float(met.mean()), share_error(met)

        return await find_goodput(attained, bench.rate, **limits)

    searches = [search(side) for side in range(len(bench.targets))]
    results = [await one for one in searches] if bench.arrangement == "in turn" else await asyncio.gather(*searches)
    found = dict(zip(numbered([target.label for target in bench.targets]), results, strict=True))
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
    steps: list[tuple[int, Comparison]] = []
    for n in bench.options.arrivals.max_concurrency:
        one = await bench.interleaved(math.nan, n)
        assert isinstance(one, Comparison)  # `run` refuses a sweep of more than two sides
        steps.append((n, one))
    bench.console.print(render_sweep(steps))
    for n, one in steps:
        write_run_directory(directory / f"concurrency-{n}", one)
    return sweep_to_dict(dict(steps))


# ---------------------------------------------------------------- entry


def run(options: BenchOptions, api_key: str = "") -> int:
    """Carry the benchmark out; returns the exit status. Raises `ValueError`, `OSError` or `StartError` in one line.

    `api_key` is the server's; it is no part of the options, which are written to the run directory.
    """
    console = Console(stderr=options.report.json)
    # What can be known to be wrong is told before anything is started.
    if options.server is not None and options.workload.dataset_name == MULTITURN:
        raise ValueError(
            f"--dataset-name {MULTITURN} goes on from the tokens that were sampled, and a server answers in text: "
            "measure an engine that bench starts, without --base-url"
        )
    items, _ = build_items(options.workload, options.workload.num_prompts or quick_prompts(options, math.nan))
    at_once = math.isinf(options.arrivals.request_rate) and not options.arrivals.max_concurrency
    check_measurable(len(items), options.arrivals.num_warmups, at_once)  # a trace may hold fewer than were asked for
    if len(options.sides) > 2 and options.arrivals.max_concurrency:
        raise ValueError("--max-concurrency compares two sides at most")
    for side in options.sides:
        rehearse(side.policy, {name: (role, settings.options()) for name, role, settings in side.roles()})
    files = Files([side.policy for side in options.sides], options.workload.dataset_path)
    if options.report.dry_run:
        console.print(_dry_run(options, items[-1].arrival_s), highlight=False)
        return 0
    directory = new_directory(options.report)
    if options.run.record_dir == IN_RUN:
        options = replace(options, run=replace(options.run, record_dir=str(directory.resolve() / RECORD)))
    try:
        if options.server is None:
            ensure(options.model.model, lambda line: console.print(line, style="dim", highlight=False))
            limit = options.model.max_model_len or load_config(options.model.model).max_model_len
            check_length(options.workload, limit)
        return asyncio.run(_run(options, console, api_key, directory, files))
    except KeyboardInterrupt:
        console.print("interrupted: a comparison needs all of its runs, so none is kept", highlight=False)
        raise
    finally:
        remove_if_empty(directory)


async def _run(options: BenchOptions, console: Console, api_key: str, directory: Path, files: Files) -> int:
    async with AsyncExitStack() as stack:
        bench = Bench(options, console)
        await bench.start(stack, api_key)
        with bench.progress:
            if options.trials.find_goodput:
                result = await goodput(bench)
            elif options.arrivals.max_concurrency:
                result = await sweep(bench, directory)
            else:
                found = await bench.interleaved(bench.rate)
                console.print(render(found) if isinstance(found, Comparison) else contest.render(found))
                write_run_directory(directory, found)
                result = to_dict(found) if isinstance(found, Comparison) else contest_to_dict(found)
        write_options(directory, "bench", bench.options, files)
        write_json(directory / "result.json", result)
        if bench.timelines:
            write_timeline(directory / "trace.json", list(bench.timelines.values()))
        write_html(directory)
        console.print(f"report: {directory}", highlight=False)
        if options.report.json:
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
        alone = count / rate
        each = f"each as long as {alone:.0f} prefills alone, which calibration measures: "
        each += f"{alone / 10:.0f} s if one takes 0.1 s, {alone:.0f} s if 1 s"
    else:
        seconds = QUICK_SECONDS if not known else trace_s if math.isnan(rate) else count / rate
        each = f"each {seconds:.0f} s of arrivals, {runs * seconds:.0f} s in all"
    lines = [f"would run {describe_workload(workload)} on"]
    if options.sides:
        told = describe(*make_workers(options.model, options.sides))
        lines.append(f"  {' and '.join(labels(options.sides))}: {told}")
    lines += [f"  {options.server.base_url}"] if options.server is not None else []
    requests = str(count) if known else "{} to {}".format(*QUICK_PROMPTS)
    lines.append(f"{most}{runs} run{'s' * (runs > 1)} of {requests} requests, {each}{at_first};")
    return "\n".join([*lines, "and the start, the calibration, and what the last requests of each run take"])

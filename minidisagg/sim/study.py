"""`minidisagg simulate`: sides on simulated clusters under the same load, and what they leave behind.

Every side gets the same requests at the same times, and its steps the same luck (common random numbers), so that only
what is compared makes a difference. The same command gives the same results to the last bit, whatever `jobs` is.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minidisagg.core.granularity import parse_granularity
from minidisagg.core.messages import Role
from minidisagg.core.predictor import Predictor
from minidisagg.interconnect import parse_interconnect
from minidisagg.measure import contest
from minidisagg.measure.comparison import Comparison, compare_runs, marks_of
from minidisagg.measure.files import Files
from minidisagg.measure.goodput import GoodputResult, least_requests, search_goodput
from minidisagg.measure.html import write_html
from minidisagg.measure.intervals import share_error
from minidisagg.measure.records import RunRecord
from minidisagg.measure.report import goodput_table, marks_text, render, render_sweep
from minidisagg.measure.run_directory import (
    LETTERS,
    RECORD,
    contest_to_dict,
    new_directory,
    remove_if_empty,
    run_name,
    search_to_dict,
    sweep_to_dict,
    to_dict,
    write_json,
    write_options,
    write_run_directory,
)
from minidisagg.measure.settings import IN_RUN, ReportSettings, Trials
from minidisagg.measure.stats import samples_of, void_reasons
from minidisagg.measure.timeline import Event, Timeline, write_events
from minidisagg.policies import rehearse
from minidisagg.sides import numbered, parse_compare, short
from minidisagg.sim.machines import ClusterSpec, Group, parse_cluster, parse_options
from minidisagg.sim.processes import side_by_side
from minidisagg.sim.profile import SUFFIXES
from minidisagg.sim.simulate import Result, simulate
from minidisagg.sim.simulation import Settings, capacity_of, derived_slo, profiles_of
from minidisagg.workload.lengths import WorkItem, at_rate
from minidisagg.workload.settings import Arrivals, Workload, build_items, describe_workload

REPEAT_SEED = 1_000_003  # repetition r of seed s draws its workload from s + r · this, as `bench` does
DRAWN = 2000  # requests of a run up to which its steps and its timeline are kept
SEARCH_RUNS, TOLERANCE = 24, 0.02


class SimSide(Struct, frozen=True, kw_only=True):
    """One cluster and its policy."""

    label: str
    cluster: ClusterSpec
    policy: str


class SimOptions(Struct, frozen=True, kw_only=True):
    """A whole study."""

    sides: tuple[SimSide, ...]
    workload: Workload
    arrivals: Arrivals
    trials: Trials
    report: ReportSettings
    seed: int = 0
    predictor: Predictor = "none"
    decision_dir: str = ""
    jobs: int = 1
    time_limit: float = 0.0
    record: str = ""  # where the inputs of the first run of each side are kept


# ---------------------------------------------------------------- sides


def parse_sides(text: str, cluster: ClusterSpec) -> tuple[SimSide, ...]:
    """As `parse_compare` reads them; raises `ValueError`."""
    sides, names = [], parse_compare(text)
    one_mode = len({mode or cluster.mode for mode, _ in names}) == 1 < len(names)
    for mode, policy in names:
        of_mode = colocated(cluster) if mode == "colocated" else cluster
        if mode and mode != of_mode.mode:
            raise ValueError(f"side {mode}: the cluster has no workers of prefill or decode alone")
        label = of_mode.mode if policy == "fcfs" else f"{of_mode.mode} {short(policy)}"
        label = short(policy) if one_mode else label
        sides.append(SimSide(label=label, cluster=of_mode, policy=policy))
    labels = numbered([side.label for side in sides])
    return tuple(replace(side, label=label) for side, label in zip(sides, labels, strict=True))


def colocated(cluster: ClusterSpec) -> ClusterSpec:
    """The same devices, each doing both."""
    return replace(cluster, groups=tuple(replace(group, role=Role.BOTH) for group in cluster.groups))


def calibrated(sides: Sequence[SimSide]) -> ClusterSpec:
    """Whose workers SLOs and relative rates are of: as in `bench`, a side's that disaggregates, if there is one."""
    clusters = [side.cluster for side in sides]
    return next((cluster for cluster in clusters if cluster.mode == "disagg"), clusters[0])


def describe_cluster(cluster: ClusterSpec) -> str:
    """One line for a person."""

    counts = Counter[Group]()
    for group in cluster.groups:
        counts[replace(group, count=0)] += group.count
    return " + ".join(
        f"{count} {group.role.name.lower()} on {group.device}{f' x {group.devices}' * (group.devices > 1)}"
        for group, count in counts.items()
    )


def rehearsed(sides: Iterable[SimSide]) -> None:
    """Each policy on its cluster. Raises `ValueError`."""
    for side in sides:
        roles = {name: (group.role, side.cluster.options(group.role)) for name, group in side.cluster.workers()}
        rehearse(side.policy, roles)


# ---------------------------------------------------------------- one run


class Done(Struct, frozen=True):
    """What a run has left, as it comes back from another process."""

    record: RunRecord
    decisions: str  # a hash of what was done for whom, where and when
    steps: int
    events: int
    took: float
    trace: list[Event] = []


class Task(Struct, frozen=True, array_like=True):
    """One side, once. `told`: what the record is to say of its load. `decisions`: where its policy's are written, and
    `record`: its inputs."""

    side: SimSide
    number: int
    items: list[WorkItem]
    settings: Settings
    told: RunRecord
    decisions: str = ""
    record: str = ""


def run_once(task: Task, progress: Callable[[int], None] | None = None) -> Done:
    """The steps of a run that is not too long are kept, and the timeline of a side's first one."""
    side, told = task.side, task.told
    timelines = [Timeline(side.label)] if len(task.items) <= DRAWN else []
    result = simulate(
        side.policy, task.items, side.cluster, task.settings, timelines, progress, task.decisions, task.record,
        allow_void=True,
    )  # fmt: skip
    own, steps = result.run, [step for timeline in timelines for step in timeline.steps()]
    record = replace(
        told, label=side.label, mode=own.mode, policy=side.policy, model=own.model, requests=own.requests,
        steps=steps, workers=own.workers, links=own.links, wall_s=own.wall_s, marks=[*told.marks, *own.marks],
    )  # fmt: skip
    drawn = timelines if told.repetition == 0 else []
    events = [event for timeline in drawn for event in timeline.events(first_pid=1 + 1000 * task.number)]
    return Done(record, decisions_of(result), result.steps, result.events, result.took, events)


def decisions_of(result: Result) -> str:
    """A hash of what was done for whom, where and when."""
    digest = hashlib.sha256()
    for request in result.run.requests:
        digest.update(repr((request.request_id, request.workers, request.token_times)).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- the study


class Study:
    """One study under way."""

    def __init__(self, options: SimOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.limit = min(capacity_of(side.cluster) for side in options.sides)
        self.items, _ = self._items(0)
        cluster = calibrated(options.sides)
        derived = derived_slo(cluster, profiles_of(cluster), self.items)
        self.slo = options.trials.slo or derived
        assert derived.ttft is not None
        arrivals, self.prefills = options.arrivals, 8e3 / derived.ttft  # per second, of a worker alone
        self.rate = arrivals.request_rate or math.nan
        if arrivals.relative:
            self.rate *= self.prefills
        self.totals = [0, 0, 0.0]  # steps, events, seconds
        self.void = False  # a run of it
        self.traces: dict[str, list[Event]] = {}

    def _items(self, repetition: int) -> tuple[list[WorkItem], list[str]]:
        """Of a repetition, and marks of it."""
        workload, seed = self.options.workload, self.options.seed + REPEAT_SEED * repetition
        items, report = build_items(workload, workload.num_prompts, seed, None, self.limit, repetition)
        if not repetition and report:
            report = replace(report, duration_s=report.duration_s * (not self.options.arrivals.request_rate))
            self.console.print(f"{describe_workload(workload)}: {report}", style="dim", highlight=False)
        return items, report.marks if report else []

    def task(self, number: int, repetition: int, rate: float, concurrency: int | None) -> Task:
        """One run to be."""
        options = self.options
        items, marks = self._items(repetition) if repetition else (self.items, [])
        seed = options.seed + REPEAT_SEED * repetition
        if not math.isnan(rate) and concurrency is None:
            items = at_rate(items, rate, options.arrivals.burstiness, seed)
        settings = Settings(
            slo=self.slo, max_concurrency=concurrency, seed=seed, num_warmups=options.arrivals.num_warmups,
            predictor=options.predictor, time_limit=options.time_limit,
        )  # fmt: skip
        told = RunRecord(
            label="", workload=describe_workload(options.workload), burstiness=options.arrivals.burstiness,
            request_rate="trace" if math.isnan(rate) else "inf" if math.isinf(rate) else round(rate, 4),
            max_concurrency=concurrency, seed=options.seed, repetition=repetition,
            num_warmups=options.arrivals.num_warmups, marks=marks,
        )  # fmt: skip
        letter, decisions, record = LETTERS[number] if len(options.sides) > 1 else "", "", ""
        if options.decision_dir:
            decisions = str(Path(options.decision_dir, letter, run_name(repetition, concurrency)))
        if options.record and not repetition and not options.trials.find_goodput:
            users = f"concurrency-{concurrency}" if concurrency else ""
            record = str(Path(options.record, users, letter))
        return Task(options.sides[number], number, items, settings, told, decisions, record)

    def runs(self, rate: float, concurrency: int | None, title: str = "") -> list[list[Done]]:
        """All repetitions of all sides."""
        repeats = self.options.trials.repeats
        turns = list(itertools.product(range(len(self.options.sides)), range(repeats)))
        tasks = (self.task(side, repetition, rate, concurrency) for side, repetition in turns)
        done = dict(zip(turns, self._carry_out(tasks, len(turns), title), strict=True))
        return [[done[side, repetition] for repetition in range(repeats)] for side in range(len(self.options.sides))]

    def _carry_out(self, tasks: Iterable[Task], count: int, title: str) -> Iterator[Done]:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        silent = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=silent) as progress:
            if self.options.jobs > 1 and count > 1:
                yield from self._side_by_side(tasks, count, progress, title)
                return
            for task in tasks:
                bar = progress.add_task(f"{task.side.label}{title}", total=len(task.items))
                yield self._note(run_once(task, partial(progress.advance, bar)))
                progress.remove_task(bar)

    def _side_by_side(self, tasks: Iterable[Task], count: int, progress: Progress, title: str) -> Iterator[Done]:
        bar = progress.add_task(f"{count} runs{title}", total=count)
        answers: dict[int, bytes] = {}
        for number, answer in side_by_side(_run_encoded, map(msgspec.msgpack.encode, tasks), self.options.jobs):
            answers[number] = answer
            progress.advance(bar)
        yield from [self._note(msgspec.msgpack.decode(answers[number], type=Done)) for number in range(count)]

    def _note(self, done: Done) -> Done:
        for index, value in enumerate((done.steps, done.events, done.took)):
            self.totals[index] += value
        self.void |= bool(void_reasons(done.record))
        if done.trace:
            self.traces.setdefault(done.record.label, done.trace)
        return done

    # ------------------------------------------------------------ kinds of studies

    def at_rate(self, directory: Path) -> dict[str, object]:
        """All sides at one load."""
        runs = self.runs(self.rate, None)
        result = self.judge(runs)
        self.console.print(render(result) if isinstance(result, Comparison) else contest.render(result))
        write_run_directory(directory, result)
        return to_dict(result) if isinstance(result, Comparison) else contest_to_dict(result)

    def judge(self, runs: list[list[Done]]) -> Comparison | contest.Contest:
        """What came of each side's repetitions."""
        records = [[done.record for done in side] for side in runs]
        decided = [tuple(done.decisions for done in side) for side in runs]
        labels = [side.label for side in self.options.sides]
        pairs = itertools.combinations(range(len(runs)), 2)
        alike = [(labels[a], labels[b]) for a, b in pairs if decided[a] == decided[b]]
        if len(runs) > 2:
            return contest.contest(records, self.slo, seed=self.options.seed, run_noise=0.0, alike=alike)
        other = records[1] if len(records) > 1 else ()
        return compare_runs(records[0], other, self.slo, run_noise=0.0, seed=self.options.seed, alike=alike)

    def sweep(self, directory: Path) -> dict[str, object]:
        """Closed loop, so many requests at a time."""
        steps: list[tuple[int, Comparison]] = []
        for users in self.options.arrivals.max_concurrency:
            result = self.judge(self.runs(math.nan, users, f", {users} at a time"))
            assert isinstance(result, Comparison)
            write_run_directory(directory / f"concurrency-{users}", result)
            steps.append((users, result))
        self.console.print(render_sweep(steps))
        return sweep_to_dict(dict(steps))

    def goodput(self) -> dict[str, object]:
        """The highest rate at 90 % attainment, of each side."""
        found: dict[str, GoodputResult] = {}
        records: list[RunRecord] = []
        for number, side in enumerate(self.options.sides):
            search = search_goodput(self.rate, tolerance=TOLERANCE, max_runs=SEARCH_RUNS)
            rate, run = next(search), itertools.count(1)
            while side.label not in found:
                title = f" run {next(run)} of at most {SEARCH_RUNS}, {rate:.2f} req/s"
                # The same requests and gaps at every rate, stretched: what differs is the rate alone.
                [done] = self._carry_out([self.task(number, 0, rate, None)], 1, title)
                met = samples_of(done.record, self.slo).metrics["attainment"].values
                short = [replace(r, token_times=r.token_times[:1] + r.token_times[-1:]) for r in done.record.requests]
                records.append(replace(done.record, requests=short, steps=[]))
                try:
                    rate = search.send((float(met.mean()), share_error(met)))
                except StopIteration as stop:
                    found[side.label] = stop.value
        voids = {record.label: reason for record in records for reason in void_reasons(record)}  # one of each side
        void, marks = [f"{label}: {reason}" for label, reason in voids.items()], marks_of(records, len(records), 0.0)
        marks += [f"{label}: the search did not converge" for label, one in found.items() if not one.converged]
        few = [label for label, one in found.items() if least_requests(self.slo, one.rate) > len(self.items)]
        marks += [f"{label}: runs too short for a queue to outgrow the SLO, give more --num-prompts" for label in few]
        self.console.print(goodput_table(found), marks_text(marks, void))
        result = search_to_dict(found, self.slo, void, marks)
        if "verdict" in result:
            self.console.print(result["verdict"], style="bold", highlight=False)
        return result


def _run_encoded(data: bytes) -> bytes:
    return msgspec.msgpack.encode(run_once(msgspec.msgpack.decode(data, type=Task)))


def run(options: SimOptions) -> int:
    """Carry the study out; returns the exit status, 1 where a run is void.

    Raises `ValueError`, `TimeoutError`, `PolicyError` in one line.
    """
    console = Console(stderr=options.report.json)
    rehearsed(options.sides)
    devices = {group.device for side in options.sides for group in side.cluster.groups}
    profiles = sorted(device for device in devices if device.endswith(SUFFIXES))
    files = Files([side.policy for side in options.sides], options.workload.dataset_path, profiles)
    directory = new_directory(options.report)
    try:
        if options.record == IN_RUN:
            options = replace(options, record=str(directory / RECORD))
        study = Study(options, console)
        _announce(study)
        if options.trials.find_goodput:
            result = study.goodput()
        elif options.arrivals.max_concurrency:
            result = study.sweep(directory)
        else:
            result = study.at_rate(directory)
        write_options(directory, "simulate", options, files)
        write_json(directory / "result.json", result)
        if study.traces and not options.trials.find_goodput:
            write_events(directory / "trace.json", itertools.chain.from_iterable(study.traces.values()))
        write_html(directory)
    finally:
        remove_if_empty(directory)
    steps, events, took = study.totals
    console.print(
        f"{steps:,} steps in {events:,} events, {took:.1f} s of simulation ({events / max(took, 1e-9):,.0f} events/s)",
        style="dim", highlight=False,
    )  # fmt: skip
    console.print(f"report: {directory}", highlight=False)
    if options.report.json:
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    return int(study.void)


def _announce(study: Study) -> None:
    for side in study.options.sides:
        profile = next(iter(profiles_of(side.cluster).values()))
        line = (
            f"{side.label}: {describe_cluster(side.cluster)}, {profile.model} {profile.dtype}, wire {side.cluster.wire}"
        )
        if side.policy == "sarathi" and "cpu" not in profile.name:
            line += "; its default chunk=64 is for a CPU, on GPUs 512 and more are usual"
        study.console.print(line, style="dim", highlight=False)
    rate = f"{study.rate:.3g} requests/s"
    if math.isnan(study.rate):
        own = len(study.items) / (max(item.arrival_s for item in study.items) or math.inf)
        rate = f"the trace's own times, {own / study.prefills:.2g}x of one prefill worker's capacity"
    given = "" if study.options.trials.slo else " (derived)"
    study.console.print(f"{len(study.items)} requests at {rate}; SLO {study.slo}{given}", style="dim", highlight=False)


def read_cluster(flags: Mapping[str, Any]) -> ClusterSpec:
    """Of the command line. Raises `ValueError`."""
    wire = parse_interconnect(flags["link"])
    if wire is None:
        raise ValueError(f"--link {flags['link']}: a simulated wire needs a bandwidth")
    if wire.jitter:
        raise ValueError(f"--link {flags['link']}: a simulated wire has no jitter, give BANDWIDTH,LATENCY")
    parse_granularity(flags["transfer_granularity"], 1)
    return ClusterSpec(
        groups=parse_cluster(flags["cluster"]), model=flags["model"], dtype=flags["dtype"],
        page_size=flags["block_size"], memory_utilization=flags["gpu_memory_utilization"],
        prefix_caching=not flags["no_prefix_caching"], granularity=flags["transfer_granularity"],
        codec=flags["kv_codec"], decode_after=flags["decode_after"], wire=wire,
        prefill=parse_options("prefill", flags["prefill"]), decode=parse_options("decode", flags["decode"]),
    )  # fmt: skip


def read_options(flags: Mapping[str, Any], load: tuple[Workload, Arrivals, Trials, ReportSettings]) -> SimOptions:
    """Of the command line. Raises `ValueError`."""
    cluster = read_cluster(flags)
    if flags["record"] and load[2].find_goodput:
        raise ValueError("--record is for runs at a given load, and --find-goodput tries many")
    if flags["compare"] and flags["policy"]:
        raise ValueError("--policy is of one side: with --compare, name it in each side's place")
    if flags["log_decisions"] and load[2].find_goodput:
        raise ValueError("--log-decisions is for runs that are kept, and --find-goodput keeps none")
    asked = flags["compare"] or flags["policy"] or ("colocated,disagg" if cluster.mode == "disagg" else "fcfs")
    sides = parse_sides(asked, cluster)
    if len(sides) > len(LETTERS) or (len(sides) > 2 and load[1].max_concurrency):
        raise ValueError(f"--compare has {len(sides)} sides, but a sweep takes two, and a study {len(LETTERS)}")
    return SimOptions(
        sides=sides, workload=load[0], arrivals=load[1], trials=load[2], report=load[3], seed=flags["seed"],
        predictor=flags["predict_lengths"], jobs=flags["jobs"], time_limit=flags["time_limit"],
        decision_dir=str(flags["log_decisions"].resolve()) if flags["log_decisions"] else "",
        record=str(flags["record"] or ""),
    )  # fmt: skip

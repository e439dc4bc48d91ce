"""`minidisagg league`: every policy under several workloads and loads, on the same simulated devices.

A command beside `simulate`, not a flag of it: that one looks at a few sides under one load, in all detail and against a
baseline; this one wants a little of each of a thousand runs, and keeps what is finished. What is below is the same.

All runs of a workload and load, whatever the policy, have the same requests at the same times, and steps the same luck
(common random numbers). Rates are shares of `ideal_rate`, which looks at the devices and the requests alone. The same
command gives the same tables to the last bit, whatever `jobs` is.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minidisagg.core.predictor import Predictor
from minidisagg.formats import check_version
from minidisagg.measure.goodput import SLO, parse_slo
from minidisagg.measure.machine import command_line, cores, machine
from minidisagg.measure.records import ORACLE
from minidisagg.measure.run_directory import write_json
from minidisagg.measure.settings import check_measurable
from minidisagg.measure.standings import (
    VERSION,
    Condition,
    League,
    Played,
    render,
    to_dict,
    to_markdown,
    to_svg,
)
from minidisagg.measure.stats import by_schedule, window_of
from minidisagg.policies import load_policy, names
from minidisagg.sides import SideName, numbered, parse_compare, short
from minidisagg.sim.machines import ClusterSpec
from minidisagg.sim.processes import side_by_side
from minidisagg.sim.profile import Profile
from minidisagg.sim.simulate import simulate
from minidisagg.sim.simulation import Settings, capacity_of, derived_slo, profiles_of
from minidisagg.sim.study import (
    REPEAT_SEED,
    SimSide,
    calibrated,
    colocated,
    decisions_of,
    describe_cluster,
    read_cluster,
    rehearsed,
)
from minidisagg.workload.lengths import WorkItem, at_rate
from minidisagg.workload.settings import DATASETS, TRACES, Workload, build_items, describe_workload
from minidisagg.workload.traces import TraceReport

WORKLOADS = "synth:mooncake-conversation", "synth:azure-code-2023", "synth:azure-conv-2023"
# Settings in which a policy's own defaults are for other devices (`sarathi`) or for SLOs of its own.
SETTINGS = {
    "sarathi": "chunk=512", "arrow": "ttft={ttft},tpot={tpot}", "deflection": "tbt={tpot}",
    "polyserve": "tiers={tpot},ttft={ttft}",
}  # fmt: skip
NUMBER = re.compile(r"\d*\.?\d+")
OF_SLO = re.compile(r"[:,]\w+={\w+}")  # a setting that is the SLO's
WARMUPS = 8
SHOWN = ("p90_ttft", "mean_tpot", "p99_itl", "request_goodput", "output_throughput")  # kept of each run


class LeagueOptions(Struct, frozen=True, kw_only=True):
    """A whole league. Settings of the sides' policies may have {ttft} and {tpot}, the SLO's seconds."""

    sides: tuple[SimSide, ...]
    workloads: tuple[Workload, ...]
    loads: tuple[float, ...]
    repeats: int
    slo: SLO | None = None
    seed: int = 0
    predictor: Predictor = "none"
    jobs: int = 1
    time_limit: float = 0.0
    out: str


class Run(Struct, frozen=True, kw_only=True):
    """One side under one load, once: all that its outcome follows from."""

    side: SimSide
    workload: Workload
    limit: int  # tokens of a request
    rate: float  # requests per second
    slo: SLO
    seed: int
    repetition: int
    predictor: Predictor
    time_limit: float


class Line(Struct, frozen=True):
    """Of DIR/runs.jsonl: a finished run, under the hash of what it was made from."""

    version: int
    key: str
    played: Played


# ---------------------------------------------------------------- who plays


def line_up(cluster: ClusterSpec, given: str, added: Sequence[str]) -> tuple[SimSide, ...]:
    """`given` as for --policies, empty for all that ship, then `added`. Raises `ValueError`."""
    everyone = [SideName("", f"{name}:{SETTINGS[name]}" if name in SETTINGS else name) for name in names()]
    sides = []
    for mode, policy in [*(parse_compare(given) if given else everyone), *itertools.chain(*map(parse_compare, added))]:
        for own in [mode] if mode else dict.fromkeys(("colocated", cluster.mode)):
            if own == "disagg" != cluster.mode:
                raise ValueError("side disagg: the cluster has no workers of prefill or decode alone")
            if mode or load_policy(_filled(policy, SLO(1e3, 1e3))).only in ("", own):
                label = f"{own} {OF_SLO.sub('', short(policy))}"
                of_mode = colocated(cluster) if own == "colocated" else cluster
                sides.append(SimSide(label=label, cluster=of_mode, policy=policy))
    labels = numbered([side.label for side in sides])
    return tuple(replace(side, label=label) for side, label in zip(sides, labels, strict=True))


def _filled(policy: str, slo: SLO) -> str:
    for name, limit in ("{ttft}", slo.ttft), ("{tpot}", slo.tpot):
        if name in policy and limit is None:
            raise ValueError(f"policy {policy!r} asks for {name}, of which --goodput says nothing")
        policy = policy.replace(name, f"{(limit or 0.0) / 1e3:g}")
    return policy


def parse_workload(text: str, num_prompts: int) -> Workload:
    """`synth:azure-conv-2023`, `random`, or a trace with its file: `mooncake:FILE`. Raises `ValueError`."""
    kind, _, path = text.partition(":")
    if text in DATASETS and text not in TRACES:
        return Workload(dataset_name=text, num_prompts=num_prompts)
    if kind not in TRACES or not path:
        choice = ", ".join(name for name in DATASETS if name not in TRACES)
        raise ValueError(f"--workload {text!r}: choose from {choice}, or KIND:FILE with a kind of {', '.join(TRACES)}")
    if not Path(path).is_file():
        raise ValueError(f"--workload {text!r}: there is no file {path}")
    return Workload(dataset_name=kind, dataset_path=path, num_prompts=num_prompts)


# ---------------------------------------------------------------- what is offered


def ideal_rate(cluster: ClusterSpec, items: Sequence[WorkItem], tpot: float | None) -> float:
    """Requests per second that the devices of a cluster would do if none of them ever waited or stood in another's way:
    prompts one after the other, without what a prefix cache that forgets nothing would have, and decodes in the largest
    batches that fit and take at most `tpot` seconds a step. No policy holds its SLOs for long at more than that.
    """
    count, outputs, known, rests = len(items), sum(item.output_len for item in items), set[int](), []
    for item in items:
        hits = next((n for n, block in enumerate(item.blocks) if block not in known), len(item.blocks))
        known_len = item.prompt_len - item.new_len if item.new_len else hits * item.block_size
        cached = min(known_len, item.prompt_len - 1) if cluster.prefix_caching else 0
        rests.append((cached, item.prompt_len - cached))
        known.update(item.blocks)
    context = sum(item.output_len * (item.prompt_len + item.output_len / 2) for item in items) / outputs
    tokens = capacity_of(cluster)

    def step(profile: Profile, batch: int) -> float:
        return profile.step_seconds((), batch, int(batch * context))

    def seconds(profile: Profile) -> float:
        most = max(1, min(cluster.decode.max_num_seqs, int(tokens / context)))
        batch = max(1, bisect_right(range(1, most + 1), tpot or math.inf, key=partial(step, profile)))
        prompts = math.fsum(profile.step_seconds([rest], 0, 0) for rest in rests)
        return (prompts + outputs * step(profile, batch) / batch) / count

    profiles = profiles_of(cluster).values()
    each = {str(profile) + profile.name: seconds(profile) for profile in profiles}
    return math.fsum(1 / each[str(profile) + profile.name] for profile in profiles)


@cache
def _items(workload: Workload, seed: int, limit: int, repetition: int = 0) -> tuple[list[WorkItem], TraceReport | None]:
    return build_items(workload, workload.num_prompts, seed, None, limit, repetition)


def _conditions(options: LeagueOptions, limit: int) -> list[tuple[Condition, Workload]]:
    """Of each workload its loads."""
    cluster, found = calibrated(options.sides), []
    for workload in options.workloads:
        items, _ = _items(workload, options.seed, limit)
        check_measurable(len(items), WARMUPS, False)
        slo = options.slo or derived_slo(cluster, profiles_of(cluster), items)
        ideal = ideal_rate(cluster, items, slo.tpot and slo.tpot / 1e3)
        name = describe_workload(workload)
        found += [(Condition(name, load, load * ideal, slo, len(items)), workload) for load in options.loads]
    return found


# ---------------------------------------------------------------- runs


def play(run: Run) -> Played:
    """Carry it out, and keep what the tables need."""
    began, (items, _) = time.process_time(), _items(run.workload, run.seed, run.limit, run.repetition)
    items = at_rate(items, run.rate, 1.0, run.seed)
    settings = Settings(
        slo=run.slo, seed=run.seed, num_warmups=WARMUPS, predictor=run.predictor, time_limit=run.time_limit
    )  # fmt: skip
    result = simulate(run.side.policy, items, run.side.cluster, settings)
    window = window_of(result.run)
    kept = by_schedule(result.run)[window.first : window.last]
    met = "".join("01"[run.slo.met_by(request)] for request in kept)
    values = {name: result.values[name] for name in SHOWN if name in result.values}
    values["rejected"] = sum(request.rejected for request in kept) / len(kept)
    return Played(met, values, decisions_of(result), time.process_time() - began)


def _play_encoded(data: bytes) -> bytes:
    return msgspec.msgpack.encode(play(msgspec.msgpack.decode(data, type=Run)))


def key_of(run: Run) -> str:
    """Runs of one key have one outcome: also the code and the files that it is made from are in it."""
    files = [run.side.policy.partition(":")[0], run.workload.dataset_path]
    files += [group.device for group in run.side.cluster.groups]
    asked = [msgspec.json.encode(replace(run, time_limit=0.0)), _code(), *(_content(name) for name in files)]
    return hashlib.sha256(b"\0".join(asked)).hexdigest()[:32]


@cache
def _code() -> bytes:
    package = Path(__file__).parent.parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).digest()


@cache
def _content(name: str) -> bytes:
    return hashlib.sha256(Path(name).read_bytes()).digest() if name and Path(name).is_file() else b""


# ---------------------------------------------------------------- the league


class Games:
    """All runs of a league, those that are finished, and the file that keeps them."""

    def __init__(self, options: LeagueOptions) -> None:
        """Raises `ValueError`."""
        self.options = options
        self.path = Path(options.out) / "runs.jsonl"
        self.limit = limit = min(capacity_of(side.cluster) for side in options.sides)
        self.conditions = _conditions(options, limit)
        self.runs: dict[tuple[int, int, int], Run] = {}
        # All of one repetition first: whatever part of the list has been done, it tells how long the rest will take.
        for repetition, (place, (condition, workload)), (number, side) in itertools.product(
            range(options.repeats), enumerate(self.conditions), enumerate(options.sides)
        ):
            self.runs[repetition, place, number] = Run(
                side=replace(side, policy=_filled(side.policy, condition.slo)),
                workload=workload, limit=limit, rate=condition.rate, slo=condition.slo,
                seed=options.seed + REPEAT_SEED * repetition, repetition=repetition,
                predictor=options.predictor, time_limit=options.time_limit,
            )  # fmt: skip
        rehearsed({(run.side.label, run.side.policy): run.side for run in self.runs.values()}.values())
        self.keys = {cell: key_of(run) for cell, run in self.runs.items()}
        self.played = self._read()

    def _read(self) -> dict[str, Played]:
        """What an earlier command has left; half a line at the end is of a run that was not finished."""
        kept, played = self.path.read_bytes() if self.path.exists() else b"", {}
        for data in kept[: kept.rfind(b"\n") + 1].splitlines():
            line = msgspec.json.decode(data, type=Line)
            check_version(self.path, line.version, VERSION)
            played[line.key] = line.played
        return played

    @property
    def left(self) -> dict[str, Run]:
        """By key: what is still to be played."""
        return {self.keys[cell]: run for cell, run in self.runs.items() if self.keys[cell] not in self.played}

    def play(self, console: Console) -> None:
        """All that is left; each run is kept as it ends."""
        left = self.left
        keys, tasks = list(left), [msgspec.msgpack.encode(run) for run in left.values()]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        silent = not console.is_terminal
        with self.path.open("ab") as file, Progress(*columns, console=console, transient=True, disable=silent) as bars:
            file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            bar = bars.add_task("runs", total=len(left))
            for number, answer in side_by_side(_play_encoded, tasks, self.options.jobs):
                played = self.played[keys[number]] = msgspec.msgpack.decode(answer, type=Played)
                file.write(msgspec.json.encode(Line(VERSION, keys[number], played)) + b"\n")
                file.flush()
                bars.advance(bar)

    def league(self) -> League:
        """What came of it."""
        sides, own = self.options.sides, calibrated(self.options.sides)
        both = ", colocated: the same devices, each doing both" * (own != sides[0].cluster)
        last = self.reports(self.options.repeats - 1)
        marks = [f"{workload}: {mark}" for workload, report in last for mark in report.marks]
        return League(
            labels=[side.label for side in sides],
            policies=[side.policy for side in sides],
            workers=len(own.workers()),
            conditions=[condition for condition, _ in self.conditions],
            cells={cell: self.played[key] for cell, key in self.keys.items()},
            repeats=self.options.repeats,
            seed=self.options.seed,
            about=f"{own.model} {own.dtype}, {describe_cluster(own)}, wire {own.wire}{both}",
            marks=[*marks, ORACLE] if self.options.predictor == "oracle" else marks,
        )

    def reports(self, repetition: int) -> Iterator[tuple[str, TraceReport]]:
        """What became of the requests of each workload that is a trace, or imitates one."""
        for workload in self.options.workloads:
            _, report = _items(workload, self.options.seed, self.limit, repetition)
            if report:
                yield describe_workload(workload), replace(report, duration_s=0.0)  # each load has times of its own


def run(options: LeagueOptions) -> int:
    """Play it, or what is left of it; returns the exit status. Raises `ValueError`, `TimeoutError`, `PolicyError`."""
    console, directory, began = Console(), Path(options.out), time.monotonic()
    games = Games(options)
    left, every = len(games.left), len(games.keys)
    told = f"sides: {len(options.sides)}, conditions: {len(games.conditions)}, repetitions: {options.repeats}; "
    told += f"{left} of {every} runs to do, {options.jobs} at a time"
    told = "\n".join([*(f"{workload}: {report}" for workload, report in games.reports(0)), told])
    console.print(told, style="dim", highlight=False)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        games.play(console)
    except KeyboardInterrupt:
        kept = every - len(games.left)
        console.print(f"stopped: {kept} of {every} runs are kept in {games.path}, and the same command goes on")
        raise
    league, cpu = games.league(), math.fsum(games.played[key].cpu_s for key in games.keys.values())
    console.print(render(league))
    made = {"command": command_line(), **machine(), "cpu seconds of all runs": round(cpu)}
    write_json(directory / "league.json", to_dict(league, made))
    (directory / "league.svg").write_text(to_svg(league), encoding="utf-8")
    (directory / "league.md").write_text(to_markdown(league, made), encoding="utf-8")
    took = f"{left} runs in {time.monotonic() - began:,.0f} s here, all of them {cpu:,.0f} s of CPU"
    console.print(took, style="dim", highlight=False)
    console.print(f"report: {directory / 'league.md'}", highlight=False)
    return 0


def read_options(flags: Mapping[str, Any]) -> LeagueOptions:
    """Of the command line. Raises `ValueError`."""
    cluster = read_cluster(flags)
    loads = [float(part) if NUMBER.fullmatch(part.strip()) else 0.0 for part in flags["loads"].split(",")]
    if not all(load > 0 for load in loads):
        raise ValueError(f"--loads {flags['loads']!r}: expected positive numbers joined by commas, as in 0.5,0.8")
    workloads = [parse_workload(text, flags["num_prompts"]) for text in flags["workloads"] or WORKLOADS]
    return LeagueOptions(
        sides=line_up(cluster, flags["policies"], flags["added"]), workloads=tuple(dict.fromkeys(workloads)),
        loads=tuple(sorted(set(loads))), repeats=flags["repeats"], seed=flags["seed"],
        slo=parse_slo(flags["goodput"]) if flags["goodput"] else None, predictor=flags["predict_lengths"],
        jobs=flags["jobs"] or cores(), time_limit=flags["time_limit"], out=str(flags["out"]),
    )  # fmt: skip

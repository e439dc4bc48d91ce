"""Flags that say what load is offered and how it is judged, of `bench` and `simulate` alike."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from minidisagg.measure.goodput import parse_slo
from minidisagg.measure.settings import ReportSettings, Trials, check_measurable
from minidisagg.options import SECTIONS, FiniteRange, positive, stack
from minidisagg.workload.multiturn import MULTITURN, Multiturn
from minidisagg.workload.settings import (
    DATASETS,
    SYNTHETIC,
    TEXTS,
    TRACES,
    Arrivals,
    Workload,
    parse_concurrencies,
    parse_rate,
)

SLO_PAIR, NUMBER = re.compile(r"(ttft|tpot|itl|e2el?):"), re.compile(r"[\d.]+")
ARRIVALS, WORKLOAD, TRIALS, SESSIONS = Arrivals(), Workload(), Trials(), Multiturn()


class SpreadCommand(click.Command):
    """Takes `--goodput ttft:200 tpot:50` as vLLM does, where click wants one value per flag, and --demo-load alone.

    Its `--help` has a section for each stack of options that is named.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """In the order in which they are declared."""
        records: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None  # as click does
            if record:
                records.setdefault(SECTIONS.get(param, ""), []).append(record)
        for section, options in records.items():
            with formatter.section(section or "Options"):
                formatter.write_dl(options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg, after in zip(args, [*args, ""][1:], strict=True):
            if arg == "--goodput" and after.startswith("--"):
                raise click.UsageError(f"--goodput needs NAME:MS, as in ttft:200 tpot:50, and not {after}", ctx)
            if SLO_PAIR.match(arg) and len(spread) >= 2 and spread[-2] == "--goodput":
                spread.append("--goodput")
            spread.append("--demo-load=1" if arg == "--demo-load" and not NUMBER.fullmatch(after) else arg)
        return super().parse_args(ctx, spread)


class DatasetName(click.types.StringParamType):
    """A choice; of the synthetic ones only the kind is shown."""

    name = "dataset"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Short."""
        kinds = [name for name in DATASETS if not name.startswith(SYNTHETIC)]
        return f"[{'|'.join([*kinds, f'{SYNTHETIC}NAME'])}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """One of `DATASETS`."""
        if value not in DATASETS:
            self.fail(f"{value!r} is not one of {', '.join(DATASETS)}.", param, ctx)
        return str(value)


# fmt: off
rate_options = stack(
    [
        click.option("--find-goodput", is_flag=True, help="Search the highest rate at which 90 % meet the SLOs."),
        click.option("--goodput", multiple=True, metavar="NAME:MS …",
                     help="SLOs, as in: --goodput ttft:200 tpot:50  [default: 8 unloaded prefills, 2 steps]"),
        click.option("--request-rate", metavar="RATE",
                     help="Requests per second, inf, or 0.5x: half of what one prefill worker does one request at a "
                          "time under fcfs, whatever the sides' policies (bench measures it, on the disagg side if "
                          "there is one). Of multiturn all turns count: 8 are 2 sessions of 4 turns per second.  "
                          "trace: at the times that it has, as without this flag but for synth in simulate.  "
                          f"[default: {ARRIVALS.request_rate}x, or the trace's own times]"),
        click.option("--burstiness", type=FiniteRange(min=0, min_open=True), default=ARRIVALS.burstiness,
                     show_default=True,
                     help="Shape of the gaps between arrivals: 1 is a Poisson process, less is burstier."),
        click.option("--max-concurrency", default="", metavar="N[,N…]",
                     help="Closed loop: as many requests at a time, or sessions of multiturn. A list is a sweep."),
        click.option("--num-prompts", type=positive,
                     help="Of each run; of multiturn they are turns, not sessions.  "
                          f"[default: {WORKLOAD.num_prompts}, of simulate 500; bench --preset quick: by the rate]"),
        click.option("--num-warmups", type=click.IntRange(min=0), default=ARRIVALS.num_warmups, show_default=True,
                     help="So many of them, the first of each run, are not measured."),
        click.option("--repeats", type=positive, default=TRIALS.repeats, show_default=True),
    ],
    "Load",
)
data_options = stack(
    [
        click.option("--dataset-name", type=DatasetName(), default=WORKLOAD.dataset_name, show_default=True,
                     help="A file that --dataset-path names, or synth:NAME with the statistics of one: "
                          f"{', '.join(name for name in DATASETS if name.startswith(SYNTHETIC))}. "
                          "docs/workloads.md says where to get the files."),
        click.option("--dataset-path", type=click.Path(exists=True, dir_okay=False), default=None, metavar="FILE",
                     help="The trace; or the text of which prompts of text are pieces."),
        click.option("--random-input-len", type=positive, default=WORKLOAD.input_len, show_default=True,
                     help="Tokens of random prompts, which it asks for."),
        click.option("--random-output-len", type=positive, default=WORKLOAD.output_len, show_default=True),
        click.option("--random-range-ratio", type=float, default=WORKLOAD.range_ratio, show_default=True,
                     help="Lengths are uniform in [1 - r, 1 + r] of the above."),
        click.option("--multiturn-turns", type=positive, default=SESSIONS.turns, show_default=True, metavar="N",
                     help="Of a session of multiturn, which these ask for: each turn's prompt is the whole turn before "
                          "with its sampled answer, and new tokens."),
        click.option("--multiturn-system-len", type=click.IntRange(min=0), default=SESSIONS.system_len,
                     show_default=True, help="Tokens of a system prompt that all sessions share."),
        click.option("--multiturn-input-len", type=positive, default=SESSIONS.input_len, show_default=True,
                     help="Tokens that the user adds to it in the first turn."),
        click.option("--multiturn-turn-len", type=positive, default=SESSIONS.turn_len, show_default=True,
                     help="Tokens that the user adds in each later turn."),
        click.option("--multiturn-output-len", type=positive, default=SESSIONS.output_len, show_default=True),
        click.option("--multiturn-range-ratio", type=float, default=SESSIONS.range_ratio, show_default=True,
                     help="Turns and lengths are uniform in [1 - r, 1 + r] of these, the system prompt's is exact."),
        click.option("--multiturn-think-time", type=FiniteRange(min=0), default=SESSIONS.think_time, show_default=True,
                     metavar="S", help="Mean seconds from a turn's last token to the next turn, exponential."),
        click.option("--trace-speedup", type=float, default=WORKLOAD.trace_speedup, show_default=True,
                     help="Divides the trace's times."),
        click.option("--trace-scale-len", type=float, default=WORKLOAD.trace_scale_len, show_default=True,
                     help="Multiplies the trace's lengths."),
    ],
    "Data set",
)
load_options = stack(
    [
        rate_options,
        data_options,
        click.option("--result-dir", default="bench-results", show_default=True, metavar="DIR",
                     help="Each run gets a directory of its own in it, of some 10 MB."),
        click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout."),
    ],
    "Results",
)
# fmt: on
# What of them `bench --kv-quality` takes, too, and what it does not.
OF_ANY = {"seed", "num_prompts", "dataset_name", "dataset_path", "result_dir"}
LOAD_FLAGS = {str(p.name) for p in load_options(click.Command("load")).params} - OF_ANY | {"dry_run", "preset"}


class Load(NamedTuple):
    """What these flags say."""

    workload: Workload
    arrivals: Arrivals
    trials: Trials
    report: ReportSettings


def given_flags() -> set[str]:
    """Of the command that runs: parameters that stand on its command line."""
    ctx = click.get_current_context()
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _dataset(flags: dict[str, Any]) -> str:
    """Lengths are of random prompts or of sessions: who gives them means those, and they are not dropped in silence."""
    given = given_flags()
    lengths = {flag: flag.partition("_")[0] for flag in flags if flag in given}
    lengths = {flag: of for flag, of in lengths.items() if of in ("random", MULTITURN)}
    name = str(flags["dataset_name"])
    if "dataset_name" not in given:
        name = next(iter(lengths.values()), name)
    for flag, of in lengths.items():
        if of != name:
            raise ValueError(f"--{flag.replace('_', '-')} is of --dataset-name {of}, and {name} has lengths of its own")
    for flag, other in ("trace_speedup", "--request-rate"), ("trace_scale_len", "the flags of its lengths"):
        if flag in given and not name.startswith((*TRACES, SYNTHETIC)):
            raise ValueError(f"--{flag.replace('_', '-')} is of traces and synth:NAME: for {name}, use {other}")
    return name


def read_load(flags: dict[str, Any], preset: str = "", fit: bool = False) -> Load:
    """Raises `ValueError`."""
    dataset = _dataset(flags)
    if dataset in TRACES and not flags["dataset_path"]:
        raise ValueError(f"--dataset-name {dataset} needs --dataset-path FILE")
    if flags["dataset_path"] and dataset not in (*TRACES, *TEXTS):
        raise ValueError(f"--dataset-path is of {', '.join((*TRACES, 'text'))}: say which with --dataset-name")
    workload = Workload(
        dataset_name=dataset,
        dataset_path=flags["dataset_path"] or "",
        num_prompts=flags["num_prompts"] or (0 if preset else WORKLOAD.num_prompts),
        input_len=flags["random_input_len"],
        output_len=flags["random_output_len"],
        range_ratio=flags["random_range_ratio"],
        trace_speedup=flags["trace_speedup"],
        trace_scale_len=flags["trace_scale_len"],
        fit=fit and dataset == "random",
        multiturn=Multiturn(**{name: flags[f"{MULTITURN}_{name}"] for name in Multiturn.__struct_fields__}),
    )
    default_rate = (0.0, False) if workload.has_times else (ARRIVALS.request_rate, ARRIVALS.relative)
    if flags["request_rate"] == "trace" and not workload.has_times:
        raise ValueError(f"--request-rate trace: {dataset} has no times of its own")
    given = flags["request_rate"] not in (None, "trace")
    rate, relative = parse_rate(flags["request_rate"]) if given else default_rate
    concurrencies = parse_concurrencies(flags["max_concurrency"])
    if "trace_speedup" in given_flags() and (rate or concurrencies):
        raise ValueError(
            "--trace-speedup divides a trace's own times, which a rate or a closed loop replaces: "
            "use --request-rate, or --request-rate trace with it"
        )
    if flags["find_goodput"] and (concurrencies or not 0 < rate < math.inf):
        raise ValueError(
            "--find-goodput searches for a rate: it starts at a finite --request-rate, which a trace must be given, "
            "and takes no --max-concurrency"
        )
    if workload.num_prompts:
        check_measurable(workload.num_prompts, flags["num_warmups"], math.isinf(rate) and not concurrencies)
    arrivals = Arrivals(
        request_rate=rate,
        relative=relative,
        burstiness=flags["burstiness"],
        max_concurrency=concurrencies,
        num_warmups=flags["num_warmups"],
    )
    trials = Trials(
        repeats=flags["repeats"],
        find_goodput=flags["find_goodput"],
        preset=preset,
        slo=parse_slo(flags["goodput"]) if flags["goodput"] else None,
    )
    return Load(workload, arrivals, trials, ReportSettings(directory=flags["result_dir"], json=flags["as_json"]))

"""The engine's options, shared by all commands: click options in, the config structs out. Flags follow vLLM."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import msgspec

from minidisagg.config import (
    DEFAULT_MODEL,
    MODES,
    STAGES,
    ClusterSettings,
    ModelSettings,
    RunSettings,
    WorkerSettings,
    check_moves,
    check_worker,
    parse_worker,
)
from minidisagg.core.granularity import parse_granularity
from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import CODECS
from minidisagg.core.predictor import PREDICTORS
from minidisagg.interconnect import PRESETS, parse_interconnect
from minidisagg.measure.settings import IN_RUN
from minidisagg.ranges import explained
from minidisagg.sizes import parse_size
from minidisagg.store.spec import parse_store
from minidisagg.transfer.emulate import announcement
from minidisagg.transfer.kinds import KINDS

LINKS = ("auto", *KINDS)
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
MODEL, CLUSTER, WORKER = ModelSettings(), ClusterSettings(), WorkerSettings()
OF_CLUSTER = (
    "policy", "link", "transfer_granularity", "kv_codec", "kv_store", "handoff", "decode_after", "gpu_checksums",
    "emulate_link",
)  # fmt: skip
Command = TypeVar("Command", bound=Callable[..., Any])


class Engine(NamedTuple):
    """All that `Frontend.start` wants."""

    model: ModelSettings
    cluster: ClusterSettings
    run: RunSettings


SECTIONS: dict[click.Parameter, str] = {}  # where `--help` has an option; those of no section come under "Options"


def stack(options: Iterable[Callable[[Command], Command]], section: str = "") -> Callable[[Command], Command]:
    """Several click options as one decorator; `--help` has them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(list(options)):
            command = option(command)
            made = command.params if isinstance(command, click.Command) else command.__click_params__  # type: ignore[attr-defined]
            SECTIONS.setdefault(made[-1], section)  # an option may be a stack of them
        return command

    return decorate


def _unused(pattern: str, what: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """Nothing of an earlier run is overwritten, or taken for this one's."""

    def check(ctx: click.Context, param: click.Parameter, directory: Path | None) -> Path | None:
        if directory is not None and next(directory.rglob(pattern), None) is not None:
            raise ValueError(f"{directory} has the {what} of an earlier run: name another directory, or empty it")
        return directory

    return check


def once(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> str:
    """Of an option that names policies: nothing of it is dropped in silence, and an empty one is not its default."""
    if len(given) > 1:
        raise click.BadParameter(f"it is given {len(given)} times")
    if given and re.search(r":(,|$)|^$", given[0]):
        raise click.BadParameter(f"{given[0]!r} lacks a name, or the settings after a colon")
    return "".join(given)


positive = click.IntRange(min=1)
record_option = click.option(
    "--record",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="[DIR]",
    is_flag=False,
    flag_value=IN_RUN,
    callback=_unused("*.inputs", "record"),
    help="Write all inputs of the router and of each worker here, for `minidisagg replay`. bench and simulate take "
    "their run directory where none is given.",
)
model_argument = click.argument("model", default=DEFAULT_MODEL)
mode_option = click.option(
    "--mode",
    type=click.Choice(MODES),
    default=CLUSTER.mode,
    show_default=True,
    help="Prefill and decode on the same workers, or on separate ones.",
)
decisions_option = click.option(
    "--log-decisions", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    callback=_unused("router.jsonl", "decisions"),
    help="Write what each hook of the policy was asked and answered here, as JSON lines.",
)  # fmt: skip
# fmt: off
engine_options = stack(
    [  # the defaults of the numbers of workers are the command's: see `read_engine`
        click.option("--prefill-workers", type=click.IntRange(min=0), metavar="N", help="Workers that prefill."),
        click.option("--decode-workers", type=click.IntRange(min=0), metavar="N",
                     help="Workers that decode. In colocated mode the two numbers add up, and each worker does both."),
        click.option("--dtype", type=click.Choice(DTYPES), default=WORKER.dtype, show_default=True),
        click.option("--device", default=WORKER.device, show_default=True,
                     help="cpu, cuda or cuda:N; cuda alone is one GPU after the other."),
        click.option("--max-model-len", type=positive, help="Tokens of prompt and output.  [default: the model's]"),
        click.option("--block-size", type=positive, default=MODEL.block_size, show_default=True,
                     help="Tokens of a KV page."),
        click.option("--kv-cache-memory", metavar="SIZE",
                     help="Of each worker.  [default: 512M, on a GPU what --gpu-memory-utilization leaves]"),
        click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True), show_default=True,
                     default=WORKER.gpu_memory_utilization, metavar="SHARE",
                     help="Of a GPU, for weights, steps and caches of all workers on it."),
        click.option("--max-num-seqs", type=positive, default=WORKER.max_num_seqs, show_default=True,
                     help="Requests in a step."),
        click.option("--max-num-batched-tokens", type=positive, default=WORKER.max_num_batched_tokens,
                     show_default=True, help="Tokens in a step."),
        click.option("--policy", default=[CLUSTER.policy], show_default=True, metavar="NAME[:KEY=VAL,…]",
                     multiple=True, callback=once, help="Scheduling policy: a name, or FILE.py:CLASS."),
        click.option("--link", type=click.Choice(LINKS), default=CLUSTER.link, show_default=True,
                     help="How KV moves."),
        click.option("--transfer-granularity", default=CLUSTER.transfer_granularity, show_default=True,
                     metavar="request|chunk|layers:N|auto",
                     help="What of a request's KV leaves at once: all, each chunk, or N layers as they are computed."),
        click.option("--kv-codec", type=click.Choice(CODECS), default=CLUSTER.kv_codec, show_default=True,
                     help="How KV looks on the wire: as it is, or a byte a value and a scale per token and head."),
        click.option("--kv-store", default=CLUSTER.kv_store, metavar="local:DRAM=2GiB,SSD=/path:20GiB",
                     help="Keep KV pages below the caches too, for all workers of this host, and with SSD beyond its "
                          "end; or mooncake:HOST:PORT."),
        click.option("--handoff", type=click.Choice(["direct", "store"]), default=CLUSTER.handoff, show_default=True,
                     help="Of a prefill to its decode worker: point to point, or through --kv-store."),
        click.option("--decode-after", type=positive, default=CLUSTER.decode_after, show_default=True, metavar="TOKENS",
                     help="After so many tokens a decode worker goes on: 1 is after the prompt."),
        click.option("--gpu-checksums", is_flag=True,
                     help="Check what crosses between GPUs, as is always done elsewhere."),
        click.option("--emulate-link", default=CLUSTER.emulate_link, show_default=True,
                     metavar="NAME | BANDWIDTH,LATENCY[,JITTER]",
                     help="Let KV arrive as if over another interconnect, which a worker's links share: "
                          f"{', '.join(PRESETS)}, or as in 25Gbps,20us."),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
        click.option("--predict-lengths", type=click.Choice(PREDICTORS), default="none", show_default=True,
                     help="What a policy sees of an output's length."),
        click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt in full."),
        click.option("--prefill", default="", metavar="KEY=VAL,…", help="Settings of the prefill workers alone."),
        click.option("--decode", default="", metavar="KEY=VAL,…",
                     help=f"Settings of the decode workers alone. Keys: {', '.join(WORKER.__struct_fields__)}."),
        click.option("--inject-delay", multiple=True, metavar="STAGE=MS",
                     help=f"Make a stage of each request slower: {', '.join(STAGES)}. Repeatable."),
        decisions_option,
        record_option,
    ],
    "Engine",
)
# fmt: on


def read_engine(
    model: str, flags: dict[str, Any], mode: str, one_worker: bool = False, run_directory: bool = False
) -> Engine:
    """Takes the engine's flags out of `flags`; what is left there is the command's own.

    `one_worker`: colocated mode starts a single worker where no number is given. `run_directory`: the command makes
    one, so that --record needs no DIR. Raises `ValueError`.
    """
    numbers = {key: flags.pop(key) for key in ("prefill_workers", "decode_workers")}
    if one_worker and mode == "colocated" and set(numbers.values()) == {None}:
        numbers = {"prefill_workers": 1, "decode_workers": 0}
    flags["kv_cache_memory"] = parse_size(flags["kv_cache_memory"]) if flags["kv_cache_memory"] else 0
    of_worker = {key: flags.pop(key) for key in WORKER.__struct_fields__ if key in flags}
    worker = check_worker(WorkerSettings(**of_worker))
    interconnect = parse_interconnect(flags["emulate_link"])
    if interconnect is not None:
        click.echo(announcement(flags["emulate_link"], interconnect), err=True)
    cluster = ClusterSettings(
        mode=mode,  # type: ignore[arg-type]
        prefill=parse_worker(flags.pop("prefill"), worker),
        decode=parse_worker(flags.pop("decode"), worker),
        **{key: flags.pop(key) for key in OF_CLUSTER},
        **{key: number for key, number in numbers.items() if number is not None},
    )
    parse_granularity(cluster.transfer_granularity, 1)
    check_moves(cluster, not flags["no_prefix_caching"])
    if cluster.kv_store:
        parse_store(cluster.kv_store)
    if mode == "disagg" and not (cluster.prefill_workers and cluster.decode_workers):
        raise ValueError("disagg mode needs at least one prefill worker and one decode worker")
    if not cluster.roles():
        raise ValueError("there must be at least one worker")
    settings = ModelSettings(
        model=model,
        max_model_len=flags.pop("max_model_len") or 0,
        block_size=flags.pop("block_size"),
        prefix_caching=not flags.pop("no_prefix_caching"),
    )
    delays = dict(_delay(text) for text in flags.pop("inject_delay"))
    record = flags.pop("record")
    if (in_run := str(record) == IN_RUN) and not run_directory:
        raise ValueError("--record needs DIR: this command has no run directory")
    run = RunSettings(
        seed=flags.pop("seed"),
        predictor=flags.pop("predict_lengths"),
        record_dir=IN_RUN if in_run else _made(record),
        decision_dir=_made(flags.pop("log_decisions")),
        delays=delays,
    )
    return Engine(settings, cluster, run)


def _delay(text: str) -> tuple[str, float]:
    stage, _, value = text.partition("=")
    stage = stage.replace("-", "_")
    try:
        seconds = float(value) / 1000
    except ValueError:
        seconds = -1.0
    if stage not in STAGES or not 0 <= seconds < 3600:
        raise ValueError(f"--inject-delay {text!r}: expected STAGE=MS with a stage of {', '.join(STAGES)}")
    return stage, seconds


def _made(directory: Path | None) -> str:
    if directory is None:
        return ""
    directory.mkdir(parents=True, exist_ok=True)
    return str(directory.resolve())


class FiniteRange(click.FloatRange):
    """A number to count or to wait with; click takes nan for one in any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


# ---------------------------------------------------------------- sampling


def sampling_options(temperature: float, max_tokens: int) -> Callable[[Command], Command]:
    """The fields of `SamplingParams` as flags, with a command's own defaults; ranges are checked in `read_sampling`."""
    return stack(
        [
            click.option("--max-tokens", type=int, default=max_tokens, show_default=True, help="Tokens of an answer."),
            click.option("--temperature", type=float, default=temperature, show_default=True, help="0 is greedy."),
            click.option("--top-k", type=int, default=0, show_default=True, help="0 is off."),
            click.option("--top-p", type=float, default=1.0, show_default=True),
            click.option("--min-p", type=float, default=0.0, show_default=True),
            click.option("--presence-penalty", type=float, default=0.0, show_default=True),
            click.option("--frequency-penalty", type=float, default=0.0, show_default=True),
            click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
            click.option("--min-tokens", type=int, default=0, show_default=True),
            click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable."),
            click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens."),
        ],
        "Sampling",
    )


def read_sampling(flags: dict[str, Any]) -> SamplingParams:
    """Takes the sampling flags out of `flags`; the struct's declared ranges are the check. Raises `ValueError`.

    `--seed` is the engine's, which gives each request a seed of its own.
    """
    given = {key: flags.pop(key) for key in SamplingParams.__struct_fields__ if key in flags and key != "seed"}
    try:
        return msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        field, reason = explained(error, SamplingParams)
        reason = reason.replace("`", "")
        raise ValueError(f"--{field.replace('_', '-')}: {reason[0].lower()}{reason[1:]}") from None

"""What `minidisagg bench` is asked to do: structs that the command line fills in and `compare.run` carries out."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from minidisagg.address import parse_server_url
from minidisagg.config import MODES, ClusterSettings, ModelSettings, RunSettings, parse_worker
from minidisagg.core.granularity import parse_granularity
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import TRIM
from minidisagg.transfer.kinds import KINDS

Dataset = Literal["random", "text", "sharegpt", "azure", "mooncake", "burstgpt"]
DATASETS: tuple[Dataset, ...] = ("random", "text", "sharegpt", "azure", "mooncake", "burstgpt")
TEXTS = ("text", "sharegpt")  # data sets whose prompts are texts
LINK_KEYS = ("link", "transfer_granularity")  # in which, beside its workers' settings, a baseline can differ
TRACES = ("sharegpt", "azure", "mooncake", "burstgpt")  # data sets that are a file


class Workload(Struct, frozen=True, kw_only=True):
    """What is sent. `trace_*` are for data sets that are a file: times divided by, lengths multiplied by.

    `num_prompts` 0: as many as the quick preset finds right for the rate. `fit`: where the machine is too slow for
    that preset, it shortens the random lengths.
    """

    dataset_name: Dataset = "random"
    dataset_path: str = ""
    num_prompts: int = 300
    input_len: int = 256
    output_len: int = 64
    range_ratio: float = 0.0
    fit: bool = False
    trace_speedup: float = 1.0
    trace_scale_len: float = 1.0


class Arrivals(Struct, frozen=True, kw_only=True):
    """When it is sent. With `max_concurrency` (one value, or several for a sweep) the loop is closed instead.

    `relative`: `request_rate` counts in capacities of one prefill worker, measured before the runs. A rate of 0 means
    the times in the trace.
    """

    request_rate: float = 0.5
    relative: bool = True
    burstiness: float = 1.0
    max_concurrency: tuple[int, ...] = ()
    num_warmups: int = 8


class Trials(Struct, frozen=True, kw_only=True):
    """How often, and what is looked for. `planted`: each step of side B is slowed down by this share of its time."""

    repeats: int = 3
    find_goodput: bool = False
    slo: SLO | None = None
    preset: str = ""
    planted: float = 0.0


class ReportSettings(Struct, frozen=True, kw_only=True):
    """Where the results go. A dry run only says what would be done; `json` puts result.json on stdout, not a table."""

    directory: str
    json: bool = False
    dry_run: bool = False


class ServerAddress(Struct, frozen=True, kw_only=True):
    """A server that runs already. `model` empty: it is asked; `tokenizer` empty: that of the model, if it is here."""

    base_url: str
    model: str = ""
    tokenizer: str = ""


class BenchOptions(Struct, frozen=True, kw_only=True):
    """A whole benchmark. `sides` are one cluster, or two: the baseline A, then B, of as many workers each.

    With `server` there are no sides, no cluster is started, and `model` is without meaning. `workers`, which the bench
    fills in, says how the sides came by theirs (`sides.Arrangement`).
    """

    model: ModelSettings
    sides: tuple[ClusterSettings, ...]
    server: ServerAddress | None = None
    run: RunSettings
    workload: Workload
    arrivals: Arrivals
    trials: Trials
    report: ReportSettings
    workers: str = ""


# What a preset sets where no flag does; the number of prompts follows from the rate (`runs.quick_prompts`).
PRESETS: dict[str, dict[str, int]] = {"quick": {"repeats": 3, "num_warmups": 2}}


def make_sides(mode: str, against: str, cluster: ClusterSettings, baseline: str = "") -> tuple[ClusterSettings, ...]:
    """The clusters of `--mode` and `--against MODE[:POLICY]`; `both` is disagg against colocated.

    `baseline`: KEY=VAL,… in which the baseline differs, of a worker's settings or `LINK_KEYS`. Raises ValueError.
    """
    if mode == "both":
        if against:
            raise ValueError(
                "--mode both is disagg against colocated already; with --against give the one mode to test"
            )
        mode, against = "disagg", "colocated"
    b = replace(cluster, mode=mode)
    if not against and baseline:
        raise ValueError("--baseline says what is different on side A: it needs --mode both or --against")
    if not against:
        return (b,)
    other, _, policy = against.partition(":")
    if other not in MODES:
        raise ValueError(f"--against {against}: expected MODE or MODE:POLICY with a mode of {', '.join(MODES)}")
    parts = [part.strip() for part in baseline.split(",")]
    pairs = [part.replace("-", "_", 1).partition("=") for part in parts]
    links = {key: value for key, _, value in pairs if key in LINK_KEYS}
    if "link" in links and links["link"] not in ("auto", *KINDS):
        raise ValueError(f"--baseline link={links['link']}: expected one of auto, {', '.join(KINDS)}")
    parse_granularity(links.get("transfer_granularity", "auto"), 1)
    rest = ",".join(part for part, (key, _, _) in zip(parts, pairs, strict=True) if key not in LINK_KEYS)
    a = replace(
        cluster,
        mode=other,
        policy=policy or cluster.policy,
        prefill=parse_worker(rest, cluster.prefill),
        decode=parse_worker(rest, cluster.decode),
        **links,
    )
    return a, b


def parse_share(text: str) -> float:
    """ "15%", "0.15" → 0.15. Raises ValueError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 10:
        raise ValueError(f"--plant-slowdown {text!r}: write a share of a step's time, as 15% or 0.15")
    return share


def check_measurable(prompts: int, warmups: int, at_once: bool) -> None:
    """Raises ValueError where warm-up and drain leave nothing of a run (see `stats.window_of`)."""
    cut = 0 if at_once else math.ceil(TRIM * prompts)
    if max(warmups, cut) >= prompts - cut:
        drain = f", and {cut} at the end left out" if cut else ""
        raise ValueError(f"--num-prompts {prompts} with --num-warmups {warmups}{drain}: nothing is left to measure")


def check_length(workload: Workload, limit: int) -> None:
    """Raises ValueError where a random request can be longer than `limit` tokens. Traces are clamped to it."""
    longest = sum(math.ceil(mean * (1 + workload.range_ratio)) for mean in (workload.input_len, workload.output_len))
    if workload.dataset_name == "random" and longest > limit:
        raise ValueError(
            f"--random-input-len {workload.input_len} and --random-output-len {workload.output_len} make requests of "
            f"up to {longest} tokens, more than the limit of {limit}"
        )


def parse_base_url(text: str) -> str:
    """What `parse_server_url` makes of --base-url. Raises ValueError."""
    try:
        return parse_server_url(text)
    except ValueError as error:
        raise ValueError(f"--base-url {text!r}: {error}") from None


def parse_rate(text: str) -> tuple[float, bool]:
    """`2.5` and `inf` are requests per second; `0.5x` is half of a prefill worker's capacity. (rate, relative)."""
    relative = text.endswith("x")
    try:
        rate = float(text.removesuffix("x"))
    except ValueError:
        rate = 0.0
    if not rate > 0.0 or (relative and rate == float("inf")):
        raise ValueError(
            f"request rate {text!r}: write requests per second, inf, or 0.5x of one prefill worker's capacity"
        )
    return rate, relative


def parse_concurrencies(text: str) -> tuple[int, ...]:
    """ "1,4,16" → (1, 4, 16). Raises `ValueError`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--max-concurrency {text!r}: expected a positive number, or several joined by commas")
    return tuple(map(int, parts))

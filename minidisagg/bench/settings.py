"""What `minidisagg bench` is asked to do: structs that the command line fills in and `compare.run` carries out."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from minidisagg.address import parse_server_url
from minidisagg.config import MODES, ClusterSettings, ModelSettings, RunSettings, check_moves, parse_worker
from minidisagg.core.granularity import parse_granularity
from minidisagg.measure.settings import ReportSettings, Trials
from minidisagg.sides import parse_compare
from minidisagg.transfer.kinds import KINDS
from minidisagg.workload.settings import Arrivals, Workload

LINK_KEYS = ("link", "transfer_granularity", "kv_codec")  # in which a baseline can differ, beside its workers'


class ServerAddress(Struct, frozen=True, kw_only=True):
    """A server that runs already. `model` empty: it is asked; `tokenizer` empty: that of the model, if it is here."""

    base_url: str
    model: str = ""
    tokenizer: str = ""


class BenchOptions(Struct, frozen=True, kw_only=True):
    """A whole benchmark. `sides`: the baseline A, then B, …, of as many workers each; or one alone.

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
    return check_moves(a, True), b


def compared_sides(text: str, cluster: ClusterSettings) -> tuple[ClusterSettings, ...]:
    """The clusters of `--compare`. Raises ValueError."""
    return tuple(replace(cluster, mode=mode or cluster.mode, policy=policy) for mode, policy in parse_compare(text))


def parse_share(text: str) -> float:
    """ "15%", "0.15" → 0.15. Raises ValueError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 10:
        raise ValueError(f"--plant-slowdown {text!r}: write a share of a step's time, as 15% or 0.15")
    return share


def parse_base_url(text: str) -> str:
    """What `parse_server_url` makes of --base-url. Raises ValueError."""
    try:
        return parse_server_url(text)
    except ValueError as error:
        raise ValueError(f"--base-url {text!r}: {error}") from None

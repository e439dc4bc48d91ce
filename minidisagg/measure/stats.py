"""From records to numbers: latencies, throughput, the result dictionary, and whether a run may be used at all.

Definitions (seconds inside, milliseconds in results):
- TTFT = first token - *scheduled* arrival: a client that sends late does not flatter the server. TTST = the same for
  the second token, which is where a KV transfer shows. E2EL = last token - scheduled arrival.
- TPOT = (last - first) / (n - 1) of a request. ITL = all gaps between tokens of all requests, pooled, without the
  handoff gaps, which are pooled apart. Max ITL = the largest gap of a request, of either kind: what its client felt.

Warm-up and drain: a run starts on an empty system and ends on an emptying one; neither is the load that was asked
for. With requests in order of schedule, the first max(num_warmups, 5 %) and the last 5 % are left out of latencies
and attainment. The cut goes by schedule, never by outcome, so both sides of a comparison keep the same requests.
Rates count what happened between the first kept arrival and the first one of the drain: tokens emitted, by whichever
request, requests finished, prompts begun. When all arrive at once there is no steady state: then only `num_warmups`
are dropped and the rates' window ends with the last token.

When a session's later turns come depends on what became of the earlier ones. They stand in the schedule where their
session begins: so it is whole sessions that are left out, and the order is the same for both sides. In the goodput of
the window is what was due in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import STAGES, TRIM, UNSENT, RequestRecord, RunRecord

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_SEND_LAG = 0.05  # p99 send lag, of the TTFT limit
MAX_SESSION = 0.25  # of the window
MAX_FRONTEND_SHARE = 0.20  # of one core
POLICY_FAILED = re.compile(r"(^|: )policy \w+")  # in the error of a request, by `core/checked.py`
LATENCIES = ("ttft", "ttst", "tpot", "itl", "handoff", "max_itl", "e2el")
RATES = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")
QUANTILES = (50, 90, 99)


class Window(Struct, frozen=True):
    """Which part of a run is measured: requests [first, last) by schedule, and seconds [start, end)."""

    first: int
    last: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Sample(Struct, frozen=True):
    """Values of one metric, and for each the position (by schedule) of the request that it belongs to.

    With `seconds` the metric is a rate, the sum of the values over that time, else it is the values' distribution.
    `half` is half a request in the metric's unit: added before a logarithm is taken of a share that can be 0.
    """

    values: Array
    owner: Ints
    seconds: float = 0.0
    half: float = 0.0


class Samples(Struct, frozen=True):
    """All of a run's metrics by name, before any statistic is taken."""

    window: Window
    # (index, arrival of its session's first turn after the run's first one, prompt, output) of every request
    schedule: list[tuple[int, float, int, int]]
    metrics: dict[str, Sample]


def beginning(run: RunRecord) -> Callable[[RequestRecord], float]:
    """When a request's session began; of a request without one, when it was due."""
    due = {r.index: r.scheduled for r in run.requests}
    return lambda r: due[r.index - r.turn] if r.turn else r.scheduled


def unsteady(run: RunRecord) -> str:
    """Where the window is too short for sessions to end as often as they begin, as they do in the load that was asked
    for, a line that says so."""
    begin, window = beginning(run), window_of(run)
    lasts = {r.index - r.turn: (r.token_times or [r.scheduled])[-1] - begin(r) for r in by_schedule(run) if r.turn}
    mean = sum(lasts.values()) / max(1, len(lasts))
    if run.max_concurrency or window.last == len(run.requests) or mean <= MAX_SESSION * window.seconds:
        return ""
    short = f"{run.label}: sessions last {mean:.1f} s, and {window.seconds:.1f} s are measured"
    return f"{short}: fewer end in it than begin, with more --num-prompts as many"


def by_schedule(run: RunRecord) -> list[RequestRecord]:
    """The run's requests in the order in which they, or their sessions, should have begun."""
    begin = beginning(run)
    return sorted(run.requests, key=lambda r: (begin(r), r.index))


def window_of(run: RunRecord, trim: float = TRIM) -> Window:
    """The measured window of a run (see the module's text). Raises ValueError where nothing is left to measure."""
    requests, begin = by_schedule(run), beginning(run)
    n = len(requests)
    if n <= run.num_warmups:
        warm = f"of which {run.num_warmups} are warm-up (--num-warmups)"
        raise ValueError(f"{run.label}: {n} requests, {warm}: nothing to measure")
    last_token = max(
        (r.token_times[-1] for r in requests if r.token_times), default=requests[-1].scheduled + run.wall_s
    )
    firsts = sum(not r.turn for r in requests)
    at_once = begin(requests[0]) == begin(requests[-1]) or firsts <= (run.max_concurrency or 0)
    cut = 0 if at_once else math.ceil(trim * n)
    first, last = max(run.num_warmups, cut), n - cut
    if first >= last:
        raise ValueError(
            f"{run.label}: {n} requests are too few to leave out {first} at the start and {cut} at the end"
        )
    end = begin(requests[last]) if last < n else last_token
    return Window(first, last, begin(requests[first]), end)


def samples_of(run: RunRecord, slo: SLO | None = None, trim: float = TRIM) -> Samples:
    """Every metric of a run. Latencies and attainment are of the kept requests, rates of the window."""
    window = window_of(run, trim)
    requests, begin = by_schedule(run), beginning(run)
    sessions = any(r.turn for r in requests)
    pools: dict[str, tuple[list[float], list[int]]] = {}

    def put(name: str, position: int, *values: float) -> None:
        pool = pools.setdefault(name, ([], []))
        pool[0].extend(values)
        pool[1].extend([position] * len(values))

    closed = window.end if window.last < len(requests) else math.inf  # without a drain the last token is inside
    for position, request in enumerate(requests):
        tokens = np.asarray(request.token_times)
        inside = int(((tokens >= window.start) & (tokens < closed)).sum())
        began = bool(len(tokens)) and window.start <= tokens[0] < closed
        done = request.ok and window.start <= tokens[-1] < closed
        put("request_throughput", position, float(done))
        put("output_throughput", position, float(inside))
        put("total_token_throughput", position, float(inside + (request.prompt_len if began else 0)))
        kept = window.first <= position < window.last
        if slo is not None and (window.start <= request.scheduled < closed if sessions else kept):
            put("request_goodput", position, float(slo.met_by(request)))
        if not kept:
            continue
        if slo is not None:
            put("attainment", position, float(slo.met_by(request)))
        if request.ok:
            for name, values in latencies_of(request, tokens).items():
                put(name, position, *values)
            if sessions:
                put(ttft_of_turn(request.turn), position, tokens[0] - request.scheduled)
    metrics = {}
    measured = window.last - window.first
    for name, (values, owner) in pools.items():
        seconds = window.seconds if name in RATES else 0.0
        half = {
            "attainment": 0.5 / measured,
            "request_goodput": 0.5 / window.seconds if window.seconds else 0.0,
        }
        metrics[name] = Sample(np.array(values), np.array(owner, dtype=np.int64), seconds, half.get(name, 0.0))
    origin = begin(requests[0])
    schedule = [(r.index, round(begin(r) - origin, 6), r.prompt_len, r.output_len) for r in requests]
    return Samples(window, schedule, metrics)


def ttft_of_turn(turn: int) -> str:
    """The metric's name; people count turns from 1."""
    return f"ttft_turn_{turn + 1}"


def latencies_of(request: RequestRecord, tokens: Array) -> dict[str, list[float]]:
    """Seconds, by metric, of a request that completed: of `itl` and `handoff` as many as it has such gaps, else one."""
    gaps = np.diff(tokens)
    is_handoff = np.zeros(len(gaps), dtype=bool)
    is_handoff[[i for i in request.handoffs if i < len(gaps)]] = True
    found: dict[str, list[float]] = {
        "ttft": [tokens[0] - request.scheduled],
        "e2el": [tokens[-1] - request.scheduled],
        **{f"stage_{stage}": [request.stages[stage]] for stage in STAGES if stage in request.stages},
    }
    if len(gaps):
        found["ttst"] = [tokens[1] - request.scheduled]
        found["tpot"] = [(tokens[-1] - tokens[0]) / len(gaps)]
        found["max_itl"] = [gaps.max()]
        found["itl"] = gaps[~is_handoff].tolist()
        found["handoff"] = gaps[is_handoff].tolist()
    return found


def value_of(sample: Sample | None, statistic: str = "mean") -> float:
    """`mean`, `std` or `p50` … of a distribution, or a rate per second (whatever `statistic`); nan if it is empty."""
    if sample is None or not len(sample.values):
        return math.nan
    if sample.seconds:
        return float(sample.values.sum() / sample.seconds)
    if statistic == "mean":
        return float(sample.values.mean())
    if statistic == "std":
        return float(sample.values.std())
    return float(np.percentile(sample.values, float(statistic.removeprefix("p"))))


def summarize(run: RunRecord, samples: Samples, slo: SLO | None = None) -> dict[str, object]:
    """The result dictionary of one run, under vLLM's keys where it has them; counts and totals are of the window.

    Latencies are in milliseconds. Where a metric has no values (no handoff in colocated mode) its keys are absent.
    """
    metrics, window = samples.metrics, samples.window
    output = float(metrics["output_throughput"].values.sum())
    result: dict[str, object] = {
        **{name: getattr(run, name) for name in ("label", "mode", "policy", "workload", "seed", "repetition")},
        **{name: getattr(run, name) for name in ("request_rate", "burstiness", "max_concurrency")},
        "model_id": run.model,
        "num_prompts": len(run.requests),
        "measured": window.last - window.first,
        "completed": int(metrics["request_throughput"].values.sum()),
        "failed": sum(not r.ok and not r.rejected for r in run.requests),
        "rejected": sum(r.rejected for r in run.requests),
        "duration": window.seconds,
        "wall": run.wall_s,
        "total_input_tokens": int(metrics["total_token_throughput"].values.sum() - output),
        "total_output_tokens": int(output),
        **{name: value_of(metrics[name]) for name in RATES if name in metrics},
    }
    if slo is not None:
        result |= {"slo": str(slo), "slo_attainment": value_of(metrics["attainment"])}
    for name, sample in metrics.items():
        if name in RATES or name == "attainment" or not len(sample.values):
            continue
        result |= {f"{kind}_{name}_ms": value_of(sample, kind) * 1000 for kind in ("mean", "std", "p50", "p90", "p99")}
        result[f"median_{name}_ms"] = result[f"p50_{name}_ms"]
    result |= {"p99_send_lag_ms": send_lag(run.requests) * 1000, "frontend_cpu_share": run.frontend_cpu_share}
    return result


def send_lag(requests: Iterable[RequestRecord], quantile: float = 99.0) -> float:
    """How late the client sent, in seconds: a percentile of sent - scheduled."""
    lags = [r.sent - r.scheduled for r in requests if r.finish_reason != UNSENT]
    return float(np.percentile(lags, quantile)) if lags else 0.0


def void_reasons(run: RunRecord, slo: SLO | None = None) -> list[str]:
    """Why the run must not be used, one line each; empty where it may be."""
    reasons = []
    lag_ms = send_lag(run.requests) * 1000
    if slo is not None and slo.ttft is not None and lag_ms > MAX_SEND_LAG * slo.ttft:
        share = lag_ms / slo.ttft
        told = f"p99 send lag {lag_ms:.1f} ms is {share:.0%} of the TTFT SLO (limit {MAX_SEND_LAG:.0%})"
        reasons.append(f"{told}: this machine is too busy, or too slow for this load")
    if run.frontend_cpu_share > MAX_FRONTEND_SHARE:
        reasons.append(f"the front end took {run.frontend_cpu_share:.0%} of a core (limit {MAX_FRONTEND_SHARE:.0%})")
    if broken := [r.error for r in run.requests if not r.rejected and POLICY_FAILED.search(r.error)]:
        what = f"{len(broken)} request{'s' * (len(broken) > 1)} failed"
        reasons.append(f"{what}, since {broken[0]}")  # who drops the late ones looks fast
    return reasons

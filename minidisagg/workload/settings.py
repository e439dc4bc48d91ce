"""What is sent and when, as a user says it: for `bench` and `simulate` alike."""

from __future__ import annotations

import math
from pathlib import Path

from msgspec import Struct

from minidisagg.workload.lengths import Encode, WorkItem, random_items, text_items
from minidisagg.workload.multiturn import MULTITURN, Multiturn, multiturn_items
from minidisagg.workload.synth import SYNTH, synth_items
from minidisagg.workload.traces import TraceReport, fitted, load_trace

TEXTS = ("text", "sharegpt")  # data sets whose prompts are texts
TRACES = ("sharegpt", "azure", "mooncake", "burstgpt")  # data sets that are a file
SYNTHETIC = "synth:"  # and a name of `SYNTH`
DATASETS = ("random", "text", MULTITURN, *TRACES, *(SYNTHETIC + name for name in SYNTH))


class Workload(Struct, frozen=True, kw_only=True):
    """What is sent. `trace_*` are for what is a trace, or imitates one: times divided by, lengths multiplied by.

    `num_prompts` 0: as many as the quick preset finds right for the rate. `fit`: where the machine is too slow for
    that preset, it shortens the random lengths.
    """

    dataset_name: str = "random"
    dataset_path: str = ""
    num_prompts: int = 300
    input_len: int = 256
    output_len: int = 64
    range_ratio: float = 0.0
    fit: bool = False
    trace_speedup: float = 1.0
    trace_scale_len: float = 1.0
    multiturn: Multiturn = Multiturn()

    @property
    def has_times(self) -> bool:
        """Its requests say when they come."""
        name = self.dataset_name.removeprefix(SYNTHETIC)
        return name != "sharegpt" and (name in TRACES or name in SYNTH)


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


def build_items(
    workload: Workload,
    count: int,
    seed: int = 0,
    encode: Encode | None = None,
    max_model_len: int | None = None,
    window: int = 0,
) -> tuple[list[WorkItem], TraceReport | None]:
    """The workload's requests, and what was left out of a trace; traces bring their own arrival times.

    `window`: of a trace file, whose requests do not depend on a seed: as `load_trace` says.
    """
    if workload.dataset_name == "random":
        return random_items(count, workload.input_len, workload.output_len, workload.range_ratio, seed), None
    if workload.dataset_name == "text":
        return text_items(count, workload.output_len, encode, seed, workload.dataset_path), None
    if workload.dataset_name == MULTITURN:
        return multiturn_items(count, workload.multiturn, seed), None
    changes = workload.trace_speedup, workload.trace_scale_len
    if workload.dataset_name.startswith(SYNTHETIC):
        items = synth_items(workload.dataset_name.removeprefix(SYNTHETIC), count, seed)
        items, clamped = fitted(items, *changes, max_model_len)
        return items, TraceReport(len(items), 0, clamped, items[-1].arrival_s if items else 0.0)
    return load_trace(
        workload.dataset_name,
        workload.dataset_path,
        count=count,
        window=window,
        speedup=workload.trace_speedup,
        scale_len=workload.trace_scale_len,
        max_model_len=max_model_len,
        encode=encode,
    )


def describe_workload(workload: Workload) -> str:
    """One line for a person."""
    if workload.dataset_name == "random":
        spread = f" ± {workload.range_ratio:.0%}" if workload.range_ratio else ""
        return f"random {workload.input_len} in, {workload.output_len} out{spread}"
    if workload.dataset_name == "text":
        return f"{Path(workload.dataset_path).name or 'English text'}, {workload.output_len} out"
    if workload.dataset_name == MULTITURN:
        like = workload.multiturn
        return (
            f"sessions of {like.turns} turns, {like.system_len} + {like.input_len} in, then {like.turn_len} more each, "
            f"{like.output_len} out ± {like.range_ratio:.0%}, think time {like.think_time:g} s"
        )
    if workload.dataset_name.startswith(SYNTHETIC):
        return f"like {workload.dataset_name.removeprefix(SYNTHETIC)}"
    return f"{workload.dataset_name} trace {Path(workload.dataset_path).name}"


def check_length(workload: Workload, limit: int) -> None:
    """Raises ValueError where a random request, or a session, can be longer than `limit` tokens. Traces are clamped."""
    longest = sum(math.ceil(mean * (1 + workload.range_ratio)) for mean in (workload.input_len, workload.output_len))
    if workload.dataset_name == "random" and longest > limit:
        raise ValueError(
            f"--random-input-len {workload.input_len} and --random-output-len {workload.output_len} make requests of "
            f"up to {longest} tokens, more than the limit of {limit}"
        )
    if workload.dataset_name == MULTITURN and workload.multiturn.longest > limit:
        raise ValueError(
            f"sessions can grow to {workload.multiturn.longest} tokens, more than the limit of {limit}: fewer "
            "--multiturn-turns, or shorter ones"
        )


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

"""SLOs, attainment, and the search for goodput: the highest rate at which enough requests meet their SLOs.

Goodput at 90 % attainment is DistServe's measure (Zhong et al., OSDI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Iterable
from itertools import pairwise
from typing import Any

from msgspec import Struct

from minidisagg.measure.records import RequestRecord


class SLO(Struct, frozen=True):
    """Limits in milliseconds, those that are set; a request meets the SLO if it meets all of them."""

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None  # on the 99th percentile of the request's gaps, handoff included: its client sees it
    e2el: float | None = None

    def __str__(self) -> str:
        limits = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return " ".join(f"{name}:{limit:g}" for name, limit in limits if limit is not None)

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the request completed within all limits. A failed or rejected one never did."""
        if not record.ok:
            return False
        first, last, n = record.token_times[0], record.token_times[-1], len(record.token_times)
        gaps = [0.0]
        if self.itl is not None and n > 1:
            gaps = sorted(b - a for a, b in pairwise(record.token_times))
        seen = {
            "ttft": first - record.scheduled,
            "tpot": (last - first) / (n - 1) if n > 1 else 0.0,
            "itl": gaps[math.ceil(0.99 * len(gaps)) - 1],
            "e2el": last - record.scheduled,
        }
        limits = {name: getattr(self, name) for name in seen}
        return all(seen[name] * 1000 <= limit for name, limit in limits.items() if limit is not None)


def parse_slo(pairs: Iterable[str]) -> SLO:
    """`["ttft:200", "tpot:50"]`, milliseconds, as for vLLM's `--goodput`. Raises ValueError."""
    limits: dict[str, float] = {}
    for pair in (part for text in pairs for part in text.split()):
        name, _, value = pair.partition(":")
        name = {"e2e": "e2el"}.get(name, name)
        if name not in SLO.__struct_fields__:
            raise ValueError(f"unknown SLO {pair!r}: write ttft, tpot, itl or e2el, a colon and milliseconds")
        if name in limits:
            raise ValueError(f"SLO {name} is given twice")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"SLO {pair!r}: {value!r} is not a number of milliseconds") from None
        if not 0 < limits[name] < math.inf:
            raise ValueError(f"SLO {pair!r} must be positive and finite")
    if not limits:
        raise ValueError("no SLO given: write for example ttft:200 tpot:50")
    return SLO(**limits)


def attainment(records: Iterable[RequestRecord], slo: SLO) -> float:
    """The share of all requests, failed and rejected ones included, that meet the SLO; nan where there are none."""
    met = [slo.met_by(record) for record in records]
    return sum(met) / len(met) if met else math.nan


# ---------------------------------------------------------------- search

LASTING = 10.0  # times the limit on a whole prompt's time that a run lasts: at less, a queue that grows ends in time


def least_requests(slo: SLO, rate: float) -> int:
    """How many requests a run of the search needs at least, so that a rate which cannot be sustained shows as such.

    At a rate (1 + x) times what is served, the last request of a run of T seconds waits for about x T seconds. Without
    a limit on TTFT or E2E no queue is too long, and any number will do.
    """
    limits = [limit for limit in (slo.ttft, slo.e2el) if limit is not None]
    return math.ceil(rate * LASTING * min(limits) / 1000) if limits and math.isfinite(rate) else 0


HOPELESS = 100.0  # times less than the search began with: who fails there, refuses all or cannot be so fast at any rate
DOUBT = 1.4  # standard errors: a ratio's two sides are both so far off, in opposite directions, in 5 % of cases


class Trial(Struct, frozen=True):
    """One run of the search: requests per second, and the attainment seen, with its standard error where known."""

    rate: float
    attainment: float
    error: float = 0.0


class GoodputResult(Struct, frozen=True):
    """`rate` is the highest tried rate that holds the target, 0 if none did, with its (smoothed) attainment.

    `upper` is the lowest rate above it that does not hold it, `inf` if every rate held. `converged` is False if the
    number of runs ran out before `upper` came within the tolerance of `rate`.
    """

    rate: float
    upper: float
    attainment: float
    target: float
    converged: bool
    trials: list[Trial]

    @property
    def sure(self) -> tuple[float, float]:
        """The tried rates between which the truth lies: the highest that surely holds, the lowest that surely fails.

        Never closer than `rate` and `upper`; where noise has a rate hold above one that fails, both are inside.
        """
        holds = [t.rate for t in self.trials if t.attainment - DOUBT * t.error >= self.target]
        fails = [t.rate for t in self.trials if t.attainment + DOUBT * t.error < self.target]
        low = max((rate for rate in holds if rate < min(fails, default=math.inf)), default=0.0)
        high = min((rate for rate in fails if rate > max(holds, default=0.0)), default=math.inf)
        return min(low, self.rate), max(high, self.upper)


def monotone_fit(trials: Iterable[Trial]) -> list[Trial]:
    """The non-increasing curve nearest to the trials (pool adjacent violators), at each tried rate, ascending.

    Attainment falls with the rate; where runs say otherwise, that is noise, and pooling averages it away.
    """
    by_rate: dict[float, list[float]] = {}
    for trial in sorted(trials, key=lambda t: t.rate):
        by_rate.setdefault(trial.rate, []).append(trial.attainment)
    pools: list[tuple[list[float], float, int]] = []  # rates, sum of attainments, number of runs
    for rate, seen in by_rate.items():
        rates, total, runs = [rate], sum(seen), len(seen)
        while pools and total / runs > pools[-1][1] / pools[-1][2]:
            before = pools.pop()
            rates, total, runs = before[0] + rates, before[1] + total, before[2] + runs
        pools.append((rates, total, runs))
    return [Trial(rate, total / runs) for rates, total, runs in pools for rate in rates]


def search_goodput(
    start_rate: float,
    target: float = 0.9,
    tolerance: float = 0.05,
    max_runs: int = 16,
    noise: float = 0.03,
    growth: float = 2.0,
    step: float = 1.25,
) -> Generator[float, tuple[float, float], GoodputResult]:
    """Yields the rate to try next, is sent its attainment and that one's error, returns the result. No clock, no I/O.

    Rates grow (or shrink) geometrically from `start_rate` until the target is bracketed, then the bracket is halved,
    on a log scale, until its ends are within `tolerance`. Ends are read from `monotone_fit`, and an end seen once and
    within `noise` of the target is run again before it is trusted, so one lucky run does not set the result. At last
    the search steps outwards, by `step`, until a rate surely holds and one surely fails.
    """
    if not (start_rate > 0 and 0 < target <= 1 and tolerance > 0 and max_runs >= 1 and growth > 1):
        raise ValueError("goodput search needs a positive start rate, tolerance and run count, and a target in (0, 1]")
    trials: list[Trial] = []
    rate = start_rate
    while True:
        trials.append(Trial(rate, *(yield rate)))
        fit = monotone_fit(trials)
        low = max((t.rate for t in fit if t.attainment >= target), default=0.0)
        high = min((t.rate for t in fit if t.attainment < target), default=math.inf)
        narrow = high <= low * (1 + tolerance)
        doubtful = [
            end
            for end in (low, high)
            if [abs(t.attainment - target) < noise for t in trials if t.rate == end] == [True]
        ]
        reached = next((t.attainment for t in fit if t.rate == low), 0.0)
        result = GoodputResult(low, high, reached, target, narrow, trials)
        least, most = result.sure
        hopeless = low == 0.0 and high * HOPELESS <= start_rate
        if hopeless or len(trials) >= max_runs or (narrow and not doubtful and 0.0 < least <= most < math.inf):
            return result
        if narrow and doubtful:
            rate = doubtful[0]
        elif narrow:
            rate = max(t.rate for t in trials) * step if math.isinf(most) else min(t.rate for t in trials) / step
        elif low == 0.0:
            rate = high / growth
        elif math.isinf(high):
            rate = low * growth
        else:
            rate = math.sqrt(low * high)


async def find_goodput(
    run_at_rate: Callable[[float], Awaitable[tuple[float, float]]], start_rate: float, **options: Any
) -> GoodputResult:
    """`search_goodput` over an async function from rate to attainment and its standard error."""
    search = search_goodput(start_rate, **options)
    rate = next(search)
    while True:
        seen = await run_at_rate(rate)
        try:
            rate = search.send(seen)
        except StopIteration as stop:
            result: GoodputResult = stop.value
            return result

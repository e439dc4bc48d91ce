"""Ratios of two sides with honest 95 % intervals.

Two kinds of noise: requests of one run differ (and those close in time share a queue, so they are not independent),
and runs differ as wholes (a slow minute of the machine). Repetitions are few, three as a rule.

Per repetition r: L_r = log(B_r / A_r) of the statistic, with both sides offered the same arrivals. The estimate is the
mean of the L_r. Its variance is V / R with V the larger of
- the variance between the L_r, which contains all noise but is itself known badly from three values, and
- the noise within a run, by a circular block bootstrap over requests in order of schedule (blocks of √n; the same
  blocks for A and B where the arrivals are the same: what one unlucky burst does to both sides cancels), plus the
  run-to-run noise that every machine has (`RUN_NOISE`, as a relative standard deviation of one run).
and the interval uses Student's t with R - 1 degrees of freedom. This is the Knapp-Hartung interval for few studies, in
the variant that is never narrower than its within-study noise allows (Röver, Knapp & Friede 2015): three runs that
agree by chance do not make a result. With fewer than three repetitions the noise between runs cannot be measured; a
larger value is assumed, and t has two degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from minidisagg.measure.stats import QUANTILES, Array, Sample, Samples, value_of

RUN_NOISE = 0.02  # least relative noise of one run as a whole
UNMEASURED_RUN_NOISE = 0.15  # assumed where fewer than three repetitions were made
LEAST_REQUESTS = 8  # measured ones of a run: what fewer of them scatter by says nothing
LEAST_DIFFERENCE = 0.01  # a smaller difference is no difference, however certain
STATISTICS = ("mean", *(f"p{q}" for q in QUANTILES))
_ELEMENTS = 1 << 21  # of one chunk of resamples: stays in cache
_WORK = 40_000_000  # resamples times values; a variance needs no more than some hundred resamples

Weights = NDArray[np.float32]


class Ratio(Struct, frozen=True):
    """`a`, `b`: geometric means over the repetitions; `ratio` = b / a with its 95 % interval. nan: not known.

    `clear`: the 98 % interval leaves 1 out too, and the difference is worth a word. A verdict weighs several metrics,
    and the more one looks at the more often chance alone passes 95 %: a winner needs `clear`.
    """

    a: float
    b: float
    ratio: float
    low: float
    high: float
    clear: bool = False

    @property
    def differs(self) -> bool:
        """Whether the 95 % interval leaves 1 out."""
        return self.low > 1.0 or self.high < 1.0


class _Row(Struct, frozen=True):
    """One repetition of one statistic: both values, log(b / a), and that one's variance within the run."""

    a: float
    b: float
    difference: float
    within: float


def compare(
    a: Sequence[Samples], b: Sequence[Samples], seed: int = 0, resamples: int = 1000, run_noise: float = RUN_NOISE
) -> dict[str, Ratio]:
    """Ratios B / A of all metrics, under `metric` for rates and attainment, else `p99_metric` and so on.

    One entry of `a` and `b` per repetition, in the same order. `run_noise` is 0 for a simulator. Raises ValueError.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"need the same number of repetitions of both sides, not {len(a)} and {len(b)}")
    found: dict[str, list[_Row]] = {}
    for repetition, (one, other) in enumerate(zip(a, b, strict=True)):
        rng = np.random.default_rng([seed, repetition])
        weights_a = block_weights(len(one.schedule), resamples, rng)
        paired = one.schedule == other.schedule
        weights_b = weights_a if paired else block_weights(len(other.schedule), resamples, rng)
        few = min(window.last - window.first for window in (one.window, other.window)) < LEAST_REQUESTS
        for metric in one.metrics.keys() & other.metrics.keys():
            for name, row in _log_statistics(metric, one.metrics[metric], other.metrics[metric], weights_a, weights_b):
                found.setdefault(name, []).append(replace(row, within=math.nan) if few else row)
    return {name: _ratio(rows, run_noise) for name, rows in sorted(found.items()) if len(rows) == len(a)}


def block_weights(n: int, resamples: int, rng: np.random.Generator) -> Weights:
    """[resamples, n]: how often each request, in order of schedule, is in each resample of whole blocks."""
    size = max(1, round(math.sqrt(n)))
    count = -(-n // size)
    starts = rng.integers(0, n, size=(resamples, count))
    picks = (starts[:, :, None] + np.arange(size)).reshape(resamples, -1)[:, :n] % n
    flat = (picks + np.arange(resamples)[:, None] * n).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float32)


def share_error(met: Array) -> float:
    """The standard error of the share of ones in `met`, which is in order of schedule: neighbours share a queue.

    Not less than independent requests have, of which two more met and two did not (Agresti & Coull 1998): that all of
    a few did proves little.
    """
    n = len(met)
    share = (met.sum() + 2) / (n + 4)
    blocks = block_weights(n, 200, np.random.default_rng(0)) @ met / n
    return float(max(blocks.std(), math.sqrt(share * (1 - share) / n)))


class Drawn(Struct, frozen=True):
    """A share of requests (of 1) of each repetition, [repetitions], and of its resamples, [repetitions, resamples].

    `half`: half a request, as a share.
    """

    values: Array
    draws: Array
    half: float

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean and 95 % interval, which ends at 0 and 1."""
        count, middle = len(self.values), float(self.values.mean())
        between = float(self.values.var(ddof=1)) if count > 1 else 0.0
        error = math.sqrt(max(between, float(self.draws.var(axis=1).mean())) / count)
        width = student_t(max(count - 1, 2)) * error
        return middle, max(0.0, middle - width), min(1.0, middle + width)


def ratio_of_shares(a: Drawn, b: Drawn) -> Ratio:
    """B / A, both of the same requests and the same resamples, on a simulator, which has no noise of its own."""
    rows = []
    for one, other, drawn, other_drawn in zip(a.values, b.values, a.draws, b.draws, strict=True):
        spread = np.log((other_drawn + b.half) / (drawn + a.half))
        difference = math.log((other + b.half) / (one + a.half))
        rows.append(_Row(float(one), float(other), difference, float(spread.var())))
    return _ratio(rows, 0.0)


def resampled(sample: Sample, weights: Weights) -> Array:
    """[resamples, statistics]: the rate, or mean and quantiles, of every resample; nan where one has no value."""
    if sample.seconds:
        return np.asarray(weights[:, sample.owner] @ sample.values / sample.seconds, dtype=np.float64)[:, None]
    order = np.argsort(sample.values)
    values, owner = sample.values[order], sample.owner[order]
    limit = max(100, _WORK // len(values))
    weights = weights[:limit]
    rows = max(1, _ELEMENTS // len(values))
    out = np.empty((len(weights), len(STATISTICS)))
    for start in range(0, len(weights), rows):
        share = weights[start : start + rows][:, owner]
        below = np.cumsum(share, axis=1)  # whole numbers under 2^24: exact in float32
        total = below[:, -1]
        with np.errstate(invalid="ignore"):
            out[start : start + rows, 0] = share @ values.astype(np.float32) / total
        targets = total[:, None] * (np.array(QUANTILES, dtype=np.float32) / 100)
        place = np.array([np.searchsorted(row, target) for row, target in zip(below, targets, strict=True)])
        out[start : start + rows, 1:] = np.where(total[:, None] > 0, values[place.clip(max=len(values) - 1)], np.nan)
    return out


def _log_statistics(
    metric: str, a: Sample, b: Sample, weights_a: Weights, weights_b: Weights
) -> list[tuple[str, _Row]]:
    if not len(a.values) or not len(b.values):
        return []
    names = ["mean"] if a.seconds or metric == "attainment" else list(STATISTICS)
    # Half a request a second is a lot of a short run: a closed loop of which all are refused takes no time at all.
    half = min(a.half, b.half)
    drawn_a, drawn_b = resampled(a, weights_a) + half, resampled(b, weights_b) + half
    count = min(len(drawn_a), len(drawn_b))  # both sides keep their first resamples, so pairs stay pairs
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.log(drawn_b[:count] / drawn_a[:count])
    rows = []
    for column, name in enumerate(names):
        known = spread[:, column][np.isfinite(spread[:, column])]
        variance = float(known.var()) if len(known) else math.nan
        one, other = value_of(a, name), value_of(b, name)
        usable = one + half > 0 and other + half > 0
        difference = math.log((other + half) / (one + half)) if usable else math.nan
        rows.append((metric if len(names) == 1 else f"{name}_{metric}", _Row(one, other, difference, variance)))
    return rows


def _ratio(rows: list[_Row], run_noise: float) -> Ratio:
    a, b = center([row.a for row in rows]), center([row.b for row in rows])
    differences = np.array([row.difference for row in rows])
    within = float(np.mean([row.within for row in rows]))
    count = len(rows)
    if not (np.isfinite(differences).all() and math.isfinite(within)):
        return Ratio(a, b, math.nan, math.nan, math.nan)
    if count < 3 and run_noise:
        run_noise = max(run_noise, UNMEASURED_RUN_NOISE)
    between = float(differences.var(ddof=1)) if count > 1 else 0.0
    variance = max(between, within + 2 * run_noise**2)
    error, degrees = math.sqrt(variance / count), max(count - 1, 2)
    middle, half_width = float(differences.mean()), student_t(degrees) * error
    low, high = (math.exp(min(middle + side, 700.0)) for side in (-half_width, half_width))
    clear = abs(middle) > max(student_t(degrees, clear=True) * error, math.log1p(LEAST_DIFFERENCE))
    return Ratio(a, b, math.exp(middle), low, high, clear)


def center(values: Sequence[float]) -> float:
    """The geometric mean over repetitions, so that two centers have the ratio of the table; plain if one is 0."""
    if not values:
        return math.nan
    array = np.asarray(values)
    return float(np.exp(np.log(array).mean()) if (array > 0).all() else array.mean())


def student_t(degrees: int, clear: bool = False) -> float:
    """The two-sided 95 % (`clear`: 98 %) point of Student's t, for 2 or more degrees of freedom, to 1 %."""
    if clear:
        z, table = 2.326, (6.965, 4.541, 3.747, 3.365, 3.143, 2.998, 2.896, 2.821)
    else:
        z, table = 1.960, (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    if degrees - 2 < len(table):
        return table[degrees - 2]
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)  # Cornish-Fisher

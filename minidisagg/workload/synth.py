"""Workloads with the statistics of known traces, for those who have not the files: `--dataset-name synth:NAME`.

A workload is made of kinds of requests. A kind has quantiles of its prompt and output lengths, between which the
logarithm is linear, their rank correlation (a Gaussian copula), the system prompt that all its requests begin with, and
the share of requests that take an earlier one's prompt further, as the next turn of a chat does. `SYNTH` says what is
known of each workload, from where, and what is an estimate; `statistics` measures these items and a trace's alike.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from random import Random
from statistics import NormalDist, fmean, pstdev, quantiles

from msgspec import Struct
from msgspec.structs import replace

from minidisagg.workload.arrivals import arrival_times, keyed_random
from minidisagg.workload.lengths import WorkItem
from minidisagg.workload.traces import MOONCAKE_BLOCK

GRID = (0.0, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)  # where a kind's tables have values
NORMAL = NormalDist()

# How many requests of its kind lie between a turn and the one before: log-normal, by the quantiles of the Mooncake
# conversation trace (25, 50, 75 %: 229, 422, 901). Of so many neighbours there it is the longest that is shorter than
# its turn, by which the shared part of a turn's prompt (median) is as in that trace: 80 %.
TURN_LAG, TURN_LAG_SIGMA, TURN_CANDIDATES = 422.0, 0.95, 20


class Lengths(Struct, frozen=True):
    """Of a prompt or an output, in tokens. NaN: not known."""

    mean: float
    p50: float
    p90: float = math.nan
    p99: float = math.nan


class Statistics(Struct, frozen=True):
    """What a workload looks like to a serving system. NaN: not known, or not defined."""

    prompt: Lengths
    output: Lengths
    gap_cv: float = math.nan  # standard deviation of the gaps between arrivals over their mean; 1 for Poisson
    hit_rate: float = 0.0  # share of all prompts' blocks that an unbounded prefix cache would have had


class Kind(Struct, frozen=True):
    """Requests of one kind: their lengths in tokens at `GRID`, and what their prompts share with earlier ones."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    correlation: float = 0.0  # of the ranks of prompt and output length
    share: float = 1.0  # of the workload's requests
    system_blocks: int = 0  # of `MOONCAKE_BLOCK` tokens, with which all its prompts begin; 0: nothing is shared
    turns: float = 0.0  # share of requests that are a next turn, if they find the one before


class Arrivals(Struct, frozen=True):
    """When requests come: gaps are gamma distributed, and some are pauses (exponential, on top)."""

    request_rate: float  # per second, mean; infinite: the data set has no times
    burstiness: float = 1.0  # the gamma's shape
    pauses: tuple[float, float] = (0.0, 0.0)  # share of the gaps that have one, share of the time that these take
    per_tick: float = 0.0  # requests, mean, per tick of the clock that wrote the times down; 0: it has a fine one


class Synth(Struct, frozen=True, kw_only=True):
    """A workload: what it imitates, where the figures are from, where the real file is to be had."""

    about: str
    file: str
    arrivals: Arrivals
    real: Statistics  # measured or published
    kinds: tuple[Kind, ...]


_AZURE = "https://github.com/Azure/AzurePublicDataset: "
_MOONCAKE = "https://github.com/kvcache-ai/Mooncake: FAST25-release/traces/"
_REST = "All other quantiles are estimates, such that what is published comes out. "
# fmt: off
SYNTH: dict[str, Synth] = {
    "azure-code-2023": Synth(
        about="Azure LLM inference 2023, code completion, one hour (Splitwise, ISCA'24). Published, by recomputations "
        "of the file: means, p50, p90, p95, p99, maxima, rate, CV of gaps. " + _REST + "Pauses are estimated from that "
        "CV and from the 73 % of all seconds that have no request.",
        file=_AZURE + "data/AzureLLMInferenceTrace_code.csv", arrivals=Arrivals(2.57, pauses=(0.0063, 0.74)),
        real=Statistics(Lengths(2048, 1469, 5194, 7436), Lengths(27.9, 13, 55, 252), gap_cv=13.15),
        kinds=(Kind((3, 114, 233, 641, 1127, 1469, 1797, 2545, 5194, 7303, 7436, 7437, 7437),
                    (6, 6, 7, 9, 11, 13, 14, 19, 55, 90, 252, 600, 1899)),)),
    "azure-conv-2023": Synth(
        about="Azure LLM inference 2023, conversation, one hour (Splitwise, ISCA'24). Measured on the file.",
        file=_AZURE + "data/AzureLLMInferenceTrace_conv.csv", arrivals=Arrivals(5.53, 0.84),
        real=Statistics(Lengths(1155, 1020, 2734, 4142), Lengths(211, 129, 424, 601), gap_cv=1.09),
        kinds=(Kind((2, 181, 207, 396, 703, 1020, 1071, 1189, 2734, 4083, 4142, 6179, 14050),
                    (7, 41, 54, 85, 103, 129, 177, 395, 424, 451, 601, 954, 1000), 0.07),)),
    "azure-code-2024": Synth(
        about="Azure LLM inference 2024, code completion, one week (DynamoLLM, HPCA'25). Published, by recomputations "
        "of the file: means, p50, p90, p99, maxima, output p95, rate, median CV of gaps within five minutes. " + _REST,
        file=_AZURE + "AzureLLMInferenceTrace_code_1week.csv", arrivals=Arrivals(27.78, 0.76),
        real=Statistics(Lengths(2511, 1930, 6251, 7685), Lengths(22.7, 8, 43, 271), gap_cv=1.15),
        kinds=(Kind((5, 144, 284, 781, 1424, 1930, 2488, 3651, 6251, 6940, 7685, 7743, 7743),
                    (1, 1, 2, 4, 6, 8, 11, 15, 43, 79, 271, 500, 5000)),)),
    "azure-conv-2024": Synth(
        about="Azure LLM inference 2024, conversation, one week (DynamoLLM, HPCA'25). Published, by recomputations of "
        "the file: as for azure-code-2024, and Pearson's correlation, taken for that of the ranks. " + _REST,
        file=_AZURE + "AzureLLMInferenceTrace_conv_1week.csv", arrivals=Arrivals(45.15, 0.37),
        real=Statistics(Lengths(1632, 928, 3830, 6683), Lengths(105.5, 41, 342, 694), gap_cv=1.64),
        kinds=(Kind((10, 203, 339, 595, 766, 928, 1338, 2406, 3830, 4826, 6683, 7730, 7999),
                    (1, 3, 5, 17, 30, 41, 55, 101, 342, 455, 694, 1038, 1500), 0.39),)),
    "mooncake-conversation": Synth(
        about="Mooncake conversation, one hour of Kimi (Qin et al., FAST'25). Measured on the file; its times are "
        "written in steps of 3 s, which alone makes the CV. The share of turns is fitted to the hit rate.",
        file=_MOONCAKE + "conversation_trace.jsonl", arrivals=Arrivals(3.40, per_tick=10.2),
        real=Statistics(Lengths(12035, 6909, 27367, 85400), Lengths(343, 350, 597, 1119), 3.03, 0.366),
        kinds=(Kind((891, 901, 964, 2306, 4993, 6909, 9570, 15367, 27367, 39550, 85400, 121301, 126195),
                    (1, 10, 24, 156, 291, 350, 399, 472, 597, 698, 1119, 2000, 2000), 0.07, 1.0, 1, turns=0.49),)),
    "mooncake-toolagent": Synth(
        about="Mooncake tool and agent, one hour of Kimi (Qin et al., FAST'25). Means by its README; p50, p90, p99, "
        "rate, hit rate, CV and the shares of the three system prompts by recomputations of the file. Estimates: the "
        "first kind is the conversation trace's, moved a little so that all of these come out; those of the tools are "
        "read off fifty requests of the technical report's trace, which is of the same load.",
        file=_MOONCAKE + "toolagent_trace.jsonl", arrivals=Arrivals(6.67, per_tick=20.0),
        real=Statistics(Lengths(8596, 6346, 16810, 61671), Lengths(182, 30, 507, 898), 4.36, 0.553),
        kinds=(Kind((891, 901, 964, 2306, 4993, 6909, 9570, 15000, 26000, 37500, 76000, 121301, 126195),
                    (1, 10, 40, 230, 330, 375, 415, 480, 590, 680, 1000, 1800, 2000), 0.07, 0.464, 1, turns=0.49),
               Kind((6150, 6166, 6170, 6180, 6440, 6560, 6680, 6820, 7250, 7720, 8300, 9000, 12000),
                    (1, 3, 3, 3, 3, 3, 3, 27, 33, 38, 80, 200, 500), share=0.39, system_blocks=12),
               Kind((2900, 2930, 2960, 3020, 3130, 3175, 3185, 3210, 3900, 4200, 5000, 6000, 8000),
                    (5, 14, 16, 18, 20, 21, 22, 23, 25, 30, 50, 100, 200), share=0.146, system_blocks=5))),
    "burstgpt": Synth(
        about="BurstGPT, API log of the third file, 96 % of it, failures included (Wang et al., KDD'25). Published, by "
        "recomputations of the file: means, p50, p90, p99, longest prompt, rate, Pearson's correlation (taken for that "
        "of the ranks), mean CV of gaps within five minutes (median 1.5; of a file with its nights, 13). " + _REST,
        file="https://github.com/HPMLL/BurstGPT, release v2.0: BurstGPT_3.csv", arrivals=Arrivals(0.54, 0.155),
        real=Statistics(Lengths(457, 326, 794, 3141), Lengths(68.9, 14, 111, 804), gap_cv=2.54),
        kinds=(Kind((5, 32, 52, 126, 240, 326, 359, 423, 794, 1150, 3141, 6000, 125591),
                    (1, 4, 7, 10, 12, 14, 20, 48, 111, 285, 804, 1700, 8000), 0.18),)),
    "sharegpt": Synth(
        about="ShareGPT V3, first turn and answer, as `vllm bench serve` takes them: at most 1,024 tokens in, 2,048 in "
        "all. Published, by a recomputation with OPT's tokenizer: means, median and longest prompt. " + _REST,
        file="https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered: "
        "ShareGPT_V3_unfiltered_cleaned_split.json", arrivals=Arrivals(math.inf),
        real=Statistics(Lengths(228, 97), Lengths(226, math.nan)),
        kinds=(Kind((4, 8, 12, 29, 60, 97, 158, 331, 713, 901, 985, 1020, 1024),
                    (4, 10, 16, 45, 98, 150, 213, 337, 543, 675, 950, 1500, 2040)),)),
}
# fmt: on


def synth_items(name: str, count: int, seed: int = 0, request_rate: float | None = None) -> list[WorkItem]:
    """`count` requests like those of the trace that `SYNTH` has under `name`, at its own mean rate or at this one.

    An item's lengths and blocks depend on (name, seed, index) and earlier items only: a longer workload begins with
    the shorter one's, at times that are scaled (see `arrival_times`). Raises ValueError.
    """
    if name not in SYNTH:
        raise ValueError(f"unknown synthetic workload {name!r}, choose from {', '.join(SYNTH)}")
    kinds = SYNTH[name].kinds
    bounds = list(accumulate(kind.share for kind in kinds))
    fresh = itertools.count()
    systems = [tuple(islice(fresh, kind.system_blocks)) for kind in kinds]
    earlier: list[list[WorkItem]] = [[] for _ in kinds]
    items = []
    for index, arrival_s in enumerate(_times(SYNTH[name].arrivals, count, seed, request_rate)):
        rng = keyed_random("synth", name, seed, index)
        number = bisect_right(bounds, rng.random() * bounds[-1], hi=len(kinds) - 1)
        kind = kinds[number]
        prompt_len, output_len = _lengths(kind, rng)
        item = WorkItem(index=index, prompt_len=prompt_len, output_len=output_len, arrival_s=arrival_s)
        if kind.system_blocks:
            shared = _turn_before(kind, earlier[number], prompt_len, rng) or systems[number]
            new = islice(fresh, -(-prompt_len // MOONCAKE_BLOCK) - len(shared))
            item = replace(item, blocks=(*shared, *new), block_size=MOONCAKE_BLOCK)
            earlier[number].append(item)
        items.append(item)
    return items


def statistics(items: Sequence[WorkItem]) -> Statistics:
    """Of two items or more; percentiles interpolate linearly. Raises ValueError."""
    if len(items) < 2:
        raise ValueError("statistics need at least two requests")
    items = sorted(items, key=lambda item: item.arrival_s)
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(items)]
    hits, seen = 0, set[int]()
    for item in items:
        hits += next((place for place, block in enumerate(item.blocks) if block not in seen), len(item.blocks))
        seen.update(item.blocks)
    return Statistics(
        _summary([item.prompt_len for item in items]),
        _summary([item.output_len for item in items]),
        pstdev(gaps) / fmean(gaps) if any(gaps) else math.nan,
        hits / max(1, sum(len(item.blocks) for item in items)),
    )


def _summary(tokens: list[int]) -> Lengths:
    percentiles = quantiles(tokens, n=100, method="inclusive")
    return Lengths(fmean(tokens), percentiles[49], percentiles[89], percentiles[98])


def _normal(rng: Random) -> float:
    return NORMAL.inv_cdf(rng.random() or 0.5)  # 0 has no quantile


def _lengths(kind: Kind, rng: Random) -> tuple[int, int]:
    weight = 2 * math.sin(math.pi / 6 * kind.correlation)  # the correlation of normals whose ranks have this one
    prompt = _normal(rng)
    return _at(kind.prompt, prompt), _at(kind.output, weight * prompt + math.sqrt(1 - weight**2) * _normal(rng))


def _at(table: tuple[int, ...], normal: float) -> int:
    quantile = NORMAL.cdf(normal)
    i = bisect_right(GRID, quantile, hi=len(GRID) - 1) - 1
    return round(table[i] * math.pow(table[i + 1] / table[i], (quantile - GRID[i]) / (GRID[i + 1] - GRID[i])))


def _turn_before(kind: Kind, earlier: list[WorkItem], prompt_len: int, rng: Random) -> tuple[int, ...]:
    """The full blocks of the prompt that this one takes further; none where it begins a session."""
    is_turn = rng.random() < kind.turns
    place = len(earlier) - round(TURN_LAG * math.exp(TURN_LAG_SIGMA * _normal(rng)))
    if not is_turn or place < 0:  # one before the workload's first is not in any cache
        return ()
    shorter = [item for item in earlier[max(0, place - TURN_CANDIDATES) : place + 1] if item.prompt_len < prompt_len]
    before = max(shorter, key=lambda item: item.prompt_len, default=None)
    return before.blocks[: before.prompt_len // MOONCAKE_BLOCK] if before else ()


def _times(arrivals: Arrivals, count: int, seed: int, request_rate: float | None) -> list[float]:
    rate = arrivals.request_rate if request_rate is None else request_rate
    times = arrival_times(count, rate, arrivals.burstiness, seed)
    share, silent = arrivals.pauses
    if share and times and math.isfinite(rate):
        rng = keyed_random("pauses", seed)
        pauses = accumulate((rng.random() < share) * -math.log(1 - rng.random()) for _ in times)
        times = [(1 - silent) * t + silent / share / rate * pause for t, pause in zip(times, pauses, strict=True)]
        times = [count / rate * (t / times[-1]) for t in times]
    tick = arrivals.per_tick / rate
    return [t // tick * tick for t in times] if tick else times

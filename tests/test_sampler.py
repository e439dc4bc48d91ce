"""Sampling against a naive reference, and its independence of batch and retry."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import msgspec
import pytest
import torch
from torch import Tensor

from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import NO_TOKEN
from minidisagg.model.sampler import SequenceSampling, sample, uniform

VOCAB = 40


def logits_for(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def reference(logits: list[float], p: SamplingParams, prompt: set[int], output: Counter[int]) -> list[float]:
    """The distribution, spelled out over Python floats: sorted lists and loops."""
    for t in range(len(logits)):
        if t in prompt or t in output:
            logits[t] = logits[t] / p.repetition_penalty if logits[t] > 0 else logits[t] * p.repetition_penalty
        logits[t] -= p.frequency_penalty * output[t] + p.presence_penalty * (output[t] > 0)
    weights = [math.exp(x / p.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda t: -weights[t])
    if p.top_k:
        order = order[: p.top_k]
    total, mass, nucleus = sum(weights[t] for t in order), 0.0, []
    for t in order:
        if mass < p.top_p:
            nucleus.append(t)
        mass += weights[t] / total
    kept = [t for t in nucleus if weights[t] >= p.min_p * weights[order[0]]]
    total = sum(weights[t] for t in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(logits))]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=0.8),
        SamplingParams(top_p=0.01),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=2.0, top_k=12, top_p=0.7, min_p=0.2),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(presence_penalty=1.5, frequency_penalty=-0.5),
        SamplingParams(repetition_penalty=0.6, presence_penalty=-1.0, frequency_penalty=0.7, top_p=0.9, top_k=20),
    ],
)
def test_each_draw_lands_where_the_reference_distribution_puts_it(params: SamplingParams) -> None:
    prompt, output = {1, 2, 3, 4, 5}, Counter([4, 5, 6, 6, 6, 7])
    sequence = SequenceSampling(params, frozenset(prompt), output)
    logits = logits_for(1)[0]
    cdf, mass = [], 0.0
    for probability in reference(logits.tolist(), params, prompt, output):
        mass += probability
        cdf.append(mass)
    tokens = sample(logits.repeat(400, 1), [(sequence, index) for index in range(400)])
    for index, token in enumerate(tokens):
        below = cdf[token - 1] if token else 0.0
        assert below - 1e-5 <= uniform(0, index) <= cdf[token] + 1e-5
        assert cdf[token] > below  # never a token that was filtered out


def test_nucleus_wider_than_the_candidates() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, ::2] = 0.01  # 2500 tokens of the larger probability are not enough for 0.9
    sequence = SequenceSampling(SamplingParams(top_p=0.4))
    tokens = [sample(logits.clone(), [(sequence, index)])[0] for index in range(100)]
    assert all(token % 2 == 0 for token in tokens) and max(tokens) > 2500
    wide = SequenceSampling(SamplingParams(top_p=0.9))
    assert any(sample(logits.clone(), [(wide, index)])[0] % 2 for index in range(20))


def test_the_token_depends_on_seed_and_index_only() -> None:
    params = [SamplingParams(seed=seed, top_p=0.95, temperature=1.3) for seed in (None, 0, 7, -7, 1 << 40)]
    rows = [(SequenceSampling(p), index) for p in params for index in range(20)]
    alone = [sample(logits_for(1), [row])[0] for row in rows]
    same = logits_for(1).repeat(len(rows), 1)
    assert sample(same.clone(), rows) == alone
    assert sample(same.clone(), rows[::-1]) == alone[::-1]
    greedy = (SequenceSampling(SamplingParams(temperature=0)), 0)
    mixed = [row for random in rows for row in (random, greedy)]
    assert sample(same.repeat(2, 1), mixed)[::2] == alone
    assert alone[:20] == alone[20:40]  # None is 0
    assert len({tuple(alone[i : i + 20]) for i in range(20, 100, 20)}) == 4


def test_uniform_is_pinned_and_uniform() -> None:
    assert uniform(0, 0) == 0.6524484863740321
    draws = [uniform(seed, index) for seed in range(40) for index in range(50)]
    assert len(set(draws)) == 2000
    for tenth in range(10):
        assert 140 < sum(tenth <= 10 * u < tenth + 1 for u in draws) < 260


def test_greedy_takes_penalties_and_min_tokens_into_account() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 8], logits[0, 9] = 5.0, 4.0, 3.0
    greedy = SamplingParams(temperature=0)
    assert sample(logits.clone(), [(SequenceSampling(greedy), 0)]) == [3]
    waiting = SequenceSampling(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(3, 10**6)))
    assert [sample(logits.clone(), [(waiting, index)])[0] for index in range(4)] == [8, 8, 3, 3]
    repeating = SequenceSampling(SamplingParams(temperature=0, repetition_penalty=2.0), frozenset([3]))
    assert sample(logits.clone(), [(repeating, 0)]) == [8]
    frequent = SequenceSampling(SamplingParams(temperature=0, frequency_penalty=0.6), output=Counter({3: 2}))
    assert sample(logits.clone(), [(frequent, 2)]) == [8]


# Of each field: the ends of its range, the numbers next to them and to zero, and what lies in the middle.
CORNERS = {
    "temperature": (0.0, 5e-324, 1e-310, 1e-38, 1e-5, 0.01, 1.0, 10.0),
    "top_p": (5e-324, 1e-16, 0.5, math.nextafter(1.0, 0.0), 1.0),
    "min_p": (0.0, 5e-324, 1e-300, 0.5, math.nextafter(1.0, 0.0), 1.0),
    "presence_penalty": (-2.0, -5e-324, 0.0, 2.0),
    "frequency_penalty": (-2.0, 5e-324, 0.0, 2.0),
    "repetition_penalty": (0.01, math.nextafter(1.0, 0.0), 1.0, 10.0),
    "top_k": (0, 1, 1 << 20),
    "seed": (-(1 << 63), 0, (1 << 63) - 1, None),
    "min_tokens": (0, 5),
    "stop_token_ids": ((), (0, VOCAB - 1, VOCAB, 1 << 60)),
}
ROWS = {
    "plain": [3.0 * math.sin(t) for t in range(VOCAB)],
    "flat": [0.0] * VOCAB,
    "steep": [1e4 * t for t in range(VOCAB)],
    "huge": [1e35 if t % 2 else -1e35 for t in range(VOCAB)],
    "tiny": [1e-40 * t for t in range(VOCAB)],
    "one": [0.0 if t == 7 else -math.inf for t in range(VOCAB)],
}


def fields() -> list[dict[str, object]]:
    """Every pair of corners of every two fields, and random whole sets."""
    found: list[dict[str, object]] = [{}]
    for one, other in itertools.combinations(CORNERS, 2):
        found += [{one: a, other: b} for a in CORNERS[one] for b in CORNERS[other]]  # type: ignore[attr-defined]
    rng = random.Random(0)
    return found + [{name: rng.choice(values) for name, values in CORNERS.items()} for _ in range(500)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ROWS)
def test_whatever_passes_the_ranges_gives_a_token_of_the_vocabulary(name: str) -> None:
    many = [msgspec.convert({"temperature": 1.0, **given}, SamplingParams) for given in fields()]
    output = Counter({0: 1, 7: 100_000, 39: 1})
    rows = [(SequenceSampling(params, frozenset({1, 7}), output.copy()), 3) for params in many]
    logits = torch.tensor([ROWS[name]] * len(rows), dtype=torch.float32)
    tokens = sample(logits, rows)
    wrong = [(params, token) for params, token in zip(many, tokens, strict=True) if not 0 <= token < VOCAB]
    assert not wrong, wrong[:3]
    allowed = {7} if name == "one" else set(range(VOCAB))
    for params, token in zip(many, tokens, strict=True):
        assert token in allowed and not (params.min_tokens and token in params.stop_token_ids), params


@pytest.mark.parametrize("name", ["repetition_penalty", "temperature", "top_p", "min_p", "presence_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-300, 1e300])
def test_what_makes_no_sense_is_refused(name: str, value: float) -> None:
    if (name, value) != ("presence_penalty", -1e-300):
        with pytest.raises(ValueError, match=name):
            msgspec.convert({name: value}, SamplingParams)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_no_distribution_harms_no_other(temperature: float, dtype: torch.dtype) -> None:
    bad = {
        "nan": [math.nan] * VOCAB, "one nan": [math.nan if t == 5 else 1.0 for t in range(VOCAB)],
        "inf": [math.inf if t == 5 else 1.0 for t in range(VOCAB)], "nothing": [-math.inf] * VOCAB,
    }  # fmt: skip
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=5, min_p=0.1, seed=3)
    good = logits_for(4).to(dtype)
    alone = sample(good.clone(), [(SequenceSampling(params), row) for row in range(4)])
    logits = torch.cat([good, torch.tensor(list(bad.values()), dtype=dtype)])
    rows = [(SequenceSampling(params), row) for row in range(len(logits))]
    assert sample(logits, rows) == [*alone, *[NO_TOKEN] * len(bad)]


def test_a_client_that_forbids_every_token_ends_its_own_request_only() -> None:
    forbids = SamplingParams(min_tokens=3, stop_token_ids=tuple(range(VOCAB)))
    rows = [(SequenceSampling(SamplingParams(seed=1)), 0), (SequenceSampling(forbids), 0)]
    tokens = sample(logits_for(2), rows)
    assert 0 <= tokens[0] < VOCAB and tokens[1] == NO_TOKEN

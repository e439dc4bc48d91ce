"""From logits to tokens.

Order: min_tokens, penalties, temperature, top-k, top-p, min-p, draw. Every filter is a threshold on the logits (ties
at the threshold stay), so that a row's outcome depends on nothing but the row; and the draw's randomness is a hash of
(seed, output index), so that a token is the same in any batch, on any worker and after any retry.

A row may hold anything: a model can overflow, a client can forbid every token. Such a row gives `NO_TOKEN`, and those
beside it what they would have given alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidisagg.core.messages import SamplingParams, TokenLogprob
from minidisagg.core.plan import NO_TOKEN

_CANDIDATES = 1024  # top-p seldom needs more, and selecting them is far cheaper than sorting a vocabulary
_LEAST_TEMPERATURE = 0.01  # vLLM's too; the likeliest token has all the probability long before
_MASK64 = (1 << 64) - 1


@dataclass
class SequenceSampling:
    """What sampling remembers of one sequence."""

    sampling: SamplingParams
    prompt: frozenset[int] = frozenset()
    output: Counter[int] = field(default_factory=Counter)
    scored: Sequence[int] = ()  # the prompt in its order, where the log-probabilities of its tokens are wanted
    counts: tuple[Tensor, Tensor] | None = None  # `resample`'s: how often each token came out, and which are known


@torch.inference_mode()
def score(logits_SV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability of each row's token, and the `top` likeliest of the row."""
    logprobs_SV = logits_SV.log_softmax(-1)
    index_S1 = torch.tensor(tokens, device=logits_SV.device)[:, None]
    chosen: list[float] = logprobs_SV.gather(1, index_S1)[:, 0].tolist()
    values_SC, ids_SC = logprobs_SV.topk(min(top, logits_SV.shape[1]))
    return [
        TokenLogprob(logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen, ids_SC.tolist(), values_SC.tolist(), strict=True)
    ]


@torch.inference_mode()
def sample(logits_SV: Tensor, rows: Sequence[tuple[SequenceSampling, int]]) -> list[int]:
    """One token per row, or `NO_TOKEN` where its logits are not finite or all forbidden. Modifies the logits.

    `rows` holds each row's sequence and the output index of the token.
    """
    for row, (sequence, index) in enumerate(rows):
        _adjust(logits_SV[row], sequence, index)
    best_S = logits_SV.max(-1)  # NaN wins
    tokens: list[int] = best_S.indices.tolist()
    sound: list[bool] = best_S.values.isfinite().tolist()
    random = [row for row, (sequence, _) in enumerate(rows) if sequence.sampling.temperature > 0 and sound[row]]
    if random:
        params = [rows[row][0].sampling for row in random]
        draws = [uniform(p.seed or 0, rows[row][1]) for row, p in zip(random, params, strict=True)]
        drawn = _draw(logits_SV if len(random) == len(rows) else logits_SV[random], params, draws)
        for row, token in zip(random, drawn, strict=True):
            tokens[row] = token
    return [token if ok else NO_TOKEN for token, ok in zip(tokens, sound, strict=True)]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on (seed, index) only: two rounds of SplitMix64 (Steele et al. 2014)."""
    return (_mix(_mix(seed & _MASK64) ^ (index & _MASK64)) >> 12) / (1 << 52)


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
    return state ^ (state >> 31)


def _adjust(logits_V: Tensor, sequence: SequenceSampling, index: int) -> None:
    """min_tokens and penalties, in place. Only repetition (Keskar et al. 2019, CTRL) counts the prompt too."""
    params = sequence.sampling
    if params.repetition_penalty != 1.0 and (seen := sequence.prompt | sequence.output.keys()):
        ids = torch.tensor(sorted(seen), device=logits_V.device)
        values = logits_V[ids]
        logits_V[ids] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.output:
        ids = torch.tensor(list(sequence.output), device=logits_V.device)
        counts = torch.tensor(list(sequence.output.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if index < params.min_tokens and params.stop_token_ids:
        stops = [token for token in params.stop_token_ids if token < logits_V.shape[0]]
        logits_V[stops] = -math.inf


def _draw(logits_RV: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Inverse-CDF sampling in float64, so that a draw lands on the same token whatever the vocabulary's size."""
    temperatures = [max(p.temperature, _LEAST_TEMPERATURE) for p in params]
    temperature_R = torch.tensor(temperatures, dtype=torch.float64, device=logits_RV.device)
    scaled_RV = logits_RV.double() / temperature_R[:, None]
    keep_RV = scaled_RV >= _threshold(scaled_RV, params)[:, None]
    cdf_RV = scaled_RV.masked_fill_(~keep_RV, -math.inf).softmax(-1).cumsum(-1)
    target_R1 = torch.tensor(draws, dtype=torch.float64, device=logits_RV.device)[:, None] * cdf_RV[:, -1:]
    # right=True: the first token whose cumulative probability exceeds the target, so never one of probability 0. There
    # is one: a draw is at most 1 - 2^-52, and the product with a sum near 1 rounds to less than the sum.
    drawn: list[int] = torch.searchsorted(cdf_RV, target_R1, right=True)[:, 0].tolist()
    return drawn


def _threshold(scaled_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The smallest logit of each row that top-k, top-p and min-p (Nguyen et al. 2024) keep."""
    threshold_R = torch.full_like(scaled_RV[:, 0], -math.inf)
    for row, p in enumerate(params):
        kept_C = scaled_RV[row]
        if 0 < p.top_k < kept_C.shape[0]:
            threshold_R[row] = kept_C.topk(p.top_k).values[-1]
            kept_C = kept_C[kept_C >= threshold_R[row]]
        if p.top_p < 1.0:
            threshold_R[row] = _nucleus(kept_C, p.top_p)
        if p.min_p > 0.0:
            threshold_R[row].clamp_(min=scaled_RV[row].max() + math.log(p.min_p))
    return threshold_R


def _nucleus(logits_C: Tensor, top_p: float) -> Tensor:
    """The smallest logit among the most probable ones that together reach `top_p` (Holtzman et al. 2020)."""
    total = logits_C.logsumexp(0)
    for width in (_CANDIDATES, logits_C.shape[0]):
        top_W = logits_C.topk(min(width, logits_C.shape[0])).values
        mass_W = (top_W - total).exp().cumsum(0)
        if mass_W[-1] >= top_p:
            break
    last = int((mass_W < top_p).sum())
    return top_W[min(last, top_W.shape[0] - 1)]


@torch.inference_mode()
def resample(rows: Sequence[tuple[SequenceSampling, int, Tensor]], tokens_S: Tensor) -> None:
    """What `sample` would give, put into `tokens_S` (int32), which holds the likeliest tokens; nothing waits.

    `rows` holds each row's sequence, the output index of the token, and its logits, which stay as they are. For a
    device that samples a step before its host has seen the tokens of the last one: what a sequence has said is counted
    there.
    """
    chosen = [n for n, (sequence, index, _) in enumerate(rows) if _needs_more(sequence.sampling, index)]
    if not chosen:
        return
    logits_RV = torch.stack([rows[n][2] for n in chosen])
    params = [rows[n][0].sampling for n in chosen]
    for row, n in enumerate(chosen):
        _adjust_there(logits_RV[row], rows[n][0], rows[n][1])
    best_R = logits_RV.max(-1)
    tokens_R = best_R.indices
    if any(p.temperature > 0 for p in params):
        draws = [uniform(p.seed or 0, rows[n][1]) for n, p in zip(chosen, params, strict=True)]
        random_R = _there([p.temperature > 0 for p in params], logits_RV.device)
        tokens_R = torch.where(random_R, _draw_there(logits_RV, params, draws), tokens_R)
    tokens_R = torch.where(best_R.values.isfinite(), tokens_R, NO_TOKEN)
    tokens_S.index_copy_(0, _there(chosen, tokens_S.device), tokens_R.int())
    for row, n in enumerate(chosen):
        if (counts := rows[n][0].counts) is not None:
            said = tokens_R[row : row + 1].clamp(min=0)
            counts[0].index_add_(0, said, torch.ones_like(said, dtype=counts[0].dtype))
            counts[1].index_fill_(0, said, True)


def _needs_more(params: SamplingParams, index: int) -> bool:
    """Than the likeliest token."""
    return params.temperature > 0 or _penalised(params) or (index < params.min_tokens and bool(params.stop_token_ids))


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


def _there(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _adjust_there(logits_V: Tensor, sequence: SequenceSampling, index: int) -> None:
    """`_adjust`, over the whole vocabulary."""
    params, device = sequence.sampling, logits_V.device
    if _penalised(params):
        if sequence.counts is None:
            counts_V = torch.zeros(logits_V.shape, dtype=logits_V.dtype)
            known_V = torch.zeros(logits_V.shape, dtype=torch.bool)
            for token, count in sequence.output.items():
                counts_V[token] = count
            known_V[sorted(sequence.prompt | sequence.output.keys())] = True
            sequence.counts = counts_V.to(device), known_V.to(device)
        counts_V, known_V = sequence.counts
        penalty = params.repetition_penalty
        moved_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        logits_V.copy_(torch.where(known_V, moved_V, logits_V))
        fall_V = params.presence_penalty + params.frequency_penalty * counts_V
        logits_V.sub_(torch.where(counts_V > 0, fall_V, 0.0))
    if index < params.min_tokens and params.stop_token_ids:
        stops = [token for token in params.stop_token_ids if token < logits_V.shape[0]]
        logits_V.index_fill_(0, _there(stops, device), -math.inf)


def _draw_there(logits_RV: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> Tensor:
    """`_draw`, of all rows at once. Of rows that are not to be drawn, or not sound, it gives any token."""
    device, vocab = logits_RV.device, logits_RV.shape[1]
    rows = [(max(p.temperature, _LEAST_TEMPERATURE), p.top_p, p.min_p, u) for p, u in zip(params, draws, strict=True)]
    temperature_R1, top_p_R1, min_p_R1, draw_R1 = _there(rows, device, torch.float64).t()[:, :, None]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    scaled_RV = logits_RV.double() / temperature_R1
    keep_RV = scaled_RV >= scaled_RV.amax(-1, keepdim=True) + min_p_R1.log()
    if min(top_k) < vocab or any(p.top_p < 1.0 for p in params):
        sorted_RV = logits_RV.sort(-1, descending=True).values.double() / temperature_R1
        threshold_R1 = sorted_RV.gather(1, _there(top_k, device)[:, None] - 1)
        sorted_RV.masked_fill_(sorted_RV < threshold_R1, -math.inf)
        mass_RV = (sorted_RV - sorted_RV.logsumexp(-1, keepdim=True)).exp().cumsum(-1)
        kept_R1 = (sorted_RV > -math.inf).sum(-1, keepdim=True)
        last_R1 = torch.minimum((mass_RV < top_p_R1).sum(-1, keepdim=True), kept_R1 - 1).clamp(min=0)
        nucleus_R1 = torch.where(top_p_R1 < 1.0, sorted_RV.gather(1, last_R1), threshold_R1)
        keep_RV &= scaled_RV >= nucleus_R1
    cdf_RV = scaled_RV.masked_fill_(~keep_RV, -math.inf).softmax(-1).cumsum(-1)
    drawn_R1 = torch.searchsorted(cdf_RV, draw_R1 * cdf_RV[:, -1:], right=True)
    return drawn_R1[:, 0].clamp(max=vocab - 1)

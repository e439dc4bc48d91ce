"""Carries out step plans: resolves tokens, runs the model, samples, and says what the step had to do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidisagg.core.messages import Logprobs
from minidisagg.core.plan import NO_TOKEN, PlanItem, SeqKey, StepPlan
from minidisagg.model.attention import build_batch
from minidisagg.model.config import ModelConfig
from minidisagg.model.sampler import SequenceSampling, sample, score
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.kv_cache import KVCache

_SCORED_ROWS = 256  # at a time: the logits of a row take 200 KB


@dataclass(frozen=True)
class StepResult:
    """`tokens`: one per item with `sample`, in item order, or `NO_TOKEN`. `flops` and `bytes_read`: see `step_work`."""

    tokens: list[int]
    seconds: float
    flops: float
    bytes_read: float
    logprobs: Sequence[Logprobs] = ()


class Executor:
    """One model and one cache. Keeps, per sequence of the plans, what sampling needs and the last token sampled."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.sequences: dict[SeqKey, SequenceSampling] = {}
        self.last_token: dict[SeqKey, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's items. Raises ValueError on an unknown sequence and on missing tokens or pages."""
        start = time.perf_counter()
        for key in plan.dropped:
            self.sequences.pop(key, None)
            self.last_token.pop(key, None)
        for new in plan.new:
            key = (new.request_id, new.incarnation)
            scored = new.prompt if new.sampling.prompt_logprobs is not None else ()
            self.sequences[key] = SequenceSampling(new.sampling, frozenset(new.prompt), Counter(new.output), scored)
        if not plan.items:
            return StepResult([], time.perf_counter() - start, 0.0, 0.0)

        model, cache = self.model, self.cache
        batch = build_batch(plan.items, [self._tokens(item) for item in plan.items], cache, model.dtype, model.device)
        cache.clear(pages_begun(plan.items, cache.page_size))
        x_NE = model.hidden(batch, cache)
        logits_SV = model.logits(x_NE[batch.sample_rows_S])
        sampling = [item for item in plan.items if item.sample]
        tokens = sample(logits_SV, [(self._sequence(item), item.index) for item in sampling]) if sampling else []
        for item, token in zip(sampling, tokens, strict=True):
            if token != NO_TOKEN:
                self._sequence(item).output[token] += 1
            # A step ahead may carry a request that has just ended: it needs some token, whose result nobody takes.
            self.last_token[item.request_id, item.incarnation] = max(token, 0)
        logprobs = self._score(plan.items, iter(tokens), x_NE, batch.first_rows)
        if model.device.type == "cuda":  # a step without a sample has nothing else that waits for the device
            torch.cuda.synchronize(model.device)
        flops, bytes_read = step_work(plan, model.config, model.dtype.itemsize)
        return StepResult(tokens, time.perf_counter() - start, flops, bytes_read, logprobs)

    def _score(
        self, items: Sequence[PlanItem], sampled: Iterator[int], x_NE: Tensor, first_rows: dict[int, int]
    ) -> list[Logprobs]:
        """What the requests that ask for log-probabilities get of this step."""
        out = []
        for i, item in enumerate(items):
            sequence = self._sequence(item)
            token = [token for token in ([next(sampled)] if item.sample else []) if token != NO_TOKEN]
            prompt = sequence.scored[item.start + 1 : item.start + 1 + item.count]
            for tokens, first, top in (
                (prompt, 0, sequence.sampling.prompt_logprobs),
                (token, item.count - 1, sequence.sampling.logprobs),
            ):
                if not tokens or top is None:
                    continue
                x_RE = x_NE[first_rows[i] + first :][: len(tokens)]
                values = []
                for at in range(0, len(tokens), _SCORED_ROWS):
                    logits_RV = self.model.logits(x_RE[at : at + _SCORED_ROWS], exact=True)
                    values += score(logits_RV, tokens[at : at + _SCORED_ROWS], top)
                out.append(Logprobs(item.request_id, item.incarnation, item.start + first + 1, values))
        return out

    def _sequence(self, item: PlanItem) -> SequenceSampling:
        sequence = self.sequences.get((item.request_id, item.incarnation))
        if sequence is None:
            raise ValueError(f"request {item.request_id}, incarnation {item.incarnation}: in no earlier plan's `new`")
        return sequence

    def _tokens(self, item: PlanItem) -> list[int]:
        last = self.last_token.get((item.request_id, item.incarnation))
        if len(item.tokens) == item.count - 1 and last is not None:
            return [*item.tokens, last]
        return item.tokens


def pages_begun(items: list[PlanItem], page_size: int) -> list[int]:
    """Pages whose first token the step writes but whose last it does not: their ends hold an earlier owner's KV."""
    begun = []
    for item in items:
        end = item.start + item.count
        if end % page_size and item.start <= end - end % page_size:
            begun.append(item.pages[end // page_size])
    return begun


def step_work(plan: StepPlan, config: ModelConfig, itemsize: int) -> tuple[float, float]:
    """(flops, bytes read) that the step cannot do without.

    Flops: 2 per weight and token (the head's only for sampled tokens), and 4 * H * D per layer for each pair of a
    token and a position that it attends to. Bytes: every weight once, and the KV of every sequence's context once.
    """
    head = config.vocab_size * config.hidden_size
    tokens = sum(item.count for item in plan.items)
    sampled = sum(item.sample for item in plan.items)
    # token i of an item attends to start + i + 1 positions
    pairs = sum(item.count * item.start + item.count * (item.count + 1) // 2 for item in plan.items)
    context = sum(item.start + item.count for item in plan.items)
    flops = 2.0 * (config.num_parameters - head) * tokens + 2.0 * head * sampled
    flops += 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
    return flops, float(config.num_parameters * itemsize + context * config.kv_bytes_per_token(itemsize))

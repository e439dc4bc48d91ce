"""A worker's device: the model, its cache, and the way of a step through it.

    prepare   the plan's tokens and block tables become the step's inputs
    launch    the forward pass and the sampler; says on its way which layers' KV is in the cache
    collect   the sampled tokens, and what the step had to do

A CPU has computed all when `launch` returns. A GPU has been given the work by then, and `collect` waits for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidisagg.core.messages import Logprobs
from minidisagg.core.plan import NO_TOKEN, PlanItem, SeqKey, StepPlan
from minidisagg.model.attention import Batch, build_batch
from minidisagg.model.config import ModelConfig
from minidisagg.model.sampler import SequenceSampling, sample, score
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.kv_cache import KVCache

_SCORED_ROWS = 256  # at a time: the logits of a row take 200 KB

Report = Callable[[int], None]  # the KV of all layers before this one is in the cache


@dataclass(frozen=True)
class StepResult:
    """`tokens`: one per item with `sample`, in item order, or `NO_TOKEN`. `flops` and `bytes_read`: see `step_work`."""

    tokens: list[int]
    seconds: float
    flops: float
    bytes_read: float
    logprobs: Sequence[Logprobs] = ()


@dataclass
class Step:
    """One plan on its way through the device."""

    plan: StepPlan
    began: float
    batch: Batch | None = None  # None: nothing to compute
    tokens: list[int] = field(default_factory=list)
    logprobs: Sequence[Logprobs] = ()
    reported: list[Future[None]] = field(default_factory=list)


def no_report(layer: int) -> None:
    """For who does not ask."""


class Device:
    """One model and one cache. Keeps, per sequence of the plans, what sampling needs and the last token sampled."""

    kernels = "portable"
    overlaps = False  # a step may be launched before the one before it is collected, from another thread

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.sequences: dict[SeqKey, SequenceSampling] = {}
        self.last_token: dict[SeqKey, int] = {}
        self._on_gpu = model.device.type == "cuda"
        self._events = ThreadPoolExecutor(1, thread_name_prefix="layers")  # waits where a GPU is to be waited for

    @torch.inference_mode()
    def run(self, plan: StepPlan, report: Report = no_report) -> StepResult:
        """One step from end to end; blocks. Raises ValueError on an unknown sequence and on missing tokens or pages."""
        return self.collect(self.launch(self.prepare(plan), report))

    def info(self) -> dict[str, str | int | float]:
        """What a worker says of it."""
        config = self.model.config
        return {
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "kernels": self.kernels,
            "threads": torch.get_num_threads(),
            "parameters": config.num_parameters,
            "vocab_size": config.vocab_size,
        }

    def begin(self, max_num_seqs: int, max_prompt: int) -> None:
        """No sequence is known, as after a start; a step may have so many from now on, and so many tokens of one."""
        self.sequences.clear()
        self.last_token.clear()

    def meet(self, plan: StepPlan) -> None:
        """Take leave of the sequences that are over, and get to know the new ones."""
        for key in plan.dropped:
            self.sequences.pop(key, None)
            self.last_token.pop(key, None)
        for new in plan.new:
            scored = new.prompt if new.sampling.prompt_logprobs is not None else ()
            sampling = SequenceSampling(new.sampling, frozenset(new.prompt), Counter(new.output), scored)
            self.sequences[new.request_id, new.incarnation] = sampling

    def prepare(self, plan: StepPlan) -> Step:
        """Build the batch."""
        step = Step(plan, time.perf_counter())
        self.meet(plan)
        if plan.items:
            tokens = [self._tokens(item) for item in plan.items]
            step.batch = build_batch(plan.items, tokens, self.cache, self.model.dtype, self.model.device)
        return step

    def launch(self, step: Step, report: Report = no_report) -> Step:
        """Compute it. `report` is called for the layers that the plan asks for, from another thread it may be."""
        plan, batch, model = step.plan, step.batch, self.model
        if batch is None:
            return step

        def on_layer(layer: int) -> None:
            if layer in plan.reports:
                self._report(step, report, layer)

        self.cache.clear(pages_begun(plan.items, self.cache.page_size))
        x_NE = model.hidden(batch, self.cache, on_layer)
        logits_SV = model.logits(x_NE[batch.sample_rows_S])
        sampling = [item for item in plan.items if item.sample]
        if sampling:
            step.tokens = sample(logits_SV, [(self._sequence(item), item.index) for item in sampling])
        for item, token in zip(sampling, step.tokens, strict=True):
            if token != NO_TOKEN:
                self._sequence(item).output[token] += 1
            # A step ahead may carry a request that has just ended: it needs some token, whose result nobody takes.
            self.last_token[item.request_id, item.incarnation] = max(token, 0)
        step.logprobs = self._score(plan.items, iter(step.tokens), x_NE, batch.first_rows)
        return step

    def collect(self, step: Step) -> StepResult:
        """Wait for it, and for its reports."""
        if self._on_gpu:  # a step without a sample has nothing else that waits for the device
            torch.cuda.synchronize(self.model.device)
        for reported in step.reported:
            reported.result()
        flops, bytes_read = step_work(step.plan, self.model.config, self.model.dtype.itemsize)
        return StepResult(step.tokens, time.perf_counter() - step.began, flops, bytes_read, step.logprobs)

    def _report(self, step: Step, report: Report, layer: int) -> None:
        if not self._on_gpu:
            report(layer)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        def wait() -> None:
            event.synchronize()
            report(layer)

        step.reported.append(self._events.submit(wait))

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

    def _tokens(self, item: PlanItem) -> Sequence[int]:
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

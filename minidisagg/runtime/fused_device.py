"""A GPU as a device: one staged copy a step, decodes as one graph, and sampled ids that stay on the card.

    prepare   block tables and contexts are patched in pinned memory
    launch    copy it, replay the decode graph, run prompts eagerly, sample; nothing of it waits for the device
    collect   wait for the step's ids

The next step is launched while this one runs: where it needs a token that no host has seen, it names the place in
`recent` where the card keeps it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidisagg.core.plan import NO_TOKEN, PlanItem, SeqKey, StepPlan
from minidisagg.model.fused import LONG, DecodeRows, FusedTransformer, Prompt, Prompts, padded_lengths
from minidisagg.model.sampler import SequenceSampling, resample
from minidisagg.runtime.device import Device, Report, Step, StepResult, no_report, step_work
from minidisagg.runtime.kv_cache import KVCache

RING = 4  # steps whose ids the card keeps; two are in flight
HEAD = 4  # int32 before the staged arrays: the tables' width, and room so that they begin aligned
ALIGNED = 4  # int32 that a column's length is a multiple of: Triton compiles anew for one that begins elsewhere
WARM_PROMPT = 64  # tokens of the prompt that brings every eager kernel up before a receive can spin beside it


def _nobody(done: int, total: int) -> None:
    """To whom nothing is said."""


@dataclass
class FusedStep(Step):
    """A step on its way; `decodes` and `prompts` are items' indices."""

    number: int = 0
    decodes: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    bucket: int = 0
    prompt_batch: Prompts | None = None
    staged: int = 0  # int32 to copy
    x_NE: Tensor | None = None  # of the prompts
    late_rows: list[tuple[int, int]] = field(default_factory=list)  # of prompts: (row, place in `recent`)
    done: torch.cuda.Event | None = None


class FusedDevice(Device):
    """`max_num_seqs` bounds the sequences of a step, `max_len` the tokens of each.

    Of a prompt `max_prompt` tokens come at once, at most: what their number needs is made before the first step.
    """

    model: FusedTransformer
    kernels = "fused"
    overlaps = True

    def __init__(
        self, model: FusedTransformer, cache: KVCache, max_num_seqs: int, max_len: int, max_prompt: int
    ) -> None:
        super().__init__(model, cache)
        model.attach(list(cache.data))
        self.width = -(-max_len // cache.page_size)
        self.max_len = max_len
        self.stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self.steps = 0
        self.last_end = 0.0
        self._allocate(max_num_seqs, max_prompt)

    def _allocate(self, rows: int, max_prompt: int) -> None:
        """What graphs read and write, which stays where it is."""
        self.rows, self.max_prompt, model, device = rows, max_prompt, self.model, self.model.device
        self.lengths = padded_lengths(min(max_prompt, self.max_len))
        self.recent = torch.zeros(RING * self.rows + 1, dtype=torch.int32, device=device)  # the last is nobody's
        self.places: dict[SeqKey, int] = {}  # where in `recent` a sequence's last token is
        length = HEAD + 4 * self.rows + self.rows * self.width
        self.staged = torch.zeros(length, dtype=torch.int32, device=device)
        self.pinned = [torch.zeros(length, dtype=torch.int32).pin_memory() for _ in range(RING)]
        self.ids = [torch.zeros(self.rows, dtype=torch.int32).pin_memory() for _ in range(RING)]
        self.tables = np.zeros((self.rows, self.width), dtype=np.int32)
        self.known: list[tuple[SeqKey, int, int] | None] = [None] * self.rows  # who a row of `tables` was for, and when
        self.logits_BV = torch.empty(self.rows, model.config.vocab_size, dtype=torch.float32, device=device)
        self.x_BE = torch.empty(self.rows, model.config.hidden_size, dtype=model.dtype, device=device)
        self.sizes = graph_sizes(self.rows)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    # ------------------------------------------------------------ graphs

    @torch.inference_mode()
    def warm_up(self, say: Callable[[int, int], None] = _nobody) -> None:
        """Bring up every kernel, plan prompts, and capture the decode step of each size: the largest first, since what
        they allocate is used again by the next, and graphs share one pool.

        `say` is told how many plans and graphs are made, of how many.
        """
        pool, total = torch.cuda.graph_pool_handle(), len(self.lengths) + len(self.sizes)
        with torch.cuda.stream(self.stream):
            for made, length in enumerate(self.lengths):
                say(made, total)
                self.model.plan(length)
            self._warm_prompts()
            for size in reversed(self.sizes):
                say(len(self.lengths) + len(self.graphs), total)
                self._decode(size)  # kernels are compiled, and libraries loaded, outside of the capture
                self.stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # other threads may allocate meanwhile, of links for instance
                with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                    self._decode(size)
                self.graphs[size] = graph
        self.stream.synchronize()

    def _decode(self, size: int) -> None:
        def column(index: int) -> Tensor:
            first = HEAD + index * self.rows
            return self.staged[first : first + size]

        given, sources, targets, contexts = map(column, range(4))
        rows = DecodeRows(given, sources, contexts, self.staged[HEAD + 4 * self.rows :], self.staged[:1])
        x_BE = self.model.decode(rows, self.recent)
        self.x_BE[:size].copy_(x_BE)
        self.logits_BV[:size].copy_(self.model.logits(x_BE))
        self.recent.index_copy_(0, targets.long(), greedy(self.logits_BV[:size]))

    def _warm_prompts(self) -> None:
        """A step of a short prompt, of long ones where those can be, and of a chunk. Their KV goes nowhere."""
        device, short = self.model.device, min(WARM_PROMPT, self.cache.page_size)
        counts = [short, *([LONG] * 2 if self.lengths else []), short]
        ends = list(accumulate(counts))
        zeros = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        whole = torch.tensor([[0, short]] * 2, dtype=torch.int32, device=device)
        items = [Prompt(end - count, end, 0) for count, end in zip(counts, ends, strict=True)]
        items[-1] = replace(items[-1], pages=zeros[:1].long(), ends=whole)
        x_NE = self.model.prefill(Prompts(zeros, zeros, zeros - 1, zeros, items, 1, whole[0]))
        greedy(self.model.logits(x_NE[zeros[:1].long()]))

    # ------------------------------------------------------------ a step

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> FusedStep:
        """Patch what the card has to know of the step."""
        step = FusedStep(plan, time.perf_counter(), number=self.steps)
        self.steps += 1
        self.meet(plan)
        for key in plan.dropped:
            self.places.pop(key, None)
        items = plan.items
        if len(items) > self.rows:
            raise ValueError(f"the plan has {len(items)} sequences, and this device takes {self.rows}")
        step.decodes = [i for i, item in enumerate(items) if item.count == 1]
        step.prompts = [i for i, item in enumerate(items) if item.count > 1]
        ordinals = iter(range(len(items)))
        base = step.number % RING * self.rows
        places = [base + next(ordinals) if item.sample else RING * self.rows for item in items]
        if step.decodes:
            self._stage(step, items, places)
        if step.prompts:
            with torch.cuda.stream(self.stream):  # what is copied there is in time for the step
                self._gather_prompts(step, items)
        for item, place in zip(items, places, strict=True):
            if item.sample:
                self.places[item.request_id, item.incarnation] = place
        return step

    def _stage(self, step: FusedStep, items: Sequence[PlanItem], places: Sequence[int]) -> None:
        size = self.cache.page_size
        step.bucket = self.sizes[bisect_left(self.sizes, len(step.decodes))]
        staged = self.pinned[step.number % RING].numpy()
        fields = staged[HEAD : HEAD + 4 * self.rows].reshape(4, self.rows)
        given, sources, targets, contexts = fields[:, : step.bucket]
        given[:], sources[:], targets[:], contexts[:] = 0, 0, RING * self.rows, 0
        width = 1
        for row, i in enumerate(step.decodes):
            item = items[i]
            key, context = (item.request_id, item.incarnation), item.start + 1
            self._check(item)
            if item.tokens:
                given[row] = item.tokens[0]
            else:
                given[row], sources[row] = -1, self._place(item)
            targets[row], contexts[row] = places[i], context
            pages = -(-context // size)
            if self.known[row] == (key, item.start, step.number - 1):  # in the step before, one token back
                if item.start % size == 0:
                    self.tables[row, pages - 1] = item.pages[pages - 1]
            else:
                self.tables[row, :pages] = item.pages[:pages]
            self.known[row] = key, context, step.number
            width = max(width, pages)
        staged[0] = width
        first, rows = HEAD + 4 * self.rows, len(step.decodes)
        staged[first : first + rows * width].reshape(rows, width)[:] = self.tables[:rows, :width]
        step.staged = first + rows * width

    def _gather_prompts(self, step: FusedStep, items: Sequence[PlanItem]) -> None:
        """Short whole prompts first, so that their rows are one piece; then the long ones."""
        size, device = self.cache.page_size, self.model.device
        step.prompts.sort(key=lambda i: (items[i].start > 0, items[i].count >= LONG))
        tokens: list[int] = []
        positions, slots, prompts, starts = [], [], [], [0]
        rows = sum(items[i].count for i in step.prompts)
        columns = np.zeros((4, -(-rows // ALIGNED) * ALIGNED), dtype=np.int32)
        first = 0
        for i in step.prompts:
            item = items[i]
            self._check(item)
            last = first + item.count
            tokens += item.tokens
            if len(item.tokens) < item.count:
                tokens.append(0)
                step.late_rows.append((last - 1, self._place(item)))
            position = np.arange(item.start, item.start + item.count, dtype=np.int32)
            pages = np.asarray(item.pages, dtype=np.int32)
            positions.append(position)
            slots.append(pages[position // size] * size + position % size)
            columns[3, last - 1] = 1
            if item.start:
                context = item.start + item.count
                needed = to_device(pages[: -(-context // size)].astype(np.int64), device)
                ends = to_device(np.asarray([[0, item.count], [0, context]], dtype=np.int32), device)
                prompts.append(Prompt(first, last, item.start, needed, ends))
            else:
                prompts.append(Prompt(first, last, 0))
                starts += [last] if item.count < LONG else []
            first = last
        columns[:3, :rows] = tokens, np.concatenate(positions), np.concatenate(slots)
        on_card, short = to_device(columns, device)[:, :rows], to_device(np.asarray(starts, np.int32), device)
        step.prompt_batch = Prompts(on_card[0], on_card[1], on_card[2], on_card[3], prompts, len(starts) - 1, short)

    @torch.inference_mode()
    def launch(self, step: Step, report: Report = no_report) -> Step:
        """Give the card all of it; returns before it has begun."""
        assert isinstance(step, FusedStep)
        items = step.plan.items
        base = step.number % RING * self.rows
        sampled = [i for i, item in enumerate(items) if item.sample]
        with torch.cuda.stream(self.stream):
            logits: dict[int, Tensor] = {}  # item → its row
            if step.decodes:
                self.staged[: step.staged].copy_(self.pinned[step.number % RING][: step.staged], non_blocking=True)
                self.graphs[step.bucket].replay()
                logits = {i: self.logits_BV[row] for row, i in enumerate(step.decodes)}
            if step.prompt_batch is not None:
                logits |= self._prefill(step, step.prompt_batch, sampled, base, report)
            recent, ids = self.recent[base : base + len(sampled)], self.ids[step.number % RING][: len(sampled)]
            resample([(self._sequence(items[i]), items[i].index, logits[i]) for i in sampled], recent)
            ids.copy_(recent, non_blocking=True)
            step.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.done.record(self.stream)
            if any(_scored(self._sequence(item)) for item in items):  # rare, and not worth more than a wait
                step.done.synchronize()
                step.logprobs = self._score(items, iter(ids.tolist()), *self._rows(step))
        return step

    def _rows(self, step: FusedStep) -> tuple[Tensor, dict[int, int]]:
        """The step's x_NE, decodes first, and each item's first row in it."""
        decodes = len(step.decodes)
        x_NE = self.x_BE[:decodes] if step.x_NE is None else torch.cat((self.x_BE[:decodes], step.x_NE))
        rows = {i: row for row, i in enumerate(step.decodes)}
        if step.prompt_batch is not None:
            rows |= {i: decodes + item.first for i, item in zip(step.prompts, step.prompt_batch.items, strict=True)}
        return x_NE, rows

    def _prefill(
        self, step: FusedStep, prompts: Prompts, sampled: Sequence[int], base: int, report: Report
    ) -> dict[int, Tensor]:
        """Run them, and put their greedy tokens into `recent`. Returns the logits of each item that samples."""

        def on_layer(layer: int) -> None:
            if layer in step.plan.reports:
                self._report(step, report, layer)

        for row, place in step.late_rows:
            prompts.tokens_N[row : row + 1] = self.recent[place : place + 1].clamp(min=0)
        step.x_NE = self.model.prefill(prompts, on_layer)
        of_item = dict(zip(step.prompts, prompts.items, strict=True))
        wanted = [i for i in sampled if i in of_item]
        if not wanted:
            return {}
        last_rows = to_device(np.asarray([of_item[i].last - 1 for i in wanted]), self.model.device)
        logits_SV = self.model.logits(step.x_NE[last_rows])
        ordinals = {i: base + n for n, i in enumerate(sampled)}
        targets = to_device(np.asarray([ordinals[i] for i in wanted]), self.model.device)
        self.recent.index_copy_(0, targets, greedy(logits_SV))
        return dict(zip(wanted, logits_SV, strict=True))

    def collect(self, step: Step) -> StepResult:
        """Wait for its ids."""
        assert isinstance(step, FusedStep) and step.done is not None
        step.done.synchronize()
        for reported in step.reported:
            reported.result()
        step.tokens = self.ids[step.number % RING][: sum(item.sample for item in step.plan.items)].tolist()
        flops, bytes_read = step_work(step.plan, self.model.config, self.model.dtype.itemsize)
        ended = time.perf_counter()
        seconds, self.last_end = ended - max(step.began, self.last_end), ended
        return StepResult(step.tokens, seconds, flops, bytes_read, step.logprobs)

    def begin(self, max_num_seqs: int, max_prompt: int) -> None:
        """As after a start, with graphs and plans for larger steps where they are wanted."""
        super().begin(max_num_seqs, max_prompt)
        if max_num_seqs > self.rows or max_prompt > self.max_prompt:
            self._allocate(max(max_num_seqs, self.rows), max(max_prompt, self.max_prompt))
            self.warm_up()
        self.places.clear()
        self.known = [None] * self.rows

    def _place(self, item: PlanItem) -> int:
        place = self.places.get((item.request_id, item.incarnation))
        if place is None:
            raise ValueError(f"request {item.request_id}: the plan lacks a token that was never sampled here")
        return place

    def _check(self, item: PlanItem) -> None:
        missing, pages = item.count - len(item.tokens), -(-(item.start + item.count) // self.cache.page_size)
        if missing not in (0, 1) or len(item.pages) < pages:
            have = f"{len(item.tokens)} of {item.count} tokens and {len(item.pages)} of {pages} pages"
            raise ValueError(f"request {item.request_id}: the plan has {have}")
        self._sequence(item)


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that are captured: dense where padding would cost a share that counts."""
    sizes = [1, 2, 4, *range(8, min(most, 64), 8), *range(64, most, 16)]
    return [size for size in sizes if size < most] + [most]


def greedy(logits_SV: Tensor) -> Tensor:
    """The likeliest token of each row, int32; `NO_TOKEN` where it is not finite (NaN is the largest)."""
    best = logits_SV.max(-1)
    return torch.where(best.values.isfinite(), best.indices, NO_TOKEN).int()


def to_device(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy that nobody waits for."""
    return torch.from_numpy(values).pin_memory().to(device, non_blocking=True)


def _scored(sequence: SequenceSampling) -> bool:
    return sequence.sampling.logprobs is not None or bool(sequence.scored)

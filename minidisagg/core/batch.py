"""Fills one step. The builder owns every account (tokens, sequences, pages, preemption); a policy only asks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minidisagg.core.plan import PlanItem, SeqInit
from minidisagg.core.request import Request, State

if TYPE_CHECKING:
    from minidisagg.core.engine import EngineCore


class BatchBuilder:
    """One step under construction."""

    def __init__(self, core: EngineCore, cohort: int = 0) -> None:
        """Of requests of this cohort only, so that a step that fails accuses nobody else."""
        self._core, self._cohort = core, cohort
        options = core.options
        self.tokens_left = options.max_num_batched_tokens
        self.seqs_left = options.max_num_seqs
        self.running: Sequence[Request] = tuple(core.running)  # stable while requests are added and preempted
        self.waiting: Sequence[Request] = tuple(core.waiting)
        if core.cohorts:
            self.running = [request for request in self.running if request.cohort == cohort]
            self.waiting = [request for request in self.waiting if request.cohort == cohort]
        self.items: list[PlanItem] = []
        self.new: list[SeqInit] = []
        self.members: set[Request] = set()
        self._pending = False  # pages of a victim are still being read by a link

    @property
    def empty(self) -> bool:
        """Nothing is in the step yet."""
        return not self.items

    def add(self, request: Request, limit: int | None = None) -> int:
        """Put up to `limit` tokens of the request (default: all that remain) into the step.

        Returns how many went in: 0 where it does not fit, has nothing to compute, or is in the step already.
        """
        if not self.seqs_left or not self.tokens_left or request in self.members or (limit is not None and limit <= 0):
            return 0
        if request.cohort != self._cohort:
            return 0
        if request.state is State.QUEUED:
            running = len(self._core.running)
            full = running + self._core.expected >= self._core.options.max_num_seqs
            if full or not self._core.admit(request, spare=running):
                return 0
        elif request.state is not State.RUNNING:
            return 0
        start, index, count = request.num_scheduled, len(request.output) + request.pending, 1
        if start < request.prefill_len:
            count = min(request.prefill_len - start, self.tokens_left, limit or self.tokens_left)
            if self._core.options.chunk:
                count = min(count, self._core.options.chunk)
        elif index >= request.sampling.max_tokens or request.leaves:
            return 0  # all that is to come from here is in flight
        end = start + count
        if end > len(request.pages) * self._core.page_size and not self._room(request, end):
            return 0
        if not request.introduced:
            request.introduced = True
            self.new.append(SeqInit(
                request.request_id, request.incarnation, request.prompt, list(request.output), request.sampling
            ))  # fmt: skip
        samples = end == len(request.prompt) + index
        tokens = request.tokens(start, end)
        self.items.append(PlanItem(
            request.request_id, request.incarnation, start, count, tokens, request.pages, samples, index
        ))  # fmt: skip
        self.members.add(request)
        self.tokens_left -= count
        self.seqs_left -= 1
        self._core.scheduled(request, count, samples)
        return count

    def _room(self, request: Request, end: int) -> bool:
        """Pages for positions [0, end); preempts for them where a decode would else stand still."""
        core = self._core
        missing = -(-end // core.page_size) - len(request.pages)
        while missing > 0:
            pages = core.pool.allocate(missing)
            if pages is not None:
                request.pages.extend(pages)
                break
            if self._pending:
                return False
            candidates = [r for r in core.running if not r.inflight and r not in self.members]
            victim = core.policy.evict(core, candidates)
            if victim is None:
                return False  # pending: what is in flight will free pages
            core.preempt(victim.request)
            self._pending = bool(victim.request.pages)
            if victim.request is request:
                return False
        return True

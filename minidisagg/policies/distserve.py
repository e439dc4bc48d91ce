"""DistServe (Zhong et al., OSDI'24): the decode worker pulls KV only while little of it waits there for a first step.

Checked against LLMServe/DistServe distserve/decoding_stage_scheduler.py (`should_accept`; its threshold is 0.05). Left
out: swapping. Where DistServe swaps out the newest request until pages are free, the newest is preempted here and
computed again. Pages on their way are not seen one by one: they are those that are taken and that nothing which runs
holds, so that shared prefixes make them fewer.
"""

from __future__ import annotations

from minidisagg.core.policy import Policy, Work, WorkerView


class DistServe(Policy):
    """Least loaded, as by default; what has been handed over may exceed the batch, and waits for a place in it."""

    only = "disagg"

    def __init__(self, waiting: float = 0.05) -> None:
        """`waiting`: share of the decode worker's pages that accepted requests may hold before their first step."""
        super().__init__()
        if not isinstance(waiting, int | float) or not 0 < waiting <= 1:
            raise ValueError(f"distserve: waiting must be a share of the pages, above 0 and at most 1, not {waiting}")
        self.waiting = waiting

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        """Whether its own pages are free, the mechanism knows."""
        taken = worker.num_pages - worker.free_pages
        coming = max(0, taken - sum(r.num_pages for r in worker.running)) if worker.expected else 0
        landed = sum(r.num_pages for r in worker.running if r.num_scheduled == r.prefill_len)
        return coming + landed < self.waiting * worker.num_pages


POLICY = DistServe

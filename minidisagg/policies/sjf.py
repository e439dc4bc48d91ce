"""Shortest job first with ageing: the prompt with the fewest tokens to compute, less what it has waited.

Textbook scheduling, applied to prompts as in FastServe (arXiv 2305.05920) and others; without preemption.
"""

from __future__ import annotations

from typing import Any

from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, Stage, Work, WorkerView


class Sjf(Policy):
    """Orders the prompts that wait; all else is first come, first served.

    Every prompt ages at the same rate, so that two of them never change places: uncached - ageing · (now - arrival) is
    in the order of uncached + ageing · arrival, which stays and need not be computed anew for each step.
    """

    def __init__(self, ageing: float = 1000.0) -> None:
        """`ageing`: prompt tokens that a second of waiting is worth; 0: pure shortest job first, which can starve."""
        super().__init__()
        if not isinstance(ageing, int | float) or not 0 <= ageing < float("inf"):
            raise ValueError(f"sjf: ageing must be tokens per second, at least 0, not {ageing}")
        self.ageing = ageing

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The default; a worker does not know what it has of a prompt before it begins it, so the router tells it."""
        placement = super().place(request, cluster)
        if isinstance(placement, Placement):
            request.hints["cached"] = cluster.hits(request)[placement.prefill].device
        return placement

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        """Of prompts by what remains and when they came; priorities go first as everywhere."""
        if stage != "prefill":
            return super().order(request, stage, worker)
        uncached = request.prefill_len - int(request.hints.get("cached", 0))
        return -request.priority, uncached + self.ageing * request.arrival, request.arrival


POLICY = Sjf

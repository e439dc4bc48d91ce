"""Shortest job first with ageing: the prompt with the fewest tokens to compute goes first, unless another has waited.

Folklore of queueing; no paper. All that wait age alike, so that two of them never change places: the key
`uncached - ageing * (now - queued_at)` may as well be `uncached + ageing * queued_at`, which is computed once.
"""

from __future__ import annotations

import math
from typing import Any

from minidisagg.core.policy import ClusterView, Hits, Placement, Policy, Reject, RequestView, Stage, Work, WorkerView


class Sjf(Policy):
    """`place` notes what the prefix cache has, which a worker does not see of a prompt that waits."""

    def __init__(self, ageing: float = 1000.0) -> None:
        """`ageing`: prompt tokens that a second of waiting makes up for; 0: none, and long prompts may starve."""
        super().__init__()
        if not isinstance(ageing, int | float) or not 0 <= ageing < math.inf:
            raise ValueError(f"sjf: ageing must be tokens per second, at least 0, not {ageing}")
        self.ageing = ageing

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The least loaded, as by default."""
        placement = super().place(request, cluster)
        if isinstance(placement, Placement):
            request.hints["cached"] = cluster.hits(request).get(placement.prefill, Hits(0)).device
        return placement

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        """Only prompts that have not begun compete."""
        if stage != "prefill":
            return super().order(request, stage, worker)
        uncached = request.prefill_len - int(request.hints.get("cached", 0))
        return (-request.priority, uncached + self.ageing * request.queued_at, request.arrival)


POLICY = Sjf

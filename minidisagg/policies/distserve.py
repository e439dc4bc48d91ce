"""DistServe (Zhong et al., OSDI'24): a decode worker pulls KV only while little of it waits there.

Checked against the authors' decode scheduler. Simplified: a request that has arrived joins the next step, so that those
which wait are those whose KV is on its way; their pages are what the pool lacks beside the running ones', since the
view tells their number only. That the offer's own pages are free is the core's rule. There is no swap: where a decode
finds no page, the newest request is preempted and computed again.
"""

from __future__ import annotations

from minidisagg.core.policy import Policy, Work, WorkerView


class DistServe(Policy):
    """Placed on the least loaded; pulled by the decode worker."""

    def __init__(self, waiting: float = 0.05) -> None:
        """`waiting`: the share of the pool that accepted requests may hold before they decode."""
        super().__init__()
        if not isinstance(waiting, int | float) or not 0 < waiting <= 1:
            raise ValueError(f"distserve: waiting must be a share of the pool, above 0 and at most 1, not {waiting}")
        self.waiting = waiting

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        """Nothing on its way: accept, however small the pool. Pages shared by running requests count twice."""
        if not super().accept(offer, worker):
            return False
        used = worker.num_pages - worker.free_pages - sum(request.num_pages for request in worker.running)
        return not worker.expected or used < self.waiting * worker.num_pages


POLICY = DistServe

"""Kairos ("Towards Load-Aware Prefill Deflection for Disaggregated LLM Serving", arXiv 2607.02043): prompts that wait
for a prefill worker are computed in chunks beside the decodes of a decode worker, where that is sooner.

Checked against the paper's abstract only: for each queued request the TTFT on the prefill worker is compared with that
of the largest chunks that keep the decodes of a decode worker in time. Simplified: the whole queue of the prefill
worker counts, not only what is ahead of the request; the chunk is found in closed form, since a step's time is linear
in it, and stays as it was. As in the paper the transfer counts, though here it delays the second token only.
"""

from __future__ import annotations

import math

from minidisagg.core.messages import Role
from minidisagg.core.policy import Batch, ClusterView, Placement, Policy, Reject, RequestView, WorkerStatus, WorkerView


class Deflection(Policy):
    """Placed by default; `replace` deflects, and notes the chunk for `compose`."""

    only = "disagg"
    equal_steps = True

    def __init__(self, tbt: float = 0.1, least: int = 16) -> None:
        """`tbt`: seconds that a step with decodes may take. `least`: tokens of a chunk that it is worth it for."""
        super().__init__()
        if not isinstance(tbt, int | float) or not 0 < tbt < math.inf:
            raise ValueError(f"deflection: tbt must be seconds, above 0, not {tbt}")
        if not isinstance(least, int) or least < 1:
            raise ValueError(f"deflection: least must be a number of tokens, at least 1, not {least}")
        self.tbt, self.least = tbt, least

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """By default; what was deflected before a failure is in nobody's way any more."""
        request.hints.pop("chunk", None)
        return super().place(request, cluster)

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        """To the decode worker that is soonest done with it, if that is sooner than where it waits."""
        source = cluster.workers.get(request.prefill)
        if source is None or request.prefill == request.decode:
            return None
        best = cluster.t_prefill(0, source) + cluster.t_transfer(request.prefill_len, source)
        placement = None
        for worker in cluster.candidates(Role.DECODE):
            chunk = self._chunk(worker, cluster)
            tokens = worker.queued_tokens + request.prefill_len
            if chunk >= self.least and request.prefill_len <= worker.pages_free * worker.page_size:
                seconds = math.ceil(tokens / chunk) * self.tbt
                if seconds < best:
                    best, placement = seconds, Placement(worker.name, worker.name)
                    request.hints["chunk"] = chunk
        return placement

    def _chunk(self, worker: WorkerStatus, cluster: ClusterView) -> int:
        """The most prompt tokens that a step there may have beside its decodes: each reads itself too."""
        costs = cluster.costs_of(worker)
        token = costs.predict(1, 0, 1) - costs.predict()
        return int(max(0.0, self.tbt - cluster.t_decode(worker)) / token) if token > 0 else 0

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        """All decodes, then prompts: what was deflected here takes no more than its chunk of the step."""
        for request in batch.running:
            if not request.is_prefill:
                batch.add(request)
        spent = 0
        for request in (*batch.running, *batch.waiting):
            if request.is_prefill:
                chunk = request.hints.get("chunk")
                taken = batch.add(request, None if chunk is None else int(chunk) - spent)
                if not taken:
                    break
                spent += taken


POLICY = Deflection

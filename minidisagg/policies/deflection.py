"""Prefill deflection (arXiv 2607.02043): a queued prompt moves to a decode worker that would have it done sooner.

By the paper as summarised; not checked against the authors' source. Simplified: the wait at the prefill worker is that
of its whole queue, those behind the request included; a chunk is the same in each step; nobody moves twice.
"""

from __future__ import annotations

from math import ceil, inf

from minidisagg.core.messages import Role
from minidisagg.core.policy import Batch, ClusterView, Placement, Policy, Reject, RequestView, WorkerStatus, WorkerView


class Deflection(Policy):
    """Placed on the least loaded; on every tick, what waits may leave in chunks that keep the decodes' TPOT."""

    equal_steps = True

    def __init__(self, tpot: float = 0.0) -> None:
        """`tpot`: seconds per token, of requests that have no limit of their own; 0: none, prompts move whole."""
        super().__init__()
        if not isinstance(tpot, int | float) or not 0 <= tpot < inf:
            raise ValueError(f"deflection: tpot must be seconds, at least 0, not {tpot}")
        self.tpot = tpot

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The default; a request that comes again is no longer cut."""
        request.hints.pop("chunk", None)
        return super().place(request, cluster)

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        """Its own tokens are in the queue of its prefill worker already."""
        source = cluster.workers.get(request.prefill)
        if source is None or source.role is not Role.PREFILL:
            return None
        tpot = request.slo_tpot or self.tpot or inf
        plans = {w.name: self._plan(request.prefill_len, w, cluster, tpot) for w in cluster.candidates(Role.DECODE)}
        best = min(plans, key=lambda name: plans[name][0], default="")
        if not best or plans[best][0] >= cluster.t_prefill(0, source):
            return None
        request.hints["chunk"] = plans[best][1]
        return Placement(best, best)

    def _plan(self, tokens: int, worker: WorkerStatus, cluster: ClusterView, tpot: float) -> tuple[float, int]:
        """Seconds until the first token there, and the largest chunk whose steps take at most `tpot`."""
        costs, tokens = cluster.costs_of(worker), tokens + worker.queued_tokens
        decodes = costs.predict(0, worker.decoding, worker.context_tokens)
        token = costs.predict(1) - costs.predict()
        if token <= 0 or tpot - decodes < token:
            return inf, 0  # unknown, or no room
        chunk = int(min(tokens, (tpot - decodes) / token))
        return ceil(tokens / chunk) * decodes + tokens * token, chunk

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        """First come, first served; prompts that were deflected here share one chunk per step."""
        used = 0
        for request in (*batch.running, *batch.waiting):
            chunk = int(request.hints.get("chunk", 0)) if request.is_prefill else 0
            if chunk and chunk <= used:
                continue
            added = batch.add(request, chunk - used if chunk else None)
            used += added if chunk else 0
            if not added and not request.num_scheduled:
                break  # no room: none of those behind it goes before it


POLICY = Deflection

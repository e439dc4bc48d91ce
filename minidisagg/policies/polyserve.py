"""PolyServe (Zhu et al., arXiv 2507.17769): requests that allow alike times per token share servers, filled one by one.

Checked against the paper's abstract: bins by the time per token; the most loaded server that still attains; looser
requests on tighter servers when their own are full. Simplified: an even and fixed share of the servers for each bin in
place of autoscaling; dynamic chunks and what waiting has used up of a limit are left out.
"""

from __future__ import annotations

import math

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, WorkerStatus


class PolyServe(Policy):
    """The load gradient: a server gets nothing before those in front of it are as full as they may be."""

    def __init__(self, tiers: str | float = "0.05/0.1", ttft: float = 1.0) -> None:
        """`tiers`: seconds per output token of each bin. `ttft`: seconds to the first token, where a request has no
        limit of its own."""
        super().__init__()
        try:
            self.tiers = sorted(float(tier) for tier in str(tiers).split("/"))
        except ValueError:
            self.tiers = [math.nan]
        for name, given, values in (("tiers", tiers, self.tiers), ("ttft", ttft, [ttft])):
            if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
                raise ValueError(f"polyserve: {name} must be seconds, above 0, as in 0.05/0.1, not {given}")
        self.ttft = ttft

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Its own bin, then tighter ones, whose limit it has to keep; where all are full, the fastest of its own."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return Reject(1.0, "no worker takes prefill, or none takes decode")
        limit, length = request.slo_ttft or self.ttft, request.prefill_len
        own = max(0, sum(tier <= (request.slo_tpot or math.inf) for tier in self.tiers) - 1)
        bins: list[list[WorkerStatus]] = [[] for _ in self.tiers]
        for index, worker in enumerate(decode):
            bins[index * len(bins) // len(decode)].append(worker)

        def in_time(worker: WorkerStatus) -> bool:
            return cluster.t_prefill(length, worker) <= limit

        def step(worker: WorkerStatus) -> float:
            return cluster.t_decode(worker, 1, length)

        for tier in range(own, -1, -1):
            able = [w for w in bins[tier] if step(w) <= self.tiers[tier] and (w.role == Role.DECODE or in_time(w))]
            if able:
                second = max(able, key=lambda w: (w.decoding, w.context_tokens))
                break
        else:
            second = min(bins[own] or decode, key=lambda w: (step(w), w.queued_tokens))
        if second.takes(Role.PREFILL):
            return Placement(second.name, second.name)
        late = min(prefill, key=lambda w: w.queued_tokens)
        first = max(filter(in_time, prefill), key=lambda w: w.queued_tokens, default=late)
        return Placement(first.name, second.name)


POLICY = PolyServe

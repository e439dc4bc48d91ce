"""Arrow (Wu et al., arXiv 2505.11916): requests go by predicted times, and workers change sides when one side is late.

Checked against xLLM-AI/xllm-service xllm_service/scheduler/managers/instance_mgr.cpp (`select_instance_pair_on_slo`).
There a worker changes sides when a request has been placed, or its last decode has ended; here on a tick, one at a
time, and an idle decode worker does so only while prompts wait and the others are on time, or it would change back.
"""

from __future__ import annotations

import math

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, RoleChange


class Arrow(Policy):
    """Decode workers are filled one after the other, as far as the time per token allows."""

    only = "disagg"

    def __init__(self, ttft: float = 1.0, tpot: float = 0.05) -> None:
        """`ttft`, `tpot`: seconds that requests without a limit of their own, and `rebalance`, go by."""
        super().__init__()
        for name, value in (("ttft", ttft), ("tpot", tpot)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"arrow: {name} must be seconds, above 0, not {value}")
        self.ttft, self.tpot = ttft, tpot

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The first decode worker that is in time, else the fastest; the prefill worker that has least to do.

        Where that is late and the fastest decode worker is neither needed nor busy, it computes the prompt.
        """
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return Reject(1.0, "no worker takes prefill, or none takes decode")
        first = min(prefill, key=lambda w: (cluster.t_prefill(0, w), w.queued_tokens))
        if first.takes(Role.DECODE):
            return Placement(first.name, first.name)
        limit = request.slo_tpot or self.tpot
        tpot = {w.name: cluster.t_decode(w, 1, request.prefill_len) for w in decode}
        fastest = min(decode, key=lambda w: tpot[w.name])
        second = next((w for w in decode if tpot[w.name] <= limit), fastest)
        late = cluster.t_prefill(0, first) > (request.slo_ttft or self.ttft)
        slack = tpot[fastest.name] < limit * (1 - 1 / len(decode))
        if late and slack and second is not fastest and cluster.t_prefill(0, fastest) < cluster.t_prefill(0, first):
            first = fastest
        return Placement(first.name, second.name)

    def rebalance(self, cluster: ClusterView) -> list[RoleChange]:
        """A prefill worker becomes a decode worker when all of these are late, and the others can do without it."""
        if any(worker.flipping for worker in cluster.workers.values()):
            return []
        prefill = [w for w in cluster.candidates(Role.PREFILL) if w.role == Role.PREFILL]
        decode = [w for w in cluster.candidates(Role.DECODE) if w.role == Role.DECODE]
        late = [w for w in decode if cluster.t_decode(w) > self.tpot]
        if len(prefill) > 1 and decode and len(late) == len(decode):
            backlog = math.fsum(cluster.t_prefill(0, w) for w in prefill) / len(prefill)
            if backlog < self.ttft * (1 - 1 / len(prefill)) or len(decode) < len(prefill):
                return [RoleChange(min(prefill, key=lambda w: w.queued_tokens).name, Role.DECODE)]
        idle = [w for w in decode if not w.decoding and not w.queued_tokens]
        if len(decode) > 1 and idle and not late and any(w.queued_tokens for w in prefill):
            return [RoleChange(idle[0].name, Role.PREFILL)]
        return []


POLICY = Arrow

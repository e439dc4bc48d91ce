"""Mooncake's Conductor (Qin et al., FAST'25, Algorithm 1): the place with the soonest first token, and early rejection.

From memory of the paper, the default limits too. Left out: fetching a longer prefix from another worker and
replicating hot ones, so that the time of a transfer is that of the handoff; predicting the load at the time at which
decode begins. A request is turned away when it comes, or not at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Hits, Placement, Policy, Reject, RequestView, WorkerStatus


class Plan(NamedTuple):
    """What is expected of a place, in seconds."""

    ttft: float
    tpot: float
    placement: Placement


class EarlyRejection(Policy):
    """What would be late wherever it went is turned away before it costs others their time."""

    def __init__(self, ttft: float = 30.0, tpot: float = 0.1) -> None:
        """`ttft`, `tpot`: seconds that a request without a limit of its own allows."""
        super().__init__()
        for name, value in (("ttft", ttft), ("tpot", tpot)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"early_rejection: {name} must be seconds, above 0, not {value}")
        self.ttft, self.tpot = ttft, tpot

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        """It may come back when the first token would be in time."""
        plan, ttft, tpot = self._plan(request, cluster), request.slo_ttft or self.ttft, request.slo_tpot or self.tpot
        if plan and plan.ttft > ttft:
            return Reject(plan.ttft - ttft, f"the first token would take {plan.ttft:.3g} s, more than {ttft:g} s")
        if plan and plan.tpot > tpot:
            return Reject(1.0, f"a token would take {plan.tpot:.3g} s, more than {tpot:g} s")
        return super().admit(request, cluster)

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Asked again after a failure, too: what has been taken in is served."""
        plan = self._plan(request, cluster)
        return plan.placement if plan else Reject(1.0, "no worker takes prefill, or none takes decode")

    def _plan(self, request: RequestView, cluster: ClusterView) -> Plan | None:
        """The least of queue, prefill of what is not cached there, and transfer; the decode worker that is fastest."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return None
        hits, length = cluster.hits(request), request.prefill_len

        def tpot(worker: WorkerStatus) -> float:
            return cluster.t_decode(worker, 1, length)

        def ttft(worker: WorkerStatus) -> float:
            computed = max(1, length - hits.get(worker.name, Hits(0)).device)
            moved = 0.0 if worker.takes(Role.DECODE) else cluster.t_transfer(length, worker)
            return cluster.t_prefill(computed, worker) + moved

        first = min(prefill, key=lambda w: (ttft(w), w.queued_tokens))
        second = first if first.takes(Role.DECODE) else min(decode, key=lambda w: (tpot(w), w.decoding))
        return Plan(ttft(first), tpot(second), Placement(first.name, second.name))


POLICY = EarlyRejection

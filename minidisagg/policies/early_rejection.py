"""Mooncake's Conductor (Qin et al., FAST'25, Algorithm 1): the place with the soonest first token, and early rejection.

From memory of the paper, the default limits too. With `fetch` a worker copies the longest prefix that another one has
where that takes less time than to compute it; the paper compares lengths with a threshold, and replicates hot prefixes
ahead of need, which these copies do in passing. Left out: predicting the load at the time at which decode begins. A
request is turned away when it comes, or not at all.
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

    def __init__(self, ttft: float = 30.0, tpot: float = 0.1, fetch: int = 0) -> None:
        """`ttft`, `tpot`: seconds that a request without a limit of its own allows. `fetch`: 1 to do so."""
        super().__init__()
        for name, value in (("ttft", ttft), ("tpot", tpot)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"early_rejection: {name} must be seconds, above 0, not {value}")
        if fetch not in (0, 1):
            raise ValueError(f"early_rejection: fetch must be 0 or 1, not {fetch}")
        self.ttft, self.tpot, self.fetch = ttft, tpot, fetch

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
        """The least of queue, prefill of what is not cached there, and transfers; the decode worker that is fastest."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return None
        hits, length = cluster.hits(request), request.prefill_len

        def tpot(worker: WorkerStatus) -> float:
            return cluster.t_decode(worker, 1, length)

        def held(worker: WorkerStatus) -> int:
            return hits.get(worker.name, Hits(0)).device

        best = max(cluster.workers.values(), key=held)

        def ttft(worker: WorkerStatus) -> tuple[float, str | None]:
            """And from where it fetches what it lacks."""
            moved = 0.0 if worker.takes(Role.DECODE) else cluster.t_transfer(length, worker)
            here = cluster.t_prefill(max(1, length - held(worker)), worker)
            more = held(best) - held(worker)
            there = cluster.t_transfer(more, best) + cluster.t_prefill(max(1, length - held(best)), worker)
            return (there + moved, best.name) if self.fetch and more > 0 and there < here else (here + moved, None)

        first = min(prefill, key=lambda w: (ttft(w)[0], w.queued_tokens))
        second = first if first.takes(Role.DECODE) else min(decode, key=lambda w: (tpot(w), w.decoding))
        seconds, source = ttft(first)
        return Plan(seconds, tpot(second), Placement(first.name, second.name, fetch_from=source))


POLICY = EarlyRejection

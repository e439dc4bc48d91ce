"""Early rejection of Mooncake (Qin et al., FAST'25, Algorithm 1): who would miss a limit is turned away at once.

By the paper as summarised; not checked against the authors' source. Simplified: no prefix is fetched from another
worker and none is replicated, so that the transfer in the estimate is that of the prompt's KV to the decode worker; an
estimate is 0 until steps were seen, and nobody is turned away for it.
"""

from __future__ import annotations

from math import inf

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, WorkerStatus


class EarlyRejection(Policy):
    """Places by predicted time to first token, and admits by it."""

    def __init__(self, ttft: float = 0.0, tpot: float = 0.0) -> None:
        """Limits, in seconds, of requests that have none of their own; 0: no limit."""
        super().__init__()
        for name, value in (("ttft", ttft), ("tpot", tpot)):
            if not isinstance(value, int | float) or not 0 <= value < inf:
                raise ValueError(f"early_rejection: {name} must be seconds, at least 0, not {value}")
        self.ttft, self.tpot = ttft, tpot

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        """Come back when the excess has passed. Where no worker is up, the router keeps it waiting as ever."""
        ttft, tpot = request.slo_ttft or self.ttft or inf, request.slo_tpot or self.tpot or inf
        first = min(self._first_tokens(request, cluster).values(), default=0.0)
        if first > ttft:
            return Reject(first - ttft, f"the first token would take {first:.3g} s")
        decode = cluster.candidates(Role.DECODE)
        step = min((cluster.t_decode(w, 1, request.prefill_len) for w in decode), default=0.0)
        if step > tpot:
            return Reject(1.0, f"a token would take {step:.3g} s")
        return super().admit(request, cluster)

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Soonest first token; then the fastest steps. The least loaded where the estimates tell nothing apart."""
        decode, times = cluster.candidates(Role.DECODE), self._first_tokens(request, cluster)
        if not times or not decode:
            return super().place(request, cluster)
        first = min(map(cluster.workers.__getitem__, times), key=lambda w: (times[w.name], w.queued_tokens, w.decoding))
        if first.takes(Role.DECODE):
            return Placement(first.name, first.name)
        steps = {w.name: cluster.t_decode(w, 1, request.prefill_len) for w in decode}
        return Placement(first.name, min(decode, key=lambda w: (steps[w.name], w.decoding)).name)

    def _first_tokens(self, request: RequestView, cluster: ClusterView) -> dict[str, float]:
        """Queue, what is not cached, and the way to another worker: by prefill worker."""
        hits, tokens = cluster.hits(request), request.prefill_len

        def seconds(worker: WorkerStatus) -> float:
            moves = 0.0 if worker.takes(Role.DECODE) else cluster.t_transfer(tokens, worker)
            return moves + cluster.t_prefill(tokens - hits[worker.name].device, worker)

        return {worker.name: seconds(worker) for worker in cluster.candidates(Role.PREFILL)}


POLICY = EarlyRejection

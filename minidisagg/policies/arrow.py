"""Arrow (arXiv 2505.11916): placed by predicted TTFT and TPOT; decode workers prefill, and prefill workers turn decode.

By the authors' source as summarised; not checked again. Simplified: estimates are those of the views; roles
change one at a time, by the TPOT limit of the latest request, when it was out of reach for `patience` ticks, and back
when all keep half of it for as long.
"""

from __future__ import annotations

from math import inf

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, RoleChange


class Arrow(Policy):
    """D: the first that attains, else the fastest. P: the least backlog, or a D with slack where that is too long."""

    def __init__(self, ttft: float = 0.0, tpot: float = 0.0, patience: int = 4) -> None:
        """Limits, in seconds, of requests that have none of their own; 0: no limit. `patience`: ticks."""
        super().__init__()
        for name, value in (("ttft", ttft), ("tpot", tpot)):
            if not isinstance(value, int | float) or not 0 <= value < inf:
                raise ValueError(f"arrow: {name} must be seconds, at least 0, not {value}")
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"arrow: patience must be a number of ticks, at least 1, not {patience}")
        self.ttft, self.tpot, self.patience = ttft, tpot, patience
        self._slo, self._late, self._early, self._lent = tpot or inf, 0, 0, list[str]()

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """A worker without estimates, and any where there is no limit, attains nothing: the least loaded is taken."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return super().place(request, cluster)
        ttft, tokens = request.slo_ttft or self.ttft or inf, request.prefill_len
        self._slo = tpot = request.slo_tpot or self.tpot or inf
        steps = {w.name: cluster.t_decode(w, 1, tokens) for w in decode}
        waits = {w.name: cluster.t_prefill(tokens, w) for w in (*prefill, *decode)}
        attains = [w for w in decode if 0 < steps[w.name] <= tpot < inf]
        last = attains[0] if attains else min(decode, key=lambda w: (steps[w.name], w.decoding))
        first = min(prefill, key=lambda w: (waits[w.name], w.queued_tokens, w.decoding))
        if waits[first.name] > ttft:
            sooner = [w for w in attains if waits[w.name] < waits[first.name]]
            first = min(sooner, key=lambda w: waits[w.name], default=first)
        return Placement(first.name, first.name if first.takes(Role.DECODE) else last.name)

    def rebalance(self, cluster: ClusterView) -> list[RoleChange]:
        """Patience, a margin, and one change at a time keep roles from flapping; one worker of each role stays."""
        steps = [cluster.t_decode(worker) for worker in cluster.candidates(Role.DECODE)]
        self._late = self._late + 1 if steps and min(steps) > self._slo else 0
        self._early = self._early + 1 if steps and max(steps) < self._slo / 2 else 0
        if max(self._late, self._early) < self.patience or any(w.flipping for w in cluster.workers.values()):
            return []
        prefill = [w for w in cluster.candidates(Role.PREFILL) if w.role is Role.PREFILL]
        lent = [w for w in cluster.candidates(Role.DECODE) if w.name in self._lent and w.role is Role.DECODE]
        if self._late and len(cluster.candidates(Role.PREFILL)) > 1 and prefill:
            worker, role = min(prefill, key=lambda w: w.queued_tokens), Role.DECODE
            self._lent.append(worker.name)
        elif self._early and len(steps) > 1 and lent:
            worker, role = min(lent, key=lambda w: w.decoding), Role.PREFILL
            self._lent.remove(worker.name)
        else:
            return []
        self._late = self._early = 0
        return [RoleChange(worker.name, role)]


POLICY = Arrow

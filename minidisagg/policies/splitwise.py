"""Splitwise (Patel et al., ISCA'24): pools of prompt and token machines, and a mixed pool for what overflows.

Checked in part against the authors' simulator (the test for a long queue, the order of the pools). Simplified: a decode
worker is mixed for as long as a prompt waits there, without a role change; memory is the context placed on a worker,
and a full token pool makes requests wait for pages instead of turning prompt machines mixed.
"""

from __future__ import annotations

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView


class Splitwise(Policy):
    """Prompt pool, else mixed pool, else the least loaded token machine becomes mixed."""

    def __init__(self, threshold: int = 8192) -> None:
        """`threshold`: prompt tokens from which on a worker's queue is long."""
        super().__init__()
        if not isinstance(threshold, int) or threshold < 1:
            raise ValueError(f"splitwise: threshold must be a number of tokens, at least 1, not {threshold}")
        self.threshold = threshold

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """An empty queue is never too long."""
        prompt, token = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prompt or not token:
            return super().place(request, cluster)
        for pool in prompt, [w for w in token if w.queued_tokens]:
            first = min(pool, key=lambda w: w.queued_tokens, default=None)
            if first and not (first.queued_tokens and first.queued_tokens + request.prefill_len > self.threshold):
                break
        else:
            first = min(token, key=lambda w: (w.queued_tokens, w.context_tokens))
        if first.role is Role.BOTH:
            return Placement(first.name, first.name)
        return Placement(first.name, min(token, key=lambda w: (w.queued_tokens > 0, w.context_tokens)).name)


POLICY = Splitwise

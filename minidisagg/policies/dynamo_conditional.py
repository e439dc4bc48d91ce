"""Conditional disaggregation of NVIDIA Dynamo: a prompt that is short, or mostly cached, is computed where it decodes.

By the rule as summarised; not checked against the authors' source. Simplified: the limit of the prefill queue is a
number of tokens (there: a multiple of the worker's budget, which the router's view does not have), and what goes to the
prefill workers goes to the least loaded.
"""

from __future__ import annotations

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView


class DynamoConditional(Policy):
    """Local prefill where little is left of the prompt, or where the prefill workers are behind."""

    def __init__(self, max_local: int = 2048, ratio: float = 0.7, max_queued: int = 16384, full: float = 0.9) -> None:
        """Local: fewer than `max_local` uncached tokens, and less than `ratio` of the prompt; or `max_queued` tokens
        wait at the best prefill worker. Never where contexts fill the share `full` of the decode worker's pool."""
        super().__init__()
        for name, value in (("max_local", max_local), ("max_queued", max_queued)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"dynamo_conditional: {name} must be a number of tokens, at least 0, not {value}")
        for name, share in (("ratio", ratio), ("full", full)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"dynamo_conditional: {name} must be a share, from 0 to 1, not {share}")
        self.max_local, self.ratio, self.max_queued, self.full = max_local, ratio, max_queued, full

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The decode worker with the hottest cache is asked first."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return super().place(request, cluster)
        hits = cluster.hits(request)
        hottest = max(decode, key=lambda w: (hits[w.name].device, -w.decoding, -w.context_tokens))
        left = request.prefill_len - hits[hottest.name].device
        cheap = left < self.max_local and left < self.ratio * request.prefill_len
        behind = min(w.queued_tokens for w in prefill) > self.max_queued
        full = hottest.context_tokens + request.prefill_len > self.full * hottest.num_pages * hottest.page_size
        if (cheap or behind) and not full:
            return Placement(hottest.name, hottest.name)
        return super().place(request, cluster)


POLICY = DynamoConditional

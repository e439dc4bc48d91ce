"""NVIDIA Dynamo's conditional disaggregation: a prompt that its decode worker has mostly cached is not sent elsewhere.

Checked against ai-dynamo/dynamo lib/kv-router/src/conditional_disagg.rs (`IslOrLoadPolicy`). There each of the two
conditions and the veto can be had alone; the veto is off by default, and `queue` has been 4, 16 and off. The worker
that prefills is the least loaded one here (there: as `dynamo` chooses it). Its budget is a setting: the router's views
do not show a worker's options.
"""

from __future__ import annotations

import math

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Hits, Placement, Policy, Reject, RequestView, WorkerStatus


class DynamoConditional(Policy):
    """Prefill on the decode worker if little is left to compute, or if prefill workers are behind, and it has room."""

    only = "disagg"

    def __init__(
        self, tokens: int = 2048, share: float = 0.7, queue: float = 16.0, budget: int = 2048, busy: float = 0.9
    ) -> None:
        """`tokens`, `share`: the rest of the prompt is less than both, in tokens and of its length. `queue`: prefill is
        behind if it has more than so many steps of `budget` tokens. `busy`: share of the decode worker's pages above
        which it computes no prompt."""
        super().__init__()
        given = {"tokens": tokens, "share": share, "queue": queue, "budget": budget, "busy": busy}
        for name, value in given.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"dynamo_conditional: {name} must be a number, at least 0, not {value}")
        self.tokens, self.share, self.behind, self.busy = tokens, share, queue * budget, busy

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The decode worker with the fewest blocks after this one, what it has cached taken off."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return Reject(1.0, "no worker takes prefill, or none takes decode")
        hits, length = cluster.hits(request), request.prefill_len

        def uncached(worker: WorkerStatus) -> int:
            return length - hits.get(worker.name, Hits(0)).device

        second = min(decode, key=lambda w: (w.context_tokens + uncached(w)) / w.page_size)
        first, rest = min(prefill, key=lambda w: w.queued_tokens), uncached(second)
        wanted = (rest < self.tokens and rest < self.share * length) or first.queued_tokens > self.behind
        room = second.context_tokens + length <= self.busy * second.num_pages * second.page_size
        here = second.takes(Role.PREFILL) or (wanted and room)
        return Placement((second if here else first).name, second.name)


POLICY = DynamoConditional

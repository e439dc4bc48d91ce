"""Splitwise (Patel et al., ISCA'24): a pool for prompts, one for tokens, and between them what serves both.

Checked against Mutinifni/splitwise-sim scheduler.py (`MixedPoolScheduler`) and its mixed_pool.yml (8192 tokens). Here a
worker is mixed while it has work of the other pool, there until it is empty. The memory of a request is its prompt and
what the predictor expects of its output, else its limit; there the true lengths are known.
"""

from __future__ import annotations

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, WorkerStatus


class Splitwise(Policy):
    """Its pool first, then the mixed one, then the least loaded of the other pool, which thereby becomes mixed."""

    only = "disagg"

    def __init__(self, queue: int = 8192) -> None:
        """`queue`: prompt tokens that a worker may have queued, unless one request is all that it has."""
        super().__init__()
        if not isinstance(queue, int) or queue < 1:
            raise ValueError(f"splitwise: queue must be a number of tokens, at least 1, not {queue}")
        self.queue = queue

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Both at once; where neither pool has room, one worker serves it as a colocated one would."""
        workers = [w for w in cluster.workers.values() if w.takes(w.role)]
        if not workers:
            return Reject(1.0, "no worker takes requests")
        pools = {role: [w for w in workers if _pool(w) == role] for role in Role}
        length = request.prefill_len + (request.predicted_len or request.max_tokens)
        prefill = decode = None
        for role in (Role.BOTH, Role.PREFILL):  # the better one last
            least = min(pools[role], key=_queued, default=None)
            if least and (not least.queued_tokens or least.queued_tokens + request.prefill_len <= self.queue):
                prefill = least
        for role in (Role.BOTH, Role.DECODE):
            least = min(pools[role], key=_memory, default=None)
            if least and _memory(least) + length < least.num_pages * least.page_size:
                decode = least
        prefill = prefill or min(pools[Role.DECODE], key=_queued, default=None)
        decode = decode or min(pools[Role.PREFILL], key=_memory, default=None)
        if prefill is None or decode is None:
            prefill = decode = min(workers, key=_queued)
        return Placement(prefill.name, decode.name)


def _pool(worker: WorkerStatus) -> Role:
    others = worker.decoding if worker.role == Role.PREFILL else worker.queued_tokens
    return Role.BOTH if others else worker.role


def _queued(worker: WorkerStatus) -> int:
    return worker.queued_tokens


def _memory(worker: WorkerStatus) -> int:
    """Tokens: what was placed there, or what its last word was, if that is more."""
    return max(worker.context_tokens, (worker.num_pages - worker.pages_free) * worker.page_size)


POLICY = Splitwise

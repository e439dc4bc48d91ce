"""NVIDIA Dynamo's KV router: a worker's cost is the prompt blocks that it has to compute and the blocks that it holds.

Checked against ai-dynamo/dynamo lib/kv-router/src/scheduling/selector/default.rs (`worker_logit`,
`softmax_sample_index`); the defaults are its own. Left out: tiers other than the device, taints, pinned workers, and
that blocks which running requests share count once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Hits, Placement, Policy, Reject, RequestView, WorkerStatus


class Dynamo(Policy):
    """Prompts go where the cost is least; a decode worker of its own is chosen by its load alone."""

    def __init__(
        self,
        overlap: float = 1.0,
        decay: float = 0.0,
        scale: float = 1.0,
        active: float = 0.0,
        temperature: float = 0.0,
    ) -> None:
        """`overlap`: what a cached block takes off the blocks to compute, 0 to 1; with `decay`, less where more prompts
        wait than elsewhere. `scale`: of computed against held blocks. `active`: blocks that a running request counts
        for. `temperature`: 0 takes the cheapest, ties at random; above, a softmax over the costs."""
        super().__init__()
        given = {"overlap": overlap, "decay": decay, "scale": scale, "active": active, "temperature": temperature}
        for name, value in given.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf or (name == "overlap" and value > 1):
                wanted = "from 0 to 1" if name == "overlap" else "at least 0"
                raise ValueError(f"dynamo: {name} must be a number, {wanted}, not {value}")
        self.overlap, self.decay, self.scale, self.active, self.temperature = given.values()

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """One worker for both where it takes both."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return Reject(1.0, "no worker takes prefill, or none takes decode")
        hits, length = cluster.hits(request), request.prefill_len
        least = min(worker.queued_tokens for worker in prefill)

        def load(worker: WorkerStatus) -> float:
            return (worker.context_tokens + length) / worker.page_size + self.active * worker.decoding

        def cost(worker: WorkerStatus) -> float:
            credit = self.overlap / (1.0 + self.decay * (worker.queued_tokens - least) / length)
            tokens = worker.queued_tokens + length - credit * hits.get(worker.name, Hits(0)).device
            return self.scale * max(0.0, tokens / worker.page_size) + load(worker)

        first = self._pick(prefill, cost, cluster)
        second = first if first.takes(Role.DECODE) else self._pick(decode, load, cluster)
        return Placement(first.name, second.name)

    def _pick(
        self, workers: Sequence[WorkerStatus], cost: Callable[[WorkerStatus], float], cluster: ClusterView
    ) -> WorkerStatus:
        costs = [cost(worker) for worker in workers]
        least, span = min(costs), max(costs) - min(costs)
        if not self.temperature:
            return cluster.rng.choice([w for w, its in zip(workers, costs, strict=True) if its == least])
        weights = [math.exp((least - its) / ((span or 1.0) * self.temperature)) for its in costs]
        return cluster.rng.choices(workers, weights)[0]


POLICY = Dynamo

"""The KV router of NVIDIA Dynamo: where the fewest blocks are to be computed and read.

By its documentation (potential prefill blocks, less the overlap, and active decode blocks); simplified to the caches of
the devices, without credits for host and disk. A decode worker that is not the prefill worker is chosen alike, without
the part for prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from random import Random

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView, WorkerStatus


class Dynamo(Policy):
    """Cost = weight · max(0, queued + prompt - overlap) / page size + decode blocks, prompt included."""

    def __init__(self, weight: float = 1.0, temperature: float = 0.0) -> None:
        """`weight`: of prefill against decode. `temperature` 0: the cheapest; above: softmax of the scaled costs."""
        super().__init__()
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"dynamo: {name} must be a number, at least 0, not {value}")
        self.weight, self.temperature = weight, temperature

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Twice by one rule, unless the first worker decodes too."""
        prefill, decode = cluster.candidates(Role.PREFILL), cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return super().place(request, cluster)
        hits = cluster.hits(request)

        def blocks(worker: WorkerStatus) -> float:
            return (worker.context_tokens + request.prefill_len) / worker.page_size

        def cost(worker: WorkerStatus) -> float:
            tokens = worker.queued_tokens + request.prefill_len - hits[worker.name].device
            return self.weight * max(0, tokens) / worker.page_size + blocks(worker)

        first = self._pick({w.name: cost(w) for w in prefill}, cluster.rng)
        if cluster.workers[first].takes(Role.DECODE):
            return Placement(first, first)
        return Placement(first, self._pick({w.name: blocks(w) for w in decode}, cluster.rng))

    def _pick(self, costs: Mapping[str, float], rng: Random) -> str:
        low, high = min(costs.values()), max(costs.values())
        if not self.temperature or low == high:
            return rng.choice([name for name, cost in costs.items() if cost == low])
        weights = [exp((low - cost) / ((high - low) * self.temperature)) for cost in costs.values()]
        return rng.choices(list(costs), weights)[0]


POLICY = Dynamo

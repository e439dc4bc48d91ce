"""The decision log: what each hook of a policy was asked and what it answered, as JSON lines.

    {"clock": 12.3, "who": "router", "hook": "place", "request": {…}, "cluster": {…}, "answer": {"prefill": …}}

To diff two policies offline, or to see why one did what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from minidisagg.core.messages import KVOffer
from minidisagg.core.policy import (
    Accept,
    ClusterView,
    Placement,
    Policy,
    Reject,
    RequestView,
    RoleChange,
    Stage,
    Victim,
    WorkerView,
)

if TYPE_CHECKING:
    from minidisagg.core.batch import BatchBuilder
    from minidisagg.core.request import Request

A = TypeVar("A")
Write = Callable[[bytes], object]


class Logged(Policy):
    """Asks `policy`, and writes a line per answer. `rebalance` is written where it changes something."""

    def __init__(self, policy: Policy, who: str, write: Write) -> None:
        self.policy, self.who, self.write = policy, who, write
        self.dynamic_order = policy.dynamic_order

    def admit(self, request: RequestView, cluster: ClusterView) -> Accept | Reject:
        answer = self.policy.admit(request, cluster)
        return self._log("admit", cluster.now, answer, request=_request(request), cluster=_cluster(cluster))

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        before = _cluster(cluster)  # the router acts on the answer at once
        answer = self.policy.place(request, cluster)
        return self._log("place", cluster.now, answer, request=_request(request), cluster=before)

    def rebalance(self, cluster: ClusterView) -> list[RoleChange]:
        answer = self.policy.rebalance(cluster)
        return self._log("rebalance", cluster.now, answer, cluster=_cluster(cluster)) if answer else answer

    def accept(self, offer: KVOffer, worker: WorkerView) -> bool:
        answer = self.policy.accept(offer, worker)
        return self._log("accept", worker.now, answer, request=offer.request_id, worker=_worker(worker))

    def order(self, request: Request, stage: Stage, worker: WorkerView) -> Any:
        answer = self.policy.order(request, stage, worker)
        return self._log("order", worker.now, answer, request=_request(request), stage=stage)

    def compose(self, batch: BatchBuilder, worker: WorkerView) -> None:
        before = _worker(worker)
        self.policy.compose(batch, worker)
        if batch.items or before["waiting"] or before["running"]:
            answer = [[item.request_id, item.start, item.count] for item in batch.items]
            self._log("compose", worker.now, answer, worker=before)

    def evict(self, worker: WorkerView, candidates: Sequence[Request]) -> Victim | None:
        answer = self.policy.evict(worker, candidates)
        victim = None if answer is None else answer.request.request_id
        names = [request.request_id for request in candidates]
        self._log("evict", worker.now, victim, candidates=names, worker=_worker(worker))
        return answer

    def _log(self, hook: str, now: float, answer: A, **inputs: Any) -> A:
        shown: Any = answer
        if isinstance(answer, Accept | Reject):
            shown = {"verdict": type(answer).__name__.lower(), **asdict(answer)}
        elif isinstance(answer, Placement):
            shown = asdict(answer)
        elif hook == "rebalance":
            shown = [asdict(change) for change in cast(list[RoleChange], answer)]
        line = {"clock": now, "who": self.who, "hook": hook, **inputs, "answer": shown}
        self.write(msgspec.json.encode(line, enc_hook=repr) + b"\n")
        return answer


def _request(request: RequestView | Request) -> dict[str, Any]:
    return {
        "id": request.request_id, "arrival": request.arrival, "priority": request.priority,
        "prefill_len": request.prefill_len,
    }  # fmt: skip


def _cluster(cluster: ClusterView) -> dict[str, Any]:
    workers = {name: asdict(status) for name, status in cluster.workers.items()}
    return {"waiting": cluster.waiting, "waiting_tokens": cluster.waiting_tokens, "workers": workers}


def _worker(worker: WorkerView) -> dict[str, Any]:
    return {
        "name": worker.name, "free_pages": worker.free_pages, "expected": worker.expected,
        "running": [request.request_id for request in worker.running],
        "waiting": [request.request_id for request in worker.waiting],
    }  # fmt: skip

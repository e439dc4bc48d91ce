"""The decision log: what each hook of a policy was asked and what it answered, as JSON lines (`docs/decisions.md`).

    {"version": 1, "clock": 12.3, "who": "router", "policy": "fcfs", "hook": "place", "request": {…}, "cluster": {…},
     "answer": {…}}

To diff two policies offline, or to see why one did what it did: a line has all that the hook could see, so that a fresh
policy gives the same answer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from minidisagg.core.policy import (
    Batch,
    ClusterView,
    Placement,
    Policy,
    Reject,
    RequestView,
    RoleChange,
    Stage,
    Victim,
    Work,
    WorkerView,
)

VERSION = 1  # of each line
A = TypeVar("A")
Write = Callable[[bytes], object]
REQUEST = "request_id", "arrival", "priority", "prefill_len", "max_tokens", "prefill"
CLUSTER = "waiting", "waiting_tokens", "max_waiting", "max_waiting_tokens", "workers"
WORKER = "name", "role", "options", "page_size", "num_pages", "free_pages", "expected"
ON_WORKER = "request_id", "arrival", "priority", "prefill_len", "max_tokens", "num_scheduled", "remaining", "is_prefill"


class Logged(Policy):
    """Asks `policy`, which `spec` names, and writes a line per answer."""

    asks: Policy

    def __init__(self, policy: Policy, spec: str, who: str, write: Write) -> None:
        self.asks, self.dynamic_order = policy, policy.dynamic_order
        self._head, self._write = {"who": who, "policy": spec}, write
        self._still = False  # `rebalance` wanted nothing the last time

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        return self._routed("admit", cluster, lambda: self.asks.admit(request, cluster), request=request)

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        return self._routed("place", cluster, lambda: self.asks.place(request, cluster), request=request)

    def rebalance(self, cluster: ClusterView) -> list[RoleChange]:
        return self._routed("rebalance", cluster, lambda: self.asks.rebalance(cluster))

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        answer = self.asks.accept(offer, worker)
        asked = _seen(offer, "request_id", "arrival", "priority", "prefill_len", "max_tokens")
        self._log("accept", worker.now, answer, request=asked, worker=_worker(worker))
        return answer

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        answer = self.asks.order(request, stage, worker)
        self._log("order", worker.now, answer, request=_work(request), stage=stage, worker=_seen(worker, *WORKER))
        return answer

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        before, add, adds = _worker(worker), batch.add, list[tuple[str, int | None, int]]()

        def noted(request: Work, limit: int | None = None) -> int:
            adds.append((request.request_id, limit, count := add(request, limit)))
            return count

        batch.add = noted  # type: ignore[method-assign]  # a builder is of one step
        self.asks.compose(batch, worker)
        if adds or before["waiting"] or before["running"]:
            self._log("compose", worker.now, adds, worker=before)

    def evict(self, worker: WorkerView, candidates: Sequence[Work]) -> Victim | None:
        answer = self.asks.evict(worker, candidates)
        victim = None if answer is None else answer.request.request_id
        names = [request.request_id for request in candidates]
        self._log("evict", worker.now, victim, candidates=names, worker=_worker(worker))
        return answer

    def _routed(self, hook: str, cluster: ClusterView, ask: Callable[[], A], **more: RequestView) -> A:
        dice = cluster.rng.getstate()
        answer = ask()
        shown: Any = answer
        if isinstance(answer, Reject):
            shown = {"verdict": "reject", **msgspec.to_builtins(answer)}
        elif answer is None:
            shown = {"verdict": "accept"}
        inputs: dict[str, Any] = {name: _seen(request, *REQUEST) for name, request in more.items()}
        inputs["cluster"] = _seen(cluster, *CLUSTER)
        if cluster.rng.getstate() != dice:
            inputs["rng"] = dice
        if hook != "rebalance" or answer or not self._still:  # which is asked on every tick: what it wants, and the end
            self._log(hook, cluster.now, shown, **inputs)
        if hook == "rebalance":
            self._still = not answer
        return answer

    def _log(self, hook: str, now: float, answer: object, **inputs: Any) -> None:
        line = {"version": VERSION, "clock": now, **self._head, "hook": hook, **inputs, "answer": answer}
        self._write(msgspec.json.encode(line, enc_hook=repr) + b"\n")


def _seen(of: object, *names: str) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}


def _work(request: Work) -> dict[str, Any]:
    sizes = {"output": len(request.output), "pages": len(request.pages)}
    return _seen(request, *ON_WORKER) | sizes


def _worker(worker: WorkerView) -> dict[str, Any]:
    lists = {"running": [_work(r) for r in worker.running], "waiting": [_work(r) for r in worker.waiting]}
    return _seen(worker, *WORKER) | lists

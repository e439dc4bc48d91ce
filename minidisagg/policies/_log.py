"""The decision log: what each hook of a policy was asked and what it answered, as JSON lines (`docs/decisions.md`).

    {"version": 2, "clock": 12.3, "who": "router", "policy": "fcfs", "hook": "place", "request": {…}, "cluster": {…},
     "answer": {…}}

To diff two policies offline, or to see why one did what it did: a line has all that the hook could see, so that a fresh
policy gives the same answer to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import msgspec

from minidisagg.core.policy import (
    AnyRequest,
    Batch,
    Change,
    ClusterView,
    Hits,
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

VERSION = 2  # of each line
A = TypeVar("A")
Write = Callable[[bytes], object]
CLUSTER = "waiting", "waiting_tokens", "max_waiting", "max_waiting_tokens"
SHOWN: dict[type[AnyRequest], list[str]] = {
    view: [name for name, of in inspect.getmembers(view) if isinstance(of, property)] for view in (RequestView, Work)
}
WORKER = "name", "role", "options", "page_size", "num_pages", "free_pages", "expected", "costs"


class Logged(Policy):
    """Asks `policy`, which `spec` names, and writes a line per answer."""

    asks: Policy

    def __init__(self, policy: Policy, spec: str, who: str, write: Write) -> None:
        self.asks, self.dynamic_order, self.equal_steps = policy, policy.dynamic_order, policy.equal_steps
        self._head, self._write = {"who": who, "policy": spec}, write
        self._still = False  # `rebalance` wanted nothing the last time

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        return self._routed("admit", cluster, lambda seen: self.asks.admit(request, seen), request=request)

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        return self._routed("place", cluster, lambda seen: self.asks.place(request, seen), request=request)

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        answer = self.asks.replace(request, cluster)
        if answer is not None:  # it is asked of each that waits, four times a second
            inputs = {"request": _request(request), "cluster": _cluster(cluster)}
            self._log("replace", cluster.now, _placement(answer), **inputs)
        return answer

    def rebalance(self, cluster: ClusterView) -> list[Change]:
        return self._routed("rebalance", cluster, lambda seen: list(self.asks.rebalance(seen)))

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        answer = self.asks.accept(offer, worker)
        self._log("accept", worker.now, answer, request=_request(offer), worker=_worker(worker))
        return answer

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        answer = self.asks.order(request, stage, worker)
        self._log("order", worker.now, answer, request=_request(request), stage=stage, worker=_seen(worker, *WORKER))
        return answer

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        before, add, adds = _worker(worker), batch.add, list[tuple[str, int | None, int]]()

        def noted(work: Work, limit: int | None = None) -> int:
            adds.append((work.request_id, limit, count := add(work, limit)))
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

    def _routed(self, hook: str, cluster: ClusterView, ask: Callable[[ClusterView], A], **more: RequestView) -> A:
        dice, told = cluster.rng.getstate(), dict[str, Mapping[str, Hits]]()

        def noted(request: RequestView) -> Mapping[str, Hits]:
            return told.setdefault("hits", cluster.hits(request))

        answer = ask(replace(cluster, hits=noted))
        shown: Any = _placement(answer) if isinstance(answer, Placement) else answer
        if hook == "rebalance":
            shown = [_change(one) for one in answer]  # type: ignore[attr-defined]
        if isinstance(answer, Reject):
            shown = {"verdict": "reject", **msgspec.to_builtins(answer)}
        elif answer is None:
            shown = {"verdict": "accept"}
        inputs: dict[str, Any] = {name: _request(request) for name, request in more.items()}
        inputs["cluster"] = _cluster(cluster)
        inputs |= told
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


def _placement(answer: Placement) -> dict[str, Any]:
    """The two workers, and what else it says."""
    return {name: value for name, value in asdict(answer).items() if value or name in ("prefill", "decode")}


def _change(answer: Change) -> dict[str, Any]:
    """A request by its name."""
    of = {"request": answer.request.request_id} if not isinstance(answer, RoleChange) else {}
    return {field.name: getattr(answer, field.name) for field in fields(answer)} | of


def _request(view: AnyRequest) -> dict[str, Any]:
    """All that the view shows."""
    return {name: getattr(view, name) for name in SHOWN[type(view)]}


def _cluster(cluster: ClusterView) -> dict[str, Any]:
    return {**_seen(cluster, *CLUSTER), "workers": dict(cluster.workers)}


def _worker(worker: WorkerView) -> dict[str, Any]:
    lists = {"running": [_request(r) for r in worker.running], "waiting": [_request(r) for r in worker.waiting]}
    return _seen(worker, *WORKER) | lists

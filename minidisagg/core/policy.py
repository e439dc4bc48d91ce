"""A scheduling policy: seven hooks, each with a working default, over read-only views.

The defaults are first come first served, placed on the least loaded worker. A policy overrides what it wants to
change; it asks the views and the `Batch`, and never touches the accounting. Each worker and the router have an
instance of their own: what `place` sets cannot be read in `compose` except through the request.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from minidisagg.core.messages import Role, StepOutput
from minidisagg.core.messages import WorkerOptions as WorkerOptions  # policies know it from here

Stage = Literal["prefill", "transfer", "decode"]
SMOOTHING = 0.2  # weight of the newest step in the running means


@dataclass(frozen=True)
class Reject:
    """Turn it away; the client may come back after `retry_after` seconds."""

    retry_after: float
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where a request runs. `decode=None` leaves that open until prefill ends; `decode == prefill` is colocated."""

    prefill: str
    decode: str | None


@dataclass(frozen=True)
class Victim:
    """Whose pages are to be freed; it goes back through the router and is computed again."""

    request: Work


@dataclass(frozen=True)
class RoleChange:
    """`rebalance` asks for it: finish what is there, then flip."""

    worker: str
    role: Role


class AnyRequest(Protocol):
    """What every hook sees of a request."""

    @property
    def request_id(self) -> str: ...
    @property
    def arrival(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def prefill_len(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


class RequestView(AnyRequest, Protocol):
    """What `admit` and `place` see of a request."""

    @property
    def prefill(self) -> str:
        """The worker that holds its KV, where `place` is asked again because it left `decode` open; else empty."""
        ...


def _smooth(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + SMOOTHING * (value - mean)


@dataclass
class WorkerStatus:
    """The router's picture of one worker. What it placed itself it knows at once, the rest is as old as `stats_at`."""

    name: str
    epoch: int
    role: Role
    num_pages: int
    page_size: int
    queued_tokens: int = 0  # prompt tokens placed there whose first token has not come
    decoding: int = 0  # requests placed there for decode that have not ended
    context_tokens: int = 0  # their KV tokens
    pages_free: int = 0  # FREE or CACHED, by its last Stats
    transfer_backlog: int = 0  # pieces on its outgoing links, by its last Stats
    stats_at: float = 0.0
    t_prefill_token: float = 0.0  # seconds per prompt token, smoothed over its steps; 0 until it was seen
    t_decode_step: float = 0.0  # seconds per pure decode step, smoothed
    flipping: Role | None = None  # takes nothing new until it has taken this role
    draining: bool = False  # takes nothing new until it is started again

    def learn(self, step: StepOutput) -> None:
        """Steps of one phase alone say what a token of it costs."""
        if step.prefill_tokens and not step.decode_tokens:
            self.t_prefill_token = _smooth(self.t_prefill_token, step.seconds / step.prefill_tokens)
        elif step.decode_tokens and not step.prefill_tokens:
            self.t_decode_step = _smooth(self.t_decode_step, step.seconds)

    def takes(self, role: Role) -> bool:
        """The router may send it work of this role."""
        return self.flipping is None and not self.draining and bool(self.role & role)


@dataclass
class ClusterView:
    """What the router's hooks see."""

    now: float
    workers: dict[str, WorkerStatus]
    waiting: int = 0  # requests without a first token
    waiting_tokens: int = 0  # and their prompt tokens
    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 20
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def candidates(self, role: Role) -> list[WorkerStatus]:
        """Live workers that take work of this role."""
        return [worker for worker in self.workers.values() if worker.takes(role)]

    def t_prefill(self, tokens: int, worker: WorkerStatus) -> float:
        """Estimated seconds to prefill `tokens` behind what is queued there."""
        return (worker.queued_tokens + tokens) * worker.t_prefill_token


class Work(AnyRequest, Protocol):
    """What a worker's hooks see of a request there: what is done, and what remains."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def output(self) -> Sequence[int]: ...
    @property
    def pages(self) -> Sequence[int]: ...
    @property
    def num_scheduled(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def is_prefill(self) -> bool: ...


class Batch(Protocol):
    """One step under construction, as `compose` fills it."""

    @property
    def running(self) -> Sequence[Any]:
        """`Work` that may be added, in the policy's order."""
        ...

    @property
    def waiting(self) -> Sequence[Any]:
        """`Work` that may be added, in the policy's order."""
        ...

    @property
    def tokens_left(self) -> int: ...
    @property
    def seqs_left(self) -> int: ...
    @property
    def empty(self) -> bool: ...
    def add(self, request: Any, limit: int | None = None) -> int:
        """Put up to `limit` tokens of the request (default: all that remain) into the step; how many went in."""
        ...


class WorkerView(Protocol):
    """What a worker's hooks see of it."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def now(self) -> float: ...
    @property
    def options(self) -> WorkerOptions: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def running(self) -> Sequence[Work]: ...
    @property
    def waiting(self) -> Sequence[Work]: ...
    @property
    def expected(self) -> int:
        """Requests whose KV is on its way here."""
        ...


class Policy:
    """First come, first served. Subclass it and override what you study."""

    asks: Policy | None = None  # of one that only hands questions on (it logs or checks): to whom
    dynamic_order = False  # True: sort keys change over time and are computed anew for each step

    def __init__(self, **settings: Any) -> None:
        """`settings` come from the command line (`--policy sarathi:chunk=64`)."""
        if settings:
            raise ValueError(f"policy {type(self).__name__} has no setting {', '.join(sorted(settings))}")

    # ------------------------------------------------------------ the router's hooks

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        """Take it in while the waiting requests and their prompt tokens are within bounds."""
        if cluster.waiting >= cluster.max_waiting:
            return Reject(1.0, f"{cluster.waiting} requests are waiting already")
        if cluster.waiting_tokens + request.prefill_len > cluster.max_waiting_tokens:
            return Reject(1.0, f"{cluster.waiting_tokens} prompt tokens are waiting already")
        return None

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The worker with the fewest queued tokens prefills; it decodes too if it may, else the emptiest one does."""
        prefill = cluster.candidates(Role.PREFILL)
        if not prefill:
            return Reject(1.0, "no worker takes prefill")
        first = min(prefill, key=lambda w: (w.queued_tokens, w.decoding))
        if first.takes(Role.DECODE):
            return Placement(first.name, first.name)
        decode = cluster.candidates(Role.DECODE)
        if not decode:
            return Reject(1.0, "no worker takes decode")
        return Placement(first.name, min(decode, key=lambda w: (w.decoding, w.context_tokens)).name)

    def rebalance(self, cluster: ClusterView) -> list[RoleChange]:
        """Change roles; called on every tick."""
        return []

    # ------------------------------------------------------------ a worker's hooks

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        """Grant now, if there are pages, or let the offered request wait."""
        return len(worker.running) + worker.expected < worker.options.max_num_seqs

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        """Sort key within one stage."""
        return (-request.priority, request.arrival)

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        """Fill one step: whatever is running, then whole prompts in order, fused into the same step."""
        for request in batch.running:
            batch.add(request)
        for request in batch.waiting:
            if not batch.add(request):
                break

    def evict(self, worker: WorkerView, candidates: Sequence[Work]) -> Victim | None:
        """Whose pages to free for a decode that needs one; `candidates` are neither in flight nor in the batch."""
        return Victim(max(candidates, key=lambda r: (-r.priority, r.arrival))) if candidates else None

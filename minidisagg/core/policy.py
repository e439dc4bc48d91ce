"""A scheduling policy: eight hooks, each with a working default, over read-only views.

The defaults are first come first served, placed on the least loaded worker. A policy overrides what it wants to
change; it asks the views and the `Batch`, and never touches the accounting. Each worker and the router have an
instance of their own: what `place` sets cannot be read in `compose` except through the request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Any, Literal, NamedTuple, Protocol

from msgspec.structs import replace

from minidisagg.core.costs import StepCosts
from minidisagg.core.messages import Role
from minidisagg.core.messages import WorkerOptions as WorkerOptions  # policies know it from here
from minidisagg.core.request import Work as Work
from minidisagg.core.tracked import RequestView as RequestView
from minidisagg.core.views import AnyRequest as AnyRequest

Stage = Literal["prefill", "transfer", "decode"]
HISTORY = 4  # more sequences that a decode worker may have than another before a conversation's KV moves there instead
HOOKS = "admit", "place", "replace", "rebalance", "accept", "order", "compose", "evict"  # what a policy is asked


@dataclass(frozen=True)
class Reject:
    """Turn it away; the client may come back after `retry_after` seconds."""

    retry_after: float
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where a request runs. `decode=None` leaves that open until prefill ends; `decode == prefill` is colocated.

    `codec`: how its KV goes there, one of `core/plan.py: CODECS`; None: as the cluster's does (`--kv-codec`).
    `split_at`: after how many positions `decode` goes on, be it in the middle of the prompt (DynaServe, arXiv
    2504.09285); None: after the prompt, or as many tokens later as the cluster says (`--decode-after`). `fetch_from`: a
    worker whose prefix cache is copied to `prefill` before it begins (Mooncake, FAST 2025). `returns`: what `decode`
    computes goes back to `prefill` at its end, for the next turn of a conversation.
    """

    prefill: str
    decode: str | None
    codec: str | None = None
    split_at: int | None = None
    fetch_from: str | None = None
    returns: bool = False


@dataclass(frozen=True)
class Victim:
    """Whose pages are to be freed; it goes back through the router and is computed again."""

    request: Work


@dataclass(frozen=True)
class RoleChange:
    """`rebalance` asks for it: what decodes there goes elsewhere, if there is such a place, and it flips when empty."""

    worker: str
    role: Role


@dataclass(frozen=True)
class Migration:
    """`rebalance` asks for it: a request that decodes goes on at `worker` (Llumnix, OSDI 2024).

    It stays where `worker` takes no decodes, or has no room for it now.
    """

    request: RequestView
    worker: str


@dataclass(frozen=True)
class Replica:
    """`rebalance` asks for it: `worker` gets what `source` has of the request's prompt in its prefix cache."""

    request: RequestView
    source: str
    worker: str


Change = RoleChange | Migration | Replica


class Hits(NamedTuple):
    """Prompt tokens whose KV a worker holds already on its `device`, and those after them that are in a `store`: one
    figure for all its tiers."""

    device: int
    store: int = 0


@dataclass(frozen=True)
class WorkerStatus:
    """The router's picture of one worker. What it placed itself it knows at once, the rest is as old as `stats_at`."""

    name: str
    epoch: int
    role: Role
    num_pages: int
    page_size: int
    queued_tokens: int = 0  # prompt tokens placed there whose first token has not come
    decoding: int = 0  # requests placed there for decode that have not ended
    context_tokens: int = 0  # that they were placed with: what has been decoded since is not counted
    pages_free: int = 0  # FREE or CACHED, by its last Stats
    transfer_backlog: int = 0  # pieces on its outgoing links, by its last Stats
    stats_at: float = 0.0
    costs: StepCosts = StepCosts()  # noqa: RUF009 - it is frozen
    t_kv_token: float = 0.0  # seconds on a link per token of KV that it sent; 0 until it has
    flipping: Role | None = None  # takes nothing new until it has taken this role
    draining: bool = False  # takes nothing new until it is started again

    def changed(self, **values: Any) -> None:
        """For the router alone: policies look on."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def takes(self, role: Role) -> bool:
        """The router may send it work of this role."""
        return bool(self.role & role) and self.flipping is None and not self.draining


@dataclass(frozen=True)
class ClusterView:
    """What the router's hooks see."""

    now: float
    workers: Mapping[str, WorkerStatus]  # that live
    waiting: int = 0  # requests without a first token
    waiting_tokens: int = 0  # and their prompt tokens
    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 20
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    # What each worker has of a request's prompt, by what it last told of its prefix cache.
    hits: Callable[[RequestView], Mapping[str, Hits]] = lambda _: {}
    # All that have been taken in and have not ended.
    requests: Callable[[], list[RequestView]] = list
    down: frozenset[str] = frozenset()  # workers that have died and are not back: a change that names one is dropped

    def changed(self, **values: Any) -> None:
        """For the router alone: policies look on."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def candidates(self, role: Role) -> list[WorkerStatus]:
        """Live workers that take work of this role."""
        return [w for w in self.workers.values() if w.role & role and w.takes(role)]  # seldom asks those of the other

    def anybody(self, role: Role) -> bool:
        """A live worker takes work of this role."""
        return any(w.role & role and w.takes(role) for w in self.workers.values())

    def costs_of(self, worker: WorkerStatus) -> StepCosts:
        """Its own; of what it has not done yet (a decode worker no prompt), the mean of those that have."""
        own = worker.costs
        if own.prefill_tokens and (own.decode_seqs or own.context_tokens):
            return own
        every = [other.costs for other in self.workers.values()]
        if not own.prefill_tokens and (prefill := [c.prefill_tokens for c in every if c.prefill_tokens]):
            own = replace(own, prefill_tokens=fsum(prefill) / len(prefill))
        if not (own.decode_seqs or own.context_tokens):
            decode = [c for c in every if c.decode_seqs or c.context_tokens]
            if decode:
                seqs, context = (fsum(getattr(c, n) for c in decode) for n in ("decode_seqs", "context_tokens"))
                own = replace(own, decode_seqs=seqs / len(decode), context_tokens=context / len(decode))
        return own

    def t_prefill(self, tokens: int, worker: WorkerStatus) -> float:
        """Estimated seconds until `tokens` of a prompt are computed there, behind what is queued."""
        tokens += worker.queued_tokens
        return self.costs_of(worker).predict(tokens, 0, tokens)  # each reads itself, too

    def t_decode(self, worker: WorkerStatus, more: int = 0, tokens: int = 0) -> float:
        """Estimated seconds of a decode step there, with `more` requests of together `tokens` of context. Too few where
        answers are long: the router does not count what has been decoded."""
        return self.costs_of(worker).predict(0, worker.decoding + more, worker.context_tokens + tokens)

    def t_transfer(self, tokens: int, source: WorkerStatus) -> float:
        """Estimated seconds that the KV of `tokens` takes from there on an idle link."""
        return tokens * source.t_kv_token


class Batch(Protocol):
    """One step under construction, as `compose` fills it."""

    @property
    def running(self) -> Sequence[Work]:
        """Those that may be added, in the policy's order."""
        ...

    @property
    def waiting(self) -> Sequence[Work]:
        """Those that may be added, in the policy's order."""
        ...

    @property
    def tokens_left(self) -> int: ...
    @property
    def seqs_left(self) -> int: ...
    @property
    def empty(self) -> bool: ...
    def add(self, work: Work, limit: int | None = None) -> int:
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

    @property
    def costs(self) -> StepCosts:
        """What its steps have taken: `costs.predict` says what one will."""
        ...


class Policy:
    """First come, first served. Subclass it and override what you study."""

    asks: Policy | None = None  # of one that only hands questions on (it logs or checks): to whom
    file = ""  # the user's own, from which it was loaded
    dynamic_order = False  # True: sort keys change over time and are computed anew for each step

    only: Literal["", "colocated", "disagg"] = ""  # the one mode in which its rule comes into play, if it is one

    equal_steps = True  # `compose` does alike while nothing comes, ends or needs a page: a simulator then asks once

    def __init_subclass__(cls, **more: Any) -> None:
        """What another `compose` does, only its author can say."""
        super().__init_subclass__(**more)
        if "compose" in vars(cls) and "equal_steps" not in vars(cls):
            cls.equal_steps = False

    def __init__(self, **settings: Any) -> None:
        """`settings` come from the command line (`--policy sarathi:chunk=64`)."""
        if settings:
            raise ValueError(f"policy {type(self).__name__} has no setting {', '.join(sorted(settings))}")

    @property
    def replaces(self) -> bool:
        """It has a `replace` of its own, or whom it asks has."""
        return type(self).replace is not Policy.replace if self.asks is None else self.asks.replaces

    # ------------------------------------------------------------ the router's hooks

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        """Take it in while the waiting requests and their prompt tokens are within bounds."""
        if cluster.waiting >= cluster.max_waiting:
            return Reject(1.0, f"{cluster.waiting} requests are waiting already")
        if cluster.waiting_tokens + request.prefill_len > cluster.max_waiting_tokens:
            return Reject(1.0, f"{cluster.waiting_tokens} prompt tokens are waiting already")
        return None

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """The worker with the fewest queued tokens prefills; it decodes too if it may, else the emptiest one does.

        Of a conversation, what was decoded goes back. What a worker has of the prompt it computes the sooner; but one
        that decodes, too, would be sent all that share a beginning: its queue does not say how busy it is.
        """
        prefill = cluster.candidates(Role.PREFILL)
        if not prefill:
            return Reject(1.0, "no worker takes prefill")
        alone = len(prefill) > 1 and not any(w.takes(Role.DECODE) for w in prefill)
        hits = cluster.hits(request) if alone else {}
        first = min(prefill, key=lambda w: (w.queued_tokens - hits.get(w.name, Hits(0)).device, w.decoding))
        if first.takes(Role.DECODE):
            return Placement(first.name, first.name)
        decode = cluster.candidates(Role.DECODE)
        if not decode:
            return Reject(1.0, "no worker takes decode")
        hits = cluster.hits(request) if request.session and len(decode) > 1 else {}
        pull = HISTORY / request.prefill_len
        second = min(decode, key=lambda w: (w.decoding - pull * hits.get(w.name, Hits(0)).device, w.context_tokens))
        return Placement(first.name, second.name, returns=bool(request.session))

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        """Another place for a request whose prefill has not begun, as far as the router knows; None: leave it.

        Asked on every tick of each that waits, the one that came first first, if a policy has this hook.
        """
        return None

    def rebalance(self, cluster: ClusterView) -> Sequence[Change]:
        """Change roles, move what decodes, copy what is asked for often; called on every tick."""
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

"""The JSON of /admin/state and of each event of /admin/events: the server fills it, the monitor reads it.

Whoever changes a field changes `VERSION`, and says in docs/formats.md what has changed.
"""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import UNSET, Struct, UnsetType

VERSION = 2
Stage = Literal["waiting", "prefilling", "transferring", "decode_waiting", "decoding"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # of a request that has not ended


class Record(Struct, frozen=True, kw_only=True):
    """`seq` counts all records of a server; `clock` is the front end's monotonic clock, in seconds."""

    seq: int
    clock: float


class StepRecord(Record, frozen=True, kw_only=True):
    """One device step of a worker: how long it took, and what was in it."""

    worker: str
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    context_tokens: int


class EndRecord(Record, frozen=True, kw_only=True):
    """A request that has ended. Times in seconds; `stages`, by name of `measure.records.STAGES`, add up to `e2e`."""

    id: str
    finish: str
    prompt_tokens: int
    output_tokens: int
    ttft: float
    tpot: float
    max_itl: float
    e2e: float
    stages: dict[str, float]


class EventRecord(Record, frozen=True, kw_only=True):
    """Something an operator wants to know: a death, a restart, a change of role or policy."""

    text: str


class LinkState(Struct, frozen=True, kw_only=True):
    """What a worker has sent to a peer; counters, but for `backlog`."""

    peer: str
    kind: str
    transfers: int  # pieces
    bytes: int
    seconds: float  # of sending, summed over pieces
    queue_seconds: float  # for which pieces waited to be sent
    failures: int
    backlog: int  # pieces in flight
    late: int = 0  # that the real link brought later than the emulated one would have


class StoreState(Struct, frozen=True, kw_only=True):
    """What a worker has had of the store, and given to it; counters, of pages where nothing else is said."""

    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    read_seconds: float  # in which its thread was at work
    write_seconds: float
    dropped: int  # not saved: the worker was ending
    corrupt: int  # not what had been written, and removed
    failing: str  # why nothing is written for now; empty where it is


class WorkerStats(Struct, frozen=True, kw_only=True):
    """What a worker last said of itself: `core/messages.py: Stats` has the same fields, and says what they are."""

    role: int
    steps: int
    running: int
    waiting: int
    held: int
    offers: int
    queued_tokens: int
    pages_free: int
    pages_live: int
    pages_cached: int
    pages_inflight: int
    pages_quarantined: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    flying: int
    links: list[LinkState]
    busy_seconds: float
    flops: float
    bytes_read: float
    cpu_seconds: float
    clock: float
    store: StoreState | None = None  # None: there is no store


class WorkerState(Struct, frozen=True, kw_only=True):
    """One worker: what the router knows and what it last said of itself."""

    name: str
    role: str
    state: Literal["up", "flipping", "draining", "down"]
    epoch: int
    pid: int | UnsetType = UNSET  # left out while it is down: 0 would be the reader's own process group
    device: str = ""
    queued_tokens: int = 0
    decoding: int = 0
    stats: WorkerStats | None = None  # None: it has not said anything yet, or is down


class RequestState(Struct, frozen=True, kw_only=True):
    """One request that has not ended, without its text."""

    id: str
    stage: Stage
    age: float  # seconds
    in_stage: float  # seconds; where nobody has watched, as far as the router knows
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    workers: list[str]
    incarnation: int


class Snapshot(Struct, frozen=True, kw_only=True):
    """The cluster at one moment. `clock` is monotonic, in seconds; counters run from the server's start."""

    version: int
    clock: float
    model: str
    mode: str
    policy: str
    link: str
    paused: bool
    waiting: int
    waiting_tokens: int
    prompt_tokens: int
    generation_tokens: int
    restarts: int
    migrations: int = 0  # requests that went on elsewhere while they decoded
    stages: dict[str, int]  # requests in each
    oldest: dict[str, float]  # seconds for which some request has been in each
    workers: list[WorkerState]
    requests: list[RequestState]  # the oldest first
    latencies: dict[str, list[float]]  # [p50, p90, p99] in seconds of ttft, tpot and itl over the last minute
    seq: int  # of the newest record
    steps: list[StepRecord] = []  # of events only: what is new since the event before
    ends: list[EndRecord] = []
    events: list[EventRecord] = []

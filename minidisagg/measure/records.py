"""What a run leaves behind: a `RequestRecord` per request, a `StepRecord` per step, and one `RunRecord` around them.

The real bench and the simulator fill in the same records, so everything computed from them is computed once.
"""

from __future__ import annotations

from msgspec import Struct, field

STAGES = ("queue", "prefill", "transfer", "decode_wait", "decode")
ORACLE = "oracle: the policies knew how long each output would be"  # the mark of a run
COMPLETED = ("stop", "length")  # how a request ends that has not failed
UNSENT, NOT_SENT = (
    "unsent",
    "not sent: an earlier turn of its session failed",
)  # how its later turns end, and their error
TRIM = 0.05  # of the requests, at each end of a run: they are not measured (see `stats`)


class RequestRecord(Struct, kw_only=True, omit_defaults=True):
    """One request as its client saw it. All times are seconds on one clock, the same for all requests of a run."""

    request_id: str
    index: int = 0  # its place in the workload: pairs it with the same request of another run
    turn: int = 0  # in its session, whose turns have indices in a row
    scheduled: float  # when it should have been sent: TTFT counts from here
    sent: float
    prompt_len: int
    output_len: int  # asked for
    token_times: list[float] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""  # one line; empty where the request completed
    rejected: bool = False  # refused by admission (its `error` says how)
    stages: dict[str, float] = field(default_factory=dict)  # seconds by name of `STAGES`; they add up to e2e
    handoffs: list[int] = field(default_factory=list)  # i: the gap between tokens i and i + 1 is a handoff
    completion_tokens: int | None = None  # by the server's count, where that is not the number of `token_times`
    cached_tokens: int = 0  # prompt tokens that were prefix hits
    workers: list[str] = field(default_factory=list)  # in the order in which they served it
    engine_id: str = ""  # its name in steps, timeline and decisions, where that is not `request_id`

    @property
    def ok(self) -> bool:
        """Whether it completed: neither failed nor rejected, and with at least one token."""
        return not self.error and not self.rejected and bool(self.token_times)


class StepRecord(Struct, kw_only=True, omit_defaults=True):
    """One step of a worker, or several equal ones that a simulation took at once. Times as in `RequestRecord`."""

    worker: str
    begin: float
    seconds: float  # of all of them
    prefill_tokens: int = 0  # of each
    decode_tokens: int = 0
    context_tokens: int = 0  # KV tokens that the last of them read
    requests: list[str] = field(default_factory=list)  # that it gave a token, by `engine_id`
    ends: list[float] = field(default_factory=list)  # of equal steps, each one's; else empty


class WorkerRecord(Struct, kw_only=True):
    """One worker's counters over the run, and what its device was measured to do at best."""

    name: str
    role: str
    busy_s: float = 0.0
    flops: float = 0.0
    bytes_read: float = 0.0  # weights and KV that its steps had to read
    cpu_s: float = 0.0
    peak_flops: float = 0.0  # per second, measured (large matmul); 0: not known
    peak_bytes: float = 0.0  # per second, measured (large read); 0: not known


class LinkRecord(Struct, kw_only=True):
    """What went over one link, or to or from the store. `seconds` is time on the wire, summed over transfers."""

    source: str
    dest: str
    kind: str = ""
    bytes: int = 0
    seconds: float = 0.0
    transfers: int = 0
    failures: int = 0


class RunRecord(Struct, kw_only=True):
    """One repetition of one side of a comparison."""

    label: str  # the side's name in tables: "colocated", "disagg", "disagg sarathi", …
    mode: str = ""
    policy: str = ""
    model: str = ""
    workload: str = ""  # a line for a person
    request_rate: float | str = "inf"  # a string where infinite, as JSON has no other way
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    repetition: int = 0
    num_warmups: int = 0  # so many requests, the first by schedule, are warm-up
    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)  # none where nobody has kept them
    workers: list[WorkerRecord] = field(default_factory=list)
    links: list[LinkRecord] = field(default_factory=list)
    frontend_cpu_share: float = 0.0  # of one core
    wall_s: float = 0.0
    marks: list[str] = field(default_factory=list)  # remarks to print with the result, e.g. "quick preset"

    def __repr__(self) -> str:
        """In short: a run has a million times."""
        return f"<run of {self.label or 'a side'} {self.policy}: {len(self.requests)} requests, {self.wall_s:.1f} s>"

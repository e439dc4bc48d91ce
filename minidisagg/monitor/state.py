"""What the events of a server add up to. A pure function of them: no clock but theirs, no input but `State.apply`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

BUCKET = 0.25  # seconds of steps in one column of the interference strip
BUCKETS = 1200  # kept per worker
SPAN = 5.0  # seconds over which rates are taken
MINUTE = 60.0  # seconds over which goodput is taken, as the server does for percentiles
KEPT = 500  # ended requests, and lines of the log
STAGES = ("waiting", "prefilling", "transferring", "decode_waiting", "decoding")
PARTS = ("queue", "prefill", "transfer", "decode_wait", "decode")  # of an ended request's time


# ---------------------------------------------------------------- GET /admin/events


class Step(Struct, frozen=True):
    """One device step of a worker, `seconds` long."""

    seq: int
    clock: float
    worker: str
    seconds: float
    prefill_tokens: int
    decode_tokens: int


class End(Struct, frozen=True):
    """A request that has ended. Times in seconds; `stages` add up to `e2e`."""

    seq: int
    clock: float
    id: str
    finish: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    tpot: float = 0.0
    max_itl: float = 0.0
    e2e: float = 0.0
    stages: dict[str, float] = {}


class Event(Struct, frozen=True):
    """A line of the server's log."""

    seq: int
    clock: float
    text: str


class Link(Struct, frozen=True):
    """What a worker has sent to a peer; counters."""

    peer: str
    kind: str = ""
    transfers: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failures: int = 0
    backlog: int = 0  # pieces in flight


class Stats(Struct, frozen=True):
    """What a worker last said of itself."""

    running: int = 0
    waiting: int = 0
    offers: int = 0
    pages_free: int = 0
    pages_live: int = 0
    pages_cached: int = 0
    pages_inflight: int = 0
    pages_quarantined: int = 0
    links: list[Link] = []
    busy_seconds: float = 0.0
    clock: float = 0.0


class Worker(Struct, frozen=True):
    """One worker; without `stats` it has not said anything yet, or is down."""

    name: str
    role: str = ""
    state: str = "down"
    epoch: int = 0
    pid: int = 0
    stats: Stats | None = None


class Snapshot(Struct, frozen=True):
    """One event. Fields that the monitor does not show are skipped."""

    clock: float
    seq: int
    model: str = ""
    mode: str = ""
    policy: str = ""
    link: str = ""
    paused: bool = False
    prompt_tokens: int = 0
    generation_tokens: int = 0
    stages: dict[str, int] = {}
    oldest: dict[str, float] = {}
    workers: list[Worker] = []
    latencies: dict[str, list[float]] = {}
    steps: list[Step] = []
    ends: list[End] = []
    events: list[Event] = []


_decoder = msgspec.json.Decoder(Snapshot)


def decode(data: bytes | str) -> Snapshot:
    """One event's JSON. Raises `ValueError` on anything else."""
    return _decoder.decode(data)


# ---------------------------------------------------------------- what they add up to


@dataclass(slots=True)
class Bucket:
    """Steps of one worker that ended in `[index, index + 1) * BUCKET`: the longest of them, and all their tokens."""

    index: int
    longest: Step
    tokens: int


@dataclass(slots=True)
class Window:
    """Counters over the last `SPAN` seconds."""

    samples: deque[tuple[float, Sequence[float]]] = field(default_factory=deque)

    def add(self, clock: float, values: Sequence[float]) -> None:
        """A reading; an old one changes nothing, and one that went down starts anew."""
        if self.samples:
            last, before = self.samples[-1]
            if clock <= last:
                return
            if any(new < old for new, old in zip(values, before, strict=True)):
                self.samples.clear()
        self.samples.append((clock, values))
        while len(self.samples) > 2 and self.samples[1][0] <= clock - SPAN:
            self.samples.popleft()

    def rates(self) -> list[float]:
        """Increase per second of each counter; empty before there are two readings."""
        if len(self.samples) < 2:
            return []
        (first, old), (last, new) = self.samples[0], self.samples[-1]
        return [(b - a) / (last - first) for a, b in zip(old, new, strict=True)]


class State:
    """Everything that is shown. `slo`: limits in milliseconds of ttft, tpot, itl (the longest gap) and e2el."""

    def __init__(self, slo: Mapping[str, float] | None = None) -> None:
        self.slo = dict(slo or {})
        self.now: Snapshot | None = None
        self._clear()

    def _clear(self) -> None:
        self.ends: deque[End] = deque(maxlen=KEPT)
        self.log: deque[Event] = deque(maxlen=KEPT)
        self.buckets: dict[str, deque[Bucket]] = {}
        self.tokens = Window()  # prompt, generation
        self.busy: dict[tuple[str, int], Window] = {}  # by worker and epoch: seconds in steps
        self.links: dict[tuple[str, int, str], Window] = {}  # by source, epoch and peer: bytes, pieces, seconds
        self._minute: deque[tuple[float, bool]] = deque()  # (clock, met the SLO) of each end
        self._met = 0
        self._since = float("inf")  # the first that is known
        self._seq = 0

    def apply(self, snapshot: Snapshot) -> None:
        """One event more. Records that were seen before (after a reconnection) count once."""
        if self.now is not None and _is_another(self.now, snapshot):
            self._clear()
        self.now = snapshot
        for step in snapshot.steps:
            if step.seq > self._seq:
                self._step(step)
        for end in snapshot.ends:
            if end.seq > self._seq:
                self._end(end)
        self.log += (event for event in snapshot.events if event.seq > self._seq)
        self._seq = max(self._seq, snapshot.seq)
        self._since = min(self._since, snapshot.clock)
        while self._minute and self._minute[0][0] <= snapshot.clock - MINUTE:
            self._met -= self._minute.popleft()[1]
        self.tokens.add(snapshot.clock, (snapshot.prompt_tokens, snapshot.generation_tokens))
        self._count(snapshot.workers)

    def _step(self, step: Step) -> None:
        buckets = self.buckets.setdefault(step.worker, deque(maxlen=BUCKETS))
        index, tokens = int(step.clock / BUCKET), step.prefill_tokens + step.decode_tokens
        if buckets and buckets[-1].index == index:
            last = buckets[-1]
            last.tokens += tokens
            if step.seconds > last.longest.seconds:
                last.longest = step
        else:
            buckets.append(Bucket(index, step, tokens))
        self._since = min(self._since, step.clock)

    def _end(self, end: End) -> None:
        self.ends.append(end)
        self._since = min(self._since, end.clock)
        if end.finish != "abort":  # its client did not want it any more: neither good nor bad
            met = self.meets(end)
            self._minute.append((end.clock, met))
            self._met += met

    def _count(self, workers: list[Worker]) -> None:
        busy, links = {}, {}
        for worker in workers:
            if (stats := worker.stats) is not None:
                key = worker.name, worker.epoch
                busy[key] = self.busy.get(key) or Window()
                busy[key].add(stats.clock, (stats.busy_seconds,))
                for link in stats.links:
                    links[*key, link.peer] = self.links.get((*key, link.peer)) or Window()
                    links[*key, link.peer].add(stats.clock, (link.bytes, link.transfers, link.seconds))
        self.busy, self.links = busy, links

    # ------------------------------------------------------------ what the panels show

    def meets(self, end: End) -> bool:
        """Whether the request was answered within all limits."""
        seen = {"ttft": end.ttft, "tpot": end.tpot, "itl": end.max_itl, "e2el": end.e2e}
        return end.finish in ("stop", "length") and all(seen[n] * 1000 <= limit for n, limit in self.slo.items())

    def goodput(self) -> tuple[float, float, int]:
        """Of the last minute: good requests per second, their share, and how many have ended."""
        if self.now is None or not self._minute:
            return 0.0, 0.0, 0
        seconds = min(MINUTE, max(1.0, self.now.clock - self._since))
        return self._met / seconds, self._met / len(self._minute), len(self._minute)

    def worker_tokens(self, name: str) -> float:
        """Tokens per second over the last whole buckets of `SPAN`."""
        if self.now is None:
            return 0.0
        end = int(self.now.clock / BUCKET)
        begin, total = end - int(SPAN / BUCKET), 0
        for bucket in reversed(self.buckets.get(name, ())):
            if bucket.index < begin:
                break
            total += bucket.tokens * (bucket.index < end)
        return total / SPAN

    def worker_busy(self, worker: Worker) -> float | None:
        """Share of the time that it spends in steps."""
        window = self.busy.get((worker.name, worker.epoch))
        rates = window.rates() if window else []
        return rates[0] if rates else None

    def link_rates(self, worker: Worker, link: Link) -> tuple[float, float | None]:
        """Bytes per second now, and seconds per piece (now, else since the start; None: it never sent one)."""
        window = self.links.get((worker.name, worker.epoch, link.peer))
        rates = window.rates() if window else []
        if rates and rates[1]:
            return rates[0], rates[2] / rates[1]
        return 0.0, link.seconds / link.transfers if link.transfers else None


def _is_another(before: Snapshot, after: Snapshot) -> bool:
    """Whether another server answers: its records count from 0, or the same epoch is another process."""
    pids = {(worker.name, worker.epoch): worker.pid for worker in before.workers if worker.pid}
    others = (pids.get((worker.name, worker.epoch), worker.pid) != worker.pid for worker in after.workers if worker.pid)
    return after.seq < before.seq or any(others)

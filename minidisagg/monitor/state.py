"""What the events of a server add up to. A pure function of them: no clock but theirs, no input but `State.apply`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec
from msgspec import Struct

from minidisagg.admin_schema import VERSION, EndRecord, EventRecord, LinkState, Snapshot, StepRecord, WorkerState
from minidisagg.formats import check_version

BUCKET = 0.25  # seconds of steps in one column of the interference strip
BUCKETS = 1200  # kept per worker
SPAN = 5.0  # seconds over which rates are taken
MINUTE = 60.0  # seconds over which goodput is taken, as the server does for percentiles
KEPT = 500  # ended requests, and lines of the log
Mark = tuple[float, str, str]  # a change: when, of which worker (empty: of the mode), to what
DEFAULT_SLO = {"ttft": 2500.0, "tpot": 60.0}  # milliseconds; for a small model on two cores
NOTHING = Snapshot(
    version=VERSION,
    clock=0.0,
    model="",
    mode="",
    policy="",
    link="",
    paused=False,
    waiting=0,
    waiting_tokens=0,
    prompt_tokens=0,
    generation_tokens=0,
    restarts=0,
    stages={},
    oldest={},
    workers=[],
    requests=[],
    latencies={},
    seq=-1,
)


_decoder = msgspec.json.Decoder(Snapshot)


class Head(Struct, frozen=True):
    """What an event of any version has; the first had no `version`."""

    clock: float
    version: int | None = None


def decode(data: bytes | str) -> Snapshot:
    """One event's JSON. Raises `VersionError` where it is another version's, and `ValueError` on anything else."""
    try:
        check_version("the event", msgspec.json.decode(data, type=Head).version, VERSION)
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"not an event of the monitor: {error}") from None


def slo_values(end: EndRecord) -> dict[str, float]:
    """What the limits of an SLO are about."""
    return {"ttft": end.ttft, "tpot": end.tpot, "itl": end.max_itl, "e2el": end.e2e}


# ---------------------------------------------------------------- what they add up to


@dataclass(slots=True)
class Bucket:
    """Steps of one worker that ended in `[index, index + 1) * BUCKET`: the longest of them, and all their tokens."""

    index: int
    longest: StepRecord
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
        self.slo, self.default_slo = dict(slo or DEFAULT_SLO), not slo
        self.now = NOTHING  # until the first event
        self._clear()

    def _clear(self) -> None:
        self.ends: deque[EndRecord] = deque(maxlen=KEPT)
        self.log: deque[EventRecord] = deque(maxlen=KEPT)
        self.marks: deque[Mark] = deque(maxlen=KEPT)  # changes of roles, and of the mode
        self.buckets: dict[str, deque[Bucket]] = {}
        self.tokens = Window()  # prompt, generation
        # By worker and epoch: seconds in steps; by these and peer: bytes, pieces, seconds of sending.
        self.windows: dict[tuple[object, ...], Window] = {}
        self._minute: deque[tuple[float, bool]] = deque()  # (clock, met the SLO) of each end
        self._since = float("inf")  # what ended before is not known
        self._seq = 0

    def apply(self, snapshot: Snapshot) -> None:
        """One event more. Records that were seen before (after a reconnection) count once."""
        if _is_another(self.now, snapshot):
            self._clear()
        else:
            self.marks += _changes(self.now, snapshot)
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
            self._minute.popleft()
        self.tokens.add(snapshot.clock, (snapshot.prompt_tokens, snapshot.generation_tokens))
        self._count(snapshot.workers)

    def _step(self, step: StepRecord) -> None:
        buckets = self.buckets.setdefault(step.worker, deque(maxlen=BUCKETS))
        index, tokens = int(step.clock / BUCKET), step.prefill_tokens + step.decode_tokens
        if not buckets or buckets[-1].index != index:
            buckets.append(Bucket(index, step, 0))
        buckets[-1].tokens += tokens
        buckets[-1].longest = max(buckets[-1].longest, step, key=lambda step: step.seconds)

    def _end(self, end: EndRecord) -> None:
        self.ends.append(end)
        self._since = min(self._since, end.clock)
        if end.finish != "abort":  # its client did not want it any more: neither good nor bad
            self._minute.append((end.clock, self.meets(end)))

    def _count(self, workers: list[WorkerState]) -> None:
        before, self.windows = self.windows, {}
        for worker in workers:
            if (stats := worker.stats) is not None:
                counters: dict[tuple[str, ...], tuple[float, ...]] = {(): (stats.busy_seconds,)}
                counters |= {(link.peer,): (link.bytes, link.transfers, link.seconds) for link in stats.links}
                for of, values in counters.items():
                    key = worker.name, worker.epoch, *of
                    self.windows[key] = before.get(key) or Window()
                    self.windows[key].add(stats.clock, values)

    # ------------------------------------------------------------ what the panels show

    def meets(self, end: EndRecord) -> bool:
        """Whether the request was answered within all limits."""
        return end.finish in ("stop", "length") and all(
            slo_values(end)[n] * 1000 <= limit for n, limit in self.slo.items()
        )

    def goodput(self) -> tuple[float, float, int]:
        """Of the last minute: good requests per second, their share, and how many have ended."""
        met, ended = sum(met for _, met in self._minute), len(self._minute)
        return met / min(MINUTE, max(1.0, self.now.clock - self._since)), met / max(1, ended), ended

    def worker_tokens(self, name: str) -> float:
        """Tokens per second over the last whole buckets of `SPAN`."""
        end, count = int(self.now.clock / BUCKET), int(SPAN / BUCKET)
        recent = islice(reversed(self.buckets.get(name, ())), count + 1)
        return sum(bucket.tokens for bucket in recent if end - count <= bucket.index < end) / SPAN

    def worker_busy(self, worker: WorkerState) -> float | None:
        """Share of the time that it spends in steps."""
        window = self.windows.get((worker.name, worker.epoch), Window())
        return next(iter(window.rates()), None)

    def link_rates(self, worker: WorkerState, link: LinkState) -> tuple[float, float | None, float | None]:
        """Bytes per second now; while it sends, and seconds per piece (now, else since the start; None: never)."""
        window = self.windows.get((worker.name, worker.epoch, link.peer), Window())
        moved, pieces, seconds = window.rates() or (0.0, 0.0, 0.0)
        sent = (moved, pieces, seconds) if pieces else (link.bytes, link.transfers, link.seconds)
        return moved, sent[0] / sent[2] if sent[2] else None, sent[2] / sent[1] if sent[1] else None


def _changes(before: Snapshot, after: Snapshot) -> Iterator[Mark]:
    old, new = ({"": one.mode, **{worker.name: worker.role for worker in one.workers}} for one in (before, after))
    for name, role in new.items():
        if role and old.get(name) not in ("", None, role):
            yield after.clock, name, role


def _is_another(before: Snapshot, after: Snapshot) -> bool:
    """Whether another server answers: its records count from 0, or the same epoch is another process."""
    pids = {(worker.name, worker.epoch): worker.pid for worker in before.workers if worker.pid}
    others = (pids.get((worker.name, worker.epoch), worker.pid) != worker.pid for worker in after.workers if worker.pid)
    return after.seq < before.seq or any(others)

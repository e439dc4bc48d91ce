"""What has happened lately, in bounded memory: steps, ended requests, events. The monitor reads what is new."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

from minidisagg.admin_schema import EndRecord, EventRecord, Record, StepRecord
from minidisagg.core.messages import Envelope, Role, Stats, StepOutput
from minidisagg.core.tracked import Emit
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name

KEPT = 4096  # of each kind
TRACED = 2048  # messages of workers, and ends of requests, for a trace
WINDOW = 60  # seconds over which percentiles are taken
STALE = 0.5  # seconds for which they are not computed anew
R = TypeVar("R", bound="Record")


@dataclass
class Timing:
    """When the tokens of one request came."""

    prompt_tokens: int
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    output_tokens: int = 0
    max_itl: float = 0.0
    workers: list[str] = field(default_factory=list)  # where it was, in order: the router's own list
    prefilled: tuple[str, str] = ("", "")  # by which worker and role


class Recent:
    """Percentiles over the last minute, right to half a percent, at a cost that does not grow with the rate.

    Values are counted by their logarithm, in a table for each second.
    """

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, Counter[int]]] = deque(maxlen=WINDOW)

    def add(self, value: float, now: float) -> None:
        """A duration in seconds."""
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append((int(now), Counter()))
        self._seconds[-1][1][round(100 * math.log(max(value, 1e-6)))] += 1

    def percentiles(self, now: float) -> list[float]:
        """[p50, p90, p99]; empty where there is none."""
        counts: Counter[int] = Counter()
        for second, more in self._seconds:
            if second > now - WINDOW:
                counts.update(more)
        sizes = sorted(counts)
        upto = list(accumulate(counts[size] for size in sizes))
        ranks = [int(share * counts.total()) for share in (0.5, 0.9, 0.99)]
        return [math.exp(sizes[bisect_right(upto, rank)] / 100) for rank in ranks] if sizes else []


class History:
    """Listens to one front end."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.reports: dict[str, deque[Stats]] = {}
        self.served_at = self.progress_at = time.monotonic()  # when each stage last had a worker, and work went on
        self.steps: deque[StepRecord] = deque(maxlen=KEPT)
        self.ends: deque[EndRecord] = deque(maxlen=KEPT)
        self.log: deque[EventRecord] = deque(maxlen=KEPT)
        self.messages: deque[tuple[Envelope, float]] = deque(maxlen=TRACED)
        self.emits: deque[tuple[Emit, float]] = deque(maxlen=TRACED)  # the ends
        self.recent = {name: Recent() for name in ("ttft", "tpot", "itl")}
        self._latencies: dict[str, list[float]] = {}
        self._computed = -math.inf
        self._seq = 0
        frontend.observers.append(self)

    def on_message(self, envelope: Envelope, now: float) -> None:
        """Steps are kept, and the latest reports."""
        step = envelope.body
        self.messages.append((envelope, now))
        if isinstance(step, StepOutput):
            self.steps.append(
                StepRecord(
                    seq=self._next(),
                    clock=now,
                    worker=envelope.source,
                    seconds=step.seconds,
                    prefill_tokens=step.prefill_tokens,
                    decode_tokens=step.decode_tokens,
                    context_tokens=step.context_tokens,
                )
            )
        elif isinstance(step, Stats):
            reports = self.reports.setdefault(envelope.source, deque(maxlen=20))  # of five seconds
            if not self.missing():
                self.served_at = now
            idle = not self.frontend.requests or self.frontend.paused
            if idle or (reports and reports[-1].steps != step.steps):
                self.progress_at = now
            reports.append(step)

    def missing(self) -> list[str]:
        """The stages that no worker takes now."""
        return [role_name(role) for role in (Role.PREFILL, Role.DECODE) if not self.frontend.view.candidates(role)]

    def on_end(self, timing: Timing, emit: Emit, now: float) -> None:
        """A request of the HTTP server has ended."""
        self.emits.append((emit, now))
        times = emit.times
        stages = {} if times is None else {name: getattr(times, name) for name in times.__struct_fields__}
        e2e = stages.pop("e2e", 0.0)
        first = timing.first - timing.arrived if timing.first else 0.0
        tpot = (timing.last - timing.first) / (timing.output_tokens - 1) if timing.output_tokens > 1 else 0.0
        self.ends.append(
            EndRecord(
                seq=self._next(),
                clock=now,
                id=emit.request_id,
                finish=emit.finish,
                prompt_tokens=timing.prompt_tokens,
                output_tokens=timing.output_tokens,
                ttft=first,
                tpot=tpot,
                max_itl=timing.max_itl,
                e2e=e2e,
                stages=stages,
            )
        )
        if timing.output_tokens:
            self.recent["ttft"].add(first, now)
        if timing.output_tokens > 1:
            self.recent["tpot"].add(tpot, now)

    def on_emit(self, emit: Emit, now: float) -> None:
        """`on_end` has more to go by."""

    def on_event(self, text: str) -> None:
        """Kept too."""
        self.log.append(EventRecord(seq=self._next(), clock=time.monotonic(), text=text))

    def since(self, seq: int) -> dict[str, list[Any]]:
        """Records after `seq`, oldest first."""
        return {"steps": _after(self.steps, seq), "ends": _after(self.ends, seq), "events": _after(self.log, seq)}

    @property
    def seq(self) -> int:
        """Of the newest record."""
        return self._seq

    def latencies(self, now: float) -> dict[str, list[float]]:
        """[p50, p90, p99] in seconds of TTFT, TPOT and ITL over the last minute; empty lists without data."""
        if now - self._computed > STALE:
            self._latencies = {name: recent.percentiles(now) for name, recent in self.recent.items()}
            self._computed = now
        return self._latencies

    def _next(self) -> int:
        self._seq += 1
        return self._seq


def _after(records: deque[R], seq: int) -> list[R]:
    found: list[R] = []
    for record in reversed(records):
        if record.seq <= seq:
            break
        found.append(record)
    return found[::-1]

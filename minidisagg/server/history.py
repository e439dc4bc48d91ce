"""What has happened lately, in bounded memory: steps, ended requests, events. The monitor reads what is new."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from msgspec import Struct

from minidisagg.core.messages import Envelope, StepOutput
from minidisagg.core.router import Emit
from minidisagg.runtime.frontend import Frontend

KEPT = 4096  # of each kind
WINDOW = 60.0  # seconds over which percentiles are taken
R = TypeVar("R", bound="Record")


class Record(Struct, frozen=True, kw_only=True):
    """`seq` counts all records of a server; `clock` is the front end's monotonic clock, in seconds."""

    seq: int
    clock: float


class StepRecord(Record, frozen=True, kw_only=True):
    """One device step: how long it took, and what was in it."""

    worker: str
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    context_tokens: int


class EndRecord(Record, frozen=True, kw_only=True):
    """A request that has ended. Times in seconds; `stages` add up to `e2e`."""

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


@dataclass
class Timing:
    """When the tokens of one request came."""

    prompt_tokens: int
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    output_tokens: int = 0
    max_itl: float = 0.0


class History:
    """Listens to one front end."""

    def __init__(self, frontend: Frontend) -> None:
        self.steps: deque[StepRecord] = deque(maxlen=KEPT)
        self.ends: deque[EndRecord] = deque(maxlen=KEPT)
        self.log: deque[EventRecord] = deque(maxlen=KEPT)
        self.gaps: deque[tuple[float, float]] = deque(maxlen=4 * KEPT)  # (clock, inter-token latency)
        self._seq = 0
        frontend.observers.append(self)

    def on_message(self, envelope: Envelope, now: float) -> None:
        """Steps are kept."""
        step = envelope.body
        if isinstance(step, StepOutput):
            self.steps.append(StepRecord(
                seq=self._next(), clock=now, worker=envelope.source, seconds=step.seconds,
                prefill_tokens=step.prefill_tokens, decode_tokens=step.decode_tokens,
                context_tokens=step.context_tokens,
            ))  # fmt: skip

    def on_end(self, timing: Timing, emit: Emit, now: float) -> None:
        """A request of the HTTP server has ended."""
        times = emit.times
        stages = {} if times is None else {name: getattr(times, name) for name in times.__struct_fields__}
        e2e = stages.pop("e2e", 0.0)
        first = timing.first - timing.arrived if timing.first else 0.0
        tpot = (timing.last - timing.first) / (timing.output_tokens - 1) if timing.output_tokens > 1 else 0.0
        self.ends.append(EndRecord(
            seq=self._next(), clock=now, id=emit.request_id, finish=emit.finish, prompt_tokens=timing.prompt_tokens,
            output_tokens=timing.output_tokens, ttft=first, tpot=tpot, max_itl=timing.max_itl, e2e=e2e, stages=stages,
        ))  # fmt: skip

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
        recent = [end for end in self.ends if end.clock > now - WINDOW and end.output_tokens]
        return {
            "ttft": _percentiles(end.ttft for end in recent),
            "tpot": _percentiles(end.tpot for end in recent if end.output_tokens > 1),
            "itl": _percentiles(gap for clock, gap in self.gaps if clock > now - WINDOW),
        }

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


def _percentiles(values: Iterable[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9, 0.99)] if ordered else []

"""One timeline of a run over all processes, as a Chrome trace that https://ui.perfetto.dev opens.

Each worker is a process with a track of steps, one of sends and one of receives per peer, and counters of its queues;
each request is a track of the front end, with its stages one after the other. A piece of KV is an arrow from its send
to its receive. On every track what overlaps nests, to the nanosecond.

Workers stamp what they report with their own clocks. A report arrives a little later than its stamp says, so a worker's
clock is ahead of the front end's by stamp - arrival and the delay: the largest difference, of the least delayed message
of hundreds, is taken.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from minidisagg.core.messages import Envelope, Hello, PieceSpan, PieceSpans, Role, Stats, StepOutput
from minidisagg.core.tracked import Emit, StageTimes
from minidisagg.formats import check_version
from minidisagg.measure.records import STAGES, StepRecord

VERSION = 1
SLACK = 1000  # ns by which a piece may begin before the one ahead of it on its link has ended
Incarnation = tuple[str, int]  # worker, epoch
Event = dict[str, Any]


class Tracks:
    """Gives each span a track; what overlaps there, as pieces with an emulated latency do, gets another beside it."""

    def __init__(self) -> None:
        self.names: list[Event] = []
        self._ends: dict[tuple[int, str], dict[int, int]] = {}  # (process, name) → per track, when it is free again

    def place(self, pid: int, name: str, begin: int, end: int, slack: float = SLACK) -> tuple[int, int, int]:
        """The track, and the span in ns on it: moved by up to `slack` to where the track is free, and never empty."""
        tracks = self._ends.setdefault((pid, name), {})
        tid = next((tid for tid, free in tracks.items() if free - begin <= slack), 0)
        if not tid:
            tid = len(self.names) + 1
            beside = f" ({len(tracks) + 1})" if tracks else ""
            self.names.append(_name("thread_name", pid, tid, name + beside))
        begin = max(begin, tracks.get(tid, begin))
        tracks[tid] = end = max(end, begin + 2)
        return tid, begin, end


class Timeline:
    """An observer of one front end; `events` at the end."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.ahead: dict[Incarnation, float] = {}  # seconds that a worker's clock is ahead of this one
        self._roles: dict[Incarnation, Role] = {}
        self._steps: list[tuple[Incarnation, StepOutput]] = []
        self._stats: list[tuple[Incarnation, Stats]] = []
        self._spans: list[tuple[Incarnation, PieceSpan]] = []
        self._ends: list[tuple[float, Emit, StageTimes]] = []
        self._news: list[tuple[float, str]] = []

    # ------------------------------------------------------------ hearing

    def on_message(self, envelope: Envelope, now: float) -> None:
        """Keep what a worker reports, and what its stamp says of its clock."""
        who, body = (envelope.source, envelope.epoch), envelope.body
        if isinstance(body, Hello | Stats):
            if self._roles.setdefault(who, body.role) != body.role:  # by an operator's order, or the policy's
                self._news.append((now, f"{who[0]} is {body.role.name.lower()} now"))
            self._roles[who] = body.role
        if isinstance(body, StepOutput | Stats):
            self.ahead[who] = max(self.ahead.get(who, -math.inf), body.clock - now)
        if isinstance(body, StepOutput):
            self._steps.append((who, body))
        elif isinstance(body, Stats):
            self._stats.append((who, body))
        elif isinstance(body, PieceSpans):
            self._spans += [(who, span) for span in body.spans]

    def on_emit(self, emit: Emit, now: float) -> None:
        """Keep the ends of requests."""
        if emit.finish and emit.times is not None:
            self._ends.append((now, emit, emit.times))

    def on_event(self, text: str) -> None:
        """Keep deaths, restarts, and what operators do."""
        self._news.append((time.monotonic(), text))

    # ------------------------------------------------------------ telling

    def events(self, first_pid: int = 1) -> list[Event]:
        """Trace events; timestamps in microseconds of the front end's clock. The front end is process `first_pid`."""
        workers = sorted({who for who, _ in self._steps} | self._roles.keys() | self.ahead.keys())
        pids = {who: first_pid + 1 + n for n, who in enumerate(workers)}
        prefix, tracks = self.label + " " if self.label else "", Tracks()
        out = [_name("process_name", first_pid, 0, prefix + "requests")]
        for who, pid in pids.items():
            first = min(epoch for name, epoch in workers if name == who[0])
            restarted = f" (epoch {who[1]})" if who[1] > first else ""  # while this was listening
            out.append(_name("process_name", pid, 0, f"{prefix}{who[0]}{restarted}"))
            if who in self._roles:  # which names need not tell: the same workers are either side of a benchmark
                labels = {"labels": self._roles[who].name.lower()}
                out.append({"name": "process_labels", "ph": "M", "pid": pid, "tid": 0, "args": labels})
        for who, step in self._steps:
            end = self._here(who, step.clock)
            kind = step_kind(step)
            # A step that was planned ahead may begin before news of the one before it were stamped.
            where = tracks.place(pids[who], "steps", end - _ns(step.seconds), end, slack=math.inf)
            args = {
                "prefill_tokens": step.prefill_tokens,
                "decode_tokens": step.decode_tokens,
                "context_tokens": step.context_tokens,
                "requests": [token.request_id for token in step.tokens],
            }
            out.append(_span(kind, "step", pids[who], *where, args))
        for who, stats in self._stats:
            at = self._here(who, stats.clock)
            out.append(_counter("queue", pids[who], at, waiting=stats.waiting, running=stats.running, held=stats.held))
            pages = {state: getattr(stats, f"pages_{state}") for state in ("live", "inflight", "cached", "quarantined")}
            out.append(_counter("pages", pids[who], at, **pages))
        for who, span in sorted(self._spans, key=lambda of: of[1].begun):  # of one worker that is one clock
            out += self._piece(who, span, pids[who], tracks)
        for now, emit, times in sorted(self._ends, key=lambda end: end[1].request_id):
            out += _request(first_pid, now, emit, times, tracks)
        out += self._waiting(first_pid)
        for now, text in self._news:
            out.append({"name": text, "ph": "i", "s": "p", "pid": first_pid, "tid": 0, "ts": _ns(now) / 1e3})
        return out + tracks.names

    def steps(self) -> list[StepRecord]:
        """All steps, in seconds of the front end's clock and by the order of their news."""
        found = []
        for who, step in self._steps:
            ahead = self.ahead.get(who, 0.0)
            found.append(
                StepRecord(
                    worker=who[0], begin=step.clock - ahead - step.seconds, seconds=step.seconds,
                    prefill_tokens=step.prefill_tokens, decode_tokens=step.decode_tokens,
                    context_tokens=step.context_tokens, requests=[token.request_id for token in step.tokens],
                    ends=[end - ahead for end in step.ends],
                )
            )  # fmt: skip
        return found

    def _here(self, who: Incarnation, stamp: float) -> int:
        return _ns(stamp - self.ahead.get(who, 0.0))

    def _piece(self, who: Incarnation, piece: PieceSpan, pid: int, tracks: Tracks) -> list[Event]:
        source, dest = (who[0], piece.peer) if piece.send else (piece.peer, who[0])
        name = f"sends to {dest}" if piece.send else f"receives from {source}"
        tid, begin, end = tracks.place(pid, name, self._here(who, piece.begun), self._here(who, piece.ended))
        args = {
            "request": piece.request_id,
            "bytes": piece.nbytes,
            "seq": piece.seq,
            "ok": piece.ok,
            "queued_ms": 1e3 * (piece.begun - piece.queued),
        }
        span = _span(f"KV of {piece.request_id}", "transfer", pid, tid, begin, end, args)
        flow = {
            "name": "KV",
            "cat": "transfer",
            "ph": "s" if piece.send else "f",
            "pid": pid,
            "tid": tid,
            "ts": (begin if piece.send else end - 1) / 1e3,  # what is at a span's end is outside of it
            "id": f"{self.label}/{source}/{dest}/{piece.link_epoch}/{piece.seq}",
        }
        return [span, flow if piece.send else flow | {"bp": "e"}]

    def _waiting(self, pid: int) -> list[Event]:
        """The router's waiting requests: those that have arrived, and have no first token yet."""
        changes = [(now - times.e2e, 1) for now, _, times in self._ends]
        changes += [(now - times.e2e + times.queue + times.prefill, -1) for now, _, times in self._ends]
        changes.sort()
        waiting = itertools.accumulate(change for _, change in changes)
        return [_counter("waiting", pid, _ns(at), requests=n) for (at, _), n in zip(changes, waiting, strict=True)]


def step_kind(step: StepOutput | StepRecord) -> str:
    """What was in it."""
    return "prefill" if not step.decode_tokens else "mixed" if step.prefill_tokens else "decode"


def trace_document(events: list[Event]) -> dict[str, Any]:
    """A trace file. `otherData` is where the format has whatever its viewers do not know."""
    return {"otherData": {"version": VERSION}, "displayTimeUnit": "ms", "traceEvents": events}


def write_timeline(path: Path, timelines: list[Timeline]) -> None:
    """All of them side by side in one file."""
    write_events(path, (e for n, timeline in enumerate(timelines) for e in timeline.events(first_pid=1 + 100 * n)))


def write_events(path: Path, events: Iterable[Event]) -> None:
    """A trace file."""
    path.write_bytes(msgspec.json.encode(trace_document(list(events))))


def read_timeline(path: Path) -> list[Event]:
    """The events of a trace file. Raises `OSError`, `VersionError`, and `MsgspecError` or `KeyError` for others."""
    document = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    check_version(path, document.get("otherData", {}).get("version"), VERSION)
    return list(document["traceEvents"])


def _request(pid: int, now: float, emit: Emit, times: StageTimes, tracks: Tracks) -> list[Event]:
    name, begin = f"request {emit.request_id}", now - times.e2e
    tid, first, last = tracks.place(pid, name, _ns(begin), _ns(now))
    args = {
        "finish": emit.finish,
        "output_tokens": emit.index + len(emit.tokens),
        "cached_tokens": emit.cached_tokens,
    }
    out = [_span(name, "request", pid, tid, first, last, args)]
    for stage in STAGES:
        begin, start = begin + getattr(times, stage), first
        first = min(_ns(begin), last)
        if first > start:
            out.append(_span(stage, "stage", pid, tid, start, first, {}))
    return out


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _span(name: str, kind: str, pid: int, tid: int, begin: int, end: int, args: dict[str, Any]) -> Event:
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": begin / 1e3,
        "dur": (end - begin) / 1e3,
        "args": args,
    }


def _counter(name: str, pid: int, at: int, **values: int) -> Event:
    return {"name": name, "ph": "C", "pid": pid, "tid": 0, "ts": at / 1e3, "args": values}

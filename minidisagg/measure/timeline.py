"""One timeline of a run over all processes, as a Chrome trace that https://ui.perfetto.dev opens.

Each worker is a process with a track of steps, one of sends and one of receives, and counters of its queues; each
request is a track of the front end, with its stages one after the other. A piece of KV is an arrow from its send to its
receive.

Workers stamp what they report with their own clocks. A report arrives a little later than its stamp says, so a worker's
clock is ahead of the front end's by stamp - arrival and the delay: the largest difference, of the least delayed message
of hundreds, is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from minidisagg.core.messages import Envelope, Hello, Piece, Pieces, Stats, StepOutput
from minidisagg.core.router import Emit

STAGES = ("queue", "prefill", "transfer", "decode_wait", "decode")
STEPS, SENDS, RECEIVES = 1, 2, 3
TRACKS = {STEPS: "steps", SENDS: "sends", RECEIVES: "receives"}  # of a worker
Incarnation = tuple[str, int]  # worker, epoch
Event = dict[str, Any]


class Timeline:
    """An observer of one front end; `events` at the end."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self._ahead: dict[Incarnation, float] = {}  # seconds that a worker's clock is ahead of this one
        self._roles: dict[Incarnation, str] = {}
        self._steps: list[tuple[Incarnation, StepOutput]] = []
        self._stats: list[tuple[Incarnation, Stats]] = []
        self._pieces: list[tuple[Incarnation, Piece]] = []
        self._ends: list[tuple[float, Emit]] = []

    # ------------------------------------------------------------ hearing

    def on_message(self, envelope: Envelope, now: float) -> None:
        """Keep what a worker reports, and what its stamp says of its clock."""
        who, body = (envelope.source, envelope.epoch), envelope.body
        if isinstance(body, Hello):
            self._roles[who] = body.role.name.lower()
        elif isinstance(body, StepOutput):
            self._hear(who, body.clock, now)
            self._steps.append((who, body))
        elif isinstance(body, Stats):
            self._hear(who, body.clock, now)
            self._stats.append((who, body))
        elif isinstance(body, Pieces):
            self._pieces += [(who, piece) for piece in body.pieces]

    def on_emit(self, emit: Emit, now: float) -> None:
        """Keep the ends of requests."""
        if emit.finish and emit.times is not None:
            self._ends.append((now, emit))

    def on_event(self, text: str) -> None:
        """Deaths and restarts show as processes that end and begin."""

    def _hear(self, who: Incarnation, stamp: float, now: float) -> None:
        self._ahead[who] = max(self._ahead.get(who, stamp - now), stamp - now)

    # ------------------------------------------------------------ telling

    def events(self, first_pid: int = 1) -> list[Event]:
        """Trace events; timestamps in microseconds of the front end's clock. The front end is process `first_pid`."""
        workers = sorted({who for who, _ in self._steps} | self._roles.keys() | self._ahead.keys())
        pids = {who: first_pid + 1 + n for n, who in enumerate(workers)}
        prefix = self.label + " " if self.label else ""
        out = [_name("process_name", first_pid, 0, prefix + "requests")]
        for who, pid in pids.items():
            restarted = f" (epoch {who[1]})" if who[1] > 1 else ""
            out.append(_name("process_name", pid, 0, f"{prefix}{who[0]}{restarted}"))
            out += [
                _name("thread_name", pid, t, n) for t, n in ((STEPS, "steps"), (SENDS, "sends"), (RECEIVES, "receives"))
            ]
        for who, step in self._steps:
            end = self._here(who, step.clock)
            kind = "prefill" if not step.decode_tokens else "mixed" if step.prefill_tokens else "decode"
            out.append(_span(kind, "step", pids[who], STEPS, end - step.seconds, end, {
                "prefill_tokens": step.prefill_tokens, "decode_tokens": step.decode_tokens,
                "context_tokens": step.context_tokens, "requests": [token.request_id for token in step.tokens],
            }))  # fmt: skip
        for who, stats in self._stats:
            at = self._here(who, stats.clock)
            out.append(_counter("queue", pids[who], at, waiting=stats.waiting, running=stats.running, held=stats.held))
            out.append(_counter(
                "pages", pids[who], at, live=stats.pages_live, inflight=stats.pages_inflight,
                cached=stats.pages_cached, quarantined=stats.pages_quarantined,
            ))  # fmt: skip
        for who, piece in self._pieces:
            out += self._piece(who, piece, pids[who])
        for track, (now, emit) in enumerate(sorted(self._ends, key=lambda end: end[1].request_id), 1):
            out += _request(first_pid, track, now, emit)
        return out

    def _here(self, who: Incarnation, stamp: float) -> float:
        return stamp - self._ahead.get(who, 0.0)

    def _piece(self, who: Incarnation, piece: Piece, pid: int) -> list[Event]:
        begun, ended = self._here(who, piece.begun), self._here(who, piece.ended)
        source, dest = (who[0], piece.peer) if piece.send else (piece.peer, who[0])
        track = SENDS if piece.send else RECEIVES
        span = _span(f"KV of {piece.request_id}", "transfer", pid, track, begun, ended, {
            "request": piece.request_id, "bytes": piece.nbytes, "seq": piece.seq, "ok": piece.ok,
            "queued_ms": 1e3 * (piece.begun - piece.queued),
        })  # fmt: skip
        arrow = f"{self.label}/{source}/{dest}/{piece.link_epoch}/{piece.seq}"
        flow = {
            "name": "KV", "cat": "transfer", "ph": "s" if piece.send else "f", "pid": pid, "tid": track,
            "ts": 1e6 * (begun if piece.send else ended), "id": arrow,
        }  # fmt: skip
        return [span, flow if piece.send else flow | {"bp": "e"}]


def write_timeline(path: Path, timelines: list[Timeline]) -> None:
    """All of them side by side in one file."""
    events: list[Event] = []
    for n, timeline in enumerate(timelines):
        events += timeline.events(first_pid=1 + 100 * n)
    path.write_bytes(msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"}))


def _request(pid: int, track: int, now: float, emit: Emit) -> list[Event]:
    times = emit.times
    assert times is not None
    begin = now - times.e2e
    out = [
        _name("thread_name", pid, track, f"request {emit.request_id}"),
        _span(f"request {emit.request_id}", "request", pid, track, begin, now, {
            "finish": emit.finish, "output_tokens": emit.index + len(emit.tokens), "cached_tokens": emit.cached_tokens,
        }),
    ]  # fmt: skip
    for stage in STAGES:
        seconds = getattr(times, stage)
        if seconds > 0:
            out.append(_span(stage, "stage", pid, track, begin, begin + seconds, {}))
        begin += seconds
    return out


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _span(name: str, kind: str, pid: int, tid: int, begin: float, end: float, args: dict[str, Any]) -> Event:
    return {
        "name": name, "cat": kind, "ph": "X", "pid": pid, "tid": tid, "ts": 1e6 * begin, "dur": 1e6 * (end - begin),
        "args": args,
    }  # fmt: skip


def _counter(name: str, pid: int, at: float, **values: int) -> Event:
    return {"name": name, "ph": "C", "pid": pid, "tid": 0, "ts": 1e6 * at, "args": values}

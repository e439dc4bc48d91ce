"""The load: requests at their scheduled times (open loop) or a few at a time (closed loop), and what came of each.

A later turn of a session is due when its user has thought, after the last token of the turn before, and has its prompt
by then: all tokens of that turn, and new ones. In a closed loop it is sessions that are a few at a time; one that waits
for its user is one of them.

TTFT counts from the scheduled arrival, so a client that falls behind cannot flatter the engine; how late it sent is
recorded too.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from heapq import heappop, heappush

import msgspec
from msgspec.structs import replace

from minidisagg.core.messages import Hello, SamplingParams, Stats, StoreStats
from minidisagg.core.tracked import Emit
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import NOT_SENT, UNSENT, LinkRecord, RequestRecord, WorkerRecord
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name
from minidisagg.workload.lengths import WorkItem
from minidisagg.workload.multiturn import first_turns, rests

LEAD = 0.05  # seconds between the start and the first arrival
Progress = Callable[[int], None]


class LoadGenerator:
    """One run of a workload on one cluster. Prompts are filled in; all outputs have their full length."""

    def __init__(
        self, frontend: Frontend, items: Sequence[WorkItem], seed: int, on_done: Progress | None, slo: SLO | None = None
    ) -> None:
        self.frontend = frontend
        self.seed = seed
        self.on_done = on_done
        self.slos = {f"slo_{name}": getattr(slo, name, None) for name in ("ttft", "tpot")}  # milliseconds
        self.longest = max(item.output_len for item in items)
        self.records: list[RequestRecord] = []
        self._rests = rests(items)
        self._waiting = deque(first_turns(items))  # sessions for which no time is set
        self._due: list[tuple[float, int, WorkItem]] = []  # a heap, by time
        self._left = len(items)
        self._news = asyncio.Event()  # something is due, or has ended

    async def run(self, max_concurrency: int | None) -> list[RequestRecord]:
        """Send everything and wait for every end."""
        started = time.monotonic() + LEAD
        if max_concurrency is None:
            for item in self._waiting:
                self._plan(item, started + item.arrival_s)
            self._waiting.clear()
        for _ in range(min(max_concurrency or 0, len(self._waiting))):
            self._plan(self._waiting.popleft(), time.monotonic())
        while self._left:
            self._news.clear()
            wait = self._due[0][0] - time.monotonic() if self._due else None
            if wait is not None and wait <= 0.0:
                scheduled, _, item = heappop(self._due)
                self._send(item, scheduled)
                await asyncio.sleep(0)  # a burst leaves room for what comes back
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._news.wait()
        return self.records

    def _plan(self, item: WorkItem, scheduled: float) -> None:
        heappush(self._due, (scheduled, item.index, item))
        self._news.set()

    def _record(self, item: WorkItem, scheduled: float) -> RequestRecord:
        """Of a request that is sent now."""
        record = RequestRecord(
            request_id=str(item.index),
            index=item.index,
            turn=item.turn,
            scheduled=scheduled,
            sent=time.monotonic(),
            prompt_len=item.prompt_len if item.prompt is None else len(item.prompt),
            output_len=item.output_len,
        )
        self.records.append(record)
        return record

    def _send(self, item: WorkItem, scheduled: float) -> None:
        assert item.prompt is not None
        record, answer = self._record(item, scheduled), list[int]()

        def on_emit(emit: Emit, now: float) -> None:
            if emit.handoff and record.token_times:
                record.handoffs.append(len(record.token_times) - 1)
            record.token_times.extend(now for _ in emit.tokens)
            answer.extend(emit.tokens)
            record.cached_tokens = emit.cached_tokens
            if emit.finish:
                self._finish(item, record, emit, answer)

        # A user sets one limit for all outputs; what a policy sees is no hint of where this one will end.
        limit = max(item.output_len, min(self.longest, self.frontend.max_model_len - len(item.prompt)))
        sampling = SamplingParams(
            max_tokens=limit, temperature=0.0, ignore_eos=True, seed=(self.seed << 32) + item.index
        )
        slos = {name: limit / 1e3 for name, limit in self.slos.items() if limit is not None}
        request_id = self.frontend.submit(
            item.prompt, sampling, on_emit, arrival=scheduled, salt=item.salt, session=item.session,
            ends_after=item.output_len, **slos,
        )  # fmt: skip
        record.workers, record.engine_id = self.frontend.workers_of(request_id), request_id  # grows with each move

    def _finish(self, item: WorkItem, record: RequestRecord, emit: Emit, answer: Sequence[int] = ()) -> None:
        """A request has ended: its session goes on, or the next one begins. `answer`: its tokens, if they are known."""
        record.finish_reason = emit.finish
        record.rejected = emit.finish == "reject"
        record.error = emit.error
        if emit.times is not None:
            stages = msgspec.structs.asdict(emit.times)
            del stages["e2e"]
            record.stages = stages
        rest = self._rests[item.index]
        if rest and record.ok:
            later, ended = rest[0], 1
            prompt = [*(item.prompt or []), *answer, *(later.prompt or [])]
            self._plan(replace(later, prompt=prompt), record.token_times[-1] + later.think_s)
        else:
            for later in rest:
                unsent = self._record(replace(later, prompt=None), now := time.monotonic())
                unsent.sent, unsent.finish_reason, unsent.error = now, UNSENT, NOT_SENT
            ended = 1 + len(rest)
            if self._waiting:
                self._plan(self._waiting.popleft(), time.monotonic())
        self._left -= ended
        self._news.set()
        if self.on_done is not None:
            self.on_done(ended)


def worker_records(
    hellos: dict[str, Hello], before: dict[str, Stats], after: dict[str, Stats]
) -> tuple[list[WorkerRecord], list[LinkRecord]]:
    """What the workers did between two sets of statistics, and what went over their links and to and from the store."""
    workers, links = [], []
    for name in sorted(after):
        new, old, info = after[name], before.get(name), hellos[name].info
        if old is None or old.steps > new.steps:
            continue  # it died in between, and its counters began anew
        workers.append(
            WorkerRecord(
                name=name,
                role=role_name(new.role),
                busy_s=new.busy_seconds - old.busy_seconds,
                flops=new.flops - old.flops,
                bytes_read=new.bytes_read - old.bytes_read,
                cpu_s=new.cpu_seconds - old.cpu_seconds,
                peak_flops=float(info["flops"]),
                peak_bytes=float(info["bandwidth"]),
            )
        )
        past = {link.peer: link for link in old.links}
        for link in new.links:
            earlier = past.get(link.peer)
            links.append(
                LinkRecord(
                    source=name,
                    dest=link.peer,
                    kind=link.kind,
                    bytes=link.bytes - (earlier.bytes if earlier else 0),
                    seconds=link.seconds - (earlier.seconds if earlier else 0.0),
                    transfers=link.transfers - (earlier.transfers if earlier else 0),
                    failures=link.failures - (earlier.failures if earlier else 0),
                )
            )
        if new.store is not None:
            page = hellos[name].kv_bytes_per_token * hellos[name].page_size
            links += _store_records(name, old.store or StoreStats(), new.store, page)
    return workers, links


def _store_records(worker: str, old: StoreStats, new: StoreStats, page: int) -> list[LinkRecord]:
    """The store as the far end of two links, which count pages and not pieces."""
    written, read = new.bytes_written - old.bytes_written, new.bytes_read - old.bytes_read
    both = (
        LinkRecord(
            source=worker, dest="store", kind="store", bytes=written, seconds=new.write_seconds - old.write_seconds,
            transfers=written // page, failures=new.dropped - old.dropped,
        ),
        LinkRecord(
            source="store", dest=worker, kind="store", bytes=read, seconds=new.read_seconds - old.read_seconds,
            transfers=read // page, failures=new.corrupt - old.corrupt,
        ),
    )  # fmt: skip
    return [one for one in both if one.transfers or one.failures]

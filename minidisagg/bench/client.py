"""The load: requests at their scheduled times (open loop) or a few at a time (closed loop), and what came of each.

TTFT counts from the scheduled arrival, so a client that falls behind cannot flatter the engine; how late it sent is
recorded too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from minidisagg.core.messages import Hello, SamplingParams, Stats
from minidisagg.core.tracked import Emit
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import LinkRecord, RequestRecord, WorkerRecord
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name
from minidisagg.workload.lengths import WorkItem

LEAD = 0.05  # seconds between the start and the first arrival
Progress = Callable[[int], None]


class LoadGenerator:
    """One run of a workload on one cluster. Prompts are filled in; all outputs have their full length."""

    def __init__(
        self, frontend: Frontend, items: Sequence[WorkItem], seed: int, on_done: Progress | None, slo: SLO | None = None
    ) -> None:
        self.frontend = frontend
        self.items = items
        self.seed = seed
        self.on_done = on_done
        self.slos = {f"slo_{name}": getattr(slo, name, None) for name in ("ttft", "tpot")}  # milliseconds
        self.longest = max(item.output_len for item in items)
        self.records: list[RequestRecord] = []
        self._left = len(items)
        self._ended = asyncio.Event()
        self._slot_free = asyncio.Event()

    async def run(self, max_concurrency: int | None) -> list[RequestRecord]:
        """Send everything and wait for every end."""
        started = time.monotonic() + LEAD
        for count, item in enumerate(self.items):
            if max_concurrency is None:
                scheduled = started + item.arrival_s
                await asyncio.sleep(max(0.0, scheduled - time.monotonic()))
            else:
                while count - (len(self.items) - self._left) >= max_concurrency:
                    self._slot_free.clear()
                    await self._slot_free.wait()
                scheduled = time.monotonic()
            self._send(item, scheduled)
        await self._ended.wait()
        return self.records

    def _send(self, item: WorkItem, scheduled: float) -> None:
        assert item.prompt is not None
        record = RequestRecord(
            request_id=str(item.index),
            index=item.index,
            scheduled=scheduled,
            sent=time.monotonic(),
            prompt_len=len(item.prompt),
            output_len=item.output_len,
        )
        self.records.append(record)

        def on_emit(emit: Emit, now: float) -> None:
            if emit.handoff and record.token_times:
                record.handoffs.append(len(record.token_times) - 1)
            record.token_times.extend(now for _ in emit.tokens)
            record.cached_tokens = emit.cached_tokens
            if emit.finish:
                self._finish(record, emit)

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

    def _finish(self, record: RequestRecord, emit: Emit) -> None:
        record.finish_reason = emit.finish
        record.rejected = emit.finish == "reject"
        record.error = emit.error
        if emit.times is not None:
            stages = msgspec.structs.asdict(emit.times)
            del stages["e2e"]
            record.stages = stages
        self._left -= 1
        self._slot_free.set()
        if self.on_done is not None:
            self.on_done(1)
        if not self._left:
            self._ended.set()


def worker_records(
    hellos: dict[str, Hello], before: dict[str, Stats], after: dict[str, Stats]
) -> tuple[list[WorkerRecord], list[LinkRecord]]:
    """What the workers did between two sets of statistics, and what went over their links."""
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
    return workers, links

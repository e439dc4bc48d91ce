"""What /metrics says, in vLLM's names under the prefix minidisagg.

Latencies are observed as tokens arrive; what the workers count themselves is read from their latest statistics when
somebody asks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from minidisagg.core.messages import LinkStats, Stats, StoreStats
from minidisagg.core.tracked import Emit
from minidisagg.measure.records import STAGES
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name
from minidisagg.server.history import WINDOW, History, Timing

PREFIX = "minidisagg:"
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
LABELS = ("worker", "role")  # both "router" for what no worker has


class ClusterLoad(NamedTuple):
    """The cluster now."""

    running: int
    waiting: int
    kv_usage: float
    hit_rate: float


class Metrics:
    """Counters and histograms of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, frontend: Frontend, history: History) -> None:
        self.frontend, self.history = frontend, history
        self.registry = CollectorRegistry()
        self._prompt = self._generated = 0  # tokens

        def histogram(name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS) -> Histogram:
            return Histogram(PREFIX + name, text, LABELS, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, [*labels, *LABELS], registry=self.registry)

        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a request.", ITL_BUCKETS)
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.")
        self.stages = {
            stage: histogram(f"request_{stage}_time_seconds", f"A request's time in the stage {stage}.")
            for stage in STAGES
        }
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that have begun to answer.")
        self.generation_tokens = counter("generation_tokens", "Output tokens.")
        self.ends = counter("request_success", "Requests by how they ended.", "finished_reason")
        # Of every token; to look up labels takes longer than to count.
        self._rows = functools.cache(lambda *by: (self.itl.labels(*by), self.generation_tokens.labels(*by)))
        for name in ("router", *frontend.hellos):
            for reason in ("stop", "length", "abort", "error"):  # a rate wants a zero to begin with
                self.ends.labels(reason, *self._labels(name))
        self.registry.register(_Workers(self))

    def on_emit(self, timing: Timing, emit: Emit, now: float) -> None:
        """News of a request."""
        where = self._labels(timing.workers[-1] if timing.workers else "router")
        if emit.tokens:
            itl, tokens = self._rows(*where)
            tokens.inc(len(emit.tokens))
            self._generated += len(emit.tokens)
            timing.output_tokens += len(emit.tokens)
            if timing.first:
                gap = now - timing.last
                itl.observe(gap)
                if not emit.handoff:  # as `bench` does: a handoff is a stage of its own
                    self.history.recent["itl"].add(gap, now)
                timing.max_itl = max(timing.max_itl, gap)
            else:
                timing.first, timing.prefilled = now, where
                self.ttft.labels(*where).observe(now - timing.arrived)
                self._prompt += timing.prompt_tokens
                self.prompt_tokens.labels(*where).inc(timing.prompt_tokens)
            timing.last = now
        if emit.finish:
            self.ends.labels(emit.finish, *where).inc()
            self.history.on_end(timing, emit, now)
            if emit.times is not None and emit.finish in ("stop", "length"):
                self.e2e.labels(*where).observe(emit.times.e2e)
                for stage, histogram in self.stages.items():
                    by = timing.prefilled if stage in ("queue", "prefill") else where
                    histogram.labels(*by).observe(getattr(emit.times, stage))

    def _labels(self, name: str) -> tuple[str, str]:
        """A worker's name, and its role; of a dead one, the router speaks."""
        status = self.frontend.view.workers.get(name)
        return name, "router" if status is None else role_name(status.role)

    def retry_after(self) -> float:
        """Seconds in which those that wait will have had their turn, as far as the latest ends tell; else 1."""
        now = time.monotonic()
        lately = [end.clock for end in islice(reversed(self.history.ends), 64) if end.clock > now - WINDOW and end.ttft]
        return self.frontend.view.waiting * (now - lately[-1]) / len(lately) if lately else 1.0

    def totals(self) -> tuple[int, int]:
        """Prompt and output tokens since the start."""
        return self._prompt, self._generated

    def load(self) -> ClusterLoad:
        """Requests with and without a first token, and the workers' caches."""
        view, stats = self.frontend.view, self.frontend.stats.values()
        pages = sum(status.num_pages for status in view.workers.values())
        used = sum(map(_used_pages, stats))
        queries, hits = sum(s.prefix_queries for s in stats), sum(s.prefix_hits for s in stats)
        return ClusterLoad(
            running=len(self.frontend.requests) - view.waiting,
            waiting=view.waiting,
            kv_usage=used / pages if pages else 0.0,
            hit_rate=hits / queries if queries else 0.0,
        )

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


def _used_pages(stats: Stats) -> int:
    return stats.pages_live + stats.pages_inflight + stats.pages_quarantined


GAUGE = GaugeMetricFamily
COUNTER = CounterMetricFamily
WORKERS: dict[str, tuple[type[GAUGE | COUNTER], str, Callable[[Stats], float]]] = {
    "num_requests_running": (GAUGE, "Requests in the batch.", lambda s: s.running),
    "num_requests_waiting": (GAUGE, "Requests that wait for the batch.", lambda s: s.waiting + s.offers),
    "num_requests_held": (GAUGE, "Prefilled requests that wait for the decode worker.", lambda s: s.held),
    "kv_cache_usage_perc": (
        GAUGE,
        "Share of the KV pages in use, 1 is all.",
        lambda s: _used_pages(s) / max(1, _used_pages(s) + s.pages_free + s.pages_cached),
    ),
    "kv_transfer_backlog": (GAUGE, "KV pieces on their way.", lambda s: sum(link.backlog for link in s.links)),
    "num_preemptions": (COUNTER, "Requests put off because no page was free.", lambda s: s.preemptions),
    "prefix_cache_queries": (COUNTER, "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    "prefix_cache_hits": (COUNTER, "Prompt tokens found there.", lambda s: s.prefix_hits),
    "worker_steps": (COUNTER, "Steps.", lambda s: s.steps),
    "worker_busy_seconds": (COUNTER, "Time in steps.", lambda s: s.busy_seconds),
    "worker_cpu_seconds": (COUNTER, "CPU time of the worker's process.", lambda s: s.cpu_seconds),
    "worker_flops": (COUNTER, "Floating-point operations of all steps.", lambda s: s.flops),
    "worker_bytes_read": (COUNTER, "Bytes of weights and KV that the steps had to read.", lambda s: s.bytes_read),
}
STORE: dict[str, tuple[str, Callable[[StoreStats], float]]] = {
    "kv_store_hits": ("KV pages found in the store.", lambda store: store.hits),
    "kv_store_misses": ("KV pages looked for there in vain.", lambda store: store.misses),
    "kv_store_bytes_read": ("KV bytes read from the store.", lambda store: store.bytes_read),
    "kv_store_bytes_written": ("KV bytes written to it.", lambda store: store.bytes_written),
    "kv_store_read_seconds": ("Time in which the store was read.", lambda store: store.read_seconds),
    "kv_store_write_seconds": ("Time in which it was written.", lambda store: store.write_seconds),
    "kv_store_dropped": ("KV pages not saved there, since their worker was ending.", lambda store: store.dropped),
    "kv_store_corrupt": ("KV pages there that were not what had been written.", lambda store: store.corrupt),
}
LINKS: dict[str, tuple[str, Callable[[LinkStats], float]]] = {
    "kv_transfer_bytes": ("KV bytes sent.", lambda link: link.bytes),
    "kv_transfer_seconds": ("Time in which KV pieces were sent.", lambda link: link.seconds),
    "kv_transfer_queue_seconds": ("Time for which KV pieces waited to be sent.", lambda link: link.queue_seconds),
    "kv_transfers": ("KV pieces sent.", lambda link: link.transfers),
    "kv_transfer_failures": ("KV pieces that did not arrive.", lambda link: link.failures),
}


class _Workers(Collector):
    """What is read rather than counted: a worker that has died begins anew, as a restarted process does."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics, frontend = self.metrics, self.metrics.frontend
        load, restarts = metrics.load(), len(frontend.restarted)
        yield COUNTER(PREFIX + "worker_restarts", "Workers that died and were started again.", value=restarts)
        moved = frontend.router.migrations
        yield COUNTER(PREFIX + "migrations", "Requests that went on elsewhere while they decoded.", value=moved)
        yield GAUGE(PREFIX + "cluster_waiting", "Requests without a first token.", value=load.waiting)
        yield GAUGE(PREFIX + "cluster_running", "Requests that decode.", value=load.running)

        workers = sorted(frontend.stats.items())
        for name, (kind, text, read) in WORKERS.items():
            family = kind(PREFIX + name, text, labels=LABELS)
            if name == "num_requests_waiting":
                family.add_metric(["router"] * 2, frontend.parked)
            for worker, stats in workers:
                family.add_metric([worker, role_name(stats.role)], read(stats))
            yield family

        for name, (text, read_store) in STORE.items():
            stored = COUNTER(PREFIX + name, text, labels=LABELS)
            for worker, stats in workers:
                if stats.store is not None:
                    stored.add_metric([worker, role_name(stats.role)], read_store(stats.store))
            yield stored

        for name, (text, read_link) in LINKS.items():
            sent = COUNTER(PREFIX + name, text, labels=[*LABELS, "peer", "link"])
            for worker, stats in workers:
                for link in stats.links:
                    sent.add_metric([worker, role_name(stats.role), link.peer, link.kind], read_link(link))
            yield sent
        share = GAUGE(PREFIX + "worker_busy_share", "Share of the last 5 s spent in steps.", labels=LABELS)
        for worker, stats in workers:
            old = (metrics.history.reports.get(worker) or [stats])[0]
            busy = (stats.busy_seconds - old.busy_seconds) / max(1e-9, stats.clock - old.clock)
            share.add_metric([worker, role_name(stats.role)], min(1.0, max(0.0, busy)))  # it may have begun anew
        yield share

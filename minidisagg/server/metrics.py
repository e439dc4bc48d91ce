"""What /metrics says, in vLLM's names under the prefix minidisagg.

Latencies are observed as tokens arrive; what the workers count themselves is read from their latest statistics when
somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from minidisagg.core.messages import LinkStats, Stats
from minidisagg.core.router import Emit
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name
from minidisagg.server.history import History, Timing

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
STAGES = ("queue", "prefill", "transfer", "decode_wait", "decode")


class Load(NamedTuple):
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
        self.prompt_tokens = self.generation_tokens = 0

        def histogram(name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_BUCKETS
        )
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a request.", ITL_BUCKETS)
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.")
        self.stages = {
            stage: histogram(f"request_{stage}_time_seconds", f"A request's time in the stage {stage}.")
            for stage in STAGES
        }
        self.ends = Counter(
            PREFIX + "request_success", "Requests by how they ended.", ["finished_reason"], registry=self.registry
        )
        self.registry.register(_Workers(self))

    def on_emit(self, timing: Timing, emit: Emit, now: float) -> None:
        """News of a request."""
        if emit.tokens:
            self.generation_tokens += len(emit.tokens)
            timing.output_tokens += len(emit.tokens)
            if timing.first:
                gap = now - timing.last
                self.itl.observe(gap)
                self.history.gaps.append((now, gap))
                timing.max_itl = max(timing.max_itl, gap)
            else:
                timing.first = now
                self.ttft.observe(now - timing.arrived)
                self.prompt_tokens += timing.prompt_tokens
            timing.last = now
        if emit.finish:
            self.ends.labels(emit.finish).inc()
            self.history.on_end(timing, emit, now)
            if emit.times is not None and timing.first:
                self.e2e.observe(emit.times.e2e)
                for stage, histogram in self.stages.items():
                    histogram.observe(getattr(emit.times, stage))

    def totals(self) -> tuple[int, int]:
        """Prompt and output tokens since the start."""
        return self.prompt_tokens, self.generation_tokens

    def load(self) -> Load:
        """Requests with and without a first token, and the workers' caches."""
        router, stats = self.frontend.router, self.frontend.stats.values()
        pages = sum(status.num_pages for status in router.view.workers.values())
        used = sum(map(_used_pages, stats))
        queries, hits = sum(s.prefix_queries for s in stats), sum(s.prefix_hits for s in stats)
        waiting = router.view.waiting
        return Load(
            len(router.requests) - waiting, waiting, used / pages if pages else 0.0, hits / queries if queries else 0.0
        )

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


def _used_pages(stats: Stats) -> int:
    return stats.pages_live + stats.pages_inflight + stats.pages_quarantined


GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "num_requests_running": ("Requests in the batch.", lambda s: s.running),
    "num_requests_waiting": ("Requests that wait for the batch.", lambda s: s.waiting + s.offers),
    "num_requests_held": ("Prefilled requests that wait for the decode worker.", lambda s: s.held),
    "kv_cache_usage_perc": (
        "Share of the KV pages in use, 1 is all.",
        lambda s: _used_pages(s) / max(1, _used_pages(s) + s.pages_free + s.pages_cached),
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "num_preemptions": ("Requests put off because no page was free.", lambda s: s.preemptions),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found there.", lambda s: s.prefix_hits),
    "worker_steps": ("Steps.", lambda s: s.steps),
    "worker_busy_seconds": ("Time in steps.", lambda s: s.busy_seconds),
    "worker_cpu_seconds": ("CPU time of the worker's process.", lambda s: s.cpu_seconds),
    "worker_flops": ("Floating-point operations of all steps.", lambda s: s.flops),
    "worker_bytes_read": ("Bytes of weights and KV that the steps had to read.", lambda s: s.bytes_read),
}
LINKS: dict[str, tuple[str, Callable[[LinkStats], float]]] = {
    "kv_transfer_bytes": ("KV bytes sent.", lambda link: link.bytes),
    "kv_transfer_seconds": ("Time in which KV pieces were sent.", lambda link: link.seconds),
    "kv_transfer_queue_seconds": (
        "Time for which KV pieces waited to be sent.",
        lambda link: link.queue_seconds,
    ),
    "kv_transfers": ("KV pieces sent.", lambda link: link.transfers),
    "kv_transfer_failures": ("KV pieces that did not arrive.", lambda link: link.failures),
}


class _Workers(Collector):
    """What is read rather than counted: a worker that has died begins anew, as a restarted process does."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics, frontend = self.metrics, self.metrics.frontend
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of requests that have begun to answer.", metrics.prompt_tokens),
            ("generation_tokens", "Output tokens.", metrics.generation_tokens),
            ("worker_restarts", "Workers that died and were started again.", len(frontend.restarted)),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        load = metrics.load()
        yield GaugeMetricFamily(PREFIX + "cluster_waiting", "Requests without a first token.", value=load.waiting)
        yield GaugeMetricFamily(PREFIX + "cluster_running", "Requests that decode.", value=load.running)

        workers = sorted(frontend.stats.items())
        kinds: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], Any], ...] = (
            (GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS),
        )  # fmt: skip
        for kind, families in kinds:
            for name, (text, read) in families.items():
                family = kind(PREFIX + name, text, labels=["worker", "role"])
                for worker, stats in workers:
                    family.add_metric([worker, role_name(stats.role)], read(stats))
                yield family

        for name, (text, read) in LINKS.items():
            sent = CounterMetricFamily(PREFIX + name, text, labels=["worker", "role", "peer", "link"])
            for worker, stats in workers:
                for link in stats.links:
                    sent.add_metric([worker, role_name(stats.role), link.peer, link.kind], read(link))
            yield sent
        backlog = GaugeMetricFamily(
            PREFIX + "kv_transfer_backlog", "KV pieces on their way.", labels=["worker", "role"]
        )
        for worker, stats in workers:
            backlog.add_metric([worker, role_name(stats.role)], sum(link.backlog for link in stats.links))
        yield backlog

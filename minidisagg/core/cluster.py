"""What the router knows of its workers, and shows to policies: what it has placed there, and what they have told.

add, remove                   a worker is up, or gone
arrived                       a request has come, or needs no first token any more
charge, decodes, release      where it is
on_step, on_stats             the workers' messages
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection
from math import fsum
from types import MappingProxyType

from minidisagg.core.blocks import short
from minidisagg.core.costs import StepLearner
from minidisagg.core.messages import Cached, Hello, Stats, StepOutput, Stored
from minidisagg.core.policy import ClusterView, Hits, RequestView, WorkerStatus
from minidisagg.core.tracked import Stage, Tracked, tracked_of

NOWHERE = Hits(0)
MOST_STORED = 1 << 20  # pages: some 100 MB, and 64 million tokens on GPUs


class Known:
    """What is learnt of one worker, since its start."""

    def __init__(self, hello: Hello) -> None:
        self.hello = hello
        self.learner = StepLearner()
        self.prefixes: set[bytes] = set()  # `short` hashes of the pages in its prefix cache


class Cluster:
    """The accounts behind a `ClusterView`."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int, seed: int) -> None:
        self.workers: dict[str, WorkerStatus] = {}  # those that are up
        self._known: dict[str, Known] = {}
        self._stored = OrderedDict[bytes, None]()  # `short` hashes of the pages in the store, the newest last
        workers = MappingProxyType(self.workers)
        self.view = ClusterView(0.0, workers, 0, 0, max_waiting, max_waiting_tokens, random.Random(seed), self._hits)

    def add(self, name: str, epoch: int, hello: Hello) -> None:
        """A worker is up."""
        self.view.changed(down=self.view.down - {name})
        self._known[name] = Known(hello)
        self.workers[name] = WorkerStatus(
            name, epoch, hello.role, hello.num_pages, hello.page_size,
            pages_free=hello.num_pages, stats_at=self.view.now,
        )  # fmt: skip

    def remove(self, name: str) -> None:
        """Its process is gone."""
        self.view.changed(down=self.view.down | {name})
        del self.workers[name], self._known[name]

    # ------------------------------------------------------------ requests

    def arrived(self, request: Tracked, one: int = 1) -> None:
        """It waits for its first token, or with -1 does so no more."""
        view, tokens = self.view, one * len(request.prompt)
        view.changed(waiting=view.waiting + one, waiting_tokens=view.waiting_tokens + tokens)

    def charge(self, request: Tracked) -> None:
        """It is to be prefilled where `request.prefill` says."""
        request.charged = request.prefill_len
        self._queued(request, request.charged)

    def computed(self, request: Tracked) -> None:
        """Its first token has come."""
        self._queued(request, -request.charged)

    def _queued(self, request: Tracked, tokens: int) -> None:
        status = self.workers.get(request.prefill)
        if status is not None:
            status.changed(queued_tokens=status.queued_tokens + tokens)

    def decodes(self, request: Tracked, one: int = 1) -> None:
        """It is to decode where `request.decode` says, or with -1 does so no more."""
        status = self.workers.get(request.decode)
        if status is not None:
            tokens = status.context_tokens + one * request.charged
            status.changed(decoding=status.decoding + one, context_tokens=tokens)

    def release(self, request: Tracked) -> None:
        """It is on no worker any more."""
        if request.stage is Stage.PREFILL:
            self.computed(request)
        self.decodes(request, -1)
        request.prefill = request.decode = ""

    # ------------------------------------------------------------ messages

    def on_step(self, name: str, step: StepOutput) -> None:
        """What its steps cost, and how its prefix cache has changed."""
        self._known[name].learner.learn(step)
        self.on_cached(name, step)

    def on_cached(self, name: str, news: StepOutput | Cached) -> None:
        """How its prefix cache has changed."""
        prefixes = self._known[name].prefixes
        prefixes.update(news.stored)
        prefixes.difference_update(news.removed)

    def on_stored(self, message: Stored) -> None:
        """How the store has changed, by the word of a worker."""
        for digest in map(short, message.stored):
            self._stored[digest] = None
            self._stored.move_to_end(digest)
        for digest in map(short, message.removed):
            self._stored.pop(digest, None)
        while len(self._stored) > MOST_STORED:  # a store over many hosts does not tell what has left it
            self._stored.popitem(last=False)

    def on_stats(self, status: WorkerStatus, stats: Stats) -> None:
        """A few times a second."""
        known, nbytes = self._known[status.name], sum(link.bytes for link in stats.links)
        seconds = fsum(link.seconds for link in stats.links)
        status.changed(
            pages_free=stats.pages_free + stats.pages_cached,
            transfer_backlog=sum(link.backlog for link in stats.links),
            stats_at=self.view.now,
            costs=known.learner.costs,
            t_kv_token=seconds / nbytes * known.hello.kv_bytes_per_token if nbytes else 0.0,
        )

    def _hits(self, request: RequestView) -> dict[str, Hits]:
        """What each worker has of its prompt, by the longest run of pages from the first on."""
        tracked, hits = tracked_of(request), {}
        for name, known in self._known.items():
            held, size, pages = known.prefixes, known.hello.page_size, 0
            told = held or self._stored  # else a long prompt is hashed for nothing
            names = tracked.page_names(known.hello.fingerprint, size) if told else []
            while pages < len(names) and names[pages] in held:
                pages += 1
            end = pages
            while end < len(names) and (names[end] in self._stored or names[end] in held):
                end += 1
            hits[name] = Hits(pages * size, (end - pages) * size) if end else NOWHERE
        return hits

    # ------------------------------------------------------------ invariants

    def check_integrity(self, requests: Collection[Tracked]) -> None:
        """The counters that hooks see equal what the log says."""
        waiting = [r for r in requests if not r.emitted]
        assert self.view.waiting == len(waiting), (self.view.waiting, len(waiting))
        assert self.view.waiting_tokens == sum(len(r.prompt) for r in waiting)
        for name, status in self.workers.items():
            queued = sum(r.charged for r in requests if r.prefill == name and r.stage is Stage.PREFILL)
            assert status.queued_tokens == queued, (name, status.queued_tokens, queued)
            decoding = sum(r.decode == name for r in requests)
            assert status.decoding == decoding, (name, status.decoding, decoding)

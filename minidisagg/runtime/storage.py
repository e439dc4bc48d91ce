"""A worker's way to its host's store: pages of its cache up and down, on a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minidisagg.core.effects import LoadPages, SavePage
from minidisagg.core.inputs import Loaded, Saved
from minidisagg.core.messages import StoreStats
from minidisagg.store.background import Background, Store
from minidisagg.store.background import Loaded as Filled
from minidisagg.store.mooncake import MooncakeStore
from minidisagg.store.page import HEAD_BYTES
from minidisagg.store.pool import Pool
from minidisagg.store.spec import StoreSpec


class Storage:
    """`on_news` hears what has come of loads and saves, on the event loop."""

    def __init__(
        self, spec: StoreSpec, kv: Tensor, fingerprint: str, on_news: Callable[[Loaded | Saved], None]
    ) -> None:
        """Raises `ValueError` where there is no such store, or no room for a page."""
        layout = f"{fingerprint} {kv.shape[4]}"  # and the page size, which two caches may differ in
        page_bytes = kv.nbytes // kv.shape[2]
        for tier in spec.tiers():
            if tier.limit < HEAD_BYTES + page_bytes:
                raise ValueError(f"store: {tier.directory} may take {tier.limit} bytes, less than a page: {page_bytes}")
        store: Store = MooncakeStore(spec, layout) if spec.mooncake else Pool(spec.tiers(), layout)
        self._kv, self._on_news, self._loop = kv, on_news, asyncio.get_running_loop()
        self._bytes = kv.view(torch.uint8)
        self._page = self._bytes[:, :, 0].shape
        self._background = Background(store, self._wake, page_bytes)
        self._stream = torch.cuda.Stream(kv.device) if kv.is_cuda else None  # type: ignore[no-untyped-call]

    def load(self, effect: LoadPages) -> None:
        """Into these pages, which are nobody's yet."""
        key = effect.request_id, effect.incarnation
        self._background.load(key, effect.digests, lambda number, data: self._put(effect.pages[number], data))

    def save(self, effect: SavePage) -> None:
        """Its page is held until the core has heard of it."""
        self._background.save(effect.digest, partial(self._get, effect.page))

    def stats(self) -> StoreStats:
        """Since the start."""
        c = self._background.counters
        seconds = c.read_seconds, c.write_seconds
        return StoreStats(c.hits, c.misses, c.bytes_read, c.bytes_written, *seconds, c.dropped, c.corrupt, c.failing)

    async def close(self) -> None:
        """What has not begun is dropped: the cache's memory goes next."""
        await asyncio.to_thread(self._background.close)

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._poll)

    def _poll(self) -> None:
        for done in self._background.poll():
            if isinstance(done, Filled):
                assert isinstance(done.key, tuple)
                self._on_news(Loaded(str(done.key[0]), done.key[1], done.pages))
            else:
                self._on_news(Saved(done.digest, done.kept, list(done.put.evicted)))

    # numpy copies on the thread that asks. torch would wake a team of threads beside the device's own, which then stops
    # spinning: half its speed.

    def _get(self, page: int) -> memoryview:
        if self._stream is None:
            return np.ascontiguousarray(self._bytes[:, :, page].numpy()).data.cast("B")
        with torch.cuda.stream(self._stream):
            return self._bytes[:, :, page].cpu().numpy().data.cast("B")

    def _put(self, page: int, data: memoryview) -> None:
        array = np.frombuffer(data, np.uint8).reshape(self._page)
        if self._stream is None:
            self._bytes[:, :, page].numpy()[...] = array
        else:
            with torch.cuda.stream(self._stream):
                self._bytes[:, :, page].copy_(torch.from_numpy(array))
            self._stream.synchronize()

"""The host's store of a simulated cluster: pages by digest, in no order, of which some are lost now and then."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from minidisagg.core.effects import LoadPages, SavePage
from minidisagg.core.inputs import Input, Loaded, Saved
from minidisagg.sim.devices import TimingOnly

SECONDS = 0.003  # of a page, up or down


class Shelf:
    """What it does takes time, and is then done to whatever the worker's device has become."""

    def __init__(self, seed: int, loss: float) -> None:
        """`loss`: of how many pages it knows nothing when they are wanted, or takes none."""
        self.pages: dict[bytes, object] = {}
        self._rng, self._loss = random.Random(f"shelf {seed}"), loss

    def carry_out(self, device: TimingOnly, effect: LoadPages | SavePage) -> tuple[float, Callable[[], Input]]:
        """In how many seconds to do it, what tells what came of it."""
        if isinstance(effect, LoadPages):
            return SECONDS * (1 + len(effect.pages)), partial(self._fill, device, effect)
        return SECONDS * (1 + self._rng.random()), partial(self._take, device, effect)

    def _fill(self, device: TimingOnly, effect: LoadPages) -> Input:
        count = 0
        for digest, page in zip(effect.digests, effect.pages, strict=True):
            if digest not in self.pages or self._rng.random() < self._loss:
                break
            device.put(page, self.pages[digest])
            count += 1
        return Loaded(effect.request_id, effect.incarnation, count)

    def _take(self, device: TimingOnly, effect: SavePage) -> Input:
        evicted = []
        if self.pages and self._rng.random() < self._loss:
            evicted = [self._rng.choice(sorted(self.pages))]
            del self.pages[evicted[0]]
        kept = self._rng.random() >= self._loss
        if kept:
            self.pages[effect.digest] = device.page(effect.page)
        return Saved(effect.digest, kept, evicted)

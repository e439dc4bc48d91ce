"""The store of one engine, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from msgspec.structs import replace

from minidisagg.store.pool import Pool
from minidisagg.store.spec import StoreSpec, TierSpec, parse_store

SINK = 10.0  # seconds at an engine's end for what is only in memory; what is not on the disk by then is computed again
POLL = 0.02  # seconds between looks at whether that is done
logger = logging.getLogger("minidisagg")


def store_of(text: str, run_dir: str) -> StoreSpec:
    """As `--kv-store` says, with memory of this engine's own. Raises `ValueError`."""
    return replace(parse_store(text), engine=run_dir)


def tiers_of(text: str, run_dir: str) -> list[TierSpec]:
    """The same; none where `text` is empty."""
    return store_of(text, run_dir).tiers() if text else []


async def sink_store(tiers: Sequence[TierSpec]) -> None:
    """When no worker is left: what is only in memory goes to the disk, if there is one."""

    def sink() -> None:
        Pool(tiers, "").sink(time.monotonic() + SINK)

    if len(tiers) > 1:
        logger.info("store: what is only in memory goes to the disk, for %g s at most", SINK)
        thread = threading.Thread(target=sink, daemon=True)  # the loop's own executor would be joined at its end
        try:
            thread.start()
        except RuntimeError:  # at the interpreter's exit there are no threads to be had
            sink()
        for _ in range(round(1.1 * SINK / POLL)):  # the disk may not answer at all
            if thread.is_alive():
                await asyncio.sleep(POLL)

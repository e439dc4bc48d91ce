"""The store of one engine, from its start to its end."""

from __future__ import annotations

from msgspec.structs import replace

from minidisagg.store.pool import Pool
from minidisagg.store.spec import StoreSpec, parse_store


def store_of(text: str, run_dir: str) -> StoreSpec:
    """As `--kv-store` says, with memory of this engine's own. Raises `ValueError`."""
    return replace(parse_store(text), engine=run_dir)


def end_store(text: str, run_dir: str) -> None:
    """When no worker is left: memory is given back. `text` may be empty."""
    if text and not (spec := store_of(text, run_dir)).mooncake:
        Pool(spec.tiers(), "").remove()

"""Which store there is: `local:DRAM=2GiB,SSD=/path:20GiB`, or `mooncake:HOST:PORT` for the one of that name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from msgspec import Struct

from minidisagg.sizes import parse_size

SHARED_MEMORY, MEMORY = Path("/dev/shm"), "minidisagg-store-"  # the beginning of a directory's name there
LENT = 1 << 30  # bytes that each worker lends to Mooncake's pool


class TierSpec(Struct, frozen=True):
    """A directory of pages and its limit in bytes; `durable`: it outlives the machine's end."""

    directory: str
    limit: int
    durable: bool


class StoreSpec(Struct, frozen=True, kw_only=True):
    """Limits in bytes; 0 where there is no such tier."""

    dram: int = 0  # of the host; of Mooncake, what each worker lends
    ssd: int = 0
    ssd_path: str = ""
    mooncake: str = ""  # HOST:PORT of its master
    metadata: str = ""  # URL of its metadata server; empty: the peers ask each other
    engine: str = ""  # engines that differ in it share no memory

    def tiers(self) -> list[TierSpec]:
        """Of a local store, the fastest first; Mooncake has none. Memory has a name that follows from the spec: a
        restart finds it."""
        found = []
        if self.dram and not self.mooncake:
            facts = hashlib.sha256(f"{os.getuid()}\0{self}".encode()).hexdigest()
            found.append(TierSpec(str(SHARED_MEMORY / f"{MEMORY}{facts[:16]}"), self.dram, False))
        if self.ssd:
            found.append(TierSpec(self.ssd_path, self.ssd, True))
        return found


def parse_store(text: str) -> StoreSpec:
    """Raises `ValueError` with a line that says what to write."""
    kind, _, rest = text.partition(":")
    address, *tiers = rest.split(",") if kind == "mooncake" else ("", *rest.split(","))
    known = {"local": ("DRAM", "SSD"), "mooncake": ("DRAM", "METADATA")}.get(kind)
    if known is None:
        raise ValueError(f"store {text!r}: write local:DRAM=2GiB,SSD=/path:20GiB or mooncake:HOST:PORT")
    values: dict[str, str] = {}
    for part in tiers:
        key, _, value = part.strip().partition("=")
        if key not in known or not value or key in values:
            raise ValueError(f"store {text!r}: {part!r} is not {' or '.join(f'{name}=…' for name in known)}, each once")
        values[key] = value
    dram = parse_size(values["DRAM"]) if "DRAM" in values else 0
    if kind == "mooncake":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"store {text!r}: {address!r} is not HOST:PORT of Mooncake's master")
        return StoreSpec(mooncake=address, dram=dram or LENT, metadata=values.get("METADATA", ""))
    if "SSD" not in values:
        return StoreSpec(dram=dram)
    path, _, size = values["SSD"].rpartition(":")
    if not path:
        raise ValueError(f"store {text!r}: write SSD=/path:20GiB")
    return StoreSpec(dram=dram, ssd=parse_size(size), ssd_path=str(Path(path).expanduser().absolute()))

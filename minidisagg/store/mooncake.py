"""The same over Mooncake's own store (github.com/kvcache-ai/Mooncake), which pools the memory of many hosts.

    mooncake_master --enable_http_metadata_server=true --http_metadata_server_port=8080
    --store mooncake:HOST:50051,METADATA=http://HOST:8080/metadata

Its pages carry the same head, so a wrong byte on the way is a miss here too. Eviction is its master's.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from minidisagg.store.page import HEAD_BYTES, Verdict, judge, seal
from minidisagg.store.pool import Put
from minidisagg.store.spec import StoreSpec

LOCAL_BUFFER = 128 << 20  # bytes for what is on its way: some pages
SLOW, PAUSE = 1.0, 10.0  # a call of so many seconds is followed by none for so many times as long, as one that fails is
PEER_TO_PEER = "P2PHANDSHAKE"  # what Mooncake calls a cluster without a metadata server


class MooncakeStore:
    """Over TCP. Raises `ValueError` in one line where it is not installed, or its master does not answer. Whatever its
    library raises later is a miss, or a page that is not written."""

    def __init__(self, spec: StoreSpec, layout: str) -> None:
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise ValueError(
                f"Mooncake cannot be used: {error}; it takes pip install 'minidisagg[mooncake]', and Debian's "
                "libibverbs1, libnuma1 and libcurl4"
            ) from None
        host, _, port = spec.mooncake.rpartition(":")
        try:
            own = _own_address(host.strip("[]"), int(port))
        except OSError as error:
            raise ValueError(f"Mooncake's master at {spec.mooncake} does not answer: {error}") from None
        self.layout, self.corrupt, self.failing = layout, 0, ""
        # Nobody is asked before (`time.monotonic()`), as with a dead master each call takes seconds; and nothing is
        # written before, though one that is full is read.
        self._resumes = self._writes = 0.0
        self._store = MooncakeDistributedStore()
        metadata = spec.metadata or PEER_TO_PEER
        status = self._store.setup(own, metadata, spec.dram, LOCAL_BUFFER, "tcp", "", spec.mooncake)  # "": no RDMA
        if status:
            raise ValueError(f"Mooncake at {spec.mooncake} cannot be set up: its error {status}")

    def touch(self, digest: bytes) -> bool:
        """As `Pool.touch`; while nothing is written, nobody is asked."""
        return time.monotonic() >= self._writes and bool(self._ask("is_exist", digest.hex()) == 1)

    def get(self, digest: bytes, into: memoryview) -> bool:
        """As `Pool.get`."""
        found = self._ask("get_buffer", digest.hex())
        if found is None or isinstance(found, Exception):
            return False
        data, into = memoryview(found).cast("B"), into.cast("B")
        payload = data[HEAD_BYTES:]
        verdict = judge(bytes(data[:HEAD_BYTES]), len(data), self.layout, digest, payload)
        if verdict is Verdict.GOOD and len(payload) == len(into):
            into[:] = payload
            return True
        if verdict is Verdict.BAD:
            self.corrupt += 1
            self._ask("remove", digest.hex(), True)
        return False

    def put(self, digest: bytes, parts: Sequence[bytes | memoryview]) -> Put:
        """As `Pool.put`; what its master evicts is not told."""
        began = time.monotonic()
        if began < self._writes or self.touch(digest):
            return Put(False)
        payload = parts[0] if len(parts) == 1 else b"".join(parts)
        error = self._ask("put_parts", digest.hex(), seal(self.layout, digest, payload), payload)
        if error == 0:
            self.failing = ""
        elif isinstance(error, int):
            now = time.monotonic()
            self._writes = now + PAUSE * (now - began)
            self.failing = f"store: Mooncake takes no page for now: its error {error}"
        return Put(error == 0)

    def promote(self) -> bool:
        """There is one tier."""
        return False

    def write_back(self) -> bool:
        """So that no page waits for another."""
        return False

    def close(self) -> None:
        """Give back what this process has lent, with the pages in it."""
        self._store.close()

    def _ask(self, what: str, *arguments: object) -> Any:
        """Its answer, an error that it raised, or None where nobody is asked."""
        began = time.monotonic()
        if began < self._resumes:
            return None
        try:
            answer = getattr(self._store, what)(*arguments)
        except Exception as error:
            answer = error
        took = time.monotonic() - began
        raised = isinstance(answer, Exception)
        if raised or took > SLOW:
            self._resumes = began + (1 + PAUSE) * took
            why = f"its error {answer}" if raised else f"it took {took:.0f} s"
            self.failing = f"store: Mooncake is not asked for now: {why}"
        return answer


def _own_address(host: str, port: int) -> str:
    """By which the master's host, and so the others, reach this one; Mooncake would try for a minute and more."""
    with socket.create_connection((host, port), timeout=5.0) as probe:
        return str(probe.getsockname()[0])

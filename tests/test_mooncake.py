"""Pages through Mooncake's own store: its master with its metadata server, over TCP on loopback."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pytest
from storepeer import LAYOUT, content, digest

from minidisagg.store.background import Background
from minidisagg.store.mooncake import MooncakeStore
from minidisagg.store.page import seal
from minidisagg.store.pool import Put
from minidisagg.store.spec import StoreSpec, parse_store

T = TypeVar("T")
LIBRARIES = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
BYTES = 3 << 20  # of a page


def missing() -> str:
    """Why Mooncake cannot be used here; empty if it can."""
    if find_spec("mooncake") is None:
        return "the package mooncake-transfer-engine-non-cuda is not installed: pip install 'minidisagg[mooncake]'"
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"Mooncake needs {library}: apt-get install {package}"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSpec]:
    """Of a master that runs as long as this file's tests."""
    if why := missing():
        pytest.skip(why)
    found = find_spec("mooncake")
    assert found is not None and found.origin is not None
    rpc, http = free_port(), free_port()
    log = tmp_path_factory.mktemp("mooncake") / "master.log"
    command = [
        str(Path(found.origin).with_name("mooncake_master")),
        *("--rpc_address=127.0.0.1", f"--rpc_port={rpc}", f"--metrics_port={free_port()}", "--logtostderr=true"),
        *("--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1"),
        f"--http_metadata_server_port={http}",
    ]
    with log.open("wb") as file:
        master = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for port in (rpc, http):
            wait_for(port, master, log)
        yield parse_store(f"mooncake:127.0.0.1:{rpc},DRAM=64M,METADATA=http://127.0.0.1:{http}/metadata")
    finally:
        master.kill()
        master.wait()


def wait_for(port: int, master: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert master.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)


def test_pages_go_through_mooncake_and_come_back(spec: StoreSpec) -> None:
    store, name, into = MooncakeStore(spec, LAYOUT), digest(1), memoryview(bytearray(BYTES))
    data = memoryview(content(name, BYTES))
    try:
        assert not store.touch(name) and not store.get(name, into)
        assert store.put(name, [data[:1000], data[1000:]]) == Put(True) and store.touch(name)
        assert store.put(name, [data]) == Put(False)
        assert store.get(name, into) and into == data
        other = MooncakeStore(spec, "layers=4")
        try:
            assert other.touch(name)
            assert not other.get(name, into) and not store.get(name, into[1:]) and store.touch(name)
        finally:
            other.close()
        assert store.get(name, into) and (store.corrupt, other.corrupt) == (0, 0)
        head = seal(LAYOUT, digest(2), data)
        assert store._store.put_parts(digest(2).hex(), head, bytes(data[:-1]) + b"?") == 0
        assert not store.get(digest(2), into) and store.corrupt == 1 and not store.touch(digest(2))
        pages = {digest(number): content(digest(number), BYTES) for number in range(3, 60)}
        assert not all([store.put(name, [page]).written for name, page in pages.items()])  # they do not all fit
        found = [into.tobytes() == page for name, page in pages.items() if store.get(name, into)]
        assert found and all(found)
    finally:
        store.close()


def test_another_worker_finds_a_page_without_a_metadata_server(spec: StoreSpec) -> None:
    alone = parse_store(f"mooncake:{spec.mooncake},DRAM=16M")
    one, other, name = MooncakeStore(alone, LAYOUT), MooncakeStore(alone, LAYOUT), digest(100)
    into = memoryview(bytearray(1000))
    try:
        assert one.put(name, [content(name, 1000)]).written
        assert other.touch(name) and other.get(name, into) and into == content(name, 1000)
    finally:
        one.close()
        other.close()


class Library:
    """In place of Mooncake's, whose calls answer, or raise, what a test wants."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.raises: Exception | None = None
        self.status, self.seconds, self.now = 0, 0.0, 1000.0
        self.pages: dict[str, bytes] = {}

    def setup(self, *_: object) -> int:
        return 0

    def is_exist(self, name: str) -> int:
        return self._call("is_exist", int(name in self.pages))

    def get_buffer(self, name: str) -> bytes | None:
        return self._call("get_buffer", self.pages.get(name))

    def remove(self, name: str, force: bool) -> int:
        return self._call("remove", 0)

    def close(self) -> None:
        self._call("close", None)

    def put_parts(self, name: str, *parts: bytes) -> int:
        if not self._call("put_parts", self.status):
            self.pages[name] = b"".join(parts)
        return self.status

    def _call(self, what: str, answer: T) -> T:
        self.calls.append(what)
        self.now += self.seconds
        if self.raises is not None:
            raise self.raises
        return answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    module = types.ModuleType("mooncake.store")
    module.MooncakeDistributedStore = lambda: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake.store", module)
    monkeypatch.setitem(sys.modules, "mooncake", types.ModuleType("mooncake"))
    monkeypatch.setattr("minidisagg.store.mooncake._own_address", lambda host, port: "127.0.0.1")
    monkeypatch.setattr("minidisagg.store.mooncake.time.monotonic", lambda: made.now)
    return made


def test_what_the_library_raises_is_a_miss_or_not_written(library: Library) -> None:
    store, into = MooncakeStore(parse_store("mooncake:h:1"), LAYOUT), memoryview(bytearray(1000))
    page, name = content(digest(1), 1000), digest(1)
    assert store.put(name, [page]) == Put(True) and store.get(name, into) and into == page and store.touch(name)
    library.pages[digest(2).hex()] = b"shorter than a head"
    assert not store.get(digest(2), into) and store.corrupt == 1
    library.pages[digest(3).hex()] = bytes(2000)
    library.raises = RuntimeError("the master is gone")
    assert not store.get(name, into) and not store.touch(name)
    assert store.put(digest(4), [page]) == Put(False)
    assert store.failing == "store: Mooncake is not asked for now: its error the master is gone"
    library.raises = None
    assert store.put(digest(4), [page]) == Put(True) and not store.failing


def test_a_write_that_fails_is_not_tried_again_with_each_page(library: Library) -> None:
    store, page = MooncakeStore(parse_store("mooncake:h:1"), LAYOUT), content(digest(1), 1000)
    assert store.put(digest(100), [page]) == Put(True)
    library.status, library.seconds = -1, 0.9
    assert store.put(digest(0), [page]) == Put(False)
    library.calls.clear()
    for number in range(1, 50):
        assert not store.touch(digest(number)) and store.put(digest(number), [page]) == Put(False)
    assert not library.calls and store.failing == "store: Mooncake takes no page for now: its error -1"
    assert store.get(digest(100), memoryview(bytearray(1000))), "it may be full, and is read"
    library.now += 61.0
    library.status = 0
    assert store.put(digest(1), [page]) == Put(True) and not store.failing


def test_a_read_that_takes_seconds_is_followed_by_none(library: Library) -> None:
    store, into, page = MooncakeStore(parse_store("mooncake:h:1"), LAYOUT), memoryview(bytearray(1000)), bytes(1000)
    assert store.put(digest(0), [page]) == Put(True)
    library.seconds = 3.0  # for a miss: with a dead master
    assert not store.get(digest(1), into)
    library.calls.clear()
    for number in range(50):
        assert not store.get(digest(number), into) and not store.touch(digest(number))
        assert store.put(digest(number), [page]) == Put(False)
    assert not library.calls and store.failing == "store: Mooncake is not asked for now: it took 3 s"
    library.seconds, library.now = 0.0, library.now + 31.0
    assert store.get(digest(0), into) and not store.get(digest(1), into) and store.put(digest(1), [page]) == Put(True)
    assert not store.failing


def test_the_thread_s_end_gives_back_what_was_lent(library: Library) -> None:
    background = Background(MooncakeStore(parse_store("mooncake:h:1"), LAYOUT), lambda: None, 1000)
    assert not library.calls
    background.close()
    assert library.calls == ["close"]


def test_a_master_that_is_not_there_is_said_in_one_line() -> None:
    if why := missing():
        pytest.skip(why)
    with pytest.raises(ValueError, match=r"^Mooncake's master at 127.0.0.1:1 does not answer: .*refused$"):
        MooncakeStore(parse_store("mooncake:127.0.0.1:1"), LAYOUT)


def test_what_is_missing_is_said_in_one_line() -> None:
    if find_spec("mooncake") is not None:
        pytest.skip("Mooncake is installed")
    with pytest.raises(ValueError, match=r"Mooncake cannot be used: No module named 'mooncake'; it takes pip install"):
        MooncakeStore(parse_store("mooncake:127.0.0.1:50051"), LAYOUT)

"""A process beside the test, with a pool of its own over the same directories, to be told what to do, or killed."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from minidisagg.store.page import HEAD_BYTES
from minidisagg.store.pool import Pool
from minidisagg.store.spec import TierSpec

LAYOUT = "layers=2 heads=3"
BYTES = 10_000  # of a page: two rows of the checksum, and some
FILE = HEAD_BYTES + BYTES

context = multiprocessing.get_context("forkserver")


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def content(name: bytes, size: int = BYTES) -> bytes:
    """The bytes of the page with that digest: each page has its own."""
    return hashlib.shake_128(name).digest(size)


def right(pool: Pool, name: bytes, size: int = BYTES) -> bool:
    """Whether a page is found; never with a wrong byte."""
    into = memoryview(bytearray(size))
    found = pool.get(name, into)
    while pool.promote():
        pass
    assert not found or into == content(name, size)
    return found


class Peer:
    """The process, as the test sees it."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        assert self.pipe.poll(30) and self.pipe.recv() == "ready"

    def tell(self, command: str, numbers: Sequence[int]) -> None:
        self.pipe.send((command, numbers))

    def hear(self) -> list[bool]:
        assert self.pipe.poll(30)
        return list(self.pipe.recv())

    def ask(self, command: str, *numbers: int) -> list[bool]:
        self.tell(command, numbers)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def obey(pipe: Connection, tiers: Sequence[TierSpec]) -> None:
    """`get` or `put` numbered pages; answers with what came of each."""
    pool = Pool(tiers, LAYOUT)
    pipe.send("ready")
    while True:
        command, numbers = pipe.recv()
        names = [digest(number) for number in numbers]
        if command == "get":
            pipe.send([right(pool, name) for name in names])
        else:
            pipe.send([pool.put(name, [content(name)]).written for name in names])


def raise_writers(pipe: Connection, tiers: Sequence[TierSpec]) -> None:
    """Fork a writer when told its first page and answer with its pid, and once more when it is dead."""
    pipe.send("ready")
    while True:
        first = pipe.recv()
        pid = os.fork()
        if not pid:
            write_on(tiers, first)
        pipe.send(pid)
        pipe.send(os.waitpid(pid, 0)[0])


def write_on(tiers: Sequence[TierSpec], first: int) -> None:
    """Put page after page, and read others, until it is killed."""
    pool = Pool(tiers, LAYOUT)
    for number in itertools.count(first):
        name = digest(number % 40)
        pool.put(name, [content(name)])
        right(pool, digest((number - 12) % 40))

"""A link between two processes, for tests: the destination's end is here, and the source's in a child.

The child is what gets killed and stopped. The fixture `make_pair` checks that nothing is left behind.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from minidisagg.core.inputs import PieceDone
from minidisagg.core.plan import Piece
from minidisagg.interconnect import Interconnect
from minidisagg.runtime.faults import Faults, FaultyLink
from minidisagg.transfer.emulate import Nic
from minidisagg.transfer.kinds import make_link
from minidisagg.transfer.links import LinkHost, LinkSetup, ThreadLink

KINDS = ["gloo", "shm", "tcp", "unix"]
TWO_SIDED = ["gloo", "tcp", "unix"]
SMALL = (3, 2, 16, 2, 8, 16)  # [layers, 2, pages, heads, page_size, head_dim]
LARGE = (8, 2, 64, 4, 64, 64)  # 64 MB in float32
TIMEOUT = 20.0
PAIR = "p0->d0"

torch.set_num_threads(1)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["minidisagg.transfer.gloo", "minidisagg.transfer.mapped", "minidisagg.transfer.stream"])


def make_cache(shape: tuple[int, ...], dtype: torch.dtype, seed: int | None) -> tuple[torch.Tensor, int]:
    """A cache over a memfd: random bits with a seed, else poison (every byte 0xA5)."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    fd = os.memfd_create("kv")
    os.ftruncate(fd, nbytes)
    raw = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
    if seed is None:
        raw.fill_(0xA5)
    else:
        words = raw.view(torch.int64)
        words.random_(-(1 << 62), 1 << 62, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape), fd


def source_main(
    pipe: Connection, kind: str, shape: tuple[int, ...], dtype: torch.dtype, run_dir: Path, timeout: float
) -> None:
    """The child: obeys the test, one command at a time."""
    torch.set_num_threads(1)
    kv, fd = make_cache(shape, dtype, 1)
    link: Any = None
    pipe.send(None)  # ready
    while True:
        command, *args = pipe.recv()
        if command == "connect":
            endpoint, epoch, around = args
            nic = Nic(around) if isinstance(around, Interconnect) else None
            link = open_link(kind, True, epoch, kv, fd, run_dir, timeout, nic)
            if isinstance(around, Faults):
                link = FaultyLink(link, around)
            link.connect(endpoint)
        elif command == "start":
            for op in args[0]:
                link.start(op)
        elif command == "wait":
            pipe.send(collect(link, args[0]))
            continue
        elif command == "abort":
            pipe.send(link.abort(False))
            continue
        else:
            os._exit(0)
        pipe.send(None)


def open_link(
    kind: str,
    source: bool,
    epoch: int,
    kv: torch.Tensor,
    fd: int,
    run_dir: Path,
    timeout: float,
    nic: Nic | None = None,
) -> ThreadLink:
    return make_link(LinkSetup(LinkHost(kind, kv, fd, run_dir, timeout, nic), source, PAIR, epoch, lambda: None))


def collect(link: Any, count: int, seconds: float = 30.0) -> list[PieceDone]:
    """The next `count` completions."""
    done: list[PieceDone] = []
    deadline = time.monotonic() + seconds
    while len(done) < count:
        done += link.poll()
        assert time.monotonic() < deadline, f"{len(done)} of {count} operations after {seconds} s"
        time.sleep(0.0005)
    return done


class Pair:
    """The destination's end here, and the child with the source's."""

    def __init__(
        self,
        kind: str,
        run_dir: Path,
        shape: tuple[int, ...] = SMALL,
        dtype: torch.dtype = torch.float32,
        timeout: float = TIMEOUT,
    ) -> None:
        self.kind, self.run_dir, self.shape, self.dtype, self.timeout = kind, run_dir, shape, dtype, timeout
        self.kv, self.fd = make_cache(shape, dtype, None)
        self.sent, self.sent_fd = make_cache(shape, dtype, 1)  # what the child has
        self.epoch = 0
        self.link: ThreadLink | None = None
        self.spawn()

    def spawn(self) -> None:
        self.pipe, theirs = context.Pipe()
        args = (theirs, self.kind, self.shape, self.dtype, self.run_dir, self.timeout)
        self.child: ForkServerProcess = context.Process(target=source_main, args=args, daemon=True)
        self.child.start()
        theirs.close()
        self.pipe.recv()

    def tell(self, *command: Any) -> Any:
        self.pipe.send(command)
        return self.pipe.recv()

    def connect(self, around: Interconnect | Faults | None = None) -> ThreadLink:
        self.epoch += 1
        self.link = open_link(self.kind, False, self.epoch, self.kv, self.fd, self.run_dir, self.timeout)
        self.pipe.send(("connect", self.link.endpoint(), self.epoch, around))
        self.link.connect(self.link.endpoint())
        self.pipe.recv()
        return self.link

    def op(
        self, seq: int, send: bool, pages: list[int], remote: list[int], layers: tuple[int, int], codec: str = "raw"
    ) -> Piece:
        return Piece("peer", self.epoch, seq, send, f"r{seq}", 1, pages, remote, len(remote), layers, codec=codec)

    def move(
        self, pieces: list[tuple[list[int], list[int], tuple[int, int]]], seq: int = 0, codec: str = "raw"
    ) -> list[PieceDone]:
        """Send (source pages, destination pages, layers) pieces and return the destination's completions."""
        assert self.link is not None
        sends = [self.op(seq + i, True, src, dst or src, layers, codec) for i, (src, dst, layers) in enumerate(pieces)]
        receives = [self.op(seq + i, False, dst, src, layers, codec) for i, (src, dst, layers) in enumerate(pieces)]
        if self.link.one_sided:
            self.tell("start", sends)
            told = self.tell("wait", len(sends))
            assert [c.seq for c in told] == [op.seq for op in sends] and all(c.ok for c in told)
            for op, done in zip(receives, told, strict=True):
                self.link.start(structs.replace(op, checksum=done.checksum))
            return collect(self.link, len(pieces))
        for op in receives:
            self.link.start(op)
        self.tell("start", sends)
        done = collect(self.link, len(pieces))
        self.tell("wait", len(sends))
        return done

    def stop(self) -> None:
        """Stop the child and see it stopped."""
        assert self.child.pid is not None
        os.kill(self.child.pid, signal.SIGSTOP)
        until(lambda: f"/proc/{self.child.pid}/stat", lambda stat: Path(stat).read_text().split()[2] == "T")

    def kill(self) -> None:
        self.child.kill()
        self.child.join()

    def close(self) -> None:
        self.kill()
        if self.link is not None:
            self.link.abort(True)
        self.pipe.close()
        os.close(self.fd)
        os.close(self.sent_fd)


def until(value: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not good(value()):
        assert time.monotonic() < deadline, value()
        time.sleep(0.001)


MakePair = Callable[..., Pair]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def poisoned(tensor: torch.Tensor) -> bool:
    return bool((bits(tensor) == 0xA5).all())

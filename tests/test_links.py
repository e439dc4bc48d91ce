"""Each kind of link between two processes: bytes and order, faults, deaths, stalls, and what is left behind.

The destination is the test's process, the source a child, which is what gets killed and stopped.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from minidisagg.config import ClusterSettings, WorkerSettings
from minidisagg.core.inputs import PieceDone
from minidisagg.core.plan import Piece
from minidisagg.runtime.faults import Faults, FaultyLink
from minidisagg.runtime.worker import link_kind
from minidisagg.transfer.codec import Codec
from minidisagg.transfer.emulate import EmulatedLink, Emulation
from minidisagg.transfer.kinds import make_link, resolve_kind
from minidisagg.transfer.links import LinkError, LinkHost, LinkSetup, ThreadLink

KINDS = ["gloo", "shm", "tcp", "unix"]
TWO_SIDED = ["gloo", "tcp", "unix"]
SMALL = (3, 2, 16, 2, 8, 16)  # [layers, 2, pages, heads, page_size, head_dim]
LARGE = (8, 2, 64, 4, 64, 64)  # 64 MB in float32
TIMEOUT = 20.0
PAIR = "p0->d0"

torch.set_num_threads(1)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["minidisagg.transfer.dist", "minidisagg.transfer.mapped", "minidisagg.transfer.stream"])


class UpperHalf(Codec):
    """A lossy codec: of each 4 bytes the upper two."""

    word = torch.int16

    def __init__(self, kv: torch.Tensor) -> None:
        self.row_bytes = kv[0, 0, 0].nbytes // 2

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(rows.view(torch.int16)[..., 1::2])

    def decode(self, wire: torch.Tensor, rows: torch.Tensor) -> None:
        rows.view(torch.int16)[..., 0::2] = 0
        rows.view(torch.int16)[..., 1::2] = wire


def upper(kv: torch.Tensor) -> torch.Tensor:
    """What is left of the cache, as bits."""
    return kv.contiguous().view(torch.int32) & -(1 << 16)


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
            link = open_link(kind, True, epoch, kv, fd, run_dir, timeout)
            if isinstance(around, Emulation):
                link = EmulatedLink(link, around)
            elif isinstance(around, Faults):
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
    kind: str, source: bool, epoch: int, kv: torch.Tensor, fd: int, run_dir: Path, timeout: float
) -> ThreadLink:
    link = make_link(LinkSetup(LinkHost(kind, kv, fd, run_dir, timeout), source, PAIR, epoch, lambda: None))
    link.codecs["upper"] = UpperHalf(kv)
    return link


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

    def connect(self, around: Emulation | Faults | None = None) -> ThreadLink:
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


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    """Makes pairs; afterwards nothing may be left in the run directory and in shared memory."""
    before, pairs = set(os.listdir("/dev/shm")), list[Pair]()
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)

    def make(kind: str, **options: Any) -> Pair:
        pairs.append(Pair(kind, run_dir, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()
    assert os.listdir(run_dir) == []
    mine = {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("sem.")}
    assert mine == set()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def poisoned(tensor: torch.Tensor) -> bool:
    return bool((bits(tensor) == 0xA5).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_arrive_bit_for_bit_in_order(kind: str, dtype: torch.dtype, make_pair: MakePair) -> None:
    pair = make_pair(kind, dtype=dtype)
    pair.connect()
    pieces = [
        ([1, 2, 3, 4], [8, 9, 10, 11], (0, 3)),  # runs on both sides
        ([9, 0, 5], [2, 7, 0], (1, 2)),  # scattered, one layer
        ([6, 7, 8, 12], [3, 4, 1, 15], (0, 2)),  # some of both
        ([15], [2], (2, 3)),
    ]
    done = pair.move(pieces)
    assert [(c.seq, c.ok, c.send, c.error) for c in done] == [(i, True, False, "") for i in range(4)]
    assert all(c.nbytes > 0 and c.checksum for c in done)
    expected = make_cache(SMALL, dtype, None)[0]
    for src, dst, (first, last) in pieces:
        expected[first:last, :, dst] = pair.sent[first:last, :, src]
    assert torch.equal(bits(pair.kv), bits(expected))


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_pieces_started_before_the_peer_is_there_wait_for_it(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    pair.epoch = 1
    pair.link = link = open_link(kind, False, 1, pair.kv, pair.fd, pair.run_dir, TIMEOUT)
    link.start(pair.op(0, False, [7], [1], (0, 3)))
    time.sleep(0.05)
    assert link.poll() == []
    pair.pipe.send(("connect", link.endpoint(), 1, None))
    link.connect(link.endpoint())
    pair.pipe.recv()
    pair.tell("start", [pair.op(0, True, [1], [7], (0, 3))])
    assert collect(link, 1)[0].ok
    assert torch.equal(bits(pair.kv[:, :, 7]), bits(pair.sent[:, :, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_large_pieces_of_many_blocks(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape=(4, 2, 48, 4, 64, 64))
    pair.connect()
    src, dst = list(range(40)), [*range(47, 27, -1), *range(20)]
    assert [c.ok for c in pair.move([(src, dst, (0, 4)), (src[:2], [20, 21], (1, 4))])] == [True, True]
    assert torch.equal(bits(pair.kv[:, :, dst]), bits(pair.sent[:, :, src]))
    assert torch.equal(bits(pair.kv[1:, :, 20:22]), bits(pair.sent[1:, :, :2]))
    assert poisoned(pair.kv[:, :, 22:28]) and poisoned(pair.kv[:1, :, 20:22])


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_a_piece_is_carried_in_the_codec_that_it_names(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape=(4, 2, 48, 4, 64, 64))
    pair.connect()
    src, dst = list(range(40)), [*range(47, 27, -1), *range(20)]
    many, _, some = pair.move([(src, dst, (0, 4)), (src, [], (1, 3)), ([40, 42], [20, 21], (1, 2))], codec="upper")
    (raw,) = pair.move([([47], [22], (0, 4))], seq=3)
    assert many.ok and some.ok and raw.ok
    assert many.nbytes == pair.kv[:, :, dst].nbytes // 2 and raw.nbytes == pair.kv[:, :, 22].nbytes
    assert torch.equal(pair.kv[:, :, dst].view(torch.int32), upper(pair.sent[:, :, src]))
    assert torch.equal(pair.kv[1, :, 20:22].contiguous().view(torch.int32), upper(pair.sent[1, :, [40, 42]]))
    assert torch.equal(bits(pair.kv[:, :, 22]), bits(pair.sent[:, :, 47]))
    assert poisoned(pair.kv[:, :, 23:28]) and poisoned(pair.kv[:1, :, 20:22])


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_damage_in_another_codec_is_detected(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    pair.connect(Faults(corrupt=1.0))
    (done,) = pair.move([([1, 3], [5, 6], (0, 3))], codec="upper")
    assert not done.ok and "checksum mismatch in piece 0" in done.error


def test_what_a_link_cannot_carry_is_refused(make_pair: MakePair) -> None:
    for kind, codec, error in (
        ("unix", "zip", "unknown codec 'zip'; known: raw, upper"),
        ("shm", "upper", "link 'shm' writes pages as they are, and cannot carry 'upper'"),
    ):
        link = make_pair(kind).connect()
        link.start(Piece("peer", 1, 0, False, "r", 1, [1], [1], 1, (0, 3), codec=codec))
        assert [(done.ok, done.error) for done in collect(link, 1)] == [(False, error)]


@pytest.mark.parametrize("kind", KINDS)
def test_discarded_pieces_keep_the_order(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    pair.connect()
    pieces: list[tuple[list[int], list[int], tuple[int, int]]] = [([4, 5], [1, 2], (0, 3)), ([6, 8], [3, 4], (0, 3))]
    if pair.kind != "shm":  # a one-sided source is told to stop before its pages are given up
        pieces.insert(1, ([1, 9, 2], [], (0, 3)))
    assert all(c.ok for c in pair.move(pieces))
    assert torch.equal(bits(pair.kv[:, :, 1:5]), bits(pair.sent[:, :, [4, 5, 6, 8]]))
    assert poisoned(pair.kv[:, :, 5:]) and poisoned(pair.kv[:, :, :1])


def test_one_sided_discard_completes_at_once(make_pair: MakePair) -> None:
    pair = make_pair("shm")
    link = pair.connect()
    link.start(pair.op(0, False, [], [3], (0, 3)))
    assert collect(link, 1, 1.0)[0].ok


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_another_sequence_number_or_request_breaks_the_link(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    for seq, request_id, incarnation in ((1, "r0", 1), (0, "other", 1), (0, "r0", 2)):
        link = pair.connect()
        link.start(pair.op(0, False, [5], [3], (0, 3)))
        link.start(pair.op(1, False, [6], [3], (0, 3)))
        wrong = Piece("peer", pair.epoch, seq, True, request_id, incarnation, [3], [3], 1, (0, 3))
        pair.tell("start", [wrong])
        first, second = collect(link, 2)
        assert not first.ok and "out of step" in first.error
        assert not second.ok and second.error == first.error  # nothing after it can be trusted
        assert link.abort(False) and pair.tell("abort")
    assert poisoned(pair.kv[:, :, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_operations_outside_the_cache_are_refused(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    for pages, layers in (([16], (0, 3)), ([-1], (0, 3)), ([1], (0, 4)), ([1, 2], (0, 3))):
        link = pair.connect()
        link.start(Piece("peer", pair.epoch, 0, False, "r", 1, pages, [0], 1, layers, 1))
        assert not collect(link, 1)[0].ok
        assert link.abort(True) and pair.tell("abort")
    assert poisoned(pair.kv)


def test_one_sided_source_checks_the_granted_pages(make_pair: MakePair) -> None:
    pair = make_pair("shm")
    pair.connect()
    pair.tell("start", [pair.op(0, True, [1], [16], (0, 3))])
    (done,) = pair.tell("wait", 1)
    assert not done.ok and "remote pages" in done.error


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_is_detected_and_the_link_stays_usable(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    link = pair.connect(Faults(corrupt=1.0))
    (done,) = pair.move([([1, 2], [5, 6], (0, 3))])
    assert not done.ok and "checksum mismatch in piece 0" in done.error
    assert int((bits(pair.kv[:, :, 5:7]) != bits(pair.sent[:, :, 1:3])).sum()) == 1  # the bytes really were damaged
    (done,) = pair.move([([1], [5], (0, 3))], seq=1)
    assert not done.ok and "piece 1" in done.error
    assert link.abort(True)


def test_some_faults_leave_the_other_pieces_whole(make_pair: MakePair) -> None:
    pair = make_pair("unix")
    pair.connect(Faults(corrupt=0.5, seed=3))
    done = pair.move([([page], [page], (0, 3)) for page in range(16)])
    assert 0 < sum(c.ok for c in done) < 16
    for c in done:
        assert c.ok == torch.equal(bits(pair.kv[:, :, c.seq]), bits(pair.sent[:, :, c.seq]))


def test_a_dropped_piece_is_detected_by_order(make_pair: MakePair) -> None:
    pair = make_pair("unix", timeout=0.5)
    link = pair.connect(Faults(drop=1.0))
    link.start(pair.op(0, False, [5], [1], (0, 3)))
    pair.tell("start", [pair.op(0, True, [1], [5], (0, 3))])
    assert pair.tell("wait", 1)[0].ok  # the source believes that it was sent
    assert not collect(link, 1, 2.0)[0].ok


def test_a_dropped_one_sided_piece_fails_its_checksum(make_pair: MakePair) -> None:
    pair = make_pair("shm")
    pair.connect(Faults(drop=1.0))
    assert not pair.move([([1, 2], [5, 6], (0, 3))])[0].ok
    assert poisoned(pair.kv)


@pytest.mark.parametrize("kind", ["gloo", "shm", "unix"])
def test_emulation_takes_the_time_it_says(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    nbytes = bits(pair.sent[:, :, :2]).numel()
    pair.connect(Emulation(bandwidth=nbytes / 0.05, latency=0.1))
    ops = [pair.op(i, True, [1, 2], [5, 6], (0, 3)) for i in range(4)]
    link = pair.link
    assert link is not None
    if not link.one_sided:
        for i in range(4):
            link.start(pair.op(i, False, [5, 6], [1, 2], (0, 3)))
    start = time.perf_counter()
    pair.tell("start", ops)
    done = pair.tell("wait", 4)
    elapsed = time.perf_counter() - start
    assert all(c.ok and c.seconds >= 0.15 for c in done)
    assert 0.3 <= elapsed < 0.5  # four pieces of 0.05 s one after another, the last one's latency on top


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_stream_notices_a_death_and_aborts_at_once(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape=LARGE)
    link = pair.connect()
    pages = list(range(64))
    link.start(pair.op(0, False, pages, pages, (0, 8)))
    pair.tell("start", [pair.op(0, True, pages[:32], pages[:32], (0, 8))])  # half of it, then nothing
    until(lambda: poisoned(pair.kv[0, 0, 0]), lambda still: not still)
    pair.kill()
    start = time.perf_counter()
    (done,) = collect(link, 1)
    assert not done.ok and ("closed" in done.error or "reset" in done.error)
    assert link.abort(False)
    assert time.perf_counter() - start < 0.1
    pair.spawn()
    pair.connect()
    assert pair.move([([1], [2], (0, 8))])[0].ok


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_stream_abort_releases_a_waiting_thread(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    link = pair.connect()
    link.start(pair.op(0, False, [1], [1], (0, 3)))
    link.start(pair.op(1, False, [2], [2], (0, 3)))
    time.sleep(0.05)
    start = time.perf_counter()
    assert link.abort(False)
    assert time.perf_counter() - start < 0.1
    assert [c.ok for c in collect(link, 2)] == [False, False]
    link.start(pair.op(2, False, [2], [2], (0, 3)))
    assert collect(link, 1)[0].error == "the link was aborted"


def test_gloo_abort_is_confirmed_after_the_timeout(make_pair: MakePair) -> None:
    pair = make_pair("gloo", shape=LARGE, timeout=1.5)
    link = pair.connect()
    pages = list(range(64))
    for seq in range(4):
        link.start(pair.op(seq, False, pages, pages, (0, 8)))
    pair.tell("start", [pair.op(seq, True, pages, pages, (0, 8)) for seq in range(4)])
    until(lambda: poisoned(pair.kv[0, 0, 0]), lambda still: not still)
    pair.kill()
    start = time.perf_counter()
    assert link.abort(False)
    assert time.perf_counter() - start < 1.5 + 0.5
    assert not collect(link, 4)[-1].ok
    pair.spawn()
    pair.connect()
    assert pair.move([([1], [2], (0, 8))])[0].ok


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_a_stopped_source_writes_nothing_after_a_confirmed_abort(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape=LARGE, timeout=1.5 if kind == "gloo" else TIMEOUT)
    link = pair.connect()
    pages = list(range(64))
    for seq in range(4):
        link.start(pair.op(seq, False, pages, pages, (0, 8)))
    pair.tell("start", [pair.op(seq, True, pages, pages, (0, 8)) for seq in range(4)])
    until(lambda: poisoned(pair.kv[0, 0, 0]), lambda still: not still)
    pair.stop()
    assert link.abort(False)
    assert not collect(link, 4)[-1].ok
    pair.kv.view(torch.uint8).fill_(0xA5)
    assert pair.child.pid is not None
    os.kill(pair.child.pid, signal.SIGCONT)
    assert not pair.tell("wait", 4)[-1].ok  # the source runs into its own failure
    assert poisoned(pair.kv)


def test_a_one_sided_destination_confirms_only_a_dead_source(make_pair: MakePair) -> None:
    pair = make_pair("shm")
    link = pair.connect()
    assert not link.abort(False)
    pair.kill()
    assert link.abort(True)


def test_an_aborted_one_sided_source_has_stopped_for_good(make_pair: MakePair) -> None:
    pair = make_pair("shm", shape=LARGE)
    link = pair.connect()
    pages = list(range(64))
    pair.tell("start", [pair.op(seq, True, pages, pages, (0, 8)) for seq in range(8)])
    assert pair.tell("abort")
    pair.kv.view(torch.uint8).fill_(0xA5)
    done = pair.tell("wait", 8)
    assert [c.seq for c in done] == list(range(8)) and not done[-1].ok
    assert poisoned(pair.kv)
    assert link.abort(True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_links_that_were_killed_or_never_met(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, timeout=1.0)
    pair.connect()
    pair.kill()
    lonely = open_link(kind, False, 9, pair.kv, pair.fd, pair.run_dir, 1.0)
    failed = threading.Event()

    def connect() -> None:
        with pytest.raises((OSError, RuntimeError)):
            lonely.connect(lonely.endpoint())
        failed.set()

    waiting = threading.Thread(target=connect)
    waiting.start()
    time.sleep(0.05)
    assert lonely.abort(True)
    waiting.join()
    assert failed.is_set()


def test_tcp_lets_only_the_source_in(make_pair: MakePair) -> None:
    import socket

    pair = make_pair("tcp")
    link = open_link("tcp", False, 1, pair.kv, pair.fd, pair.run_dir, TIMEOUT)
    address, _, _ = link.endpoint().partition("/")
    host, _, port = address.partition(":")
    assert host == "127.0.0.1"
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"0" * 16)
        pair.pipe.send(("connect", link.endpoint(), 1, None))
        link.connect(link.endpoint())
        pair.pipe.recv()
        assert stranger.recv(1) == b""
    pair.epoch, pair.link = 1, link
    assert pair.move([([1], [2], (0, 3))])[0].ok


def test_a_cache_of_another_shape_is_not_mapped(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("shm")
    kv, fd = make_cache((3, 2, 16, 2, 8, 32), torch.float32, None)
    link = open_link("shm", False, 1, kv, fd, tmp_path, TIMEOUT)
    pair.pipe.send(("connect", link.endpoint(), 1, None))
    with pytest.raises((LinkError, OSError)):
        link.connect(link.endpoint())
    assert link.abort(True)
    os.close(fd)


def meet(source: ThreadLink, dest: ThreadLink) -> list[BaseException]:
    """Connect both ends, here in one process; what either raises."""
    raised: list[BaseException] = []

    def connect(link: ThreadLink) -> None:
        try:
            link.connect(dest.endpoint())
        except (LinkError, OSError, RuntimeError) as error:
            raised.append(error)

    ends = [threading.Thread(target=connect, args=(link,)) for link in (dest, source)]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    return raised


@pytest.mark.parametrize(
    ("kind", "source_pair", "source_epoch", "met"),
    [
        ("gloo", PAIR, 1, True),
        ("gloo", PAIR, 2, False),
        ("gloo", "p1->d0", 1, False),
        ("shm", PAIR, 1, True),
        ("shm", PAIR, 2, False),
    ],
)
def test_a_source_of_another_pair_or_epoch_is_refused(
    kind: str, source_pair: str, source_epoch: int, met: bool, tmp_path: Path
) -> None:
    caches = [make_cache(SMALL, torch.float32, seed) for seed in (1, None)]
    ends = [
        make_link(LinkSetup(LinkHost(kind, kv, fd, tmp_path, TIMEOUT if met else 0.5), *end, lambda: None))
        for (kv, fd), end in zip(caches, ((True, source_pair, source_epoch), (False, PAIR, 1)), strict=True)
    ]
    raised = meet(*ends)
    assert not raised if met else len(raised) == 2, raised
    assert all(link.abort(True) for link in ends)
    for _, fd in caches:
        os.close(fd)


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_a_discarded_piece_is_verified_like_any_other(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    pair.connect(Faults(corrupt=1.0))
    discarded, kept = pair.move([([1, 9, 2], [], (0, 3)), ([3], [4], (0, 3))])
    assert not discarded.ok and "checksum mismatch in piece 0" in discarded.error
    assert "piece 1" in kept.error, "still in step"
    link = pair.connect()
    link.start(pair.op(0, False, [], [3], (0, 3)))
    pair.tell("start", [Piece("peer", pair.epoch, 0, True, "other", 1, [3], [3], 1, (0, 3))])
    (wrong,) = collect(link, 1)
    assert not wrong.ok and "out of step" in wrong.error


class StuckLink(ThreadLink):
    """Carries an operation for as long as the test wants, and cannot be interrupted."""

    def __init__(self, setup: LinkSetup) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.opened = self.dropped = 0
        super().__init__(setup)

    def endpoint(self) -> str:
        return "here"

    def _open(self, endpoint: str) -> None:
        self.opened += 1

    def _carry(self, op: Piece) -> int:
        self.begun.set()
        assert self.go_on.wait(10.0)
        return 5

    def _interrupt(self) -> None:
        pass

    def _drop(self) -> None:
        assert not self._thread.is_alive()
        self.dropped += 1


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[StuckLink]:
    kv, fd = make_cache(SMALL, torch.float32, None)
    link = StuckLink(LinkSetup(LinkHost("unix", kv, fd, tmp_path, TIMEOUT), True, PAIR, 1, lambda: None))
    link.patience = 0.05
    yield link
    link.go_on.set()
    link.patience = 10.0
    assert link.abort(True)
    os.close(fd)


def test_an_abort_is_not_confirmed_while_the_thread_is_at_work(stuck: StuckLink) -> None:
    stuck.connect("")
    for seq in range(2):
        stuck.start(Piece("peer", 1, seq, True, "r", 1, [1], [1], 1, (0, 3)))
    assert stuck.begun.wait(10.0)
    assert not stuck.abort(True) and not stuck.dropped
    stuck.go_on.set()
    stuck.patience = 10.0
    assert stuck.abort(False) and stuck.dropped == 1
    assert [(c.seq, c.ok, c.error) for c in stuck.poll()] == [(0, True, ""), (1, False, "the link was aborted")]


def test_an_abort_waits_for_a_thread_whose_wait_ran_out_while_the_process_was_stopped(stuck: StuckLink) -> None:
    """Both waits are over at the moment of the resume, and the thread has not been told yet."""
    patience, stuck.patience = stuck.patience, 1.0
    stuck.connect("")
    stuck.start(Piece("peer", 1, 0, True, "r", 1, [1], [1], 1, (0, 3)))
    assert stuck.begun.wait(10.0)
    thread = stuck._thread

    class Resumed:
        """`join` comes back after as long as it pleases: the process was stopped in it."""

        joins = 0

        def join(self, timeout: float) -> None:
            self.joins += 1
            if self.joins == 2:
                stuck.go_on.set()
                thread.join(10.0)

        def is_alive(self) -> bool:
            return thread.is_alive()

    stuck._thread = Resumed()  # type: ignore[assignment]
    assert stuck.abort(False)
    stuck._thread, stuck.patience = thread, patience


def test_an_abort_is_not_confirmed_while_connect_is_at_work(stuck: StuckLink) -> None:
    with stuck._opening:
        assert not stuck.abort(True) and not stuck.dropped


def test_a_link_that_was_aborted_does_not_connect(stuck: StuckLink) -> None:
    assert stuck.abort(False)
    with pytest.raises(LinkError, match="aborted"):
        stuck.connect("")
    assert not stuck.opened


@pytest.mark.parametrize(
    ("kind", "devices", "expected"),
    [
        ("auto", ("cpu", "cpu"), "gloo"),
        ("auto", ("cuda", "cuda"), "nccl"),
        ("auto", ("cuda", "cpu"), "gloo"),
        ("unix", ("cpu", "cpu"), "unix"),
        ("gloo", ("cpu", "cuda"), "gloo"),
    ],
)
def test_resolve_kind(kind: str, devices: tuple[str, ...], expected: str) -> None:
    assert resolve_kind(kind, *devices) == expected


@pytest.mark.parametrize(
    ("prefill", "decode", "two_ranks", "expected"),
    [
        ("cpu", "cpu", False, "gloo"),
        ("cpu", "cuda:1", False, "gloo"),
        ("cuda:0", "cuda:1", False, "nccl"),
        ("cuda", "cuda:0", False, "gloo"),
        ("cuda", "cuda:0", True, "nccl"),
    ],
)
def test_auto_knows_all_devices_of_a_cluster(
    prefill: str, decode: str, two_ranks: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1" if two_ranks else "")
    cluster = ClusterSettings(
        mode="disagg", prefill=WorkerSettings(device=prefill), decode=WorkerSettings(device=decode), decode_workers=2
    )
    assert link_kind(cluster) == expected


def test_kinds_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown link 'rdma'; known: auto, gloo, nccl, shm, tcp, unix"):
        resolve_kind("rdma", "cpu")
    with pytest.raises(ValueError, match="'nccl' needs caches on cuda, not cpu, cuda"):
        resolve_kind("nccl", "cpu", "cuda")
    with pytest.raises(ValueError, match="'shm' needs caches on cpu"):
        resolve_kind("shm", "cuda")
    kv, fd = make_cache(SMALL, torch.float32, None)
    with pytest.raises(ValueError, match="unknown link 'rdma'"):
        open_link("rdma", True, 1, kv, fd, tmp_path, 1.0)
    with pytest.raises(ValueError, match="memfd"):
        make_link(LinkSetup(LinkHost("shm", kv, None, tmp_path, 1.0), False, PAIR, 1, lambda: None))
    os.close(fd)

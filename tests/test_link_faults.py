"""Links that are damaged, killed, stopped and given up: what is noticed, when, and what is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from linkpair import (
    KINDS,
    LARGE,
    PAIR,
    SMALL,
    TIMEOUT,
    TWO_SIDED,
    MakePair,
    bits,
    collect,
    make_cache,
    open_link,
    poisoned,
    until,
)

from minidisagg.core.plan import Piece
from minidisagg.runtime.faults import Faults
from minidisagg.transfer.links import Carried, LinkError, LinkHost, LinkSetup, ThreadLink


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_another_codec_is_detected(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind)
    pair.connect(Faults(corrupt=1.0))
    (done,) = pair.move([([1, 3], [5, 6], (0, 3))], codec="int8")
    assert not done.ok and "checksum mismatch in piece 0" in done.error


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

    def _carry(self, piece: Piece, arrives: float) -> Carried:
        self.begun.set()
        assert self.go_on.wait(10.0)
        return Carried(5)

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

"""Each kind of link between two processes: which bytes arrive, in which order and codec, and what is refused."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from linkpair import (
    KINDS,
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
)
from torch.testing import assert_close

from minidisagg.config import ClusterSettings, WorkerSettings
from minidisagg.core.plan import Piece
from minidisagg.runtime.linkset import link_kind
from minidisagg.transfer.kinds import make_link, resolve_kind
from minidisagg.transfer.links import LinkError, LinkHost, LinkSetup, ThreadLink


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


def through_int8(kv: torch.Tensor) -> torch.Tensor:
    """There and back, by the definition: a scale for each token and head, to the nearest step of it."""
    scale = (kv.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    return (kv / scale).round().clamp(-127, 127) * scale


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_is_carried_in_the_codec_that_it_names(kind: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape=(4, 2, 48, 4, 64, 64))
    pair.connect()
    src, dst = list(range(40)), [*range(47, 27, -1), *range(20)]
    pieces: list[tuple[list[int], list[int], tuple[int, int]]] = [(src, dst, (0, 4)), ([40, 42], [20, 21], (1, 2))]
    if kind in TWO_SIDED:  # what nobody wants any more comes over a wire all the same, as large as it says
        pieces.insert(1, (src, [], (1, 3)))
    many, *_, some = pair.move(pieces, codec="int8")
    (raw,) = pair.move([([47], [22], (0, 4))], seq=len(pieces))
    assert many.ok and some.ok and raw.ok
    assert many.nbytes * 4 * 64 == pair.kv[:, :, dst].nbytes * (64 + 2) and raw.nbytes == pair.kv[:, :, 22].nbytes
    for page, come in zip([*dst, 20, 21], through_int8(pair.sent[:, :, [*src, 40, 42]]).unbind(2), strict=True):
        layers = slice(1, 2) if page in (20, 21) else slice(0, 4)
        assert_close(pair.kv[layers, :, page], come[layers], rtol=0, atol=0, equal_nan=True)  # its bits are random
    assert torch.equal(bits(pair.kv[:, :, 22]), bits(pair.sent[:, :, 47]))
    assert poisoned(pair.kv[:, :, 23:28]) and poisoned(pair.kv[:1, :, 20:22])


def test_what_a_link_cannot_carry_is_refused(make_pair: MakePair) -> None:
    link = make_pair("unix").connect()
    link.start(Piece("peer", 1, 0, False, "r", 1, [1], [1], 1, (0, 3), codec="zip"))
    error = "unknown codec 'zip'; known: raw, int8"
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


def test_tcp_lets_only_the_source_in(make_pair: MakePair) -> None:

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
    ("prefill", "decode", "expected"),
    [
        ("cpu", "cpu", "gloo"),
        ("cpu", "cuda:1", "gloo"),
        ("cuda:0", "cuda:1", "nccl"),
        ("cuda:0", "cuda:0", "cuda_ipc"),
        ("cuda", "cuda", "cuda_ipc"),  # where there is one GPU, or none
    ],
)
def test_auto_knows_all_devices_of_a_cluster(
    prefill: str, decode: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cluster = ClusterSettings(
        mode="disagg", prefill=WorkerSettings(device=prefill), decode=WorkerSettings(device=decode), decode_workers=2
    )
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert link_kind(cluster) == (expected, "")


def test_gloo_where_nccl_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a reason, of which the front end warns."""
    for nccl, devices, reason in (
        (True, ("cuda:0", "cuda:0"), "nccl takes one worker a GPU"),
        (False, ("cuda:0", "cuda:1"), f"torch {torch.__version__} was built without nccl"),
    ):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda nccl=nccl: nccl)
        prefill, decode = (WorkerSettings(device=device) for device in devices)
        cluster = ClusterSettings(mode="disagg", link="nccl", prefill=prefill, decode=decode)
        assert link_kind(cluster) == ("gloo", reason)


def test_colocated_workers_may_be_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = WorkerSettings(device="cuda")
    cluster = ClusterSettings(prefill=worker, decode=worker)
    for gpus, expected in ((1, "cuda_ipc"), (2, "nccl")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        assert link_kind(cluster) == (expected, "")


def test_kinds_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown link 'rdma'; known: auto, cuda_ipc, gloo, nccl, shm, tcp, unix"):
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

"""The store of KV pages: no wrong byte whatever stops, fails or is damaged, and who has to go when it is full."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from lossy import LossyFiles, Stop
from storepeer import BYTES, FILE, LAYOUT, Peer, content, digest, obey, raise_writers, right

from minidisagg.core.messages import StoreStats
from minidisagg.runtime.operations import Operations
from minidisagg.runtime.storage import Storage
from minidisagg.store import files as files_module
from minidisagg.store import lifetime
from minidisagg.store import spec as spec_module
from minidisagg.store import tier as tier_module
from minidisagg.store.background import Background, Loaded, Saved
from minidisagg.store.files import Files
from minidisagg.store.page import HEAD_BYTES, ROW, checksum
from minidisagg.store.pool import Pool, Put
from minidisagg.store.spec import StoreSpec, TierSpec, parse_store

DRAM, SSD = Path("/memory"), Path("/disk/of/pages")  # of the file layer that is no real one
SMALL = 50  # bytes of its pages
SMALL_FILE = FILE - BYTES + SMALL
StartPeer = Callable[..., Peer]


def small(files: LossyFiles, dram: int, ssd: int) -> Pool:
    """So many pages fit into each tier."""
    tiers = [TierSpec(str(DRAM), dram * SMALL_FILE, False), TierSpec(str(SSD), ssd * SMALL_FILE, True)]
    return Pool([tier for tier in tiers if tier.limit], LAYOUT, files)


def put(pool: Pool, number: int) -> Put:
    return pool.put(digest(number), [content(digest(number), SMALL)])


def held(pool: Pool, numbers: range, tier: int = 0) -> list[int]:
    return [number for number in numbers if pool.tiers[tier].has(digest(number).hex())]


def on_disk(tmp_path: Path, dram: int, ssd: int) -> list[TierSpec]:
    """Real directories for so many pages."""
    tiers = [TierSpec(str(tmp_path / "dram"), dram * FILE, False), TierSpec(str(tmp_path / "ssd"), ssd * FILE, True)]
    return [tier for tier in tiers if tier.limit]


@pytest.fixture
def start() -> Iterator[StartPeer]:
    """Starts peers, which end with the test."""
    peers: list[Peer] = []

    def start(target: Callable[..., None], *args: object) -> Peer:
        peers.append(Peer(target, *args))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


# ---------------------------------------------------------------- stops


@pytest.mark.parametrize("dram", [0, 3], ids=["disk", "memory and disk"])
def test_a_stop_at_any_operation_leaves_right_pages_or_none(dram: int) -> None:
    """1,000 stops in all: of the process, or of the power."""
    everything, powers, seen = [digest(number) for number in range(20)], 0, 0
    for seed in range(50):
        files, dice, stored = LossyFiles(seed, DRAM), random.Random(seed), set[bytes]()
        for _ in range(10):
            files.countdown = dice.randint(1, 80)
            try:
                pool = small(files, dram, 8)
                while True:
                    name = dice.choice(everything)
                    if dice.random() < 0.3:
                        right(pool, name, SMALL)
                    else:
                        done = pool.put(name, [content(name, SMALL)])
                        files.unlinked.clear()  # what an eviction removed has been told now
                        stored -= set(done.evicted)
                        stored |= {name} if done.written else set()
            except Stop:
                pass
            if power := dice.random() < 0.5:
                powers += 1
                files.lose_power()
            else:
                files.kill()
            pool = small(files, dram, 8)
            assert not [path for path in files.names if path.suffix == ".tmp"]
            if not power or not dram:  # what has not been evicted from memory yet is lost with it
                assert not [name for name in stored if not pool.has(name) and name.hex() not in files.unlinked]
            seen += sum(right(pool, name, SMALL) for name in everything)
            assert pool.corrupt == 0  # no checksum was needed for it
            assert files.tallies[SSD / "lock"] == sum(entry.size for entry in files.list(SSD))
            stored = {name for name in stored if pool.has(name)}
            files.unlinked.clear()
    assert powers > 200 and seen > 2000


def test_twenty_killed_writers_leave_right_pages_or_none(tmp_path: Path, start: StartPeer) -> None:
    dice, tiers, seen, cut_short = random.Random(7), on_disk(tmp_path, 6, 15), 0, 0
    nurse = start(raise_writers, tiers)
    for turn in range(20):
        nurse.pipe.send(7 * turn)
        pid = nurse.pipe.recv()
        time.sleep(dice.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert nurse.pipe.recv() == pid
        cut_short += len(list(tmp_path.glob("*/*.tmp")))
        pool = Pool(tiers, LAYOUT)
        for tier in pool.tiers:
            sizes = [path.stat().st_size for path in tier.directory.iterdir() if path.name != "lock"]
            assert sizes == [FILE] * len(sizes) and sum(sizes) <= tier.spec.limit + FILE
        seen += sum(right(pool, digest(number)) for number in range(40))
        assert pool.corrupt == 0
    assert seen > 100 and cut_short > 5


def test_a_living_writer_keeps_its_temporary_file(tmp_path: Path, start: StartPeer) -> None:
    peer = start(obey, tiers := on_disk(tmp_path, 0, 2))
    living, dead, stranger = (tmp_path / "ssd" / f"{'0' * 64}.{pid}-0.tmp" for pid in (peer.process.pid, 1 << 30, "x"))
    for path in (living, dead, stranger):
        path.touch()
    Pool(tiers, LAYOUT)
    assert living.exists() and stranger.exists() and not dead.exists()
    os.utime(living, (0, 0))
    Pool(tiers, LAYOUT)
    assert not living.exists()


# ---------------------------------------------------------------- damage


def damage_bit(data: bytearray) -> None:
    data[-1] ^= 1


def swap_rows(data: bytearray) -> None:
    first = len(data) - BYTES
    one, other = slice(first, first + ROW), slice(first + ROW, first + 2 * ROW)
    data[one], data[other] = data[other], data[one]


def swap_sectors(data: bytearray) -> None:
    first = len(data) - BYTES
    one, other = slice(first + 512, first + 1024), slice(first + 2048, first + 2560)
    data[one], data[other] = data[other], data[one]


def cut_off(data: bytearray) -> None:
    del data[-1:]


def cut_off_head(data: bytearray) -> None:
    del data[20:]


def lengthen(data: bytearray) -> None:
    data.append(0)


def other_version(data: bytearray) -> None:
    data[8] += 1


def other_digest(data: bytearray) -> None:
    data[44] ^= 1


def all_zero(data: bytearray) -> None:
    data[:] = bytes(len(data))


@pytest.mark.parametrize(
    "damage",
    [damage_bit, swap_rows, swap_sectors, cut_off, cut_off_head, lengthen, other_version, other_digest, all_zero],
)
def test_a_damaged_page_is_a_miss_and_goes(damage: Callable[[bytearray], None], tmp_path: Path) -> None:
    tiers, name = on_disk(tmp_path, 0, 3), digest(1)
    pool, path = Pool(tiers, LAYOUT), tmp_path / "ssd" / name.hex()
    assert pool.put(name, [content(name)]) == Put(True) and right(pool, name)
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    assert not right(pool, name)
    assert not path.exists() and pool.corrupt == 1
    assert pool.put(name, [content(name)]).written and right(pool, name)
    assert int.from_bytes((tmp_path / "ssd" / "lock").read_bytes(), "little") == path.stat().st_size == FILE


def test_a_page_of_another_layout_is_a_miss_and_stays(tmp_path: Path) -> None:
    tiers, name = on_disk(tmp_path, 0, 3), digest(1)
    pool, other = Pool(tiers, LAYOUT), Pool(tiers, "layers=4")
    pool.put(name, [content(name)])
    assert not right(other, name) and other.corrupt == 0
    assert not right(pool, name, BYTES - 1) and not right(pool, name, BYTES + 1)
    assert right(pool, name)


def test_a_page_that_is_damaged_in_memory_comes_from_the_disk(tmp_path: Path) -> None:
    pool, name = Pool(on_disk(tmp_path, 1, 3), LAYOUT), digest(1)
    for number in (1, 2):
        pool.put(digest(number), [content(digest(number))])
    assert right(pool, name)  # from the disk, where its copy stays
    path = tmp_path / "dram" / name.hex()
    path.write_bytes(bytes(FILE))
    assert right(pool, name) and pool.corrupt == 1
    assert path.stat().st_size == FILE and right(Pool(on_disk(tmp_path, 1, 0), LAYOUT), name)


def test_any_changed_byte_changes_the_checksum() -> None:
    for size in (1, 7, ROW - 1, ROW, ROW + 1, 3 * ROW + 5):
        data = bytearray(random.Random(size).randbytes(size))
        total = checksum(bytes(data))
        assert checksum(memoryview(data)) == total
        for place in random.Random(size).sample(range(size), min(size, 50)):
            data[place] ^= 1 << place % 8
            assert checksum(memoryview(data)) != total
            data[place] ^= 1 << place % 8


@pytest.mark.parametrize("length", [1, 64, 128], ids=["words", "sectors", "KiB"])
def test_what_has_changed_places_changes_the_checksum(length: int) -> None:
    """Within a row of the sums, or across rows; and where all words differ in their last bit only."""
    dice, size = np.random.default_rng(length), 3 * ROW // 8
    for _ in range(300):
        words = dice.integers(1 << 63, size=size, dtype=np.uint64)
        first, second = dice.choice(size // length, 2, replace=False) * length
        if dice.random() < 0.5:  # in one row
            second = first // 512 * 512 + second % 512
        one, other = slice(first, first + length), slice(second, second + length)
        if dice.random() < 0.5:
            words[other] = words[one] ^ np.uint64(1 << 63)
        swapped = words.copy()
        swapped[one], swapped[other] = words[other], words[one]
        assert first == second or checksum(swapped.tobytes()) != checksum(words.tobytes())


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_ends_writing_and_says_why_and_reading_goes_on(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LossyFiles(1, DRAM)
    pool = small(files, 0, 8)
    assert put(pool, 1).written and put(pool, 2).written
    files.capacity, files.refusal = 2 * SMALL_FILE, code
    assert [put(pool, number) for number in (3, 4, 5)] == [Put(False)] * 3
    assert right(pool, digest(1), SMALL) and right(pool, digest(2), SMALL) and not right(pool, digest(3), SMALL)
    assert len(files.names) == 2
    files.capacity *= 9
    assert put(pool, 3) == Put(False)  # it does not try so soon
    files.capacity = 0
    told = f"store: nothing is written to {SSD} for now, what is there is read: {os.strerror(code)}"
    assert pool.failing == told
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + tier_module.RETRY + 1)
    assert not put(pool, 3).written and pool.failing == told  # it has tried again
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * tier_module.RETRY + 2)
    files.capacity = 9 * SMALL_FILE
    assert put(pool, 3).written and put(pool, 4).written and not pool.failing
    files.capacity = 0
    assert not put(pool, 5).written and pool.failing == told


def test_a_directory_that_cannot_be_made_is_a_store_without_pages(tmp_path: Path) -> None:
    (tmp_path / "ssd").touch()
    pool = Pool(on_disk(tmp_path, 0, 3), LAYOUT)
    assert pool.put(digest(1), [content(digest(1))]) == Put(False)
    assert not pool.has(digest(1)) and not right(pool, digest(1))
    assert pool.failing.endswith(os.strerror(errno.EEXIST))


def test_a_directory_that_becomes_a_file_is_a_miss(tmp_path: Path) -> None:
    """`stat` says ENOTDIR then, and no load ends the thread that promotes what it has found."""
    pool, name = Pool(on_disk(tmp_path, 1, 3), LAYOUT), digest(1)
    for number in (1, 2):
        pool.put(digest(number), [content(digest(number))])
    into = memoryview(bytearray(BYTES))
    assert pool.get(name, into)  # from the disk
    shutil.rmtree(tmp_path / "dram")
    (tmp_path / "dram").touch()
    assert pool.promote() and pool.failing.endswith(os.strerror(errno.ENOTDIR))
    assert right(pool, name) and not right(pool, digest(2))
    shutil.rmtree(tmp_path / "ssd")
    (tmp_path / "ssd").touch()
    assert not right(pool, name) and pool.tiers[1].load(name.hex()) is None


def test_what_another_user_has_forbidden_is_no_reason_not_to_begin(tmp_path: Path) -> None:
    """To read the directory above, or to remove a file: what is there counts, and the limit is kept."""

    class Guarded(Files):
        def fsync(self, path: Path) -> None:
            if path in tmp_path.parents or path == tmp_path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            super().fsync(path)

        def unlink(self, path: Path) -> None:
            if path.suffix == ".tmp":
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            super().unlink(path)

    tiers = on_disk(tmp_path, 0, 3)
    empty = Pool(tiers, LAYOUT, Guarded())  # where all directories above are to be synced
    assert not empty.failing
    fill(empty)
    (tmp_path / "ssd" / f"{'0' * 64}.{1 << 30}-0.tmp").touch()
    pool = Pool(tiers, LAYOUT, Guarded())
    assert not pool.failing and pool.put(digest(3), [content(digest(3))]) == Put(True, (digest(0),))


def test_a_start_that_fails_is_made_up_for_before_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Files):
        broken = True

        def list(self, directory: Path) -> list[files_module.Entry]:
            if self.broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().list(directory)

    tiers, files = on_disk(tmp_path, 0, 3), Broken()
    fill(Pool(tiers, LAYOUT))
    pool = Pool(tiers, LAYOUT, files)
    (tmp_path / "ssd" / "lock").write_bytes(bytes(8))  # as after a loss of power
    assert pool.failing.endswith(os.strerror(errno.EIO)) and right(pool, digest(0))
    files.broken, now = False, time.monotonic()
    assert put(pool, 3) == Put(False)
    monkeypatch.setattr(time, "monotonic", lambda: now + tier_module.RETRY + 1)
    assert pool.put(digest(3), [content(digest(3))]) == Put(True, (digest(1),)) and not pool.failing


def fill(pool: Pool) -> None:
    """With three pages."""
    for number in range(3):
        assert pool.put(digest(number), [content(digest(number))]).written


def test_a_dead_writer_with_this_process_s_number_is_in_nobody_s_way(tmp_path: Path) -> None:
    """As in containers, where the next process may well have it."""
    code = """
import os, sys
from pathlib import Path
from storepeer import LAYOUT, content, digest
from minidisagg.store.pool import Pool
from minidisagg.store.spec import TierSpec
name = digest(1)
Path(sys.argv[1], f"{name.hex()}.{os.getpid()}-0.tmp").touch()
assert Pool([TierSpec(sys.argv[1], 1 << 20, True)], LAYOUT).put(name, [content(name)]).written
"""
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": path})


def test_an_owner_of_the_lock_that_stands_still_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "PATIENCE", 0.05)
    pool = Pool(on_disk(tmp_path, 0, 3), LAYOUT)
    pool.put(digest(1), [content(digest(1))])
    with open(tmp_path / "ssd" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not pool.put(digest(2), [content(digest(2))]).written
        assert right(pool, digest(1))
    assert "was locked for 0.05 s" in pool.failing and len(list((tmp_path / "ssd").iterdir())) == 2


def test_trouble_is_told_once_and_again_after_it_was_well() -> None:
    class Told(Operations):
        def __init__(self) -> None:
            self._failing, self.told = {}, list[str]()

        def tell(self, text: str, level: int = logging.INFO) -> None:
            assert level == logging.WARNING
            self.told.append(text)

    front_end = Told()
    said = ("a", "full"), ("b", "full"), ("a", "full"), ("a", ""), ("b", ""), ("b", "full"), ("a", "ro")
    for worker, failing in said:
        front_end._on_store(worker, StoreStats(failing=failing))
    assert front_end.told == ["full", "full", "ro"]


# ---------------------------------------------------------------- tiers


def test_what_memory_evicts_goes_to_disk_and_comes_back_when_it_is_used() -> None:
    pool = small(LossyFiles(1, DRAM), 2, 3)
    everything = range(1, 8)
    assert [put(pool, number) for number in (1, 2, 3, 4)] == [Put(True)] * 4
    assert held(pool, everything) == [3, 4] and held(pool, everything, 1) == [1, 2]
    assert right(pool, digest(1), SMALL)
    assert held(pool, everything) == [1, 4] and held(pool, everything, 1) == [1, 2, 3]
    assert put(pool, 5) == Put(True, (digest(2),))  # 4 goes down, and 2 is the oldest there
    assert held(pool, everything) == [1, 5] and held(pool, everything, 1) == [1, 3, 4]
    assert put(pool, 6) == Put(True)  # of 1 the disk has a copy
    assert held(pool, everything) == [5, 6] and held(pool, everything, 1) == [1, 3, 4]
    assert put(pool, 3) == Put(False)  # it is there, and counts as used
    assert put(pool, 7) == Put(True, (digest(4),))
    assert held(pool, everything) == [6, 7] and held(pool, everything, 1) == [1, 3, 5]


def test_a_page_that_memory_refuses_goes_to_disk() -> None:
    pool = small(LossyFiles(1, DRAM), 1, 9)
    name = digest(1)
    assert pool.put(name, [content(name, 2 * SMALL)]).written
    assert held(pool, range(3)) == [] and held(pool, range(3), 1) == [1]
    assert right(pool, name, 2 * SMALL)
    huge = content(digest(2), 9 * SMALL_FILE)
    assert pool.put(digest(2), [huge]) == Put(False)


def test_a_page_in_parts_is_their_sum(tmp_path: Path) -> None:
    pool, name = Pool(on_disk(tmp_path, 3, 0), LAYOUT), digest(1)
    data = memoryview(content(name))
    assert pool.put(name, [data[:1], data[1:5000], data[5000:]]).written and right(pool, name)
    name = digest(2)
    words = memoryview(content(name)).cast("q")
    assert pool.put(name, [words]).written and right(pool, name)
    assert int.from_bytes((tmp_path / "dram" / "lock").read_bytes(), "little") == 2 * FILE


def test_pages_are_there_after_a_restart_and_memory_goes_at_the_end(tmp_path: Path) -> None:
    tiers = on_disk(tmp_path, 2, 2)
    pool = Pool(tiers, LAYOUT)
    for number in range(4):
        pool.put(digest(number), [content(digest(number))])
    pool = Pool(tiers, LAYOUT)
    assert all(pool.has(digest(number)) for number in range(4)) and not pool.has(digest(4))
    assert pool.put(digest(4), [content(digest(4))]) == Put(True, (digest(0),))  # what was there counts
    pool.sink()
    shutil.rmtree(tmp_path / "dram")
    pool.sink()
    assert [right(Pool(tiers, LAYOUT), digest(number)) for number in range(5)] == [False] * 3 + [True] * 2


def test_what_was_used_last_reaches_the_disk_first_and_is_the_last_to_leave_it() -> None:
    files = LossyFiles(1, DRAM)
    pool, everything = small(files, 6, 3), range(7)
    for number in everything:
        put(pool, number)
    assert right(pool, digest(2), SMALL) and held(pool, everything, 1) == [0]
    pool.sink(time.monotonic() - 1)
    assert held(pool, everything, 1) == [0]  # no time
    pool.sink()
    assert held(pool, everything, 1) == [2, 5, 6]  # no more room
    pool = small(files, 0, 3)
    gone = [one for number in (7, 8, 9) for one in put(pool, number).evicted]
    assert gone == [digest(number) for number in (5, 6, 2)]


def test_a_page_is_written_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(LossyFiles):
        def __init__(self) -> None:
            super().__init__(1, DRAM)
            self.written = list[str]()

        def rename(self, path: Path, to: Path) -> None:
            self.written += [to.name] if to.parent == SSD else []
            super().rename(path, to)

    files, everything = Counting(), range(5)
    pool = small(files, 5, 20)
    for number in everything:
        put(pool, number)
    assert not files.written
    for count in 1, 2:
        assert pool.write_back() and len(files.written) == count
    pool = small(files, 5, 20)  # a restarted worker, which knows nothing of what it has written
    while pool.write_back():
        pass
    assert held(pool, everything) == held(pool, everything, 1) == [*everything]
    now = time.perf_counter()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert put(pool, 5).written
    files.capacity = sum(len(inode.data) for inode in files.names.values())
    assert pool.write_back() and not pool.write_back()  # a full disk is not tried again so soon
    assert pool.failing
    files.capacity, now = 1 << 40, now + tier_module.RETRY + 1
    assert pool.write_back() and not pool.write_back() and not pool.failing
    for number in range(6, 11):  # what they evict is there
        put(pool, number)
    pool.sink()
    assert sorted(files.written) == sorted(digest(number).hex() for number in range(11))


def test_what_was_saved_outlives_a_kill_soon_after(tmp_path: Path) -> None:
    code = """
import sys, threading, time
from storepeer import BYTES, LAYOUT, content, digest
from minidisagg.store.background import Background
from minidisagg.store.pool import Pool
from minidisagg.store.spec import TierSpec
tiers = [TierSpec(f"{sys.argv[1]}/{name}", 1 << 20, name == "ssd") for name in ("dram", "ssd")]
woken = threading.Semaphore(0)
background = Background(Pool(tiers, LAYOUT), woken.release, BYTES)
for number in range(20):
    background.save(digest(number), memoryview(content(digest(number))).toreadonly)
for _ in range(20):
    woken.acquire()
print("saved", flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"saved\n"
        until = time.monotonic() + 10
        while len(list((tmp_path / "ssd").glob("*[0-9a-f]"))) < 20 and time.monotonic() < until:
            time.sleep(0.01)
        writer.kill()
    assert len(list((tmp_path / "dram").iterdir())) == 21  # and the lock
    shutil.rmtree(tmp_path / "dram")
    pool = Pool(on_disk(tmp_path, 20, 20), LAYOUT)
    assert all(right(pool, digest(number)) for number in range(20)) and not pool.corrupt


class SlowDisk(Files):
    """Each page takes a while."""

    def fsync(self, path: Path) -> None:
        time.sleep(0.05)


def test_at_its_end_an_engine_waits_so_long_for_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = on_disk(tmp_path, 20, 20)
    for number in range(20):
        Pool(tiers, LAYOUT).put(digest(number), [content(digest(number))])
    monkeypatch.setattr(lifetime, "Pool", partial(Pool, files=SlowDisk()))
    monkeypatch.setattr(lifetime, "SINK", 0.5)

    async def run() -> int:
        ending, turns = asyncio.create_task(lifetime.sink_store(tiers)), 0
        while not ending.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns

    began = time.monotonic()
    assert asyncio.run(run()) > 10  # the loop goes on
    assert time.monotonic() - began < 1.0
    assert 2 < len(held(Pool(tiers, LAYOUT), range(20), 1)) < 10
    monkeypatch.setattr(threading.Thread, "start", raise_shut_down)
    asyncio.run(lifetime.sink_store(tiers))
    assert len(held(Pool(tiers, LAYOUT), range(20), 1)) > 6


def test_a_disk_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor at the loop's end, which joins the threads of its executor."""
    tiers, go_on = on_disk(tmp_path, 2, 2), threading.Event()

    class Stuck(Files):
        def fsync(self, path: Path) -> None:
            go_on.wait(10)

    Pool(tiers, LAYOUT).put(digest(1), [content(digest(1))])
    monkeypatch.setattr(lifetime, "Pool", partial(Pool, files=Stuck()))
    monkeypatch.setattr(lifetime, "SINK", 0.2)
    began = time.monotonic()
    asyncio.run(lifetime.sink_store(tiers))
    took = time.monotonic() - began
    go_on.set()
    assert 0.2 < took < 3.0


def raise_shut_down(*_: object) -> None:
    raise RuntimeError("can't create new thread at interpreter shutdown")


def test_the_order_of_use_is_known_to_less_than_a_tick_of_the_kernel(tmp_path: Path) -> None:
    pool, order = Pool(on_disk(tmp_path, 6, 0), LAYOUT), [3, 1, 5, 2, 4]
    pages = {number: content(digest(number)) for number in range(11)}
    into, gone = memoryview(bytearray(BYTES)), list[bytes]()
    for number in (*range(1, 6), 0):
        pool.put(digest(number), [pages[number]])
    for number in order:
        assert pool.get(digest(number), into)
    for number in range(6, 11):
        gone += pool.put(digest(number), [pages[number]]).evicted
    assert gone == [digest(number) for number in (0, 3, 1, 5, 2)]
    for number in range(11, 31):  # what is written after a use is younger
        assert pool.get(digest(number - 1), into)
        pool.put(digest(number), [content(digest(number))])
        before, after = (pool.tiers[0].files.stat(tmp_path / "dram" / digest(n).hex()) for n in (number - 1, number))
        assert before is not None and after is not None and before.used < after.used


# ---------------------------------------------------------------- processes


def test_the_least_recently_used_page_of_all_processes_goes_first(tmp_path: Path, start: StartPeer) -> None:
    tiers = on_disk(tmp_path, 0, 3)
    one, other = start(obey, tiers), start(obey, tiers)
    assert one.ask("put", 1, 2) == [True, True] and other.ask("put", 3) == [True]
    assert other.ask("get", 1) == [True]  # 2 is the oldest now
    assert one.ask("put", 4) == [True]
    assert other.ask("get", 1, 2, 3, 4) == [True, False, True, True]
    assert one.ask("get", 1) == [True] and other.ask("put", 3) == [False]
    assert other.ask("put", 5) == [True]  # 4, since 1 and 3 were used
    assert one.ask("get", 1, 3, 4, 5) == [True, True, False, True]


def test_a_limit_is_that_of_all_processes_together(tmp_path: Path, start: StartPeer) -> None:
    tiers = on_disk(tmp_path, 0, 5)
    peers = [start(obey, tiers), start(obey, tiers)]
    for first, peer in zip((0, 100), peers, strict=True):
        peer.tell("put", range(first, first + 60))
    assert all(all(peer.hear()) for peer in peers)
    pages = [path for path in (tmp_path / "ssd").iterdir() if path.name != "lock"]
    assert len(pages) == 5
    assert int.from_bytes((tmp_path / "ssd" / "lock").read_bytes(), "little") == 5 * FILE


def test_two_processes_put_the_same_pages_at_once(tmp_path: Path, start: StartPeer) -> None:
    tiers = on_disk(tmp_path, 50, 50)
    peers = [start(obey, tiers), start(obey, tiers)]
    for peer in peers:
        peer.tell("put", range(50))
    written = [peer.hear() for peer in peers]
    assert [one + other for one, other in zip(*written, strict=True)] == [1] * 50
    assert all(right(Pool(tiers, LAYOUT), digest(number)) for number in range(50))
    assert [len(list(tmp_path.glob(f"{tier}/*"))) for tier in ("dram", "ssd")] == [51, 1]  # and the locks


# ---------------------------------------------------------------- the thread


class Slow:
    """A store that waits for `go` before each page, and notes what it was asked."""

    def __init__(self) -> None:
        self.corrupt, self.failing, self.asked = 0, "", list[str]()
        self.go, self.promotions, self.fresh = threading.Semaphore(0), 0, 0

    def touch(self, digest: bytes) -> bool:
        return False

    def get(self, digest: bytes, into: memoryview) -> bool:
        self.go.acquire()
        self.asked.append(f"get {digest.decode()}")
        into[:] = digest * len(into)
        return digest != b"x"

    def put(self, digest: bytes, parts: Sequence[bytes | memoryview]) -> Put:
        self.go.acquire()
        self.asked.append(f"put {digest.decode()}")
        return Put(True, (b"old",))

    def promote(self) -> bool:
        self.promotions -= 1
        self.asked += ["promote"] if self.promotions >= 0 else []
        return self.promotions >= 0

    def write_back(self) -> bool:
        self.fresh -= 1
        self.asked += ["write back"] if self.fresh >= 0 else []
        return self.fresh >= 0

    def close(self) -> None:
        self.asked.append("close")


def collect(background: Background, woken: threading.Semaphore, count: int) -> list[Loaded | Saved]:
    done: list[Loaded | Saved] = []
    for _ in range(count):
        assert woken.acquire(timeout=10)
        done += background.poll()
    return done


def test_loads_go_before_saves() -> None:
    store, woken = Slow(), threading.Semaphore(0)
    background = Background(store, woken.release, page_bytes=4)
    landed: list[tuple[int, bytes]] = []
    read = memoryview(b"1234").toreadonly

    def land(number: int, data: memoryview) -> None:
        landed.append((number, bytes(data)))

    background.save(b"a", read)
    background.save(b"b", read)
    while background._saves and len(background._saves) > 1:  # the thread has begun with the first
        time.sleep(0.001)
    background.load("k", [b"p", b"x", b"q"], land)
    background.load("l", [b"q"], land)
    store.promotions = 2
    store.go.release(5)
    assert collect(background, woken, 4) == [
        Saved(b"a", Put(True, (b"old",)), True),
        Loaded("k", 1),
        Loaded("l", 1),
        Saved(b"b", Put(True, (b"old",)), True),
    ]
    assert store.asked == ["put a", "get p", "get x", "get q", "promote", "promote", "put b"]
    assert landed == [(0, b"pppp"), (0, b"qqqq")]
    background.save(b"c", read)
    counters = background.counters
    assert (counters.hits, counters.misses, counters.bytes_read, counters.bytes_written) == (2, 2, 8, 8)
    store.go.release()
    collect(background, woken, 1)
    background.close()


def test_pages_are_written_back_when_nobody_asks_for_anything() -> None:
    store, woken = Slow(), threading.Semaphore(0)
    store.fresh = 3
    background = Background(store, woken.release, page_bytes=1)
    for name in b"a", b"b":
        background.save(name, memoryview(b"1").toreadonly)
    background.load("k", [b"p"], lambda *_: None)
    store.promotions = 1
    store.go.release(3)
    collect(background, woken, 3)
    until = time.monotonic() + 10
    while store.fresh >= 0 and time.monotonic() < until:
        time.sleep(0.001)
    background.close()
    first = store.asked.index("write back")
    assert store.asked[first:] == ["write back"] * 3 + ["close"] and first == 4


def test_closing_drops_what_waits() -> None:
    store = Slow()
    background = Background(store, lambda: None, page_bytes=1)
    for name in (b"a", b"b", b"c"):
        background.save(name, memoryview(b"1").toreadonly)
    while len(background._saves) > 2:
        time.sleep(0.001)
    threading.Timer(0.05, store.go.release, [3]).start()
    background.close()
    assert store.asked == ["put a", "close"] and background.counters.dropped == 2


def test_a_pool_in_the_background(tmp_path: Path) -> None:
    woken, name = threading.Semaphore(0), digest(1)
    background = Background(Pool(on_disk(tmp_path, 1, 2), LAYOUT), woken.release, BYTES)
    background.save(name, memoryview(content(name)).toreadonly)
    assert collect(background, woken, 1) == [Saved(name, Put(True), True)]
    path = tmp_path / "dram" / name.hex()
    found: list[bytes] = []
    background.load(7, [name], lambda _, data: found.append(bytes(data)))
    assert collect(background, woken, 1) == [Loaded(7, 1)] and found == [content(name)]
    path.write_bytes(bytes(FILE))
    background.load(8, [name], lambda _, data: found.append(bytes(data)))
    assert collect(background, woken, 1) == [Loaded(8, 0)] and background.counters.corrupt == 1
    assert background.counters.bytes_written == BYTES
    assert background.counters.read_seconds > 0 and background.counters.write_seconds > 0
    background.close()


def test_a_page_that_is_saved_again_counts_as_used(tmp_path: Path) -> None:
    woken, pool = threading.Semaphore(0), Pool(on_disk(tmp_path, 2, 0), LAYOUT)
    background = Background(pool, woken.release, BYTES)
    for number in (1, 2, 1, 3):
        background.save(digest(number), memoryview(content(digest(number))).toreadonly)
    done = collect(background, woken, 4)
    assert done[2:] == [Saved(digest(1), Put(False), True), Saved(digest(3), Put(True, (digest(2),)), True)]
    background.close()


# ---------------------------------------------------------------- the spec


def test_specs() -> None:
    both = parse_store("local:DRAM=2GiB,SSD=/path:with:colons:20GiB")
    assert both == StoreSpec(dram=2 << 30, ssd=20 << 30, ssd_path="/path:with:colons")
    assert msgspec.json.decode(msgspec.json.encode(both), type=StoreSpec) == both
    memory, disk = both.tiers()
    assert disk == TierSpec("/path:with:colons", 20 << 30, True)
    assert re.fullmatch(r"/dev/shm/minidisagg-store-[0-9a-f]{16}", memory.directory) and memory.limit == 2 << 30
    assert parse_store("local:DRAM=2048M,SSD=/path:with:colons:20GiB").tiers() == both.tiers()
    others = [parse_store("local:DRAM=2GiB"), msgspec.structs.replace(both, engine="another")]
    assert len({spec.tiers()[0].directory for spec in (both, *others)}) == 3
    assert parse_store("local:SSD=here:1M").tiers() == [TierSpec(str(Path.cwd() / "here"), 1 << 20, True)]
    assert parse_store("mooncake:host:50051") == StoreSpec(mooncake="host:50051", dram=spec_module.LENT)
    assert parse_store("mooncake:[::1]:1,DRAM=1M,METADATA=http://h:8080/metadata") == StoreSpec(
        mooncake="[::1]:1", dram=1 << 20, metadata="http://h:8080/metadata"
    )


def test_a_tier_without_room_for_a_page_is_refused_in_one_line(tmp_path: Path) -> None:
    kv = torch.zeros(2, 2, 8, 2, 16, 4)
    page = kv[:, :, 0].nbytes

    async def begin(limit: int) -> None:
        made = StoreSpec(ssd=limit, ssd_path=str(tmp_path))
        await Storage(made, kv, "layers=2", lambda _: None).close()

    with pytest.raises(ValueError, match=rf"^store: {tmp_path} may take {page} bytes, less than a page: {page}$"):
        asyncio.run(begin(page))
    asyncio.run(begin(page + HEAD_BYTES))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "store '': write local:DRAM=2GiB,SSD=/path:20GiB or mooncake:HOST:PORT"),
        ("redis:h:1", "store 'redis:h:1': write local"),
        ("local:", "'' is not DRAM=… or SSD=…, each once"),
        ("local:HBM=1G", "'HBM=1G' is not DRAM=… or SSD=…, each once"),
        ("local:DRAM=1G,DRAM=1G", "'DRAM=1G' is not DRAM=… or SSD=…, each once"),
        ("local:DRAM=", "'DRAM=' is not"),
        ("local:DRAM=much", "'much' is not a size; write 512M or 1.5GiB"),
        ("local:SSD=20GiB", "write SSD=/path:20GiB"),
        ("local:SSD=/path", "write SSD=/path:20GiB"),
        ("local:SSD=/path:", "'' is not a size"),
        ("mooncake:host", "'host' is not HOST:PORT of Mooncake's master"),
        ("mooncake:host:port", "'host:port' is not HOST:PORT"),
        ("mooncake:host:70000", "'host:70000' is not HOST:PORT"),
        ("mooncake:h:1,SSD=/p:1G", "'SSD=/p:1G' is not DRAM=… or METADATA=…, each once"),
    ],
)
def test_no_spec(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        parse_store(text)
    assert "\n" not in str(caught.value)

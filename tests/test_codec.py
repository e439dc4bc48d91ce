"""Rows, runs, blocks, the checksum and the raw codec, in one process."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch

from minidisagg.core.plan import Piece
from minidisagg.transfer.codec import Int8Codec, RawCodec, Staging, head
from minidisagg.transfer.rows import SECTOR, Block, Checksum, cache_rows, cut, run_views, runs

LAYERS, PAGES = 3, 10
WHOLE = Block(slice(0, LAYERS), slice(0, 2), slice(0, PAGES))


def random_cache(dtype: torch.dtype = torch.float32, tail: tuple[int, ...] = (2, 4, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(LAYERS, 2, PAGES, *tail, generator=generator).to(dtype)


def op(pages: list[int], layers: tuple[int, int] = (0, LAYERS)) -> Piece:
    return Piece("peer", 1, 0, True, "r", 1, pages, [], len(pages), layers)


def checksum(rows: torch.Tensor) -> int:
    total = Checksum(op(list(range(PAGES))))
    total.add(WHOLE, rows)
    return total.value()


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (([4, 5, 6, 9],), [(0, 3), (3, 4)]),
        (([1],), [(0, 1)]),
        (([],), []),
        (([3, 2, 1],), [(0, 1), (1, 2), (2, 3)]),
        (([0, 1, 2, 3], [7, 8, 4, 5]), [(0, 2), (2, 4)]),
    ],
)
def test_runs_are_maximal_in_all_lists(lists: tuple[list[int], ...], expected: list[tuple[int, int]]) -> None:
    assert [(run.start, run.stop) for run in runs(*lists)] == expected


@pytest.mark.parametrize(("layers", "count", "limit"), [(3, 5, 1), (3, 5, 400), (3, 5, 1000), (3, 5, 2500), (1, 1, 9)])
def test_blocks_cover_every_row_once_within_the_limit(layers: int, count: int, limit: int) -> None:
    seen = torch.zeros(layers, 2, count, dtype=torch.int64)
    for block in cut(layers, count, 100, limit):
        part = seen[block.layers, block.kinds, block.pages]
        assert part.shape == block.shape
        assert part.numel() * 100 <= limit or part.numel() == 1
        part += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1, 3000, 1 << 20])
@pytest.mark.parametrize("pages", [[2, 3, 4, 5], [7, 0, 9, 4]])
def test_raw_moves_pages_bit_for_bit(dtype: torch.dtype, limit: int, pages: list[int]) -> None:
    source, dest = random_cache(dtype), torch.zeros(LAYERS, 2, PAGES, 2, 4, 8, dtype=dtype)
    codec, staging, there = RawCodec(source), Staging(torch.device("cpu")), [1, 8, 5, 6]
    assert codec.row_bytes == 2 * 4 * 8 * dtype.itemsize
    for block in cut(2, 4, codec.row_bytes, limit):
        wire = staging.rows(codec, block)
        assert wire.shape[:3] == block.shape and wire.is_contiguous()
        for part, (rows,) in run_views(block, 1, (cache_rows(source), pages)):
            wire[:, :, block.place(part)] = codec.encode(rows, wire)
        for part, (rows,) in run_views(block, 1, (cache_rows(dest), there)):
            codec.decode(wire[:, :, block.place(part)], rows)
    assert torch.equal(dest[1:, :, there], source[1:, :, pages])
    assert not dest[0].any() and not dest[:, :, [0, 2, 3, 4, 7, 9]].any()


def test_raw_rows_are_the_cache_itself() -> None:
    kv = random_cache()
    codec, block = RawCodec(kv), Block(slice(0, 1), slice(1, 2), slice(0, 3))
    ((part, (rows,)),) = run_views(block, 1, (cache_rows(kv), [4, 5, 6]))
    assert part == block and rows.is_contiguous() and rows.data_ptr() == kv[1, 1, 4].data_ptr()
    assert codec.in_place and codec.encode(rows, torch.empty(0)) is rows
    codec.decode(rows, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tail", [(2, 4, 64), (3, 5, 8)], ids=["words", "bytes"])
def test_int8_is_off_by_half_a_step(dtype: torch.dtype, tail: tuple[int, ...]) -> None:
    """Of what the largest value of its token and head is cut into; also where the wire's rows lie in the pages."""
    kv = random_cache(dtype, tail)
    kv[0, 0, 0] = 0
    kv[1, 1, 1] *= 1000
    codec = Int8Codec(kv)
    values = tail[0] * tail[1] * tail[2]
    assert codec.row_bytes == values + 2 * tail[0] * tail[1]
    block, there = Block(slice(0, LAYERS), slice(0, 2), slice(0, PAGES)), torch.zeros_like(kv)
    wire = codec.encode(cache_rows(kv), Staging(torch.device("cpu")).rows(codec, block))
    codec.decode(wire, cache_rows(there))
    step = kv.float().abs().amax(-1, keepdim=True) / 127
    assert bool(((there.float() - kv.float()).abs() <= 0.51 * step + kv.float().abs() * torch.finfo(dtype).eps).all())
    assert not there[0, 0, 0].any()
    in_place = torch.full_like(kv, math.nan)
    codec.encode(cache_rows(kv), head(codec, cache_rows(in_place)))
    codec.decode(head(codec, cache_rows(in_place)), cache_rows(in_place))
    assert torch.equal(in_place, there)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_so(wrong: float) -> None:
    kv = random_cache()
    kv[1, 0, 2, 1, 3, 4] = wrong
    codec, there = Int8Codec(kv), torch.zeros_like(kv)
    codec.encode(cache_rows(kv), head(codec, cache_rows(there)))
    codec.decode(head(codec, cache_rows(there)), cache_rows(there))
    assert not there[1, 0, 2, 1, 3].isfinite().any()
    there[1, 0, 2, 1, 3] = 0
    assert bool(there.isfinite().all())


def test_int8_of_single_values_saves_nothing() -> None:
    with pytest.raises(ValueError, match="int8 with a scale for each 1 values is no smaller"):
        Int8Codec(random_cache(torch.bfloat16, (1, 4, 1)))


def test_views_follow_the_runs_of_all_sides() -> None:
    kv, other = random_cache(), random_cache()
    block = Block(slice(0, 2), slice(0, 2), slice(1, 5))
    sides = (cache_rows(kv), [9, 2, 3, 4, 5]), (cache_rows(other), [9, 1, 2, 7, 8])
    found = list(run_views(block, 1, *sides))
    assert [(block.place(part), [view.shape[2] for view in views]) for part, views in found] == [
        (slice(0, 2), [2, 2]),
        (slice(2, 4), [2, 2]),
    ]
    assert torch.equal(found[1][1][0], cache_rows(kv)[1:3, :, 4:6])
    assert torch.equal(found[1][1][1], cache_rows(other)[1:3, :, 7:9])


def test_checksum_sees_bits_swaps_and_shifts() -> None:
    rows = cache_rows(random_cache()).clone()
    good = checksum(rows)
    for word, bit in itertools.product((0, 7, rows.shape[-1] - 1), (0, 31, 63)):
        damaged = rows.clone()
        damaged[1, 1, 3, word] ^= -(1 << 63) if bit == 63 else 1 << bit
        assert checksum(damaged) != good
    for dim, (a, b) in itertools.product(range(3), [(0, 1)]):
        order = list(range(rows.shape[dim]))
        order[a], order[b] = b, a
        assert checksum(rows.index_select(dim, torch.tensor(order))) != good
    assert checksum(rows.view(-1).roll(1).view_as(rows)) != good
    assert checksum(torch.zeros_like(rows)) not in (0, good)


def test_checksum_sees_sectors_that_have_changed_places_within_a_row() -> None:
    rows = cache_rows(random_cache(tail=(2, 32, 64))).clone()
    assert rows.shape[-1] == 32 * SECTOR
    good, swapped = checksum(rows), rows.clone()
    swapped[1, 0, 2, :SECTOR], swapped[1, 0, 2, -SECTOR:] = rows[1, 0, 2, -SECTOR:], rows[1, 0, 2, :SECTOR]
    assert checksum(swapped) != good


def test_checksum_does_not_depend_on_blocks_or_pages() -> None:
    kv = random_cache()
    pages, moved = [1, 2, 6], [9, 3, 4]
    other = torch.zeros_like(kv)
    other[:, :, moved] = kv[:, :, pages]
    values = set()
    for (cache, here), limit in itertools.product([(kv, pages), (other, moved)], [1, 2000, 1 << 20]):
        total = Checksum(op(here))
        for block in cut(LAYERS, 3, RawCodec(cache).row_bytes, limit):
            for part, (rows,) in run_views(block, 0, (cache_rows(cache), here)):
                total.add(part, rows)
        values.add(total.value())
    assert len(values) == 1


def test_rows_of_odd_size_are_bytes() -> None:
    kv = random_cache(torch.bfloat16, (1, 1, 3))
    rows = cache_rows(kv)
    assert rows.dtype == torch.uint8 and rows.shape == (LAYERS, 2, PAGES, 6)
    assert checksum(rows) == checksum(rows.clone()) != checksum(rows.flip(2))


def test_checksum_is_faster_than_five_gigabytes_per_second() -> None:
    rows = torch.randint(-(1 << 62), 1 << 62, (LAYERS, 2, PAGES, 64 << 10), dtype=torch.int64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        checksum(rows)
        times.append(time.perf_counter() - start)
    assert rows.nbytes / min(times) > 5e9


def test_a_cache_in_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        cache_rows(random_cache().transpose(0, 1))

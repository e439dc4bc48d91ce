"""Which bytes a piece is: rows of the cache, cut into blocks, and the checksum over them.

A piece covers `count` pages of a range of layers, keys and values; each of these cells is one *row*: a page of one
layer's keys or values, contiguous in the cache. How a row looks on the wire is `codec.py`. Every link moves rows in
blocks of bounded size, both ends cut alike, and the checksum depends on the rows on the wire and their positions only,
not on the blocks or on the link.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidisagg.core.plan import Piece

SECTOR = 64  # words with one weight: shorter sums take longer
_ODD = 0x1E3779B97F4A7C15  # any large odd number: odd weights lose no bit of a row's sum
_MASK = (1 << 64) - 1


class Block(NamedTuple):
    """A part of a piece's rows; the slices count from the piece's first layer and first page."""

    layers: slice
    kinds: slice  # 0: keys, 1: values
    pages: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, kinds, pages)."""
        return (
            self.layers.stop - self.layers.start,
            self.kinds.stop - self.kinds.start,
            self.pages.stop - self.pages.start,
        )

    def place(self, part: Block) -> slice:
        """Where the pages of `part`, a block within this one, are among its own."""
        return slice(part.pages.start - self.pages.start, part.pages.stop - self.pages.start)


def cut(num_layers: int, count: int, row_bytes: int, limit: int) -> Iterator[Block]:
    """Cut a piece's rows into blocks of at most `limit` bytes (at least one row).

    Small pieces group whole layers; where one layer is larger than `limit`, a block stays within its keys or its
    values, so that it is one piece of memory if its pages are consecutive.
    """
    layer_bytes = 2 * count * row_bytes
    if layer_bytes <= limit:
        step = max(1, limit // max(1, layer_bytes))
        for first in range(0, num_layers, step):
            yield Block(slice(first, min(first + step, num_layers)), slice(0, 2), slice(0, count))
        return
    step = max(1, limit // row_bytes)
    for layer in range(num_layers):
        for kind in range(2):
            for first in range(0, count, step):
                yield Block(slice(layer, layer + 1), slice(kind, kind + 1), slice(first, min(first + step, count)))


def runs(*page_lists: Sequence[int]) -> Iterator[slice]:
    """Positions of maximal runs of pages that are consecutive in every one of the (equally long) lists.

    >>> list(runs([4, 5, 6, 9]))
    [slice(0, 3, None), slice(3, 4, None)]
    """
    length, first = len(page_lists[0]), 0
    for end in range(1, length + 1):
        if end == length or any(pages[end] != pages[end - 1] + 1 for pages in page_lists):
            yield slice(first, end)
            first = end


def cache_rows(kv: Tensor) -> Tensor:
    """The cache [layers, 2, pages, ...] seen as rows [layers, 2, pages, words]: int64 words, or bytes if unaligned."""
    if not kv.is_contiguous():
        raise ValueError("a link needs a contiguous KV cache")
    rows = kv.view(torch.uint8).view(kv.shape[0], 2, kv.shape[2], -1)
    return rows.view(torch.int64) if rows.shape[-1] % 8 == 0 else rows


def alike(kv: Tensor, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a cache of this shape and dtype differs from `kv` in its number of pages at most."""
    ours = tuple(kv.shape[:2]), tuple(kv.shape[3:]), str(kv.dtype)
    return (shape[:2], shape[3:], dtype) == ours


def window(rows: Tensor, layers: slice, kinds: slice, first_page: int, num_pages: int) -> Tensor:
    """`rows[layers, kinds, first_page : first_page + num_pages]` in one call; the caller checked the bounds."""
    by_layer, by_kind, by_page, _ = rows.stride()
    size = (layers.stop - layers.start, kinds.stop - kinds.start, num_pages, rows.shape[3])
    offset = layers.start * by_layer + kinds.start * by_kind + first_page * by_page
    return rows.as_strided(size, rows.stride(), rows.storage_offset() + offset)


def run_views(
    block: Block, first_layer: int, *sides: tuple[Tensor, Sequence[int]]
) -> Iterator[tuple[Block, list[Tensor]]]:
    """The block as parts whose pages are consecutive on every side, each with its views [layers, kinds, run, words].

    A side is a cache's rows and the piece's pages in it.
    """
    layers = slice(first_layer + block.layers.start, first_layer + block.layers.stop)
    for run in runs(*(pages[block.pages] for _, pages in sides)):
        first, count = block.pages.start + run.start, run.stop - run.start
        views = [window(rows, layers, block.kinds, pages[first], count) for rows, pages in sides]
        yield Block(block.layers, block.kinds, slice(first, first + count)), views


class Checksum:
    """64 bits over a piece's rows: Σ weight(position) · Σ words of a sector of a row, modulo 2^64.

    A sector's sum changes with any changed byte, and with stale or torn words; its odd weight catches swapped
    sectors, pages, layers or keys with values, and shifted streams. It does not see words that have changed places
    within a sector, and a row that cannot be cut into them is one. Summing words runs at the speed of reading memory
    (20 to 30 GB/s on one core, against 2 GB/s for crc32). It finds accidents; it does not authenticate.
    """

    def __init__(self, piece: Piece) -> None:
        self._shape = (piece.layers[1] - piece.layers[0], 2, piece.count)
        self._sums = torch.empty(0)

    def add(self, block: Block, rows: Tensor) -> None:
        """Take in `rows` [layers, kinds, pages, words] that lie at `block`; all of a piece are on one device."""
        sectors = rows.shape[-1] // SECTOR if rows.shape[-1] % SECTOR == 0 else 1
        if not self._sums.numel():
            self._sums = torch.zeros(*self._shape, sectors, dtype=torch.int64, device=rows.device)
        num_pages = block.pages.stop - block.pages.start
        sums = window(self._sums, block.layers, block.kinds, block.pages.start, num_pages)
        torch.sum(rows.view(*rows.shape[:-1], sectors, -1), -1, dtype=torch.int64, out=sums)

    def value(self) -> int:
        """The checksum so far, in 1 … 2^64 - 1: 0 means "none" in messages."""
        sums = self._sums.view(-1)
        weights = torch.arange(_ODD, _ODD + 2 * len(sums), 2, dtype=torch.int64, device=sums.device) * _ODD
        return int((sums * weights).sum()) & _MASK or 1

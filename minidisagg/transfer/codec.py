"""How rows look on the wire: a codec, which a piece names.

The source calls `pack`, the destination `Checksum.add` and `decode`. Links cut, stage and check whatever row size and
word a codec declares. A one-sided link needs no staging for rows that are smaller than the cache's: it writes each to
the head of its own page, where nobody reads before the piece is announced, and the destination decodes it in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from minidisagg.transfer.rows import Block, Checksum, cache_rows


class Codec(ABC):
    """Cache rows to wire rows and back, for caches like the one that it is made for.

    Both are [layers, kinds, pages, words]. A wire row is `row_bytes` long and seen as words of the type `word`, which
    is what the checksum adds up.
    """

    in_place = False  # wire rows are the cache's own: `encode` hands them out, and a destination may land in them
    row_bytes: int
    word: torch.dtype

    @abstractmethod
    def encode(self, rows: Tensor, out: Tensor) -> Tensor:
        """The wire rows of these cache rows: `out`, filled, or with `in_place` the rows themselves."""

    @abstractmethod
    def decode(self, wire: Tensor, rows: Tensor) -> None:
        """Write what wire rows mean into cache rows. With `in_place` they may be the same tensor: nothing to do."""

    def pack(self, checksum: Checksum, part: Block, rows: Tensor, out: Tensor) -> Tensor:
        """The wire rows of cache rows that lie at `part` of a piece, taken into its checksum."""
        wire = self.encode(rows, out)
        checksum.add(part, wire)
        return wire


class RawCodec(Codec):
    """Wire rows are the cache's rows, bit for bit."""

    in_place = True

    def __init__(self, kv: Tensor) -> None:
        rows = cache_rows(kv)
        self.row_bytes, self.word = rows.shape[-1] * rows.element_size(), rows.dtype

    def encode(self, rows: Tensor, out: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def decode(self, wire: Tensor, rows: Tensor) -> None:
        """A copy, unless they have landed in place."""
        if wire is not rows:
            rows.copy_(wire)


class Int8Codec(Codec):
    """One byte a value and a scale per token and KV head: 0.52 of bfloat16 at a head size of 64, 0.51 at 128.

    A row [heads, tokens, dim] becomes int8 [heads, tokens, dim] and bfloat16 [heads, tokens], value = byte * scale.
    The scale is the largest absolute value / 127, rounded as stored before it is used, so that rounding costs nothing;
    the error of a value is at most half a scale. What is not finite comes back as NaN: the request ends as it would
    have, in an error. Per-token scales as in KIVI (arXiv 2402.02750) for values; simpler, since its keys go by channel.
    """

    def __init__(self, kv: Tensor) -> None:
        self._dtype, self._shape = kv.dtype, tuple(kv.shape[3:])
        heads, tokens, dim = self._shape
        self._values = heads * tokens * dim
        self.row_bytes = self._values + 2 * heads * tokens
        if self.row_bytes > self._values * kv.element_size():
            raise ValueError(f"int8 with a scale for each {dim} values is no smaller than {kv.dtype}")
        self.word = torch.int64 if self.row_bytes % 8 == 0 else torch.uint8

    def encode(self, rows: Tensor, out: Tensor) -> Tensor:
        """`out`, filled."""
        x = rows.view(self._dtype).view(*rows.shape[:-1], *self._shape).float()
        scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16()
        step = torch.where(scale == 0, 1.0, scale.float())
        whole = (x / step).round_().clamp_(-127, 127).to(torch.int8)  # a scale that was rounded down
        into = out.view(torch.uint8)
        into[..., : self._values] = whole.view(torch.uint8).flatten(-3)
        into[..., self._values :] = scale.view(torch.uint8).flatten(-3)
        return out

    def decode(self, wire: Tensor, rows: Tensor) -> None:
        """They may begin at the same place: all of the wire is read before anything is written."""
        given = wire.view(torch.uint8)
        whole = given[..., : self._values].contiguous().view(torch.int8).view(*wire.shape[:-1], *self._shape)
        scale = given[..., self._values :].contiguous().view(torch.bfloat16).view(*whole.shape[:-1], 1)
        x = (whole.float() * scale.float()).to(self._dtype)
        rows.view(self._dtype).copy_(x.flatten(-3))


class Staging:
    """Memory for the wire rows of one block at a time; it grows to the largest that it was asked for."""

    def __init__(self, device: torch.device, nbytes: int = 0) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def rows(self, codec: Codec, block: Block) -> Tensor:
        """Room for the block's wire rows [layers, kinds, pages, words], contiguous; what it held before is lost."""
        layers, kinds, pages = block.shape
        nbytes = layers * kinds * pages * codec.row_bytes
        if len(self._memory) < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=self._memory.device)
        return self._memory[:nbytes].view(codec.word).view(layers, kinds, pages, -1)


def head(codec: Codec, rows: Tensor) -> Tensor:
    """Where a one-sided link puts the wire rows of these cache rows: the rows themselves, or the beginning of each."""
    return rows if codec.in_place else rows.view(torch.uint8)[..., : codec.row_bytes].view(codec.word)


def codecs_for(kv: Tensor) -> dict[str, Codec]:
    """All codecs that make sense of this cache, by name."""
    found = {}
    for name, make in CODECS.items():
        with suppress(ValueError):
            found[name] = make(kv)
    return found


CODECS: dict[str, Callable[[Tensor], Codec]] = {"raw": RawCodec, "int8": Int8Codec}

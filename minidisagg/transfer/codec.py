"""How rows look on the wire: a codec, which a piece names.

The source calls `pack`, the destination `Checksum.add` and `decode`. To add a lossy codec, say int8 with a scale per
token and head, is to add a class here and a name to `CODECS`: two-sided links cut, stage and check whatever row size
and word it declares. A one-sided link would have to write such rows into staging memory that the destination maps out
beside its cache, for `decode` to read once the piece is announced; as no codec needs that, `mapped.py` refuses those
that are not `in_place`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

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


CODECS: dict[str, Callable[[Tensor], Codec]] = {"raw": RawCodec}

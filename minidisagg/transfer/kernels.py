"""Copying scattered pages at the speed of the memory, or of NVLink, in one launch of few programs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024  # of 8 bytes, at a time


# One compiled form for all calls: a further one would be loaded while something spins on the card.
@triton.jit(
    do_not_specialize=["planes", "count", "source_total", "target_total"],
    do_not_specialize_on_alignment=["source_pages", "target_pages"],
)
def _copy_rows(
    source, source_pages, target, target_pages, planes, count, words, source_total, target_total,
    FROM_PAGES: tl.constexpr, TO_PAGES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(words, WORDS)
    for task in range(tl.program_id(0), planes * count * parts, tl.num_programs(0)):
        index = task // parts
        plane, n = (index // count).to(tl.int64), index % count
        source_page = tl.load(source_pages + n) if FROM_PAGES else n
        target_page = tl.load(target_pages + n) if TO_PAGES else n
        at = task % parts * WORDS + tl.arange(0, WORDS)
        inside = (at < words) & (source_page >= 0) & (target_page >= 0)
        value = tl.load(source + (plane * source_total + source_page) * words + at, mask=inside)
        tl.store(target + (plane * target_total + target_page) * words + at, value, mask=inside)


def copy_rows(
    source: Tensor, source_pages: Tensor | None, target: Tensor, target_pages: Tensor | None, programs: int
) -> None:
    """target[:, target_pages] = source[:, source_pages], of [planes, pages, words] each, both contiguous; no pages:
    all of them, in order. A page -1 is left out."""
    pages = source_pages if source_pages is not None else target_pages
    count = source.shape[1] if pages is None else len(pages)
    planes, _, words = source.shape
    from_pages, to_pages = source_pages is not None, target_pages is not None
    _copy_rows[(programs,)](
        source, source_pages if from_pages else source, target, target_pages if to_pages else target,
        planes, count, words, source.shape[1], target.shape[1], from_pages, to_pages, _WORDS, num_warps=8,
    )  # fmt: skip

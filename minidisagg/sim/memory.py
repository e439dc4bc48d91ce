"""The simulated KV cache: a hash chain instead of tensors.

Each slot is computed from the slot before it and its token, and a sampled token from all slots that its page table
names. So a token depends on every slot that attention would read, and any page that was reused, overwritten or never
written shows in the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import PlanItem

MASK = (1 << 64) - 1


def chain(previous: int, token: int) -> int:
    """The content of one KV slot, from the slot before it and the token at its position."""
    return ((previous ^ token) * 6364136223846793005 + 1442695040888963407) & MASK


def sample(slots: Iterable[int], vocab: int) -> int:
    """The token that follows these slots, in this order: swapped pages show, as they would not in attention."""
    return ((hash(tuple(slots)) & MASK) >> 32) % vocab


def oracle(prompt: list[int], sampling: SamplingParams, vocab: int) -> list[int]:
    """The output that an undisturbed run gives."""
    slots: list[int] = []
    for token in prompt:
        slots.append(chain(slots[-1] if slots else 0, token))
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        output.append(sample(slots, vocab))
        if output[-1] in sampling.stop_token_ids and len(output) > sampling.min_tokens:
            break
        slots.append(chain(slots[-1], output[-1]))
    return output


class Memory:
    """One worker's. Its planes [plane][page][slot] stand for layers where these move apart, else one for all."""

    def __init__(self, planes: int, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.planes = [[[0] * page_size for _ in range(num_pages)] for _ in range(planes)]

    def write(self, planes: range, item: PlanItem, tokens: Sequence[int]) -> None:
        """What a step computes for this item, in some planes."""
        size, pages = self.page_size, item.pages
        for plane in self.planes[planes.start : planes.stop]:
            for position, token in enumerate(tokens, item.start):
                before = plane[pages[(position - 1) // size]][(position - 1) % size] if position else 0
                plane[pages[position // size]][position % size] = chain(before, token)

    def sample(self, item: PlanItem, vocab: int) -> int:
        """The token after the item's last one; another where its planes disagree."""
        planes = [itertools.chain.from_iterable(plane[page] for page in item.pages) for plane in self.planes]
        slots = (column[0] if len(set(column)) == 1 else hash(column) for column in zip(*planes, strict=True))
        return sample(itertools.islice(slots, item.start + item.count), vocab)

    def copy(self, planes: range, pages: Sequence[int], dest: Memory, remote: Sequence[int]) -> None:
        """Some planes of these pages to another worker's."""
        for plane in planes:
            for mine, theirs in zip(pages, remote, strict=True):
                dest.planes[plane][theirs] = list(self.planes[plane][mine])

    def holds(self, pages: Sequence[int], tokens: Sequence[int]) -> bool:
        """The KV of these tokens is in the pages, in every plane."""
        for plane in self.planes:
            content = 0
            for token, slot in zip(tokens, itertools.chain.from_iterable(plane[p] for p in pages), strict=False):
                content = chain(content, token)
                if slot != content:
                    return False
        return True

"""The block pool against a model of it: every page in one state, and never handed out while a peer may write to it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from minidisagg.core.blocks import BlockPool, IntegrityError, PageState, page_hash, prefix_root

PAGES = 9
FREE, LIVE, CACHED, INFLIGHT, QUARANTINED = PageState


class PoolMachine(RuleBasedStateMachine):
    """Bundles hold page lists as owners do; `refs`, `writing` and `digests` are the model."""

    held = Bundle("held")  # one reference each
    reserved = Bundle("reserved")
    quarantined = Bundle("quarantined")

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(PAGES)
        self.refs = [0] * PAGES
        self.writing: dict[int, PageState] = {}
        self.digests: dict[bytes, int] = {}
        self.lru: list[int] = []  # published pages without a reference, in the order of eviction

    def taken(self, pages: list[int] | None, count: int) -> list[int]:
        """What an allocation must be: new pages, the lowest FREE ones first, then the least recently used."""
        free = [p for p in range(PAGES) if not self.refs[p] and p not in self.writing and p not in self.lru]
        if count > len(free) + len(self.lru):
            assert pages is None
            return []
        evicted, self.lru = self.lru[: max(0, count - len(free))], self.lru[max(0, count - len(free)) :]
        self.digests = {digest: page for digest, page in self.digests.items() if page not in evicted}
        assert pages == sorted([*free, *evicted])[:count]
        return pages

    @rule(target=held, count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> list[int]:
        pages = self.taken(self.pool.allocate(count), count)
        for page in pages:
            self.refs[page] = 1
        return pages

    @rule(target=reserved, count=st.integers(0, 5))
    def reserve(self, count: int) -> list[int]:
        pages = self.taken(self.pool.reserve(count), count)
        self.writing.update(dict.fromkeys(pages, INFLIGHT))
        return pages

    @rule(target=held, pages=consumes(reserved))
    def land(self, pages: list[int]) -> list[int]:
        self.pool.land(pages)
        for page in pages:
            del self.writing[page]
            self.refs[page] = 1
        return pages

    @rule(pages=consumes(reserved))
    def cancel(self, pages: list[int]) -> None:
        self.pool.cancel(pages)
        for page in pages:
            del self.writing[page]

    @rule(target=quarantined, pages=consumes(reserved))
    def quarantine(self, pages: list[int]) -> list[int]:
        self.pool.quarantine(pages)
        self.writing.update(dict.fromkeys(pages, QUARANTINED))
        return pages

    @rule(pages=consumes(quarantined))
    def release(self, pages: list[int]) -> None:
        self.pool.release(pages)
        for page in pages:
            del self.writing[page]

    @rule(pages=consumes(held))
    def drop(self, pages: list[int]) -> None:
        self.pool.drop(pages)
        for page in reversed(pages):
            self.refs[page] -= 1
            if not self.refs[page] and page in self.digests.values():
                self.lru.append(page)

    @rule(pages=held, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def publish(self, pages: list[int], tokens: list[int]) -> None:
        """The prefix of 0 and 1 pages, so that equal prefixes are published twice."""
        for page, digest in zip(pages, hashes(tokens), strict=False):
            if self.refs[page]:
                self.pool.publish(page, digest)
                if page not in self.digests.values():
                    self.digests.setdefault(digest, page)

    @rule(target=held, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def match_and_hold(self, tokens: list[int]) -> list[int]:
        expected = []
        for digest in hashes(tokens):
            if digest not in self.digests:
                break
            expected.append(self.digests[digest])
        pages = self.pool.match(hashes(tokens))
        assert pages == expected
        self.pool.hold(pages)
        for page in pages:
            self.refs[page] += 1
            if page in self.lru:
                self.lru.remove(page)
        return pages

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        assert self.pool.refs == self.refs
        for page, state in enumerate(self.pool.state):
            expected = LIVE if self.refs[page] else CACHED if page in self.lru else self.writing.get(page, FREE)
            assert state is expected
        assert self.pool.available == self.pool.counts[FREE] + len(self.lru)


def hashes(tokens: list[int]) -> list[bytes]:
    digests = [prefix_root("f", "")]
    for token in tokens:
        digests.append(page_hash(digests[-1], [token]))
    return digests[1:]


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_page_leaves_inflight_only_by_land_cancel_or_quarantine() -> None:
    pool = BlockPool(2)
    pages = pool.reserve(2)
    assert pages is not None
    for forbidden in (pool.drop, pool.hold, pool.release):
        with pytest.raises(IntegrityError):
            forbidden(pages)
    with pytest.raises(IntegrityError):
        pool.publish(0, b"digest")
    assert pool.allocate(1) is None and pool.reserve(1) is None
    pool.quarantine(pages)
    for forbidden in (pool.drop, pool.hold, pool.cancel, pool.land):
        with pytest.raises(IntegrityError):
            forbidden(pages)
    assert pool.allocate(1) is None
    pool.release(pages)
    assert pool.allocate(2) == [0, 1]


def test_a_page_is_not_dropped_twice() -> None:
    pool = BlockPool(1)
    pages = pool.allocate(1)
    assert pages == [0]
    pool.drop(pages)
    with pytest.raises(IntegrityError, match="page 0 is FREE"):
        pool.drop(pages)


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    pages = pool.allocate(3)
    assert pages is not None
    for page, digest in zip(pages, hashes([1, 2, 3]), strict=True):
        pool.publish(page, digest)
    pool.drop(pages)
    assert pool.allocate(1) == [2]
    assert pool.match(hashes([1, 2, 3])) == [0, 1]


def test_a_prefix_of_another_tenant_model_or_position_is_another_prefix() -> None:
    roots = [prefix_root("f", ""), prefix_root("f", "tenant"), prefix_root("g", "")]
    assert len(set(roots)) == 3
    assert len({page_hash(root, [1, 2]) for root in roots}) == 3
    assert page_hash(page_hash(roots[0], [1]), [2]) != page_hash(page_hash(roots[0], [2]), [1])


@pytest.mark.parametrize("damage", ["refs", "state", "counts", "free", "lru", "hash"])
def test_check_integrity_can_fail(damage: str) -> None:
    pool = BlockPool(4)
    pages = pool.allocate(2)
    assert pages is not None
    pool.publish(pages[0], b"a")
    pool.drop(pages[:1])
    pool.check_integrity()
    if damage == "refs":
        pool.refs[1] = 0
    elif damage == "state":
        pool.state[3] = INFLIGHT
    elif damage == "counts":
        pool.counts[FREE] += 1
    elif damage == "free":
        pool._free.append(1)
    elif damage == "lru":
        pool._lru.clear()
    else:
        pool._by_hash[b"b"] = 1
    with pytest.raises(IntegrityError):
        pool.check_integrity()


def test_a_pool_has_pages() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        BlockPool(0)

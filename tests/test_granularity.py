"""What of a prompt's KV leaves when: groups of layers, chunks, or all at once."""

from __future__ import annotations

import pytest
from stepwise import spec
from test_engine import Hand, submit

from minidisagg.core.effects import StartPiece
from minidisagg.core.granularity import Granularity, parse_granularity
from minidisagg.core.inputs import LayersDone, PieceDone, Schedule, StepDone
from minidisagg.core.messages import KVCancel, KVDone, KVGrant, PeerUp
from minidisagg.core.policy import WorkerOptions

Sent = tuple[int, int, tuple[int, int]]  # first page, pages, layers


@pytest.mark.parametrize(
    ("text", "layers", "layer_bytes", "ends"),
    [
        ("request", 30, 1000, []),
        ("chunk", 30, 1000, []),
        ("layers:1", 3, 0, [1, 2, 3]),
        ("layers:2", 5, 0, [2, 4, 5]),
        ("layers:9", 5, 0, [5]),
        ("auto", 30, 1000, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),  # three layers weigh 3,000
        ("auto", 30, 400, [7, 15, 22, 30]),
        ("auto", 30, 1, [30]),
        ("auto", 30, 10_000, list(range(1, 31))),
    ],
)
def test_groups(text: str, layers: int, layer_bytes: int, ends: list[int]) -> None:
    assert parse_granularity(text, 3000).ends(layers, layer_bytes) == ends


@pytest.mark.parametrize("text", ["", "layer", "layers", "layers:0", "layers:-1", "layers:1.5", "chunk:2", "auto:"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="request, chunk, layers:N or auto"):
        parse_granularity(text, 1)


class Source:
    """A prefill worker of 6 layers with pages of 4 tokens, and a destination that grants when it is told to."""

    def __init__(self, granularity: Granularity, tokens: int, chunk: int = 0) -> None:
        options = WorkerOptions(8, 64, chunk)
        self.hand = Hand(spec("w", num_layers=6, granularity=granularity, layer_bytes=1, options=options))
        self.hand.receive(PeerUp("d", 1, ""), submit("a", tokens, decode="d"))
        self.pages = -(-tokens // 4)

    def grant(self, skip: int = 0) -> None:
        self.hand.receive(KVGrant("a", 0, list(range(self.pages)), skip), source="d", epoch=1)

    def schedule(self) -> list[int]:
        plan = self.hand.core.on(Schedule(), self.hand.now)
        assert plan is not None
        self.step = plan
        return plan.reports

    def computed(self, layer: int) -> None:
        self.hand.core.on(LayersDone(self.step.step_id, layer), self.hand.now)

    def end(self) -> None:
        sampled = [7 for item in self.step.items if item.sample]
        self.hand.core.on(StepDone(self.step.step_id, sampled, 0.01), self.hand.now)

    def sent(self) -> list[Sent]:
        pieces = [effect.piece for effect in self.hand.core.outbox if isinstance(effect, StartPiece)]
        return [(piece.remote[0], piece.count, piece.layers) for piece in pieces]


def test_each_group_leaves_when_it_is_computed() -> None:
    source = Source(Granularity(layers=2), tokens=10)
    assert source.schedule() == [2, 4, 6]
    source.grant()
    source.computed(2)
    assert source.sent() == [(0, 3, (0, 2))]
    source.computed(4)
    source.computed(6)
    assert source.sent() == [(0, 3, (0, 2)), (0, 3, (2, 4)), (0, 3, (4, 6))], "not full, but the last"
    assert not source.hand.sent(KVDone), "the first token is not known yet"
    source.end()
    assert source.hand.sent(KVDone) == [KVDone("a", 0, 3, [7])]
    assert len(source.sent()) == 3


def test_a_grant_in_the_middle_of_a_step_catches_up() -> None:
    source = Source(Granularity(layers=2), tokens=10)
    source.schedule()
    source.computed(2)
    assert source.sent() == []
    source.grant(skip=1)
    assert source.sent() == [], "no step has ended"
    source.computed(4)
    assert source.sent() == [(1, 2, (0, 4))], "both groups in one piece"
    source.end()
    assert source.sent() == [(1, 2, (0, 4)), (1, 2, (4, 6))], "what was not reported goes with the step's end"


def test_a_grant_between_chunks_sends_what_is_whole_and_goes_on_by_groups() -> None:
    source = Source(Granularity(layers=3), tokens=15, chunk=6)
    source.schedule()
    source.computed(3)
    source.computed(6)
    source.end()
    source.schedule()
    source.grant()
    assert source.sent() == [(0, 1, (0, 6))], "six tokens fill one page"
    source.computed(3)
    assert source.sent()[1:] == [(1, 2, (0, 3))], "twelve fill three"
    source.end()
    source.schedule()
    source.computed(3)
    source.computed(6)
    assert source.sent()[2:] == [(1, 2, (3, 6)), (3, 1, (0, 3)), (3, 1, (3, 6))]


def test_chunks_and_requests_are_not_reported() -> None:
    for granularity, pieces in ((Granularity(), 3), (Granularity(whole=True), 1)):
        source = Source(granularity, tokens=12, chunk=4)
        reports = []
        for chunk in range(3):
            reports += source.schedule()
            if chunk == 0:
                source.grant()
            source.end()
        assert reports == [] and len(source.sent()) == pieces
        assert sum(count for _, count, _ in source.sent()) == 3
        assert source.hand.sent(KVDone) == [KVDone("a", 0, pieces, [7])]


def test_only_steps_with_a_handoff_are_reported() -> None:
    hand = Hand(spec("w", num_layers=6, granularity=Granularity(layers=2)))
    hand.receive(submit("stays", 8))
    plan = hand.core.on(Schedule(), hand.now)
    assert plan is not None and plan.reports == []


def test_a_link_that_is_lost_between_groups_gives_the_request_back() -> None:
    source = Source(Granularity(layers=2), tokens=8)
    source.schedule()
    source.grant()
    source.computed(2)
    link = source.hand.core.outgoing.links["d"]
    source.hand.core.on(PieceDone("d", link.epoch, 0, True, False, error="reset by peer"), source.hand.now)
    source.computed(4)
    source.end()
    assert source.sent() == [(0, 2, (0, 2))], "nothing follows on a broken link"
    assert not source.hand.sent(KVDone) and not source.hand.sent(KVCancel), "until the abort is confirmed"

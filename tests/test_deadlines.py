"""A worker whose links stand still: when it gives one up, and when it asks for its peer's death."""

from __future__ import annotations

from test_engine import LINK, Hand, offer, submit

from minidisagg.core.blocks import PageState
from minidisagg.core.effects import AbortLink, StartPiece
from minidisagg.core.inputs import AbortConfirmed, PieceDone, Schedule
from minidisagg.core.messages import ROUTER, Fatal, KVGrant, KVPiece, LinkAborted, PeerUp, Released

TIMEOUT, LEASE = 2.0, 5.0  # of `stepwise.spec`


def aborts(hand: Hand) -> list[AbortLink]:
    return [effect for effect in hand.core.outbox if isinstance(effect, AbortLink)]


def sending() -> tuple[Hand, int]:
    """A source with two pieces on its link since now, and the link's epoch."""
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("a", 4, decode="d"), submit("b", 4, decode="d"))
    plan = hand.core.on(Schedule(), hand.now)
    assert plan is not None
    hand.receive(KVGrant("a", 0, [0], 0), KVGrant("b", 0, [1], 0), source="d", epoch=1)
    hand.done(plan)
    return hand, hand.core.outgoing.links["d"].epoch


def test_a_source_gives_up_a_link_that_stands_still() -> None:
    hand, epoch = sending()
    hand.live(TIMEOUT - 0.1)
    assert not aborts(hand)
    hand.live(0.2)
    assert aborts(hand) == [AbortLink("d", epoch, True, False)]
    hand.live(0.1)
    assert len(aborts(hand)) == 1


def test_each_piece_that_leaves_gives_the_next_a_new_deadline_and_an_idle_link_has_none() -> None:
    hand, epoch = sending()
    hand.live(TIMEOUT - 0.1)
    hand.core.on(PieceDone("d", epoch, 0, True, True), hand.now)
    hand.live(0.2)
    hand.core.on(PieceDone("d", epoch, 1, True, True), hand.now)
    hand.live(2 * TIMEOUT)
    assert not aborts(hand)


def test_the_deadline_is_the_oldest_pieces() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("a", 4, decode="d"), submit("b", 4, decode="d"))
    hand.step()
    hand.receive(KVGrant("a", 0, [0], 0), source="d", epoch=1)
    hand.live(TIMEOUT - 0.1)
    assert not aborts(hand)
    hand.receive(KVGrant("b", 0, [1], 0), source="d", epoch=1)
    assert len(hand.core.outgoing.links["d"].flying) == 2
    hand.live(0.2)
    assert len(aborts(hand)) == 1


def test_a_source_gives_up_what_its_destination_gave_up_and_says_so_again_when_asked_again() -> None:
    hand, epoch = sending()
    hand.receive(LinkAborted(epoch - 1, False), source="d", epoch=1)
    assert not aborts(hand) and hand.sent(LinkAborted) == [LinkAborted(epoch - 1, True)], "long over"
    hand.receive(LinkAborted(epoch, False), LinkAborted(epoch, False), source="d", epoch=1)
    assert aborts(hand) == [AbortLink("d", epoch, True, False)] and len(hand.sent(LinkAborted)) == 1
    hand.core.on(AbortConfirmed("d", epoch, True), hand.now)
    assert hand.sent(LinkAborted)[1:] == [LinkAborted(epoch, True)] and hand.core.idle
    assert {message.request_id for message in hand.sent(Released)} == {"a", "b"}  # type: ignore[union-attr]


def receiving() -> Hand:
    """A destination with a piece under way since now."""
    hand = Hand()
    hand.receive(PeerUp("p", 1, ""))
    hand.receive(offer("a", 4, LINK), KVPiece("a", 0, LINK, 0, 0, 1, (0, 2)), source="p", epoch=1)
    return hand


def fatals(hand: Hand) -> list[Fatal]:
    return [message for message in hand.sent(Fatal) if isinstance(message, Fatal)]


def test_a_destination_has_a_source_killed_that_does_not_confirm_an_abort() -> None:
    hand = receiving()
    hand.live(TIMEOUT - 0.1)
    assert not aborts(hand)
    hand.live(0.2)
    assert aborts(hand) == [AbortLink("p", LINK, False, False)]
    assert hand.sent(LinkAborted) == [LinkAborted(LINK, False)]
    hand.live(LEASE - 0.1)
    assert not fatals(hand)
    for count in (1, 2):  # asked again where nothing came of it
        hand.live(0.2 if count == 1 else LEASE)
        hand.live(0.1)
        assert fatals(hand) == [Fatal(f"does not confirm the abort of link {LINK}", "p", 1)] * count
    assert {effect.dest for effect in hand.core.outbox if getattr(effect, "body", None) in fatals(hand)} == {ROUTER}
    assert hand.core.pool.counts[PageState.QUARANTINED] == 1
    hand.core.on(AbortConfirmed("p", LINK, False), hand.now)
    hand.live(2 * LEASE)
    assert len(fatals(hand)) == 2 and hand.core.idle


def test_a_source_that_says_that_it_stopped_confirms_the_abort_or_begins_it() -> None:
    for begun in (False, True):
        hand = receiving()
        if begun:
            hand.live(TIMEOUT + 0.1)
            assert aborts(hand) == [AbortLink("p", LINK, False, False)] and len(hand.sent(LinkAborted)) == 1
        hand.core.outbox.clear()
        hand.receive(LinkAborted(LINK, True), source="p", epoch=1)
        assert aborts(hand) == [AbortLink("p", LINK, False, True)] and not hand.sent(LinkAborted)
        hand.core.on(AbortConfirmed("p", LINK, False), hand.now)
        assert hand.core.idle


def test_a_link_that_fails_before_anything_has_come_over_it_is_given_up() -> None:
    hand = Hand()
    hand.receive(PeerUp("p", 1, ""))
    for _ in range(2):
        hand.core.on(PieceDone("p", LINK, 0, False, False, error="not connected"), hand.now)
    assert aborts(hand) == [AbortLink("p", LINK, False, False)]
    assert hand.sent(LinkAborted) == [LinkAborted(LINK, False)], "or the source would wait for it"


def test_a_piece_of_a_link_that_was_given_up_is_not_posted() -> None:
    hand = receiving()
    hand.core.on(PieceDone("p", LINK, 0, False, False, error="reset"), hand.now)
    before = len(hand.core.outbox)
    hand.receive(KVPiece("a", 0, LINK, 1, 0, 1, (0, 2)), source="p", epoch=1)
    assert not [e for e in hand.core.outbox[before:] if isinstance(e, StartPiece)]
    assert not hand.core.incoming.links

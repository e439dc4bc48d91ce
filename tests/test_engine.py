"""One engine driven by hand: steps, preemption, late binding, leases, the fences."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from stepwise import Stepwise, spec

from minidisagg.core.accounts import StalledError
from minidisagg.core.blocks import PageState, page_hashes, prefix_root, short
from minidisagg.core.checked import PolicyError
from minidisagg.core.effects import AbortLink, LoadPages, OpenLink, Send, StartPiece
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputs import AbortConfirmed, Loaded, PieceDone, Received, Schedule, StepDone, Tick
from minidisagg.core.messages import (
    ROUTER,
    Abort,
    AnyMessage,
    Cached,
    Envelope,
    Failed,
    KVBusy,
    KVCancel,
    KVDone,
    KVFailed,
    KVGrant,
    KVOffer,
    KVPiece,
    KVWait,
    Migrate,
    PeerDown,
    PeerUp,
    Released,
    RequestSpec,
    Role,
    SamplingParams,
    SetRole,
    Stayed,
    StepOutput,
    Stored,
    Submit,
)
from minidisagg.core.plan import NO_TOKEN, StepPlan
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.request import Request, State
from minidisagg.core.scheduler import BatchBuilder
from minidisagg.core.spec import EngineSpec


class Hand:
    """An engine, its clock, and what it has sent."""

    def __init__(self, engine_spec: EngineSpec | None = None, policy: Policy | None = None) -> None:
        self.core = EngineCore(engine_spec or spec("w"), lambda _: policy or Policy())
        self.now = 0.0

    def receive(self, *bodies: AnyMessage, source: str = ROUTER, epoch: int = 0) -> None:
        for body in bodies:
            self.core.on(Received(Envelope(source, epoch, body)), self.now)
            self.core.check_integrity()

    def step(self, token: int = 7) -> StepPlan | None:
        plan = self.core.on(Schedule(), self.now)
        if plan is not None:
            self.done(plan, token)
        return plan

    def done(self, plan: StepPlan, token: int = 7) -> None:
        self.now += 0.01
        tokens = [token] * sum(item.sample for item in plan.items)
        self.core.on(StepDone(plan.step_id, tokens, 0.01), self.now)
        self.core.check_integrity()

    def live(self, seconds: float) -> None:
        """Tick once a second at least: time in which the worker does not run is nobody's silence."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            self.core.on(Tick(), self.now)
            self.core.check_integrity()

    def sent(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        return [e.body for e in self.core.outbox if isinstance(e, Send) and isinstance(e.body, kind)]


def submit(
    request_id: str, length: int, max_tokens: int = 8, arrival: float = 0.0, incarnation: int = 0, decode: str = "",
    hold: bool = False, stop: tuple[int, ...] = (),
) -> Submit:  # fmt: skip
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
    prompt = [100 * sum(map(ord, request_id)) + index for index in range(length)]
    spec = RequestSpec(prompt=prompt, sampling=sampling, arrival=arrival)
    return Submit(request_id, incarnation, spec, decode=decode, hold=hold)


def sizes(plan: StepPlan | None) -> dict[str, tuple[int, int]]:
    assert plan is not None
    return {item.request_id: (item.start, item.count) for item in plan.items}


def test_a_prompt_and_its_decode_steps() -> None:
    hand = Hand()
    hand.receive(submit("a", 6, max_tokens=3))
    assert sizes(hand.step()) == {"a": (0, 6)}
    assert sizes(hand.step()) == {"a": (6, 1)}
    assert hand.core.pool.counts[PageState.LIVE] == 2
    plan = hand.step()
    assert sizes(plan) == {"a": (7, 1)} and plan is not None and plan.items[0].tokens == [7]
    tokens = [token for output in hand.sent(StepOutput) for token in output.tokens]  # type: ignore[union-attr]
    assert [(token.index, token.finish) for token in tokens] == [(0, ""), (1, ""), (2, "length")]
    work = [(o.prefill_tokens, o.decode_tokens) for o in hand.sent(StepOutput)]  # type: ignore[union-attr]
    assert work == [(6, 0), (0, 1), (0, 1)]
    assert hand.core.idle and hand.core.on(Schedule(), 0.0) is None
    assert hand.core.pool.counts[PageState.LIVE] == 0


def test_a_step_ahead_keeps_the_pages_until_it_lands() -> None:
    hand = Hand()
    hand.receive(submit("a", 4, stop=(7,)))
    first, ahead = hand.core.on(Schedule(), 0.0), hand.core.on(Schedule(), 0.0)
    assert first is not None and ahead is not None
    assert ahead.items[0].tokens == [] and ahead.items[0].index == 1, "the token is in flight"
    hand.done(first)
    assert hand.core.pool.counts[PageState.LIVE] == 2, "ended, but a step still writes"
    assert hand.core.requests["a", 0].state is State.DONE_INFLIGHT
    hand.done(ahead)
    assert hand.core.idle and hand.core.pool.counts[PageState.LIVE] == 0
    assert [len(output.tokens) for output in hand.sent(StepOutput)] == [1, 0]  # type: ignore[union-attr]


def test_an_abort_in_mid_step_ends_without_a_token() -> None:
    hand = Hand()
    hand.receive(submit("a", 6))
    plan = hand.core.on(Schedule(), 0.0)
    assert plan is not None
    hand.receive(Abort("a", 0))
    assert hand.core.pool.counts[PageState.LIVE] == 2
    hand.done(plan)
    assert hand.core.idle
    assert hand.sent(StepOutput)[0].tokens == []  # type: ignore[union-attr]
    hand.receive(submit("a", 6))
    assert hand.core.idle, "the tombstone holds against the duplicate"
    hand.receive(submit("a", 6, incarnation=1))
    assert sizes(hand.step()) == {"a": (0, 6)}


def test_the_last_pages_of_a_request_go_into_the_prefix_cache() -> None:
    hand = Hand()
    hand.receive(submit("a", 8, max_tokens=1))
    hand.step()
    assert hand.core.idle and hand.core.pool.counts[PageState.CACHED] == 2
    repeated = submit("a", 8, max_tokens=1)
    hand.receive(Submit("b", 0, repeated.spec))
    assert sizes(hand.step()) == {"b": (4, 4)}, "one page is taken from the cache, one token must be computed"


def test_preemption_lets_the_oldest_run_and_tells_the_router() -> None:
    hand = Hand(spec("w", num_pages=4, prefix_caching=False))
    hand.receive(submit("young", 4, arrival=2.0))
    hand.step()
    hand.receive(submit("old", 4, arrival=1.0))
    hand.step()
    assert [request.request_id for request in hand.core.scheduler.running] == ["old", "young"]
    for _ in range(3):
        hand.step()
    assert not hand.sent(Released)
    assert sizes(hand.step()) == {"old": (7, 1)}
    released = hand.sent(Released)
    assert [(r.request_id, r.incarnation, r.failure) for r in released] == [("young", 0, False)]  # type: ignore[union-attr]
    assert hand.core.scheduler.preemptions == hand.core.stats().preemptions == 1


def test_a_request_bound_late_cannot_stay_where_its_handoff_fails() -> None:
    """It decodes a little here already, where nobody counts on it: the router places it anew."""
    hand = Hand(spec("w", decode_after=4))
    hand.receive(PeerUp("d", 1, ""), submit("a", 4, hold=True))
    hand.step()
    hand.receive(Migrate("a", 0, "d"))
    [offered] = hand.sent(KVOffer)
    assert hand.core.requests["a", 0].state is State.RUNNING
    hand.receive(PeerDown("d", 1))
    hand.core.on(AbortConfirmed("d", offered.link_epoch, True), hand.now)  # type: ignore[union-attr]
    assert not hand.sent(Stayed) and [one.failure for one in hand.sent(Released)] == [True]  # type: ignore[union-attr]
    assert hand.core.idle


def test_a_late_copy_of_a_migration_that_failed_offers_nothing() -> None:
    """Or a late copy of its grant, too, would have the link write into pages that are somebody else's by now."""
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("a", 4))
    hand.step()
    hand.receive(Migrate("a", 0, "d", anew=1))
    [offered] = hand.sent(KVOffer)
    hand.receive(KVGrant("a", 1, [0, 1], 0), source="d", epoch=1)
    hand.core.on(PieceDone("d", offered.link_epoch, 0, True, False), hand.now)  # type: ignore[union-attr]
    hand.core.on(AbortConfirmed("d", offered.link_epoch, True), hand.now)  # type: ignore[union-attr]
    assert hand.sent(Stayed)
    hand.receive(Migrate("a", 0, "d", anew=1))
    hand.receive(KVGrant("a", 1, [0, 1], 0), source="d", epoch=1)
    assert len(hand.sent(KVOffer)) == 1
    hand.receive(Migrate("a", 0, "d", anew=2))
    assert len(hand.sent(KVOffer)) == 2


def test_a_victim_whose_pages_a_link_still_reads_is_the_only_one() -> None:
    hand = Hand(spec("w", num_pages=8, prefix_caching=False, options=WorkerOptions(8, 64, 2)))
    hand.receive(PeerUp("d", 1, ""))
    hand.receive(submit("old", 3, 20, arrival=1.0), submit("mid", 3, 20, arrival=2.0))
    hand.step()
    hand.receive(submit("new", 16, arrival=3.0, decode="d"))
    hand.step()
    hand.receive(KVGrant("new", 0, [0, 1, 2, 3], 0), source="d", epoch=1)
    while not hand.sent(Released):
        hand.step()
    assert [released.request_id for released in hand.sent(Released)] == ["new"]  # type: ignore[union-attr]
    assert [request.request_id for request in hand.core.scheduler.running] == ["old", "mid"], (
        "both wait for those pages"
    )
    link = hand.core.outgoing.links["d"]
    for seq in list(link.flying):
        hand.core.on(PieceDone("d", link.epoch, seq, True, True), hand.now)
    assert set(sizes(hand.step())) == {"old", "mid"}


def test_late_binding_to_itself_and_to_another() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("a", 4, hold=True), submit("b", 4, hold=True))
    hand.step()
    assert [request.state for request in hand.core.requests.values()] == [State.HELD, State.HELD]
    assert hand.core.on(Schedule(), hand.now) is None, "nothing is planned past the handoff"
    hand.receive(Migrate("a", 0, "w"), Migrate("b", 0, "d"), Migrate("b", 0, "d"))
    assert [offer.request_id for offer in hand.sent(KVOffer)] == ["b"]  # type: ignore[union-attr]
    assert sizes(hand.step()) == {"a": (4, 1)}
    hand.receive(KVGrant("b", 0, [3], 0), source="d", epoch=1)
    assert hand.sent(KVDone) == [KVDone("b", 0, 1, [7])]


def test_a_held_request_is_given_back_when_its_lease_is_over() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("held", 4, hold=True), submit("offered", 4, decode="d"))
    hand.step()
    hand.live(4.9)
    assert not hand.sent(Released)
    hand.live(0.2)
    assert {(r.request_id, r.failure) for r in hand.sent(Released)} == {("held", False), ("offered", False)}  # type: ignore[union-attr]
    assert [(c.request_id, c.pieces) for c in hand.sent(KVCancel)] == [("offered", 0)]  # type: ignore[union-attr]
    assert hand.core.idle and hand.core.pool.counts[PageState.LIVE] == 0


def test_an_offer_that_stands_in_a_queue_keeps_its_lease() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("offered", 4, decode="d"))
    hand.step()
    for _ in range(4):
        hand.live(3.0)
        hand.receive(KVWait("offered", 0), source="d", epoch=1)
    assert not hand.sent(Released)
    hand.live(5.1)
    assert [r.request_id for r in hand.sent(Released)] == ["offered"]  # type: ignore[union-attr]


def test_a_destination_says_that_offers_wait_only_while_something_runs() -> None:
    hand = Hand(spec("w", num_pages=3))
    hand.receive(offer("a", 8, LINK), offer("b", 8, LINK), source="p", epoch=1)
    hand.core.on(Tick(), hand.now + 0.1)
    assert not hand.sent(KVWait), "nothing runs here whose end would make room"
    hand.receive(KVDone("a", 0, 0, [9]), source="p", epoch=1)
    hand.core.on(Tick(), hand.now + 0.2)
    hand.core.on(Tick(), hand.now + 0.3)
    assert [wait.request_id for wait in hand.sent(KVWait)] == ["b"], "once a quarter of a lease"  # type: ignore[union-attr]


def offer(request_id: str, length: int, link_epoch: int, incarnation: int = 0, fingerprint: str = "f") -> KVOffer:
    prompt = list(range(length))
    spec = RequestSpec(prompt=prompt, sampling=SamplingParams())
    return KVOffer(request_id, incarnation, spec, fingerprint, link_epoch)


LINK = (1 << 20) + 1


def test_an_open_offer_that_does_not_fit_is_refused_and_holds_up_nobody() -> None:
    hand = Hand(spec("w", num_pages=4))
    hand.receive(submit("busy", 4))
    hand.step()
    hand.receive(replace(offer("moves", 16, LINK), open=True), offer("prompt", 4, LINK), source="p", epoch=1)
    assert hand.sent(KVFailed) == [KVFailed("moves", 0, "no room for it now")]
    assert [grant.request_id for grant in hand.sent(KVGrant)] == ["prompt"]  # type: ignore[union-attr]
    hand.receive(replace(offer("fits", 4, LINK), open=True), source="p", epoch=1)
    assert [grant.request_id for grant in hand.sent(KVGrant)] == ["prompt", "fits"]  # type: ignore[union-attr]
    assert not hand.core.scheduler.offers


def test_a_refused_migration_says_why_it_stays() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("a", 4))
    hand.step()
    hand.receive(Migrate("a", 0, "d", anew=3))
    assert [offered.open for offered in hand.sent(KVOffer)] == [True]  # type: ignore[union-attr]
    hand.receive(KVFailed("a", 3, "no room"), source="d", epoch=1)
    assert hand.sent(Stayed) == [Stayed("a", 0, "no room", 3)] and hand.sent(KVCancel) == [KVCancel("a", 3, 0)]
    assert sizes(hand.step()) == {"a": (4, 1)}


def test_what_an_offer_has_evicted_is_told_though_no_step_follows() -> None:
    hand = Hand(spec("w", num_pages=4))
    hand.receive(submit("a", 9, max_tokens=2))
    while hand.core.requests:
        hand.step()
    gone = [short(digest) for digest in hand.core.pool._by_hash]
    hand.receive(replace(offer("b", 16, LINK), prefix=True), source="p", epoch=1)
    hand.receive(KVCancel("b", 0, 0), source="p", epoch=1)
    assert gone and not hand.core.pool._by_hash and not hand.sent(Cached)
    for _ in range(2):
        hand.core.on(Tick(), hand.now)
    assert [(set(told.stored), set(told.removed)) for told in hand.sent(Cached)] == [(set(), set(gone))]  # type: ignore[union-attr]


@pytest.mark.parametrize("found", [0, 2, 3])
def test_a_load_tells_what_the_store_has_and_the_first_page_that_it_has_not(found: int) -> None:
    hand, asked = Hand(spec("w", store=True)), submit("a", 13)
    hand.receive(asked)
    hashes = page_hashes(prefix_root("f", ""), asked.spec.prompt, 4)
    assert [effect.digests for effect in hand.core.outbox if isinstance(effect, LoadPages)] == [hashes]
    hand.core.on(Loaded("a", 0, found), hand.now)
    assert hand.sent(Stored) == [Stored(hashes[:found], hashes[found : found + 1])]


@pytest.mark.parametrize(("has", "sent"), [(("raw",), "raw"), (("raw", "int8"), "int8")])
def test_kv_leaves_raw_where_its_links_lack_the_codec(has: tuple[str, ...], sent: str) -> None:
    hand = Hand(spec("w", codecs=has))
    hand.receive(PeerUp("d", 1, ""), replace(submit("a", 4, decode="d"), codec="int8"))
    hand.step()
    assert [offered.codec for offered in hand.sent(KVOffer)] == [sent]  # type: ignore[union-attr]


def test_a_destination_reserves_and_takes_over() -> None:
    hand = Hand()
    hand.receive(PeerUp("p", 1, ""))
    hand.receive(offer("a", 6, LINK), offer("a", 6, LINK), source="p", epoch=1)
    assert [(g.pages, g.skip) for g in hand.sent(KVGrant)] == [([0, 1], 0)]  # type: ignore[union-attr]
    assert hand.core.pool.counts[PageState.INFLIGHT] == 2 and hand.core.on(Schedule(), 0.0) is None
    hand.receive(KVDone("a", 0, 0, [9]), source="p", epoch=1)
    assert hand.core.pool.counts[PageState.LIVE] == 2
    assert sizes(hand.step()) == {"a": (6, 1)}


def test_an_offer_of_another_layout_or_too_long_is_refused() -> None:
    hand = Hand()
    hand.receive(offer("a", 6, LINK, fingerprint="g"), offer("b", 65, LINK), source="p", epoch=1)
    assert [refusal.request_id for refusal in hand.sent(KVFailed)] == ["a", "b"]  # type: ignore[union-attr]
    assert {effect.dest for effect in hand.core.outbox if isinstance(effect, Send)} == {"p"} and hand.core.idle
    hand.receive(offer("c", 64, LINK), source="p", epoch=1)
    assert [grant.request_id for grant in hand.sent(KVGrant)] == ["c"], "all of the cache is enough"  # type: ignore[union-attr]


def test_an_offer_waits_for_pages_and_an_abort_takes_it_away() -> None:
    hand = Hand(spec("w", num_pages=2))
    hand.receive(offer("a", 8, LINK), offer("b", 4, LINK), offer("c", 4, LINK), source="p", epoch=1)
    assert len(hand.core.scheduler.offers) == 2
    hand.receive(Abort("b", 0))
    assert [waiting[2].request_id for waiting in hand.core.scheduler.offers] == ["c"]
    hand.receive(offer("b", 4, LINK), source="p", epoch=1)
    assert len(hand.core.scheduler.offers) == 1, "the tombstone holds"
    hand.receive(KVCancel("a", 0, 0), source="p", epoch=1)
    hand.core.on(Schedule(), 0.0)
    assert [grant.request_id for grant in hand.sent(KVGrant)] == ["a", "c"]  # type: ignore[union-attr]


def test_pages_are_quarantined_until_the_abort_is_confirmed() -> None:
    hand = Hand()
    hand.receive(offer("a", 8, LINK), source="p", epoch=1)
    hand.receive(PeerDown("p", 1))
    assert hand.core.pool.counts[PageState.QUARANTINED] == 2 and not hand.core.idle
    hand.core.on(AbortConfirmed("p", LINK, False), hand.now)
    assert hand.core.pool.counts[PageState.QUARANTINED] == 0 and hand.core.idle
    hand.receive(offer("b", 8, LINK), source="p", epoch=1)
    assert hand.core.idle, "the process is dead, its messages change nothing"


def test_a_late_copy_of_a_death_does_not_touch_the_successor() -> None:
    hand = Hand()
    hand.receive(PeerUp("p", 1, ""), PeerDown("p", 1), PeerUp("p", 2, ""))
    hand.receive(offer("a", 8, (2 << 20) + 1), source="p", epoch=2)
    hand.receive(submit("b", 4, decode="p"))
    hand.step()
    before = len(hand.core.outbox)
    hand.receive(PeerDown("p", 1), PeerUp("p", 1, ""), PeerUp("p", 2, ""))
    assert len(hand.core.outbox) == before and hand.core.pool.counts[PageState.QUARANTINED] == 0


def test_a_link_opened_to_a_dead_peer_is_given_up_when_the_next_one_comes() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), PeerDown("d", 1), submit("a", 4, decode="d"))
    hand.core.on(Schedule(), 0.0)
    assert "d" in hand.core.outgoing.links
    hand.receive(PeerUp("d", 2, ""))
    assert "d" not in hand.core.outgoing.links


def test_a_failed_piece_gives_up_the_link_and_the_request() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("a", 4, decode="d"))
    plan = hand.core.on(Schedule(), 0.0)
    assert plan is not None
    hand.receive(KVGrant("a", 0, [0], 0), source="d", epoch=1)
    hand.done(plan)
    link_epoch = hand.core.outgoing.links["d"].epoch
    hand.core.on(PieceDone("d", link_epoch, 0, True, False, error="reset by peer"), hand.now)
    assert hand.core.pool.counts[PageState.LIVE] == 1 and not hand.sent(Released), "the link may still read the page"
    hand.core.on(AbortConfirmed("d", link_epoch, True), hand.now)
    [released] = hand.sent(Released)
    assert released == Released("a", 0, "link to d lost: reset by peer", True)
    assert hand.core.idle


def test_sources_that_forgot_a_handoff_do_not_free_what_is_still_landing() -> None:
    sim = Stepwise([spec("p", Role.PREFILL), spec("d", Role.DECODE)])
    while sim.messages:
        sim.deliver()
    sim.submit("a", [1, 2, 3, 4, 5], SamplingParams(max_tokens=3), 0.0)
    sim.events.pop()()
    while not any(link.flying for link in sim.workers["d"].core.incoming.links.values()):
        if sim.messages:
            sim.deliver()
        else:
            sim.happen()
    hand = sim.workers["d"].core
    hand.on(Received(Envelope("p", 1, KVCancel("a", 0, 0))), sim.now)
    assert hand.pool.counts[PageState.INFLIGHT] == 2, "one piece is posted, whatever the source says"
    sim.settle()
    assert not sim.complaints()


def test_a_policy_that_plans_nothing_is_told() -> None:
    class Lazy(Policy):
        def compose(self, batch: object, worker: object) -> None:
            """Nothing."""

    hand = Hand(policy=Lazy())
    hand.receive(submit("a", 4))
    with pytest.raises(StalledError, match="policy Lazy plans nothing"):
        hand.core.on(Schedule(), 0.0)


def test_a_token_that_is_none_ends_its_request_and_no_other() -> None:
    hand = Hand()
    hand.receive(submit("bad", 4), submit("good", 4, max_tokens=2))
    plan = hand.core.on(Schedule(), hand.now)
    assert plan is not None
    ahead = hand.core.on(Schedule(), hand.now)  # a step ahead carries both
    assert ahead is not None and len(ahead.items) == 2
    hand.core.on(StepDone(plan.step_id, [NO_TOKEN, 7], 0.01), hand.now)
    hand.core.on(StepDone(ahead.step_id, [5, 7], 0.01), hand.now)
    [failed] = hand.sent(Failed)
    assert failed == Failed("bad", 0, "the logits of its next token are not finite, or forbid every token")
    tokens = [(out.request_id, out.token, out.finish) for step in hand.sent(StepOutput) for out in step.tokens]  # type: ignore[union-attr]
    assert tokens == [("good", 7, ""), ("good", 7, "length")]
    assert hand.core.idle
    hand.core.check_integrity()


def test_a_source_that_computes_keeps_its_handoffs_alive_until_the_step_deadline() -> None:
    hand = Hand(spec("w", step_deadline=30.0))
    hand.receive(PeerUp("d", 1, ""), submit("long", 8, decode="d"))
    plan = hand.core.on(Schedule(), hand.now)
    assert plan is not None
    hand.receive(KVGrant("long", 0, [4, 5], 0), source="d", epoch=1)
    hand.live(29.0)
    assert not hand.sent(Released)
    assert len(hand.sent(KVBusy)) >= 14  # a quarter of the lease, at this pace of ticks
    said = len(hand.sent(KVBusy))
    hand.live(7.0)  # nobody knows whether it will ever end: stuck detection has the same deadline
    assert len(hand.sent(KVBusy)) <= said + 1
    assert [r.request_id for r in hand.sent(Released)] == ["long"]  # type: ignore[union-attr]


def test_a_destination_waits_for_a_source_that_computes() -> None:
    hand = Hand()
    hand.receive(offer("long", 8, LINK), source="p", epoch=1)
    for _ in range(5):
        hand.live(4.0)
        hand.receive(KVBusy("long", 0), source="p", epoch=1)
    assert not hand.sent(KVFailed)
    hand.live(5.1)
    assert [failed.reason for failed in hand.sent(KVFailed)] == ["no progress"]  # type: ignore[union-attr]


def test_time_in_which_a_worker_does_not_run_is_nobodys_silence() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), submit("offered", 4, decode="d"))
    hand.receive(offer("coming", 8, LINK), source="p", epoch=1)
    hand.step()
    hand.core.on(Tick(), hand.now)
    hand.now += 1000.0
    hand.core.on(Tick(), hand.now)
    assert not hand.sent(Released) and not hand.sent(KVFailed)
    hand.live(5.1)
    assert hand.sent(Released) and hand.sent(KVFailed)


class Closed(Policy):
    """Takes no offer."""

    def accept(self, offer: Request, worker: object) -> bool:
        return False


def test_an_empty_worker_that_accepts_nothing_says_so() -> None:
    hand = Hand(policy=Closed())
    hand.receive(offer("a", 8, LINK), source="p", epoch=1)
    hand.live(2.4)
    assert not hand.sent(KVFailed)
    hand.live(0.3)
    assert hand.sent(KVFailed) == [KVFailed("a", 0, "policy Closed: accept refuses it though worker w is empty")]
    hand.receive(submit("mine", 4, max_tokens=400))
    hand.receive(offer("b", 8, LINK), source="p", epoch=1)
    for _ in range(30):
        hand.step()
        hand.live(0.5)
    assert len(hand.sent(KVFailed)) == 1, "while something runs, it may still change its mind"


def test_chunks_are_pushed_while_the_prompt_is_still_computed() -> None:
    hand = Hand(spec("w", options=WorkerOptions(8, 64, 6)))
    hand.receive(PeerUp("d", 1, ""), submit("a", 14, decode="d"))
    hand.step()
    hand.receive(KVGrant("a", 0, [4, 5, 6, 7], 0), source="d", epoch=1)
    assert pushed(hand) == [(0, 1)], "the page that was full when the grant came"
    hand.step()
    assert pushed(hand) == [(0, 1), (1, 2)] and not hand.sent(KVDone)
    hand.step()
    assert pushed(hand) == [(0, 1), (1, 2), (3, 1)]
    assert hand.sent(KVDone) == [KVDone("a", 0, 3, [7])]


def pushed(hand: Hand) -> list[tuple[int, int]]:
    """(first page, pages) of each piece, announced and started alike, of all layers."""
    chunks = [chunk for chunk in hand.sent(KVPiece) if isinstance(chunk, KVPiece)]
    ops = [effect.piece for effect in hand.core.outbox if isinstance(effect, StartPiece)]
    for chunk, op in zip(chunks, ops, strict=True):
        assert (chunk.seq, chunk.count, chunk.layers) == (op.seq, op.count, op.layers) and op.layers == (0, 2)
        assert len(op.pages) == len(op.remote) == op.count and op.send
    return [(chunk.first, chunk.count) for chunk in chunks]


def test_only_the_first_token_after_a_handoff_tells_how_long_it_waited() -> None:
    hand = Hand()
    hand.receive(PeerUp("p", 1, ""))
    hand.receive(offer("a", 4, LINK), KVDone("a", 0, 0, [9]), source="p", epoch=1)
    hand.now += 0.5
    hand.step()
    hand.step()
    first, second = (token for output in hand.sent(StepOutput) for token in output.tokens)  # type: ignore[union-attr]
    assert (first.wait_s, first.step_s) == (pytest.approx(0.5), pytest.approx(0.01))
    assert (second.wait_s, second.step_s) == (0.0, 0.0)


def test_what_was_preempted_for_a_step_is_not_added_to_it() -> None:
    added: list[tuple[str, int]] = []

    class Counting(Policy):
        def compose(self, batch: BatchBuilder, worker: object) -> None:
            for request in (*batch.running, *batch.waiting):
                added.append((request.request_id, batch.add(request)))

    hand = Hand(spec("w", num_pages=5, prefix_caching=False), Counting())
    hand.receive(submit("young", 4, arrival=2.0))
    hand.step()
    hand.receive(submit("old", 4, arrival=1.0))
    while not hand.sent(Released):
        hand.step()
    assert [released.request_id for released in hand.sent(Released)] == ["young"]  # type: ignore[union-attr]
    assert added[-2:] == [("old", 1), ("young", 0)]


def test_a_piece_that_was_written_is_verified_against_what_its_source_says() -> None:
    hand = Hand(spec("w", one_sided_links=True))
    hand.receive(offer("a", 8, LINK), KVPiece("a", 0, LINK, 0, 1, 1, (0, 2), checksum=77), source="p", epoch=1)
    [op] = [effect.piece for effect in hand.core.outbox if isinstance(effect, StartPiece)]
    assert (op.checksum, op.pages, op.count, op.layers, op.send) == (77, [1], 1, (0, 2), False)


def test_a_prompt_that_does_not_fit_holds_up_those_behind_it() -> None:
    hand = Hand(spec("w", num_pages=4))
    hand.receive(submit("runs", 4))
    hand.step()
    hand.receive(submit("long", 12, arrival=1.0), submit("short", 4, arrival=2.0))
    assert sizes(hand.step()) == {"runs": (4, 1)}
    assert [request.request_id for request in hand.core.scheduler.waiting] == ["long", "short"]


def test_a_page_is_spared_for_each_that_runs() -> None:
    hand = Hand(spec("w", num_pages=4, prefix_caching=False))
    hand.receive(submit("runs", 4))
    hand.step()
    hand.step()  # 2 pages are left
    hand.receive(submit("two", 8, arrival=1.0))
    assert sizes(hand.step()) == {"runs": (5, 1)}
    hand.receive(Abort("two", 0), submit("one", 4, arrival=1.0))
    assert sizes(hand.step()) == {"runs": (6, 1), "one": (0, 4)}


def test_a_refused_handoff_is_given_back_with_the_reason_and_by_its_destination_alone() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 1, ""), PeerUp("e", 1, ""), submit("a", 4, decode="d"))
    hand.step()
    hand.receive(KVFailed("a", 0, "not mine"), source="e", epoch=1)
    assert not hand.sent(Released)
    hand.receive(KVFailed("a", 0, "no room"), KVFailed("a", 0, "no room"), source="d", epoch=1)
    assert hand.sent(Released) == [Released("a", 0, "no room", True)] and hand.core.idle


def test_a_newer_incarnations_offer_takes_the_place_of_one_that_waits() -> None:
    hand = Hand(spec("w", num_pages=2))
    hand.receive(offer("a", 8, LINK), offer("b", 4, LINK), offer("b", 4, LINK, incarnation=1), source="p", epoch=1)
    assert [waiting[2].key for waiting in hand.core.scheduler.offers] == [("b", 1)]


def test_the_first_token_tells_how_long_its_prompt_queued_and_was_computed() -> None:
    hand = Hand()
    hand.now = 1.0
    hand.receive(submit("a", 4))
    hand.now = 3.0
    hand.step()
    hand.step()
    first, second = (token for output in hand.sent(StepOutput) for token in output.tokens)  # type: ignore[union-attr]
    assert (first.queue_s, first.prefill_s) == (pytest.approx(2.0), pytest.approx(0.01))
    assert (second.queue_s, second.prefill_s) == (0.0, 0.0)


class Odd(Policy):
    """Gives the request `odd` a key that no other can be compared with, and evicts whatever `victim` says."""

    victim: Any = None

    def order(self, request: Any, stage: Any, worker: Any) -> Any:
        return "odd" if request.request_id == "odd" else super().order(request, stage, worker)

    def evict(self, worker: Any, candidates: Any) -> Any:
        return self.victim


def test_a_request_that_has_no_place_in_the_order_fails_and_the_queue_stands() -> None:
    hand = Hand(policy=Odd())
    hand.receive(submit("a", 4, max_tokens=1), submit("odd", 4), submit("b", 4, max_tokens=1))
    assert [r.request_id for r in hand.core.scheduler.waiting] == ["a", "b"]
    [send] = [e for e in hand.core.outbox if isinstance(e, Send) and isinstance(e.body, Failed)]
    assert send.dest == ROUTER and send.body.request_id == "odd"
    assert send.body.reason.startswith("policy Odd: order raised TypeError: ")
    hand.step()
    assert hand.core.idle
    hand.receive(offer("c", 4, LINK), offer("odd", 4, LINK, incarnation=1), source="p", epoch=1)
    assert [f.incarnation for f in hand.sent(Failed)] == [0, 1]  # type: ignore[union-attr]
    assert ("c", 0) in hand.core.requests and ("odd", 1) not in hand.core.requests


def test_a_victim_that_is_none_is_named() -> None:
    policy = Odd()
    hand = Hand(spec("w", num_pages=3, prefix_caching=False), policy)
    hand.receive(submit("a", 4, arrival=0.0), submit("b", 4, arrival=1.0))
    policy.victim = 5
    with pytest.raises(PolicyError, match="policy Odd: evict answered 5, not a Victim among the candidates"):
        for _ in range(8):
            hand.step()


def test_prefix_hits_are_told_with_the_first_token_only() -> None:
    hand = Hand()
    hand.receive(submit("a", 9, max_tokens=1))
    hand.step()
    hand.receive(Submit("b", 0, RequestSpec(prompt=submit("a", 9).spec.prompt, sampling=SamplingParams(max_tokens=3))))
    for _ in range(3):
        hand.step()
    steps = hand.sent(StepOutput)
    assert [step.step_id for step in steps] == [1, 2, 3, 4]  # type: ignore[union-attr]
    told = [(t.request_id, t.cached_tokens) for step in steps for t in step.tokens]  # type: ignore[union-attr]
    assert told == [("a", 0), ("b", 8), ("b", 0), ("b", 0)]


def test_news_of_a_peer_that_is_dead_already_brings_it_not_back() -> None:
    hand = Hand()
    hand.receive(PeerUp("d", 2, ""), PeerDown("d", 2), submit("a", 4, decode="d"))
    hand.step()
    [open_link] = [e for e in hand.core.outbox if isinstance(e, OpenLink)]
    hand.receive(PeerUp("d", 2, ""))  # a late copy
    assert not [e for e in hand.core.outbox if isinstance(e, AbortLink)]
    hand.receive(PeerUp("d", 3, ""))
    [abort] = [e for e in hand.core.outbox if isinstance(e, AbortLink)]
    assert (abort.link_epoch, abort.outgoing, abort.peer_dead) == (open_link.link_epoch, True, True)


def test_offers_wait_for_an_engine_whose_step_still_flies() -> None:
    """It is not empty, so that its policy may still change its mind."""
    hand = Hand(policy=Closed())
    hand.receive(submit("gone", 4))
    plan = hand.core.on(Schedule(), hand.now)
    assert plan is not None
    hand.receive(Abort("gone", 0))
    hand.receive(offer("a", 8, LINK), source="p", epoch=1)
    hand.live(4.0)
    assert not hand.sent(KVFailed)
    hand.done(plan)
    hand.live(2.7)
    assert hand.sent(KVFailed)


def test_each_chunk_renews_the_lease_at_the_destination() -> None:
    hand = Hand()
    hand.receive(offer("a", 8, LINK), source="p", epoch=1)
    hand.live(4.0)
    hand.receive(KVPiece("a", 0, LINK, 0, 0, 1, (0, 2)), source="p", epoch=1)
    hand.core.on(PieceDone("p", LINK, 0, False, True), hand.now)
    hand.live(4.5)
    assert not hand.sent(KVFailed)
    hand.live(0.7)
    assert hand.sent(KVFailed)


def test_cohorts_are_forgotten_with_their_last_request() -> None:
    hand = Hand()
    suspects = [replace(submit(name, 4, max_tokens=2), spec=replace(submit(name, 4).spec, cohort=c)) for name, c in
                (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    hand.receive(*suspects, submit("free", 4, max_tokens=2))
    assert hand.core.scheduler.cohorts == {1: 2, 2: 1}
    alone = [sizes(hand.step()).keys() for _ in range(3)]
    assert sorted(map(sorted, alone)) == [["a", "b"], ["c"], ["free"]]
    hand.receive(Abort("c", 0))
    assert hand.core.scheduler.cohorts == {1: 2}
    for _ in range(4):
        hand.step()
    assert not hand.core.scheduler.cohorts


class Wide(Policy):
    """Fills its step from all that is on the worker, not from what the batch offers."""

    def compose(self, batch: Any, worker: Any) -> None:
        for request in (*worker.running, *worker.waiting):
            batch.add(request)


def test_suspects_stay_apart_whatever_a_policy_adds() -> None:
    hand = Hand(policy=Wide())
    suspect = submit("a", 4, max_tokens=2)
    hand.receive(replace(suspect, spec=replace(suspect.spec, cohort=1)), submit("free", 4, max_tokens=2))
    assert [list(sizes(hand.step())) for _ in range(2)] in ([["a"], ["free"]], [["free"], ["a"]])


def test_a_role_brings_its_options_or_the_workers_own() -> None:
    hand = Hand(spec("w", options=WorkerOptions(8, 64, 2)))

    def chunk_of(request_id: str) -> int:
        hand.receive(submit(request_id, 12))
        plan = hand.step()
        hand.receive(Abort(request_id, 0))
        return sizes(plan)[request_id][1]

    assert chunk_of("a") == 2
    hand.receive(SetRole(Role.PREFILL, WorkerOptions(1, 8, 0)))
    view = hand.core.scheduler.view
    assert (view.role, view.options.max_num_seqs) == (Role.PREFILL, 1)
    assert chunk_of("b") == 8  # its budget is the limit
    hand.receive(SetRole(Role.BOTH))
    assert (view.role, view.options.max_num_seqs) == (Role.BOTH, 8) and chunk_of("c") == 2

"""The router: admission, resubmission, poison, roles, stage times."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from stepwise import NEVER, Stepwise, spec

from minidisagg.core.checked import Checked, PolicyError
from minidisagg.core.effects import Send
from minidisagg.core.messages import (
    Abort,
    AnyMessage,
    Envelope,
    Failed,
    Fatal,
    Hello,
    LinkStats,
    Logprobs,
    Migrate,
    Parted,
    Released,
    Replicate,
    RequestSpec,
    Role,
    SamplingParams,
    SetPolicy,
    SetRole,
    Stats,
    Stayed,
    StepOutput,
    Submit,
    TokenLogprob,
    TokenOut,
    WorkerOptions,
)
from minidisagg.core.policy import (
    Change,
    ClusterView,
    Migration,
    Placement,
    Policy,
    Reject,
    Replica,
    RequestView,
    RoleChange,
)
from minidisagg.core.router import MAX_FAILURES, Kill, Router, RouterSpec
from minidisagg.core.tracked import Emit

SAMPLING = SamplingParams(max_tokens=4)


class Hand:
    """A router, its clock and its workers' voices."""

    def __init__(self, workers: dict[str, Role], policy: Policy | None = None, **limits: Any) -> None:
        self.router = Router(RouterSpec(**limits), policy or Policy())
        self.now = 0.0
        self.role = dict(workers)
        for name, role in workers.items():
            self.say(name, Hello(role, 64, 4, 256, "f", "", 0, 1))
        self.take()

    def say(self, worker: str, body: AnyMessage, epoch: int = 1) -> None:
        self.router.on_message(Envelope(worker, epoch, body), self.now)
        self.router.check_integrity()

    def token(
        self, worker: str, request_id: str, index: int, incarnation: int = 0, finish: str = "", **times: Any
    ) -> None:
        out = TokenOut(request_id, incarnation, index, 100 + index, finish, **times)
        self.say(worker, StepOutput(1, [out]))

    def request(self, request_id: str = "a", length: int = 4) -> None:
        self.router.on_request(
            request_id, RequestSpec(prompt=[1] * length, sampling=SAMPLING, arrival=self.now), self.now
        )
        self.router.check_integrity()

    def take(self) -> list[object]:
        """Effects since the last call: (destination, message) of a send, else the effect."""
        effects, self.router.outbox = self.router.outbox, []
        return [(e.dest, e.body) if isinstance(e, Send) else e for e in effects]

    def emits(self) -> list[Emit]:
        return [effect for effect in self.take() if isinstance(effect, Emit)]


def submit(incarnation: int, emitted: list[int] | None = None, decode: str = "", hold: bool = False) -> Submit:
    """What the request `a` becomes."""
    spec = RequestSpec(prompt=[1] * 4, emitted=emitted or [], sampling=SAMPLING)
    return Submit("a", incarnation, spec, decode, hold)


def stats(role: Role, running: int = 0, steps: int = 0, held: int = 0, flying: int = 0) -> Stats:
    return Stats(role, steps, running, 0, held, 0, 0, 64, 0, 0, 0, 0, flying=flying)


def test_admission_is_bounded_in_requests_and_in_tokens() -> None:
    hand = Hand({"w": Role.BOTH}, max_waiting=2, max_waiting_tokens=20)
    hand.request("a", 10)
    hand.request("b", 11)
    [emit] = [e for e in hand.take() if isinstance(e, Emit)]
    assert (emit.request_id, emit.finish, emit.retry_after) == ("b", "reject", 1.0)
    assert emit.error == "10 prompt tokens are waiting already"
    hand.request("c", 10)
    hand.request("d", 1)
    [emit] = hand.emits()
    assert (emit.finish, emit.error) == ("reject", "2 requests are waiting already") and emit.retry_after > 0
    hand.token("w", "a", 0)
    hand.request("d", 1)
    assert "d" in hand.router.requests, "the first token of another made room"


def test_a_second_request_of_the_same_id_is_an_error_and_leaves_the_first_alone() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("a")
    hand.request("a")
    assert [(emit.finish, emit.error) for emit in hand.emits()] == [("error", "a request of this id is running")]
    hand.token("w", "a", 0)
    assert [emit.tokens for emit in hand.emits()] == [(100,)]


def test_tokens_are_told_in_order_and_once() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("a")
    hand.take()
    for index in (1, 2, 1):
        hand.token("w", "a", index)
    assert not hand.take()
    hand.token("w", "a", 0)
    hand.token("w", "a", 0)
    assert [(emit.index, emit.tokens) for emit in hand.emits()] == [(0, (100,)), (1, (101,)), (2, (102,))]
    hand.token("w", "a", 3, incarnation=1)
    hand.token("w", "a", 3, finish="length")
    [last] = hand.emits()
    assert (last.index, last.finish) == (3, "length") and not hand.router.requests


def test_what_a_worker_gave_back_is_submitted_again_with_its_tokens() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("a")
    hand.token("w", "a", 0)
    hand.take()
    for _ in range(2 * MAX_FAILURES):  # preemptions are no failures
        incarnation = hand.router.requests["a"].incarnation
        hand.say("w", Released("a", incarnation, "preempted"))
        hand.say("w", Released("a", incarnation, "preempted"))  # a late copy
        abort, again = hand.take()
        assert abort == ("w", Abort("a", incarnation))
        assert again == ("w", submit(incarnation + 1, [100]))


def test_a_poison_request_ends_in_an_error_after_three_failures() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("poison")
    for epoch in range(1, MAX_FAILURES + 1):
        hand.take()
        hand.router.on_worker_down("w", epoch, hand.now)
        if epoch < MAX_FAILURES:
            assert hand.router.requests["poison"].failures == epoch
            hand.say("w", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1), epoch + 1)
    [emit] = hand.emits()
    assert (emit.finish, emit.error) == ("error", "failed 3 times, last: worker w failed")
    assert not hand.router.requests


def test_a_new_process_that_comes_before_the_news_of_the_old_ones_death() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("a")
    hand.take()
    hand.say("w", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1), epoch=2)
    assert ("w", submit(1)) in hand.take()
    hand.router.on_worker_down("w", 1, hand.now)
    hand.say("w", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1), epoch=1)
    assert not hand.take(), "neither the late news nor a late copy of the old Hello changes anything"
    assert hand.router.view.workers["w"].epoch == 2


def test_requests_wait_for_a_worker() -> None:
    hand = Hand({"p": Role.PREFILL})
    hand.request("a")
    assert hand.router.parked == ["a"] and not hand.take()
    hand.say("d", Hello(Role.DECODE, 64, 4, 256, "f", "", 0, 1))
    assert ("p", submit(0, decode="d")) in hand.take()


def test_a_worker_finishes_before_it_flips() -> None:
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH})
    hand.request("a")
    hand.router.set_role(RoleChange("w", Role.DECODE), hand.now)
    hand.router.on_tick(hand.now)
    hand.request("b")
    assert not [e for e in hand.take() if e == ("w", SetRole(Role.DECODE))]
    assert hand.router.requests["a"].prefill == "w" and hand.router.requests["b"].prefill == "x"
    hand.token("w", "a", 0, finish="stop")
    hand.router.on_tick(hand.now)
    assert ("w", SetRole(Role.DECODE)) in hand.take()
    assert not hand.router.view.workers["w"].takes(Role.DECODE)
    hand.say("w", stats(Role.DECODE))
    assert hand.router.view.workers["w"].takes(Role.DECODE)
    assert not hand.router.view.workers["w"].takes(Role.PREFILL)


def test_a_restarted_worker_takes_the_role_that_it_was_given() -> None:
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH})
    hand.router.set_role(RoleChange("w", Role.DECODE), hand.now)
    hand.router.on_tick(hand.now)
    hand.say("w", stats(Role.DECODE))
    hand.router.on_worker_down("w", 1, hand.now)
    hand.take()
    hand.say("w", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1), epoch=2)
    assert not hand.router.view.workers["w"].takes(Role.PREFILL)
    hand.router.on_tick(hand.now)
    assert ("w", SetRole(Role.DECODE)) in hand.take()


def test_options_come_with_the_role() -> None:
    options = {Role.DECODE: WorkerOptions(4, 64, 16)}
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH}, options=options)
    hand.router.set_role(RoleChange("w", Role.DECODE), hand.now)
    hand.router.on_tick(hand.now)
    assert ("w", SetRole(Role.DECODE, WorkerOptions(4, 64, 16))) in hand.take()
    hand.say("w", stats(Role.DECODE))
    hand.say("w", stats(Role.BOTH))  # a late copy of an earlier order has won
    assert hand.take() == [("w", SetRole(Role.DECODE, WorkerOptions(4, 64, 16)))]
    hand.router.set_role(RoleChange("w", Role.BOTH), hand.now)
    hand.router.on_tick(hand.now)
    assert ("w", SetRole(Role.BOTH)) in hand.take()  # its own


def decoding(hand: Hand) -> None:
    """A request, at d1."""
    hand.request("a")
    hand.token("p", "a", 0)
    hand.token("d1", "a", 1)
    hand.take()


def test_a_request_moves_only_to_who_takes_decodes() -> None:
    hand = Hand({"p": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE, "d3": Role.DECODE})
    decoding(hand)
    hand.router.drain("d2", hand.now)
    hand.router.set_role(RoleChange("d3", Role.BOTH), hand.now)
    assert not any(hand.router.migrate("a", name, hand.now) for name in ("p", "d2", "d3", "nobody")) and not hand.take()
    hand.router.set_role(RoleChange("d3", Role.DECODE), hand.now)
    assert hand.router.migrate("a", "d3", hand.now) and hand.take() == [("d1", Migrate("a", 0, "d3", anew=1))]


class Elsewhere(Policy):
    """Prompts go to `p`, and from there to `q` if they have not begun."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("p", "d")

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("q", "d")


def test_what_came_early_of_an_incarnation_that_is_no_more_is_not_taken_for_the_next() -> None:
    hand = Hand({"p": Role.PREFILL, "q": Role.PREFILL, "d": Role.DECODE}, Elsewhere())
    hand.request("a")
    hand.token("d", "a", 1)  # before the first, of which no word has come
    hand.router.on_tick(hand.now)
    hand.token("q", "a", 0, incarnation=1)
    request = hand.router.requests["a"]
    assert (request.prefill, request.incarnation, request.emitted) == ("q", 1, [100])
    assert not hand.router.migrate("a", "d", hand.now), "it does not decode yet"


class Remembers(Policy):
    """Its worker `w`, dead or alive."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("v", "v", fetch_from="w")

    def rebalance(self, cluster: ClusterView) -> list[Change]:
        every = cluster.requests()
        return [*(Replica(r, "v", "w") for r in every), *(Migration(r, "w") for r in every), RoleChange("w", Role.BOTH)]


def test_changes_that_name_a_dead_worker_come_to_nothing() -> None:
    hand = Hand({"v": Role.BOTH, "w": Role.BOTH}, Remembers())
    hand.router.on_worker_down("w", 1, hand.now)
    hand.take()
    hand.request("a")
    hand.token("v", "a", 0)
    hand.router.on_tick(hand.now)
    assert [body for _, body in filter(lambda sent: isinstance(sent, tuple), hand.take())] == [submit(0)]  # type: ignore[misc]
    hand.say("w", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1), epoch=2)
    hand.take()
    hand.router.on_tick(hand.now)
    assert {type(body) for _, body in hand.take()} == {Replicate, Migrate}  # type: ignore[misc]


@pytest.mark.parametrize("end", ["length", "abort", "error"])
def test_what_was_decoded_goes_back_whoever_has_ended_it(end: str) -> None:
    """Who stops an answer, or has a stop string for it, may go on with the conversation."""
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE})
    hand.router.on_request("a", RequestSpec(prompt=[1] * 4, sampling=SAMPLING, session="c"), hand.now)
    hand.token("p", "a", 0)
    hand.token("d", "a", 1)
    hand.take()
    if end == "length":
        hand.token("d", "a", 2, finish="length")
    else:
        hand.router.on_abort("a", hand.now, "it is late" if end == "error" else "")
    back = [sent for sent in hand.take() if isinstance(sent, tuple) and isinstance(sent[1], Replicate)]
    assert [(dest, body.dest) for dest, body in back] == ([] if end == "error" else [("d", "p")])


def test_a_late_copy_of_what_came_of_one_migration_is_none_of_the_next() -> None:
    hand = Hand({"p": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE})
    decoding(hand)
    for anew in (1, 2):
        assert hand.router.migrate("a", "d2", hand.now) and hand.router.requests["a"].incarnation == anew
        hand.say("d1", Stayed("a", 0, "full", 1))
    assert (hand.router.requests["a"].decode, hand.router.migrations) == ("d2", 0)
    hand.token("d2", "a", 2, incarnation=2)
    assert hand.router.migrations == 1


class Raw(Policy):
    """In the cluster, KV goes otherwise."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        return Placement("p", "d", codec="raw")


def test_a_request_keeps_its_codec_when_it_goes_through_the_store() -> None:
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE}, Raw())
    hand.request("a")
    hand.token("p", "a", 0)
    hand.take()
    hand.say("p", Parted("a", 0))
    assert hand.take() == [("d", replace(submit(1, [100]), codec="raw"))]


class Late(Policy):
    """Leaves decode open, then says d2."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        return Placement(request.prefill, "d2") if request.prefill else Placement("p", None)


def test_late_binding_names_the_decode_worker_after_prefill() -> None:
    hand = Hand({"p": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE}, Late())
    hand.request("a")
    assert hand.take() == [("p", submit(0, hold=True))]
    hand.token("p", "a", 0)
    assert hand.take()[1:] == [("p", Migrate("a", 0, "d2"))]
    hand.token("d2", "a", 1, finish="stop")
    [end] = hand.emits()
    assert end.handoff and hand.router.view.workers["d2"].decoding == 0


def test_the_last_token_from_prefill_leaves_a_tombstone_at_decode() -> None:
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE})
    hand.request("a")
    hand.token("p", "a", 0, finish="stop")
    assert ("d", Abort("a", 0)) in hand.take()


def test_stage_times_add_up_and_say_where_the_time_went() -> None:
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE})
    hand.request("a")
    hand.now = 1.0
    hand.token("p", "a", 0, prefill_s=0.7)
    hand.now = 1.5
    hand.token("d", "a", 1, wait_s=0.1, step_s=0.15)
    hand.now = 2.0
    hand.token("d", "a", 2, finish="stop")
    times = hand.emits()[-1].times
    assert times is not None
    stages = (times.queue, times.prefill, times.transfer, times.decode_wait, times.decode)
    assert stages == pytest.approx((0.3, 0.7, 0.25, 0.1, 0.65)) and sum(stages) == pytest.approx(times.e2e) == 2.0


@pytest.mark.parametrize(("wait", "step"), [(9.0, 1.0), (0.1, 9.0)])
def test_durations_of_another_clock_make_no_stage_negative(wait: float, step: float) -> None:
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE})
    hand.request("a")
    hand.now = 1.0
    hand.token("p", "a", 0, prefill_s=5.0)
    hand.now = 1.5
    hand.token("d", "a", 1, wait_s=wait, step_s=step, finish="stop")
    times = hand.emits()[-1].times
    assert times is not None
    stages = (times.queue, times.prefill, times.transfer, times.decode_wait, times.decode)
    assert min(stages) >= 0 and sum(stages) == pytest.approx(1.5)


def test_a_silent_worker_and_a_stuck_one_are_killed() -> None:
    names = "silent", "stuck", "well", "full"
    hand = Hand(dict.fromkeys(names, Role.BOTH), lost_after=5.0, stuck_after=20.0)
    kills = []
    for second in range(1, 25):
        hand.now = float(second)
        hand.say("stuck", stats(Role.BOTH, running=1, steps=3, held=2, flying=1))
        hand.say("well", stats(Role.BOTH, running=1, steps=second, flying=1))
        hand.say("full", stats(Role.BOTH, running=1, steps=3, held=2))  # waits for its peer to take pages
        hand.router.on_tick(hand.now)
        kills += [(second, e.worker, e.reason) for e in hand.take() if isinstance(e, Kill)]
    assert (6, "silent", "does not answer") in kills
    assert {(worker, reason) for _, worker, reason in kills} == {
        ("silent", "does not answer"), ("stuck", "makes no progress")
    }  # fmt: skip


def test_a_complaint_about_a_dead_epoch_kills_nobody() -> None:
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH})
    hand.say("w", Fatal("does not let go", "x", 0))
    assert not hand.take()
    hand.say("w", Fatal("does not let go", "x", 1))
    assert hand.take() == [Kill("x", 1, "does not let go")]


def test_a_request_past_its_deadline_ends() -> None:
    hand = Hand({"w": Role.BOTH}, request_timeout=3.0, lost_after=NEVER)
    hand.request("a")
    hand.take()
    hand.router.on_tick(3.1)
    abort, emit = hand.take()
    assert abort == ("w", Abort("a", 0))
    assert isinstance(emit, Emit) and emit.error == "the request's deadline has passed"


def test_preempted_by_the_engine_and_placed_again_by_the_router() -> None:
    sim = Stepwise([spec("w", num_pages=6, prefix_caching=False)])
    while sim.messages:
        sim.deliver()
    for index in range(3):
        sim.submit(f"r{index}", [index] * 4, SamplingParams(max_tokens=12), 0.0)
        sim.events.pop(-1)()
    sim.settle()
    assert sim.workers["w"].core.scheduler.preemptions > 0 and not sim.complaints()
    assert [outcome.finish for outcome in sim.outcomes.values()] == ["length"] * 3


def test_what_is_preempted_goes_on_while_admission_is_paused() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("a")
    hand.router.pause(True, hand.now)
    hand.request("b")
    hand.take()
    hand.say("w", Released("a", 0, "preempted", False))
    assert [body.request_id for _, body in hand.take() if isinstance(body, Submit)] == ["a"]
    hand.router.pause(False, hand.now)
    assert [body.request_id for _, body in hand.take() if isinstance(body, Submit)] == ["b"]


def test_time_in_which_the_router_does_not_run_is_nobodys_silence() -> None:
    """A front end that was stopped finds its workers' messages only after its own tick."""
    hand = Hand({"w": Role.BOTH}, lost_after=5.0, stuck_after=20.0)
    hand.say("w", stats(Role.BOTH, running=1, steps=3, flying=1))
    hand.router.on_tick(hand.now)
    hand.take()
    hand.now += 1000.0
    hand.router.on_tick(hand.now)
    assert not hand.take()
    for _ in range(5):
        hand.now += 1.0
        hand.router.on_tick(hand.now)
    [kill] = hand.take()
    assert kill == Kill("w", 1, "does not answer")


def test_a_worker_that_is_down_takes_its_new_role_when_it_is_back() -> None:
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH})
    hand.router.on_worker_down("w", 1, hand.now)
    hand.router.set_role(RoleChange("w", Role.DECODE), hand.now)
    hand.take()
    hand.say("w", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1), epoch=2)
    hand.router.on_tick(hand.now)
    assert ("w", SetRole(Role.DECODE)) in hand.take()


def test_a_request_that_can_go_on_nowhere_ends_and_is_forgotten_everywhere() -> None:
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE})
    hand.request("a")
    hand.take()
    hand.say("p", Failed("a", 5, "of another incarnation"))
    assert not hand.take()
    hand.say("p", Failed("a", 0, "why"))
    effects = hand.take()
    assert ("p", Abort("a", 0)) in effects and ("d", Abort("a", 0)) in effects
    [emit] = [e for e in effects if isinstance(e, Emit)]
    assert (emit.finish, emit.error) == ("error", "why") and not hand.router.requests


class Broken(Policy):
    """Each hook answers what it was made with, or raises it."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def _answer(self, hook: str, otherwise: Any) -> Any:
        answer = self.answers.get(hook, otherwise)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def admit(self, request: RequestView, cluster: ClusterView) -> Any:
        return self._answer("admit", super().admit(request, cluster))

    def place(self, request: RequestView, cluster: ClusterView) -> Any:
        return self._answer("place", super().place(request, cluster))

    def rebalance(self, cluster: ClusterView) -> Any:
        return self._answer("rebalance", [])


@pytest.mark.parametrize(
    ("hook", "answer", "words"),
    [
        ("admit", True, "admit answered True, not Reject or None"),
        ("admit", SystemExit(3), "admit raised SystemExit: 3"),
        ("admit", Reject(float("nan"), "full"), "retry_after is seconds"),
        ("place", KeyError("x"), "place raised KeyError: 'x'"),
        ("place", "w", "place answered 'w', not Placement or Reject"),
        ("place", Placement("v", None), "place named the worker 'v'; there are w"),
        ("place", Placement("w", "v"), "place named the worker 'v'; there are w"),
        ("place", Placement("w", "w", "zip"), "place named the codec 'zip'; there are raw, int8"),
        ("place", Placement(None, None), "place named the worker None; there are w"),  # type: ignore[arg-type]
        ("place", Reject(-1.0, "full"), "retry_after is seconds"),
    ],
)
def test_nonsense_about_a_request_ends_that_request(hook: str, answer: object, words: str) -> None:
    hand = Hand({"w": Role.BOTH}, Broken(**{hook: answer}))
    hand.request("a")
    [emit] = hand.emits()
    assert emit.finish == "error" and emit.error.startswith("policy Broken: ") and words in emit.error
    assert not hand.router.requests and not hand.router.parked
    hand.router.policy = Checked(Policy())
    hand.request("b")
    assert hand.router.requests["b"].prefill == "w", "and the next one is placed"


@pytest.mark.parametrize("again", ["parked", "late", "resubmitted"])
def test_nonsense_that_comes_later_ends_the_request_too(again: str) -> None:
    policy = Broken(**{"place": Placement("w", None)} if again == "late" else {})
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH}, policy)
    hand.router.paused = again == "parked"
    hand.request("a")
    policy.answers["place"] = Placement("nowhere", "nowhere")
    if again == "parked":
        hand.router.paused = False
        hand.router.place_parked(hand.now)
    elif again == "late":
        hand.token("w", "a", 0)
    else:
        hand.say("w", Released("a", 0, "preempted"))
    end = hand.emits()[-1]
    assert (end.finish, end.error) == ("error", "policy Broken: place named the worker 'nowhere'; there are w, x")
    assert not hand.router.requests
    hand.router.check_integrity()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (OSError("disk"), "raised OSError: disk"),
        (None, "raised TypeError"),
        ([RoleChange("v", Role.BOTH)], "named the worker 'v'"),
        ([RoleChange("w", 2)], "not a RoleChange"),  # type: ignore[arg-type]
        (["w"], "not a RoleChange"),
        ([Migration("a", "w")], "whose request is none of cluster.requests()"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_about_all_is_the_end_of_the_router(answer: object, words: str) -> None:
    hand = Hand({"w": Role.BOTH}, Broken(rebalance=answer))
    with pytest.raises(PolicyError, match=r"^policy Broken: rebalance ") as error:
        hand.router.on_tick(hand.now)
    assert words in str(error.value)


def test_a_policys_dice_are_the_seeds() -> None:
    draws = [Router(RouterSpec(seed=seed), Policy()).view.rng.random() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_client_that_leaves_and_a_deadline_end_differently() -> None:
    hand = Hand({"w": Role.BOTH}, request_timeout=5.0)
    hand.request("left")
    hand.request("late")
    hand.router.on_abort("left", 1.0)
    hand.router.on_tick(5.1)
    assert [(emit.request_id, emit.finish, emit.error) for emit in hand.emits()] == [
        ("left", "abort", ""), ("late", "error", "the request's deadline has passed"),
    ]  # fmt: skip


def test_only_the_gap_with_the_handoff_is_marked() -> None:
    for workers, marks in (
        ({"w": Role.BOTH}, [False, False, False, False]),
        ({"p": Role.PREFILL, "d": Role.DECODE}, [False, True, False, False]),
    ):
        hand = Hand(workers)
        hand.request()
        first, last = min(workers, key=lambda name: name != "p"), max(workers, key=lambda name: name == "d")
        for index in range(4):
            hand.token(last if index else first, "a", index, finish="length" if index == 3 else "")
        assert [emit.handoff for emit in hand.emits()] == marks


def test_a_new_request_that_place_rejects_leaves_no_trace() -> None:
    class Nowhere(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
            return Reject(2.5, "nowhere")

    hand = Hand({"w": Role.BOTH}, Nowhere())
    hand.request("a", 7)
    assert [(emit.finish, emit.error, emit.retry_after) for emit in hand.emits()] == [("reject", "nowhere", 2.5)]
    assert not hand.router.requests and not hand.router.parked and hand.router.view.waiting == 0


def test_logprobs_come_with_the_tokens_they_belong_to() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.request("a", 3)
    values = [TokenLogprob(-float(position), []) for position in range(1, 5)]
    hand.say("w", Logprobs("a", 1, 1, values))  # of another incarnation
    hand.say("w", Logprobs("a", 0, 1, values[:3]))
    hand.token("w", "a", 0)
    hand.say("w", Logprobs("a", 0, 4, values[3:]))
    hand.token("w", "a", 1)
    hand.token("w", "a", 2)
    first, second, third = hand.emits()
    assert (first.prompt_logprobs, first.logprobs) == (tuple(values[:2]), (values[2],))
    assert (second.prompt_logprobs, second.logprobs) == ((), (values[3],))
    assert (third.prompt_logprobs, third.logprobs) == ((), ())


def test_the_view_has_what_workers_tell_of_their_costs_links_and_pages() -> None:
    hand = Hand({"w": Role.BOTH})
    status = hand.router.view.workers["w"]
    for prefill, decode in ((10, 0), (20, 0), (0, 3), (0, 6), (0, 6)):
        hand.say("w", StepOutput(1, [], 1.0 + 0.1 * prefill + 0.5 * decode, prefill, decode))
    links = [LinkStats("x", "unix", bytes=2000, seconds=4.0), LinkStats("y", "unix", bytes=2000, seconds=2.0)]
    hand.say("w", Stats(Role.BOTH, 5, 0, 0, 0, 0, 0, 40, 0, 20, 4, 0, links=links))
    assert status.pages_free == 60 and status.t_kv_token == 1.5e-3  # a token has a byte
    assert status.costs.predict(30) == pytest.approx(4.0) and status.costs.predict(0, 2) == pytest.approx(2.0)
    hand.request("a", length=10)
    view = hand.router.view
    assert view.t_prefill(20, status) == pytest.approx(4.0), "behind the ten that are queued"
    assert view.t_decode(status, more=1) == pytest.approx(2.0) and view.t_transfer(200, status) == pytest.approx(0.3)


@pytest.mark.parametrize("answer", [Reject(1.0, "later"), Placement("p", None)])
def test_a_policy_that_names_no_decode_worker_after_prefill_has_it_computed_again(answer: object) -> None:
    policy = Broken(place=Placement("p", None))
    hand = Hand({"p": Role.PREFILL, "d": Role.DECODE}, policy)
    hand.request("a")
    hand.take()
    policy.answers["place"] = answer
    hand.token("p", "a", 0)
    assert ("p", Abort("a", 0)) in hand.take()
    assert hand.router.requests["a"].incarnation == 1 and hand.router.requests["a"].computing
    hand.router.check_integrity()


def test_a_new_policy_reaches_every_worker_and_those_that_come_later() -> None:
    hand = Hand({"w": Role.BOTH, "x": Role.BOTH})
    hand.router.set_policy("mine:k=1", Policy(), hand.now)
    assert [effect for effect in hand.take() if isinstance(effect, tuple)] == [
        ("w", SetPolicy("mine:k=1")), ("x", SetPolicy("mine:k=1"))
    ]  # fmt: skip
    hand.say("y", Hello(Role.BOTH, 64, 4, 256, "f", "", 0, 1))
    assert ("y", SetPolicy("mine:k=1")) in hand.take()


def test_a_role_that_a_worker_has_already_is_no_flip() -> None:
    hand = Hand({"w": Role.BOTH})
    hand.router.set_role(RoleChange("w", Role.BOTH), hand.now)
    assert hand.router.view.workers["w"].takes(Role.PREFILL)
    hand.router.on_tick(hand.now)
    assert not hand.take()


def test_a_request_whose_prefill_has_not_begun_can_go_elsewhere() -> None:
    class Second(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement:
            return Placement("v", "v")

        def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
            assert (request.prefill, request.decode) == ("v", "v")
            return Placement("w", None) if request.request_id != "c" else Placement("v", "v")

    hand = Hand({"v": Role.BOTH, "w": Role.BOTH}, Second())
    for name in "abc":
        hand.request(name)
    hand.say("v", StepOutput(1, [], begun=["a"]))
    hand.take()
    hand.router.on_tick(hand.now)
    hand.router.check_integrity()
    moved = [(dest, type(body), body.incarnation) for dest, body in hand.take()]  # type: ignore[misc, attr-defined]
    assert moved == [("v", Abort, 0), ("w", Submit, 1)], "a has begun, c is where it should be"
    hand.token("w", "b", 0, incarnation=1)
    [emit] = [effect for effect in hand.take() if isinstance(effect, Emit)]
    assert emit.request_id == "b" and hand.router.requests["b"].failures == 0


def test_where_replace_leads_nowhere_that_request_fails() -> None:
    class Lost(Policy):
        def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
            return Placement("nowhere", None)

    hand = Hand({"w": Role.BOTH}, Lost())
    hand.request("a")
    hand.take()
    hand.router.on_tick(hand.now)
    [emit] = [effect for effect in hand.take() if isinstance(effect, Emit)]
    assert emit.error == "policy Lost: replace named the worker 'nowhere'; there are w"
    hand.router.check_integrity()

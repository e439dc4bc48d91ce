"""What policies may see: costs, hits, predictions, and nothing of the truth; and that they can only look."""

from __future__ import annotations

import inspect
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from stepwise import spec as engine_spec
from test_engine import Hand as Worker
from test_engine import submit
from test_router import Hand

import minidisagg
from minidisagg.core.blocks import page_hashes, prefix_root, short
from minidisagg.core.costs import StepCosts, StepLearner
from minidisagg.core.messages import RequestSpec, Role, SamplingParams, StepOutput, Stored, Submit
from minidisagg.core.policy import (
    HOOKS,
    AnyRequest,
    Batch,
    ClusterView,
    Hits,
    Policy,
    RequestView,
    Work,
    WorkerStatus,
    WorkerView,
)
from minidisagg.core.predictor import LengthPredictor
from minidisagg.sim.simulator import Simulator


def test_hits_are_what_workers_tell_of_their_prefix_caches() -> None:
    hand, asked = Hand({"w": Role.BOTH, "x": Role.BOTH}), list[object]()
    hashes = page_hashes(prefix_root("f", ""), [1] * 20, 4)
    for stored, removed in ((hashes[:4], []), ([], hashes[2:3])):
        hand.say("x", StepOutput(1, [], stored=list(map(short, stored)), removed=list(map(short, removed))))
    hand.router.policy.asks.admit = lambda request, cluster: asked.append(cluster.hits(request))  # type: ignore[union-attr]
    hand.request("a", length=21)
    assert asked == [{"w": Hits(0), "x": Hits(8)}]
    hand.router.on_worker_down("x", 1, hand.now)
    hand.request("b", length=21)
    assert asked[1:] == [{"w": Hits(0)}]


def test_hits_in_the_store_follow_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.core.cluster.MOST_STORED", 4)  # the oldest are forgotten
    hand, asked = Hand({"w": Role.BOTH, "x": Role.BOTH}), list[object]()
    hand.router.policy.asks.admit = lambda request, cluster: asked.append(cluster.hits(request))  # type: ignore[union-attr]
    hashes = page_hashes(prefix_root("f", ""), [1] * 20, 4)
    hand.say("x", StepOutput(1, [], stored=list(map(short, hashes[:1]))))
    for news in (
        Stored(hashes[:3], []), Stored([], hashes[1:2]), Stored(hashes[1:2], []), Stored([b"others", b"another"], []),
    ):  # fmt: skip
        hand.say("w", news)
        hand.request(f"r{len(asked)}", length=21)
    assert asked == [{"w": Hits(0, a), "x": Hits(4, b)} for a, b in ((12, 8), (4, 0), (12, 8), (0, 8))]


def test_a_predictor_says_how_long_outputs_will_be() -> None:
    spec = RequestSpec(prompt=[1] * 9, sampling=SamplingParams(max_tokens=64), ends_after=50)
    assert LengthPredictor("none").predict(spec) is None and LengthPredictor("oracle").predict(spec) == 50
    histogram = LengthPredictor("histogram")
    for output in (10, 20, 30, 40):
        histogram.learn(spec, output)
    assert histogram.predict(spec) is None
    for _ in range(20):
        histogram.learn(replace(spec, prompt=[1] * 40), 90)
    assert histogram.predict(spec) == 64, "of all, and no more than asked for"
    histogram.learn(spec, 25)
    assert histogram.predict(spec) == 25, "of prompts alike"


def test_the_view_of_a_request_has_the_predictors_word_and_not_the_truth() -> None:
    seen = list[RequestView]()
    hand = Hand({"w": Role.BOTH}, predictor="oracle")

    def admit(request: RequestView, cluster: ClusterView) -> None:
        seen.append(request)
        request.hints["x"] = 1

    hand.router.policy.asks.admit = admit  # type: ignore[union-attr, assignment]
    spec = RequestSpec(prompt=[1] * 9, sampling=SamplingParams(max_tokens=64), ends_after=50, slo_ttft=0.5, session="s")
    hand.router.on_request("a", spec, hand.now)
    view = seen[0]
    assert (view.max_tokens, view.predicted_len, view.slo_ttft, view.slo_tpot) == (64, 50, 0.5, None)
    assert (view.session, view.prompt_len, view.num_output) == ("s", 9, 0)
    view.hints["x"] = 2  # too late: the request is on its way
    sent = [effect[1] for effect in hand.take() if isinstance(effect, tuple)]
    assert [message.spec.hints for message in sent if isinstance(message, Submit)] == [{"x": 1}] and spec.hints == {}
    for name in ("priority", "max_tokens", "anything"):
        with pytest.raises(AttributeError):
            setattr(view, name, 3)
    status = hand.router.view.workers["w"]
    with pytest.raises(AttributeError):
        status.queued_tokens = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        del hand.router.view.workers["w"]  # type: ignore[attr-defined]


def test_a_cost_model_is_found_in_noisy_steps_of_every_kind() -> None:
    rng, learner = random.Random(0), StepLearner()
    truth = 0.006, 30e-6, 150e-6, 60e-9

    def seconds(prefill: int, decode: int, context: int) -> float:
        return truth[0] + truth[1] * prefill + truth[2] * decode + truth[3] * context

    assert learner.costs.predict(100, 3, 4000) == 0.0
    for _ in range(300):
        decode = rng.randrange(64)
        prefill = rng.choice([0, 0, 256, 512, 2000]) or (not decode)
        context = sum(rng.randrange(100, 4000) for _ in range(decode))
        learner.learn(
            StepOutput(1, [], seconds(prefill, decode, context) * rng.gauss(1, 0.01), prefill, decode, context)
        )
    for case in ((2000, 0, 0), (0, 1, 2000), (0, 64, 128_000), (512, 32, 64_000)):
        assert learner.costs.predict(*case) == pytest.approx(seconds(*case), rel=0.1), case
    assert min(getattr(learner.costs, name) for name in learner.costs.__struct_fields__) >= 0.0


def test_equal_steps_teach_once_and_one_kind_alone_is_still_predicted() -> None:
    learner = StepLearner()
    for seconds in (0.5, 9.0):
        learner.learn(StepOutput(1, [], seconds, 100, 0, 100))
    assert learner.costs.predict(100, 0, 100) == pytest.approx(0.5)
    learner.learn(StepOutput(1, [], 0.0, 7, 0))
    learner.learn(StepOutput(1, [], 0.3))
    assert learner.costs.predict(100, 0, 100) == pytest.approx(0.5)


def test_what_a_worker_has_never_done_costs_what_it_does_elsewhere() -> None:
    workers = {
        name: WorkerStatus(name, 1, Role.BOTH, 9, 4, costs=costs)
        for name, costs in (
            ("p", StepCosts(1.0, 2.0)),
            ("q", StepCosts(1.0, 4.0)),
            ("d", StepCosts(5.0, 0.0, 6.0, 7.0)),
        )
    }
    view = ClusterView(0.0, workers)
    assert view.costs_of(workers["p"]) == StepCosts(1.0, 2.0, 6.0, 7.0)
    assert view.costs_of(workers["d"]) == StepCosts(5.0, 3.0, 6.0, 7.0)
    assert view.t_prefill(1000, workers["d"]) == pytest.approx(8.07) and view.t_decode(workers["p"], 10) > 6.0
    alone = WorkerStatus("x", 1, Role.BOTH, 9, 4)
    assert ClusterView(0.0, {"x": alone}).t_prefill(9, alone) == 0.0


def test_a_worker_forgets_what_its_steps_took_long_ago() -> None:
    learner = StepLearner()
    for scale in (1.0, 3.0):
        for turn in range(140):
            learner.learn(StepOutput(1, [], scale * (1 + turn % 7), 100 + 100 * (turn % 7), 0))
    assert learner.costs.predict(300) == pytest.approx(9.0)


def public(view: object) -> Iterator[tuple[str, Any]]:
    for name in dir(view):
        if not name.startswith("_"):
            yield name, getattr(view, name)


def test_no_public_name_of_a_view_leads_to_the_true_length() -> None:
    hand = Worker(engine_spec("w"))
    message = submit("a", 4)
    hand.receive(Submit("a", 0, replace(message.spec, sampling=SamplingParams(max_tokens=40), ends_after=3)))
    view = hand.core.scheduler.view.waiting[0]
    assert view.max_tokens == 40 and view.predicted_len is None
    assert all(isinstance(value, str | int | float | dict | None) for _, value in public(view)), dict(public(view))
    assert 3 not in dict(public(view)).values()
    for name, _ in public(view):
        with pytest.raises(AttributeError):
            setattr(view, name, 1)


TRUTH, PROMPT = 37, 100  # tokens: while hooks are looked into, nothing else is as many
SECRETS = "spec", "ends_after", "last_index", "longest", "prompt", "output", "emitted", "token_ids"
LEAVES = str | bytes | int | float | None | random.Random


def reached(of: Any, where: str, seen: set[int]) -> Iterator[tuple[str, object, str, Any]]:
    """Everything that public names lead to: where it is, whose it is, its name there, and what it is."""
    if isinstance(of, LEAVES) or id(of) in seen:
        return
    seen.add(id(of))
    inside = dict(enumerate(of)) if isinstance(of, list | tuple) else of if isinstance(of, Mapping) else None
    for name, value in public(of) if inside is None or hasattr(of, "_fields") else inside.items():
        value = value() if name == "requests" else value
        if not callable(value):
            yield where, of, str(name), value
            yield from reached(value, f"{where}.{name}", seen)


class Nosy(Policy):
    """The defaults; looks into whatever each hook is given, a few times."""

    looks: Counter[str]
    found: list[str]

    def replace(self, request: RequestView, cluster: ClusterView) -> None:
        """Policies without one are not asked."""

    def __getattribute__(self, hook: str) -> Any:
        value = super().__getattribute__(hook)
        return partial(self._look, hook, value) if hook in HOOKS else value

    def _look(self, hook: str, answer: Callable[..., Any], *given: Any) -> Any:
        result = answer(*given)  # a batch is full then
        Nosy.looks[hook] += 1
        for where, of, name, value in reached(given, hook, set()) if Nosy.looks[hook] < 9 else ():
            if name in SECRETS or (type(value) is int and value == TRUTH):
                Nosy.found.append(f"{where}.{name} tells {value!r}")
            if isinstance(value, int | float) and not isinstance(of, dict | list | tuple):
                try:
                    setattr(of, name, value)
                except AttributeError:
                    continue
                Nosy.found.append(f"{where}.{name} can be set")
        return result


def test_no_hook_is_given_a_way_to_the_truth_or_to_its_budget() -> None:
    Nosy.looks, Nosy.found = Counter(), []
    specs = [engine_spec(name, role, num_pages=65) for name, role in (("p", Role.PREFILL), ("d", Role.DECODE))]
    sim = Simulator(specs, Nosy)
    for n in range(4):
        sampling = SamplingParams(max_tokens=50, temperature=0.0)
        request = RequestSpec(prompt=[1000 + n] * PROMPT, sampling=sampling, ends_after=TRUTH)
        sim.plan(0.24, partial(sim.send, f"r{n}", request))
    sim.run(until=60.0)
    assert {len(outcome.tokens) for outcome in sim.outcomes.values()} == {TRUTH}
    assert set(Nosy.looks) == set(HOOKS) and not Nosy.found, sorted(set(Nosy.found))


def test_a_request_ends_at_its_true_length_or_at_its_limit() -> None:
    for limit, truth, output in ((40, 3, 3), (2, 3, 2), (5, 0, 5)):
        hand = Worker(engine_spec("w"))
        sampling = SamplingParams(max_tokens=limit)
        hand.receive(Submit("a", 0, replace(submit("a", 4).spec, sampling=sampling, ends_after=truth)))
        steps = 0
        while hand.core.requests:
            hand.step()
            steps += 1
        assert steps == output


def test_the_cache_tells_what_it_gains_and_loses_each_once() -> None:
    hand = Worker(engine_spec("w", num_pages=4, page_size=4))
    told: set[bytes] = set()
    for name, token in (("a", 1), ("b", 2), ("c", 1)):
        spec = RequestSpec(prompt=[token] * 9, sampling=SamplingParams(max_tokens=2))
        hand.receive(Submit(name, 0, spec))
        while hand.core.requests:
            hand.step()
        for body in hand.sent(StepOutput):
            assert isinstance(body, StepOutput)
            assert not told & set(body.stored) and told >= set(body.removed)
            told = (told | set(body.stored)) - set(body.removed)
        hand.core.outbox.clear()
        assert told == {short(digest) for digest in hand.core.pool._by_hash}


def test_the_table_of_views_is_complete() -> None:
    rows = (Path(__file__).parents[1] / "docs" / "policies.md").read_text().partition("| view | attributes |")[2]
    named = [set(re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", row)))) for row in rows.splitlines()]
    for view in (AnyRequest, RequestView, Work, ClusterView, WorkerStatus, WorkerView, Batch):
        shown = {name for name in (*dir(view), *view.__annotations__) if name[0] != "_" and name != "changed"}
        assert any(shown <= row | named[2] for row in named), (view, min((shown - row for row in named), key=len))


def test_all_types_of_the_hooks_are_exported() -> None:
    named = {
        word
        for hook in vars(Policy).values()
        if inspect.isfunction(hook)
        for annotation in hook.__annotations__.values()
        for word in annotation.replace("[", " ").replace("]", " ").replace("|", " ").replace(",", " ").split()
    }
    for name in named - {"None", "Any", "bool", "list", "Sequence"}:
        assert name in minidisagg.__all__, name

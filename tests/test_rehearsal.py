"""Every hook of a policy is called dry before anybody depends on it."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest

from minidisagg.core.checked import Checked, PolicyError
from minidisagg.core.messages import Role
from minidisagg.core.policy import Placement, Policy, Reject, RoleChange, WorkerOptions
from minidisagg.core.rehearsal import MOST, Workers, rehearse
from minidisagg.policies import load_policy, names

HOOKS = ("admit", "place", "rebalance", "accept", "order", "compose", "evict")


def workers(roles: str, **options: int) -> Workers:
    """`pdb`: a prefill worker, a decode worker, and one that does both."""
    kinds = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}
    return {f"{kind}{n}": (kinds[kind], WorkerOptions(**options)) for n, kind in enumerate(roles)}


class Spy(Policy):
    """The defaults; counts what it is asked, and answers as it is told where it is told so."""

    def __init__(self, asked: Counter[str], **answers: Any) -> None:
        for hook in HOOKS:
            setattr(self, hook, partial(self._ask, hook, getattr(self, hook), asked, answers.get(hook)))

    def _ask(self, hook: str, default: Any, asked: Counter[str], answer: Any, *given: Any) -> Any:
        asked[hook] += 1
        return default(*given) if answer is None else answer(*given)


@pytest.mark.parametrize("roles", ["b", "bb", "pd", "ppdd", "pdb"])
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 1}, {"chunk": 2, "max_num_batched_tokens": 3}], ids=str)
def test_what_ships_passes_on_any_cluster(roles: str, options: dict[str, int]) -> None:
    for name in names():
        rehearse(partial(load_policy, name), workers(roles, **options))


def test_every_hook_is_asked_where_there_is_something_to_ask() -> None:
    asked: Counter[str] = Counter()
    rehearse(partial(Spy, asked), workers("pd"))
    assert set(asked) == set(HOOKS)
    asked.clear()
    rehearse(partial(Spy, asked), workers("b"))
    assert set(asked) == set(HOOKS) - {"accept"}, "nothing is handed over"


def fail(*_: object) -> Any:
    raise OSError("disk\nfull")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_is_named_in_one_line(hook: str) -> None:
    with pytest.raises(PolicyError) as error:
        rehearse(partial(Spy, Counter(), **{hook: fail}), workers("pd"))
    assert str(error.value) == f"policy Spy: {hook} raised OSError: disk"


@pytest.mark.parametrize(
    ("hook", "answer", "words"),
    [
        ("admit", lambda *_: True, "admit answered True, not Reject or None"),
        ("place", lambda *_: Placement("nowhere", None), "place named the worker 'nowhere'; there are p0, d1"),
        ("place", lambda *_: "d1", "place answered 'd1', not Placement or Reject"),
        ("rebalance", lambda *_: [RoleChange("nowhere", Role.BOTH)], "rebalance named the worker 'nowhere'"),
        ("accept", lambda *_: 1, "accept answered 1, not True or False"),
        ("accept", lambda *_: False, "accept refuses it though worker d1 is empty"),
        ("order", lambda *_: {}, "order raised TypeError"),
        ("order", lambda r, *_: (r.arrival if r.priority else None, 0), "order raised TypeError"),
        ("order", lambda *_: math.nan, "order answered nan, but nothing stands before or behind a NaN"),
        ("order", lambda *_: (0, [(1, math.nan)]), "order answered (0, [(1, nan)]), but nothing"),
        ("compose", lambda *_: None, "plans nothing"),
        ("compose", lambda batch, _: batch.add(None), "compose raised AttributeError"),
        ("evict", lambda worker, candidates: candidates[0], "not a Victim among the candidates"),
    ],
)  # fmt: skip
def test_nonsense_is_named_in_one_line(hook: str, answer: Any, words: str) -> None:
    with pytest.raises(PolicyError) as error:
        rehearse(partial(Spy, Counter(), **{hook: answer}), workers("pd"))
    assert words in str(error.value) and "Spy" in str(error.value) and "\n" not in str(error.value)


def test_what_a_policy_may_do_is_no_nonsense() -> None:
    """Turn everybody away, keep everybody waiting, leave decode open for ever."""
    for answers in (
        {"admit": lambda *_: Reject(1.0, "closed")},
        {"place": lambda *_: Reject(1.0, "later")},
        {"place": lambda *_: Placement("p0", None)},
    ):
        rehearse(partial(Spy, Counter(), **answers), workers("pd"))


def test_a_policy_that_breaks_what_it_is_shown_is_told_so() -> None:
    def tamper(cluster: Any) -> list[RoleChange]:
        cluster.workers.clear()
        return []

    with pytest.raises(PolicyError, match="policy Spy: rebalance raised AttributeError"):
        rehearse(partial(Spy, Counter(), rebalance=tamper), workers("pd"))


def test_a_large_cluster_is_rehearsed_with_some_of_it() -> None:
    seen: set[str] = set()

    def watch(cluster: Any) -> list[RoleChange]:
        seen.update(cluster.workers)
        return []

    rehearse(partial(Spy, Counter(), rebalance=watch), workers("p" * 500 + "d" * 500))
    assert len(seen) == 2 * MOST


def test_the_name_is_that_of_the_policy_and_not_of_who_asks_it() -> None:
    assert Checked(Checked(Spy(Counter()))).name == "Spy"

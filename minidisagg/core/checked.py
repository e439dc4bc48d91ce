"""Between the mechanism and a policy: every answer of a hook is checked, every exception gets the policy's name.

What a broken hook costs depends on what it was asked. `admit`, `place`, `order` and `accept` are about one request, and
that request fails. `rebalance`, `compose` and `evict` are about all of them: whoever asked cannot go on.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from minidisagg.core.blocks import IntegrityError
from minidisagg.core.messages import Role
from minidisagg.core.plan import CODECS
from minidisagg.core.policy import (
    Batch,
    Change,
    ClusterView,
    Migration,
    Placement,
    Policy,
    Reject,
    Replica,
    RequestView,
    RoleChange,
    Stage,
    Victim,
    Work,
    WorkerView,
)

A = TypeVar("A")
MOVES = Migration, Replica


class OutOfTime(BaseException):
    """Who runs all this has no more time for it: not for the policy to catch, nor the failure of one request."""


class PolicyError(RuntimeError):
    """A policy raised, or answered what cannot be; one line that names policy, hook, and the place in a user's file."""


class Checked(Policy):
    """Asks another policy. What a hook of it does wrong is a `PolicyError`, whatever it was."""

    asks: Policy

    def __init__(self, policy: Policy) -> None:
        self.asks = policy
        self.name = policy_name(policy)
        self._first_key: dict[Stage, Any] = {}

    @property
    def dynamic_order(self) -> bool:  # type: ignore[override]
        """Of the policy itself, which may change its mind."""
        return bool(self.asks.dynamic_order)

    @property
    def equal_steps(self) -> bool:  # type: ignore[override]
        """A batch that is fed all that runs, in an order that stays, is fed the same again."""
        return bool(self.asks.equal_steps) and not self.dynamic_order

    def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
        answer = self._ask("admit", lambda: self.asks.admit(request, cluster))
        return None if answer is None else self._rejection("admit", answer, "Reject or None")

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        answer = self._ask("place", lambda: self.asks.place(request, cluster))
        if not isinstance(answer, Placement):
            return self._rejection("place", answer, "Placement or Reject")
        return self._placement("place", answer, cluster)

    def replace(self, request: RequestView, cluster: ClusterView) -> Placement | None:
        answer = self._ask("replace", lambda: self.asks.replace(request, cluster))
        return None if answer is None else self._placement("replace", answer, cluster)

    def rebalance(self, cluster: ClusterView) -> list[Change]:
        changes: list[Change] = self._ask("rebalance", lambda: list(self.asks.rebalance(cluster)))
        known, kept = [*cluster.workers, *cluster.down], list[Change]()
        for change in changes:
            right = isinstance(change.role, Role) if isinstance(change, RoleChange) else isinstance(change, MOVES)
            if not right:
                self._fail("rebalance", f"answered {change!r}, not a RoleChange, Migration or Replica")
            if isinstance(change, MOVES) and not isinstance(change.request, RequestView):
                self._fail("rebalance", f"answered {change!r}, whose request is none of cluster.requests()")
            names = change.worker, getattr(change, "source", change.worker)
            for name in names:
                self._known("rebalance", name, known)
            if isinstance(change, RoleChange) or cluster.down.isdisjoint(names):
                kept.append(change)
        return kept

    def accept(self, offer: Work, worker: WorkerView) -> bool:
        answer = self._ask("accept", lambda: self.asks.accept(offer, worker))
        if not isinstance(answer, bool):
            self._fail("accept", f"answered {answer!r}, not True or False")
        return answer

    def order(self, request: Work, stage: Stage, worker: WorkerView) -> Any:
        def ask() -> Any:
            key = self.asks.order(request, stage, worker)
            bool(key < key)  # raises if it has no order
            if _has_nan(key):
                self._fail("order", f"answered {key!r}, but nothing stands before or behind a NaN")
            # And if it has none with the first of all keys: the odd one is found when it comes, not the one after it.
            bool(key < self._first_key.setdefault(stage, key))
            return key

        return self._ask("order", ask)

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        self._ask("compose", lambda: self.asks.compose(batch, worker))

    def evict(self, worker: WorkerView, candidates: Sequence[Work]) -> Victim | None:
        answer = self._ask("evict", lambda: self.asks.evict(worker, candidates))
        if answer is not None and not (isinstance(answer, Victim) and answer.request in candidates):
            self._fail("evict", f"answered {answer!r}, not a Victim among the candidates")
        return answer

    def incomparable(self, error: TypeError) -> PolicyError:
        """Two keys of `order`, each of them in order, that cannot be sorted together."""
        return self._error("order", f"answers keys that cannot be compared: {error}", error)

    def _ask(self, hook: str, ask: Callable[[], A]) -> A:
        try:
            return ask()
        except (PolicyError, IntegrityError):
            raise  # `compose` causes `evict` to be asked, and whatever the mechanism has to say
        except OutOfTime as error:
            where = f"{error}, in {hook} of policy {self.name}{self.where(hook, error)}"
            raise OutOfTime(where) from error
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise self._error(hook, f"raised {what}", error) from error

    def _rejection(self, hook: str, answer: object, wanted: str) -> Reject:
        if not isinstance(answer, Reject):
            self._fail(hook, f"answered {answer!r}, not {wanted}")
        wait: Any = answer.retry_after
        if not isinstance(wait, int | float) or not 0 <= wait < math.inf or not isinstance(answer.reason, str):
            self._fail(hook, f"answered {answer!r}: retry_after is seconds, reason a text")
        return answer

    def _placement(self, hook: str, answer: Placement, cluster: ClusterView) -> Placement:
        if not isinstance(answer, Placement):
            self._fail(hook, f"answered {answer!r}, not a Placement or None")
        self._known(hook, answer.prefill, cluster.workers)
        if answer.decode is not None:
            self._known(hook, answer.decode, cluster.workers)
        if answer.codec is not None and answer.codec not in CODECS:
            self._fail(hook, f"named the codec {answer.codec!r}; there are {', '.join(CODECS)}")
        if answer.fetch_from is not None:
            self._known(hook, answer.fetch_from, [*cluster.workers, *cluster.down])
            if answer.fetch_from in cluster.down:  # it is computed instead
                answer = replace(answer, fetch_from=None)
        split: Any = answer.split_at
        if split is not None and (not isinstance(split, int) or split < 1 or answer.decode is None):
            self._fail(hook, f"answered {answer!r}: split_at is a number of tokens before a worker that is named")
        return answer

    def _known(self, hook: str, worker: object, workers: Collection[str]) -> None:
        if not isinstance(worker, str) or worker not in workers:
            self._fail(hook, f"named the worker {worker!r}; there are {', '.join(workers)}")

    def _fail(self, hook: str, what: str) -> NoReturn:
        raise self._error(hook, what)

    def _error(self, hook: str, what: str, cause: BaseException | None = None) -> PolicyError:
        return PolicyError(f"policy {self.name}: {hook} {what}{self.where(hook, cause)}")

    def where(self, hook: str, cause: BaseException | None) -> str:
        """In the user's file, if it has one: what raised, or where the hook begins."""
        policy = innermost(self)
        code = getattr(getattr(policy, hook), "__code__", None)
        line = line_of(cause, policy.file)
        if not line and code is not None and code.co_filename == policy.file:
            line = code.co_firstlineno
        return place_of(policy.file, line)


def _has_nan(key: Any) -> bool:
    """Sorting would neither fail nor sort."""
    return any(map(_has_nan, key)) if isinstance(key, tuple | list) else bool(key != key)


def place_of(file: str, line: int) -> str:
    """Behind what went wrong there."""
    return f" ({file}, line {line})" if line else ""


def line_of(error: BaseException | None, file: str) -> int:
    """The innermost line of this file in which the error was raised; 0: none."""
    frames = traceback.walk_tb(error.__traceback__) if error is not None and file else ()
    return [0, *(line for frame, line in frames if frame.f_code.co_filename == file)][-1]


def innermost(policy: Policy) -> Policy:
    """The one that decides, behind those that only ask it."""
    while policy.asks is not None:
        policy = policy.asks
    return policy


def policy_name(policy: Policy) -> str:
    """The class that a user knows."""
    return type(innermost(policy)).__name__

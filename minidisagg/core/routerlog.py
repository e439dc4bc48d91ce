"""The ordered input log of the router, and its replay: as `core/inputlog.py` for a worker.

Behind each input stands a checksum of what the router then sent to its workers, so that a replay can tell whether it
did the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import msgspec
from msgspec import Struct

from minidisagg.core.effects import Send
from minidisagg.core.inputlog import LogWriter, check_head, read_log
from minidisagg.core.messages import Envelope, RequestSpec, Role
from minidisagg.core.plan import SeqKey
from minidisagg.core.policy import Policy, RoleChange
from minidisagg.core.router import Router, RouterEffect, RouterSpec, Suspects

HEAD = b"minidisagg router inputs "


class Requested(Struct, frozen=True, tag=True, array_like=True):
    """A client's request."""

    request_id: str
    spec: RequestSpec


class Left(Struct, frozen=True, tag=True, array_like=True):
    """Its client has left."""

    request_id: str
    reason: str


class Heard(Struct, frozen=True, tag=True, array_like=True):
    """A worker's message."""

    envelope: Envelope


class Died(Struct, frozen=True, tag=True, array_like=True):
    """A worker's process has."""

    worker: str
    epoch: int
    suspects: list[SeqKey] | None


class Ticked(Struct, frozen=True, tag=True, array_like=True):
    """Some time has passed."""


class RoleSet(Struct, frozen=True, tag=True, array_like=True):
    """By an operator, as the rest."""

    worker: str
    role: Role


class PolicySet(Struct, frozen=True, tag=True, array_like=True):
    spec: str


class PauseSet(Struct, frozen=True, tag=True, array_like=True):
    paused: bool


class Drained(Struct, frozen=True, tag=True, array_like=True):
    worker: str


class Moved(Struct, frozen=True, tag=True, array_like=True):
    request_id: str
    worker: str


RouterInput = Requested | Left | Heard | Died | Ticked | RoleSet | PolicySet | PauseSet | Drained | Moved


class RouterEntry(Struct, frozen=True, array_like=True):
    """One input, before the router has acted on it."""

    now: float
    what: RouterInput


class RouterHead(Struct, frozen=True, array_like=True):
    """What the router was built from."""

    spec: RouterSpec
    policy: str


class RecordingRouter(Router):
    """A `Router` that writes to `log` what it was built from, and each of its inputs."""

    def __init__(self, spec: RouterSpec, policy: Policy, name: str, log: BinaryIO) -> None:
        """`name`: of the policy."""
        super().__init__(spec, policy)
        self._log = LogWriter(log, HEAD)
        self._log.write(RouterHead(spec, name))
        self._inside = False  # what it calls itself then is no input

    @contextmanager
    def _input(self, now: float, what: RouterInput) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, before = True, len(self.outbox)
        self._log.write(RouterEntry(now, what))
        try:
            yield
        finally:
            self._inside = False
        self._log.write(checksum(self.outbox[before:]))

    def on_request(self, request_id: str, spec: RequestSpec, now: float) -> None:
        with self._input(now, Requested(request_id, spec)):
            super().on_request(request_id, spec, now)

    def on_abort(self, request_id: str, now: float, reason: str = "") -> None:
        with self._input(now, Left(request_id, reason)):
            super().on_abort(request_id, now, reason)

    def on_message(self, envelope: Envelope, now: float) -> None:
        with self._input(now, Heard(envelope)):
            super().on_message(envelope, now)

    def on_worker_down(self, name: str, epoch: int, now: float, suspects: Suspects = None) -> None:
        with self._input(now, Died(name, epoch, None if suspects is None else sorted(suspects))):
            super().on_worker_down(name, epoch, now, suspects)

    def on_tick(self, now: float) -> None:
        with self._input(now, Ticked()):
            super().on_tick(now)

    def set_role(self, change: RoleChange, now: float) -> None:
        with self._input(now, RoleSet(change.worker, change.role)):
            super().set_role(change, now)

    def set_policy(self, spec: str, policy: Policy, now: float) -> None:
        with self._input(now, PolicySet(spec)):
            super().set_policy(spec, policy, now)

    def pause(self, paused: bool, now: float) -> None:
        with self._input(now, PauseSet(paused)):
            super().pause(paused, now)

    def drain(self, name: str, now: float) -> None:
        with self._input(now, Drained(name)):
            super().drain(name, now)

    def migrate(self, request_id: str, worker: str, now: float) -> bool:
        with self._input(now, Moved(request_id, worker)):
            return super().migrate(request_id, worker, now)


def checksum(effects: list[RouterEffect]) -> int:
    """Of what goes to workers; 0 where nothing does."""
    total = 0
    for effect in effects:
        if isinstance(effect, Send):
            total = zlib.crc32(msgspec.msgpack.encode(effect, enc_hook=list), total)
    return total


def read_router(log: BinaryIO) -> tuple[RouterHead, Iterator[tuple[RouterEntry, int | None]]]:
    """What the router was built from, and each input with the checksum behind it; None where the log ends there.

    Raises `VersionError` where another version has written it, or it is no router's log.
    """
    check_head(log, HEAD)
    records, decoder = read_log(log), msgspec.msgpack.Decoder(RouterEntry)
    head = msgspec.msgpack.decode(next(records), type=RouterHead)

    def entries() -> Iterator[tuple[RouterEntry, int | None]]:
        for record in records:
            answer = next(records, None)
            yield decoder.decode(record), None if answer is None else msgspec.msgpack.decode(answer, type=int)

    return head, entries()


def feed(router: Router, entry: RouterEntry, load_policy: Callable[[str], Policy]) -> list[RouterEffect]:
    """Let it happen to `router`; returns what the router wants done."""
    what, now = entry.what, entry.now
    if isinstance(what, Requested):
        router.on_request(what.request_id, what.spec, now)
    elif isinstance(what, Left):
        router.on_abort(what.request_id, now, what.reason)
    elif isinstance(what, Heard):
        router.on_message(what.envelope, now)
    elif isinstance(what, Died):
        router.on_worker_down(what.worker, what.epoch, now, what.suspects)
    elif isinstance(what, RoleSet):
        router.set_role(RoleChange(what.worker, what.role), now)
    elif isinstance(what, PolicySet):
        router.set_policy(what.spec, load_policy(what.spec), now)
    elif isinstance(what, PauseSet):
        router.pause(what.paused, now)
    elif isinstance(what, Drained):
        router.drain(what.worker, now)
    elif isinstance(what, Moved):
        router.migrate(what.request_id, what.worker, now)
    else:
        router.on_tick(now)
    effects = router.outbox[:]
    router.outbox.clear()
    return effects

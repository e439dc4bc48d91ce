"""The ordered input log of one engine, and its replay.

Everything that an `EngineCore` decides follows from its spec, its policy and this log: messages, step results,
transfers, ticks, each with its time. A real run records it; `replay` gives the same plans bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import msgspec
from msgspec import Struct

from minidisagg.core.engine import EngineCore, EngineSpec
from minidisagg.core.messages import Envelope
from minidisagg.core.plan import Completion, StepPlan
from minidisagg.core.policy import Policy


class Received(Struct, frozen=True, tag=True, array_like=True):
    """`on_message`"""

    now: float
    envelope: Envelope


class Scheduled(Struct, frozen=True, tag=True, array_like=True):
    """`schedule`, with the plan that came of it."""

    now: float
    plan: StepPlan | None


class StepDone(Struct, frozen=True, tag=True, array_like=True):
    """`on_step_done`"""

    now: float
    step_id: int
    tokens: list[int]
    seconds: float


class TransferDone(Struct, frozen=True, tag=True, array_like=True):
    """`on_transfer_done`"""

    now: float
    completion: Completion


class LinkGone(Struct, frozen=True, tag=True, array_like=True):
    """`on_link_aborted`"""

    now: float
    peer: str
    link_epoch: int
    outgoing: bool


class Ticked(Struct, frozen=True, tag=True, array_like=True):
    """`on_tick`"""

    now: float


class PolicySet(Struct, frozen=True, tag=True, array_like=True):
    """`set_policy`"""

    now: float
    spec: str


Entry = Received | Scheduled | StepDone | TransferDone | LinkGone | Ticked | PolicySet
_LENGTH = struct.Struct("<I")


class RecordingCore(EngineCore):
    """An `EngineCore` that writes each input to `log`, in order, before it acts on it."""

    def __init__(self, spec: EngineSpec, policy: Policy, log: BinaryIO) -> None:
        super().__init__(spec, policy)
        self._log = log
        self._write(spec)

    def on_message(self, envelope: Envelope, now: float) -> None:
        self._write(Received(now, envelope))
        super().on_message(envelope, now)

    def set_policy(self, spec: str, policy: Policy, now: float) -> None:
        self._write(PolicySet(now, spec))
        super().set_policy(spec, policy, now)

    def schedule(self, now: float) -> StepPlan | None:
        plan = super().schedule(now)
        self._write(Scheduled(now, plan))
        return plan

    def on_step_done(self, step_id: int, tokens: list[int], seconds: float, now: float) -> None:
        self._write(StepDone(now, step_id, tokens, seconds))
        super().on_step_done(step_id, tokens, seconds, now)

    def on_transfer_done(self, completion: Completion, now: float) -> None:
        self._write(TransferDone(now, completion))
        super().on_transfer_done(completion, now)

    def on_link_aborted(self, peer: str, link_epoch: int, outgoing: bool, now: float) -> None:
        self._write(LinkGone(now, peer, link_epoch, outgoing))
        super().on_link_aborted(peer, link_epoch, outgoing, now)

    def on_tick(self, now: float) -> None:
        self._write(Ticked(now))
        super().on_tick(now)

    def _write(self, entry: Entry | EngineSpec) -> None:
        data = msgspec.msgpack.encode(entry)
        self._log.write(_LENGTH.pack(len(data)) + data)


def read_log(log: BinaryIO) -> Iterator[bytes]:
    """The log's records; an incomplete last one, of a process that was killed, is left out."""
    while len(header := log.read(_LENGTH.size)) == _LENGTH.size:
        data = log.read(*_LENGTH.unpack(header))
        if len(data) < _LENGTH.unpack(header)[0]:
            return
        yield data


def replay(
    log: BinaryIO, policy: Policy, load_policy: Callable[[str], Policy] | None = None
) -> Iterator[tuple[StepPlan | None, StepPlan | None]]:
    """(recorded plan, replayed plan) of every `schedule`; `load_policy` makes what was set on the way."""
    records = read_log(log)
    core = EngineCore(msgspec.msgpack.decode(next(records), type=EngineSpec), policy)
    decoder = msgspec.msgpack.Decoder(Entry)
    for record in records:
        entry = decoder.decode(record)
        if isinstance(entry, Received):
            core.on_message(entry.envelope, entry.now)
        elif isinstance(entry, Scheduled):
            plan = core.schedule(entry.now)
            # Through the encoder as the recorded plan was: block tables are live lists until then.
            yield entry.plan, msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan | None)
        elif isinstance(entry, StepDone):
            core.on_step_done(entry.step_id, entry.tokens, entry.seconds, entry.now)
        elif isinstance(entry, TransferDone):
            core.on_transfer_done(entry.completion, entry.now)
        elif isinstance(entry, LinkGone):
            core.on_link_aborted(entry.peer, entry.link_epoch, entry.outgoing, entry.now)
        elif isinstance(entry, PolicySet):
            if load_policy is None:
                raise ValueError(f"the policy was set to {entry.spec!r} on the way: give load_policy")
            core.set_policy(entry.spec, load_policy(entry.spec), entry.now)
        else:
            core.on_tick(entry.now)

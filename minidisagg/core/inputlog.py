"""The ordered input log of one engine, and its replay (`core/routerlog.py` is the router's).

Everything that an `EngineCore` decides follows from its spec, its policy and its inputs, each with its time. A run
records them, on the engine or in the simulator; `replay` gives the same plans bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import msgspec
from msgspec import Struct

from minidisagg.core.engine import EngineCore
from minidisagg.core.inputs import Input, Schedule
from minidisagg.core.plan import StepPlan
from minidisagg.core.policy import Policy
from minidisagg.core.spec import EngineSpec
from minidisagg.formats import check_version

INPUTLOG_VERSION = 8
HEAD = b"minidisagg inputs "  # and the version, and a line's end


class Entry(Struct, frozen=True, array_like=True):
    """One input, before the core has acted on it."""

    now: float
    what: Input


_LENGTH = struct.Struct("<I")
_plans = msgspec.msgpack.Decoder(StepPlan | None)


class LogWriter:
    """Of a head with the version, and records."""

    def __init__(self, log: BinaryIO, head: bytes) -> None:
        self._log = log
        log.write(head + b"%d\n" % INPUTLOG_VERSION)

    def write(self, record: object) -> None:
        """A simulated prompt is a range; it is written as the numbers that it stands for."""
        data = msgspec.msgpack.encode(record, enc_hook=list)
        self._log.write(_LENGTH.pack(len(data)) + data)


class RecordingCore(EngineCore):
    """An `EngineCore` that writes to `log` its spec, each of its inputs, and behind a `Schedule` the plan."""

    def __init__(self, spec: EngineSpec, load_policy: Callable[[str], Policy], log: BinaryIO) -> None:
        super().__init__(spec, load_policy)
        self._log = LogWriter(log, HEAD)
        self._log.write(spec)

    def on(self, what: Input, now: float) -> StepPlan | None:
        """Recorded before the core acts on it, so that a log ends with what killed its process."""
        self._log.write(Entry(now, what))
        plan = super().on(what, now)
        if isinstance(what, Schedule):
            self._log.write(plan)
        return plan


def read_log(log: BinaryIO) -> Iterator[bytes]:
    """The log's records; an incomplete last one, of a process that was killed, is left out."""
    while len(header := log.read(_LENGTH.size)) == _LENGTH.size:
        data = log.read(*_LENGTH.unpack(header))
        if len(data) < _LENGTH.unpack(header)[0]:
            return
        yield data


def check_head(log: BinaryIO, head: bytes) -> None:
    """Raises `VersionError` unless it is this one, of the version that this code reads."""
    name, _, version = log.readline(64).strip().rpartition(b" ")
    known = name == head.strip() and version.isdigit()
    check_version("this input log", int(version) if known else None, INPUTLOG_VERSION)


def read_entries(log: BinaryIO) -> tuple[EngineSpec, Iterator[tuple[Entry, StepPlan | None]]]:
    """What the engine was built from, and each of its inputs, a `Schedule` with the plan that came of it.

    Raises `VersionError` where another version has written it, or it is no input log.
    """
    check_head(log, HEAD)
    records, decoder = read_log(log), msgspec.msgpack.Decoder(Entry)
    spec = msgspec.msgpack.decode(next(records), type=EngineSpec)

    def entries() -> Iterator[tuple[Entry, StepPlan | None]]:
        for record in records:
            entry, plan = decoder.decode(record), None
            if isinstance(entry.what, Schedule):
                if (answer := next(records, None)) is None:
                    return  # killed while it planned
                plan = _plans.decode(answer)
            yield entry, plan

    return spec, entries()


def replay(log: BinaryIO, load_policy: Callable[[str], Policy]) -> Iterator[tuple[StepPlan | None, StepPlan | None]]:
    """(recorded plan, replayed plan) of every `Schedule`; `load_policy` makes the policies by their names."""
    spec, entries = read_entries(log)
    core = EngineCore(spec, load_policy)
    for entry, recorded in entries:
        plan = core.on(entry.what, entry.now)
        if isinstance(entry.what, Schedule):
            yield recorded, as_recorded(plan)


def as_recorded(plan: StepPlan | None) -> StepPlan | None:
    """Through the encoder as a recorded plan was: block tables are live lists until then."""
    found: StepPlan | None = _plans.decode(msgspec.msgpack.encode(plan))
    return found

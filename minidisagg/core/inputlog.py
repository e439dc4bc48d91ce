"""The ordered input log of one engine, and its replay.

Everything that an `EngineCore` decides follows from its spec, its policy and its inputs, each with its time. A real run
records them; `replay` gives the same plans bit for bit.
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

INPUTLOG_VERSION = 3
_HEAD = b"minidisagg inputs "  # and the version, and a line's end


class Entry(Struct, frozen=True, array_like=True):
    """One input, before the core has acted on it."""

    now: float
    what: Input


_LENGTH = struct.Struct("<I")
_plans = msgspec.msgpack.Decoder(StepPlan | None)


class RecordingCore(EngineCore):
    """An `EngineCore` that writes to `log` its spec, each of its inputs, and behind a `Schedule` the plan."""

    def __init__(self, spec: EngineSpec, load_policy: Callable[[str], Policy], log: BinaryIO) -> None:
        super().__init__(spec, load_policy)
        self._log = log
        log.write(_HEAD + b"%d\n" % INPUTLOG_VERSION)
        self._write(spec)

    def on(self, what: Input, now: float) -> StepPlan | None:
        """Recorded before the core acts on it, so that a log ends with what killed its process."""
        self._write(Entry(now, what))
        plan = super().on(what, now)
        if isinstance(what, Schedule):
            self._write(plan)
        return plan

    def _write(self, record: Entry | EngineSpec | StepPlan | None) -> None:
        data = msgspec.msgpack.encode(record)
        self._log.write(_LENGTH.pack(len(data)) + data)


def read_log(log: BinaryIO) -> Iterator[bytes]:
    """The log's records; an incomplete last one, of a process that was killed, is left out."""
    while len(header := log.read(_LENGTH.size)) == _LENGTH.size:
        data = log.read(*_LENGTH.unpack(header))
        if len(data) < _LENGTH.unpack(header)[0]:
            return
        yield data


def read_entries(log: BinaryIO) -> tuple[EngineSpec, Iterator[tuple[Entry, StepPlan | None]]]:
    """What the engine was built from, and each of its inputs, a `Schedule` with the plan that came of it.

    Raises `VersionError` where another version has written it, or it is no input log.
    """
    name, _, version = log.readline(64).strip().rpartition(b" ")
    known = name == _HEAD.strip() and version.isdigit()
    check_version("this input log", int(version) if known else None, INPUTLOG_VERSION)
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
            # Through the encoder as the recorded plan was: block tables are live lists until then.
            yield recorded, _plans.decode(msgspec.msgpack.encode(plan))

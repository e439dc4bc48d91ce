"""All that can happen to a worker's core, each a struct; `EngineCore.on` is their one door.

Whoever drives a core hands it these with the time, and carries out what then stands in its `outbox`. What a core
decides follows from its spec, its policy and its inputs alone.
"""

from __future__ import annotations

from msgspec import Struct

from minidisagg.core.messages import Envelope


class Received(Struct, frozen=True, tag=True, array_like=True):
    """A message from the router or a peer."""

    envelope: Envelope


class Schedule(Struct, frozen=True, tag=True, array_like=True):
    """The device has room for a step: `on` answers with its plan, or None if there is nothing to compute.

    A driver that can be stopped between steps may take up to `most` equal ones at once.
    """

    most: int = 1


class StepDone(Struct, frozen=True, tag=True, array_like=True):
    """A step has ended. `tokens`: one per sampling item of its plan, in the order of the items, or `NO_TOKEN`.

    Of equal steps so many have ended (`steps`, their tokens one step after the other; `ends`: when each did). If that
    is fewer than were planned, the next one is under way, and no other follows it.
    """

    step_id: int
    tokens: list[int]
    seconds: float
    steps: int = 1
    ends: list[float] = []


class LayersDone(Struct, frozen=True, tag=True, array_like=True):
    """Layers [0, `layer`) of a step's KV are in the cache; asked for by its plan, before its `StepDone`."""

    step_id: int
    layer: int


class PieceDone(Struct, frozen=True, tag=True, array_like=True):
    """A `Piece` has ended, well or not."""

    peer: str
    link_epoch: int
    seq: int
    send: bool
    ok: bool
    seconds: float = 0.0
    nbytes: int = 0  # on the wire
    checksum: int = 0
    error: str = ""
    ended: float = 0.0  # time.monotonic() of this process; the event loop may hear of it milliseconds later


class AbortConfirmed(Struct, frozen=True, tag=True, array_like=True):
    """Nothing of this link can touch this worker's pages any more."""

    peer: str
    link_epoch: int
    outgoing: bool


class Loaded(Struct, frozen=True, tag=True, array_like=True):
    """So many pages of a `LoadPages` are filled, from the first on; the store has no more of them."""

    request_id: str
    incarnation: int
    pages: int


class Saved(Struct, frozen=True, tag=True, array_like=True):
    """What came of a `SavePage`: whether the store has it now, and which pages have left it since the last one."""

    digest: bytes
    kept: bool
    evicted: list[bytes] = []


class Tick(Struct, frozen=True, tag=True, array_like=True):
    """Some time has passed: leases and deadlines. A driver makes one a few times a second."""


Input = Received | Schedule | StepDone | LayersDone | PieceDone | AbortConfirmed | Loaded | Saved | Tick

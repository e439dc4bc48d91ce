"""The core's outputs as plain data: what one step computes, and what one piece of a transfer moves.

A driver (the engine's device and links, or the simulator) carries them out and reports back; nothing here has
behaviour, so a recorded run can be compared with its replay value by value.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from minidisagg.core.messages import SamplingParams

SeqKey = tuple[str, int]  # (request_id, incarnation)
RAW = "raw"  # the codec that changes nothing; what another one has been through never answers for it
CODECS = (RAW, "int8")  # of KV on the wire, by name
WIRE_SHARE = {RAW: 1.0, "int8": 0.51}  # of a bfloat16 cache's bytes with heads of 128, for who has no cache to ask
NO_TOKEN = -1  # in place of a sampled token: the row's logits are no distribution, and its request has to end


class SeqInit(Struct, frozen=True, array_like=True):
    """First sight of a sequence on this worker: what sampling needs to know of its past."""

    request_id: str
    incarnation: int
    prompt: Sequence[int]
    output: list[int]  # tokens emitted before, elsewhere or by an earlier incarnation
    sampling: SamplingParams


class PlanItem(Struct, frozen=True, array_like=True, gc=False):
    """One sequence's share of a step: compute KV for positions [start, start + count).

    `tokens` are the known token ids of these positions. With a step ahead in flight the last one may be missing
    (`len(tokens) == count - 1`): the device then takes the token that it sampled last for this sequence.
    `pages` covers positions [0, start + count). With `sample`, the last position's logits give the token of output
    index `index`.
    """

    request_id: str
    incarnation: int
    start: int
    count: int
    tokens: Sequence[int]
    pages: list[int]
    sample: bool
    index: int


class StepPlan(Struct, frozen=True, array_like=True):
    """One device step. `new` precedes the first item of a sequence, `dropped` names sequences to forget.

    The device says `LayersDone` as soon as the KV of all layers before each of `reports` is in the cache. It computes
    the step `repeat` times, each time a token further on, unless it is stopped before (`StepDone`).
    """

    step_id: int
    items: list[PlanItem]
    new: list[SeqInit]
    dropped: list[SeqKey]
    reports: list[int] = []
    repeat: int = 1


def advanced(plan: StepPlan, steps: int) -> StepPlan:
    """The one that is under way when `steps` equal ones have ended: a decode, whose device knows its last token."""
    items = [replace(item, start=item.start + steps, index=item.index + steps, tokens=[]) for item in plan.items]
    return StepPlan(plan.step_id + steps, items if steps else plan.items, plan.new, plan.dropped)


class Piece(Struct, frozen=True, array_like=True):
    """One piece on a link: whole pages of one request, for a range of layers.

    `seq` counts the pieces of one link epoch from 0, in the order in which both ends start them; `pages` are this
    end's pages, `remote` the peer's (used by one-sided links). An empty `pages` on the receiving end means: take the
    `count` pages off the wire and throw them away (the request is gone, the order is not).
    """

    peer: str
    link_epoch: int
    seq: int
    send: bool
    request_id: str
    incarnation: int
    pages: list[int]
    remote: list[int]
    count: int
    layers: tuple[int, int]
    checksum: int = 0  # one-sided receive: what the source says it wrote
    codec: str = RAW  # how its pages look on the wire; both ends say the same

"""The core's outputs as plain data: what one step computes, and what one piece of a transfer moves.

A driver (the engine's device and links, or the simulator) carries them out and reports back; nothing here has
behaviour, so a recorded run can be compared with its replay value by value.
"""

from __future__ import annotations

from msgspec import Struct

from minidisagg.core.messages import SamplingParams

SeqKey = tuple[str, int]  # (request_id, incarnation)
NO_TOKEN = -1  # in place of a sampled token: the row's logits are no distribution, and its request has to end


class SeqInit(Struct, frozen=True, array_like=True):
    """First sight of a sequence on this worker: what sampling needs to know of its past."""

    request_id: str
    incarnation: int
    prompt: list[int]
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
    tokens: list[int]
    pages: list[int]
    sample: bool
    index: int


class StepPlan(Struct, frozen=True, array_like=True):
    """One device step. `new` precedes the first item of a sequence, `dropped` names sequences to forget.

    The device says `LayersDone` as soon as the KV of all layers before each of `reports` is in the cache.
    """

    step_id: int
    items: list[PlanItem]
    new: list[SeqInit]
    dropped: list[SeqKey]
    reports: list[int] = []


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
    codec: str = "raw"  # how its pages look on the wire; both ends say the same

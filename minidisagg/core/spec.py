"""What a worker's core is built from."""

from __future__ import annotations

from dataclasses import dataclass, field

from minidisagg.core.granularity import Granularity
from minidisagg.core.messages import Role
from minidisagg.core.plan import CODECS, RAW
from minidisagg.core.policy import WorkerOptions


@dataclass(frozen=True)
class EngineSpec:
    """The same values and the same inputs give the same plans."""

    name: str
    epoch: int
    role: Role
    num_pages: int
    page_size: int
    num_layers: int
    fingerprint: str
    policy: str = "fcfs"
    one_sided_links: bool = False
    granularity: Granularity = Granularity()  # noqa: RUF009 - it is frozen
    layer_bytes: int = 0  # of one page in one layer, on the wire
    codec: str = RAW  # of KV that leaves, where a placement names none
    codecs: tuple[str, ...] = CODECS  # that its links have; KV leaves raw where another one is named
    decode_after: int = 1  # tokens that a request is given here before its decode worker goes on, unless it names them
    prefix_caching: bool = True
    store: bool = False  # there is one below the prefix cache
    through_store: bool = False  # handoffs go through it, and not point to point
    lease: float = 30.0  # seconds that a side of a handoff waits for the other
    link_timeout: float = 10.0  # seconds for one piece on a link
    step_deadline: float = 120.0  # seconds for one step: until then a worker that computes is alive
    options: WorkerOptions = field(default_factory=WorkerOptions)

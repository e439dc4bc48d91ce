"""What a simulation is made of: its settings, its workers, and what its clients see."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from minidisagg.core.engine import EngineCore
from minidisagg.core.messages import Envelope, KVAck, KVBusy, KVPiece, KVWait, LinkStats, RequestSpec
from minidisagg.core.plan import StepPlan
from minidisagg.core.router import RouterSpec
from minidisagg.core.tracked import Emit, StageTimes
from minidisagg.sim.cost_model import Chaos, Costs, LinearCost
from minidisagg.sim.devices import TimingOnly
from minidisagg.sim.recording import Recording

# Messages that change nothing of what is computed next where only decodes run, and that no hook of a policy sees.
UNHEEDED = KVPiece, KVBusy, KVWait, KVAck


@dataclass
class Outcome:
    """What the client saw of one request."""

    spec: RequestSpec
    tokens: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    times: StageTimes | None = None
    handoffs: list[int] = field(default_factory=list)  # i: the gap between tokens i and i + 1 is one
    cached_tokens: int = 0
    workers: list[str] = field(default_factory=list)


class Observer(Protocol):
    """Hears what the router hears, and what clients do."""

    def on_message(self, envelope: Envelope, now: float) -> None: ...
    def on_emit(self, emit: Emit, now: float) -> None: ...


class Step(NamedTuple):
    """Under way on a device: a plan, and when each of its equal steps ends."""

    plan: StepPlan
    seconds: list[float]
    ends: list[float]


class SimWorker:
    """One simulated process: an engine core, its device, and the steps that this is computing."""

    def __init__(self, core: EngineCore, device: TimingOnly) -> None:
        self.core = core
        self.device = device
        self.stalled_until = 0.0
        self.backlog: list[Callable[[], None]] = []  # what happens to it while it is stopped
        self.alive = True
        self.silent = False  # it is idle, has said so, and nobody waits for a sign of life
        self.steps: deque[Step] = deque()  # under way; the device computes the first
        self.device_free_at = 0.0
        self.busy = 0.0  # seconds of all steps that have ended
        self.sent: dict[str, LinkStats] = {}  # by peer, since its start

    def has_sent(self, dest: str, nbytes: int, seconds: float, queued: float) -> None:
        """A piece, to this peer."""
        sent = self.sent.get(dest) or LinkStats(dest, "sim")
        self.sent[dest] = msgspec.structs.replace(
            sent,
            transfers=sent.transfers + 1,
            bytes=sent.bytes + nbytes,
            seconds=sent.seconds + seconds,
            queue_seconds=sent.queue_seconds + queued,
        )

    @property
    def repeats(self) -> bool:
        """Its device computes equal steps."""
        return bool(self.steps) and self.steps[0].plan.repeat > 1


@dataclass(frozen=True)
class World:
    """What a cluster runs in."""

    cost: Costs = LinearCost()  # noqa: RUF009 - frozen, as the next two are
    chaos: Chaos = Chaos()  # noqa: RUF009
    router: RouterSpec = RouterSpec()  # noqa: RUF009
    seed: int = 0
    vocab: int = 1 << 16
    depth: int = 0  # steps that may be planned ahead
    check: bool = True  # prove invariants after every event
    tokens: bool = True  # compute them, by a hash chain
    equal_steps: bool = True  # take them at once, where no tokens are computed
    restart_after: float = 0.5  # seconds
    record: Recording | None = None  # keep the inputs of the router and all workers

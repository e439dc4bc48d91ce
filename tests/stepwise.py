"""A simulated cluster without a clock: whoever drives it says which message, step, transfer or death is next."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from simfuzz import verdict

from minidisagg.core.blocks import BlockPool
from minidisagg.core.messages import ROUTER, Envelope, Role
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.router import RouterSpec
from minidisagg.core.spec import EngineSpec
from minidisagg.sim.cost_model import Chaos
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import SimWorker, Step, World

NEVER = 1e9


def spec(name: str, role: Role = Role.BOTH, **changes: Any) -> EngineSpec:
    """A small worker."""
    values: dict[str, Any] = {
        "epoch": 1, "num_pages": 16, "page_size": 4, "num_layers": 2, "fingerprint": "f", "lease": 5.0,
        "link_timeout": 2.0, "options": WorkerOptions(8, 64, 0),
    }  # fmt: skip
    return EngineSpec(name, role=role, **{**values, **changes})


class Stepwise(Simulator):
    """The simulator's workers, memory and links; what it would put on the clock waits in `messages` and `events`."""

    def __init__(
        self, specs: list[EngineSpec], make_policy: Callable[[], Policy] = Policy, depth: int = 0,
        router: RouterSpec | None = None,
    ) -> None:  # fmt: skip
        self.messages: list[tuple[Envelope, str, SimWorker | None]] = []
        self.events: list[Callable[[], None]] = []
        router = router or RouterSpec(lost_after=NEVER, stuck_after=NEVER)
        super().__init__(specs, make_policy, World(router=router, depth=depth))
        self.events.clear()  # the first tick

    def at(self, time: float, action: Callable[[], None], last: bool = True) -> None:
        """It happens when the driver says so."""
        self.events.append(action)

    def _post(self, envelope: Envelope, dest: str, target: SimWorker | None) -> None:
        if target is None and dest != ROUTER:
            target = self.workers[dest]
        self.messages.append((envelope, dest, target))

    def _finish_step(self, worker: SimWorker, step: Step) -> None:
        """A device computes its steps in order, whichever event comes first."""
        if worker.alive:
            super()._finish_step(worker, worker.steps[0])

    def deliver(self, index: int = 0) -> Any:
        """The message at this place of the queue arrives; returns its body."""
        message = self.messages.pop(index % len(self.messages))
        self._deliver(*message)
        return message[0].body

    def happen(self, index: int = 0) -> None:
        """A step ends, a piece lands, an abort is confirmed, a death is noticed, a worker starts."""
        self.events.pop(index % len(self.events))()

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.router.on_tick(self.now)
        self._drain_router()
        for worker in list(self.workers.values()):
            self._inside(worker, lambda w=worker: self._worker_tick(w))  # type: ignore[misc]

    def lose(self, index: int) -> None:
        """A message between workers is lost, if there is one."""
        between = [m for m in self.messages if ROUTER not in (m[0].source, m[1])]
        if between:
            self.messages.remove(between[index % len(between)])

    def settle(self) -> None:
        """Let everything happen, in order, until nothing is under way."""
        self.chaos = Chaos()
        for _ in range(400):
            while self.messages or self.events:
                while self.messages:
                    self.deliver()
                if self.events:
                    self.happen()
            self.prove()
            if self.settled and not self.messages:
                return
            self.tick(0.5)

    def prove(self) -> None:
        """All invariants, of every core."""
        self._touched = {ROUTER, *self.workers}
        self.check_integrity()

    def complaints(self) -> list[str]:
        """What is wrong once all is over."""
        return verdict(self)

    def pool(self, name: str) -> BlockPool:
        """A worker's pages."""
        return self.workers[name].core.pool

    def faulty(self, fails: bool) -> None:
        """Whether the pieces that are started or end from now on fail."""
        self.chaos = Chaos(break_transfer=1.0 if fails else 0.0)
        self.rng = random.Random(0)

"""What operators see of a running cluster, and do with it: the server's /admin, the benchmark, tests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from minidisagg.config import ClusterSettings, RunSettings
from minidisagg.core.messages import ROUTER, AnyMessage, Hello, Role, Stats, Stayed, StoreStats
from minidisagg.core.policy import ClusterView, RoleChange, WorkerOptions
from minidisagg.core.router import Router
from minidisagg.core.tracked import Tracked
from minidisagg.policies import make_policy, pinned, rehearse, shown
from minidisagg.runtime.launch import Supervisor, role_name

DRAIN_POLL = 0.05  # seconds


class Operations:
    """Of a `Frontend`, which has the parts."""

    cluster: ClusterSettings
    run: RunSettings
    router: Router
    supervisor: Supervisor
    loop: asyncio.AbstractEventLoop
    greetings: dict[str, Hello]
    roles: Mapping[str, tuple[Role, WorkerOptions]]
    _tasks: set[asyncio.Task[None]]
    _reported: asyncio.Event
    _failing: dict[str, str]

    def tell(self, text: str, level: int = logging.INFO) -> None:
        raise NotImplementedError

    def _drain(self) -> None:
        raise NotImplementedError

    @property
    def hellos(self) -> dict[str, Hello]:
        """The live workers, and what they said they are."""
        return self.router.hellos

    # ------------------------------------------------------------ see

    def _on_told(self, worker: str, body: AnyMessage) -> None:
        """A worker's message, after the router has had it. What is to leave a worker that flips is asked again and
        again, and stays for the same reason: that is told once."""
        if isinstance(body, Stats):
            self._reported.set()
            self._on_store(worker, body.store)
        elif isinstance(body, Stayed) and (request := self.requests.get(body.request_id)):
            if request.stays != body.reason:
                request.stays = body.reason
                self.tell(f"request {body.request_id} stays at {worker}: {body.reason}")

    def _on_store(self, worker: str, store: StoreStats | None) -> None:
        """All workers write to the same one: its trouble is told once, and again after it was well."""
        failing = store.failing if store is not None else ""
        if failing and failing not in self._failing.values():
            self.tell(failing, logging.WARNING)
        self._failing[worker] = failing

    @property
    def worker_names(self) -> Sequence[str]:
        """Of all workers, those that are down too; the prefill workers come first."""
        return self.supervisor.names

    @property
    def view(self) -> ClusterView:
        """The cluster as the policy's hooks see it: the workers that are up, what waits, and the limits."""
        return self.router.view

    @property
    def requests(self) -> Mapping[str, Tracked]:
        """Those that have not ended, in the order in which they came."""
        return self.router.requests

    @property
    def parked(self) -> int:
        """How many of them no worker can take now."""
        return sum(request_id in self.router.requests for request_id in self.router.parked)

    @property
    def paused(self) -> bool:
        """Whether new requests wait in the router."""
        return self.router.paused

    @property
    def policy(self) -> str:
        """The scheduling policy, with its settings."""
        return shown(self.router.policy_spec or self.cluster.policy)

    @property
    def link(self) -> str:
        """What moves KV between the workers; empty while none is up."""
        return str(next((hello.info["link"] for hello in self.hellos.values()), ""))

    @property
    def mode(self) -> Literal["colocated", "disagg"]:
        """By the workers' roles; one that is down counts with the role that it will come back with."""
        roles = [self.router.roles.get(name) or hello.role for name, hello in self.greetings.items()]
        return "colocated" if roles and all(role == Role.BOTH for role in roles) else "disagg"

    def epoch(self, worker: str) -> int:
        """Of its latest start, 0 before the first."""
        return self.router.epochs.get(worker, 0)

    def stalled(self, seconds: float) -> list[str]:
        """The workers whose step takes longer than this."""
        return [name for name in self.router.heartbeats if self.router.stands_still(name, seconds)]

    def workers_of(self, request_id: str) -> list[str]:
        """Where the request is and was, in order: the router's own list, which grows with each move. Empty where it has
        ended, or was rejected at once."""
        tracked = self.router.requests.get(request_id)
        return [] if tracked is None else tracked.workers

    # ------------------------------------------------------------ do

    def pause(self, paused: bool) -> None:
        """New requests wait in the router, or go on."""
        self.tell("admission paused" if paused else "admission resumed")
        self.router.pause(paused, time.monotonic())
        self._drain()

    def set_policy(self, spec: str, rehearsed: bool = False) -> None:
        """Change the scheduling policy everywhere; without a rehearsal where it has had one. Raises `ValueError`."""
        spec = pinned(spec)
        if not rehearsed:
            rehearse(spec, self.roles)
        self.router.set_policy(spec, make_policy(spec, ROUTER, self.run.decision_dir), time.monotonic())
        self.tell(f"policy {shown(spec)}")
        self._drain()

    def set_role(self, worker: str, role: Role) -> None:
        """Move what decodes on the worker elsewhere, finish the rest, then flip; one that is down, when it is back.
        Raises `KeyError`."""
        if worker not in self.worker_names:
            raise KeyError(worker)
        self.router.set_role(RoleChange(worker, role), time.monotonic())
        self.tell(f"{worker} finishes, then becomes {role_name(role)}")
        self._drain()

    def migrate(self, request_id: str, worker: str) -> bool:
        """A request that decodes goes on at another worker that does; False where it does not decode, or does so there,
        or the worker takes no decodes. What comes of it is told: it may stay."""
        request = self.router.requests[request_id]
        source, request.stays = request.decode, ""
        moves = self.router.migrate(request_id, worker, time.monotonic())
        if moves:
            self.tell(f"request {request_id} moves from {source} to {worker}")
            self._drain()
        return moves

    def drain(self, worker: str) -> None:
        """The worker takes nothing new, until it is restarted. Raises `KeyError`."""
        self.router.drain(worker, time.monotonic())
        self.tell(f"{worker} drains")

    def kill(self, worker: str) -> None:
        """SIGKILL; the supervisor starts it again under the next epoch. Raises `KeyError`."""
        self.supervisor.kill(worker, self.router.view.workers[worker].epoch, wanted=True)

    def set_mode(self, mode: Literal["colocated", "disagg"]) -> None:
        """Give every worker its role of that mode; one that is down, when it is back. Raises `ValueError`."""
        cluster = self.cluster
        if mode == "disagg" and not (cluster.prefill_workers and cluster.decode_workers):
            raise ValueError("disagg needs prefill workers and decode workers")
        for index, name in enumerate(self.worker_names):
            role = Role.PREFILL if index < cluster.prefill_workers else Role.DECODE
            self.set_role(name, Role.BOTH if mode == "colocated" else role)

    def restart(self, worker: str) -> None:
        """Drain the worker, and end it once no request uses it: the supervisor starts it again. Raises `KeyError`."""
        self.drain(worker)
        task = self.loop.create_task(self._kill_idle(worker, self.view.workers[worker].epoch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kill_idle(self, worker: str, epoch: int) -> None:
        while (status := self.view.workers.get(worker)) is not None and status.epoch == epoch:
            if not self.router.uses(worker):
                self.kill(worker)
                return
            await asyncio.sleep(DRAIN_POLL)

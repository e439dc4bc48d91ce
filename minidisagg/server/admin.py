"""/admin/*: what operators and the monitor see and do. With keys set it needs one, like everything else.

GET  /admin/state                     everything below in one snapshot
GET  /admin/workers | links | requests
GET  /admin/events?hz=4               snapshots as server-sent events
GET  /admin/trace                     the latest steps and requests, for https://ui.perfetto.dev (docs/timeline.md)
POST /admin/pause | resume            new requests wait in the router
POST /admin/policy {"policy": "sarathi:chunk=64"}
POST /admin/mode {"mode": "disagg"}   give the workers the roles of a mode
POST /admin/workers/NAME/role {"role": "decode"}    finish, then flip
POST /admin/workers/NAME/drain        nothing new until it is restarted
POST /admin/workers/NAME/restart      drain, then start anew
POST /admin/workers/NAME/kill         SIGKILL; its requests are recomputed elsewhere
POST /admin/requests/ID/abort
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, get_args

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from minidisagg.core.messages import Role, Stats
from minidisagg.core.router import Tracked
from minidisagg.measure.timeline import Timeline
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name
from minidisagg.server.connections import json_response
from minidisagg.server.history import EndRecord, EventRecord, StepRecord
from minidisagg.server.metrics import Metrics
from minidisagg.server.protocol import ApiError, decode_plain

MAX_REQUESTS = 256  # listed at a time, the oldest first
DRAIN_POLL = 0.05  # seconds
FIRST_RECORDS, FIRST_ENDS = 512, 50  # what a new listener gets: of all kinds, and at least of ends and of events
UNSEEN = 1.0  # seconds without a snapshot, after which nobody knows when a request came to its stage
Stage = Literal["waiting", "prefilling", "transferring", "decode_waiting", "decoding"]
STAGES: tuple[str, ...] = get_args(Stage)
EARLIER: dict[str, Stage] = {"prefilling": "waiting", "decode_waiting": "transferring"}
MAX_LISTENERS = 16  # to events at a time


class WorkerState(Struct, frozen=True):
    """One worker: what the router knows and what it last said of itself."""

    name: str
    role: str
    state: Literal["up", "flipping", "draining", "down"]
    epoch: int
    pid: int | msgspec.UnsetType = msgspec.UNSET  # left out while it is down: 0 would be the reader's own process group
    device: str = ""
    queued_tokens: int = 0
    decoding: int = 0
    stats: dict[str, Any] | None = None  # the fields of `Stats`; `links` are those of `LinkStats`


class RequestState(Struct, frozen=True):
    """One request, without its text."""

    id: str
    stage: Stage
    age: float  # seconds
    in_stage: float  # seconds; where nobody has watched, as far as the router knows
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    workers: list[str]
    incarnation: int


class Snapshot(Struct, frozen=True):
    """The cluster at one moment. `clock` is monotonic, in seconds; counters run from the server's start."""

    clock: float
    model: str
    mode: str
    policy: str
    link: str
    paused: bool
    waiting: int
    waiting_tokens: int
    prompt_tokens: int
    generation_tokens: int
    restarts: int
    stages: dict[str, int]  # requests in each
    oldest: dict[str, float]  # seconds for which some request has been in each
    workers: list[WorkerState]
    requests: list[RequestState]
    latencies: dict[str, list[float]]  # [p50, p90, p99] in seconds of ttft, tpot and itl over the last minute
    seq: int  # of the newest record
    steps: list[StepRecord] = []  # of events only: what is new since the event before
    ends: list[EndRecord] = []
    events: list[EventRecord] = []


class PolicyBody(Struct, frozen=True):
    """POST /admin/policy."""

    policy: Annotated[str, Meta(min_length=1, max_length=256)]


class RoleBody(Struct, frozen=True):
    """POST /admin/workers/NAME/role."""

    role: Literal["prefill", "decode", "both"]


class ModeBody(Struct, frozen=True):
    """POST /admin/mode."""

    mode: Literal["colocated", "disagg"]


class Admin:
    """The handlers."""

    def __init__(self, frontend: Frontend, metrics: Metrics, body: Callable[[web.Request], Awaitable[bytes]]) -> None:
        self.frontend, self.metrics, self.body = frontend, metrics, body
        self._places = asyncio.Semaphore(MAX_LISTENERS)
        self._restarts: set[asyncio.Task[None]] = set()
        self._entered: dict[str, tuple[str, float]] = {}  # request → its stage at the last snapshot, and since when
        self._seen = 0.0  # when that was

    def routes(self) -> list[web.RouteDef]:
        """For `Application.add_routes`."""
        return [
            web.get("/admin/state", self.state),
            web.get("/admin/events", self.events),
            web.get("/admin/workers", self.part),
            web.get("/admin/requests", self.part),
            web.get("/admin/links", self.links),
            web.get("/admin/trace", self.trace),
            web.post("/admin/pause", self.pause),
            web.post("/admin/resume", self.pause),
            web.post("/admin/policy", self.policy),
            web.post("/admin/mode", self.mode),
            web.post("/admin/workers/{name}/{action:role|drain|kill|restart}", self.act),
            web.post("/admin/requests/{id}/abort", self.abort),
        ]

    # ------------------------------------------------------------ seeing

    def snapshot(self, since: int | None = None) -> Snapshot:
        """Everything, with what has been recorded after `since`."""
        frontend, router, now = self.frontend, self.frontend.router, time.monotonic()
        requests = self._requests(now)
        stages, oldest = dict.fromkeys(STAGES, 0), dict[str, float]()
        for request in requests:
            stages[request.stage] += 1
            oldest[request.stage] = max(oldest.get(request.stage, 0.0), request.in_stage)
        prompt, generated = self.metrics.totals()
        return Snapshot(
            clock=now,
            model=frontend.model.model,
            mode=self._mode(),
            policy=router.policy_spec or frontend.cluster.policy,
            link=_link(frontend),
            paused=router.paused,
            waiting=router.view.waiting,
            waiting_tokens=router.view.waiting_tokens,
            prompt_tokens=prompt,
            generation_tokens=generated,
            restarts=len(frontend.restarted),
            stages=stages,
            oldest=oldest,
            workers=[self._worker(name) for name in frontend.supervisor.names],
            requests=requests[:MAX_REQUESTS],
            latencies=self.metrics.history.latencies(now),
            seq=self.metrics.history.seq,
            **({} if since is None else self.metrics.history.since(since)),
        )

    def _requests(self, now: float) -> list[RequestState]:
        """All of them, the oldest first.

        Workers report how many prompts they have not begun, and how many handoffs they still hold, but not which: the
        newest are taken to be these. A handoff is a transfer while it is held, and a wait for decode then.
        """
        router, found = self.frontend.router, list[RequestState]()
        left = {(name, "prefilling"): stats.waiting for name, stats in router.stats.items()}
        left |= {(name, "decode_waiting"): stats.held for name, stats in router.stats.items()}
        before, self._entered = self._entered if now - self._seen < UNSEEN else {}, {}
        self._seen = now
        for request in reversed(router.requests.values()):
            stage, since = _stage(request)
            if left.get((request.prefill, stage), 0):
                left[request.prefill, stage] -= 1
                stage = EARLIER[stage]
            if request.incarnation or stage in ("prefilling", "decode_waiting"):  # else the router knows
                known = before.get(request.request_id, (stage, since))
                since = known[1] if known[0] == stage else now
            self._entered[request.request_id] = stage, since
            found.append(
                RequestState(
                    request.request_id,
                    stage,
                    now - request.arrival,
                    now - since,
                    len(request.prompt),
                    len(request.emitted),
                    request.max_tokens,
                    request.workers,
                    request.incarnation,
                )
            )
        return found[::-1]

    def _mode(self) -> str:
        router = self.frontend.router
        roles = [router.roles.get(name) or hello.role for name, hello in self.frontend.greetings.items()]
        return "colocated" if roles and all(role == Role.BOTH for role in roles) else "disagg"

    def _worker(self, name: str) -> WorkerState:
        router = self.frontend.router
        status, hello = router.view.workers.get(name), router.hellos.get(name)
        if status is None or hello is None:
            return WorkerState(name, "", "down", router.epochs.get(name, 0))
        state: Any = "draining" if status.draining else "up" if status.flipping is None else "flipping"
        return WorkerState(
            name,
            role_name(status.role),
            state,
            status.epoch,
            hello.pid,
            str(hello.info["device"]),
            status.queued_tokens,
            status.decoding,
            _fields(router.stats.get(name)),
        )

    async def state(self, _: web.Request) -> web.Response:
        return json_response(self.snapshot())

    async def part(self, request: web.Request) -> web.Response:
        return json_response(getattr(self.snapshot(), request.path.rpartition("/")[2]))

    async def links(self, _: web.Request) -> web.Response:
        stats = sorted(self.frontend.stats.items())
        return json_response(
            [{"source": name, **msgspec.structs.asdict(link)} for name, s in stats for link in s.links]
        )

    async def trace(self, _: web.Request) -> web.Response:
        timeline = Timeline()
        for message in self.metrics.history.messages:
            timeline.on_message(*message)
        for emit in self.metrics.history.emits:
            timeline.on_emit(*emit)
        return json_response({"traceEvents": timeline.events(), "displayTimeUnit": "ms"})

    async def events(self, request: web.Request) -> web.StreamResponse:
        try:
            hz = float(request.query.get("hz", "4"))
        except ValueError:
            hz = 0.0
        if not 0.1 <= hz <= 20:
            raise ApiError(400, "hz must be a number from 0.1 to 20", "hz")
        if self._places.locked():
            raise ApiError(429, f"{MAX_LISTENERS} listeners are connected already")
        response = web.StreamResponse(headers={"Cache-Control": "no-cache", "Content-Type": "text/event-stream"})
        async with self._places:
            await response.prepare(request)
            history = self.metrics.history
            snapshot = self.snapshot(max(0, history.seq - FIRST_RECORDS))
            ends, events = list(history.ends)[-FIRST_ENDS:], list(history.log)[-FIRST_ENDS:]
            snapshot = msgspec.structs.replace(snapshot, ends=ends, events=events)
            while True:
                await response.write(b"data: " + msgspec.json.encode(snapshot) + b"\n\n")
                await asyncio.sleep(1 / hz)
                snapshot = self.snapshot(snapshot.seq)

    # ------------------------------------------------------------ doing

    async def pause(self, request: web.Request) -> web.Response:
        self.frontend.pause(request.path.endswith("/pause"))
        return json_response({"paused": self.frontend.router.paused})

    async def policy(self, request: web.Request) -> web.Response:
        spec = decode_plain(await self.body(request), PolicyBody).policy
        if ".py" in spec:  # it would run a file that a client names
            raise ApiError(400, "only policies that are installed can be set over HTTP", "policy")
        try:
            self.frontend.set_policy(spec)
        except ValueError as error:
            raise ApiError(400, str(error), "policy") from None
        return json_response({"policy": spec})

    async def mode(self, request: web.Request) -> web.Response:
        mode = decode_plain(await self.body(request), ModeBody).mode
        cluster = self.frontend.cluster
        if mode == "disagg" and not (cluster.prefill_workers and cluster.decode_workers):
            raise ApiError(400, "disagg needs a server that was started with --decode-workers", "mode")
        for index, name in enumerate(self.frontend.supervisor.names):
            role = Role.PREFILL if index < cluster.prefill_workers else Role.DECODE
            self.frontend.set_role(name, Role.BOTH if mode == "colocated" else role)  # of one that is down, too
        return json_response({"mode": mode})

    async def act(self, request: web.Request) -> web.Response:
        name, action = request.match_info["name"], request.match_info["action"]
        if name not in self.frontend.router.view.workers:
            known = name in self.frontend.supervisor.names
            raise ApiError(409, f"worker {name} is down") if known else ApiError(404, f"there is no worker {name!r}")
        if action == "role":
            role = Role[decode_plain(await self.body(request), RoleBody).role.upper()]
            self._refuse_without(name, role)
            self.frontend.set_role(name, role)
        elif action == "kill":
            self.frontend.kill(name)
        else:
            if action == "drain":  # a restart ends
                self._refuse_without(name, 0)
            self.frontend.drain(name)
            if action == "restart":
                task = asyncio.create_task(self._restart(name, self.frontend.router.view.workers[name].epoch))
                self._restarts.add(task)
                task.add_done_callback(self._restarts.discard)
        return json_response(self._worker(name))

    def _refuse_without(self, name: str, role: int) -> None:
        """409 if with `role` for this worker some stage had none. Raises `ApiError`."""
        workers = self.frontend.router.view.workers.values()
        roles = [role if w.name == name else w.flipping or w.role for w in workers if not w.draining]
        for stage in (Role.PREFILL, Role.DECODE):
            if not any(left & stage for left in roles):
                raise ApiError(409, f"that would leave no worker for {role_name(stage)}")

    async def _restart(self, name: str, epoch: int) -> None:
        """Once nothing uses the worker, end it; its supervisor starts it again."""
        router = self.frontend.router
        while (status := router.view.workers.get(name)) is not None and status.epoch == epoch:
            if not router.uses(name):
                self.frontend.kill(name)
                return
            await asyncio.sleep(DRAIN_POLL)

    async def abort(self, request: web.Request) -> web.Response:
        request_id = request.match_info["id"]
        if request_id not in self.frontend.router.requests:
            raise ApiError(404, f"there is no request {request_id!r}")
        self.frontend.abort(request_id)
        return json_response({"aborted": request_id})


def same_origin(request: web.Request) -> None:
    """Without a key anybody on this machine may administer, but no web page that a browser here happens to show."""
    if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "start the server with --api-key to administer it from a browser")


def _fields(stats: Stats | None) -> dict[str, Any] | None:
    if stats is None:
        return None
    return {**msgspec.structs.asdict(stats), "links": [msgspec.structs.asdict(link) for link in stats.links]}


def _stage(request: Tracked) -> tuple[Stage, float]:
    """The latest stage that it may be in, and since when, as far as the router can tell."""
    if request.prefilling:
        return "prefilling" if request.prefill else "waiting", request.arrival
    if request.moving:
        return "decode_waiting", request.first_at
    return "decoding", request.second_at if len(request.workers) > 1 else request.first_at


def _link(frontend: Frontend) -> str:
    return str(next((hello.info["link"] for hello in frontend.hellos.values()), ""))

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
from typing import Annotated, Literal, get_args, get_type_hints

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from minidisagg.admin_schema import STAGES, VERSION, RequestState, Snapshot, Stage, WorkerState, WorkerStats
from minidisagg.core import tracked
from minidisagg.core.messages import Role
from minidisagg.core.tracked import Tracked
from minidisagg.measure.timeline import Timeline, trace_document
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import role_name
from minidisagg.server.connections import json_response
from minidisagg.server.metrics import Metrics
from minidisagg.server.protocol import ApiError, S, decode_plain

MAX_REQUESTS = 256  # listed at a time, the oldest first
FIRST_RECORDS, FIRST_ENDS = 512, 50  # what a new listener gets: of all kinds, and at least of ends and of events
UNSEEN = 1.0  # seconds without a snapshot, after which nobody knows when a request came to its stage
EARLIER: dict[str, Stage] = {"prefilling": "waiting", "decode_waiting": "transferring"}
MAX_LISTENERS = 16  # to events at a time


class PolicyBody(Struct, frozen=True):
    """POST /admin/policy."""

    policy: Annotated[str, Meta(min_length=1, max_length=256)]


class RoleBody(Struct, frozen=True):
    """POST /admin/workers/NAME/role."""

    role: Literal["prefill", "decode", "both"]


class MigrateBody(Struct, frozen=True):
    """POST /admin/migrate."""

    request: str
    worker: str


class ModeBody(Struct, frozen=True):
    """POST /admin/mode."""

    mode: Literal["colocated", "disagg"]


class Admin:
    """The handlers."""

    def __init__(self, frontend: Frontend, metrics: Metrics, body: Callable[[web.Request], Awaitable[bytes]]) -> None:
        self.frontend, self.metrics, self.body = frontend, metrics, body
        self._places = asyncio.Semaphore(MAX_LISTENERS)
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
            web.post("/admin/migrate", self.migrate),
        ]

    # ------------------------------------------------------------ seeing

    def snapshot(self, since: int | None = None) -> Snapshot:
        """Everything, with what has been recorded after `since`."""
        frontend, view, now = self.frontend, self.frontend.view, time.monotonic()
        requests = self._requests(now)
        stages, oldest = dict[str, int](dict.fromkeys(STAGES, 0)), dict[str, float]()
        for request in requests:
            stages[request.stage] += 1
            oldest[request.stage] = max(oldest.get(request.stage, 0.0), request.in_stage)
        prompt, generated = self.metrics.totals()
        return Snapshot(
            version=VERSION,
            clock=now,
            model=frontend.model.model,
            mode=frontend.mode,
            policy=frontend.policy,
            link=frontend.link,
            paused=frontend.paused,
            waiting=view.waiting,
            waiting_tokens=view.waiting_tokens,
            prompt_tokens=prompt,
            generation_tokens=generated,
            restarts=len(frontend.restarted),
            migrations=frontend.router.migrations,
            stages=stages,
            oldest=oldest,
            workers=[self._worker(name) for name in frontend.worker_names],
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
        found = list[RequestState]()
        left = {(name, "prefilling"): stats.waiting for name, stats in self.frontend.stats.items()}
        left |= {(name, "decode_waiting"): stats.held for name, stats in self.frontend.stats.items()}
        before, self._entered = self._entered if now - self._seen < UNSEEN else {}, {}
        self._seen = now
        for request in reversed(list(self.frontend.requests.values())):
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
                    id=request.request_id,
                    stage=stage,
                    age=now - request.arrival,
                    in_stage=now - since,
                    prompt_tokens=len(request.prompt),
                    output_tokens=len(request.emitted),
                    max_tokens=request.max_tokens,
                    workers=request.workers,
                    incarnation=request.incarnation,
                )
            )
        return found[::-1]

    def _worker(self, name: str, killed: bool = False) -> WorkerState:
        status, hello = self.frontend.view.workers.get(name), self.frontend.hellos.get(name)
        if killed or status is None or hello is None:  # of its death the front end hears a moment later
            return WorkerState(name=name, role="", state="down", epoch=self.frontend.epoch(name))
        stats = self.frontend.stats.get(name)
        return WorkerState(
            name=name,
            role=role_name(status.role),
            state="draining" if status.draining else "up" if status.flipping is None else "flipping",
            epoch=status.epoch,
            pid=hello.pid,
            device=str(hello.info["device"]),
            queued_tokens=status.queued_tokens,
            decoding=status.decoding,
            stats=None if stats is None else msgspec.convert(stats, WorkerStats, from_attributes=True),
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
        return json_response(trace_document(timeline.events()))

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

    async def _read(self, request: web.Request, kind: type[S]) -> S:
        """The body. Raises `ApiError`, which has all that a field may be."""
        try:
            return decode_plain(await self.body(request), kind)
        except ApiError as error:
            if choices := get_args(get_type_hints(kind).get(error.param or "")):
                raise ApiError(400, f"{error.param} must be one of {', '.join(choices)}", error.param) from None
            raise

    async def pause(self, request: web.Request) -> web.Response:
        self.frontend.pause(request.path.endswith("/pause"))
        return json_response({"paused": self.frontend.paused})

    async def policy(self, request: web.Request) -> web.Response:
        spec = (await self._read(request, PolicyBody)).policy
        if ".py" in spec:  # it would run a file that a client names
            raise ApiError(400, "only policies that are installed can be set over HTTP", "policy")
        try:
            self.frontend.set_policy(spec)
        except ValueError as error:
            raise ApiError(400, str(error), "policy") from None
        return json_response({"policy": spec})

    async def mode(self, request: web.Request) -> web.Response:
        mode = (await self._read(request, ModeBody)).mode
        try:
            self.frontend.set_mode(mode)
        except ValueError:
            raise ApiError(400, "disagg needs a server that was started with --decode-workers", "mode") from None
        return json_response({"mode": mode})

    async def act(self, request: web.Request) -> web.Response:
        name, action = request.match_info["name"], request.match_info["action"]
        if name not in self.frontend.view.workers:
            known = name in self.frontend.worker_names
            raise ApiError(409, f"worker {name} is down") if known else ApiError(404, f"there is no worker {name!r}")
        if action == "role":
            role = Role[(await self._read(request, RoleBody)).role.upper()]
            self._refuse_without(name, role)
            self.frontend.set_role(name, role)
        elif action == "kill":
            self.frontend.kill(name)
        elif action == "restart":  # which ends, and is refused nothing
            self.frontend.restart(name)
        else:
            self._refuse_without(name, 0)
            self.frontend.drain(name)
        return json_response(self._worker(name, killed=action == "kill"))

    def _refuse_without(self, name: str, role: int) -> None:
        """409 if with `role` for this worker some stage had none. Raises `ApiError`."""
        workers = self.frontend.view.workers.values()
        roles = [role if w.name == name else w.flipping or w.role for w in workers if not w.draining]
        for stage in (Role.PREFILL, Role.DECODE):
            if not any(left & stage for left in roles):
                raise ApiError(409, f"that would leave no worker for {role_name(stage)}")

    async def migrate(self, request: web.Request) -> web.Response:
        asked = await self._read(request, MigrateBody)
        if asked.request not in self.frontend.requests:
            raise ApiError(404, f"there is no request {asked.request!r}", "request")
        if asked.worker not in self.frontend.view.workers:
            raise ApiError(404, f"there is no live worker {asked.worker!r}", "worker")
        status = self.frontend.view.workers[asked.worker]
        if not status.takes(Role.DECODE):
            why = "drains" if status.draining else "changes its role" if status.flipping else "only prefills"
            raise ApiError(409, f"worker {asked.worker} takes no request that decodes: it {why}")
        if not self.frontend.migrate(asked.request, asked.worker):
            raise ApiError(409, f"request {asked.request} does not decode, or does so at {asked.worker} already")
        return json_response({"migrating": asked.request, "worker": asked.worker})

    async def abort(self, request: web.Request) -> web.Response:
        request_id = request.match_info["id"]
        if request_id not in self.frontend.requests:
            raise ApiError(404, f"there is no request {request_id!r}")
        self.frontend.abort(request_id)
        return json_response({"aborted": request_id})


def same_origin(request: web.Request) -> None:
    """Without a key anybody on this machine may administer, but no web page that a browser here happens to show."""
    if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "start the server with --api-key to administer it from a browser")


def _stage(request: Tracked) -> tuple[Stage, float]:
    """The latest stage that it may be in, and since when, as far as the router can tell."""
    if request.computing:
        return "prefilling" if request.prefill else "waiting", request.arrival
    stage: Stage = "decode_waiting" if request.stage is tracked.Stage.TRANSFER else "decoding"
    return stage, request.stage_at

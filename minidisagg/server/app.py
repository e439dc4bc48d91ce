"""The OpenAI-compatible server: aiohttp over the same front-end object that `bench` uses.

Every request passes `Server.guard`: an id, the key, the error body, one log line with lengths and never text.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import socket
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from minidisagg import __version__
from minidisagg.address import at
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.channel import ChannelError
from minidisagg.runtime.frontend import Frontend
from minidisagg.server.admin import Admin, same_origin
from minidisagg.server.completions import Answer, Chat, Completions, Endpoint, Job, encode, templated
from minidisagg.server.connections import cut_off, error_response, json_response, make_runner, plain_error
from minidisagg.server.generation import Generation, too_many
from minidisagg.server.history import History
from minidisagg.server.metrics import Metrics
from minidisagg.server.openapi import describe
from minidisagg.server.protocol import ApiError, DetokenizeRequest, TokenizeRequest, decode_plain

MAX_BODY = 4 << 20  # bytes: half a second to parse at worst
READ_TIMEOUT = 30.0  # seconds in which a body must have come
STUCK_AFTER = 30.0  # seconds without a step while there is work: not healthy
LOG_EVERY = 10.0  # seconds
GRACE = 5.0  # seconds for which a stage may be without a worker: one that died is started again
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
REQUEST_KEY: web.RequestKey[str] = web.RequestKey("minidisagg_request_id", str)
logger = logging.getLogger("minidisagg.server")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServerSettings:
    """Where and for whom the server listens. Raises `ValueError` if it would be open to the network without a key."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_name: str = ""  # beside the model's own
    drain_timeout: float = 30.0  # seconds that requests have to end after SIGTERM

    def __post_init__(self) -> None:
        if not self.api_keys and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"to listen on {self.host}, which others can reach, give --api-key KEY")
        if any(not key or not key.isascii() or " " in key for key in self.api_keys):
            raise ValueError("an API key is printable ASCII without spaces")


class Server:
    """The handlers and what they share."""

    def __init__(self, frontend: Frontend, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self.frontend, self.tokenizer, self.settings = frontend, tokenizer, settings
        self.model = settings.served_name or frontend.model.model
        self.names = {self.model, frontend.model.model}
        self.started = int(time.time())
        self.history = History(frontend)
        self.metrics = Metrics(frontend, self.history)
        self.admin = Admin(frontend, self.metrics, _body)
        self.draining = False
        self.active = 0  # generations
        self.idle = asyncio.Event()
        self.idle.set()
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self.app = web.Application(middlewares=[self.guard], client_max_size=MAX_BODY)
        self.app.on_response_prepare.append(_name)
        complete, chat = self._generates(Completions()), self._generates(Chat())
        self.app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/metrics", self.expose),
                web.get("/v1/models", self.models),
                web.get("/models", self.models),
                web.get("/v1/models/{model:.+}", self.one_model),
                web.get("/openapi.json", self.openapi),
                web.post("/v1/completions", complete),
                web.post("/v1/chat/completions", chat),
                web.post("/completions", complete),
                web.post("/chat/completions", chat),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/tokenizer_info", self.tokenizer_info),
                *self.admin.routes(),
            ]
        )

    # ------------------------------------------------------------ every request

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who it is, what it may do, and an OpenAI error body for what goes wrong: in a stream, its last event."""
        began, path = time.monotonic(), request.rel_url.raw_path  # still escaped: nobody forges a line of the log
        given = request.headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request[REQUEST_KEY] = request_id
        failed: ApiError | None = None
        try:
            if request.path != "/health":
                self._authorize(request)
            response = await handler(request)
        except ApiError as error:
            failed = error
        except web.HTTPException as error:
            response = plain_error(error)
        except ChannelError:  # to a worker, which will be started again
            failed = ApiError(503, "a worker cannot be reached", code="unavailable", headers={"Retry-After": "5"})
        except (ConnectionError, asyncio.CancelledError):  # the client is gone
            logger.debug("%s %s %s left after %.3f s", request_id, request.method, path, time.monotonic() - began)
            raise
        except Exception as error:  # a bug: the client hears of it, the log says where, and neither says what was asked
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            kind, file = type(error).__name__, frame.f_code.co_filename
            logger.error("%s internal error %s at %s:%d", request_id, kind, file, line)
            failed = ApiError(500, "internal error", headers={"x-should-retry": "false"})
        if failed is not None:
            if request.writer.output_size:  # another head in the middle of a stream would be taken for text
                await request.writer.write_eof(b"data: " + failed.body() + b"\n\n")
                raise ConnectionResetError("an answer was under way")
            response = error_response(failed)
        sizes = request.content_length or 0, time.monotonic() - began
        logger.debug("%s %s %s %d, body %d, %.3f s", request_id, request.method, path, response.status, *sizes)
        return response

    def _authorize(self, request: web.Request) -> None:
        if not self._keys:
            if request.path.startswith("/admin"):
                same_origin(request)
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that the time says nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    # ------------------------------------------------------------ generation

    def _generates(self, endpoint: Endpoint) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            view = self.frontend.view
            if view.waiting >= view.max_waiting:  # before the body is read
                raise too_many("too many requests are waiting", self.metrics.retry_after())
            job = await endpoint.read(await _body(request), self.tokenizer, self.frontend.max_model_len)
            if job.request.model and job.request.model not in self.names:
                raise ApiError(404, f"there is no model {job.request.model!r}", "model", "model_not_found")
            if self.draining:  # here, since a body may take its time
                raise ApiError(503, "the server is shutting down", code="unavailable", headers={"Retry-After": "5"})
            request_id, began = request[REQUEST_KEY], time.monotonic()
            self.active += 1
            self.idle.clear()
            try:
                with Generation(
                    self.frontend, self.tokenizer, lambda: cut_off(request.transport), self.metrics, endpoint.param
                ) as generation:
                    asked, salt = job.request, self._salt(request, job)
                    session = asked.prompt_cache_key or ""
                    generation.submit(job.prompts, job.n, job.sampling, salt, asked.priority or 0, job.echo, session)
                    answer = Answer(endpoint, job, generation, request_id, self.model)
                    if job.request.stream:
                        return await answer.stream(request)
                    return web.Response(body=await answer.whole(), content_type="application/json")
            finally:
                if generation.choices:
                    logger.debug("%s ended: %s, %.3f s", request_id, generation, time.monotonic() - began)
                self.active -= 1
                if not self.active:
                    self.idle.set()

        return handle

    def _salt(self, request: web.Request, job: Job) -> str:
        """Each key has a prefix cache of its own: nobody learns from timings what another has asked."""
        key = request.headers.get("Authorization", "") if self._keys else ""
        salt = f"{key}/{job.request.cache_salt}" if key or job.request.cache_salt else ""
        return hashlib.sha256(salt.encode("utf-8", "surrogateescape")).hexdigest()[:16] if salt else ""

    # ------------------------------------------------------------ the rest

    async def health(self, _: web.Request) -> web.Response:
        """200 while the engine lives, makes progress, and has workers for both stages."""
        if reason := self.unhealthy():
            raise ApiError(503, reason, code="unavailable")
        return web.Response(body=b"{}", content_type="application/json")

    def unhealthy(self) -> str:
        """Why not, or nothing."""
        history, now = self.history, time.monotonic()
        if self.draining:
            return "the server is shutting down"
        if self.frontend.failure:
            return self.frontend.failure
        if (missing := history.missing()) and now - history.served_at > GRACE:
            return f"no worker takes {' or '.join(missing)}"
        if now - history.progress_at > STUCK_AFTER:
            return "requests wait, and no worker makes progress"
        for name in self.frontend.stalled(STUCK_AFTER):
            return f"{name} makes no progress"
        return ""

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def expose(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": self.metrics.content_type})

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "minidisagg",
            "root": self.frontend.model.model,
            "max_model_len": self.frontend.max_model_len,
        }

    async def models(self, _: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._card(name) for name in sorted(self.names)]})

    async def one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name not in self.names:
            raise ApiError(404, f"there is no model {name!r}", "model", "model_not_found")
        return json_response(self._card(name))

    async def openapi(self, _: web.Request) -> web.Response:
        return json_response(describe())

    async def tokenize(self, request: web.Request) -> web.Response:
        asked = decode_plain(await _body(request), TokenizeRequest)
        if asked.messages is not None:
            text = templated(self.tokenizer, asked.messages)
        elif asked.prompt is not None:
            text = asked.prompt
        else:
            raise ApiError(400, "prompt is missing", "prompt")
        special = asked.add_special_tokens if asked.messages is None else False
        tokens = await encode(self.tokenizer, text, special is not False)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": self.frontend.max_model_len})

    async def detokenize(self, request: web.Request) -> web.Response:
        asked = decode_plain(await _body(request), DetokenizeRequest)
        return json_response({"prompt": await asyncio.to_thread(self.tokenizer.decode, asked.tokens, False)})

    async def tokenizer_info(self, _: web.Request) -> web.Response:
        return json_response(
            {
                **self.tokenizer.special_tokens,
                "eos_token": self.tokenizer.eos_token,
                "eos_token_ids": self.tokenizer.eos_token_ids,
                "vocab_size": self.tokenizer.vocab_size,
                "chat_template": self.tokenizer.chat_template,
            }
        )


async def _name(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-request-id"] = request.get(REQUEST_KEY) or uuid.uuid4().hex


async def _body(request: web.Request) -> bytes:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the body uncompressed")
    try:
        async with asyncio.timeout(READ_TIMEOUT):
            return await request.read()
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
    except web.HTTPException:
        raise
    except (ValueError, web.RequestPayloadError):
        raise ApiError(400, "the body cannot be read") from None


# ---------------------------------------------------------------- its life


@contextlib.asynccontextmanager
async def listening(server: Server) -> Any:
    """The server on its port; yields the port. Raises `ValueError` where it is taken."""
    settings = server.settings
    runner = make_runner(server.app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise ValueError(f"cannot listen on {at(settings.host, settings.port)}: {error.strerror}") from None
        log = asyncio.get_running_loop().create_task(_log_throughput(server))
        try:
            yield runner.addresses[0][1]
        finally:
            log.cancel()
    finally:
        await runner.cleanup()


def check_port(settings: ServerSettings) -> None:
    """Raises `ValueError` where the port is taken, or the host is not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ValueError(f"cannot listen on {at(settings.host, settings.port)}: {error.strerror}") from None


async def drain(server: Server) -> None:
    """No new requests; those that run may end."""
    server.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(server.settings.drain_timeout):
            await server.idle.wait()


async def _log_throughput(server: Server) -> None:
    """The line that people know, while there is something to say."""
    before, quiet = server.metrics.totals(), True
    while True:
        await asyncio.sleep(LOG_EVERY)
        now = server.metrics.totals()
        load = server.metrics.load()
        busy = now != before or load.running + load.waiting > 0
        if busy or not quiet:
            logger.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
                "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                (now[0] - before[0]) / LOG_EVERY,
                (now[1] - before[1]) / LOG_EVERY,
                load.running,
                load.waiting,
                100 * load.kv_usage,
                100 * load.hit_rate,
            )
        before, quiet = now, not busy

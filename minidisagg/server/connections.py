"""The server's connections: what they hold back, when they are cut off, and what is said ahead of any handler."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import uuid
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from minidisagg.server.protocol import ApiError

MAX_HEADER = 16 << 10  # bytes of one header, and of the request line
SEND_BUFFER = 256 << 10  # bytes that wait for a client in the kernel
WRITE_TIMEOUT = 30.0  # seconds in which a client must take something of what it is sent
IDLE_TIMEOUT = 75.0  # seconds that a connection may stay silent between requests
logger = logging.getLogger("minidisagg.server")


def make_runner(app: web.Application) -> web.AppRunner:
    """aiohttp's runner, with this module's connections and limits."""
    return _Runner(
        app,
        access_log=None,
        keepalive_timeout=IDLE_TIMEOUT,
        max_line_size=MAX_HEADER,
        max_field_size=MAX_HEADER,
        handler_cancellation=True,
        shutdown_timeout=2.0,
        auto_decompress=False,
    )


def json_response(value: Any) -> web.Response:
    """200, with the value as JSON."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def error_response(error: ApiError) -> web.Response:
    """OpenAI's error body."""
    return web.Response(body=error.body(), status=error.status, headers=error.headers, content_type="application/json")


def plain_error(error: web.HTTPException) -> web.Response:
    """What aiohttp says by itself, as OpenAI's error body."""
    headers = {key: value for key, value in error.headers.items() if key in ("Allow", "Location")}
    reason = error.reason.lower() if error.status != 404 else "there is nothing here"
    return error_response(ApiError(error.status, reason, headers=headers))


def cut_off(transport: asyncio.Transport | None) -> None:
    """A client that has left too much unread, with a reset: what it has not taken is dropped, by the kernel too.

    If nothing waits in its socket, it is this process that is late.
    """
    if transport is not None and transport.get_write_buffer_size():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


class _Connection(RequestHandler):
    """aiohttp's, with an OpenAI error body where the bytes are no HTTP, and nothing of them in the log.

    Whatever a client is sent, it is cut off if it takes nothing of it for `WRITE_TIMEOUT`: to wait in `write` would
    not do, since aiohttp writes whole bodies after the handler, and to close a connection waits for the client too.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing is paused whenever the socket is full
        # What the kernel takes ahead of the client is bounded too, and the smaller, the sooner it shows that some went.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._wire = transport  # aiohttp forgets it when it begins to close it

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look(-1)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch.cancel()

    def _look(self, before: int) -> None:
        left = self._wire.get_write_buffer_size()
        if left == before:
            cut_off(self._wire)
        else:
            self._watch = self._loop.call_later(WRITE_TIMEOUT, self._look, left)

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way")
        logger.info("bad request from %s: %s", request.remote, type(exc).__name__)
        reason = "the request is not valid HTTP" if status < 500 else "internal error"
        response = error_response(ApiError(status, reason, headers={"x-request-id": uuid.uuid4().hex}))
        response.force_close()
        return response

    async def finish_response(self, request: Any, resp: Any, start_time: float | None) -> Any:
        """What aiohttp answers by itself, ahead of any handler."""
        if isinstance(resp, web.HTTPException):
            resp = plain_error(resp)
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """No traceback: it could hold what was asked."""
        logger.error("a connection failed: %s", type(kwargs.get("exc_info")).__name__)


class _Connections(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Connections(made.request_handler, request_factory=made.request_factory, **self._kwargs)

"""A server in a thread of its own, over a fake or a real engine, so that blocking clients can be tested."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from fake_engine import fake_engine

from minidisagg.address import server_url
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.frontend import Frontend
from minidisagg.server.app import Server, ServerSettings, listening

T = TypeVar("T")


@dataclass
class Serving:
    """A running server. `call` runs a coroutine on its loop."""

    url: str
    server: Server
    loop: asyncio.AbstractEventLoop

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    @property
    def frontend(self) -> Any:
        return self.server.frontend


@contextlib.asynccontextmanager
async def real_engine(model: ModelSettings, cluster: ClusterSettings, run: RunSettings) -> AsyncIterator[Frontend]:
    """With worker processes."""
    async with await Frontend.start(model, cluster, run) as frontend:
        yield frontend


@contextlib.contextmanager
def serving(
    engine: Callable[[], AbstractAsyncContextManager[Frontend]] = fake_engine, **settings: Any
) -> Iterator[Serving]:
    """A server on a free port of loopback; `settings` are those of `ServerSettings`."""
    started: asyncio.Future[Serving] | Any = None
    ready, failed = threading.Event(), []

    async def main() -> None:
        nonlocal started
        async with engine() as frontend:
            server = Server(frontend, Tokenizer.load(frontend.model.model), ServerSettings(**{"port": 0, **settings}))
            async with listening(server) as port:
                stop = asyncio.Event()
                started = Serving(server_url(server.settings.host, port), server, asyncio.get_running_loop()), stop
                ready.set()
                await stop.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(120)
    if failed:
        raise failed[0]
    served, stop = started
    try:
        yield served
    finally:
        served.loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        if failed:
            raise failed[0]

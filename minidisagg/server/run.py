"""`minidisagg serve`: from the flags to a listening server, and from a signal to nothing left."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys

import click

from minidisagg.address import server_url
from minidisagg.core.router import RouterSpec
from minidisagg.model.pull import ensure
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.options import Engine
from minidisagg.runtime.frontend import Frontend
from minidisagg.server.app import Server, ServerSettings, check_port, drain, listening
from minidisagg.server.watch import watch
from minidisagg.starting import StartBars


class _Stderr:
    """What stands for it now: while bars are drawn, their console, so that a line of the log stands above them."""

    def write(self, text: str) -> None:
        """As a stream does."""
        sys.stderr.write(text)


def serve(
    engine: Engine, settings: ServerSettings, limits: tuple[int, int], verbose: bool, watched: bool = False
) -> None:
    """Serve until SIGINT or SIGTERM: then no new requests, those that run may end, and a second signal does not wait.

    `limits`: requests and prompt tokens that may wait. `watched`: the policy's file is taken again when it is saved.
    Raises `ValueError` and `StartError` in one line.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=_Stderr(),
    )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(engine, settings, limits, watched))


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # it has no build for this platform
        return None
    return uvloop.Loop


async def _serve(engine: Engine, settings: ServerSettings, limits: tuple[int, int], watched: bool) -> None:
    check_port(settings)  # before minutes of loading
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    ensure(engine.model.model, lambda line: click.echo(line, err=True))
    tokenizer = Tokenizer.load(engine.model.model)
    cluster = engine.cluster
    click.echo(f"starting {engine.model.model}, {cluster.mode}, {len(cluster.roles())} worker(s) …", err=True)
    spec = RouterSpec(max_waiting=limits[0], max_waiting_tokens=limits[1], seed=engine.run.seed)
    with StartBars() as bars:
        frontend = await Frontend.start(*engine, spec, on_starting=bars.tell)
    async with frontend:
        server = Server(frontend, tokenizer, settings)
        async with listening(server) as port:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            watching = asyncio.create_task(watch(frontend, cluster.policy)) if watched else None
            gc.freeze()  # modules and tokenizer: a full collection of them would stop all streams for some 40 ms
            click.echo(f"serving on {server_url(settings.host, port)}/v1  (Ctrl-C stops)", err=True)
            await stop.wait()
            stop.clear()
            if watching is not None:
                watching.cancel()
            click.echo("no new requests; waiting for those that run (again: stop at once)", err=True)
            again = asyncio.create_task(stop.wait())
            ended = asyncio.create_task(drain(server))
            await asyncio.wait([again, ended], return_when=asyncio.FIRST_COMPLETED)
            again.cancel()
            ended.cancel()

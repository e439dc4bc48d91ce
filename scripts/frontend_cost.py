"""What the front end costs: tokens a second through router, channel, detokenizer and SSE, and microseconds a token.

    python scripts/frontend_cost.py --connections 64 --seconds 10

Three processes: the server on the first core, and on the second a worker that makes tokens up behind the real channel
and a client that reads the streams. The second run counts the time in each part, which costs some speed itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import uvloop

PARTS = (  # (what, module, class or None, function)
    ("channel: read a message", "minidisagg.core.frames", None, "decode"),
    ("router", "minidisagg.core.router", "Router", "on_message"),
    ("metrics", "minidisagg.server.metrics", "Metrics", "on_emit"),
    ("detokenizer, stop strings", "minidisagg.runtime.output", "OutputProcessor", "push"),
    ("JSON of the event", "minidisagg.server.completions", "Answer", "_event"),
)


def pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def worker(name: str, epoch: int, path: str, vocab_size: int, limit: int) -> None:
    from fake_engine import FakeWorker

    pin(1)
    fake = FakeWorker(name, vocab_size=vocab_size, max_model_len=limit, epoch=epoch)
    uvloop.run(fake.run(path))


def server(parts: bool, port: Any) -> None:
    """The real server on core 0; `port` gets its port, and at the end what it used."""
    pin(0)
    uvloop.run(_serve(parts, port))


async def _serve(parts: bool, pipe: Any) -> None:
    import fake_engine

    from minidisagg.config import ClusterSettings, ModelSettings, RunSettings
    from minidisagg.model.tokenizer import Tokenizer
    from minidisagg.server.app import Server, ServerSettings, listening

    spent = _count_parts() if parts else {}

    class Apart(fake_engine.FakeSupervisor):
        """Starts the worker as a process."""

        def _start(self, name: str) -> None:
            self.workers[name].epoch += 1
            fake = self.workers[name]
            arguments = (name, fake.epoch, self._path, fake.vocab_size, fake.max_model_len)
            self.process = get_context("spawn").Process(target=worker, args=arguments, daemon=True)
            self.process.start()

    fake_engine.FakeSupervisor = Apart  # type: ignore[misc]
    model = ModelSettings(model=fake_engine.MODEL)
    frontend = await fake_engine.FakeFrontend.start(
        model, ClusterSettings(prefill_workers=1, decode_workers=0), RunSettings()
    )
    async with frontend:
        async with listening(Server(frontend, Tokenizer.load(model.model), ServerSettings(port=0))) as port:
            pipe.send(port)
            begun = time.process_time()
            await asyncio.to_thread(pipe.recv)
            pipe.send((time.process_time() - begun, dict(spent)))
            await asyncio.to_thread(pipe.recv)
        frontend.supervisor.process.terminate()  # type: ignore[attr-defined]


def _count_parts() -> dict[str, float]:
    """Wrap each part so that its time, less that of parts inside it, is added up."""
    import importlib

    spent: dict[str, float] = defaultdict(float)
    inner = [0.0]

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began, outer = time.perf_counter(), inner[0]
            inner[0] = 0.0
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                spent[what] += took - inner[0]
                inner[0] = outer + took

        return call

    for what, module_name, owner, name in PARTS:
        module = importlib.import_module(module_name)
        where = getattr(module, owner) if owner else module
        wrapped = timed(what, getattr(where, name))
        setattr(where, name, wrapped)
        if owner is None:  # imported by name elsewhere
            importlib.import_module("minidisagg.runtime.channel").decode = wrapped  # type: ignore[attr-defined]
    return spent


async def stream(port: int, until: float, tokens: int, counts: list[int]) -> None:
    """Requests one after the other on one connection, read as bytes: the client must not be what is measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": [1, 2, 3, 4], "max_tokens": tokens, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    while time.monotonic() < until:
        writer.write(head + body)
        if b" 200 " not in (answer := await reader.readuntil(b"\r\n\r\n")):
            raise ConnectionError((answer + await reader.read(1 << 16)).decode())
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            if not data:
                raise ConnectionError("the server closed the connection in mid-answer")
            counts[0] += data.count(b"data: {")
            tail = (tail + data)[-8:]
    writer.close()


def measure(connections: int, seconds: float, tokens: int, parts: bool) -> dict[str, Any]:
    mine, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=server, args=(parts, theirs))
    process.start()
    port = mine.recv()
    pin(1)
    counts = [0]

    async def load() -> float:
        began = time.monotonic()
        await asyncio.gather(*(stream(port, began + seconds, tokens, counts) for _ in range(connections)))
        return time.monotonic() - began

    try:
        took = uvloop.run(load())
        mine.send("end")
        cpu, spent = mine.recv()
        mine.send("bye")
        process.join()
    finally:
        process.terminate()  # else it would outlive a client that fails
    return {
        "tokens_per_s": counts[0] / took, "cpu_us_per_token": 1e6 * cpu / counts[0], "server_core_busy": cpu / took,
        "parts_us": {what: 1e6 * spent.get(what, 0.0) / counts[0] for what, *_ in PARTS},
    }  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=512, help="of each request")
    arguments = parser.parse_args()
    plain = measure(arguments.connections, arguments.seconds, arguments.tokens, parts=False)
    counted = measure(arguments.connections, arguments.seconds, arguments.tokens, parts=True)
    out = sys.stdout.write
    out(f"{plain['tokens_per_s']:,.0f} tokens/s over {arguments.connections} connections, ")
    out(f"{plain['cpu_us_per_token']:.1f} µs of CPU a token, server's core {plain['server_core_busy']:.0%} busy\n")
    for what, value in counted["parts_us"].items():
        out(f"  {value:6.1f} µs  {what}\n")
    rest = counted["cpu_us_per_token"] - sum(counted["parts_us"].values())
    out(f"  {rest:6.1f} µs  event loop, queue, socket (and the counting)\n")
    out(json.dumps({"plain": plain, "counted": counted}) + "\n")


if __name__ == "__main__":
    main()

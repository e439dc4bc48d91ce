"""A load to look at: Poisson arrivals of random prompts, whose answers are streamed and thrown away."""

from __future__ import annotations

import asyncio
import contextlib
import random

import aiohttp
import msgspec

PROMPT, OUTPUT = 256, 64  # tokens
MAX_IN_FLIGHT = 256  # requests; arrivals beyond that are left out


class TokenizerInfo(msgspec.Struct):
    """Of the server's answer, what prompts are made from."""

    vocab_size: int


class DemoLoad:
    """Sends to `/v1/completions` until cancelled. `session` knows the server's address and key."""

    def __init__(self, session: aiohttp.ClientSession, rate: float) -> None:
        self.rate = rate  # requests per second, now
        self.sent = self.failed = self.skipped = 0
        self._session = session
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._vocab_size = 0

    @property
    def trouble(self) -> str:
        """What became of the requests that were not answered."""
        counts = (self.failed, "failed"), (self.skipped, "left out")
        return ", ".join(f"{count} {what}" for count, what in counts if count)

    def set_rate(self, rate: float) -> None:
        """From now on; a request that is due at the old rate comes earlier or later in proportion."""
        self.rate = rate
        self._changed.set()

    async def run(self) -> None:
        """Draws gaps of a process of rate one, and lets its time pass at the wanted rate."""
        loop, numbers = asyncio.get_running_loop(), random.Random(0)
        gap, began = 0.0, loop.time()
        try:
            while True:
                gap += numbers.expovariate(1.0)  # what was overslept counts: the rate holds on a busy machine too
                while gap > 0:
                    rate = self.rate
                    self._changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(gap / rate if rate else None):
                            await self._changed.wait()
                    now = loop.time()
                    gap, began = gap - (now - began) * rate, now
                self._send(numbers)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _send(self, numbers: random.Random) -> None:
        if len(self._running) >= MAX_IN_FLIGHT:
            self.skipped += 1
            return
        self.sent += 1
        task = asyncio.get_running_loop().create_task(self._request([numbers.random() for _ in range(PROMPT)]))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _request(self, prompt: list[float]) -> None:
        try:
            if not self._vocab_size:
                async with self._session.get("/tokenizer_info") as answer:
                    answer.raise_for_status()
                    self._vocab_size = msgspec.json.decode(await answer.read(), type=TokenizerInfo).vocab_size
            body = {
                "prompt": [int(share * self._vocab_size) for share in prompt],
                "max_tokens": OUTPUT,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
            }
            tail = b""
            async with self._session.post("/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for data in answer.content.iter_any():
                    tail = (tail + data)[-32:]
            self.failed += b"[DONE]" not in tail
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, ValueError):  # counted, and shown
            self.failed += 1

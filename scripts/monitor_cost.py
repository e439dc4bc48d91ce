"""What watching costs: the server's throughput with and without a monitor on its event stream, in turn.

    python scripts/monitor_cost.py --windows 24 --seconds 20 --out monitor-cost.json
    python scripts/monitor_cost.py -- --prefill-workers 1 --decode-workers 0 --prefill cpus=0

Starts `minidisagg serve` (what follows -- are its flags; without them, a prefill and a decode worker on a core each,
which the front end and the monitor share with them), keeps eight streams going, and counts output tokens per second in
windows of A B B A: without the monitor, and with `minidisagg monitor` drawing 120 x 40 at 10 Hz in a pseudo-terminal.
Prints the ratio of each pair's windows, their mean with a 95 % interval (Student's t over pairs of neighbours), and the
monitor's own share of a core; as JSON, with the command and the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import math
import os
import pty
import random
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from minidisagg.measure.machine import command_line, machine

STREAMS, PROMPT, OUTPUT = 8, 64, 192  # tokens
SETTLE = 5.0  # seconds before a window: the monitor has loaded its modules, or ended
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 7: 2.36, 9: 2.26, 11: 2.20, 14: 2.14, 19: 2.09}


class Load:
    """Streams without a pause; `tokens` counts what came."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session, self.tokens, self.rng = session, 0, random.Random(0)

    async def stream(self) -> None:
        while True:
            prompt = [self.rng.randrange(1000, 40000) for _ in range(PROMPT)]
            body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "stream": True, "temperature": 0}
            async with self.session.post("/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    self.tokens += line.startswith(b"data: {")


@contextlib.contextmanager
def monitor(url: str) -> Iterator[subprocess.Popen[bytes]]:
    """The real program in a terminal that somebody reads."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "minidisagg", "monitor", url], stdin=slave, stdout=slave, stderr=slave,
        env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(slave)

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while os.read(master, 1 << 16):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        reader.join()
        os.close(master)


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(arguments: Namespace, url: str) -> dict[str, object]:
    windows: list[tuple[bool, float]] = []
    shares: list[float] = []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        load = Load(session)
        streams = [asyncio.create_task(load.stream()) for _ in range(STREAMS)]
        await asyncio.sleep(5.0)
        for n in range(arguments.windows):
            watched = n % 4 in (1, 2)
            with monitor(url) if watched else contextlib.nullcontext() as process:
                await asyncio.sleep(SETTLE)
                began, tokens, used = time.monotonic(), load.tokens, cpu_seconds(process.pid) if process else 0.0
                await asyncio.sleep(arguments.seconds)
                seconds = time.monotonic() - began
                if process:
                    shares.append((cpu_seconds(process.pid) - used) / seconds)
                windows.append((watched, (load.tokens - tokens) / seconds))
            sys.stdout.write(f"{'monitor' if watched else 'nobody '}  {windows[-1][1]:.1f} tokens/s\n")
            sys.stdout.flush()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    pairs = [sorted(windows[n : n + 2]) for n in range(0, len(windows) - 1, 2)]  # without, with
    logs = [math.log(watched / alone) for (_, alone), (_, watched) in pairs]
    t = T95[max(d for d in T95 if d < len(logs))]
    mean, half = statistics.mean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "command": command_line(), "machine": machine(), "model": arguments.model, "serve": arguments.serve,
        "streams": STREAMS, "prompt_tokens": PROMPT, "output_tokens": OUTPUT, "window_seconds": arguments.seconds,
        "ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half),
        "pairs": [math.exp(value) for value in logs], "monitor_cores": statistics.mean(shares),
        "tokens_per_second": [{"monitor": watched, "rate": rate} for watched, rate in windows],
    }  # fmt: skip


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("serve", nargs="*", help="flags of minidisagg serve, after --")
    arguments = parser.parse_args()
    if arguments.windows < 4:
        parser.error("at least four windows, which are two pairs")
    arguments.serve = arguments.serve or ["--mode", "disagg", "--prefill-workers", "1", "--decode-workers", "1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "minidisagg", "serve", arguments.model, "--port", str(arguments.port), *arguments.serve],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        if not any("serving on" in line for line in server.stderr):
            sys.stderr.write("the server did not start\n")
            return 1
        threading.Thread(target=server.stderr.read, daemon=True).start()
        result = asyncio.run(run(arguments, f"http://127.0.0.1:{arguments.port}"))
    finally:
        server.terminate()
        server.wait()
    sys.stdout.write("throughput with / without {ratio:.3f} [{low:.3f}, {high:.3f}]\n".format(**result))
    sys.stdout.write(f"the monitor uses {100 * result['monitor_cores']:.1f} % of a core\n")  # type: ignore[operator]
    sys.stdout.write(json.dumps(result) + "\n")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What several GPUs of one host do together: links, the handoff, load.

    scripts/multi_gpu.py --part links                       nccl and cuda_ipc by size, against one raw copy
    scripts/multi_gpu.py --part handoff                     what it adds to the second token, unloaded
    scripts/multi_gpu.py --part load --out multi.json       two colocated workers against 1P1D

Each part takes less than nine minutes, appends what it saw to one JSON, and ends with a short table.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import Piece
from minidisagg.core.tracked import Emit
from minidisagg.model.dummy import SHAPES
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.kv_cache import KVCache
from minidisagg.transfer.kinds import ONE_SIDED, make_link
from minidisagg.transfer.links import Link, LinkHost, LinkSetup

PAGE = 64
SHAPE = "llama-8b"
PAGES = 256  # of each cache that only moves pages: 2 GiB
SIZES = {1: (1, 4), 4: (1, 16), 16: (2, 32), 64: (8, 32), 256: (32, 32)}  # MB → pages, layers
KINDS = ("nccl", "cuda_ipc")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------- links


@dataclass
class End:
    """One end of a link, in this process."""

    link: Link
    woken: threading.Event
    seq: int = 0

    def start(self, send: bool, pages: list[int], remote: list[int], layers: int) -> None:
        """The next piece."""
        self.link.start(Piece("peer", 1, self.seq, send, "r", 0, pages, remote, len(pages), (0, layers)))
        self.seq += 1

    def wait(self, count: int) -> None:
        """Until so many pieces have ended; raises if one has failed."""
        deadline = time.monotonic() + 30
        while count:
            self.woken.wait(0.1)
            self.woken.clear()
            for done in self.link.poll():
                if not done.ok:
                    raise RuntimeError(done.error)
                count -= 1
            if time.monotonic() > deadline:
                raise RuntimeError(f"{count} pieces do not end")


def make_end(kind: str, device: str, source: bool, run_dir: str) -> tuple[End, KVCache]:
    torch.cuda.set_device(device)
    cache = KVCache(SHAPES[SHAPE], PAGES, PAGE, torch.bfloat16, torch.device(device))
    cache.data.normal_()
    host = LinkHost(kind, cache.data, None, Path(run_dir), 10.0)
    woken = threading.Event()
    return End(make_link(LinkSetup(host, source, "a-b", 1, woken.set)), woken), cache


def destination(kind: str, device: str, run_dir: str, pipe: Connection) -> None:
    """The peer's process: receives what it is told to."""
    end, cache = make_end(kind, device, False, run_dir)
    pipe.send(end.link.endpoint())
    end.link.connect(end.link.endpoint())
    while (order := pipe.recv()) is not None:
        if order == "sum":
            torch.cuda.synchronize()
            pipe.send(cache.data.float().sum(dim=(3, 4, 5)).cpu())
            continue
        count, pages, layers = order
        for _ in range(count):
            end.start(False, pages, [], layers)
        pipe.send("started")
        end.wait(count)
        pipe.send("done")
    end.link.abort(False)


def links_part(_: Sequence[int]) -> list[dict[str, Any]]:
    """Gigabytes per second: one piece at a time, and several in flight, to scattered pages."""
    rows, devices = [], (f"cuda:{0}", f"cuda:{torch.cuda.device_count() - 1}")
    raw = {size: raw_copy(size, *devices) for size in SIZES}
    context = multiprocessing.get_context("spawn")
    for kind in KINDS:
        if kind == "nccl" and devices[0] == devices[1]:
            continue
        with TemporaryDirectory(dir="/tmp") as run_dir:
            pipe, theirs = context.Pipe()
            peer = context.Process(target=destination, args=(kind, devices[1], run_dir, theirs), daemon=True)
            peer.start()
            end, cache = make_end(kind, devices[0], True, run_dir)
            began = time.perf_counter()
            end.link.connect(pipe.recv())
            say(f"{kind}: connected in {time.perf_counter() - began:.2f} s")
            rng = random.Random(0)
            for size, (count, layers) in SIZES.items():
                mine, remote = rng.sample(range(PAGES), count), rng.sample(range(PAGES), count)
                rates = {}
                for what, flying in (("one", 1), ("many", max(16, 2048 // size))):
                    took = []
                    for _ in range(6):
                        if kind not in ONE_SIDED:
                            pipe.send((flying, remote, layers))
                            pipe.recv()
                        began = time.perf_counter()
                        for _ in range(flying):
                            end.start(True, mine, remote, layers)
                        end.wait(flying)
                        if kind not in ONE_SIDED:
                            pipe.recv()
                        took.append(time.perf_counter() - began)
                    rates[what] = flying * size * 2**20 / min(took[1:]) / 1e9
                pipe.send("sum")
                arrived = pipe.recv()[:layers, :, remote]
                right = torch.equal(arrived, cache.data.float().sum(dim=(3, 4, 5)).cpu()[:layers, :, mine])
                seen = f"{rates['one']:.0f} alone, {rates['many']:.0f} GB/s of {raw[size]:.0f}, right: {right}"
                say(f"{kind} {size} MB: {seen}")
                rows.append({"kind": kind, "MB": size, "raw": raw[size], "right": right, **rates})
            pipe.send(None)
            end.link.abort(False)
            peer.join(20)
    table = Table("link", "MB", "one at a time, GB/s", "many in flight, GB/s", "one raw copy", "share", "bytes right")
    for r in rows:
        cells = [f"{r[rate]:.0f}" for rate in ("one", "many", "raw")]
        table.add_row(r["kind"], str(r["MB"]), *cells, f"{r['many'] / r['raw']:.2f}", str(r["right"]))
    Console(width=120).print(table)
    return rows


def raw_copy(size: int, source: str, target: str) -> float:
    """Gigabytes per second of one `copy_`, several in a row."""
    a = torch.randn(size << 18, device=source)
    b = torch.empty_like(a, device=target)
    best = 0.0
    for _ in range(5):
        for device in {source, target}:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(8):
            b.copy_(a, non_blocking=True)
        for device in {source, target}:
            torch.cuda.synchronize(device)
        best = max(best, 8 * a.nbytes / (time.perf_counter() - began) / 1e9)
    return best


# ---------------------------------------------------------------- the handoff


def cluster(mode: str, link: str = "auto", granularity: str = "auto", workers: int = 1) -> ClusterSettings:
    """Workers of one GPU each."""
    worker = WorkerSettings(
        device="cuda", dtype="bfloat16", kv_cache_memory=24 << 30, max_num_seqs=64, max_num_batched_tokens=8192
    )
    return ClusterSettings(
        mode=mode, prefill_workers=workers, decode_workers=workers if mode == "disagg" else 0, prefill=worker,  # type: ignore[arg-type]
        decode=worker, link=link, transfer_granularity=granularity,
    )  # fmt: skip


async def unloaded(settings: ClusterSettings, tokens: int, requests: int) -> dict[str, float]:
    """Medians in ms of requests one at a time: first token, second token, and between tokens after that."""
    rng, vocab = random.Random(1), SHAPES[SHAPE].vocab_size
    model = ModelSettings(model=f"dummy:{SHAPE}", block_size=PAGE, max_model_len=32768, prefix_caching=False)
    seen: dict[str, list[float]] = {"ttft": [], "second": [], "itl": []}
    async with await Frontend.start(model, settings, RunSettings()) as frontend:
        for number in range(requests + 2):
            at, ended = list[float](), asyncio.Event()

            def listen(emit: Emit, now: float) -> None:
                at.extend([now] * len(emit.tokens))  # noqa: B023
                if emit.finish:
                    ended.set()  # noqa: B023

            prompt = [rng.randrange(vocab) for _ in range(tokens)]
            began = time.monotonic()
            frontend.submit(prompt, SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True), listen)
            await ended.wait()
            if number >= 2:
                seen["ttft"].append(at[0] - began)
                seen["second"].append(at[1] - began)
                seen["itl"].append((at[-1] - at[1]) / (len(at) - 2))
            await asyncio.sleep(0.02)
        stats = await frontend.fresh_stats()
        links = [link for one in stats.values() for link in one.links]
    medians = {name: statistics.median(values) * 1e3 for name, values in seen.items()}
    if links:
        medians["GB/s"] = links[0].bytes / links[0].seconds / 1e9
    return medians


def handoff_part(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """8B: what disaggregation adds to the second token, request by request."""
    rows = []
    for tokens in lengths:
        base = asyncio.run(unloaded(cluster("colocated"), tokens, 10))
        rows.append({"tokens": tokens, "link": "colocated", "granularity": "", **base, "adds": 0.0})
        say(f"{rows[-1]}")
        for link, granularity in (
            ("cuda_ipc", "request"), ("cuda_ipc", "layers:8"), ("cuda_ipc", "auto"), ("nccl", "request"),
            ("nccl", "layers:8"),
        ):  # fmt: skip
            found = asyncio.run(unloaded(cluster("disagg", link, granularity), tokens, 10))
            adds = found["second"] - base["second"]
            rows.append({"tokens": tokens, "link": link, "granularity": granularity, **found, "adds": adds})
            say(f"{rows[-1]}")
    table = Table("tokens", "link", "granularity", "TTFT, ms", "2nd token", "ITL", "handoff adds", "GB/s of a piece")
    for r in rows:
        cells = [f"{r[k]:.2f}" for k in ("ttft", "second", "itl", "adds")]
        table.add_row(str(r["tokens"]), r["link"], r["granularity"], *cells, f"{r.get('GB/s', 0):.0f}")
    Console(width=120).print(table)
    return rows


PARTS = {"links": links_part, "handoff": handoff_part}


@click.command(help=__doc__)
@click.option("--part", type=click.Choice(list(PARTS)), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("multi_gpu.json"), show_default=True)
@click.option("--tokens", type=int, multiple=True, default=(2000, 16000), show_default=True, help="of prompts")
def main(part: str, out: Path, tokens: tuple[int, ...]) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this measures GPUs, and torch sees none")
    began = time.time()
    rows = PARTS[part](tokens)
    seen = json.loads(out.read_text()) if out.exists() else []
    card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    seen.append({"part": part, "cards": card, "seconds": round(time.time() - began), "rows": rows})
    out.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()

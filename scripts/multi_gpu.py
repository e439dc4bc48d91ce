"""What several GPUs of one host do together: links, the handoff, decoding beside it, load.

    scripts/multi_gpu.py --part links                       nccl and cuda_ipc by size, against one raw copy
    scripts/multi_gpu.py --part handoff                     what it adds to the second token, unloaded
    scripts/multi_gpu.py --part beside                      decode steps while KV arrives, against undisturbed ones
    scripts/multi_gpu.py --part load --out multi.json       two colocated workers against 1P1D at 10 requests/s
    scripts/multi_gpu.py --part sarathi                     the same load with chunks of several sizes beside it
    scripts/multi_gpu.py --part goodput                     the rate at which 90 % meet two pairs of SLOs
    scripts/multi_gpu.py --part kills --link nccl           60 s of traffic, every 10 s a SIGKILL: is a request lost?
    scripts/multi_gpu.py --part four                        2P2D and 3P1D against four colocated workers
    scripts/multi_gpu.py --part eight --dry-run             4P4D and 6P2D against eight: what would be run

Each part takes less than nine minutes, appends what it saw to one JSON, and ends with a short table.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
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
KINDS = ("cuda_ipc", "nccl")


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

    def start(self, send: bool, pages: list[int], remote: list[int], layers: tuple[int, int]) -> None:
        """The next piece."""
        self.link.start(Piece("peer", 1, self.seq, send, "r", 0, pages, remote, len(pages), layers))
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


def make_end(kind: str, device: str, source: bool, run_dir: str, cache: KVCache | None = None) -> tuple[End, KVCache]:
    torch.cuda.set_device(device)
    if cache is None:
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
            end.start(False, pages, [], (0, layers))
        pipe.send("started")
        end.wait(count)
        pipe.send("done")
    end.link.abort(False)


@dataclass(frozen=True)
class Asked:
    """The command line."""

    tokens: tuple[int, ...]
    links: tuple[str, ...]
    dry_run: bool

    @property
    def link(self) -> str:
        """Of the parts that take one."""
        return self.links[0]


def links_part(asked: Asked) -> list[dict[str, Any]]:
    """Gigabytes per second: one piece at a time, and several in flight, to scattered pages."""
    rows, devices = list[dict[str, Any]](), (f"cuda:{0}", f"cuda:{torch.cuda.device_count() - 1}")
    raw = {size: raw_copy(size, *devices) for size in SIZES}
    context = multiprocessing.get_context("spawn")
    for kind in asked.links:
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
                for what, flying in (("one", 1), ("many", min(2048, max(16, 8192 // size)))):
                    took = []
                    for _ in range(6):
                        if kind not in ONE_SIDED:
                            pipe.send((flying, remote, layers))
                            pipe.recv()
                        began = time.perf_counter()
                        for _ in range(flying):
                            end.start(True, mine, remote, (0, layers))
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


# ---------------------------------------------------------------- decoding while KV arrives

GROUPS = [(first, first + 8) for first in range(0, 32, 8)]  # layers, as `layers:8` cuts them
BUSY = 32  # sequences that decode, of 2,048 tokens each
ARRIVING = list(range(32))  # pages of the prompt that arrives: 2,048 tokens, 268 MB


def busy_destination(kind: str, device: str, run_dir: str, pipe: Connection) -> None:
    """The peer's process: decodes while its link receives. Answers with milliseconds a step."""
    from bench_gpu import decode_ms, make_device  # which needs Triton, and this script's --dry-run does not

    torch.cuda.set_device(device)
    made = make_device(SHAPE, BUSY * 36 + 200, BUSY, 4096)
    end, _ = make_end(kind, device, False, run_dir, made.cache)
    pipe.send(end.link.endpoint())
    end.link.connect(end.link.endpoint())
    while (prompts := pipe.recv()) is not None:
        for _ in range(prompts if kind not in ONE_SIDED else 0):
            for layers in GROUPS:
                end.start(False, ARRIVING, [], layers)
        pipe.send("started")
        pipe.send(decode_ms(made, BUSY, 2048, 100))
        if kind not in ONE_SIDED:
            end.wait(prompts * len(GROUPS))
        pipe.send("done")
    end.link.abort(False)


def beside_part(asked: Asked) -> list[dict[str, Any]]:
    """Steps of a batch of 32 while prompts of 2,048 tokens arrive in groups of layers, ten a second and flat out."""
    rows, context = list[dict[str, Any]](), multiprocessing.get_context("spawn")
    for kind in asked.links:
        with TemporaryDirectory(dir="/tmp") as run_dir:
            pipe, theirs = context.Pipe()
            last = f"cuda:{torch.cuda.device_count() - 1}"
            peer = context.Process(target=busy_destination, args=(kind, last, run_dir, theirs), daemon=True)
            peer.start()
            end, _ = make_end(kind, "cuda:0", True, run_dir)
            end.link.connect(pipe.recv())
            for repeat in range(4):  # the first brings everything up
                for what, prompts, pause in ("alone", 0, 0.0), ("10/s", 8, 0.1), ("flat out", 500, 0.0):
                    pipe.send(prompts)
                    pipe.recv()
                    began = time.perf_counter()
                    for _ in range(prompts):
                        for layers in GROUPS:
                            end.start(True, ARRIVING, ARRIVING, layers)
                        time.sleep(pause)
                    end.wait(prompts * len(GROUPS))
                    took = time.perf_counter() - began
                    step = pipe.recv()
                    pipe.recv()
                    if repeat:
                        rows.append({"link": kind, "KV": what, "step_ms": step, "GB/s": prompts * 0.268 / took})
                        say(f"{rows[-1]}")
            pipe.send(None)
            end.link.abort(False)
            peer.join(20)
    table = Table("link", "KV arrives", "GB/s", "ms a step", "against alone")
    for kind in asked.links:
        found: dict[str, list[dict[str, Any]]] = {}
        for r in rows:
            if r["link"] == kind:
                found.setdefault(r["KV"], []).append(r)
        alone = statistics.median(r["step_ms"] for r in found["alone"])
        for what, some in found.items():
            step, rate = (statistics.median(r[key] for r in some) for key in ("step_ms", "GB/s"))
            table.add_row(kind, what, f"{rate:.1f}", f"{step:.3f}", f"{step / alone:.3f}")
    Console(width=120).print(table)
    return rows


# ---------------------------------------------------------------- the handoff


def cluster(
    mode: str, link: str = "auto", granularity: str = "auto", workers: int = 1, checked: bool = False
) -> ClusterSettings:
    """Workers of one GPU each."""
    worker = WorkerSettings(
        device="cuda", dtype="bfloat16", kv_cache_memory=24 << 30, max_num_seqs=64, max_num_batched_tokens=8192
    )
    return ClusterSettings(
        mode=mode, prefill_workers=workers, decode_workers=workers if mode == "disagg" else 0, prefill=worker,  # type: ignore[arg-type]
        decode=worker, link=link, transfer_granularity=granularity, gpu_checksums=checked,
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


def handoff_part(asked: Asked) -> list[dict[str, Any]]:
    """8B: what disaggregation adds to the second token, request by request."""
    rows = list[dict[str, Any]]()
    for tokens in asked.tokens:
        base = asyncio.run(unloaded(cluster("colocated"), tokens, 10))
        rows.append({"tokens": tokens, "link": "colocated", "granularity": "", "checked": False, **base, "adds": 0.0})
        say(f"{rows[-1]}")
        units = ("request", False), ("layers:8", False), ("auto", False), ("auto", True)
        for link, (granularity, checked) in product(asked.links, units):
            found = asyncio.run(unloaded(cluster("disagg", link, granularity, checked=checked), tokens, 10))
            adds = found["second"] - base["second"]
            what = {"tokens": tokens, "link": link, "granularity": granularity, "checked": checked}
            rows.append({**what, **found, "adds": adds})
            say(f"{rows[-1]}")
    table = Table("tokens", "link", "granularity", "TTFT, ms", "2nd token", "ITL", "handoff adds", "GB/s of a piece")
    for r in rows:
        cells = [f"{r[k]:.2f}" for k in ("ttft", "second", "itl", "adds")]
        unit = r["granularity"] + ", checksums" * r["checked"]
        table.add_row(str(r["tokens"]), r["link"], unit, *cells, f"{r.get('GB/s', 0):.0f}")
    Console(width=120).print(table)
    return rows


# ---------------------------------------------------------------- load

FLAGS = (
    "--device", "cuda", "--dtype", "bfloat16", "--block-size", str(PAGE), "--kv-cache-memory", "24G",
    "--max-num-seqs", "64", "--max-num-batched-tokens", "8192", "--max-model-len", "4096", "--no-prefix-caching",
    "--random-input-len", "2000", "--random-output-len", "128", "--transfer-granularity", "layers:8",
)  # fmt: skip
RATIOS = {"mean_ttft": "TTFT", "mean_ttst": "2nd token", "mean_tpot": "TPOT", "p99_itl": "p99 ITL", "mean_e2el": "E2E"}


def bench(asked: Asked, *flags: str) -> dict[str, Any] | None:
    """What `minidisagg bench` found; None where it was only shown."""
    command = [sys.executable, "-m", "minidisagg", "bench", f"dummy:{SHAPE}", *FLAGS, "--link", asked.link, *flags]
    say(" ".join(["minidisagg", *command[3:]]))
    if asked.dry_run:
        return None
    with TemporaryDirectory() as folder:
        subprocess.run([*command, "--result-dir", folder], check=True)
        (found,) = Path(folder).glob("*/result.json")
        result: dict[str, Any] = json.loads(found.read_text())
    return result


def compared(asked: Asked, shapes: Sequence[tuple[str, ...]], rate: float, repeats: int) -> list[dict[str, Any]]:
    """Each shape against as many colocated workers."""
    rows = []
    for flags in shapes:
        load = "--request-rate", str(rate), "--num-prompts", "300", "--repeats", str(repeats)
        result = bench(asked, *flags, *load)
        if result is not None:
            rows.append({"flags": flags, "rate": rate, "verdict": result["verdict"], "ratios": result["ratios"]})
    if not rows:
        return rows
    table = Table("", "requests/s", *RATIOS.values())
    for r in rows:
        cells = [
            f"{x['a'] * 1e3:.1f} → {x['b'] * 1e3:.1f} ms, {x['ratio']:.2f}x [{x['low']:.2f}, {x['high']:.2f}]"
            for x in (r["ratios"][name] for name in RATIOS)
        ]
        table.add_row(" ".join(r["flags"]), f"{rate:g}", *cells)
    Console(width=200).print(table)
    return rows


def load_part(asked: Asked) -> list[dict[str, Any]]:
    """1P1D against two colocated workers."""
    return compared(asked, [("--mode", "both")], 10, 3)


def sarathi_part(asked: Asked) -> list[dict[str, Any]]:
    """1P1D beside two colocated workers that cut prompts into chunks: one run of each."""
    sides = ["colocated:fcfs", *(f"colocated:sarathi:chunk={chunk}" for chunk in (512, 1024, 2048)), "disagg:fcfs"]
    load = "--request-rate", "10", "--num-prompts", "300", "--repeats", "1"
    result = bench(asked, "--compare", ",".join(sides), *load)
    if result is None:
        return []
    rows = [{"side": side["label"], "values": side["values"]} for side in result["contest"]]
    table = Table("ms", *RATIOS.values())
    for r in rows:
        table.add_row(r["side"], *[f"{r['values'][name] * 1e3:.1f}" for name in RATIOS])
    Console(width=120).print(table)
    return rows


def goodput_part(asked: Asked) -> list[dict[str, Any]]:
    """The highest rate at which 90 % are within the SLOs, for a tight and a loose pair."""
    rows = []
    for slos in ("ttft:400", "tpot:10"), ("ttft:1000", "tpot:40"):
        goals = [word for slo in slos for word in ("--goodput", slo)]
        result = bench(asked, "--mode", "both", "--find-goodput", "--preset", "quick", *goals)
        if result is not None:
            rows.append({"slos": slos, **{name: result[name] for name in ("verdict", "ratio", "goodput")}})
    if rows:
        table = Table("SLO", *rows[0]["goodput"], "ratio")
        for r in rows:
            found = [f"{side['rate']:.1f} requests/s" for side in r["goodput"].values()]
            table.add_row(", ".join(r["slos"]), *found, f"{r['ratio']['ratio']:.2f}" if r["ratio"] else "")
        Console(width=120).print(table)
    return rows


def shape_flags(prefill: int, decode: int) -> tuple[str, ...]:
    return "--mode", "both", "--prefill-workers", str(prefill), "--decode-workers", str(decode)


def four_part(asked: Asked) -> list[dict[str, Any]]:
    """Four cards."""
    return compared(asked, [shape_flags(2, 2), shape_flags(3, 1)], 20, 2)


def eight_part(asked: Asked) -> list[dict[str, Any]]:
    """Eight cards."""
    return compared(asked, [shape_flags(4, 4), shape_flags(6, 2)], 40, 1)


async def with_kills(asked: Asked, seconds: float = 60.0, every: float = 10.0) -> dict[str, Any]:
    """Open-loop traffic over as many cards as there are, half of them for each phase, and a SIGKILL now and then."""
    rng, half = random.Random(2), max(1, torch.cuda.device_count() // 2)
    model = ModelSettings(model="dummy:qwen3-0.6b", block_size=PAGE, max_model_len=4096)
    ends, gaps, sent = Counter[str](), list[float](), 0
    async with await Frontend.start(model, cluster("disagg", asked.link, workers=half), RunSettings()) as frontend:
        ended = asyncio.Event()

        def listen(emit: Emit, now: float) -> None:
            if emit.finish:
                ends[emit.finish if emit.finish == "length" else f"{emit.finish}: {emit.error}"] += 1
                ended.set()

        began, killed = time.monotonic(), 0
        while time.monotonic() < began + seconds:
            prompt = [rng.randrange(1000) for _ in range(rng.randint(100, 2000))]
            frontend.submit(prompt, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True), listen)
            sent += 1
            if time.monotonic() > began + (killed + 1) * every and len(frontend.hellos) == 2 * half:
                name = rng.choice(list(frontend.hellos))
                frontend.supervisor.kill(name, frontend.router.epochs[name], wanted=True)
                say(f"{time.monotonic() - began:5.1f} s: killed {name}; {ends.total()} of {sent} have ended")
                killed += 1
            await asyncio.sleep(rng.expovariate(8.0))
        try:
            async with asyncio.timeout(120):
                while ends.total() < sent:
                    ended.clear()
                    await ended.wait()
        except TimeoutError:
            say(f"{sent - ends.total()} requests hang")
        gaps += [at - began for at, _ in frontend.restarted]
    return {"link": asked.link, "sent": sent, "ends": dict(ends), "kills": killed, "deaths": len(gaps)}


def kills_part(asked: Asked) -> list[dict[str, Any]]:
    """No request may be lost, and none hang."""
    found = asyncio.run(with_kills(asked))
    say(", ".join(f"{name} {value}" for name, value in found.items()))
    return [found]


PARTS = {
    "links": links_part, "handoff": handoff_part, "beside": beside_part, "load": load_part, "sarathi": sarathi_part,
    "goodput": goodput_part, "kills": kills_part, "four": four_part, "eight": eight_part,
}  # fmt: skip


@click.command(help=__doc__)
@click.option("--part", type=click.Choice(list(PARTS)), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("multi_gpu.json"), show_default=True)
@click.option("--tokens", type=int, multiple=True, default=(2000, 16000), show_default=True, help="of prompts")
@click.option("--link", type=click.Choice(KINDS), help="[default: cuda_ipc; of links, beside and handoff: all]")
@click.option("--dry-run", is_flag=True, help="of load, sarathi, goodput, four, eight: say what would be run")
def main(part: str, out: Path, tokens: tuple[int, ...], link: str | None, dry_run: bool) -> None:
    if not torch.cuda.is_available() and not dry_run:
        raise click.ClickException("this measures GPUs, and torch sees none")
    began = time.time()
    rows = PARTS[part](Asked(tokens, (link,) if link else KINDS, dry_run))
    if dry_run:
        return
    seen = json.loads(out.read_text()) if out.exists() else []
    card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    seen.append({"part": part, "cards": card, "seconds": round(time.time() - began), "rows": rows})
    out.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()

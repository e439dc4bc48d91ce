"""What one GPU does in a step, against what it could: decode steps, prompts, tokens per second.

    scripts/bench_gpu.py                                   both shapes, every part
    scripts/bench_gpu.py --shape llama-8b --part decode    one of them
    scripts/bench_gpu.py --part transformers               offline, by its continuous batching, and as much of it here
    scripts/bench_gpu.py --out gpu.json                    the figures, for other runs to stand beside

Every figure stands beside its floor, measured in the same run: bytes over the card's read rate, or operations over its
matmul rate. A decode step is timed as the engine runs it, several in flight, from the first launch to the last ids.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import PlanItem, SeqInit, StepPlan
from minidisagg.core.tracked import Emit
from minidisagg.model.dummy import SHAPES, parameter_shapes
from minidisagg.model.fused import FusedTransformer
from minidisagg.runtime.ceilings import measure_ceilings
from minidisagg.runtime.device import step_work
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.fused_device import FusedDevice
from minidisagg.runtime.kv_cache import KVCache

PAGE = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
BATCHES = (1, 8, 64)
OFFLINE_KV = 40 << 30  # bytes
OFFLINE_REQUESTS = 256  # all at once
PEER_TOKENS = 32  # of each, where transformers is asked too
# vLLM 0.22.1 on an H100 80 GB, dummy weights, bf16, no prefix cache: ms a decode step at 2k of context by batch, prompt
# tokens per second of 16 x 4000, output tokens per second of 256 requests with 100 to 1,024 tokens in and out.
VLLM = {
    "llama-8b": {"decode": {1: 6.70, 64: 12.87}, "prefill": 41_886, "offline": 8_513},
    "qwen3-0.6b": {"decode": {1: 1.65, 64: 6.91}, "prefill": 331_852, "offline": 19_112},
}


def make_device(shape: str, pages: int, max_num_seqs: int, max_len: int) -> FusedDevice:
    """Random weights, drawn on the card."""
    config, device = SHAPES[shape], torch.device("cuda")
    torch.manual_seed(0)
    weights = {
        name: torch.ones(size, dtype=torch.bfloat16, device=device)
        if len(size) == 1
        else torch.randn(size, dtype=torch.bfloat16, device=device) * config.hidden_size**-0.5
        for name, size in parameter_shapes(config).items()
    }
    model = FusedTransformer(config, weights, torch.bfloat16, device)
    made = FusedDevice(model, KVCache(config, pages, PAGE, torch.bfloat16, device), max_num_seqs, max_len, max_len)
    made.cache.data.normal_()
    began = time.perf_counter()
    made.warm_up()
    say(f"{shape}: {len(made.lengths)} plans and {len(made.sizes)} graphs made in {time.perf_counter() - began:.1f} s")
    return made


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def pages_of(rng: random.Random, device: FusedDevice, tokens: list[int]) -> list[list[int]]:
    """Random pages of the cache, no page twice."""
    free = rng.sample(range(device.cache.num_pages), sum(-(-n // PAGE) for n in tokens))
    return [[free.pop() for _ in range(-(-n // PAGE))] for n in tokens]


def decode_ms(device: FusedDevice, batch: int, context: int, steps: int = 40) -> float:
    """Milliseconds a step, each launched while the one before it runs."""
    pages = pages_of(random.Random(batch), device, [context + steps + 8] * batch)
    flying, began = [], 0.0
    for step in range(steps + 8):
        new = [SeqInit(str(i), 0, [1], [], GREEDY) for i in range(batch)] if not step else []
        items = [
            PlanItem(str(i), 0, context + step - 1, 1, [] if step else [5 + i], pages[i], True, step)
            for i in range(batch)
        ]
        flying.append(device.launch(device.prepare(StepPlan(step, items, new, []))))
        if len(flying) == 2:
            device.collect(flying.pop(0))
        if step == 7:
            began = time.perf_counter()
    device.collect(flying.pop())
    took = time.perf_counter() - began
    device.prepare(StepPlan(0, [], [], [(str(i), 0) for i in range(batch)]))
    return took / steps * 1e3


def graph_ms(device: FusedDevice, batch: int, steps: int = 40) -> float:
    """Milliseconds of the last decode step's graph alone, one replay behind the other."""
    graph = device.graphs[min(size for size in device.sizes if size >= batch)]
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.stream(device.stream):
        began.record()  # type: ignore[no-untyped-call]
        for _ in range(steps):
            graph.replay()
        ended.record()  # type: ignore[no-untyped-call]
    ended.synchronize()
    return began.elapsed_time(ended) / steps  # type: ignore[no-untyped-call, no-any-return]


def prefill_ms(device: FusedDevice, lengths: list[int], repeats: int = 5) -> float:
    """Milliseconds of one step with these whole prompts, the first of its kind where it is not repeated."""
    rng, best = random.Random(0), float("inf")
    vocab = device.model.config.vocab_size
    for repeat in range(repeats):
        pages = pages_of(rng, device, lengths)
        prompts = [[rng.randrange(vocab) for _ in range(n)] for n in lengths]
        new = [SeqInit(str(i), repeat, prompt, [], GREEDY) for i, prompt in enumerate(prompts)]
        items = [PlanItem(str(i), repeat, 0, len(p), p, pages[i], True, 0) for i, p in enumerate(prompts)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.run(StepPlan(repeat, items, new, []))
        if repeat or repeats == 1:
            best = min(best, time.perf_counter() - began)
        device.prepare(StepPlan(0, [], [], [(str(i), repeat) for i in range(len(items))]))
    return best * 1e3


def decode_part(device: FusedDevice, shape: str, read_rate: float) -> list[dict[str, Any]]:
    """One row per batch."""
    rows = []
    for batch in BATCHES:
        items = [PlanItem(str(i), 0, 2047, 1, [], [], True, 0) for i in range(batch)]
        _, nbytes = step_work(StepPlan(0, items, [], []), device.model.config, 2)
        took = decode_ms(device, batch, 2048)
        peer = VLLM[shape]["decode"].get(batch)  # type: ignore[attr-defined]
        rows.append(row(shape, f"decode step, batch {batch}, 2k", took, nbytes / read_rate * 1e3, peer, "ms"))
        rows[-1]["graph"] = alone = graph_ms(device, batch)
        say(f"{shape} its graph alone: {alone:.2f} ms, so that it does not run for {max(0.0, 1 - alone / took):.1%}")
    return rows


def prefill_part(device: FusedDevice, shape: str, flop_rate: float) -> list[dict[str, Any]]:
    """Prompts of a few lengths, 4,000 to 16,000 tokens a step."""
    rows = []
    for count, length in (1, 512), (1, 2000), (4, 4000), (16, 512):
        items = [PlanItem(str(i), 0, 0, length, [], [], True, 0) for i in range(count)]
        flops, _ = step_work(StepPlan(0, items, [], []), device.model.config, 2)
        took = prefill_ms(device, [length] * count)
        peer = count * length / VLLM[shape]["prefill"] * 1e3 if length == 4000 else None  # type: ignore[operator]
        rows.append(row(shape, f"prefill, {count} x {length}", took, flops / flop_rate * 1e3, peer, "ms"))
    rng = random.Random(0)
    lengths = [rng.randint(200, 4000) for _ in range(32)]
    items = [PlanItem("", 0, 0, length, [], [], True, 0) for length in lengths]
    flops, _ = step_work(StepPlan(0, items, [], []), device.model.config, 2)
    for what in "new lengths", "the same again":
        took = sum(prefill_ms(device, [length], 1) for length in lengths)
        rows.append(row(shape, f"prefill, 32 prompts, {what}", took, flops / flop_rate * 1e3, None, "ms"))
    return rows


def offline_load(shape: str) -> tuple[list[list[int]], list[int]]:
    """256 random prompts of 100 to 1,024 tokens, and how many each is answered with."""
    rng = random.Random(0)
    vocab = SHAPES[shape].vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(100, 1024))] for _ in range(OFFLINE_REQUESTS)]
    return prompts, [rng.randint(100, 1024) for _ in range(OFFLINE_REQUESTS)]


async def offline(shape: str, max_num_seqs: int, each: int = 0) -> tuple[float, float, dict[str, float]]:
    """(seconds, output tokens, the worker's shares) of requests that all come at once, through the whole engine.

    `each`: so many tokens of every request.
    """
    worker = WorkerSettings(
        device="cuda", dtype="bfloat16", kv_cache_memory=OFFLINE_KV, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16384,
    )  # fmt: skip
    cluster = ClusterSettings(mode="colocated", prefill_workers=1, decode_workers=0, prefill=worker, decode=worker)
    model = ModelSettings(model=f"dummy:{shape}", block_size=PAGE, max_model_len=4096, prefix_caching=False)
    prompts, lengths = offline_load(shape)
    lengths = [each or length for length in lengths]
    began = time.perf_counter()
    async with await Frontend.start(model, cluster, RunSettings()) as frontend:
        say(f"{shape}: the engine is up after {time.perf_counter() - began:.0f} s")
        for measured in False, True:
            left, ended, errors = len(prompts), asyncio.Event(), list[str]()

            def listen(emit: Emit, now: float) -> None:
                nonlocal left
                if emit.finish:
                    left -= 1
                    errors.extend([emit.error] if emit.finish != "length" else [])  # noqa: B023
                    if not left:
                        ended.set()  # noqa: B023

            before = (await frontend.fresh_stats())["worker-0"]
            began = time.perf_counter()
            for prompt, length in zip(prompts, lengths, strict=True):
                tokens = length if measured else 8
                frontend.submit(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True), listen)
            await ended.wait()
            took = time.perf_counter() - began
            if errors:
                raise click.ClickException(errors[0])
        after = (await frontend.fresh_stats())["worker-0"]
    shares = {
        "device busy": (after.busy_seconds - before.busy_seconds) / took,
        "worker's CPU": (after.cpu_seconds - before.cpu_seconds) / took,
        "steps/s": (after.steps - before.steps) / took,
    }
    return took, sum(lengths), shares


def offline_part(shape: str, read_rate: float) -> list[dict[str, Any]]:
    """256 requests with 100 to 1,024 tokens in and out; the floor is the weights and KV of full batches."""
    took, tokens, shares = asyncio.run(offline(shape, OFFLINE_REQUESTS))
    say(f"{shape} offline: {tokens / took:,.0f} tokens/s; " + ", ".join(f"{k} {v:.2f}" for k, v in shares.items()))
    peer = tokens / VLLM[shape]["offline"]  # type: ignore[operator]
    return [row(shape, f"offline, {tokens:,.0f} tokens out", took, math.nan, peer, "s") | shares]


def transformers_part(shape: str) -> list[dict[str, Any]]:
    """The same prompts through transformers' `generate_batch`, and here, a few tokens each: it takes its time."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers import __version__ as version

    took, tokens, _ = asyncio.run(offline(shape, OFFLINE_REQUESTS, PEER_TOKENS))
    found = [row(shape, f"offline, {tokens:,.0f} tokens out", took, math.nan, None, "s")]
    ours = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen3" if ours.qk_norm else "llama", vocab_size=ours.vocab_size, hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size, num_hidden_layers=ours.num_layers, num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads, head_dim=ours.head_dim, max_position_embeddings=ours.max_model_len,
        tie_word_embeddings=ours.tie_embeddings, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()  # type: ignore[no-untyped-call]
    torch.set_default_dtype(torch.float32)
    prompts, _ = offline_load(shape)
    for tokens in 2, PEER_TOKENS:
        asked = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=asked, progress_bar=False)
        took = time.perf_counter() - began
        made = sum(len(output.generated_tokens) for output in outputs.values())
        if made != tokens * len(prompts):
            raise click.ClickException(f"transformers made {made} tokens and not {tokens * len(prompts)}")
    found.append(row(shape, f"transformers {version}, offline, {made:,.0f} tokens out", took, math.nan, None, "s"))
    del model
    return found


def row(shape: str, what: str, took: float, floor: float, peer: float | None, unit: str) -> dict[str, Any]:
    """One figure; `floor` and `peer` in the same unit."""
    say(f"{shape} {what}: {took:.2f} {unit}, floor {floor:.2f} ({floor / took:.2f})")
    return {"shape": shape, "what": what, "value": took, "floor": floor, "vllm": peer, "unit": unit}


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(VLLM)), multiple=True, help="default: both")
@click.option(
    "--part",
    type=click.Choice(["decode", "prefill", "offline", "transformers"]),
    multiple=True,
    help="default: all but transformers",
)
@click.option("--out", type=click.Path(path_type=Path), help="write the figures there, as JSON")
def main(shape: tuple[str, ...], part: tuple[str, ...], out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this measures a GPU, and torch sees none")
    read_rate, flop_rate = measure_ceilings(torch.bfloat16, device=torch.device("cuda"))
    card = torch.cuda.get_device_name()
    say(f"{card}: reads {read_rate / 1e12:.2f} TB/s, multiplies at {flop_rate / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for one in shape or tuple(VLLM):
        if "offline" in (part or ("offline",)):
            rows += offline_part(one, read_rate)
        if "transformers" in part:
            rows += transformers_part(one)
        if part and not {"decode", "prefill"} & set(part):
            continue
        pages = 26_000 * (1 << 20) // (PAGE * SHAPES[one].kv_bytes_per_token(2)) + 16
        device = make_device(one, pages, 64, 8192)
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "decode": lambda device=device, one=one: decode_part(device, one, read_rate),  # type: ignore[misc]
            "prefill": lambda device=device, one=one: prefill_part(device, one, flop_rate),  # type: ignore[misc]
        }
        for name, measure in parts.items():
            if name in (part or parts):
                rows += measure()
        del device, parts
        torch.cuda.empty_cache()
    table = Table("shape", "what", "took", "floor", "floor / took", "vLLM 0.22.1, H100", "of vLLM's time", title=card)
    for r in rows:
        peer = r["vllm"]
        table.add_row(
            r["shape"], r["what"], f"{r['value']:.2f} {r['unit']}", f"{r['floor']:.2f}",
            f"{r['floor'] / r['value']:.2f}", f"{peer:.2f}" if peer else "", f"{r['value'] / peer:.2f}" if peer else "",
        )  # fmt: skip
    Console(width=120).print(table)
    if out:
        out.write_text(json.dumps({"card": card, "read": read_rate, "flops": flop_rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

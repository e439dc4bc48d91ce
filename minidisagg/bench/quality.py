"""`minidisagg bench --kv-quality`: what a codec saves on the wire, what it takes, and what it does to the answers.

Each prompt is computed once. Then its greedy continuation is decoded over the KV as it is, and the same tokens over KV
that has been through the codec and back, as after a handoff: all of the prompt's pages, none of the output's. Beside it
stands the same KV rounded to bfloat16, which is what everybody's cache does to a model in float32.

The same tokens are given to both, so that where the likeliest token first differs is where free decoding would have
parted. The first output token comes from the prefill and is never touched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import torch
from msgspec import Struct
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from minidisagg.config import ClusterSettings, ModelSettings
from minidisagg.core.plan import CODECS, RAW, PlanItem
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.run_directory import new_directory, write_json
from minidisagg.measure.settings import ReportSettings
from minidisagg.model.attention import build_batch
from minidisagg.model.loader import load_config, load_weights
from minidisagg.model.pull import ensure
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.kv_cache import KVCache
from minidisagg.runtime.load import dtype_of
from minidisagg.transfer.codec import codecs_for
from minidisagg.transfer.rows import cache_rows
from minidisagg.workload.lengths import text_items

TOKENS = 32  # of each continuation
PAGE = 32
BATCH = 4  # prompts at a time
LAYER_PROMPTS = 8  # of which each layer alone is put through the codec
Through = Callable[[Tensor], None]  # changes cache rows [layers, 2, pages, words] as a handoff would


class Way(Struct):
    """One way for KV to be changed. Nats; shares of 1."""

    name: str
    kl: float  # of the next token's distribution, mean over tokens and prompts
    kl_p99: float
    same_tokens: float  # the likeliest next token is the same
    same_texts: float  # continuations without a difference
    first_difference: float  # mean number of tokens before it
    layers: list[float]  # KL where only this layer is changed


class Quality(Struct):
    """What comes of it."""

    model: str
    dtype: str
    codec: str
    prompts: int
    prompt_tokens: int
    wire_share: float  # bytes on the wire, of the cache's own
    wire_share_bfloat16: float  # of what bfloat16 would be
    encode: float  # bytes of the cache a second, on this machine
    decode: float
    ways: list[Way]


class Meter:
    """One model and a cache for a few prompts."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, prompts: Sequence[list[int]]) -> None:
        self.config, self.device = load_config(model), device
        self.model = Transformer(self.config, load_weights(model, self.config), dtype, device)
        self.per = -(-(max(map(len, prompts)) + TOKENS) // PAGE)
        self.cache = KVCache(self.config, BATCH * self.per, PAGE, dtype, device)
        self.rows = cache_rows(self.cache.data)

    def clock(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.inference_mode()
    def step(self, given: dict[int, tuple[int, list[int]]]) -> Tensor:
        """Compute (position, tokens) of prompts by their index; log-probabilities [prompts, vocabulary] of the next."""
        items = [
            PlanItem(str(i), 0, at, len(some), some, list(range(i * self.per, (i + 1) * self.per)), True, 0)
            for i, (at, some) in given.items()
        ]
        tokens = [item.tokens for item in items]
        batch = build_batch(items, tokens, self.cache, self.model.dtype, self.device)
        x_NE = self.model.hidden(batch, self.cache)
        return self.model.logits(x_NE[batch.sample_rows_S], exact=True).log_softmax(-1)

    def prefill(self, prompts: Sequence[list[int]]) -> list[int]:
        """Each prompt's first token."""
        self.cache.data.zero_()
        return [int(self.step({i: (0, prompt)}).argmax(-1)) for i, prompt in enumerate(prompts)]

    def follow(self, prompts: Sequence[list[int]], outputs: list[list[int]], count: int) -> list[Tensor]:
        """Log-probabilities after each of `count` tokens of the outputs; where those are too short, they grow."""
        seen = []
        for n in range(count):
            pairs = enumerate(zip(prompts, outputs, strict=True))
            seen.append(self.step({i: (len(prompt) + n, output[n : n + 1]) for i, (prompt, output) in pairs}))
            if len(outputs[0]) == n + 1:
                for output, token in zip(outputs, seen[-1].argmax(-1).tolist(), strict=True):
                    output.append(token)
        return seen


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact ‖ other) of each row, nats."""
    return (exact.exp() * (exact - other)).sum(-1)


def measure(
    model: str, dtype: torch.dtype, codec: str, prompts: Sequence[list[int]], device: str = "cpu", show: bool = False
) -> Quality:
    """Raises `ValueError` where the cache of this model has no such codec."""
    meter = Meter(model, dtype, torch.device(device), prompts)
    codecs, rows = codecs_for(meter.cache.data), meter.rows
    if codec not in codecs:
        raise ValueError(f"no codec {codec!r} for a cache of {dtype}; there are {', '.join(codecs)}")
    ours, times = codecs[codec], [0.0, 0.0]
    passed = 0

    def through(some: Tensor) -> None:
        nonlocal passed
        room = torch.empty(*some.shape[:3], ours.row_bytes, dtype=torch.uint8, device=meter.device).view(ours.word)
        began = meter.clock()
        wire = ours.encode(some, room)
        between = meter.clock()
        ours.decode(wire, some)
        times[0] += between - began
        times[1] += meter.clock() - between
        passed += some.nbytes

    def rounded(some: Tensor) -> None:
        values = some.view(dtype)
        values.copy_(values.bfloat16())

    ways: dict[str, Through] = {codec: through}
    if dtype.itemsize > 2:
        ways["bfloat16"] = rounded
    found: dict[str, tuple[list[float], list[Tensor], list[list[float]]]] = {name: ([], [], []) for name in ways}
    batches = [list(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    layered = min(LAYER_PROMPTS // BATCH, len(batches))
    steps = len(batches) * (1 + len(ways)) * (TOKENS - 1) + layered * len(ways) * len(rows)

    def compare(batch: list[list[int]], by_layer: bool, advance: Callable[[int], None]) -> None:
        outputs = [[token] for token in meter.prefill(batch)]
        before = rows.clone()
        exact = meter.follow(batch, outputs, TOKENS - 1)
        advance(TOKENS - 1)
        for name, change in ways.items():
            divergences, alike, layers = found[name]
            rows.copy_(before)
            change(rows)
            same = torch.ones(len(batch), TOKENS - 1, dtype=torch.bool)
            for n, (right, other) in enumerate(zip(exact, meter.follow(batch, outputs, TOKENS - 1), strict=True)):
                divergences += divergence(right, other).tolist()
                same[:, n] = right.argmax(-1) == other.argmax(-1)
            advance(TOKENS - 1)
            alike.append(same)
            if by_layer:
                layers.append([])
            for layer in range(len(rows)) if by_layer else ():
                rows.copy_(before)
                change(rows[layer : layer + 1])
                (other,) = meter.follow(batch, outputs, 1)
                layers[-1].append(float(divergence(exact[0], other).mean()))
                advance(1)

    with Progress(disable=not show, transient=True) as progress:
        bar = progress.add_task(f"decode steps over {len(prompts)} prompts", total=steps)
        for number, batch in enumerate(batches):
            compare(batch, number < layered, partial(progress.advance, bar))
    result = [_way(name, *some) for name, some in found.items()]
    itemsize = meter.cache.data.element_size()
    share = ours.row_bytes / (rows.shape[-1] * rows.element_size())
    return Quality(
        model, str(dtype).removeprefix("torch."), codec, len(prompts), sum(map(len, prompts)), share,
        share * itemsize / 2, passed / times[0], passed / times[1], result,
    )  # fmt: skip


def _way(name: str, divergences: list[float], alike: list[Tensor], layers: list[list[float]]) -> Way:
    same = torch.cat(alike).double()  # [prompts, tokens after the first]
    return Way(
        name, statistics.mean(divergences), statistics.quantiles(divergences, n=100)[-1], float(same.mean()),
        float(same.prod(1).mean()), 1 + float(same.cumprod(1).sum(1).mean()),
        [statistics.mean(of) for of in zip(*layers, strict=True)],
    )  # fmt: skip


def table(quality: Quality) -> Table:
    """For a person."""
    out = Table(box=box.SIMPLE_HEAD, title=f"KV of {quality.model} in {quality.dtype}, {quality.prompts} prompts")
    names = "", "KL, nats", "p99", "same token", f"same {TOKENS} tokens", "tokens before the first other"
    for name in names:
        out.add_column(name, justify="right" if name else "left")
    for way in quality.ways:
        out.add_row(
            way.name, f"{way.kl:.2e}", f"{way.kl_p99:.2e}", f"{way.same_tokens:.1%}", f"{way.same_texts:.1%}",
            f"{way.first_difference:.1f}",
        )  # fmt: skip
    return out


def layer_table(quality: Quality) -> Table:
    """KL of the first token where only one layer's KV is changed."""
    out = Table(box=box.SIMPLE_HEAD, title="KL, nats, where only this layer is changed", title_justify="left")
    for name in "layer", *(way.name for way in quality.ways):
        out.add_column(name, justify="right")
    for layer, values in enumerate(zip(*(way.layers for way in quality.ways), strict=True)):
        out.add_row(str(layer), *(f"{value:.1e}" for value in values))
    return out


def run(
    model: ModelSettings, cluster: ClusterSettings, count: int, seed: int, text: str, report: ReportSettings
) -> int:
    """Carry it out and leave quality.json in a run directory; returns the exit status. `text`: a file, or none."""
    console, codec = Console(), cluster.kv_codec if cluster.kv_codec != RAW else CODECS[-1]
    ensure(model.model, lambda line: console.print(line, style="dim", highlight=False))
    tokenizer = Tokenizer.load(model.model)
    items = text_items(count, TOKENS, tokenizer.encode, seed, text)
    prompts = [item.prompt for item in items if item.prompt]
    dtype = dtype_of(cluster.prefill, load_config(model.model))
    quality = measure(model.model, dtype, codec, prompts, cluster.prefill.device, console.is_terminal)
    console.print(table(quality), layer_table(quality))
    console.print(
        f"{codec}: {quality.wire_share:.3f} of the bytes, {quality.wire_share_bfloat16:.3f} of bfloat16's; "
        f"encodes {quality.encode / 1e9:.2f} GB/s of KV here, decodes {quality.decode / 1e9:.2f}",
        highlight=False,
    )
    path = new_directory(report) / "quality.json"
    write_json(path, {"command": command_line(), "machine": machine(), **msgspec.to_builtins(quality)})
    console.print(f"report: {path}", highlight=False)
    return 0

"""`minidisagg profile`: what steps cost on this machine, measured on a worker of the engine, for `simulate`.

    decode     so many sequences at such contexts, and nothing else: from one step's end to the next one's, so that what
               the scheduler and the messages take is in it
    prefill    whole prompts alone, and one prompt in chunks, whose steps differ in what is in the cache already

Of each kind the steps are fitted by what `sim/profile.py` has, and how far the fit is off is printed; the single steps'
ratios to it go into the profile, so that a simulation's steps scatter as the machine's did.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minidisagg.bench.sides import ITEM_BYTES
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings
from minidisagg.core.messages import Envelope, SamplingParams, StepOutput
from minidisagg.core.tracked import Emit
from minidisagg.measure.machine import machine
from minidisagg.model.loader import load_config
from minidisagg.model.pull import ensure
from minidisagg.runtime.frontend import Frontend
from minidisagg.sim.profile import Curve, Grid, Profile

SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 256, 1024, 4096)
PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CHUNK, CHUNKS = 128, 8  # least tokens of a chunk, and how many of one prompt
STEPS = 20  # decode steps of a point
TRIES = 3  # of a prompt
SHORT, ENDS = 64, 12  # tokens of a piece beside which the head is no trifle, and how many prompts end with one
KEPT = 512  # ratios in the profile
K = TypeVar("K")
V = TypeVar("V")
UTILIZATION = 0.9  # by which `Profile.pages` finds the cache's size again


class Decode(NamedTuple):
    """A step of decode alone. Seconds from the end of the one before it."""

    seqs: int
    context: int
    seconds: float
    overhead: float  # of it, what was not the step itself


class Prompt(NamedTuple):
    """A step of one prompt, or a piece of one, alone."""

    past: int
    new: int
    seconds: float
    last: bool = True  # of its prompt, after which it samples


class Watch:
    """Hears the worker's steps."""

    def __init__(self) -> None:
        self.steps: list[StepOutput] = []

    def on_message(self, envelope: Envelope, now: float) -> None:
        if isinstance(envelope.body, StepOutput):
            self.steps.append(envelope.body)

    def on_emit(self, emit: Emit, now: float) -> None: ...
    def on_event(self, text: str) -> None: ...


class Profiler:
    """One worker under observation."""

    def __init__(self, frontend: Frontend, progress: Progress, seconds: float) -> None:
        self.frontend = frontend
        self.progress = progress
        self.watch = Watch()
        self.until = time.monotonic() + seconds
        self._salt = 0
        self._rng = random.Random(0)
        frontend.observers.append(self.watch)

    async def steps(self, lengths: Sequence[int], output: int) -> list[StepOutput]:
        """What the worker did for prompts of these lengths that came at once."""
        self.watch.steps = []
        ended, left = asyncio.Event(), len(lengths)

        def on_emit(emit: Emit, _: float) -> None:
            nonlocal left
            left -= bool(emit.finish)
            if not left:
                ended.set()

        self._salt += 1
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        for length in lengths:
            prompt = [self._rng.randrange(self.frontend.vocab_size) for _ in range(length)]
            self.frontend.submit(prompt, sampling, on_emit, salt=f"profile {self._salt}")
        await ended.wait()
        return self.watch.steps

    async def decodes(self, most_seqs: int, longest: int, room: int) -> list[Decode]:
        """Over `SEQS` and `CONTEXTS`, as far as cache and time allow: shortest contexts first."""
        points = [(c, n) for c in CONTEXTS for n in SEQS if n <= most_seqs and c + 2 * STEPS < longest]
        points = [(c, n) for c, n in points if n * (c + 2 * STEPS) < room]
        found, bar = list[Decode](), self.progress.add_task("decode", total=len(points))
        for context, seqs in points:
            if time.monotonic() < self.until or context == CONTEXTS[0]:
                # Those that are prefilled first decode beside the others' prompts: so many steps do not count.
                mixed = seqs * context // self.frontend.cluster.decode.max_num_batched_tokens + 2
                steps = await self.steps([context] * seqs, STEPS + mixed)
                for before, step in pairwise(steps):
                    alone = not step.prefill_tokens and step.decode_tokens == before.decode_tokens == seqs
                    if alone and not before.prefill_tokens:
                        period = step.clock - before.clock
                        found.append(Decode(seqs, step.context_tokens, period, period - step.seconds))
            self.progress.advance(bar)
        return found

    async def prompts(self, longest: int) -> list[Prompt]:
        """Whole ones, then one in chunks as long as a step may have: those of a few tokens tell nothing of attention.

        The first of each length does not count: kernels are chosen or compiled for it.
        """
        lengths = [length for length in PROMPTS if length < longest]
        found, bar = list[Prompt](), self.progress.add_task("prefill", total=len(lengths) + 1)
        for length in lengths:
            tries = 1 + (TRIES if time.monotonic() < self.until else 1)
            steps = [step for _ in range(tries) for step in await self.steps([length], 1) if step.prefill_tokens]
            found += [Prompt(0, length, step.seconds) for step in steps[1:]]
            self.progress.advance(bar)
        chunk = max(CHUNK, longest // CHUNKS // CHUNK * CHUNK)
        self.frontend.set_policy(f"sarathi:chunk={chunk}")
        for number in range(1 + TRIES):
            steps = await self.steps([min(chunk * CHUNKS, longest // CHUNK * CHUNK)], 1)
            chunks = [
                Prompt(s.context_tokens - s.prefill_tokens, s.prefill_tokens, s.seconds, s is steps[-1]) for s in steps
            ]
            found += chunks if number else []
        if SHORT * 3 < longest:  # the same step of a prompt that ends with it and of one that goes on, in turns
            self.frontend.set_policy(f"sarathi:chunk={SHORT}")
            for _, pieces in itertools.product(range(1 + ENDS), (2, 3)):
                step = (await self.steps([SHORT * pieces], 1))[1]
                found.append(Prompt(SHORT, SHORT, step.seconds, pieces == 2))
            del found[-2 * (1 + ENDS) : -2 * ENDS]
        self.frontend.set_policy("fcfs")
        self.progress.advance(bar)
        return found


# ---------------------------------------------------------------- fitting


def fit(decodes: Sequence[Decode], prompts: Sequence[Prompt], about: Profile) -> Profile:
    """`about` says what was measured; its tables are replaced."""
    overhead = max(0.0, statistics.median(one.overhead for one in decodes))
    chunk = max((one.new for one in prompts if one.past), default=CHUNK)
    pieces = [(one.past, one.seconds) for one in prompts if one.new == chunk and not one.last]
    _, slope = line(pieces or [(one.past, one.seconds) for one in prompts if one.new == chunk])
    whole = sorted(
        (n, statistics.median(s))
        for n, s in grouped((p.new, p.seconds) for p in prompts if not p.past and p.last).items()
    )
    # What a longer prompt takes more is not all attention: else the rest of it would cost less than nothing.
    most = [2 * (b - a) / (m * m - n * n) for (n, a), (m, b) in pairwise(whole) if n >= chunk]
    per_pair = max(0.0, min([slope / chunk, *most]))  # seconds for one token to attend to another
    linear: dict[int, float] = {}
    attention: dict[int, float] = {}  # seconds per token of each sequence's context
    for seqs, steps in sorted(grouped((one.seqs, (one.context / one.seqs, one.seconds)) for one in decodes).items()):
        contexts = [context for context, _ in steps]
        if max(contexts) >= 2 * min(contexts) or not attention:
            attention[seqs] = max(0.0, line(steps)[1])
        else:  # time was out, or the cache full: the few tokens of one context tell of noise, fewer sequences of slope
            fewer = max(attention)
            attention[seqs] = attention[fewer] * seqs / fewer
        linear[seqs] = max(0.0, statistics.median(s - attention[seqs] * context for context, s in steps) - overhead)
    # What a prompt's last piece takes more than one that another follows, it takes for the head; with more rows that
    # grows as a decode step does.
    ends, others = (
        [one.seconds for one in prompts if one.past == one.new == SHORT and one.last is last] for last in (True, False)
    )
    head = statistics.median(ends) - statistics.median(others) if ends else 0.0
    least = linear[min(linear)]
    head = min(max(0.0, head), 0.9 * least)
    rows = {seqs: seconds * head / least if least else 0.0 for seqs, seconds in linear.items()}
    linear = {seqs: seconds - rows[seqs] for seqs, seconds in linear.items()}
    for new, seconds in whole:
        if new > max(attention):
            linear[new] = seconds - per_pair * new * new / 2 - head
    tokens = sorted(linear)
    floor = 0.0
    for one in tokens:  # more tokens never cost less
        floor = linear[one] = max(floor, linear[one])
    reach = [1, *(length for length in PROMPTS if length >= CHUNK)]
    fitted = msgspec.structs.replace(
        about,
        constant=overhead,
        linear=Curve(tokens, [linear[one] for one in tokens]),
        head=Curve(sorted(rows), [rows[one] for one in sorted(rows)]),
        head_of_last=True,
        # A graph replays decode steps, and prompts are launched kernel by kernel: on a GPU few tokens take as long.
        prefill_floor=max(0.0, min((seconds for _, seconds in whole), default=0.0) - head),
        prefill_attention=Grid([0, *reach], reach, [[per_pair * n * (p + n / 2) for n in reach] for p in [0, *reach]]),
        decode_attention=Grid(
            sorted(attention), [1, 1 << 16], [[attention[n], attention[n] * (1 << 16)] for n in sorted(attention)]
        ),
    )
    kinds = grouped((kind == "decode", float(f"{ratio:.4g}")) for (kind, _), ratio in errors(fitted, decodes, prompts))
    kept = {kind: random.Random(0).sample(some, min(KEPT, len(some))) for kind, some in kinds.items()}
    return msgspec.structs.replace(fitted, residuals=kept[True], prompt_residuals=kept[False])


def errors(
    profile: Profile, decodes: Iterable[Decode], prompts: Iterable[Prompt]
) -> list[tuple[tuple[str, int], float]]:
    """Measured over predicted, of each step: (kind, size) and the ratio."""
    found = []
    for one in decodes:
        found.append((("decode", one.seqs), one.seconds / profile.step_seconds((), one.seqs, one.context)))
    for prompt in prompts:
        predicted = profile.step_seconds([(prompt.past, prompt.new)], 0, 0, int(prompt.last)) - profile.constant
        kind = "prompt" if not prompt.past else "chunk after"
        found.append(((kind, prompt.past or prompt.new), prompt.seconds / predicted))
    return found


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Offset and slope through the medians of neighbours: a slow step now and then does not move it."""
    near = grouped((round(4 * math.log2(1 + x)), (x, y)) for x, y in points).values()
    medians = [[statistics.median(values) for values in zip(*some, strict=True)] for some in near]
    if len(medians) < 2:
        return (medians[0][1] if medians else 0.0), 0.0
    slope, offset = statistics.linear_regression(*zip(*medians, strict=True))
    return offset, slope


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Values by key."""
    found: dict[K, list[V]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return dict(found)


def error_table(profile: Profile, decodes: Sequence[Decode], prompts: Sequence[Prompt]) -> Table:
    """How far single steps are from the fit."""
    table = Table(title="Steps: measured against the fit", box=box.SIMPLE_HEAD, title_justify="left", show_edge=False)
    for head in ("", "", "steps", "median", "|error| p50", "p90"):
        table.add_column(head, justify="right" if head else "left")
    last = ""
    for (kind, size), ratios in grouped(errors(profile, decodes, prompts)).items():
        off = sorted(abs(ratio - 1) for ratio in ratios)
        shares = statistics.median(ratios), off[len(off) // 2], off[len(off) * 9 // 10]
        unit = "sequences" if kind == "decode" else "tokens"
        table.add_row(kind if kind != last else "", f"{size} {unit}", str(len(ratios)), *(f"{s:.1%}" for s in shares))
        last = kind
    return table


# ---------------------------------------------------------------- the command


def run(
    model: ModelSettings, cluster: ClusterSettings, settings: RunSettings, name: str, out: Path, budget: float
) -> int:
    """Measure, fit, write, and say how good it is. Raises `ValueError`, `OSError`, `StartError`."""
    console = Console()
    ensure(model.model, lambda text: console.print(text, style="dim", highlight=False))
    profile, decodes, prompts = asyncio.run(measure(model, cluster, settings, name, budget, console))
    out.write_bytes(msgspec.json.format(msgspec.json.encode([profile]), indent=1))
    console.print(error_table(profile, decodes, prompts))
    one, prompt = profile.step_seconds((), 1, 256), profile.step_seconds([(0, 256)], 0, 0)
    console.print(
        f"decode of one sequence {one * 1e3:.2f} ms a step, prefill {256 / prompt:,.0f} tokens/s, "
        f"{profile.constant * 1e3:.2f} ms of each step beside the device",
        highlight=False,
    )
    device = out if len(out.parts) > 1 else f"./{out}"
    command = f"minidisagg simulate --cluster both=1@{device} --model {profile.model} --dtype {profile.dtype}"
    console.print(f"profile: {out}\n{command}", highlight=False, soft_wrap=True)
    return 0


async def measure(
    model: ModelSettings, cluster: ClusterSettings, settings: RunSettings, name: str, budget: float, console: Console
) -> tuple[Profile, list[Decode], list[Prompt]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    async with await Frontend.start(model, cluster, settings) as frontend:
        [hello] = frontend.hellos.values()
        config, dtype = load_config(model.model), str(hello.info["dtype"])
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            profiler = Profiler(frontend, progress, budget)
            await profiler.steps([64], 4)  # warm
            budgeted = min(frontend.max_model_len, cluster.decode.max_num_batched_tokens + 1)
            prompts = await profiler.prompts(budgeted)
            room = hello.num_pages * hello.page_size
            decodes = await profiler.decodes(cluster.decode.max_num_seqs, frontend.max_model_len, room)
        weights = config.num_parameters * ITEM_BYTES.get(dtype, 2)
        memory = (hello.num_pages * hello.page_size * hello.kv_bytes_per_token + weights) / UTILIZATION
        about = Profile(
            version=1,
            name=name,
            model=Path(model.model).name,
            dtype=dtype,
            tensor_parallel=1,
            source=f"minidisagg profile, {hello.info['threads']} thread(s) of {machine()['cpu']}"
            if cluster.decode.device == "cpu" else f"minidisagg profile, {cluster.decode.device}",
            licence="Apache-2.0",
            constant=0.0,
            linear=Curve([1], [0.0]),
            head=Curve([1], [0.0]),
            prefill_attention=Grid([1], [1], [[0.0]]),
            decode_attention=Grid([1], [1], [[0.0]]),
            num_layers=config.num_layers,
            kv_bytes_per_token=hello.kv_bytes_per_token,
            weight_bytes=weights,
            memory_bytes=round(memory) + 1,
        )  # fmt: skip
        return fit(decodes, prompts, about), decodes, prompts

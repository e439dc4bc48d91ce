"""Greedy tokens are the same in every mode, over every link, after every fault; and this check is able to fail.

In float64 rounding does not depend on the batch's shape in practice, so tokens are compared exactly.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import msgspec
import pytest
import torch
from cluster import (
    MODEL,
    PAGE,
    Load,
    all_up,
    assert_clean,
    cluster,
    greedy,
    needs_two_cores,
    policy_file,
    prompts,
    run_to_end,
    send_signal,
    settings,
)
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from minidisagg.config import RunSettings
from minidisagg.core.inputlog import read_entries, replay
from minidisagg.core.inputs import LayersDone
from minidisagg.core.plan import PlanItem, SeqInit, StepPlan
from minidisagg.core.tracked import Stage
from minidisagg.model.loader import load_config, load_weights
from minidisagg.model.transformer import Transformer
from minidisagg.policies import load_policy
from minidisagg.runtime.device import Device
from minidisagg.runtime.kv_cache import KVCache

PROMPTS = prompts(200)
OUTPUT = 64
POOL = 150  # pages: the longest request needs 72, and some ten requests run at a time
CPU = torch.device("cpu")


@dataclass
class Run:
    """What an undisturbed run of all prompts gave."""

    tokens: list[list[int]]
    preemptions: int
    prefix_hits: int
    logs: Path


THIRDS = """
from minidisagg import Policy


class Thirds(Policy):
    \"""First come, first served, with every prompt cut into at least three chunks.\"""

    def compose(self, batch, worker):
        for request in [*batch.running, *batch.waiting]:
            batch.add(request, max(1, request.prefill_len // 3))
"""


# What leaves at once over each link in the suite, and with --full over each.
GRANULARITY = {"gloo": "layers:1", "shm": "layers:1", "unix": "chunk", "tcp": "request", "": "auto"}


async def measure(link: str, granularity: str, logs: Path, ahead: int) -> Run:
    shape = settings(
        "disagg" if link else "colocated", link or "auto", POOL, policy=policy_file(THIRDS), granularity=granularity
    )
    async with cluster(shape, RunSettings(record_dir=str(logs), step_ahead=ahead)) as frontend:
        tokens = await run_to_end(frontend, PROMPTS, greedy(OUTPUT))
        stats = await frontend.fresh_stats()
        await assert_clean(frontend)
    hits = sum(s.prefix_hits for s in stats.values())
    return Run(tokens, sum(s.preemptions for s in stats.values()), hits, logs)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_over(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The run over a link ("": colocated); each is made once, over `unix` with steps planned ahead as on a GPU."""

    @cache
    def run(link: str, granularity: str = "") -> Run:
        logs = tmp_path_factory.mktemp(link or "colocated")
        return asyncio.run(measure(link, granularity or GRANULARITY[link], logs, int(link == "unix")))

    return run


@pytest.fixture(scope="module")
def colocated(run_over: Callable[..., Run]) -> Run:
    return run_over("")


# ---------------------------------------------------------------- references


class Dense:
    """The model in a dozen lines: no cache, no pages, no batch."""

    def __init__(self) -> None:
        self.config = load_config(MODEL.model)
        self.weights = {k: w.double() for k, w in load_weights(MODEL.model, self.config).items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.config.rms_norm_eps)

    def logits(self, tokens: list[int]) -> Tensor:
        """[T] → [T, vocabulary]"""
        c, T = self.config, len(tokens)
        half = c.head_dim // 2
        angle = torch.arange(T).double()[:, None] * c.rope.theta ** (-torch.arange(half).double() / half)
        cos, sin = angle.cos(), angle.sin()

        def rotate(x_HTD: Tensor) -> Tensor:
            a, b = x_HTD.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        def heads(x: Tensor, name: str, count: int) -> Tensor:
            return self.linear(x, name).view(T, count, c.head_dim).transpose(0, 1)

        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(c.num_layers):
            p = f"model.layers.{layer}."
            h = self.norm(x, p + "input_layernorm")
            q, k = (
                rotate(heads(h, f"{p}self_attn.{n}_proj", m)) for n, m in (("q", c.num_heads), ("k", c.num_kv_heads))
            )
            v = heads(h, p + "self_attn.v_proj", c.num_kv_heads)
            k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 0) for t in (k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(T, -1)
            x = x + self.linear(out, p + "self_attn.o_proj")
            h = self.norm(x, p + "post_attention_layernorm")
            x = x + self.linear(
                silu(self.linear(h, p + "mlp.gate_proj")) * self.linear(h, p + "mlp.up_proj"), p + "mlp.down_proj"
            )
        return self.linear(self.norm(x, "model.norm"), "lm_head")


def batch_of_one(prompt: list[int], count: int) -> list[int]:
    """The whole prompt in one step, then a token a step, in pages 0, 1, 2, … of a device of its own."""
    config = load_config(MODEL.model)
    model = Transformer(config, load_weights(MODEL.model, config), torch.float64, CPU)
    device = Device(model, KVCache(config, 80, PAGE, torch.float64, CPU))
    ids, start = list(prompt), 0
    with torch.inference_mode():
        for index in range(count):
            pages = list(range(math.ceil(len(ids) / PAGE)))
            item = PlanItem("r", 0, start, len(ids) - start, ids[start:], pages, True, index)
            new = [] if index else [SeqInit("r", 0, prompt, [], greedy(count))]
            start = len(ids)
            ids += device.run(StepPlan(index, [item], new, [])).tokens
    return ids[len(prompt) :]


def chunks_of_prompts(log: Path) -> Counter[str]:
    """In how many steps each request's first prefill was computed, of those that found nothing in the prefix cache."""
    length = {f"{index:08d}": len(prompt) for index, prompt in enumerate(PROMPTS)}
    counts: Counter[str] = Counter()
    hits: set[str] = set()
    with log.open("rb") as file:
        for _, plan in read_entries(file)[1]:
            if plan is not None:
                for item in plan.items:
                    if item.incarnation == 0 and item.start < length[item.request_id]:
                        if item.request_id not in counts and item.start > 0:
                            hits.add(item.request_id)
                        counts[item.request_id] += 1
    assert len(hits) < 60  # of 200, 40 share their first pages with others
    return Counter({request: count for request, count in counts.items() if request not in hits})


# ---------------------------------------------------------------- the oracle


def test_colocated_equals_batch_of_one(colocated: Run) -> None:
    assert min(len(set(tokens[:32])) for tokens in colocated.tokens) >= 16  # no loop could hide a wrong cache
    assert all(len(tokens) == OUTPUT for tokens in colocated.tokens)
    assert 8 <= min(map(len, PROMPTS)) and max(map(len, PROMPTS)) > 500
    assert colocated.preemptions >= 50
    assert colocated.prefix_hits > 0
    assert min(chunks_of_prompts(colocated.logs / "worker-0.1.inputs").values()) >= 3
    # Equal to the argmax after each true prefix means, by induction, equal to greedy decoding.
    model = Dense()
    for prompt, tokens in zip(PROMPTS, colocated.tokens, strict=True):
        assert model.logits(prompt + tokens[:-1])[len(prompt) - 1 :].argmax(-1).tolist() == tokens
    for index in range(0, 200, 20):
        assert batch_of_one(PROMPTS[index], OUTPUT) == colocated.tokens[index]


def pairs(full: bool) -> list[tuple[str, str]]:
    """(link, granularity): of the suite, or the rest of the product."""
    suite = [(link, GRANULARITY[link]) for link in ("gloo", "shm", "unix")]
    units = "request", "chunk", "layers:1", "auto"
    every = [(link, unit) for link in ("gloo", "shm", "tcp", "unix") for unit in units]
    return [pair for pair in every if pair not in suite] if full else suite


@needs_two_cores
@pytest.mark.parametrize(
    ("link", "granularity"), [*pairs(False), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs(True))]
)
def test_disagg_equals_colocated(link: str, granularity: str, run_over: Callable[..., Run]) -> None:
    run = run_over(link, granularity)
    assert run.tokens == run_over("").tokens
    assert run.preemptions >= 50
    log = run.logs / "prefill-0.1.inputs"
    assert min(chunks_of_prompts(log).values()) >= 3
    assert layers_reported(log) == {"layers:1": {1, 2}, "auto": {2}}.get(granularity, set())


def layers_reported(log: Path) -> set[int]:
    """What the device has said before its steps' ends. On a tiny model `auto` has no group worth a piece."""
    with log.open("rb") as file:
        return {entry.what.layer for entry, _ in read_entries(file)[1] if isinstance(entry.what, LayersDone)}


@needs_two_cores
def test_two_and_two_workers_change_no_token(colocated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """More workers than cores, which only a test may have: any prefill worker hands over to any decode worker."""
    monkeypatch.setattr("minidisagg.runtime.launch.assign_cpus", lambda _: [[0], [1], [0], [1]])
    shape = msgspec.structs.replace(settings("disagg", "gloo", POOL), prefill_workers=2, decode_workers=2)

    async def run() -> list[list[int]]:
        async with cluster(shape) as frontend:
            tokens = await run_to_end(frontend, PROMPTS, greedy(OUTPUT))
            sent = {(name, link.peer) for name, s in (await frontend.fresh_stats()).items() for link in s.links}
            assert sent == {(f"prefill-{p}", f"decode-{d}") for p in range(2) for d in range(2)}
            await assert_clean(frontend)
            return tokens

    assert asyncio.run(run()) == colocated.tokens


@pytest.mark.slow
def test_steps_planned_ahead_change_no_token(colocated: Run, tmp_path: Path) -> None:
    assert asyncio.run(measure("", "auto", tmp_path, 1)).tokens == colocated.tokens


LATE = """
from minidisagg import Policy
from minidisagg.core.policy import Placement


class Late(Policy):
    def place(self, request, cluster):
        if not request.prefill:
            return Placement("prefill-0", None)
        return Placement("prefill-0", "decode-0")
"""


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize("link", ["gloo", "shm"])
def test_decode_placed_late_changes_no_token(link: str, colocated: Run, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)

    async def run() -> list[list[int]]:
        shape = settings("disagg", link, POOL, policy=f"{tmp_path}/late.py:Late")
        async with cluster(shape) as frontend:
            tokens = await run_to_end(frontend, PROMPTS, greedy(OUTPUT))
            await assert_clean(frontend)
            return tokens

    assert asyncio.run(run()) == colocated.tokens


@needs_two_cores
def test_recorded_inputs_replay_to_the_same_plans(run_over: Callable[..., Run]) -> None:
    for link, names in (("", ["worker-0"]), ("unix", ["prefill-0", "decode-0"]), ("shm", ["prefill-0", "decode-0"])):
        for name in names:
            with (run_over(link).logs / f"{name}.1.inputs").open("rb") as log:
                plans = list(replay(log, load_policy))
            assert sum(recorded is not None for recorded, _ in plans) > 100
            assert [recorded for recorded, _ in plans] == [replayed for _, replayed in plans]


# ---------------------------------------------------------------- kills


async def with_kills(link: str, victims: list[str], transfer_delay: float, seed: int) -> list[list[int]]:
    """Tokens of a run in which each victim is killed while the KV of some request is on its way."""
    rng = random.Random(seed)
    run = RunSettings(delays={"transfer": transfer_delay})
    async with cluster(settings("disagg", link, POOL, granularity="layers:1"), run) as frontend:
        load = Load(frontend)
        load.submit_all(PROMPTS, greedy(OUTPUT))
        for victim in victims:
            await all_up(frontend)
            await load.until(partial(ripe, load, len(load.open) - rng.randint(3, 15)))
            send_signal(frontend, victim, signal.SIGKILL)
            await asyncio.sleep(0.05)
        results = await load.finished()
        assert {r.finish for r in results} == {"length"}, Counter((r.finish, r.error) for r in results)
        assert [name for _, name in frontend.restarted] == victims
        await assert_clean(frontend)
    return [r.tokens for r in results]


def ripe(load: Load, few: int) -> bool:
    """At most `few` requests are left, and the KV of one is on its way."""
    return len(load.open) <= few and any(r.stage is Stage.TRANSFER for r in load.tracked())


@needs_two_cores
def test_kills_in_mid_transfer_change_no_token(colocated: Run) -> None:
    assert asyncio.run(with_kills("shm", ["decode-0", "prefill-0"], 0.002, 0)) == colocated.tokens


@pytest.mark.parametrize(
    "link", [pytest.param("", marks=pytest.mark.slow), pytest.param("gloo", marks=needs_two_cores)]
)
def test_a_kill_at_a_random_moment_changes_no_token(link: str, colocated: Run) -> None:
    async def run(victim: str, after: float) -> list[list[int]]:
        shape = settings("disagg" if link else "colocated", link or "auto", POOL, policy=policy_file(THIRDS))
        async with cluster(shape) as frontend:
            load = Load(frontend)
            load.submit_all(PROMPTS, greedy(OUTPUT))
            await load.until(lambda: len(load.open) < len(PROMPTS))
            await asyncio.sleep(after)
            assert load.open, "the kill came too late"
            send_signal(frontend, victim, signal.SIGKILL)
            results = await load.finished()
            assert [name for _, name in frontend.restarted] == [victim]
            await assert_clean(frontend)
        return [r.tokens for r in results]

    rng = random.Random()  # another moment, and another victim, every time; a failure says which
    victim, after = rng.choice(["prefill-0", "decode-0"]) if link else "worker-0", rng.uniform(0.0, 2.0)
    assert asyncio.run(run(victim, after)) == colocated.tokens, (victim, after)


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize("link", ["gloo", "shm", "unix", "tcp"])
def test_many_kills_change_no_token(link: str, colocated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.runtime.launch.BACKOFF", (0.0,))
    for seed in range(3):
        victims = random.Random(seed).choices(["decode-0", "prefill-0"], k=2)
        assert asyncio.run(with_kills(link, victims, 0.02, seed)) == colocated.tokens


# ---------------------------------------------------------------- the oracle can fail

ZERO_PAGE = """
from pathlib import Path
from minidisagg import Policy
from minidisagg.runtime.device import Device


class ZeroPage(Policy):
    pass


def prepare(self, plan):
    fresh = {(new.request_id, new.incarnation) for new in plan.new}
    for item in plan.items:
        if (item.request_id, item.incarnation) in fresh:
            self.cache.data[:, :, item.pages[item.start // self.cache.page_size // 2]] = 0
    return original(self, plan)


if Path("/proc/self/comm").read_text().strip() == "decode-0":
    original, Device.prepare = Device.prepare, prepare
"""


@needs_two_cores
def test_one_zeroed_page_changes_the_tokens(colocated: Run, tmp_path: Path) -> None:
    """On the decode worker, one received page of each request: a policy file is how test code gets into it."""
    (tmp_path / "zero_page.py").write_text(ZERO_PAGE)
    chosen = [index for index, prompt in enumerate(PROMPTS) if len(prompt) >= PAGE][:60]

    async def run() -> list[list[int]]:
        shape = settings("disagg", policy=f"{tmp_path}/zero_page.py:ZeroPage", pages=4096)
        model = msgspec.structs.replace(MODEL, prefix_caching=False)
        async with cluster(shape, model=model) as frontend:
            return await run_to_end(frontend, [PROMPTS[index] for index in chosen], greedy(OUTPUT))

    tokens = asyncio.run(run())
    assert [out[0] for out in tokens] == [colocated.tokens[i][0] for i in chosen]  # these came from prefill
    changed = sum(out != colocated.tokens[i] for out, i in zip(tokens, chosen, strict=True))
    assert changed / len(chosen) >= 0.95, f"{changed} of {len(chosen)}"

"""The fused steps without a GPU: Triton's interpreter runs the kernels, plain torch stands for flash attention, and the
decode step is computed where a graph of it would be replayed. Tests/test_gpu.py has the real ones."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_gpu import Eager
from torch import Tensor
from torch.nn.attention import SDPBackend

from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import NO_TOKEN, PlanItem, SeqInit, StepPlan
from minidisagg.model.dummy import SHAPES, parameter_shapes
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.device import Device
from minidisagg.runtime.kv_cache import KVCache

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton, and no GPU"
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton's
]
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
PAGE, PAGES = 8, 64
LONG, GRID, FINE, COARSE = 16, 8, 32, 16  # in place of a thousand tokens and more
CONFIG = replace(
    SHAPES["tiny"], hidden_size=128, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64,
    vocab_size=96, dtype="float32",
)  # fmt: skip


def flash(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int, *_: Any
) -> tuple[Tensor]:
    """What `torch.ops.aten._flash_attention_forward` gives: causal from the end of the keys."""
    assert (int(q_ends[-1]), int(k_ends[-1])) == (len(q), len(k))
    parts = []
    for (first, last), (begin, end) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        queries, keys, values = (
            x[a:b].transpose(0, 1)[None] for x, a, b in ((q, first, last), (k, begin, end), (v, begin, end))
        )
        N, C = queries.shape[2], keys.shape[2]
        assert most_q >= N and most_k >= C
        mask = torch.ones(N, C, dtype=torch.bool).tril(C - N)
        parts.append(F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)[0].transpose(0, 1))
    return (torch.cat(parts),)


class Anything:
    """A stream, an event, a graph: takes every call."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a `FusedDevice` on the CPU."""
    fused: ModuleType = importlib.import_module("minidisagg.model.fused")
    device: ModuleType = importlib.import_module("minidisagg.runtime.fused_device")
    for name, value in (("LONG", LONG), ("GRID", GRID), ("FINE", FINE), ("COARSE", COARSE)):
        monkeypatch.setattr(fused, name, value)
    monkeypatch.setattr(device, "LONG", LONG)
    monkeypatch.setattr(fused, "BACKENDS", [SDPBackend.MATH])
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    for name in "Stream", "Event", "CUDAGraph":
        monkeypatch.setattr(torch.cuda, name, Anything)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"multi_processor_count": 2}))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)

    def make(max_prompt: int = 64) -> Any:
        cache = KVCache(CONFIG, PAGES, PAGE, torch.float32, CPU)
        cache.data.fill_(float("nan"))  # what an earlier owner may have left
        model = fused.FusedTransformer(CONFIG, weights(), torch.float32, CPU)
        one = device.FusedDevice(model, cache, 8, 128, max_prompt)
        one.warm_up()
        assert not cache.data.isfinite().any(), "warming up wrote into pages"
        one.graphs = {size: Eager(one, size) for size in one.sizes}
        return one

    return make


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * size[-1] ** -0.5
        for name, size in parameter_shapes(CONFIG).items()
    }


def exact() -> Device:
    return Device(Transformer(CONFIG, weights(), torch.float32, CPU), KVCache(CONFIG, PAGES, PAGE, torch.float32, CPU))


def test_prompts_chunks_and_decodes_are_those_of_the_portable_form(made: Callable[..., Any]) -> None:
    """Short and long prompts, two long ones with padding between and behind them, chunks with a prefix, and decodes
    among them: the same tokens and KV, and nothing read or written of pages that the plan does not hold."""
    rng, fused, portable = random.Random(0), made(), exact()
    ids = [[rng.randrange(96) for _ in range(n)] for n in (3, 16, 21, 1, 9, 26)]
    free = rng.sample(range(PAGES), PAGES)
    pages = [[free.pop() for _ in range(-(-(len(prompt) + 8) // PAGE))] for prompt in ids]
    chunks = [[(0, len(prompt))] for prompt in ids]
    chunks[4], chunks[5] = [(0, 5), (5, 9)], [(0, 17), (17, 24), (24, 26)]
    seen = set[int]()
    for step in range(5):
        new, items = [], []
        for i, prompt in enumerate(ids):
            begin, end = chunks[i].pop(0) if chunks[i] else (len(prompt) - 1, len(prompt))
            new += [SeqInit(str(i), 0, list(prompt), [], GREEDY)] if step == 0 else []
            items.append(
                PlanItem(str(i), 0, begin, end - begin, prompt[begin:end], pages[i], end == len(prompt), step)
            )
        rng.shuffle(items)
        want, got = portable.run(StepPlan(step, items, new, [])), fused.run(StepPlan(step, items, new, []))
        assert got.tokens == want.tokens and NO_TOKEN not in got.tokens
        for item, token in zip([item for item in items if item.sample], want.tokens, strict=True):
            ids[int(item.request_id)].append(token)
            seen.add(token)
        for item in items:
            ours, theirs = (
                one.cache.data[:, :, item.pages].transpose(3, 4).reshape(2, 2, -1, 1, 64) for one in (fused, portable)
            )
            end = item.start + item.count
            torch.testing.assert_close(ours[:, :, :end], theirs[:, :, :end], rtol=1e-4, atol=1e-4)
    assert len(seen) > 5 and not fused.cache.data[:, :, free].isfinite().any()


@pytest.mark.parametrize("broken", [1, 2])
def test_a_prompt_that_is_not_finite_is_alone_with_it(made: Callable[..., Any], broken: int) -> None:
    """Beside whom it stands in a step, and behind whom."""
    fused, portable = made(), exact()
    fused.model.embed_VE[95] = float("nan")
    prompts = [[95 if i == broken else i + 1, *range(n - 1)] for i, n in enumerate((5, 21, 18))]
    new = [SeqInit(str(i), 0, prompt, [], GREEDY) for i, prompt in enumerate(prompts)]
    pages = [list(range(i * 4, i * 4 + 4)) for i in range(3)]
    items = [PlanItem(str(i), 0, 0, len(prompt), prompt, pages[i], True, 0) for i, prompt in enumerate(prompts)]
    want = portable.run(StepPlan(0, items, new, [])).tokens
    want[broken] = NO_TOKEN
    assert fused.run(StepPlan(0, items, new, [])).tokens == want


def test_there_is_a_plan_for_every_long_prompt(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fused: ModuleType = importlib.import_module("minidisagg.model.fused")
    for most in (15, 16, 17, 31, 32, 33, 48, 100):
        lengths = fused.padded_lengths(most)
        assert lengths == sorted(set(lengths), reverse=True)
        assert {rows + fused.padding(rows) for rows in range(LONG, most + 1)} == set(lengths), most
    asked = list[int]()
    monkeypatch.setattr(fused.FusedTransformer, "plan", lambda self, length: asked.append(length))
    device = made(40)
    assert asked == fused.padded_lengths(40)
    asked.clear()
    device.begin(8, 30)
    assert not asked, "there is nothing new"
    device.begin(8, 60)
    assert asked == fused.padded_lengths(60) and device.lengths == asked

"""The GPU's kernels under Triton's interpreter (tests/conftest.py), against plain torch: where there is no GPU their
logic is tested all the same. Where there is one, tests/test_gpu.py runs the real ones."""

from __future__ import annotations

import importlib.util
import math
import random
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import NO_TOKEN
from minidisagg.model.sampler import SequenceSampling, resample, sample

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton, and no GPU"
)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton's
EPS = 1e-5


@pytest.fixture
def kernels() -> ModuleType:
    """Imported here, as Triton is not everywhere."""
    return importlib.import_module("minidisagg.model.kernels")


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


@needs_triton
@pytest.mark.parametrize("size", [48, 576, 1024])
def test_add_norm(kernels: ModuleType, size: int) -> None:
    x, added, weight, out = torch.randn(3, size), torch.randn(3, size), torch.randn(size), torch.empty(3, size)
    kernels.add_norm(x, None, weight, EPS, out)
    torch.testing.assert_close(out, norm(x, weight))
    total = x + added
    kernels.add_norm(x, added, weight, EPS, out)
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(out, norm(total, weight))


@needs_triton
def test_silu_mul(kernels: ModuleType) -> None:
    gate_up = torch.randn(3, 2 * 1100)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(kernels.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


@needs_triton
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("decode", "head_dim"), [(False, 64), (True, 64), (True, 128)])
def test_rope_write(
    kernels: ModuleType, heads: int, kv_heads: int, normed: bool, decode: bool, head_dim: int
) -> None:
    page_size, pages, rows = 4, 6, 5
    count = heads + 2 * kv_heads
    qkv = torch.randn(rows, count, head_dim)
    weights = torch.randn(heads + kv_heads, head_dim) if normed else None
    positions = torch.tensor([0, 7, 8, 100_000, 3], dtype=torch.int32)
    slots = torch.tensor([4 * 4, 2 * 4 + 3, 5 * 4, 1 * 4 + 1, -1], dtype=torch.int32)
    lasts = torch.tensor([1, 1, 0, 1, 1], dtype=torch.int32)
    inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    layer = torch.randn(2, pages, kv_heads, page_size, head_dim)
    before = layer.clone()

    angle = positions[:, None].double() * inv_freq.double()
    cos, sin = (torch.cat((f(angle), f(angle)), -1).float()[:, None] for f in (torch.cos, torch.sin))
    qk = qkv[:, : heads + kv_heads]
    qk = norm(qk, weights) if weights is not None else qk
    left, right = qk.chunk(2, -1)
    want = qk * cos + torch.cat((-right, left), -1) * sin

    original = qkv.clone()
    kernels.rope_write(qkv, positions, slots, None if decode else lasts, inv_freq, weights, layer, EPS)
    near = {"atol": 2e-2, "rtol": 0.0}  # float32 angles of a position of 100,000
    torch.testing.assert_close(qkv[:, : heads + kv_heads], want, **near)
    torch.testing.assert_close(qkv[:, heads + kv_heads :], original[:, heads + kv_heads :])
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        torch.testing.assert_close(layer[0, page, :, offset], want[row, heads:], **near)
        torch.testing.assert_close(layer[1, page, :, offset], original[row, heads + kv_heads :])
        before[:, page, :, offset] = layer[:, page, :, offset]
        if offset == 0 if decode else lasts[row]:
            before[:, page, :, offset + 1 :] = 0.0
    assert torch.equal(layer, before), "and nothing else is written"


@needs_triton
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize(("page_size", "splits"), [(64, 1), (64, 4), (16, 2), (128, 1), (24, 2)])
def test_paged_decode(
    kernels: ModuleType, head_dim: int, heads: int, kv_heads: int, page_size: int, splits: int
) -> None:
    """Lengths at the edges of pages and tiles, one of padding; every page and offset that is nobody's is poisoned."""
    rng = random.Random(f"{head_dim}/{heads}/{page_size}/{splits}")
    contexts = [1, page_size, page_size + 1, 63, 130, 0]
    width = 1 + max(contexts) // page_size + 1
    free = list(range(40))
    rng.shuffle(free)
    layer = torch.full((2, 40, kv_heads, page_size, head_dim), math.nan)
    tables = torch.full((len(contexts), width), 10**6, dtype=torch.int32)
    qkv = torch.randn(len(contexts), heads + 2 * kv_heads, head_dim)
    want = torch.zeros(len(contexts), heads, head_dim)
    for row, context in enumerate(contexts):
        if not context:
            continue
        keys, values = torch.randn(2, kv_heads, context, head_dim)
        for n in range(-(-context // page_size)):
            page = tables[row, n] = free.pop()
            part = slice(n * page_size, min(context, (n + 1) * page_size))
            layer[0, page, :, : part.stop - part.start] = keys[:, part]
            layer[1, page, :, : part.stop - part.start] = values[:, part]
        group = heads // kv_heads
        scores = qkv[row, :heads].view(kv_heads, group, head_dim) @ keys.transpose(1, 2) * head_dim**-0.5
        want[row] = (scores.softmax(-1) @ values).view(heads, head_dim)
    out = torch.full_like(want, math.nan)
    counts = torch.tensor(contexts, dtype=torch.int32)
    kernels.paged_decode(qkv, layer, tables, torch.tensor([width], dtype=torch.int32), counts, out, splits)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


@needs_triton
def test_begin_decode(kernels: ModuleType) -> None:
    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tokens, positions, slots = kernels.begin_decode(
        int32(7, -1, -1, 0), int32(0, 2, 1, 0), int32(50, NO_TOKEN, 60), int32(1, 9, 8, 0),
        int32(5, 0, 0, 3, 1, 4, 6, 2, 0, 0, 0, 0), int32(3), 4,
    )  # fmt: skip
    assert tokens.tolist() == [7, 60, 0, 0]
    assert positions.tolist() == [0, 8, 7, 0]
    assert slots.tolist() == [5 * 4, 4 * 4, 2 * 4 + 3, -1]


@needs_triton
def test_splits(kernels: ModuleType) -> None:
    assert [kernels.splits_for(n, 8, 132) for n in (1, 2, 8, 16, 64, 256)] == [16, 16, 4, 2, 1, 1]


@needs_triton
def test_copy_rows(kernels: ModuleType) -> None:
    """Scattered pages to scattered pages, and by way of staging memory; nothing else is written."""
    copy_rows = importlib.import_module("minidisagg.transfer.kernels").copy_rows
    source, target = torch.randint(1 << 40, (2, 3, 7, 1500))
    mine, theirs = torch.tensor([5, 0, 2]), torch.tensor([1, 6, 3])
    want = target.clone()
    want[:, theirs] = source[:, mine]
    staged = torch.zeros(3, 3, 1500, dtype=torch.int64)
    copy_rows(source, mine, staged, None, 4)
    assert torch.equal(staged, source[:, mine])
    by_staging = target.clone()
    copy_rows(staged, None, by_staging, theirs, 4)
    copy_rows(source, mine, target, theirs, 4)
    assert torch.equal(target, want) and torch.equal(by_staging, want)
    copy_rows(source + 1, mine, target, torch.tensor([-1, 4, -1]), 4)  # pages that nobody wants any more
    want[:, 4] = source[:, 0] + 1
    assert torch.equal(target, want)


def test_what_is_sampled_on_the_card_is_what_the_host_would_sample() -> None:
    """The same tokens from the same logits, with what was said counted on either side."""
    rng, vocab = random.Random(3), 700
    for trial in range(60):
        torch.manual_seed(trial)
        rows = []
        for row in range(rng.randint(1, 6)):
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.0, 0.3, 1.0, 2.0]), top_k=rng.choice([0, 1, 5, 50, 10_000]),
                top_p=rng.choice([1.0, 0.9, 0.4, 0.01]), min_p=rng.choice([0.0, 0.0, 0.1, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.7]), presence_penalty=rng.choice([0.0, 0.5]),
                frequency_penalty=rng.choice([0.0, -0.5]), seed=trial * 10 + row, min_tokens=rng.choice([0, 3]),
                stop_token_ids=[1, 2], max_tokens=8,
            )  # fmt: skip
            prompt = frozenset(rng.randrange(vocab) for _ in range(20))
            output = Counter(rng.randrange(vocab) for _ in range(rng.choice([0, 10])))
            rows.append((SequenceSampling(params, prompt, output), SequenceSampling(params, prompt, output.copy())))
        for index in range(5):
            logits = torch.randn(len(rows), vocab) * 4
            if rng.random() < 0.2:
                logits[rng.randrange(len(rows))] = rng.choice([math.nan, -math.inf])
            logits[:, [1, 2]] += 9.0
            best = logits.max(-1)
            got = torch.where(best.values.isfinite(), best.indices, NO_TOKEN).int()
            resample([(there, index, logits[n]) for n, (_, there) in enumerate(rows)], got)
            want = sample(logits.clone(), [(here, index) for here, _ in rows])
            assert got.tolist() == want, (trial, index)
            for (here, _), token in zip(rows, want, strict=True):
                if token != NO_TOKEN:
                    here.output[token] += 1

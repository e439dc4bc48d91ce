"""Step plans in, tokens out: chunking, a step ahead, state, and what a step is said to cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minidisagg.config import WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import PlanItem, SeqInit, StepPlan
from minidisagg.model.attention import build_batch
from minidisagg.model.config import ModelConfig, RopeConfig
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.ceilings import measure_ceilings
from minidisagg.runtime.device import Device, pages_begun, step_work
from minidisagg.runtime.kv_cache import KVCache
from minidisagg.runtime.load import dtype_of

CPU = torch.device("cpu")
PAGE = 8
CONFIG = ModelConfig(
    name="tiny",
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_model_len=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    eos_token_ids=(2,),
    bos_token_id=1,
    dtype="float32",
)
PROMPT = [(7 * i + 3) % 97 for i in range(21)]
PAGES = [9, 2, 17, 4, 11]
SAMPLED = SamplingParams(temperature=1.5, top_p=0.95, seed=11, repetition_penalty=1.3, frequency_penalty=0.4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.embed_tokens": (97, 32), "model.norm": (32,)}
    for i in range(CONFIG.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (32,), layer + "post_attention_layernorm": (32,)}
        shapes |= {layer + f"self_attn.{p}_proj": (16 if p in "kv" else 32, 32) for p in "qkvo"}
        shapes |= {layer + f"mlp.{p}_proj": (48, 32) for p in ("gate", "up")} | {layer + "mlp.down_proj": (32, 48)}
    return {
        name + ".weight": torch.randn(shape, generator=generator) * 0.4 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def device() -> Device:
    cache = KVCache(CONFIG, 20, PAGE, torch.float64, CPU)
    cache.data.fill_(torch.nan)  # what an earlier owner may have left
    return Device(Transformer(CONFIG, random_weights(), torch.float64, CPU), cache)


def new(name: str, sampling: SamplingParams, output: list[int] | None = None) -> SeqInit:
    return SeqInit(name, 0, PROMPT, output or [], sampling)


def item(name: str, ids: list[int], start: int, end: int, sample: bool = True, pages: list[int] = PAGES) -> PlanItem:
    index = max(end - len(PROMPT), 0)
    return PlanItem(name, 0, start, end - start, ids[start:end], pages, sample, index)


def generate(
    dev: Device, chunk: int, count: int, sampling: SamplingParams, emitted: list[int] | None = None
) -> list[int]:
    """The output after `count` tokens, of which `emitted` came from elsewhere and are recomputed in chunks."""
    ids, step, out = PROMPT + (emitted or []), 0, list(emitted or [])
    for start in range(0, len(ids), chunk):
        end = min(start + chunk, len(ids))
        plan = StepPlan(
            step, [item("a", ids, start, end, end == len(ids))], [new("a", sampling, out)] * (not start), []
        )
        out = out + dev.run(plan).tokens
        step += 1
    while len(out) < count:
        ids = PROMPT + out
        out += dev.run(StepPlan(step, [item("a", ids, len(ids) - 1, len(ids))], [], [])).tokens
        step += 1
    return out


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SAMPLED], ids=["greedy", "sampled"])
def test_chunks_and_resubmission_give_the_same_tokens(sampling: SamplingParams) -> None:
    whole = generate(device(), 100, 16, sampling)
    assert len(set(whole)) > 4
    for chunk in (1, 5, 8, 20):
        assert generate(device(), chunk, 16, sampling) == whole
    assert generate(device(), 6, 16, sampling, emitted=whole[:7]) == whole  # another worker, after a failure


def test_mixed_steps_one_ahead() -> None:
    """b prefills in chunks while a decodes, and a's token is the one that the device sampled last."""
    want = generate(device(), 100, 6, SAMPLED)
    dev = device()
    ids = PROMPT + [0] * 6
    assert dev.run(StepPlan(0, [item("a", ids, 0, 21)], [new("a", SAMPLED)], [])).tokens == want[:1]
    others = [0, 1, 3, 5, 6]
    got: list[list[int]] = []
    for i, (start, end) in enumerate([(0, 7), (7, 8), (8, 21)]):
        a = PlanItem("a", 0, 21 + i, 1, [], PAGES, True, 1 + i)
        b = item("b", PROMPT, start, end, end == 21, others)
        got.append(dev.run(StepPlan(1 + i, [b, a], [new("b", SAMPLED)] * (not i), [])).tokens)
    assert got == [[want[1]], [want[2]], [want[0], want[3]]]
    known = PlanItem("b", 0, 21, 1, [want[0]], others, True, 1)
    ahead = PlanItem("a", 0, 24, 1, [], PAGES, True, 4)
    assert dev.run(StepPlan(9, [known, ahead], [], [])).tokens == [want[1], want[4]]


def test_zeroing_a_page_changes_what_comes() -> None:
    want = generate(device(), 100, 16, SamplingParams(temperature=0))
    dev = device()
    assert generate(dev, 100, 3, SamplingParams(temperature=0)) == want[:3]
    ids, out = PROMPT + want[:3], want[:3]
    dev.cache.data[:, :, PAGES[1]] = 0.0
    while len(out) < 16:
        out = out + dev.run(StepPlan(0, [item("a", ids, len(ids) - 1, len(ids))], [], [])).tokens
        ids = PROMPT + out
    assert out != want


def test_bad_plans_are_refused() -> None:
    dev = device()
    with pytest.raises(ValueError, match="request a, incarnation 0"):
        dev.run(StepPlan(0, [item("a", PROMPT, 0, 21)], [], []))
    dev.run(StepPlan(0, [item("a", PROMPT, 0, 21)], [new("a", SAMPLED)], []))
    with pytest.raises(ValueError, match="2 of 3 pages"):
        dev.run(StepPlan(0, [item("a", PROMPT, 0, 21, pages=[1, 2])], [], []))
    dev.run(StepPlan(1, [], [], [("a", 0)]))
    with pytest.raises(ValueError, match="0 of 1 tokens"):  # the last token went with the sequence
        dev.run(StepPlan(2, [PlanItem("a", 0, 21, 1, [], PAGES, False, 1)], [], []))
    assert not dev.sequences and not dev.last_token


def test_pages_begun() -> None:
    assert pages_begun([item("a", PROMPT, 0, 21)], PAGE) == [PAGES[2]]
    assert pages_begun([item("a", PROMPT, 0, 16)], PAGE) == []
    assert pages_begun([item("a", PROMPT, 16, 17), item("b", PROMPT, 17, 18)], PAGE) == [PAGES[2]]


def test_step_work_counts_by_hand() -> None:
    plan = StepPlan(0, [item("a", PROMPT, 0, 3, False), item("b", PROMPT, 4, 5)], [], [])
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    pairs = (1 + 2 + 3) + 5
    flops, nbytes = step_work(plan, CONFIG, 2)
    assert flops == 2 * (2 * layer * 4 + 97 * 32) + 4 * 2 * 32 * pairs
    assert nbytes == 2 * (2 * layer + 97 * 32) + (3 + 5) * 2 * 2 * 2 * 8 * 2


def test_ceilings_are_of_this_world() -> None:
    read, flops = measure_ceilings(torch.float32, threads=1)
    assert 1e8 < read < 1e13 and 1e8 < flops < 1e15


@pytest.mark.parametrize("chunk", [100, 5])
def test_logprobs_of_prompt_and_output_are_the_models_own(chunk: int) -> None:
    sampling = SamplingParams(temperature=0, frequency_penalty=0.5, logprobs=2, prompt_logprobs=3)
    dev, ids, values = device(), list(PROMPT), {}
    for step in range(15):
        start = step * chunk if step * chunk < len(PROMPT) else len(ids) - 1
        end = min(start + chunk, len(ids))
        plan = StepPlan(step, [item("a", ids, start, end, end == len(ids))], [new("a", sampling)] * (not step), [])
        result = dev.run(plan)
        ids += result.tokens
        for found in result.logprobs:
            values |= dict(enumerate(found.values, found.first))
    assert sorted(values) == list(range(1, len(ids))), "one for each token that another precedes"

    dense = device()
    batch = build_batch([item("b", ids, 0, len(ids), pages=list(range(8)))], [ids], dense.cache, torch.float64, CPU)
    x_NE = dense.model.hidden(batch, dense.cache)
    expected = dense.model.logits(x_NE).log_softmax(-1)
    for position, value in values.items():
        row = expected[position - 1]
        assert value.logprob == pytest.approx(float(row[ids[position]]), abs=1e-9)
        top = row.topk(3 if position < len(PROMPT) else 2)
        assert [token for token, _ in value.top] == top.indices.tolist()
        assert [logprob for _, logprob in value.top] == pytest.approx(top.values.tolist(), abs=1e-9)


@pytest.mark.parametrize(
    ("asked", "checkpoint", "fast", "expected"),
    [
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "bfloat16", False, torch.float32),
        ("auto", "float16", True, torch.bfloat16),
        ("auto", "float32", True, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
    ],
)
def test_auto_is_what_the_cpu_is_fast_in(
    asked: str, checkpoint: str, fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidisagg.runtime.load.fast_in_bfloat16", lambda: fast)
    config = dataclasses.replace(CONFIG, dtype=checkpoint)
    assert dtype_of(WorkerSettings(dtype=asked), config) is expected
    if asked == "auto":  # a GPU has them all
        assert dtype_of(WorkerSettings(device="cuda"), config) is getattr(torch, checkpoint)


def test_layers_are_reported_when_their_kv_is_in_the_cache() -> None:
    dev = device()
    page, seen = PAGES[0], []

    def report(layer: int) -> None:
        written = [bool(dev.cache.data[i, :, page].isfinite().all()) for i in range(CONFIG.num_layers)]
        seen.append((layer, written))

    first = StepPlan(0, [item("a", PROMPT, 0, 21)], [new("a", SAMPLED)], [], [1])
    dev.run(first, report)
    assert seen == [(1, [True, False])], "the second layer was not asked for, and is not computed yet"

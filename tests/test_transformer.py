"""The transformer against Hugging Face's, through a paged cache with scrambled pages."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minidisagg.core.plan import PlanItem
from minidisagg.model.attention import build_batch
from minidisagg.model.config import ModelConfig, RopeConfig
from minidisagg.model.linear import OutputHead
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.kv_cache import KVCache, num_pages_for, page_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers deprecates inside itself says nothing about this project
    import transformers

CPU = torch.device("cpu")
PAGE = 16
VOCAB = 131


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shape(architecture: str, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = dict(
        name=architecture,
        architecture=architecture,
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_model_len=256,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="float32",
    )
    return ModelConfig(**(fields | changes))


SHAPES = {
    "llama3": shape("LlamaForCausalLM", rope=RopeConfig(theta=500.0, factor=8.0, original_max_len=32)),
    "llama_tied": shape("LlamaForCausalLM", tie_embeddings=True, num_heads=4, num_kv_heads=4, head_dim=12),
    "qwen2": shape("Qwen2ForCausalLM", qkv_bias=True, tie_embeddings=True),
    "qwen3": shape("Qwen3ForCausalLM", qk_norm=True, head_dim=16, rope=RopeConfig(theta=1e6)),
    "mistral": shape("MistralForCausalLM", num_kv_heads=3),
    "mistral_window": shape("MistralForCausalLM", sliding_window=21, windowed_layers=(0, 1, 2)),
    "qwen3_window": shape("Qwen3ForCausalLM", qk_norm=True, sliding_window=40, windowed_layers=(0, 2)),
    "linear_rope": shape("LlamaForCausalLM", rope=RopeConfig(theta=500.0, factor=3.0, original_max_len=0)),
}


def hugging_face(config: ModelConfig) -> Any:
    """A random model of transformers; norms and biases are random too, so that leaving one out shows."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.original_max_len == 0:
        rope = {"rope_type": "linear", "rope_theta": config.rope.theta, "factor": config.rope.factor}
    elif config.rope.factor != 1.0:
        rope = {
            "rope_type": "llama3",
            "rope_theta": config.rope.theta,
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_max_len,
        }
    common: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_model_len,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )
    if config.architecture == "MistralForCausalLM":
        common["sliding_window"] = config.sliding_window or None
    elif config.windowed_layers:
        kinds = [f"{'sliding' if i in config.windowed_layers else 'full'}_attention" for i in range(config.num_layers)]
        common |= {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        hf_config = getattr(transformers, config.architecture.replace("ForCausalLM", "Config"))(**common)
        model = getattr(transformers, config.architecture)(hf_config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.15)
    return model


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    weights = dict(hugging_face(config).state_dict())
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def scrambled_cache(config: ModelConfig, dtype: torch.dtype) -> tuple[KVCache, list[int]]:
    cache = KVCache(config, 40, PAGE, dtype, CPU)
    cache.data.normal_()  # what a page held before must not matter
    return cache, random.Random(5).sample(range(40), 40)


def span(name: str, ids: list[int], start: int, end: int, pages: list[int]) -> PlanItem:
    return PlanItem(name, 0, start, end - start, ids[start:end], pages, True, 0)


def step(model: Transformer, cache: KVCache, items: list[PlanItem]) -> Tensor:
    batch = build_batch(items, [item.tokens for item in items], cache, model.dtype, CPU)
    return model.logits(model.hidden(batch, cache)[batch.sample_rows_S])


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str) -> None:
    """Whole prompt, chunks, then decodes of two sequences of different lengths in mixed steps."""
    config = SHAPES[name]
    reference = hugging_face(config)
    model = Transformer(config, random_weights(config), torch.float32, CPU)
    cache, pages = scrambled_cache(config, torch.float32)
    rng = random.Random(1)
    long, short = ([rng.randrange(VOCAB) for _ in range(n)] for n in (220, 30))
    with torch.inference_mode():
        want_long, want_short = (reference(torch.tensor([ids])).logits[0] for ids in (long, short))

    def check(got_SV: Tensor, *want: Tensor) -> None:
        want_SV = torch.stack(want)
        assert (got_SV - want_SV).norm() / want_SV.norm() < 1e-4

    a, b = pages[:14], pages[14:16]
    check(step(model, cache, [span("a", long, 0, 200, a)]), want_long[199])  # 200 rows: two blocks
    a = pages[16:30]
    for start, end in ((0, 1), (1, 17), (17, 32), (32, 205)):
        check(step(model, cache, [span("a", long, start, end, a)]), want_long[end - 1])
    check(
        step(model, cache, [span("b", short, 0, 20, b), span("a", long, 205, 206, a)]), want_short[19], want_long[205]
    )
    for i in range(5):
        items = [span("b", short, 20 + i, 21 + i, b), span("a", long, 206 + i, 207 + i, a)]
        check(step(model, cache, items), want_short[20 + i], want_long[206 + i])


def greedy(model: Transformer, prompts: list[list[int]], chunk: int, together: bool) -> list[list[int]]:
    """24 greedy tokens a prompt, prefilled in chunks, all in one batch or one after the other."""
    if not together:
        return [greedy(model, [prompt], chunk, True)[0] for prompt in prompts]
    cache, pages = scrambled_cache(model.config, model.dtype)
    tables = [pages[i * 8 : i * 8 + 8] for i in range(len(prompts))]
    ids, done = [list(p) for p in prompts], [0] * len(prompts)
    while any(len(s) - len(p) < 24 for s, p in zip(ids, prompts, strict=True)):
        active = [i for i in range(len(ids)) if len(ids[i]) - len(prompts[i]) < 24]
        ends = [min(len(ids[i]), done[i] + chunk) for i in active]
        items = [span(str(i), ids[i], done[i], end, tables[i]) for i, end in zip(active, ends, strict=True)]
        for i, end, token in zip(active, ends, step(model, cache, items).argmax(-1).tolist(), strict=True):
            done[i] = end
            if end == len(ids[i]):
                ids[i].append(token)
    return [s[len(p) :] for s, p in zip(ids, prompts, strict=True)]


def test_float64_greedy_tokens_do_not_depend_on_batch_or_chunks() -> None:
    config = SHAPES["qwen3"]
    model = Transformer(config, random_weights(config), torch.float64, CPU)
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (3, 90, 17, 33, 16)]
    alone = greedy(model, prompts, 1000, together=False)
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    assert greedy(model, prompts, 1000, together=True) == alone
    assert greedy(model, prompts, 7, together=True) == alone


def test_bfloat16_is_close_and_has_float32_logits() -> None:
    config = SHAPES["llama3"]
    weights = random_weights(config)
    ids = list(range(40))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        cache, pages = scrambled_cache(config, dtype)
        model = Transformer(config, weights, dtype, CPU)
        step(model, cache, [span("a", ids, 0, 39, pages)])
        logits[dtype] = step(model, cache, [span("a", ids, 39, 40, pages)])
    wide, narrow = logits[torch.float32], logits[torch.bfloat16]
    assert narrow.dtype == torch.float32
    assert (wide - narrow).norm() / wide.norm() < 0.05
    assert not torch.equal(narrow, narrow.bfloat16().float())  # not rounded to bfloat16 at the end


def test_a_corrupt_page_changes_the_logits() -> None:
    config = SHAPES["qwen2"]
    model = Transformer(config, random_weights(config), torch.float32, CPU)
    cache, pages = scrambled_cache(config, torch.float32)
    ids = list(range(60))
    step(model, cache, [span("a", ids, 0, 59, pages)])
    last = span("a", ids, 59, 60, pages)
    good = step(model, cache, [last])
    assert torch.equal(step(model, cache, [last]), good)
    cache.data[:, :, pages[4:]] = 0.0
    assert torch.equal(step(model, cache, [last]), good)  # pages of others do not matter
    cache.data[:, :, pages[1]] = 0.0
    assert (step(model, cache, [last]) - good).norm() / good.norm() > 1e-3


def test_bad_weights_are_named() -> None:
    config = SHAPES["qwen2"]
    weights = random_weights(config)
    name = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(ValueError, match=f"no weight {name}"):
        Transformer(config, {k: v for k, v in weights.items() if k != name}, torch.float32, CPU)
    with pytest.raises(ValueError, match=rf"{name} has shape \[3\]"):
        Transformer(config, weights | {name: torch.zeros(3)}, torch.float32, CPU)


def test_cache_memory_sizes_and_fingerprint() -> None:
    config = SHAPES["llama3"]
    cache = KVCache(config, 8, PAGE, torch.bfloat16, CPU)
    assert cache.bytes_per_page == 3 * 2 * 2 * PAGE * 8 * 2 == page_bytes(config, PAGE, torch.bfloat16)
    assert cache.data.numel() * 2 == cache.nbytes == 8 * cache.bytes_per_page
    assert num_pages_for(8 * cache.bytes_per_page + 5, config, PAGE, torch.bfloat16) == 8
    prints = {
        cache.fingerprint(config, "w"),
        cache.fingerprint(config, "other"),
        KVCache(config, 8, 2 * PAGE, torch.bfloat16, CPU).fingerprint(config, "w"),
        KVCache(config, 8, PAGE, torch.float16, CPU).fingerprint(config, "w"),
    }
    assert len(prints) == 4
    assert KVCache(config, 5, PAGE, torch.bfloat16, CPU).fingerprint(config, "w") in prints  # its size is its own
    with pytest.raises(ValueError, match="GiB are free"):
        KVCache(config, 1 << 40, PAGE, torch.bfloat16, CPU)


def test_cache_memory_can_be_mapped_by_another_process() -> None:
    import mmap
    import os

    cache = KVCache(SHAPES["llama3"], 8, PAGE, torch.float32, CPU)
    assert cache.fd is not None
    with mmap.mmap(os.dup(cache.fd), cache.nbytes) as peer:
        peer[4 * 5 : 4 * 6] = torch.tensor([2.5]).numpy().tobytes()
    assert cache.data.flatten()[5] == 2.5
    fd = cache.fd
    cache.close()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_the_head_of_a_bfloat16_model_tells_the_largest_logits_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(4096, 64, generator=generator).bfloat16()
    weight_VH[7] = weight_VH[4000]
    weight_VH[7, 0] *= 1.01  # equal to its neighbour in bfloat16 logits
    x_SH = torch.randn(3, 64, generator=generator)
    x_SH[1] = 0.5 * weight_VH[7].float()
    exact_SV = x_SH @ weight_VH.float().t()
    logits_SV = OutputHead(weight_VH)(x_SH)
    assert logits_SV.dtype == torch.float32
    largest = exact_SV.topk(8).indices
    torch.testing.assert_close(logits_SV.gather(1, largest), exact_SV.gather(1, largest))
    torch.testing.assert_close(logits_SV, exact_SV, rtol=0.02, atol=0.2)
    assert logits_SV.argmax(-1).tolist() == exact_SV.argmax(-1).tolist()

"""`dummy:SHAPE`: a model of a known shape with random weights, the same in every process and on every host.

    dummy:tiny      dummy:qwen3-0.6b,layers=4      dummy:tiny,std=0.2,seed=3,max_len=4096

Nothing is read from disk, so tests and measurements need no download. torch is imported only to make the weights.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minidisagg.model.config import ModelConfig, RopeConfig

if TYPE_CHECKING:
    import torch

PREFIX = "dummy:"
SHARPNESS = 16.0
DTYPES = ("float32", "bfloat16", "float16")

TINY = ModelConfig(
    name="tiny", architecture="LlamaForCausalLM", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, max_model_len=2048, rms_norm_eps=1e-5, rope=RopeConfig(),
    tie_embeddings=False, qkv_bias=False, qk_norm=False, bos_token_id=None, dtype="float32",
    eos_token_ids=(),  # a random model has no end: lengths are what the request asks for
)  # fmt: skip
SHAPES = {
    "tiny": TINY,
    "smollm2-135m": replace(
        TINY, name="smollm2-135m", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
        num_heads=9, num_kv_heads=3, head_dim=64, max_model_len=8192, rope=RopeConfig(theta=100_000.0),
        tie_embeddings=True, dtype="bfloat16",
    ),
    "qwen3-0.6b": replace(
        TINY, name="qwen3-0.6b", architecture="Qwen3ForCausalLM", vocab_size=151936, hidden_size=1024,
        intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, max_model_len=40960,
        rms_norm_eps=1e-6, rope=RopeConfig(theta=1_000_000.0), tie_embeddings=True, qk_norm=True, dtype="bfloat16",
    ),
    "llama-8b": replace(
        TINY, name="llama-8b", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, max_model_len=131072, dtype="bfloat16",
        rope=RopeConfig(theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192),
    ),
}  # fmt: skip

_INT_FIELDS = {
    "layers": "num_layers", "hidden": "hidden_size", "intermediate": "intermediate_size", "heads": "num_heads",
    "kv_heads": "num_kv_heads", "head_dim": "head_dim", "vocab": "vocab_size", "max_len": "max_model_len",
}  # fmt: skip
OPTIONS = (*_INT_FIELDS, "tied", "dtype", "std", "seed")


@dataclass(frozen=True)
class DummySpec:
    """What a `dummy:` name says: the shape, and how its weights are drawn."""

    config: ModelConfig
    std: float
    seed: int


def parse_dummy(model: str) -> DummySpec:
    """Read `dummy:SHAPE[,OPTION=VALUE...]`; ValueError with the list of shapes or options for anything else."""
    shape, *options = model.removeprefix(PREFIX).split(",")
    if shape not in SHAPES:
        raise ValueError(f"{model}: unknown shape {shape!r}; shapes are {', '.join(SHAPES)}")
    config = replace(SHAPES[shape], name=model)
    std, seed = None, 0
    for option in options:
        key, _, value = option.partition("=")
        try:
            if key in _INT_FIELDS:
                changed: dict[str, Any] = {_INT_FIELDS[key]: _positive_int(value)}
                config = replace(config, **changed)
            elif key == "tied":
                config = replace(config, tie_embeddings={"0": False, "1": True}[value])
            elif key == "dtype":
                config = replace(config, dtype=DTYPES[DTYPES.index(value)])
            elif key == "std":
                std = _positive_float(value)
            elif key == "seed":
                seed = int(value)
            else:
                raise ValueError(f"{model}: unknown option {key!r}; options are {', '.join(OPTIONS)}")
        except (ValueError, KeyError) as error:
            if key not in OPTIONS:
                raise
            raise ValueError(f"{model}: {value!r} is no value for {key}") from error
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ValueError(f"{model}: heads must be a multiple of kv_heads, and head_dim even")
    if config.vocab_size < 256:
        raise ValueError(f"{model}: vocab must be at least 256, one token for each byte")
    # The default keeps activations at unit scale: too small and every logit is the same, too large and they explode.
    return DummySpec(config, config.hidden_size**-0.5 if std is None else std, seed)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name and shape of every parameter; `lm_head.weight` is absent where the embeddings are tied."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}.bias"] = (size,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def dummy_weights(model: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights on the CPU in `config.dtype`: norms are one, the rest uniform with mean 0 and standard deviation std.

    Queries are larger by `SHARPNESS`, so that each token depends on the KV of single positions before it. With the
    mean over all of them, which small queries give, greedy decoding falls into a loop and hides corrupted KV.

    Each parameter has a generator seeded by (seed, name), so the values depend on neither order nor thread count.
    """
    import torch

    spec = parse_dummy(model)
    dtype: torch.dtype = getattr(torch, config.dtype)
    bound = math.sqrt(3.0) * spec.std  # uniform, not normal: no log or cos that two CPUs could round differently

    def draw(item: tuple[str, tuple[int, ...]]) -> torch.Tensor:
        name, shape = item
        scale = SHARPNESS if ".self_attn.q_" in name else 1.0  # q_norm where there is one, else q_proj
        if name.endswith("norm.weight"):
            return torch.full(shape, scale, dtype=dtype)
        seed = int.from_bytes(hashlib.sha256(f"{spec.seed}/{name}".encode()).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(shape).uniform_(-bound * scale, bound * scale, generator=generator).to(dtype)

    shapes = parameter_shapes(config)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the generators release the GIL
        return dict(zip(shapes, pool.map(draw, shapes.items()), strict=True))


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value

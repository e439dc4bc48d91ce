"""Find a model, read its configuration, load its weights. The one format is the HF directory; `dummy:` needs no disk.

`load_config` is free of torch, so that the front end can call it. Whatever is wrong with a model is a ValueError with
one line that names the file and says what to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidisagg.model.config import ModelConfig, RopeConfig
from minidisagg.model.dummy import DTYPES, PREFIX, dummy_weights, parameter_shapes, parse_dummy

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "smollm2-135m"

ARCHITECTURES = {  # HF class name -> model_type, which old files give alone
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What a key that is absent means: the defaults of the configuration classes in transformers.
_COMMON = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
    "head_dim": None, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
_LLAMA = {**_COMMON, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_MISTRAL = {
    **_COMMON, "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
_QWEN2 = {
    **_COMMON, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": {**_QWEN2, "head_dim": 128},
}
_DEFAULT_EOS = {"LlamaForCausalLM": 2, "MistralForCausalLM": 2}
# Settings that change results and that the engine does not have, with the values at which they change nothing (None is
# one for all). Those of the last lines are of related architectures: transformers' classes for these here do not read
# them, so a file that has one was meant for another. Keys that are neither read nor here are metadata, and pass.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "is_causal": (True,),
    "partial_rotary_factor": (1,), "per_layer_config": ({},),
    "num_experts": (0,), "num_local_experts": (0,), "n_routed_experts": (0,), "attention_multiplier": (1,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "logit_scale": (1,),
    "scale_emb": (1,), "scale_depth": (1,), "query_pre_attn_scalar": (), "final_logit_softcapping": (),
    "attn_logit_softcapping": (), "attention_chunk_size": (), "no_rope_layers": ([],), "rope_interleaved": (False,),
    "alibi": (False,), "use_parallel_residual": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,),
}  # fmt: skip
SAMPLE = 256  # bytes of a tensor, at three places, that tell it from another
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WEIGHT_DTYPES = {"F32", "BF16", "F16"}


# ---------------------------------------------------------------- where a model is


def cache_dir() -> Path:
    """`$MINIDISAGG_CACHE`, else `$XDG_CACHE_HOME/minidisagg`, else `~/.cache/minidisagg`."""
    if own := os.environ.get("MINIDISAGG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minidisagg"


def cached_path(name: str) -> Path:
    """Where `pull` puts the model `name`, there or not."""
    return cache_dir() / "models" / name


def resolve(model: str) -> Path:
    """The directory of `model`: a pulled name, else a path. ValueError says what to do where it is neither."""
    is_name = not model.startswith((".", "/", "~"))
    if is_name and (cached_path(model) / "config.json").is_file():
        return cached_path(model)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model == DEFAULT_MODEL:
        raise ValueError(f"{model} is not there yet; get it with: minidisagg pull {model}")
    if is_name:
        raise ValueError(
            f"unknown model {model!r}: give the path of a HF directory, {DEFAULT_MODEL}, {PREFIX}tiny, "
            "or get it with: minidisagg pull NAME --from-hub"
        )
    raise ValueError(f"{model!r} is no directory; give the path of a HF directory (config.json, *.safetensors)")


# ---------------------------------------------------------------- configuration


def load_config(model: str) -> ModelConfig:
    """Configuration of a path, a pulled name or `dummy:SHAPE`; ValueError for what the engine cannot run exactly."""
    if model.startswith(PREFIX):
        return parse_dummy(model).config
    directory = resolve(model)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {directory} is not a HF model directory")
    raw = read_json(path)
    generation = directory / "generation_config.json"
    eos = _token_ids(raw, "eos_token_id", path)
    if generation.is_file():
        eos += _token_ids(read_json(generation), "eos_token_id", generation)
    try:
        architecture = _architecture(raw)
        if not eos and "eos_token_id" not in raw and architecture in _DEFAULT_EOS:
            eos = [_DEFAULT_EOS[architecture]]
        return _parse_config(model, architecture, DEFAULTS[architecture] | raw, tuple(dict.fromkeys(eos)))
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing; download the file again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError with one line where it is unreadable, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}; download the file again")
    return value


def _parse_config(name: str, architecture: str, raw: dict[str, Any], eos: tuple[int, ...]) -> ModelConfig:
    _refuse_what_changes_results(architecture, raw)
    heads, hidden = _int(raw, "num_attention_heads"), _int(raw, "hidden_size")
    is_derived = raw["head_dim"] is None and DEFAULTS[architecture]["head_dim"] is None  # null is no size with Qwen3
    bos = raw.get("bos_token_id")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    window, windowed_layers = _windows(architecture, raw)
    config = ModelConfig(
        name=name,
        architecture=architecture,
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_int(raw, "intermediate_size"),
        num_layers=_int(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if raw["num_key_value_heads"] is None else _int(raw, "num_key_value_heads"),
        head_dim=hidden // heads if is_derived else _int(raw, "head_dim"),
        max_model_len=_int(raw, "max_position_embeddings"),
        rms_norm_eps=_number(raw, "rms_norm_eps"),
        rope=_parse_rope(raw),
        tie_embeddings=bool(raw["tie_word_embeddings"]),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        eos_token_ids=eos,
        bos_token_id=bos if isinstance(bos, int) else None,
        dtype=_DTYPE_ALIASES.get(dtype, dtype),
        sliding_window=window,
        windowed_layers=windowed_layers,
    )
    if config.num_heads % config.num_kv_heads:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} must be even")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype {config.dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return config


def _architecture(raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    named = raw.get("architectures") or [name for name, known in ARCHITECTURES.items() if known == model_type]
    architecture = str(named[0] if named else raw["model_type"])
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if model_type not in (None, ARCHITECTURES[architecture]):  # transformers goes by the latter
        raise ValueError(f"architectures says {architecture}, but model_type {model_type!r}; make them agree")
    return architecture


def _refuse_what_changes_results(architecture: str, raw: dict[str, Any]) -> None:
    """Raise on a setting that the engine does not have, rather than compute something else."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise ValueError(f"{key}: quantized checkpoints are not supported; use the bfloat16 one")
    for key, neutral in NEUTRAL.items():
        value = raw.get(key)
        if value is None or value in neutral or (key == "attention_bias" and architecture == "Qwen2ForCausalLM"):
            continue  # Qwen2 has its biases whatever the key says
        only = f", only {neutral[0]!r}" if neutral else ""
        raise ValueError(f"{key} {value!r} is not supported{only}")


def _windows(architecture: str, raw: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """`sliding_window` and the layers that it holds for; (0, ()) where no context is longer.

    They are those that `layer_types` says, else those from `max_window_layers` on: with Mistral all. Qwen has them only
    where `use_sliding_window` is true, and Llama has none.
    """
    count, kinds = _int(raw, "num_hidden_layers"), raw.get("layer_types")
    is_used, first = True, 0
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        is_used, first = raw["use_sliding_window"], _int(raw, "max_window_layers", least=0)
    window = _int(raw, "sliding_window") if is_used and raw["sliding_window"] is not None else None
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= _LAYER_TYPES:
            raise ValueError(f"layer_types must be {count} of {', '.join(sorted(_LAYER_TYPES))}, not {kinds!r}")
        if window is None and "sliding_attention" in kinds:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window; give it one")
    if window is None or window >= _int(raw, "max_position_embeddings"):
        return 0, ()
    if architecture == "LlamaForCausalLM":
        raise ValueError(f"sliding_window {window} is not supported with {architecture}, which has none")
    if kinds is None:
        layers = tuple(range(first, count))
    else:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return (window, layers) if layers else (0, ())


def _parse_rope(raw: dict[str, Any]) -> RopeConfig:
    """`rope_theta` and `rope_scaling` until transformers 4, both in `rope_parameters` from transformers 5 on.

    Where both are there the older key wins, as in transformers; it then goes without what the other says.
    """
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be an object, not {scaling!r}")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError("rope_parameters for each layer type are not supported")
    theta = _number({"rope_theta": 10000.0, **raw, **scaling}, "rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if (partial := scaling.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"partial_rotary_factor {partial} is not supported, only 1")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, factor=_number(scaling, "factor"), original_max_len=0)
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported; supported are default, linear, llama3")
    # Beside the scaling the key counts more than inside, and the context is as long as it was without any of them.
    lengths = {"original_max_position_embeddings": raw["max_position_embeddings"], **scaling, **raw}
    return RopeConfig(
        theta=theta,
        factor=_number(scaling, "factor"),
        low_freq_factor=_number(scaling, "low_freq_factor"),
        high_freq_factor=_number(scaling, "high_freq_factor"),
        original_max_len=_int(lengths, "original_max_position_embeddings"),
    )


def _int(raw: dict[str, Any], key: str, least: int = 1) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a {'positive integer' if least else 'whole number'}, not {value!r}")
    return value


def _number(raw: dict[str, Any], key: str) -> float:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a positive number, not {value!r}")
    return float(value)


def _token_ids(raw: dict[str, Any], key: str, path: Path) -> list[int]:
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"{path}: {key} must be a token id or a list of them, not {value!r}")
    return ids


# ---------------------------------------------------------------- weights


def load_weights(model: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    """All parameters of `config` by HF name, on the CPU, in the file's dtype; files are mapped, not copied.

    ValueError where a file or weight is missing or corrupt, or a shape or name is not the configuration's.
    """
    if model.startswith(PREFIX):
        return dummy_weights(model, config)
    directory = resolve(model)
    shapes = parameter_shapes(config)
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(directory):
        weights |= _read_safetensors(path, {**shapes, _HEAD: shapes[_EMBEDDINGS]})
    if config.tie_embeddings:
        _tie(weights)
    for name in shapes:
        if name not in weights:
            raise ValueError(f"{directory}: weight {name} is missing from its safetensors; download the model again")
    return weights


@cache
def identity(model: str) -> str:
    """What its KV depends on, as a hex digest: the same on every host, another after a change to any weight.

    Of each tensor some bytes are read, not all: a store's pages outlive the engine, and a start must not take a minute
    more. The name of the directory is not in it.
    """
    if model.startswith(PREFIX):
        return model
    directory = resolve(model)
    facts = hashlib.sha256((directory / "config.json").read_bytes())
    for path in _weight_files(directory):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            facts.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    for at in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                        file.seek(8 + size + at)
                        facts.update(file.read(min(SAMPLE, end - at)))
    return facts.hexdigest()


def _tie(weights: dict[str, torch.Tensor]) -> None:
    """Leave one of embeddings and head where they are equal or one is missing.

    A file that has two different ones is not tied, whatever its configuration says; nor is it in transformers.
    """
    if (head := weights.pop(_HEAD, None)) is not None:
        embeddings = weights.setdefault(_EMBEDDINGS, head)
        if head.dtype != embeddings.dtype or not head.equal(embeddings):
            weights[_HEAD] = head


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{single} is missing (nor is there {index.name}); only safetensors weights can be loaded")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: key 'weight_map' is missing or broken; download the file again")
    files = [directory / Path(name).name for name in sorted(set(weight_map.values()))]  # .name: stay in the directory
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {index.name} names it; download the shard")
    return files


def _read_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    weights: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.endswith(".rotary_emb.inv_freq"):
                    continue  # derived from rope_theta
                if name not in shapes:
                    raise ValueError(f"{path}: unexpected weight {name}; config.json does not belong to this file")
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if shape != shapes[name]:
                    raise ValueError(f"{path}: {name} is {shape}, but config.json makes it {shapes[name]}")
                if dtype not in _WEIGHT_DTYPES:
                    raise ValueError(f"{path}: {name} has dtype {dtype}; supported are F32, BF16, F16")
                weights[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or corrupt ({reason}); download it again") from error
    return weights

"""Find a model, read its configuration, load its weights. The one format is the HF directory; `dummy:` needs no disk.

`load_config` is free of torch, so that the front end can call it. Whatever is wrong with a model is a ValueError with
one line that names the file and says what to do.
"""

from __future__ import annotations

import json
import os
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
        return _parse_config(model, raw, tuple(dict.fromkeys(eos)))
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


def _parse_config(name: str, raw: dict[str, Any], eos: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(raw)
    _refuse_what_changes_results(architecture, raw)
    heads, hidden = _int(raw, "num_attention_heads"), _int(raw, "hidden_size")
    bos = raw.get("bos_token_id")
    config = ModelConfig(
        name=name,
        architecture=architecture,
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_int(raw, "intermediate_size"),
        num_layers=_int(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if raw.get("num_key_value_heads") is None else _int(raw, "num_key_value_heads"),
        head_dim=hidden // heads if raw.get("head_dim") is None else _int(raw, "head_dim"),
        max_model_len=_int(raw, "max_position_embeddings"),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope=_parse_rope(raw),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        eos_token_ids=eos,
        bos_token_id=bos if isinstance(bos, int) else None,
        dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
    )
    if config.num_heads % config.num_kv_heads:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} must be even")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype {config.dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return config


def _architecture(raw: dict[str, Any]) -> str:
    named = raw.get("architectures") or [
        name for name, model_type in ARCHITECTURES.items() if model_type == raw.get("model_type")
    ]
    architecture = named[0] if named else raw["model_type"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return str(architecture)


def _refuse_what_changes_results(architecture: str, raw: dict[str, Any]) -> None:
    """Raise on a setting that the engine does not have, rather than compute something else."""
    for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(key, plain) != plain and not (key == "attention_bias" and architecture == "Qwen2ForCausalLM"):
            raise ValueError(f"{key} {raw[key]!r} is not supported, only {plain!r}")
    if raw.get("quantization_config"):
        raise ValueError("quantized checkpoints are not supported; use the bfloat16 one")
    if architecture == "MistralForCausalLM":
        window = raw.get("sliding_window", 4096)  # the HF default where the key is absent
    else:
        window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
        first_windowed = raw.get("max_window_layers")
        if first_windowed is not None and first_windowed >= _int(raw, "num_hidden_layers"):
            window = None
    if window is not None and window < _int(raw, "max_position_embeddings"):
        raise ValueError(
            f"sliding_window {window} is not supported; set max_position_embeddings to {window} to stay within it"
        )


def _parse_rope(raw: dict[str, Any]) -> RopeConfig:
    """`rope_theta` and `rope_scaling` until transformers 4, both in `rope_parameters` from transformers 5 on."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be an object, not {scaling!r}")
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported; supported are default, llama3")
    return RopeConfig(
        theta=theta,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_len=_int(scaling, "original_max_position_embeddings"),
    )


def _int(raw: dict[str, Any], key: str) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, not {value!r}")
    return value


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
        weights |= _read_safetensors(path, shapes, config.tie_embeddings)
    for name in shapes:
        if name not in weights:
            raise ValueError(f"{directory}: weight {name} is missing from its safetensors; download the model again")
    return weights


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


def _read_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], tied: bool) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    weights: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if (name == "lm_head.weight" and tied) or name.endswith(".rotary_emb.inv_freq"):
                    continue  # a copy of the embeddings, or derived from rope_theta
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

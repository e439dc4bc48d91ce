"""GGUF to a HF directory: the one conversion that `pull` needs (llama architecture, byte-level BPE of SmolLM2).

Weights become bfloat16: 4-bit blocks have a step of a fifteenth of their range, which its 8 bits do not blur further.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp token types


def convert_gguf(source: Path, dest: Path) -> None:
    """Write config, weights and tokenizer of the GGUF file `source` into the directory `dest` as HF spells them.

    ValueError with one line where the file is corrupt or of another kind.
    """
    try:
        reader = gguf.GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
            raise ValueError("only the llama architecture with SmolLM2's tokenizer can be converted")
        weights = _weights(reader, fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"])
        config = _config(fields, tied="lm_head.weight" not in weights)
        tokenizer, tokenizer_config = _tokenizer(fields)
    except (ValueError, LookupError, TypeError, OverflowError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source.name} is not a GGUF file that can be converted: {reason}") from error
    save_file(weights, dest / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(dest / "tokenizer.json"))
    _write_json(dest / "tokenizer_config.json", tokenizer_config)
    _write_json(dest / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(dest / "generation_config.json", ids)


def _weights(reader: gguf.GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            values = _unpermute(values, num_heads if kind == "attn_q" else num_kv_heads)
        weights[_hf_name(tensor.name)] = torch.tensor(values).bfloat16()  # a copy: the values are a view of the file
    return weights


def _unpermute(rows: np.ndarray[Any, np.dtype[np.float32]], heads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Undo llama.cpp's order of Q and K rows: it interleaves the two halves of each head that rotate-half pairs up."""
    size, hidden = rows.shape  # [heads * head_dim, hidden]
    return rows.reshape(heads, size // heads // 2, 2, hidden).swapaxes(1, 2).reshape(size, hidden)


def _hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, kind, suffix = name.split(".")
        return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"
    kind, suffix = name.split(".")
    return f"{_TOP_NAMES[kind]}.{suffix}"


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _tokenizer(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = list(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    control = [AddedToken(token, normalized=False, special=True) for token, kind in types if kind == _CONTROL]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in types if kind == _USER_DEFINED])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return tokenizer, {
        **{f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
    }


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

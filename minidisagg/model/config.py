"""The shape of a decoder-only transformer of the Llama family: what loader, model, cache and cost formulas share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `factor` and what follows are Llama 3's frequency scaling (factor 1: none).

    With an `original_max_len` of 0 it divides all frequencies by `factor`, which is linear scaling.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Llama, SmolLM2, Qwen2/2.5, Qwen3 and Mistral differ in these fields only."""

    name: str
    architecture: str  # the HF class name, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3: RMSNorm over head_dim of each query and key head
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str  # of the checkpoint: "float32", "bfloat16", "float16"
    sliding_window: int = 0  # positions, its own included, that a token sees in the layers of `windowed_layers`
    windowed_layers: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Weights that one step reads (tied embeddings once, as the output head)."""
        per_layer = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        per_layer += 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * per_layer + self.vocab_size * self.hidden_size

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """KV cache bytes of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

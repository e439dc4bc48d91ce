"""The decoder-only transformer of the Llama family, inference only, in plain torch.

Llama (with Llama 3's rope scaling), SmolLM2, Qwen2/2.5 (bias on q, k, v), Qwen3 (RMSNorm over each query and key
head) and Mistral (sliding windows) differ in `ModelConfig` only.

Shapes: N rows (new tokens of the step), S sampled rows, H query heads, K KV heads, D head_dim, V vocabulary,
E hidden size, I intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from minidisagg.model.attention import Batch, PagedKV, narrowed, paged_attention, write_kv
from minidisagg.model.config import ModelConfig, RopeConfig
from minidisagg.model.linear import Linear, OutputHead, padding


class Transformer:
    """Weights of one model on one device, under their Hugging Face names in `weights`.

    Raises ValueError that names a missing or wrongly shaped weight.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        take = _Weights(weights, dtype, device)
        self.embed_VE = take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [_Layer(config, i, take) for i in range(config.num_layers)]
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.norm_E = take("model.norm.weight", config.hidden_size).to(self.wide)
        head_VE = self.embed_VE
        if not config.tie_embeddings or "lm_head.weight" in weights:  # tied by name, and yet with a head of its own
            head_VE = take("lm_head.weight", config.vocab_size, config.hidden_size)
        self.head = OutputHead(head_VE)
        self.inv_freq = rope_frequencies(config.rope, config.head_dim, self.wide).to(device)

    @torch.inference_mode()
    def hidden(self, batch: Batch, cache: PagedKV, on_layer: Callable[[int], None] = lambda layer: None) -> Tensor:
        """Compute the step's KV into `cache` and return x_NE after the last layer.

        `on_layer(n)`: the KV of the first n layers is there (on a GPU: under way).
        """
        N = len(batch.tokens_N)
        pad = padding(self.layers[0].qkv, N)  # rows that attention and cache do not see
        tokens_N, positions_N = F.pad(batch.tokens_N, (0, pad)), F.pad(batch.positions_N, (0, pad))
        angle_NF = positions_N[:, None].to(self.wide) * self.inv_freq
        cos, sin = angle_NF.cos(), angle_NF.sin()
        cos_N1D = torch.cat((cos, cos), -1)[:, None].to(self.dtype)
        sin_N1D = torch.cat((-sin, sin), -1)[:, None].to(self.dtype)
        windowed = self.config.windowed_layers
        narrow = narrowed(batch, self.config.sliding_window) if windowed else batch
        x_NE = F.embedding(tokens_N, self.embed_VE)
        for i, layer in enumerate(self.layers):
            q_NHD, kv_NKD = (rows[:N] for rows in layer.project(x_NE, cos_N1D, sin_N1D))
            write_kv(cache, i, batch, kv_NKD)
            on_layer(i + 1)
            attended = paged_attention(q_NHD, kv_NKD, cache, i, narrow if i in windowed else batch)
            x_NE = x_NE + layer.output(F.pad(attended, (0, 0, 0, pad)) if pad else attended)
            x_NE = layer.feed_forward(x_NE)
        return x_NE[:N]

    @torch.inference_mode()
    def logits(self, x_SE: Tensor, exact: bool = False) -> Tensor:
        """logits_SV of rows that `hidden` returned, float32 or wider; for `exact` see `OutputHead`."""
        x_SE = F.rms_norm(x_SE.to(self.wide), self.norm_E.shape, self.norm_E, self.config.rms_norm_eps)
        if exact:
            return self.head.exact(x_SE)
        S = len(x_SE)
        return self.head(F.pad(x_SE, (0, 0, 0, padding(self.head.linear, S))))[:S]


class _Layer:
    """One decoder layer: q, k and v are one linear, gate and up another."""

    def __init__(self, config: ModelConfig, index: int, take: _Weights) -> None:
        E, I, D = config.hidden_size, config.intermediate_size, config.head_dim  # noqa: E741
        H, K = config.num_heads, config.num_kv_heads
        self.H, self.K, self.D, self.eps = H, K, D, config.rms_norm_eps
        name = f"model.layers.{index}."
        attn, mlp = name + "self_attn.", name + "mlp."
        sizes = {"q": H * D, "k": K * D, "v": K * D}
        self.attn_norm_E = take(name + "input_layernorm.weight", E)
        bias = torch.cat([take(f"{attn}{p}_proj.bias", n) for p, n in sizes.items()]) if config.qkv_bias else None
        self.qkv = Linear(torch.cat([take(f"{attn}{p}_proj.weight", n, E) for p, n in sizes.items()]), bias)
        self.qk_norm_HD: Tensor | None = None
        if config.qk_norm:
            q_D, k_D = take(attn + "q_norm.weight", D), take(attn + "k_norm.weight", D)
            self.qk_norm_HD = torch.cat((q_D.expand(H, D), k_D.expand(K, D)))
        self.output = Linear(take(attn + "o_proj.weight", E, H * D))
        self.mlp_norm_E = take(name + "post_attention_layernorm.weight", E)
        self.gate_up = Linear(torch.cat([take(f"{mlp}{p}_proj.weight", I, E) for p in ("gate", "up")]))
        self.down = Linear(take(mlp + "down_proj.weight", E, I))

    def project(self, x_NE: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [N, H, D], and rotated keys followed by values [N, 2 * K, D]."""
        qkv = self.qkv(F.rms_norm(x_NE, self.attn_norm_E.shape, self.attn_norm_E, self.eps))
        qkv = qkv.view(x_NE.shape[0], self.H + 2 * self.K, self.D)
        qk = qkv[:, : self.H + self.K]
        if self.qk_norm_HD is not None:
            qk.copy_(F.rms_norm(qk, (self.D,), None, self.eps) * self.qk_norm_HD)
        half = self.D // 2
        swapped = torch.cat((qk[..., half:], qk[..., :half]), -1)
        qk.mul_(cos_N1D).addcmul_(swapped, sin_N1D)
        return qkv[:, : self.H], qkv[:, self.H :]

    def feed_forward(self, x_NE: Tensor) -> Tensor:
        """x + SwiGLU(RMSNorm(x))."""
        gate_up = self.gate_up(F.rms_norm(x_NE, self.mlp_norm_E.shape, self.mlp_norm_E, self.eps))
        gate, up = gate_up.chunk(2, -1)
        return x_NE + self.down(F.silu(gate).mul_(up))


class _Weights:
    """Takes weights by name, checked for presence and shape, in the model's dtype and on its device."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self.dtype, self.device = weights, dtype, device

    def __call__(self, name: str, *shape: int) -> Tensor:
        weight = self.weights.get(name)
        if weight is None:
            raise ValueError(f"the checkpoint has no weight {name}")
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight {name} has shape {list(weight.shape)}, the config says {list(shape)}")
        return weight.detach().to(self.device, self.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Angle per position of each pair of dimensions, [head_dim / 2], with `RopeConfig`'s scaling where factor is not 1.

    Rotary embedding: Su et al. 2021 (RoFormer). The scaling stretches wavelengths longer than
    original_max_len / low_freq_factor by `factor`, keeps those shorter than original_max_len / high_freq_factor,
    and interpolates between.
    """
    freq = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    if rope.factor == 1.0:
        return freq
    turns = rope.original_max_len * freq / (2 * math.pi)  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return freq * (keep + (1 - keep) / rope.factor)

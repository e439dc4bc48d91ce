"""The transformer on a GPU that Triton knows: the same weights as the portable form, fewer and larger kernels.

Prompts run eagerly: their matmuls are long, and what launches them is far ahead. Decode steps are captured once per
batch size as CUDA graphs, head and argmax included, and replayed: a step of a small model has some 300 kernels of a few
microseconds, and launching each of them would take longer.

Shapes as in `transformer.py`; B rows of a decode step, M of a step and behind it, P pages a sequence has at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidisagg.model.kernels import add_norm, begin_decode, paged_decode, rope_write, silu_mul, splits_for
from minidisagg.model.transformer import Transformer

LONG = 1024  # rows from which on one attention call a sequence, by cuDNN, is faster than one call for all of them
GRID, COARSE = 128, 1024  # to whose multiples such a sequence is padded: cuDNN takes 60 ms to plan for each length
FINE = 8192  # up to so many rows to those of GRID
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # of such a sequence
Attend = Callable[[int, Tensor], Tensor]  # (layer, qkv_MCD) → [N, H * D]
OnLayer = Callable[[int], None]


@dataclass(frozen=True)
class Prompt:
    """One sequence's share of an eager step: rows [first, last), of which the first has position `start`."""

    first: int
    last: int
    start: int
    pages: Tensor | None = None  # [P] int64, of all positions up to the last row's; None: a whole prompt needs no cache
    ends: Tensor | None = None  # int32: (0, its rows), (0, its context)


@dataclass(frozen=True)
class Prompts:
    """The eager part of a step. Whole prompts come first, and of those the short ones, `short` of them."""

    tokens_N: Tensor
    positions_N: Tensor
    slots_N: Tensor  # page * S + offset
    lasts_N: Tensor  # 1 for each sequence's last row of this step
    items: Sequence[Prompt]
    short: int
    starts: Tensor  # [short + 1] int32: first row of each short prompt, and the end of the last one


@dataclass(frozen=True)
class DecodeRows:
    """The decode part of a step, int32, in memory that stays where it is. See `begin_decode`."""

    given: Tensor
    sources: Tensor
    contexts: Tensor
    tables: Tensor
    width: Tensor


class FusedTransformer(Transformer):
    """`cache` is the layers' [2, pages, K, S, D]."""

    def attach(self, layers: Sequence[Tensor]) -> None:
        """The cache that all calls below use."""
        self.cache = layers
        config = self.config
        self.H, self.K, self.D = config.num_heads, config.num_kv_heads, config.head_dim
        self.inv_freq = self.inv_freq.float()
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count

    @torch.inference_mode()
    def prefill(self, step: Prompts, on_layer: OnLayer = lambda layer: None) -> Tensor:
        """x_NE after the last layer; the step's KV is in the cache once the device gets there."""
        N = len(step.tokens_N)
        long = (item for item in step.items[step.short :] if item.pages is None)
        room = max([N, *(item.last + padding(item.last - item.first) for item in long)]) - N

        def attend(layer: int, qkv_MCD: Tensor) -> Tensor:
            return self._prompt_attention(layer, qkv_MCD, step)

        with sdpa_kernel(BACKENDS, set_priority=True):
            return self._layers(step.tokens_N, step.positions_N, step.slots_N, step.lasts_N, attend, on_layer, room)

    @torch.inference_mode()
    def plan(self, length: int) -> None:
        """Have cuDNN make its plan for a whole prompt of so many tokens, one of `padded_lengths`.

        Plans are of the thread that asked for them: this must be the one that computes steps.
        """
        nothing = torch.zeros(length, self.H + 2 * self.K, self.D, dtype=self.dtype, device=self.device)
        with sdpa_kernel(BACKENDS, set_priority=True):
            self._causal(nothing)

    def decode(self, rows: DecodeRows, recent: Tensor) -> Tensor:
        """x_BE of one new token a sequence. Every shape is fixed, so that a graph can hold it."""
        B = len(rows.given)
        splits = splits_for(B, self.K, self.multiprocessors)
        tokens_B, positions_B, slots_B = begin_decode(
            rows.given, rows.sources, recent, rows.contexts, rows.tables, rows.width, self.cache[0].shape[3]
        )

        def attend(layer: int, qkv_BCD: Tensor) -> Tensor:
            out = qkv_BCD.new_empty(B, self.H, self.D)
            return paged_decode(qkv_BCD, self.cache[layer], rows.tables, rows.width, rows.contexts, out, splits).view(
                B, -1
            )

        return self._layers(tokens_B, positions_B, slots_B, None, attend, lambda layer: None)

    def _layers(
        self, tokens_N: Tensor, positions_N: Tensor, slots_N: Tensor, lasts_N: Tensor | None, attend: Attend,
        on_layer: OnLayer, room: int = 0,
    ) -> Tensor:  # fmt: skip
        """`room`: so many rows that `attend` gets beside those of the step, of nobody and finite."""
        eps, N = self.config.rms_norm_eps, len(tokens_N)
        x_NE = F.embedding(tokens_N, self.embed_VE)
        normed_ME = x_NE.new_empty(N + room, x_NE.shape[1])
        normed_NE = normed_ME[:N]
        if room:
            normed_ME[N:] = 0
        added_NE: Tensor | None = None  # what the layer before has computed and nobody has added yet
        for i, layer in enumerate(self.layers):
            add_norm(x_NE, added_NE, layer.attn_norm_E, eps, normed_NE)
            qkv_MCD = layer.qkv(normed_ME).view(N + room, -1, self.D)
            rope_write(qkv_MCD[:N], positions_N, slots_N, lasts_N, self.inv_freq, layer.qk_norm_HD, self.cache[i], eps)
            on_layer(i + 1)
            attended = layer.output(attend(i, qkv_MCD))
            add_norm(x_NE, attended, layer.mlp_norm_E, eps, normed_NE)
            added_NE = layer.down(silu_mul(layer.gate_up(normed_NE)))
        return x_NE if added_NE is None else x_NE + added_NE

    def _prompt_attention(self, layer: int, qkv_MCD: Tensor, step: Prompts) -> Tensor:
        H, K, parts = self.H, self.K, []  # in the order of their rows
        if step.short:
            short = step.items[: step.short]
            q_NHD, k_NKD, v_NKD = torch.split(qkv_MCD[: short[-1].last], [H, K, K], dim=1)
            longest = max(item.last - item.first for item in short)
            parts.append(_flash(q_NHD, k_NKD, v_NKD, step.starts, step.starts, longest, longest))
        for item in step.items[step.short :]:
            count = item.last - item.first
            if item.pages is None:
                rows = qkv_MCD[item.first : item.last + padding(count)]
                behind = rows[count:, H:]  # a neighbour's keys and values, if this is not the last one
                kept = None if item is step.items[-1] else behind.clone()
                if kept is not None:
                    behind.zero_()  # masked or not: 0 x NaN is NaN, and who is not finite is to be alone with it
                parts.append(self._causal(rows)[:count])
                if kept is not None:
                    behind.copy_(kept)
            else:
                assert item.ends is not None
                k_CKD, v_CKD = self._gathered(layer, item.pages, item.start + count)
                q_ends, k_ends = item.ends
                q_NHD = qkv_MCD[item.first : item.last, :H]
                parts.append(_flash(q_NHD, k_CKD, v_CKD, q_ends, k_ends, count, len(k_CKD)))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _causal(self, qkv_NCD: Tensor) -> Tensor:
        """Causal attention of one whole prompt, [N, H, D]; N is one of `padded_lengths`."""
        parts = torch.split(qkv_NCD, [self.H, self.K, self.K], dim=1)
        q, k, v = (x.transpose(0, 1)[None] for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.K)
        return out[0].transpose(0, 1)

    def _gathered(self, layer: int, pages: Tensor, context: int) -> Tensor:
        """Keys and values of one sequence, [2, context, K, D]."""
        kv_2PKSD = self.cache[layer].index_select(1, pages)
        return kv_2PKSD.transpose(2, 3).reshape(2, -1, self.K, self.D)[:, :context]


def padding(rows: int) -> int:
    """What is missing to a length that there is a plan for. It lies behind all rows, so that none of them sees it."""
    return -rows % (GRID if rows <= FINE else COARSE)


def padded_lengths(most: int) -> list[int]:
    """Of long prompts of up to so many tokens, the longest first."""
    if most < LONG:
        return []
    fine = range(LONG, min(most + padding(most), FINE) + 1, GRID)
    return [*fine, *range(FINE + COARSE, most + COARSE, COARSE)][::-1]


def _flash(
    q_NHD: Tensor, k_CKD: Tensor, v_CKD: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int
) -> Tensor:
    """Causal attention of several sequences, of which the last row sees all of its keys (Dao 2023)."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q_NHD, k_CKD, v_CKD, q_ends, k_ends, most_q, most_k, 0.0, True, False
    )[0]
    return out

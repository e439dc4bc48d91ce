"""The small operations of a decoder layer, fused, in Triton; and paged attention for one new token a sequence.

A decode step reads every weight once and every page once; whatever else it does is a kernel launch that waits for one
memory round trip. So what stands between two matmuls is one kernel: residual and norm; rope, head norm and the KV's
way into the cache; gate and up. All of them write where they are told to, so that a CUDA graph can hold them.

Attention splits a sequence's pages over several programs (Flash-Decoding, Dao et al. 2023): one sequence alone would
otherwise keep 8 of 132 multiprocessors busy. The query heads of a KV head are the rows of one small matmul, padded to
the 16 that a tensor core takes.

Shapes: N rows, B sequences, E hidden size, I intermediate size, H query heads, K KV heads, D head_dim, S page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # the fewest rows of `tl.dot`
_HEADS = 8  # that share the cosines of their row
_TILE = 64  # tokens of a page that are multiplied at once
_WIDE = 1024  # elements of a program that has no row to reduce


@triton.jit
def _add_norm(x, added, weight, out, eps, E: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * E
    at = tl.arange(0, BLOCK)
    inside = at < E
    value = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(added + row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / E + eps)
    normed = value * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, normed, mask=inside)


def add_norm(x_NE: Tensor, added_NE: Tensor | None, weight_E: Tensor, eps: float, out_NE: Tensor) -> None:
    """x += added where there is something to add, in place; out = RMSNorm(x)."""
    N, E = x_NE.shape
    block = triton.next_power_of_2(E)
    added = x_NE if added_NE is None else added_NE
    warps = min(max(block // 512, 1), 8)
    _add_norm[(N,)](x_NE, added, weight_E, out_NE, eps, E, block, added_NE is not None, num_warps=warps)


@triton.jit
def _rope_write(
    qkv, positions, slots, lasts, inv_freq, norms, cache, v_offset, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head_C = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half_F = tl.arange(0, D // 2)
    base_CF = qkv + row.to(tl.int64) * (H + 2 * K) * D + head_C[:, None] * D + half_F[None, :]
    there, turns = (head_C < H + 2 * K)[:, None], (head_C < H + K)[:, None]
    first_CF = tl.load(base_CF, mask=there, other=0.0).to(tl.float32)
    second_CF = tl.load(base_CF + D // 2, mask=there, other=0.0).to(tl.float32)
    if NORM:
        norm_CF = norms + head_C[:, None] * D + half_F[None, :]
        sum_C = tl.sum(first_CF * first_CF, 1) + tl.sum(second_CF * second_CF, 1)
        scale_C1 = tl.rsqrt(sum_C / D + eps)[:, None]
        first_CF *= tl.where(turns, scale_C1 * tl.load(norm_CF, mask=turns, other=0.0).to(tl.float32), 1.0)
        second_CF *= tl.where(turns, scale_C1 * tl.load(norm_CF + D // 2, mask=turns, other=0.0).to(tl.float32), 1.0)
    angle_F = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + half_F)
    cos_1F, sin_1F = tl.cos(angle_F)[None, :], tl.sin(angle_F)[None, :]
    left_CF = tl.where(turns, first_CF * cos_1F - second_CF * sin_1F, first_CF)
    right_CF = tl.where(turns, second_CF * cos_1F + first_CF * sin_1F, second_CF)
    tl.store(base_CF, left_CF, mask=turns)
    tl.store(base_CF + D // 2, right_CF, mask=turns)

    slot = tl.load(slots + row).to(tl.int64)
    kept = (there & (head_C >= H)[:, None]) & (slot >= 0)
    row_C = (slot // S * K + (head_C - H) % K) * S + slot % S
    target_CF = cache + tl.where(head_C >= H + K, v_offset, 0)[:, None] + row_C[:, None] * D + half_F[None, :]
    tl.store(target_CF, left_CF, mask=kept)
    tl.store(target_CF + D // 2, right_CF, mask=kept)
    # Behind the last token lies what an earlier owner of the page left, which must not leave the worker.
    if DECODE:
        clears = slot % S == 0
    else:
        clears = tl.load(lasts + row) != 0
    if clears:
        zero_CF = tl.zeros([HEADS, D // 2], cache.dtype.element_ty)
        for further in range(1, S - slot % S):
            tl.store(target_CF + further * D, zero_CF, mask=kept)
            tl.store(target_CF + further * D + D // 2, zero_CF, mask=kept)


def rope_write(
    qkv_NCD: Tensor, positions_N: Tensor, slots_N: Tensor, lasts_N: Tensor | None, inv_freq_F: Tensor,
    norms_CD: Tensor | None, layer: Tensor, eps: float,
) -> None:  # fmt: skip
    """Rotate queries and keys in place, each head normed first where `norms` are given; put keys and values in `layer`.

    C = H + 2 * K heads a row; `layer` is [2, pages, K, S, D]; `slots` are page * S + offset, negative for rows that
    belong to nobody. Zeroes the rest of a page behind each row in `lasts`, the last one of its sequence; without
    `lasts` each row is one, and the page is clear but for one that begins with it.
    """
    N, C, D = qkv_NCD.shape
    _, _, K, S, _ = layer.shape
    norms = qkv_NCD if norms_CD is None else norms_CD
    lasts = slots_N if lasts_N is None else lasts_N
    _rope_write[(N, triton.cdiv(C, _HEADS))](
        qkv_NCD, positions_N, slots_N, lasts, inv_freq_F, norms, layer, layer.stride(0), eps,
        C - 2 * K, K, D, S, _HEADS, norms_CD is not None, lasts_N is None, num_warps=2,
    )  # fmt: skip


@triton.jit
def _silu_mul(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < I
    gate = tl.load(gate_up + row * 2 * I + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * I + at, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, of [N, 2 * I]."""
    N, I = gate_up.shape[0], gate_up.shape[1] // 2  # noqa: E741
    out_NI = gate_up.new_empty(N, I)
    _silu_mul[(N, triton.cdiv(I, _WIDE))](gate_up, out_NI, I, _WIDE)
    return out_NI


@triton.jit
def _decode(
    qkv, layer, v_offset, tables, width, contexts, out, partial, sums, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // K
    context = tl.load(contexts + sequence)
    table = tables + sequence * tl.load(width)
    tiles = tl.cdiv(context, TILE)
    each = tl.cdiv(tiles, SPLITS)
    first, last = split * each, tl.minimum(split * each + each, tiles)
    row, dim, token = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TILE)
    head = kv_head * G + row
    q_at = sequence * (H + 2 * K) * D + head[:, None] * D + dim[None, :]
    q_RD = tl.load(qkv + q_at, mask=row[:, None] < G, other=0.0)
    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    acc_RD = tl.zeros([ROWS, D], tl.float32)
    for tile in range(first, last):
        position = tile * TILE + token
        seen = position < context
        if S % TILE == 0:  # one page holds the tile
            page = tl.load(table + tile * TILE // S).to(tl.int64)
            at = ((page * K + kv_head) * S + position % S) * D
        else:
            page_T = tl.load(table + position // S, mask=seen, other=0).to(tl.int64)
            at = ((page_T * K + kv_head) * S + position % S) * D
        # What lies beyond the context may be anything, NaN too, and 0 times it would be as well.
        k_TD = tl.load(layer + at[:, None] + dim[None, :], mask=seen[:, None], other=0.0).to(q_RD.dtype)
        score_RT = tl.dot(q_RD, tl.trans(k_TD)) * scale
        score_RT = tl.where(seen[None, :], score_RT, float("-inf"))
        new_R = tl.maximum(most_R, tl.max(score_RT, 1))
        weight_RT = tl.exp2(score_RT - new_R[:, None])
        fade_R = tl.exp2(most_R - new_R)
        v_TD = tl.load(layer + v_offset + at[:, None] + dim[None, :], mask=seen[:, None], other=0.0).to(q_RD.dtype)
        acc_RD = tl.dot(weight_RT.to(q_RD.dtype), v_TD, acc_RD * fade_R[:, None])
        sum_R = sum_R * fade_R + tl.sum(weight_RT, 1)
        most_R = new_R
    inside = row < G
    if SPLITS == 1:
        result = acc_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
        tl.store(out + (sequence * H + head)[:, None] * D + dim[None, :], result, mask=inside[:, None])
    else:
        index = (sequence * H + head) * SPLITS + split
        tl.store(partial + index[:, None] * D + dim[None, :], acc_RD, mask=inside[:, None])
        tl.store(sums + index * 2, most_R, mask=inside)
        tl.store(sums + index * 2 + 1, sum_R, mask=inside)


@triton.jit
def _combine(partial, sums, out, D: tl.constexpr, SPLITS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)  # of a sequence's head
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D)
    most_P = tl.load(sums + (index * SPLITS + split) * 2)
    sum_P = tl.load(sums + (index * SPLITS + split) * 2 + 1)
    most = tl.max(tl.where(sum_P > 0, most_P, -1e30), 0)  # not -inf: a split may have had nothing to read, or all
    fade_P = tl.where(sum_P > 0, tl.exp2(most_P - most), 0.0)
    total = tl.sum(fade_P * sum_P, 0)
    acc_PD = tl.load(partial + (index * SPLITS + split)[:, None] * D + dim[None, :])
    result = tl.sum(acc_PD * fade_P[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + index * D + dim, result)


def splits_for(sequences: int, kv_heads: int, multiprocessors: int) -> int:
    """Programs per sequence and KV head, a power of two: two a multiprocessor, as long as each has some pages."""
    wanted: int = triton.next_power_of_2(max(1, 2 * multiprocessors // (sequences * kv_heads)))
    return min(16, wanted)


def paged_decode(
    qkv_BCD: Tensor, layer: Tensor, tables: Tensor, width: Tensor, contexts_B: Tensor, out_BHD: Tensor, splits: int
) -> Tensor:
    """Attention of one new token a sequence over its pages, this token's KV included. Returns out.

    `tables` (int32) hold the pages of all sequences, `width` (int32, one element) of each; `contexts` (int32) say how
    many tokens of them count: 0 reads nothing and gives 0. Nothing beyond a context is read.
    """
    B, C, D = qkv_BCD.shape
    _, _, K, S, _ = layer.shape
    H = C - 2 * K
    scale = D**-0.5 * 1.4426950408889634  # 1 / ln 2: the hardware has exp2
    partial = sums = out_BHD
    if splits > 1:
        partial = torch.empty((B, H, splits, D), dtype=torch.float32, device=qkv_BCD.device)
        sums = torch.empty((B, H, splits, 2), dtype=torch.float32, device=qkv_BCD.device)
    rows = max(_ROWS, triton.next_power_of_2(H // K))
    _decode[(B, K, splits)](
        qkv_BCD, layer, layer.stride(0), tables, width, contexts_B, out_BHD, partial, sums, scale,
        H, K, D, S, _TILE, rows, splits, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine[(B * H,)](partial, sums, out_BHD, D, splits, num_warps=1)
    return out_BHD


@triton.jit
def _begin_decode(given, sources, recent, contexts, tables, width, tokens, positions, slots, S: tl.constexpr):
    row = tl.program_id(0)
    context, token = tl.load(contexts + row), tl.load(given + row)
    if token < 0:
        token = tl.maximum(tl.load(recent + tl.load(sources + row)), 0)
    position = tl.maximum(context - 1, 0)
    slot = -1
    if context > 0:
        slot = tl.load(tables + row * tl.load(width) + position // S) * S + position % S
    tl.store(tokens + row, token)
    tl.store(positions + row, position)
    tl.store(slots + row, slot)


def begin_decode(
    given_B: Tensor, sources_B: Tensor, recent: Tensor, contexts_B: Tensor, tables: Tensor, width: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(tokens, positions, slots) of a decode step, int32, each [B]: what is staged is as little as can be.

    A token is the given one, or where that is negative the one that `recent` holds at `sources`: it may have been
    sampled by the step before, and no host has seen it. A row of no context is padding.
    """
    tokens, positions, slots = torch.empty((3, len(given_B)), dtype=torch.int32, device=given_B.device)
    _begin_decode[(len(given_B),)](
        given_B, sources_B, recent, contexts_B, tables, width, tokens, positions, slots, page_size, num_warps=1
    )
    return tokens, positions, slots

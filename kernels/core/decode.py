"""The decode kernels, keys split over programs and then combined, and their launcher."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.core import tiles
from kernels.core.forward import attend
from kernels.core.launch import launch
from kernels.core.primitives import (
    LOG2_E,
    at_row_vector,
    cast,
    head_matrix,
    load_joint_rows,
    locate_program,
    rounded,
    scale_rows,
    store_rows,
    zero_rows,
)
from kernels.core.problem import (
    bias_parts,
    cdiv,
    dot_precision,
    is_ragged,
    log2_scale,
    number_of_parts,
    power_of_2,
    reach_behind,
)
from kernels.core.softmax import at_lse, load_own_bias

KEYS_OF_A_SPLIT = 128  # at the least
MOST_SPLITS = 128
PROGRAMS_PER_SM = 4
COMBINED_ELEMENTS = 4096  # of a tile
NOTHING = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["q_tokens", "capacity", "splits", "window"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, o_ptr, lse_ptr, sinks_ptr, bias_ptr,
    lengths_ptr,
    q_strides, k_strides, v_strides, q_rope_strides, k_rope_strides, o_strides,
    batches, k_heads, v_heads, group, q_tokens, capacity, splits, window, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr, V_IS_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SINKS: tl.constexpr, BIAS_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and its base-2 lse over one split of the cache, for BLOCK_M rows of one key head.

    A row is one of the newest q_tokens of the sequence and one query head of the key head's group.
    The token at position p stands at row p % capacity of the cache, so that a range of positions
    is at most two ranges of its rows.
    Grid: (row tiles * splits * B * HK,).
    """
    part, batch, k_head = locate_program(batches, k_heads)
    start, split = part // splits * BLOCK_M, part % splits
    rows = q_tokens * group
    row = start + tl.arange(0, BLOCK_M)
    length = tl.load(lengths_ptr + batch)
    oldest = tl.maximum(length - capacity, 0)
    end = length - q_tokens + tl.minimum(row, rows - 1) // group + 1  # positions [first, end)
    first = tl.maximum(end - window, oldest)
    last_row = tl.minimum(start + BLOCK_M, rows) - 1
    inner_end = length - q_tokens + start // group + 1
    stop = tl.maximum(length - q_tokens + last_row // group + 1, 0)
    begin = tl.maximum(inner_end - window, oldest)
    inner_begin = tl.maximum(stop - window, oldest)
    tiles_of_split = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_N), splits)
    split_begin = begin + split * tiles_of_split * BLOCK_N
    split_stop = tl.minimum(split_begin + tiles_of_split * BLOCK_N, stop)

    q_matrix = head_matrix(q_ptr, q_strides, batch, k_head, rows)
    q_rope_matrix = head_matrix(q_rope_ptr, q_rope_strides, batch, k_head, rows)
    q = load_joint_rows(q_matrix, q_rope_matrix, start, BLOCK_M, D_QK, D_ROPE)
    row_max_log2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    head = k_head * group + tl.minimum(row, rows - 1) % group
    bias = ()
    if BIAS_PARTS:
        q_heads = k_heads * group
        bias_ptr = at_lse(bias_ptr, batch, head, q_heads, capacity, BIAS_PARTS)[:, None]
        own_row = ((end - 1) % capacity)[:, None]
        own = load_own_bias(bias_ptr, own_row, capacity, BIAS_PARTS)
        bias = bias_ptr, capacity, own
    if HAS_SINKS:  # a key of no value that every query sees, in the first split
        sinks = tl.load(sinks_ptr + head).to(tl.float32)
        for part in tl.static_range(BIAS_PARTS):
            sinks -= tl.reshape(own[part], [BLOCK_M])
        row_max_log2 = tl.where(split == 0, sinks * LOG2_E, row_max_log2)
        row_sum += 1.0  # in other splits rescaled to 0
    state = zero_rows(BLOCK_M, D_V), row_max_log2, row_sum
    for turn in tl.static_range(2):  # of the ring, where these positions begin and the next one
        shift = (begin // capacity + turn) * capacity  # from row to position
        turn_begin = tl.maximum(split_begin - shift, 0)
        turn_stop = tl.maximum(tl.minimum(split_stop - shift, capacity), turn_begin)
        turn_inner_end = tl.minimum(inner_end - shift, turn_stop)
        bounds = turn_begin, inner_begin - shift, turn_inner_end, turn_stop
        partners = first - shift, tl.minimum(end - shift, turn_stop)
        keys = (
            head_matrix(k_ptr, k_strides, batch, k_head, turn_stop),
            head_matrix(k_rope_ptr, k_rope_strides, batch, 0, turn_stop),
            head_matrix(v_ptr, v_strides, batch, k_head * v_heads // k_heads, turn_stop),
        )
        state = attend(
            state, q, keys, bias, bounds, partners, scale_log2,
            BLOCK_N, D_QK, D_V, D_ROPE, V_IS_K, PRECISION,
        )  # fmt: skip
    o, row_max_log2, row_sum = state

    batch += split * batches
    o = scale_rows(o, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
    store_rows(head_matrix(o_ptr, o_strides, batch, k_head, rows), o, start, BLOCK_M, D_V)
    lse_ptr = at_row_vector(lse_ptr, batch, k_head, k_heads, rows)
    tl.store(lse_ptr + row, row_max_log2 + tl.log2(row_sum), mask=row < rows)


@triton.jit(do_not_specialize=["splits", "rows"])
def combine_kernel(
    o_ptr, partial_ptr, lse_ptr, splits, rows,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """o = sum_s exp2(lse_s - lse) o_s of one row, in the order of the splits.

    Grid: (rows of all sequences and heads,).
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    split = tl.arange(0, MOST_SPLITS)
    partial_log2 = tl.load(lse_ptr + split * rows + row, mask=split < splits, other=NOTHING)
    pivot = tl.maximum(tl.max(partial_log2, 0), -1e30)  # finite where the row has seen nothing
    lse_log2 = pivot + tl.log2(tl.maximum(tl.sum(tl.exp2(partial_log2 - pivot), 0), 1e-30))
    column = tl.arange(0, BLOCK_V)
    o = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, splits, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        part_log2 = tl.load(lse_ptr + part * rows + row, mask=part < splits, other=NOTHING)
        pointers = partial_ptr + ((part * rows + row) * D_V)[:, None] + column[None, :]
        mask = (part < splits)[:, None] & (column < D_V)[None, :]
        partial = tl.load(pointers, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_V]
        o += tl.sum(rounded(partial * tl.exp2(part_log2 - lse_log2)[:, None]), 0)
    tl.store(o_ptr + row * D_V + column, cast(o, o_ptr.dtype.element_ty), mask=column < D_V)


def launch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    q_rope: Tensor | None,
    rope_cache: Tensor | None,
    cache_lengths: Tensor,
    sinks: Tensor | None,
    key_bias: Tensor | None,
    window_size: int | None,
    scale: float,
) -> Tensor:
    """o of q [B, Tq, HQ, D_QK], or [B, HQ, D_QK] of one token; without a v_cache v is k.

    The other arguments are those of `attention_decode` and, for the rotary parts, `latent_decode`;
    a cache of one head may do without its dimension.
    """
    values = k_cache if v_cache is None else v_cache
    (batches, *tokens, q_heads, d_qk), d_v = q.shape, values.shape[-1]
    capacity, (k_heads, v_heads) = k_cache.shape[1], (_heads(x) for x in (k_cache, values))
    q_tokens, group = math.prod(tokens), q_heads // k_heads
    rows = q_tokens * group
    shape = *q.shape[:-1], d_v
    if 0 in (q.numel(), capacity):
        return q.new_zeros(shape)

    def by_key_head(x: Tensor) -> Tensor:
        if k_heads == 1:
            return x.flatten(1, 2) if x.dim() == 4 else x
        x = x.reshape(batches, q_tokens, k_heads, group, x.shape[-1]).transpose(2, 3)
        return x.flatten(1, 2)

    q = by_key_head(q)
    d_rope = 0
    if q_rope is not None:
        q_rope, d_rope = by_key_head(q_rope), q_rope.shape[-1]
    given = (q, k_cache, values, q_rope, rope_cache)
    ragged = any(x is not None and is_ragged(x) for x in given)
    tile = tiles.choose("decode", q, tiles.row_width(d_qk, d_rope, d_v, ragged, rows <= tiles.FEW))
    block_m = min(tile.block_m, max(16, power_of_2(rows)))
    programs = cdiv(rows, block_m) * batches * k_heads
    keys = capacity if window_size is None else min(capacity, window_size + q_tokens - 1)
    splits = splits_of(keys, programs, multiprocessors(q.device))
    partial = q.new_empty(
        splits * batches, k_heads, rows, d_v, dtype=torch.float32 if splits > 1 else q.dtype
    )
    lse = q.new_empty(partial.shape[:3], dtype=torch.float32)
    launch(
        decode_kernel,
        programs * splits,
        q_ptr=q,
        k_ptr=k_cache,
        v_ptr=values,
        q_rope_ptr=q_rope,
        k_rope_ptr=rope_cache,
        o_ptr=partial.transpose(1, 2),
        lse_ptr=lse,
        sinks_ptr=sinks,
        bias_ptr=None if key_bias is None else bias_parts(key_bias),
        lengths_ptr=cache_lengths,
        batches=batches,
        k_heads=k_heads,
        v_heads=v_heads,
        group=group,
        q_tokens=q_tokens,
        capacity=capacity,
        splits=splits,
        window=reach_behind(window_size) + 1,
        scale_log2=log2_scale(scale),
        D_QK=d_qk,
        D_V=d_v,
        D_ROPE=d_rope,
        V_IS_K=v_cache is None,
        HAS_SINKS=sinks is not None,
        BIAS_PARTS=0 if key_bias is None else number_of_parts(key_bias),
        PRECISION=dot_precision(q),
        **tile.options | {"BLOCK_M": block_m},
    )
    o = partial
    if splits > 1:
        o = q.new_empty(batches, k_heads, rows, d_v)
        block_v = power_of_2(d_v)
        launch(
            combine_kernel,
            batches * rows * k_heads,
            o_ptr=o,
            partial_ptr=partial,
            lse_ptr=lse,
            splits=splits,
            rows=batches * rows * k_heads,
            D_V=d_v,
            BLOCK_V=block_v,
            BLOCK_S=max(1, COMBINED_ELEMENTS // block_v),
            MOST_SPLITS=MOST_SPLITS,
        )
    if 1 in (q_tokens, k_heads):
        return o.view(shape)
    return o.view(batches, k_heads, q_tokens, group, d_v).transpose(1, 2).contiguous().view(shape)


def _heads(cache: Tensor) -> int:
    return 1 if cache.dim() == 3 else cache.shape[2]


def splits_of(keys: int, programs: int, multiprocessors: int) -> int:
    """How many programs share the keys of a row: enough to fill the GPU, none with few keys."""
    wanted = cdiv(PROGRAMS_PER_SM * multiprocessors, programs)
    return max(1, min(wanted, cdiv(keys, KEYS_OF_A_SPLIT), MOST_SPLITS))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; without one, a few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count

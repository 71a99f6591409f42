"""The forward kernel of the attention core and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.core import tiles
from kernels.core.primitives import (
    LOG2_E,
    at_head,
    at_row_vector,
    cast,
    dot,
    load_tile,
    locate_program,
    meets,
    plan_tiles,
    softmax_step,
    store_tile,
    store_vector,
    tile_partners,
)
from kernels.core.problem import attention_arguments


@triton.jit
def _attend(
    state, q, keys, begin, stop, first, end, scale_log2,
    BLOCK_N: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys [begin, stop) into (o, row_max_log2, row_sum) of a tile of queries."""
    o, row_max_log2, row_sum = state
    k_ptr, k_stride, v_ptr, v_stride, k_tokens = keys
    for start in range(begin, stop, BLOCK_N):
        k = load_tile(k_ptr, start, k_tokens, k_stride, BLOCK_N, D_QK, BLOCK_QK, MASKED)
        scores = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
        seen = meets(first, end, start, BLOCK_N) if MASKED else None
        weights, rescale, row_max_log2, row_sum = softmax_step(
            scores, row_max_log2, row_sum, scale_log2, seen, MASKED
        )
        v = load_tile(v_ptr, start, k_tokens, v_stride, BLOCK_N, D_V, BLOCK_V, MASKED)
        o = dot(cast(weights, v.dtype), v, o * rescale[:, None], PRECISION)  # [BLOCK_M, BLOCK_V]
    return o, row_max_log2, row_sum


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "shift", "behind", "ahead"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, bounds_ptr,
    q_strides, k_strides, v_strides, o_strides,
    batches, q_heads, k_heads, v_heads, q_tokens, k_tokens, shift, behind, ahead, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SINKS: tl.constexpr, IS_VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T) v, and its lse, for BLOCK_M queries of one head.

    Grid: (query tiles * B * HQ,), the last queries, who see the most keys, first.
    """
    tile, batch, head = locate_program(batches, q_heads)
    start = (tl.cdiv(q_tokens, BLOCK_M) - 1 - tile) * BLOCK_M
    reach = k_tokens, shift, behind, ahead, bounds_ptr
    bounds = plan_tiles(start, q_tokens, reach, BLOCK_M, BLOCK_N, IS_VARLEN)
    first, end = tile_partners(start, q_tokens, reach, BLOCK_M, IS_VARLEN)

    q_ptr = at_head(q_ptr, q_strides, batch, head)
    q = load_tile(q_ptr, start, q_tokens, q_strides[1], BLOCK_M, D_QK, BLOCK_QK, True)
    k_ptr = at_head(k_ptr, k_strides, batch, head * k_heads // q_heads)
    v_ptr = at_head(v_ptr, v_strides, batch, head * v_heads // q_heads)
    keys = k_ptr, k_strides[1], v_ptr, v_strides[1], k_tokens

    row_max_log2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a key of no value that every query sees
        row_max_log2 = tl.zeros_like(row_sum) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        row_sum += 1.0
    state = tl.zeros([BLOCK_M, BLOCK_V], tl.float32), row_max_log2, row_sum
    for phase in tl.static_range(3):  # left edge, interior, diagonal
        state = _attend(
            state, q, keys, bounds[phase], bounds[phase + 1], first, end, scale_log2,
            BLOCK_N, D_QK, D_V, BLOCK_QK, BLOCK_V, PRECISION, MASKED=phase != 1,
        )  # fmt: skip
    o, row_max_log2, row_sum = state

    o /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    o_ptr = at_head(o_ptr, o_strides, batch, head)
    store_tile(o_ptr, o, start, q_tokens, o_strides[1], BLOCK_M, D_V, BLOCK_V)
    lse = (row_max_log2 + tl.log2(row_sum)) / LOG2_E
    lse_ptr = at_row_vector(lse_ptr, batch, head, q_heads, q_tokens)
    store_vector(lse_ptr, lse, start, q_tokens, BLOCK_M)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window_size: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, Tq, HQ, D_V] in q's type and lse [B, HQ, Tq] in fp32; arguments as `attention`."""
    batches, q_tokens, q_heads, _ = q.shape
    o = q.new_empty(batches, q_tokens, q_heads, v.shape[-1])
    lse = q.new_empty(batches, q_heads, q_tokens, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    arguments = attention_arguments(q, k, v, cu_seqlens, causal, window_size, scale)
    tile = tiles.choose("forward", q, max(arguments["BLOCK_QK"], arguments["BLOCK_V"]))
    grid = (triton.cdiv(q_tokens, tile.block_m) * batches * q_heads,)
    forward_kernel[grid](
        **arguments,
        o_ptr=o,
        o_strides=o.stride(),
        lse_ptr=lse,
        sinks_ptr=sinks,
        HAS_SINKS=sinks is not None,
        **tile.options,
    )
    return o, lse

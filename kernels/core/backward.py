"""The backward kernels of the attention core (delta, dq, dk/dv) and their launcher."""

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
    load_vector,
    locate_program,
    meets,
    plan_tiles,
    score_gradient,
    softmax_weights,
    store_tile,
    store_vector,
    tile_partners,
)
from kernels.core.problem import attention_arguments

DELTA_ELEMENTS = 4096  # of a tile


@triton.jit(do_not_specialize=["q_tokens"])
def delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, o_strides, do_strides,
    batches, q_heads, q_tokens,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = <do, o> - dlse for BLOCK_M queries of one head, 0 where a query sees no key.

    Grid: (query tiles * B * HQ,).
    """
    tile, batch, head = locate_program(batches, q_heads)
    start = tile * BLOCK_M
    o_ptr = at_head(o_ptr, o_strides, batch, head)
    do_ptr = at_head(do_ptr, do_strides, batch, head)
    o = load_tile(o_ptr, start, q_tokens, o_strides[1], BLOCK_M, D_V, BLOCK_V, True)
    do = load_tile(do_ptr, start, q_tokens, do_strides[1], BLOCK_M, D_V, BLOCK_V, True)
    dlse_ptr = at_row_vector(dlse_ptr, batch, head, q_heads, q_tokens)
    lse_ptr = at_row_vector(lse_ptr, batch, head, q_heads, q_tokens)
    dlse = load_vector(dlse_ptr, start, q_tokens, BLOCK_M, True)
    lse = load_vector(lse_ptr, start, q_tokens, BLOCK_M, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - dlse
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    delta_ptr = at_row_vector(delta_ptr, batch, head, q_heads, q_tokens)
    store_vector(delta_ptr, delta, start, q_tokens, BLOCK_M)


@triton.jit
def _query_gradient(
    dq, queries, keys, begin, stop, first, end, scale_log2,
    BLOCK_N: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the share of the keys [begin, stop) to dq / scale of a tile of queries."""
    q, do, lse_log2, delta = queries
    k_ptr, k_stride, v_ptr, v_stride, k_tokens = keys
    for start in range(begin, stop, BLOCK_N):
        k = load_tile(k_ptr, start, k_tokens, k_stride, BLOCK_N, D_QK, BLOCK_QK, MASKED)
        v = load_tile(v_ptr, start, k_tokens, v_stride, BLOCK_N, D_V, BLOCK_V, MASKED)
        scores = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
        dweights = dot(do, tl.trans(v), None, PRECISION)  # [BLOCK_M, BLOCK_N]
        seen = meets(first, end, start, BLOCK_N) if MASKED else None
        weights = softmax_weights(scores, lse_log2[:, None], scale_log2, seen, MASKED)
        dscores = score_gradient(weights, dweights, delta[:, None])
        dq = dot(cast(dscores, k.dtype), k, dq, PRECISION)  # [BLOCK_M, BLOCK_QK]
    return dq


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "shift", "behind", "ahead"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, bounds_ptr,
    q_strides, k_strides, v_strides, do_strides, dq_strides,
    batches, q_heads, k_heads, v_heads, q_tokens, k_tokens, shift, behind, ahead, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale dS k for BLOCK_M queries of one head, where dS = P (do v^T - delta).

    Grid: (query tiles * B * HQ,), the last queries, who see the most keys, first.
    """
    tile, batch, head = locate_program(batches, q_heads)
    start = (tl.cdiv(q_tokens, BLOCK_M) - 1 - tile) * BLOCK_M
    reach = k_tokens, shift, behind, ahead, bounds_ptr
    bounds = plan_tiles(start, q_tokens, reach, BLOCK_M, BLOCK_N, IS_VARLEN)
    first, end = tile_partners(start, q_tokens, reach, BLOCK_M, IS_VARLEN)

    q_ptr = at_head(q_ptr, q_strides, batch, head)
    do_ptr = at_head(do_ptr, do_strides, batch, head)
    lse_ptr = at_row_vector(lse_ptr, batch, head, q_heads, q_tokens)
    delta_ptr = at_row_vector(delta_ptr, batch, head, q_heads, q_tokens)
    q = load_tile(q_ptr, start, q_tokens, q_strides[1], BLOCK_M, D_QK, BLOCK_QK, True)
    do = load_tile(do_ptr, start, q_tokens, do_strides[1], BLOCK_M, D_V, BLOCK_V, True)
    lse_log2 = load_vector(lse_ptr, start, q_tokens, BLOCK_M, True) * LOG2_E
    delta = load_vector(delta_ptr, start, q_tokens, BLOCK_M, True)
    queries = q, do, lse_log2, delta
    k_ptr = at_head(k_ptr, k_strides, batch, head * k_heads // q_heads)
    v_ptr = at_head(v_ptr, v_strides, batch, head * v_heads // q_heads)
    keys = k_ptr, k_strides[1], v_ptr, v_strides[1], k_tokens

    dq = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    for phase in tl.static_range(3):  # left edge, interior, diagonal
        dq = _query_gradient(
            dq, queries, keys, bounds[phase], bounds[phase + 1], first, end, scale_log2,
            BLOCK_N, D_QK, D_V, BLOCK_QK, BLOCK_V, PRECISION, MASKED=phase != 1,
        )  # fmt: skip
    dq *= scale_log2 / LOG2_E
    dq_ptr = at_head(dq_ptr, dq_strides, batch, head)
    store_tile(dq_ptr, dq, start, q_tokens, dq_strides[1], BLOCK_M, D_QK, BLOCK_QK)


@triton.jit
def _key_gradients(
    dk, dv, k, v, queries, begin, stop, first, end, scale_log2,
    BLOCK_M: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the share of the queries [begin, stop) to dk / scale and dv of a tile of keys."""
    q_ptr, q_stride, do_ptr, do_stride, lse_ptr, delta_ptr, q_tokens = queries
    for start in range(begin, stop, BLOCK_M):
        q = load_tile(q_ptr, start, q_tokens, q_stride, BLOCK_M, D_QK, BLOCK_QK, MASKED)
        do = load_tile(do_ptr, start, q_tokens, do_stride, BLOCK_M, D_V, BLOCK_V, MASKED)
        scores = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        seen = meets(first, end, start, BLOCK_M) if MASKED else None
        lse_log2 = load_vector(lse_ptr, start, q_tokens, BLOCK_M, MASKED) * LOG2_E
        weights = softmax_weights(scores, lse_log2[None, :], scale_log2, seen, MASKED)
        dv = dot(cast(weights, do.dtype), do, dv, PRECISION)  # [BLOCK_N, BLOCK_V]
        dweights = dot(v, tl.trans(do), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        delta = load_vector(delta_ptr, start, q_tokens, BLOCK_M, MASKED)
        dscores = score_gradient(weights, dweights, delta[None, :])
        dk = dot(cast(dscores, q.dtype), q, dk, PRECISION)  # [BLOCK_N, BLOCK_QK]
    return dk, dv


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "shift", "behind", "ahead"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bounds_ptr,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    batches, q_heads, k_heads, v_heads, q_tokens, k_tokens, shift, behind, ahead, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T do for BLOCK_N keys of one value head and its key heads.

    Grid: (key tiles * B * HV,), the first keys, which the most queries see, first.
    """
    tile, batch, v_head = locate_program(batches, v_heads)
    start = tile * BLOCK_N
    reach = q_tokens, -shift, ahead, behind, bounds_ptr
    bounds = plan_tiles(start, k_tokens, reach, BLOCK_N, BLOCK_M, IS_VARLEN)
    first, end = tile_partners(start, k_tokens, reach, BLOCK_N, IS_VARLEN)

    v_ptr = at_head(v_ptr, v_strides, batch, v_head)
    v = load_tile(v_ptr, start, k_tokens, v_strides[1], BLOCK_N, D_V, BLOCK_V, True)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    k_per_v, q_per_k = k_heads // v_heads, q_heads // k_heads
    for k_head in range(v_head * k_per_v, (v_head + 1) * k_per_v):
        k_base = at_head(k_ptr, k_strides, batch, k_head)
        k = load_tile(k_base, start, k_tokens, k_strides[1], BLOCK_N, D_QK, BLOCK_QK, True)
        dk = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
        for phase in tl.static_range(3):  # left edge, interior, diagonal
            for q_head in range(k_head * q_per_k, (k_head + 1) * q_per_k):
                queries = (
                    at_head(q_ptr, q_strides, batch, q_head), q_strides[1],
                    at_head(do_ptr, do_strides, batch, q_head), do_strides[1],
                    at_row_vector(lse_ptr, batch, q_head, q_heads, q_tokens),
                    at_row_vector(delta_ptr, batch, q_head, q_heads, q_tokens),
                    q_tokens,
                )  # fmt: skip
                dk, dv = _key_gradients(
                    dk, dv, k, v, queries, bounds[phase], bounds[phase + 1], first, end,
                    scale_log2, BLOCK_M, D_QK, D_V, BLOCK_QK, BLOCK_V, PRECISION,
                    MASKED=phase != 1,
                )  # fmt: skip
        dk *= scale_log2 / LOG2_E
        dk_base = at_head(dk_ptr, dk_strides, batch, k_head)
        store_tile(dk_base, dk, start, k_tokens, dk_strides[1], BLOCK_N, D_QK, BLOCK_QK)
    dv_ptr = at_head(dv_ptr, dv_strides, batch, v_head)
    store_tile(dv_ptr, dv, start, k_tokens, dv_strides[1], BLOCK_N, D_V, BLOCK_V)


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window_size: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the layout of q, k, v, and delta [B, HQ, Tq]; lse and dlse are [B, HQ, Tq]."""
    if do.stride(-1) != 1:  # as that of o.sum(), expanded from one number
        do = do.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    arguments = attention_arguments(q, k, v, cu_seqlens, causal, window_size, scale)
    batches, q_tokens, q_heads, _ = q.shape
    k_tokens, v_heads = k.shape[1], v.shape[2]
    width = max(arguments["BLOCK_QK"], arguments["BLOCK_V"])

    delta_rows = max(1, DELTA_ELEMENTS // arguments["BLOCK_V"])
    delta_kernel[(triton.cdiv(q_tokens, delta_rows) * batches * q_heads,)](
        o_ptr=o,
        do_ptr=do,
        lse_ptr=lse,
        dlse_ptr=dlse.contiguous(),
        delta_ptr=delta,
        o_strides=o.stride(),
        do_strides=do.stride(),
        batches=batches,
        q_heads=q_heads,
        q_tokens=q_tokens,
        D_V=arguments["D_V"],
        BLOCK_V=arguments["BLOCK_V"],
        BLOCK_M=delta_rows,
    )
    arguments |= {
        "do_ptr": do,
        "do_strides": do.stride(),
        "lse_ptr": lse,
        "delta_ptr": delta,
    }
    tile = tiles.choose("dq", q, width)
    dq_kernel[(triton.cdiv(q_tokens, tile.block_m) * batches * q_heads,)](
        **arguments, dq_ptr=dq, dq_strides=dq.stride(), **tile.options
    )
    tile = tiles.choose("dkdv", q, width)
    dkdv_kernel[(triton.cdiv(k_tokens, tile.block_n) * batches * v_heads,)](
        **arguments,
        dk_ptr=dk,
        dk_strides=dk.stride(),
        dv_ptr=dv,
        dv_strides=dv.stride(),
        **tile.options,
    )
    return dq, dk, dv, delta

"""The forward kernel of the attention core and its launcher."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.core import tiles
from kernels.core.launch import launch
from kernels.core.primitives import (
    LOG2_E,
    accumulate,
    head_matrix,
    hide_unmet,
    inner_products,
    load_joint_rows,
    load_rows,
    locate_program,
    plan_tiles,
    rounding_rests,
    scale_rows,
    store_rows,
    tile_partners,
    zero_rows,
)
from kernels.core.problem import Problem, cdiv, new_lse, new_rest, without_padding
from kernels.core.softmax import (
    add_bias,
    at_lse,
    head_bias,
    load_bias,
    softmax_step,
    store_lse,
)


@triton.jit
def attend(
    state, q, keys, bias, bounds, partners, scale_log2,
    BLOCK_N: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr,
    V_IS_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys inside bounds into (o, row_max_log2, row_sum) of a tile of queries.

    bias is what `load_bias` takes, or (); bounds and partners are what `plan_tiles` and
    `tile_partners` find for the queries.
    """
    o, row_max_log2, row_sum = state
    rest_log2 = scale_log2 if len(bias) == 0 else 1.0
    k_matrix, k_rope_matrix, v_matrix = keys
    for start in range(bounds[0], bounds[3], BLOCK_N):
        k = load_joint_rows(k_matrix, k_rope_matrix, start, BLOCK_N, D_QK, D_ROPE)
        v = k if V_IS_K else load_rows(v_matrix, start, BLOCK_N, D_V)
        key_bias = load_bias(bias, start, BLOCK_N, 0)
        scores = inner_products(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        if len(bias):
            scores = add_bias(scores, key_bias, bias[2], scale_log2)
        scores = hide_unmet(scores, float("-inf"), bounds, partners, start, BLOCK_N, True)
        weights, rescale, row_max_log2, row_sum = softmax_step(
            scores, row_max_log2, row_sum, rest_log2
        )
        o = accumulate(weights, v, scale_rows(o, rescale[:, None]), PRECISION)
    return o, row_max_log2, row_sum


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "shift", "behind", "ahead"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, o_ptr, o_rest_ptr, lse_log2_ptr, sinks_ptr,
    bias_ptr, bounds_ptr,
    q_strides, k_strides, v_strides, q_rope_strides, k_rope_strides, o_strides,
    batches, q_heads, k_heads, v_heads, q_tokens, k_tokens, shift, behind, ahead, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SINKS: tl.constexpr,
    IS_VARLEN: tl.constexpr, BIAS_PARTS: tl.constexpr, LSE_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T + bias) v, and its base-2 lse, for BLOCK_M queries of one head.

    The lse is less the bias of the query's own key. What rounding takes off o is stored, too, where
    o_rest_ptr says; its strides are those of o.
    Grid: (query tiles * B * HQ,), the last queries, who see the most keys, first.
    """
    tile, batch, head = locate_program(batches, q_heads)
    start = (tl.cdiv(q_tokens, BLOCK_M) - 1 - tile) * BLOCK_M
    reach = k_tokens, shift, behind, ahead, bounds_ptr
    bounds = plan_tiles(start, q_tokens, reach, BLOCK_M, IS_VARLEN)
    partners = tile_partners(start, q_tokens, reach, BLOCK_M, IS_VARLEN)

    q_matrix = head_matrix(q_ptr, q_strides, batch, head, q_tokens)
    q_rope_matrix = head_matrix(q_rope_ptr, q_rope_strides, batch, head, q_tokens)
    q = load_joint_rows(q_matrix, q_rope_matrix, start, BLOCK_M, D_QK, D_ROPE)
    keys = (
        head_matrix(k_ptr, k_strides, batch, head * k_heads // q_heads, k_tokens),
        head_matrix(k_rope_ptr, k_rope_strides, batch, 0, k_tokens),
        head_matrix(v_ptr, v_strides, batch, head * v_heads // q_heads, k_tokens),
    )
    row_max_log2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    bias = ()
    if BIAS_PARTS:
        own_key = (start + shift + tl.arange(0, BLOCK_M))[:, None]
        bias = head_bias(bias_ptr, batch, head, q_heads, own_key, k_tokens, BIAS_PARTS)
        _, _, own = bias
    if HAS_SINKS:  # a key of no value that every query sees
        sinks = tl.zeros_like(row_sum) + tl.load(sinks_ptr + head).to(tl.float32)
        for part in tl.static_range(BIAS_PARTS):
            sinks -= tl.reshape(own[part], [BLOCK_M])
        row_max_log2 = sinks * LOG2_E
        row_sum += 1.0
    state = zero_rows(BLOCK_M, D_V), row_max_log2, row_sum
    o, row_max_log2, row_sum = attend(
        state, q, keys, bias, bounds, partners, scale_log2,
        BLOCK_N, D_QK, D_V, D_ROPE, False, PRECISION,
    )  # fmt: skip

    o = scale_rows(o, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
    o_matrix = head_matrix(o_ptr, o_strides, batch, head, q_tokens)
    store_rows(o_matrix, o, start, BLOCK_M, D_V)
    if o_rest_ptr is not None:
        rest_matrix = head_matrix(o_rest_ptr, o_strides, batch, head, q_tokens)
        rests = rounding_rests(o, o_ptr.dtype.element_ty)
        store_rows(rest_matrix, rests, start, BLOCK_M, D_V)
    lse_log2_ptr = at_lse(lse_log2_ptr, batch, head, q_heads, q_tokens, LSE_PARTS)
    store_lse(lse_log2_ptr, row_max_log2, row_sum, start, q_tokens, BLOCK_M, LSE_PARTS)


def launch_forward(problem: Problem, with_rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, Tq, HQ, D_V] in q's type, the base-2 lse [B, HQ, parts, Tq] in fp32, o's rest.

    The last is what rounding takes off o, like o, and empty in fp32 or unless asked for.
    """
    width = problem.v.shape[-1]
    problem = problem.even
    q, sinks = problem.q, problem.sinks
    batches, q_tokens, q_heads, _ = q.shape
    o = q.new_empty(batches, q_tokens, q_heads, problem.v.shape[-1])
    lse_log2, rest = new_lse(q), new_rest(o, with_rest)
    arguments = problem.kernel_arguments
    tile = tiles.choose("forward", q, tiles.tile_width(arguments))
    launch(
        forward_kernel,
        cdiv(q_tokens, tile.block_m) * batches * q_heads,
        **arguments,
        o_ptr=o,
        o_rest_ptr=rest if rest.numel() else None,
        lse_log2_ptr=lse_log2,
        sinks_ptr=sinks,
        HAS_SINKS=sinks is not None,
        **tile.options,
    )
    return without_padding(o, width), lse_log2, without_padding(rest, width)

"""The backward kernels of the attention core (delta, dq, dk/dv) and their launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.core import tiles
from kernels.core.launch import launch
from kernels.core.primitives import (
    LOG2_E,
    accumulate,
    at_row_vector,
    cast,
    head_matrix,
    hide_unmet,
    inner_products,
    load_joint_rows,
    load_rows,
    load_vector,
    locate_program,
    move,
    plan_tiles,
    rounded,
    scale_rows,
    store_joint_rows,
    store_rows,
    store_vector,
    tile_partners,
    zero_joint_rows,
    zero_rows,
)
from kernels.core.problem import Problem, cdiv, even_rows, power_of_2, without_padding
from kernels.core.softmax import (
    add_bias,
    at_lse,
    head_bias,
    load_bias,
    load_lse,
    load_own_bias,
    score_gradient,
    softmax_weights,
)

DELTA_ELEMENTS = 4096  # of a tile


@triton.jit(do_not_specialize=["q_tokens"])
def delta_kernel(
    o_ptr, o_rest_ptr, do_ptr, lse_log2_ptr, dlse_log2_ptr, delta_ptr,
    o_strides, o_rest_strides, do_strides,
    batches, q_heads, q_tokens, D_V: tl.constexpr, LSE_PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = <do, o> - dlse for BLOCK_M queries of one head, 0 where a query sees no key.

    The rest, if there is one, is what rounding has taken off o.
    Grid: (query tiles * B * HQ,).
    """
    tile, batch, head = locate_program(batches, q_heads)
    start = tile * BLOCK_M
    o_matrix = head_matrix(o_ptr, o_strides, batch, head, q_tokens)
    do_matrix = head_matrix(do_ptr, do_strides, batch, head, q_tokens)
    o = load_rows(o_matrix, start, BLOCK_M, D_V)
    do = load_rows(do_matrix, start, BLOCK_M, D_V)
    rest = ()
    if o_rest_ptr is not None:
        rest_matrix = head_matrix(o_rest_ptr, o_rest_strides, batch, head, q_tokens)
        rest = load_rows(rest_matrix, start, BLOCK_M, D_V)
    lse_log2_ptr = at_lse(lse_log2_ptr, batch, head, q_heads, q_tokens, LSE_PARTS)
    lse_log2 = load_vector(lse_log2_ptr, start, q_tokens, BLOCK_M)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if dlse_log2_ptr is not None:
        dlse_log2_ptr = at_lse(dlse_log2_ptr, batch, head, q_heads, q_tokens, LSE_PARTS)
        delta -= load_vector(dlse_log2_ptr, start, q_tokens, BLOCK_M) * LOG2_E
    for part in tl.static_range(len(o)):
        whole = o[part].to(tl.float32)
        if len(rest):
            whole += rest[part].to(tl.float32)
        delta += tl.sum(rounded(whole * do[part].to(tl.float32)), 1)
    delta = tl.where(lse_log2 == float("-inf"), 0.0, delta)
    delta_ptr = at_row_vector(delta_ptr, batch, head, q_heads, q_tokens)
    store_vector(delta_ptr, delta, start, q_tokens, BLOCK_M)


@triton.jit
def _query_gradient(
    state, queries, keys, bias, bounds, partners, scale_log2,
    BLOCK_N: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr,
    HAS_EXCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of the keys inside bounds to (dq / scale, excess) of a tile of queries."""
    dq, excess = state
    q, do, lse_log2, delta = queries
    k_matrix, k_rope_matrix, v_matrix = keys
    rest_log2 = scale_log2 if len(bias) == 0 else 1.0
    for start in range(bounds[0], bounds[3], BLOCK_N):
        k = load_joint_rows(k_matrix, k_rope_matrix, start, BLOCK_N, D_QK, D_ROPE)
        v = load_rows(v_matrix, start, BLOCK_N, D_V)
        key_bias = load_bias(bias, start, BLOCK_N, 0)
        scores = inner_products(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        dweights = inner_products(do, v, PRECISION)  # [BLOCK_M, BLOCK_N]
        if len(bias):
            scores = add_bias(scores, key_bias, bias[2], scale_log2)
        weights = softmax_weights(scores, lse_log2, rest_log2)
        weights = hide_unmet(weights, 0.0, bounds, partners, start, BLOCK_N)
        dscores = cast(score_gradient(weights, dweights, delta[:, None]), k[0].dtype)
        dq = accumulate(dscores, k, dq, PRECISION)
        if HAS_EXCESS:
            excess += tl.sum(dscores.to(tl.float32), 1)
    return dq, excess


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "shift", "behind", "ahead"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, do_ptr, lse_log2_ptr, delta_ptr,
    dq_ptr, dq_rope_ptr, excess_ptr, bias_ptr, bounds_ptr,
    q_strides, k_strides, v_strides, q_rope_strides, k_rope_strides, do_strides,
    dq_strides, dq_rope_strides,
    batches, q_heads, k_heads, v_heads, q_tokens, k_tokens, shift, behind, ahead, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_EXCESS: tl.constexpr,
    IS_VARLEN: tl.constexpr, BIAS_PARTS: tl.constexpr, LSE_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale dS k for BLOCK_M queries of one head, where dS = P (do v^T - delta).

    Without a sink a row of dS sums to 0 but for rounding; that excess is wanted where all keys have
    a part in common, which multiplies it.
    Grid: (query tiles * B * HQ,), the last queries, who see the most keys, first.
    """
    tile, batch, head = locate_program(batches, q_heads)
    start = (tl.cdiv(q_tokens, BLOCK_M) - 1 - tile) * BLOCK_M
    reach = k_tokens, shift, behind, ahead, bounds_ptr
    bounds = plan_tiles(start, q_tokens, reach, BLOCK_M, IS_VARLEN)
    partners = tile_partners(start, q_tokens, reach, BLOCK_M, IS_VARLEN)

    q_matrix = head_matrix(q_ptr, q_strides, batch, head, q_tokens)
    q_rope_matrix = head_matrix(q_rope_ptr, q_rope_strides, batch, head, q_tokens)
    do_matrix = head_matrix(do_ptr, do_strides, batch, head, q_tokens)
    lse_log2_ptr = at_lse(lse_log2_ptr, batch, head, q_heads, q_tokens, LSE_PARTS)
    delta_ptr = at_row_vector(delta_ptr, batch, head, q_heads, q_tokens)
    bias = ()
    if BIAS_PARTS:
        own_key = (start + shift + tl.arange(0, BLOCK_M))[:, None]
        bias = head_bias(bias_ptr, batch, head, q_heads, own_key, k_tokens, BIAS_PARTS)
    queries = (
        load_joint_rows(q_matrix, q_rope_matrix, start, BLOCK_M, D_QK, D_ROPE),
        load_rows(do_matrix, start, BLOCK_M, D_V),
        load_lse(lse_log2_ptr, start, q_tokens, BLOCK_M, LSE_PARTS, BIAS_PARTS, 1),
        load_vector(delta_ptr, start, q_tokens, BLOCK_M),
    )
    keys = (
        head_matrix(k_ptr, k_strides, batch, head * k_heads // q_heads, k_tokens),
        head_matrix(k_rope_ptr, k_rope_strides, batch, 0, k_tokens),
        head_matrix(v_ptr, v_strides, batch, head * v_heads // q_heads, k_tokens),
    )
    state = zero_joint_rows(BLOCK_M, D_QK, D_ROPE), tl.zeros([BLOCK_M], tl.float32)
    dq, excess = _query_gradient(
        state, queries, keys, bias, bounds, partners, scale_log2,
        BLOCK_N, D_QK, D_V, D_ROPE, HAS_EXCESS, PRECISION,
    )  # fmt: skip
    dq = scale_rows(dq, scale_log2 / LOG2_E)
    dq_matrix = head_matrix(dq_ptr, dq_strides, batch, head, q_tokens)
    dq_rope_matrix = head_matrix(dq_rope_ptr, dq_rope_strides, batch, head, q_tokens)
    store_joint_rows(dq_matrix, dq_rope_matrix, dq, start, BLOCK_M, D_QK, D_ROPE)
    if HAS_EXCESS:
        excess_ptr = at_row_vector(excess_ptr, batch, head, q_heads, q_tokens)
        store_vector(excess_ptr, excess, start, q_tokens, BLOCK_M)


@triton.jit
def _key_gradients(
    dk, dv, k, v, queries, bias, strides, heads, bounds, partners, scale_log2,
    BLOCK_M: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr,
    BIAS_PARTS: tl.constexpr, LSE_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of the queries inside bounds to dk / scale and dv of a tile of keys.

    One loop takes all tiles of the first of the heads, at `queries`, then those of the next one.
    Of each head it writes the gradient of the keys' bias.
    """
    q_matrix, q_rope_matrix, do_matrix, lse_log2_ptr, delta_ptr = queries
    q_tokens = q_matrix[2]
    start = bounds[0]
    rest_log2 = scale_log2
    if BIAS_PARTS:
        bias_ptr, dbias_ptr, first_key, k_tokens, shift = bias
        BLOCK_N: tl.constexpr = v[0].shape[0]
        dbias = tl.zeros([BLOCK_N], tl.float32)
        key = first_key + tl.arange(0, BLOCK_N)
        rest_log2 = 1.0
    for _ in range(tl.cdiv(tl.maximum(bounds[3] - start, 0), BLOCK_M) * heads):
        q = load_joint_rows(q_matrix, q_rope_matrix, start, BLOCK_M, D_QK, D_ROPE)
        do = load_rows(do_matrix, start, BLOCK_M, D_V)
        lse_log2 = load_lse(lse_log2_ptr, start, q_tokens, BLOCK_M, LSE_PARTS, BIAS_PARTS, 0)
        if BIAS_PARTS:
            own_key = (start + shift + tl.arange(0, BLOCK_M))[None, :]
            own = load_own_bias(bias_ptr, own_key, k_tokens, BIAS_PARTS)
            key_bias = load_bias((bias_ptr, k_tokens, own), first_key, BLOCK_N, 1)
        scores = inner_products(k, q, PRECISION)  # [BLOCK_N, BLOCK_M]
        dweights = inner_products(v, do, PRECISION)  # [BLOCK_N, BLOCK_M]
        delta = load_vector(delta_ptr, start, q_tokens, BLOCK_M)
        if BIAS_PARTS:
            scores = add_bias(scores, key_bias, own, scale_log2)
        weights = softmax_weights(scores, lse_log2, rest_log2)
        weights = hide_unmet(weights, 0.0, bounds, partners, start, BLOCK_M)
        dv = accumulate(weights, do, dv, PRECISION)  # [BLOCK_N, D_V]
        dscores = score_gradient(weights, dweights, delta[None, :])
        dk = accumulate(dscores, q, dk, PRECISION)
        start += BLOCK_M
        turns = (start >= bounds[3]).to(tl.int64)  # to the next head; an `if` ends the pipelining
        start = tl.where(turns != 0, bounds[0], start)
        q_matrix = move(q_matrix, turns * strides[0][2])
        if D_ROPE:
            q_rope_matrix = move(q_rope_matrix, turns * strides[1][2])
        do_matrix = move(do_matrix, turns * strides[2][2])
        lse_log2_ptr += turns * LSE_PARTS * q_tokens
        delta_ptr += turns * q_tokens
        if BIAS_PARTS:
            dbias += tl.sum(dscores, 1)
            tl.store(dbias_ptr + key, dbias, mask=key < tl.where(turns != 0, k_tokens, 0))
            dbias = tl.where(turns != 0, 0.0, dbias)
            bias_ptr += turns * BIAS_PARTS * k_tokens
            dbias_ptr += turns * k_tokens
    return dk, dv


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "shift", "behind", "ahead"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, do_ptr, lse_log2_ptr, delta_ptr,
    dk_ptr, dv_ptr, dk_rope_ptr, bias_ptr, dbias_ptr, bounds_ptr,
    q_strides, k_strides, v_strides, q_rope_strides, k_rope_strides, do_strides,
    dk_strides, dv_strides, dk_rope_strides,
    batches, q_heads, k_heads, v_heads, q_tokens, k_tokens, shift, behind, ahead, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, D_ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_VARLEN: tl.constexpr, BIAS_PARTS: tl.constexpr, LSE_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T do for BLOCK_N keys of one value head and its key heads.

    The gradient of their bias, dS^T 1, is written for each query head that has a query near. The
    rotary part of dk is each key head's share of the one that all heads have in common.
    Grid: (key tiles * B * HV,), the first keys, which the most queries see, first.
    """
    tile, batch, v_head = locate_program(batches, v_heads)
    start = tile * BLOCK_N
    reach = q_tokens, -shift, ahead, behind, bounds_ptr
    bounds = plan_tiles(start, k_tokens, reach, BLOCK_N, IS_VARLEN)
    partners = tile_partners(start, k_tokens, reach, BLOCK_N, IS_VARLEN)

    v_matrix = head_matrix(v_ptr, v_strides, batch, v_head, k_tokens)
    k_rope_matrix = head_matrix(k_rope_ptr, k_rope_strides, batch, 0, k_tokens)
    v = load_rows(v_matrix, start, BLOCK_N, D_V)
    dv = zero_rows(BLOCK_N, D_V)
    k_per_v, q_per_k = k_heads // v_heads, q_heads // k_heads
    strides = q_strides, q_rope_strides, do_strides
    for k_head in range(v_head * k_per_v, (v_head + 1) * k_per_v):
        k_matrix = head_matrix(k_ptr, k_strides, batch, k_head, k_tokens)
        k = load_joint_rows(k_matrix, k_rope_matrix, start, BLOCK_N, D_QK, D_ROPE)
        dk = zero_joint_rows(BLOCK_N, D_QK, D_ROPE)
        q_head = k_head * q_per_k
        queries = (
            head_matrix(q_ptr, q_strides, batch, q_head, q_tokens),
            head_matrix(q_rope_ptr, q_rope_strides, batch, q_head, q_tokens),
            head_matrix(do_ptr, do_strides, batch, q_head, q_tokens),
            at_lse(lse_log2_ptr, batch, q_head, q_heads, q_tokens, LSE_PARTS),
            at_row_vector(delta_ptr, batch, q_head, q_heads, q_tokens),
        )
        bias = ()
        if BIAS_PARTS:
            bias = (
                at_lse(bias_ptr, batch, q_head, q_heads, k_tokens, BIAS_PARTS),
                at_row_vector(dbias_ptr, batch, q_head, q_heads, k_tokens),
                start, k_tokens, shift,
            )  # fmt: skip
        dk, dv = _key_gradients(
            dk, dv, k, v, queries, bias, strides, q_per_k, bounds, partners, scale_log2,
            BLOCK_M, D_QK, D_V, D_ROPE, BIAS_PARTS, LSE_PARTS, PRECISION,
        )  # fmt: skip
        dk = scale_rows(dk, scale_log2 / LOG2_E)
        dk_matrix = head_matrix(dk_ptr, dk_strides, batch, k_head, k_tokens)
        dk_rope_matrix = head_matrix(dk_rope_ptr, dk_rope_strides, batch, k_head, k_tokens)
        store_joint_rows(dk_matrix, dk_rope_matrix, dk, start, BLOCK_N, D_QK, D_ROPE)
    dv_matrix = head_matrix(dv_ptr, dv_strides, batch, v_head, k_tokens)
    store_rows(dv_matrix, dv, start, BLOCK_N, D_V)


def launch_backward(
    problem: Problem,
    o: Tensor,
    lse_log2: Tensor,
    rest: Tensor,
    do: Tensor,
    dlse_log2: Tensor | None,
    with_excess: bool,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dq_rope, dk_rope, dkey_bias like their tensors, delta and excess [B, HQ, Tq].

    lse_log2 and its gradient are [B, HQ, parts, Tq], None is a gradient of zeros; rest is what
    rounding has taken off o, or empty. The gradients of absent tensors are empty, and so is excess,
    what rounding makes of sum_j dS_ij = 0, unless asked for.
    """
    inputs = problem[:5]
    problem, o, do = problem.even, even_rows(o), even_rows(do)
    q, k, v, q_rope, k_rope = problem[:5]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dq_rope, dk_rope = (x if x is None else x.new_empty(x.shape) for x in (q_rope, k_rope))
    batches, q_tokens, q_heads, _ = q.shape
    k_tokens, k_heads = k.shape[1:3]
    delta = lse_log2.new_empty(batches, q_heads, q_tokens)
    excess = lse_log2.new_empty(delta.shape) if with_excess else None
    arguments = problem.kernel_arguments
    arguments |= {"do_ptr": do, "lse_log2_ptr": lse_log2, "delta_ptr": delta}

    delta_rows = DELTA_ELEMENTS // power_of_2(max(16, v.shape[-1]))
    launch(
        delta_kernel,
        cdiv(q_tokens, delta_rows) * batches * q_heads,
        **arguments,
        o_ptr=o,
        o_rest_ptr=even_rows(rest) if rest.numel() else None,
        dlse_log2_ptr=dlse_log2,
        BLOCK_M=delta_rows,
    )
    width = tiles.tile_width(arguments)
    tile = tiles.choose("dq", q, width)
    launch(
        dq_kernel,
        cdiv(q_tokens, tile.block_m) * batches * q_heads,
        **arguments,
        dq_ptr=dq,
        dq_rope_ptr=dq_rope,
        excess_ptr=excess,
        HAS_EXCESS=excess is not None,
        **tile.options,
    )
    shares = None  # of each key head in dk_rope
    if k_rope is not None:
        shape = batches, k_tokens, k_heads, k_rope.shape[-1]
        shares = q.new_empty(shape, dtype=torch.float32)
    dbias = None  # zeros where no query is near
    if problem.key_bias is not None:
        dbias = lse_log2.new_zeros(batches, q_heads, k_tokens)
    tile = tiles.choose("dkdv", q, width)
    launch(
        dkdv_kernel,
        cdiv(k_tokens, tile.block_n) * batches * v.shape[2],
        **arguments,
        dk_ptr=dk,
        dv_ptr=dv,
        dk_rope_ptr=shares,
        dbias_ptr=dbias,
        **tile.options,
    )
    unseen = max(0, arguments["shift"] - arguments["behind"])  # first keys, whose v may be nan
    if unseen:
        dk[:, :unseen].zero_()
        if dbias is not None:
            dbias[..., :unseen].zero_()
    if dk_rope is not None and shares is not None:
        dk_rope.copy_(shares.sum(2))
    gradients = (
        q.new_empty((0,) * 4) if x is None or d is None else without_padding(d, x.shape[-1])
        for d, x in zip((dq, dk, dv, dq_rope, dk_rope), inputs, strict=True)
    )
    dbias, excess = (delta.new_empty((0,) * 3) if x is None else x for x in (dbias, excess))
    return *gradients, dbias.transpose(1, 2).contiguous(), delta, excess

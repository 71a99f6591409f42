"""The softmax of a row of scores, its log-sum-exp, its bias, and the gradient of the scores."""

import triton
import triton.language as tl

from kernels.core import problem
from kernels.core.primitives import (
    LOG2_E,
    LOWEST,
    at_row_vector,
    load_vector,
    rounded,
    store_vector,
)

LARGEST_BIAS = tl.constexpr(problem.LARGEST_BIAS)


@triton.jit
def softmax_step(scores, row_max_log2, row_sum, scale_log2):
    """Fold one tile of scores, -inf where unseen, into the running softmax of its rows.

    Returns:
        weights: exp2(scale_log2 scores - new row maximum).  # [BLOCK_M, BLOCK_N]
        rescale: factor on everything summed so far.  # [BLOCK_M]
        row_max_log2, row_sum: the new ones.  # [BLOCK_M]
    """
    new_max_log2 = tl.maximum(row_max_log2, tl.max(scores, 1) * scale_log2)
    pivot_log2 = tl.maximum(new_max_log2, LOWEST)  # of no keys yet, -inf - -inf would be nan
    weights = tl.exp2(scores * scale_log2 - pivot_log2[:, None])
    rescale = tl.exp2(row_max_log2 - pivot_log2)
    return weights, rescale, new_max_log2, row_sum * rescale + tl.sum(weights, 1)


# A bias of keys may outgrow the digits of fp32, but a softmax is free of what a row has in common:
# scores get its difference to the bias of the query's own key, and the lse is less that one. Like
# the lse it has parts, [B, H, parts, T]: one of fp32, and of fp64 what that leaves as well.


@triton.jit
def load_own_bias(ptr, key, keys, PARTS: tl.constexpr):
    """The parts of the bias of queries' own keys, 0 where it hides them.

    Those before the first key or behind the last have its.
    """
    key = tl.minimum(tl.maximum(key, 0), keys - 1)
    first = tl.load(ptr + key, mask=key >= 0, other=0.0)
    is_number = tl.abs(first) < LARGEST_BIAS
    parts = (tl.where(is_number, first, 0.0),)
    if PARTS == 2:
        rest = tl.load(ptr + keys + key, mask=key >= 0, other=0.0)
        parts = parts + (tl.where(is_number, rest, 0.0),)
    return parts


@triton.jit
def head_bias(ptr, batch, head, heads, own_key, keys, PARTS: tl.constexpr):
    """What `load_bias` takes, of one head's bias and queries whose own keys are these."""
    ptr = at_lse(ptr, batch, head, heads, keys, PARTS)
    return ptr, keys, load_own_bias(ptr, own_key, keys, PARTS)


@triton.jit
def load_bias(bias, start, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """The parts of the bias of keys start, ..., which lie along the other axis than AXIS.

    bias is (address of key 0, or one for each row; number of keys; parts of the queries' own), or
    () for none.
    """
    parts = ()
    if len(bias):
        ptr, keys, own = bias
        key = tl.expand_dims(start + tl.arange(0, BLOCK), AXIS)
        for part in tl.static_range(len(own)):
            parts = parts + (tl.load(ptr + part * keys + key, mask=key < keys, other=0.0),)
    return parts


@triton.jit
def add_bias(scores, key_bias, own, scale_log2):
    """Base-2 scores with the keys' bias, less that of the queries' own keys."""
    difference = key_bias[0] - own[0]
    for part in tl.static_range(1, len(own)):
        difference += key_bias[part] - own[part]
    return scores * scale_log2 + difference * LOG2_E


# The base-2 lse of fp32 queries has two parts, the second what rounding takes off the first; or
# fp32 gradients would lose |lse| ulps. It is [B, H, parts, T].


@triton.jit
def at_lse(ptr, batch, head, heads, tokens, LSE_PARTS: tl.constexpr):
    """Address of token 0 of one head's lse."""
    return at_row_vector(ptr, batch, head * LSE_PARTS, heads * LSE_PARTS, tokens)


@triton.jit
def store_lse(
    ptr, row_max_log2, row_sum, start, rows, BLOCK: tl.constexpr, LSE_PARTS: tl.constexpr
):
    """Write the lse of a tile of queries, of `rows` in all."""
    rest_log2 = tl.log2(row_sum)
    lse_log2 = row_max_log2 + rest_log2
    store_vector(ptr, lse_log2, start, rows, BLOCK)
    if LSE_PARTS == 2:
        store_vector(ptr + rows, rest_log2 - (lse_log2 - row_max_log2), start, rows, BLOCK)


@triton.jit
def load_lse(
    ptr, start, rows,
    BLOCK: tl.constexpr, LSE_PARTS: tl.constexpr, BIAS_PARTS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The parts of the lse, with a new axis for the keys; 0 where a bias hides all of them."""
    first_log2 = load_vector(ptr, start, rows, BLOCK)
    parts = ()
    for part in tl.static_range(LSE_PARTS):
        lse_log2 = load_vector(ptr + part * rows, start, rows, BLOCK) if part else first_log2
        if BIAS_PARTS:  # scores are -inf, too
            lse_log2 = tl.where(first_log2 == float("-inf"), 0.0, lse_log2)
        parts = parts + (tl.expand_dims(lse_log2, AXIS),)
    return parts


@triton.jit
def softmax_weights(scores, lse_log2, scale_log2):
    """P = exp2(scale_log2 scores - lse_log2), queries along either axis."""
    weights_log2 = scores * scale_log2 - lse_log2[0]
    for part in tl.static_range(1, len(lse_log2)):
        weights_log2 -= lse_log2[part]
    return tl.exp2(weights_log2)


@triton.jit
def score_gradient(weights, dweights, delta):
    """dS / scale = P (dP - delta), where delta = <do, o> - dlse."""
    return rounded(weights * (dweights - delta))

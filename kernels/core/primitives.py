"""Jit helpers that every kernel shares; each formula of the attention core stands here once."""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator=None, PRECISION: tl.constexpr = "ieee"):
    """a @ b + accumulator in fp32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in a type of the inputs, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut the low bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def locate_program(batches, heads):
    """(tile, batch, head) of this program; heads run fastest, so a group shares its keys in L2."""
    program = tl.program_id(0)
    return program // (heads * batches), program // heads % batches, program % heads


@triton.jit
def at_head(ptr, strides, batch, head):
    """Address of token 0 of one head in a [B, T, H, D] tensor."""
    return ptr + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[2]


@triton.jit
def at_row_vector(ptr, batch, head, heads, tokens):
    """Address of token 0 of one head in a contiguous [B, H, T] tensor."""
    return ptr + (tl.cast(batch, tl.int64) * heads + head) * tokens


@triton.jit
def tile_pointers(ptr, start, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses of rows start, start + 1, ... of a matrix.  # [BLOCK, BLOCK_D]"""
    ptr += tl.cast(start, tl.int64) * stride
    return ptr + tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_mask(start, rows, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile lie inside its matrix of `rows` rows and D columns."""
    return (start + tl.arange(0, BLOCK) < rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def load_tile(
    ptr, start, rows, stride,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start, start + 1, ... of a matrix, zero where it ends; unmasked tiles lie inside it."""
    pointers = tile_pointers(ptr, start, stride, BLOCK, BLOCK_D)
    if MASKED:
        return tl.load(pointers, mask=tile_mask(start, rows, BLOCK, D, BLOCK_D), other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    ptr, tile, start, rows, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write a tile's part that lies inside its matrix, in the matrix's type."""
    pointers = tile_pointers(ptr, start, stride, BLOCK, BLOCK_D)
    mask = tile_mask(start, rows, BLOCK, D, BLOCK_D)
    tl.store(pointers, cast(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_vector(ptr, vector, start, rows, BLOCK: tl.constexpr):
    """Write a vector's part that lies before its end."""
    position = start + tl.arange(0, BLOCK)
    tl.store(ptr + position, vector, mask=position < rows)


@triton.jit
def load_vector(ptr, start, rows, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Elements start, start + 1, ... of a vector, zero where it ends.  # [BLOCK]"""
    position = start + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(ptr + position, mask=position < rows, other=0.0)
    return tl.load(ptr + position)


@triton.jit
def partner_range(position, reach, IS_VARLEN: tl.constexpr):
    """The interval [first, end) of tokens that those at `position` meet.

    A query meets the keys it sees, a key the queries that see it: those from `behind` before to
    `ahead` after its own place among them, `position + shift`, inside its packed sequence. Neither
    end ever falls as the position grows.

    Args:
        position: of the tokens, a scalar or a vector.
        reach: (partners, shift, behind, ahead, bounds_ptr): the number of tokens on the other side;
            the distances; int32 [2, T], where each token's sequence begins and ends.
    """
    partners, shift, behind, ahead, bounds_ptr = reach
    if IS_VARLEN:
        first, end = tl.load(bounds_ptr + position), tl.load(bounds_ptr + partners + position)
    else:
        first, end = 0, partners
    place = position + shift
    return tl.maximum(place - behind, first), tl.minimum(place + ahead + 1, end)


@triton.jit
def plan_tiles(
    start, tokens, reach,
    BLOCK: tl.constexpr, PARTNER_BLOCK: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Bounds of the partner tiles of the tokens start, ..., start + BLOCK - 1.

    Returns:
        begin, inner, edge, end: the left edge [begin, inner) and the right one [edge, end), the
        diagonal, need the mask; every token meets all partners of the interior [inner, edge).
    """
    last = tl.minimum(start + BLOCK, tokens) - 1
    begin, inner_end = partner_range(start, reach, IS_VARLEN)
    inner_begin, end = partner_range(last, reach, IS_VARLEN)
    inner = begin + tl.cdiv(inner_begin - begin, PARTNER_BLOCK) * PARTNER_BLOCK
    edge = inner + tl.maximum(inner_end - inner, 0) // PARTNER_BLOCK * PARTNER_BLOCK
    return begin, inner, edge, end


@triton.jit
def tile_partners(start, tokens, reach, BLOCK: tl.constexpr, IS_VARLEN: tl.constexpr):
    """`partner_range` of each token of a tile; those past the last repeat it.  # 2 x [BLOCK]"""
    position = tl.minimum(start + tl.arange(0, BLOCK), tokens - 1)
    return partner_range(position, reach, IS_VARLEN)


@triton.jit
def meets(first, end, start, PARTNER_BLOCK: tl.constexpr):
    """Who of [start, start + PARTNER_BLOCK) each token meets.  # [BLOCK, PARTNER_BLOCK]"""
    partner = start + tl.arange(0, PARTNER_BLOCK)
    return (partner[None, :] >= first[:, None]) & (partner[None, :] < end[:, None])


@triton.jit
def softmax_step(scores, row_max_log2, row_sum, scale_log2, seen, MASKED: tl.constexpr):
    """Fold one tile of scores into the running softmax of its rows.

    Returns:
        weights: exp2(scale_log2 scores - new row maximum).  # [BLOCK_M, BLOCK_N]
        rescale: factor on everything summed so far.  # [BLOCK_M]
        row_max_log2, row_sum: the new ones.  # [BLOCK_M]
    """
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_max_log2 = tl.maximum(row_max_log2, tl.max(scores, 1) * scale_log2)
    pivot_log2 = new_max_log2
    if MASKED:  # a row that has seen nothing yet must not form -inf - -inf
        pivot_log2 = tl.where(new_max_log2 == float("-inf"), 0.0, new_max_log2)
    weights = tl.exp2(scores * scale_log2 - pivot_log2[:, None])
    rescale = tl.exp2(row_max_log2 - pivot_log2)
    return weights, rescale, new_max_log2, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def softmax_weights(scores, lse_log2, scale_log2, seen, MASKED: tl.constexpr):
    """P = exp2(scale_log2 scores - lse_log2), queries along either axis, 0 where unseen."""
    weights = tl.exp2(scores * scale_log2 - lse_log2)
    return tl.where(seen, weights, 0.0) if MASKED else weights


@triton.jit
def score_gradient(weights, dweights, delta):
    """dS / scale = P (dP - delta), where delta = <do, o> - dlse."""
    return weights * (dweights - delta)

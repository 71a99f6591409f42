"""Sums over the window of each token, of rows of any width in two halves.

A windowed sum runs over the interval of tokens that `primitives.partner_range` gives, as attention
does: tiles at its edges are masked, and of those in its interior only the totals are read. Nothing
is ever subtracted, so no token outside a window changes a bit of its sum.
"""

import triton
import triton.language as tl

from kernels.core.primitives import (
    dot,
    load_rows,
    meets,
    plan_tiles,
    store_joint_rows,
    zero_rows,
)

TOTALS_AT_ONCE = tl.constexpr(16)
BITS = tl.constexpr(3)  # bf16 numbers of 8 bits that make up an fp32 number of 24

# Rows are two halves, which a rotation mixes and windowed sums take in turn, to save registers.


@triton.jit
def halves(matrix, D_FIRST: tl.constexpr):
    """A matrix as two, its first D_FIRST columns and the others."""
    ptr, stride, rows = matrix
    return matrix, (ptr + D_FIRST, stride, rows)


@triton.jit
def load_half(matrix, start, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows start, start + 1, ... in fp32, zero where the matrix ends."""
    rows = load_rows(matrix, start, BLOCK, D)
    result = ()
    for part in tl.static_range(len(rows)):
        result = result + (rows[part].to(tl.float32),)
    return result


@triton.jit
def load_halves(
    matrix, start, BLOCK: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr
):  # fmt: skip
    """Such rows, the tiles of the first half before those of the second."""
    first, second = halves(matrix, D_FIRST)
    rows = load_half(first, start, BLOCK, D_FIRST)
    if D_SECOND:
        rows = rows + load_half(second, start, BLOCK, D_SECOND)
    return rows


@triton.jit
def store_halves(
    matrix, rows, start, BLOCK: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr
):
    """Write such rows."""
    first, second = halves(matrix, D_FIRST)
    store_joint_rows(first, second, rows, start, BLOCK, D_FIRST, D_SECOND)


@triton.jit
def total_matrix(ptr, batch, head, heads, blocks, D: tl.constexpr):
    """One head of the contiguous [B, H, blocks, D] totals."""
    return ptr + (tl.cast(batch, tl.int64) * heads + head) * blocks * D, D, blocks


@triton.jit
def express(logits):
    """p = sigmoid(g)."""
    genes = ()
    for part in tl.static_range(len(logits)):
        genes = genes + (tl.sigmoid(logits[part]),)
    return genes


@triton.jit
def add_rows(a, b):
    """a + b, tile by tile."""
    result = ()
    for part in tl.static_range(len(a)):
        result = result + (a[part] + b[part],)
    return result


@triton.jit
def sum_tile(rows):
    """The sum of a tile's rows.  # [1, WIDTH] each"""
    total = ()
    for part in tl.static_range(len(rows)):
        total = total + (tl.sum(rows[part], 0)[None, :],)
    return total


@triton.jit
def add_seen(sums, seen, rows):
    """sums + seen rows: products with 0 and 1 of parts that lose no bit of the rows."""
    seen = seen.to(tl.float32).to(tl.bfloat16)  # the interpreter knows no shorter way
    result = ()
    for part in tl.static_range(len(rows) - 1, -1, -1):  # as in `accumulate`
        total, rest = sums[part], rows[part]
        for _ in tl.static_range(BITS):
            piece = rest.to(tl.bfloat16)
            total = dot(seen, piece, total, "ieee")
            rest -= piece.to(tl.float32)
        result = (total,) + result
    return result


@triton.jit
def phases(bounds, BLOCK: tl.constexpr):
    """Bounds (begin, inner, edge, end) of the tiles, at multiples of their size, of a plan.

    Those of the left edge [begin, inner) and of the right one [edge, end) need a mask, those of
    the interior [inner, edge) meet all tokens whose plan it is.
    """
    begin, inner_begin, inner_end, end = bounds
    begin = begin // BLOCK * BLOCK
    inner = tl.cdiv(tl.minimum(tl.maximum(inner_begin, begin), tl.maximum(end, begin)), BLOCK)
    edge = inner + tl.maximum(tl.minimum(inner_end, end) // BLOCK - inner, 0)
    return begin, inner * BLOCK, edge * BLOCK, end


@triton.jit
def sum_windows_of_half(
    matrix, totals, bounds, first, end,
    BLOCK: tl.constexpr, D: tl.constexpr, ARE_GENES: tl.constexpr,
):  # fmt: skip
    """`sum_windows` of D columns, between the bounds of `phases`."""
    sums = zero_rows(BLOCK, D)
    for side in tl.static_range(2):
        for other in range(bounds[2 * side], bounds[2 * side + 1], BLOCK):
            rows = load_half(matrix, other, BLOCK, D)
            if ARE_GENES:
                rows = express(rows)
            sums = add_seen(sums, meets(first, end, other, BLOCK), rows)
    interior = totals[0], totals[1], bounds[2] // BLOCK
    for block in range(bounds[1] // BLOCK, bounds[2] // BLOCK, TOTALS_AT_ONCE):
        rows = load_half(interior, block, TOTALS_AT_ONCE, D)
        sums = add_rows(sums, sum_tile(rows))
    return sums


@triton.jit
def sum_windows(
    matrix, totals, start, reach, first, end,
    BLOCK: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    IS_VARLEN: tl.constexpr, ARE_GENES: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens [first, end) that each token of a tile meets.

    Args:
        matrix: what is summed, of logits their genes.
        totals: their sums over every BLOCK tokens.
        start, reach, first, end: the tile, `partner_range`'s argument, and its result.
    """
    bounds = phases(plan_tiles(start, matrix[2], reach, BLOCK, IS_VARLEN), BLOCK)
    first_half, second_half = halves(matrix, D_FIRST)
    first_totals, second_totals = halves(totals, D_FIRST)
    sums = sum_windows_of_half(
        first_half, first_totals, bounds, first, end, BLOCK, D_FIRST, ARE_GENES
    )
    if D_SECOND:
        sums = sums + sum_windows_of_half(
            second_half, second_totals, bounds, first, end, BLOCK, D_SECOND, ARE_GENES
        )
    return sums

"""Sums over the window of each token, of rows of any width in two halves.

A tile of tokens is [ROWS, SEGMENTS, WIDTH]: a segment is ROWS successive tokens, of which a thread
holds whole columns, so that only the totals of segments ever travel between threads.

The windows of a run of tokens, of one sequence and no more of them than a window holds, have three
parts, drawn for four tokens that look nine back:

    token 0  x x x | x x x x x x | x
    token 1    x x | x x x x x x | x x
    token 2      x | x x x x x x | x x x
    token 3        | x x x x x x | x x x x
              far      between     near

Near are sums that run forward over the run itself, far those that run backward over the tokens that
lie nine before it. All see what is between, totals of whole tiles and rows that fill none; windows
of whole tiles leave no such rows.

One that looks ahead, as gradients do, is the mirror image. Nothing is ever subtracted, so no token
outside a window changes a bit of its sum.
"""

import triton
import triton.language as tl

from kernels.core.primitives import (
    INTERPRETED,
    LOG2_E,
    cast,
    main_width,
    padded_width,
    reciprocal,
    rounded,
    sequence_of,
    zero_joint_rows,
)

COLUMNS_OF_LANE = tl.constexpr(2)  # adjacent ones, so that 32 columns leave a warp a second row


def segments(width: int, warps: int) -> int:
    """Segments of a tile of so many warps: as many as these hold rows of half the width."""
    columns = min(main_width(width - width // 2), 32 * COLUMNS_OF_LANE.value)
    return warps * 32 * COLUMNS_OF_LANE.value // columns


# Rows are two halves, which a rotation mixes, each in one or two tiles side by side.


@triton.jit
def tile_tokens(start, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr):
    """The tokens of a tile, segment after segment.  # [ROWS, SEGMENTS]"""
    ROWS: tl.constexpr = BLOCK // SEGMENTS
    return start + tl.arange(0, ROWS)[:, None] + tl.arange(0, SEGMENTS)[None, :] * ROWS


@triton.jit
def lie_between(start, begin, end, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr):
    """Which tokens of a tile lie in [begin, end).  # [ROWS, SEGMENTS, 1]"""
    ROWS: tl.constexpr = BLOCK // SEGMENTS
    row, segment = tl.arange(0, ROWS)[:, None], start + tl.arange(0, SEGMENTS)[None, :] * ROWS
    return ((row >= begin - segment) & (row < end - segment))[:, :, None]


@triton.jit
def tile_place(
    matrix, column, start, kept,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Addresses of a tile, and which of its elements are in rows that are kept and in a column.

    Columns that are said to have few neighbours get a thread of their own, whose rows then are at
    constant distances.
    """
    ROWS: tl.constexpr = BLOCK // SEGMENTS
    ptr, stride, _ = matrix
    lane = tl.max_contiguous(tl.arange(0, WIDTH), COLUMNS_OF_LANE)[None, None, :]
    segment = tl.arange(0, SEGMENTS)[None, :, None] * ROWS
    ptr += tl.cast(start, tl.int64) * stride + column
    place = (ptr + (segment * stride + lane)) + tl.arange(0, ROWS)[:, None, None] * stride
    return place, kept & (tl.arange(0, WIDTH) < COLUMNS)[None, None, :]


@triton.jit
def load_columns(
    matrix, column, start, kept, filler,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """D columns of a tile in fp32, with the filler in rows that are not kept."""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    place, mask = tile_place(matrix, column, start, kept, BLOCK, SEGMENTS, D, MAIN)
    rows = (tl.load(place, mask=mask, other=filler).to(tl.float32),)
    if REST:
        column += MAIN
        place, mask = tile_place(matrix, column, start, kept, BLOCK, SEGMENTS, D - MAIN, REST)
        rows = rows + (tl.load(place, mask=mask, other=filler).to(tl.float32),)
    return rows


@triton.jit
def store_columns(
    matrix, rows, column, start, kept,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write such rows in the matrix's type."""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    dtype: tl.constexpr = matrix[0].dtype.element_ty
    place, mask = tile_place(matrix, column, start, kept, BLOCK, SEGMENTS, D, MAIN)
    tl.store(place, cast(rows[0], dtype), mask=mask)
    if REST:
        column += MAIN
        place, mask = tile_place(matrix, column, start, kept, BLOCK, SEGMENTS, D - MAIN, REST)
        tl.store(place, cast(rows[1], dtype), mask=mask)


@triton.jit
def load_kept(
    matrix, start, kept, filler,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
):  # fmt: skip
    """A tile of both halves, those of the first before those of the second."""
    rows = load_columns(matrix, 0, start, kept, filler, BLOCK, SEGMENTS, D_FIRST)
    if D_SECOND:
        rows = rows + load_columns(matrix, D_FIRST, start, kept, filler, BLOCK, SEGMENTS, D_SECOND)
    return rows


@triton.jit
def load_halves(
    matrix, start,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
):  # fmt: skip
    """All of such a tile that lies inside the matrix."""
    kept = lie_between(start, 0, matrix[2], BLOCK, SEGMENTS)
    return load_kept(matrix, start, kept, 0.0, BLOCK, SEGMENTS, D_FIRST, D_SECOND)


@triton.jit
def store_halves(
    matrix, rows, start,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
):  # fmt: skip
    """Write it."""
    PARTS: tl.constexpr = 2 if padded_width(D_FIRST) > main_width(D_FIRST) else 1
    kept = lie_between(start, 0, matrix[2], BLOCK, SEGMENTS)
    store_columns(matrix, rows, 0, start, kept, BLOCK, SEGMENTS, D_FIRST)
    if D_SECOND:
        store_columns(matrix, rows[PARTS:], D_FIRST, start, kept, BLOCK, SEGMENTS, D_SECOND)


@triton.jit
def total_matrix(ptr, batch, head, heads, blocks, D: tl.constexpr):
    """One head of the contiguous [B, H, blocks, D] totals."""
    return ptr + (tl.cast(batch, tl.int64) * heads + head) * blocks * D, D, blocks


@triton.jit
def store_totals(totals, rows, block, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr):
    """Write the sum of a tile's rows as one row."""
    total = ()
    for part in tl.static_range(len(rows)):
        total = total + (tl.sum(tl.sum(rows[part], 0), 0)[None, None, :],)
    store_halves(totals, total, block, 1, 1, D_FIRST, D_SECOND)


@triton.jit
def express(logits):
    """p = sigmoid(g)."""
    genes = ()
    for part in tl.static_range(len(logits)):
        genes = genes + (reciprocal(1.0 + tl.exp2(logits[part] * -LOG2_E)),)
    return genes


@triton.jit
def keep_rows(rows, kept):
    """The rows that are kept, zeros for others."""
    result = ()
    for part in tl.static_range(len(rows)):
        result = result + (tl.where(kept, rows[part], 0.0),)
    return result


@triton.jit
def sum_rows(rows):
    """The sum of each segment.  # [SEGMENTS, WIDTH] each"""
    sums = ()
    for part in tl.static_range(len(rows)):
        sums = sums + (tl.sum(rows[part], 0),)
    return sums


@triton.jit
def sum_all(rows):
    """The sum of all elements of all tiles, which may be products."""
    elements, total = rows[0], 0.0
    for part in tl.static_range(1, len(rows)):
        if rows[part].shape[2] == elements.shape[2]:  # one sum over lanes for both
            elements += rows[part]
        else:
            total += tl.sum(rounded(rows[part]))
    return total + tl.sum(rounded(elements))


@triton.jit
def add_rows(a, b):
    """a + b, tile by tile."""
    result = ()
    for part in tl.static_range(len(a)):
        result = result + (a[part] + b[part],)
    return result


@triton.jit
def load_summed(
    matrix, start, begin, end,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    ARE_GENES: tl.constexpr,
):  # fmt: skip
    """A tile of what is summed, of logits their genes, zero outside rows [begin, end)."""
    kept = lie_between(start, begin, end, BLOCK, SEGMENTS)
    filler = float("-inf") if ARE_GENES else 0.0  # whose gene is 0
    rows = load_kept(matrix, start, kept, filler, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
    return express(rows) if ARE_GENES else rows


@triton.jit
def sum_between(
    matrix, totals, begin, end,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    ARE_GENES: tl.constexpr,
):  # fmt: skip
    """The sum of rows [begin, end), of whole tiles their totals.  # [SEGMENTS, WIDTH] each"""
    sums = zero_joint_rows(SEGMENTS, D_FIRST, D_SECOND)
    first_block, end_block = tl.cdiv(begin, BLOCK), end // BLOCK
    for block in range(first_block, end_block, BLOCK):
        rows = load_summed(
            totals, block, block, end_block, BLOCK, SEGMENTS, D_FIRST, D_SECOND, False
        )
        sums = add_rows(sums, sum_rows(rows))
    head_end = tl.minimum(first_block * BLOCK, end)
    tail = tl.maximum(end_block * BLOCK, head_end)
    for side in tl.static_range(2):
        rest_begin, rest_end = (tail, end) if side else (begin, head_end)
        if rest_begin < rest_end:  # at most a tile of them
            rows = load_summed(
                matrix, rest_begin, rest_begin, rest_end,
                BLOCK, SEGMENTS, D_FIRST, D_SECOND, ARE_GENES,
            )  # fmt: skip
            sums = add_rows(sums, sum_rows(rows))
    return sums


@triton.jit
def running_sum(rows, FORWARD: tl.constexpr):
    """For each row the sum of its segment up to it, or from it on; itself included."""
    if FORWARD or INTERPRETED:
        return tl.cumsum(rows, 0, reverse=not FORWARD)
    return tl.flip(tl.cumsum(tl.flip(rows, 0), 0), 0)  # compiled, a scan in reverse is shuffles


@triton.jit
def end_row(rows, FIRST: tl.constexpr):
    """Each segment's first row or last.  # [SEGMENTS, WIDTH]"""
    ROWS: tl.constexpr = rows.shape[0]
    END: tl.constexpr = 0 if FIRST else ROWS - 1
    row = tl.arange(0, ROWS)[:, None, None]
    return tl.sum(tl.where(row == END, rows, -0.0), 0)  # + -0 is nothing, also to the compiler


@triton.jit
def sum_others(before, after, between, SEGMENTS: tl.constexpr):
    """For each segment the sum of `before` of those before it, `after` of those behind, and all of
    `between`.  # [SEGMENTS, WIDTH]
    """
    segment = tl.arange(0, SEGMENTS)
    there, here = segment[:, None, None], segment[None, :, None]
    before, after = (before + between)[:, None, :], (after + between)[:, None, :]
    others = tl.where(there < here, before, tl.where(there > here, after, 0.0))
    return tl.sum(others, 0) + between


@triton.jit
def sum_run(
    sums, matrix, own, totals, start, begin, run_end, first, end, behind,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    ARE_GENES: tl.constexpr, LOOKS_BACK: tl.constexpr,
):  # fmt: skip
    """`sums`, if there are any, with those of a run [begin, run_end) of a sequence [first, end)."""
    if LOOKS_BACK:
        shift = -behind
        split = tl.maximum(run_end - 1 - behind, first)
        far_begin, far_end = tl.maximum(begin - behind, first), split
        between_begin, between_end = split, begin
    else:
        shift = behind
        split = tl.minimum(begin + behind + 1, end)
        far_begin, far_end = split, tl.minimum(run_end + behind, end)
        between_begin, between_end = run_end, split
    in_run = lie_between(start, begin, run_end, BLOCK, SEGMENTS)
    near = own
    if sums is not None:
        near = keep_rows(own, in_run)
    far = load_summed(
        matrix, start + shift, far_begin, far_end, BLOCK, SEGMENTS, D_FIRST, D_SECOND, ARE_GENES
    )
    between = sum_between(
        matrix, totals, between_begin, between_end,
        BLOCK, SEGMENTS, D_FIRST, D_SECOND, ARE_GENES,
    )  # fmt: skip
    result = ()
    for part in tl.static_range(len(own)):
        near_sums = running_sum(near[part], LOOKS_BACK)
        far_sums = running_sum(far[part], not LOOKS_BACK)
        if LOOKS_BACK:
            before, after = end_row(near_sums, False), end_row(far_sums, True)
        else:
            before, after = end_row(far_sums, False), end_row(near_sums, True)
        window = near_sums + far_sums
        window += sum_others(before, after, between[part], SEGMENTS)[None]
        if sums is not None:
            window = tl.where(in_run, window, sums[part])
        result = result + (window,)
    return result


@triton.jit
def sum_windows(
    matrix, own, totals, start, behind, bounds_ptr,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    IS_VARLEN: tl.constexpr, ARE_RUNS: tl.constexpr,
    ARE_GENES: tl.constexpr, LOOKS_BACK: tl.constexpr,
):  # fmt: skip
    """Sums over the window of each token of a tile, itself and `behind` others on one side.

    Args:
        matrix: what is summed, of logits their genes.
        own: its rows of this tile, in fp32, of logits their genes.
        totals: their sums over every BLOCK tokens.
        start: the tile.
        bounds_ptr: int32 [2, T], where each token's packed sequence begins and ends.
        ARE_RUNS: whether every tile is one run.
    """
    tokens = matrix[2]
    stop = tl.minimum(start + BLOCK, tokens)
    if ARE_RUNS:
        sums = sum_run(
            None, matrix, own, totals, start, start, stop, 0, tokens, behind,
            BLOCK, SEGMENTS, D_FIRST, D_SECOND, ARE_GENES, LOOKS_BACK,
        )  # fmt: skip
    else:
        sums, begin = own, start
        while begin < stop:
            first, end = sequence_of(begin, tokens, bounds_ptr, IS_VARLEN)
            run_end = tl.minimum(tl.minimum(begin + behind + 1, end), stop)
            sums = sum_run(
                sums, matrix, own, totals, start, begin, run_end, first, end, behind,
                BLOCK, SEGMENTS, D_FIRST, D_SECOND, ARE_GENES, LOOKS_BACK,
            )  # fmt: skip
            begin = run_end
    return sums

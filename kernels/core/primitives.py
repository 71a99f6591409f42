"""Jit helpers that every kernel shares: tiles of rows, who meets whom, products."""

import torch
import triton
import triton.language as tl

from kernels.core import problem

LOG2_E = tl.constexpr(problem.LOG2_E)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
padded_width = triton.constexpr_function(problem.padded_width)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a @ b + accumulator in fp32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in a type of the inputs, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:  # it would cut bits off
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        x = tl.where(x == x, nearest, bits >> 16 | 0x40).to(tl.uint16).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def reciprocal(x):
    """1 / x to an ulp, in one instruction; 0 where it would be subnormal."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def locate_program(batches, heads):
    """(tile, batch, head) of this program; heads run fastest, so a group shares its keys in L2."""
    program = tl.program_id(0)
    rest = program // heads
    tile = rest // batches
    return tile, rest - tile * batches, program - rest * heads


@triton.jit
def head_matrix(ptr, strides, batch, head, tokens):
    """One head of a [B, T, H, D] tensor: (address, stride of its rows, number of rows).

    Of a tensor that is not there, (), since Triton 3.6 lets no None that is returned into a tuple.
    """
    matrix = ()
    if ptr is not None:
        ptr += tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[2]
        matrix = ptr, strides[1], tokens
    return matrix


@triton.jit
def move(matrix, elements):
    """The matrix so many elements behind this one."""
    return matrix[0] + elements, matrix[1], matrix[2]


@triton.jit
def at_row_vector(ptr, batch, head, heads, tokens):
    """Address of token 0 of one head in a contiguous [B, H, T] tensor."""
    return ptr + (tl.cast(batch, tl.int64) * heads + head) * tokens


@triton.constexpr_function
def main_width(d):
    """Width of the first tile of such rows, most of them; a second one holds the rest."""
    return 1 << padded_width(d).bit_length() - 1


@triton.jit
def tile_pointers(matrix, column, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of rows start, start + 1, ... and columns column, ...  # [BLOCK, WIDTH]"""
    ptr, stride, _ = matrix
    ptr += tl.cast(start, tl.int64) * stride + column
    return ptr + tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def tile_mask(matrix, start, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of a tile lie inside its matrix, COLUMNS of the tile's own."""
    rows = matrix[2]
    return (start + tl.arange(0, BLOCK) < rows)[:, None] & (tl.arange(0, WIDTH) < COLUMNS)[None, :]


@triton.jit
def load_tile(
    matrix, column, start, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """A tile of a matrix, zero where it ends."""
    pointers = tile_pointers(matrix, column, start, BLOCK, WIDTH)
    return tl.load(pointers, mask=tile_mask(matrix, start, BLOCK, COLUMNS, WIDTH), other=0.0)


@triton.jit
def store_tile(
    matrix, tile, column, start,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write a tile's part that lies inside its matrix, in the matrix's type."""
    pointers = tile_pointers(matrix, column, start, BLOCK, WIDTH)
    mask = tile_mask(matrix, start, BLOCK, COLUMNS, WIDTH)
    tl.store(pointers, cast(tile, matrix[0].dtype.element_ty), mask=mask)


# Rows of any width are a tuple of such tiles side by side; so are rows of two matrices together.


@triton.jit
def load_rows(matrix, start, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows start, start + 1, ... of a matrix of D columns, zero where it ends."""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    tiles = (load_tile(matrix, 0, start, BLOCK, D, MAIN),)
    if REST:
        tiles = tiles + (load_tile(matrix, MAIN, start, BLOCK, D - MAIN, REST),)
    return tiles


@triton.jit
def load_joint_rows(
    matrix, rope, start, BLOCK: tl.constexpr, D: tl.constexpr, D_ROPE: tl.constexpr
):
    """Rows of a matrix and, beside them, those of its rotary part, if it has one."""
    tiles = load_rows(matrix, start, BLOCK, D)
    if D_ROPE:
        tiles = tiles + load_rows(rope, start, BLOCK, D_ROPE)
    return tiles


@triton.jit
def zero_rows(BLOCK: tl.constexpr, D: tl.constexpr):
    """An accumulator of BLOCK rows of D columns."""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    tiles = (tl.zeros([BLOCK, MAIN], tl.float32),)
    if REST:
        tiles = tiles + (tl.zeros([BLOCK, REST], tl.float32),)
    return tiles


@triton.jit
def zero_joint_rows(BLOCK: tl.constexpr, D: tl.constexpr, D_ROPE: tl.constexpr):
    """An accumulator of as many tiles as `load_joint_rows` loads."""
    tiles = zero_rows(BLOCK, D)
    if D_ROPE:
        tiles = tiles + zero_rows(BLOCK, D_ROPE)
    return tiles


@triton.jit
def store_rows(matrix, tiles, start, BLOCK: tl.constexpr, D: tl.constexpr):
    """Write the first tiles of a tuple, as many as D columns take, inside their matrix."""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    store_tile(matrix, tiles[0], 0, start, BLOCK, D, MAIN)
    if REST:
        store_tile(matrix, tiles[1], MAIN, start, BLOCK, D - MAIN, REST)


@triton.jit
def store_joint_rows(
    matrix, rope, tiles, start, BLOCK: tl.constexpr, D: tl.constexpr, D_ROPE: tl.constexpr
):
    """Write rows to a matrix and, of the tiles behind its own, to its rotary part."""
    store_rows(matrix, tiles, start, BLOCK, D)
    if D_ROPE:
        if padded_width(D) == main_width(D):
            store_rows(rope, tiles[1:], start, BLOCK, D_ROPE)
        else:
            store_rows(rope, tiles[2:], start, BLOCK, D_ROPE)


@triton.jit
def scale_rows(tiles, factor):
    """Every tile times a number, or a column of numbers."""
    scaled = ()
    for part in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[part] * factor,)
    return scaled


@triton.jit
def rounding_rests(tiles, dtype: tl.constexpr):
    """What rounding to a type takes off every tile."""
    rests = ()
    for part in tl.static_range(len(tiles)):
        rests = rests + (tiles[part] - cast(tiles[part], dtype).to(tl.float32),)
    return rests


@triton.jit
def inner_products(a, b, PRECISION: tl.constexpr):
    """a b^T of rows in tiles, in fp32."""
    total = None
    for part in tl.static_range(len(a)):
        total = dot(a[part], tl.trans(b[part]), total, PRECISION)
    return total


@triton.jit
def accumulate(weights, rows, accumulator, PRECISION: tl.constexpr):
    """accumulator + weights rows, for as many tiles as the accumulator has."""
    weights = cast(weights, rows[0].dtype)
    total = ()
    for part in tl.static_range(len(accumulator) - 1, -1, -1):  # Triton lays out all as the last
        total = (dot(weights, rows[part], accumulator[part], PRECISION),) + total
    return total


@triton.jit
def store_vector(ptr, vector, start, rows, BLOCK: tl.constexpr):
    """Write a vector's part that lies before its end."""
    position = start + tl.arange(0, BLOCK)
    tl.store(ptr + position, vector, mask=position < rows)


@triton.jit
def load_vector(ptr, start, rows, BLOCK: tl.constexpr):
    """Elements start, start + 1, ... of a vector, zero where it ends.  # [BLOCK]"""
    position = start + tl.arange(0, BLOCK)
    return tl.load(ptr + position, mask=position < rows, other=0.0)


@triton.jit
def sequence_of(position, tokens, bounds_ptr, IS_VARLEN: tl.constexpr):
    """Where the packed sequence of the tokens at `position` begins and ends."""
    if IS_VARLEN:
        first, end = tl.load(bounds_ptr + position), tl.load(bounds_ptr + tokens + position)
    else:
        first, end = 0, tokens
    return first, end


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
    first, end = sequence_of(position, partners, bounds_ptr, IS_VARLEN)
    place = position + shift
    return tl.maximum(place - behind, first), tl.minimum(place + ahead + 1, end)


@triton.jit
def plan_tiles(start, tokens, reach, BLOCK: tl.constexpr, IS_VARLEN: tl.constexpr):
    """Bounds (begin, inner_begin, inner_end, end) of the partners of start, ..., start + BLOCK - 1.

    Those of [begin, end) meet some of these tokens, those of [inner_begin, inner_end) all of them.
    """
    last = tl.minimum(start + BLOCK, tokens) - 1
    begin, inner_end = partner_range(start, reach, IS_VARLEN)
    inner_begin, end = partner_range(last, reach, IS_VARLEN)
    return begin, inner_begin, inner_end, end


@triton.jit
def tile_partners(start, tokens, reach, BLOCK: tl.constexpr, IS_VARLEN: tl.constexpr):
    """`partner_range` of each token of a tile; those past the last repeat it.  # 2 x [BLOCK]"""
    position = tl.minimum(start + tl.arange(0, BLOCK), tokens - 1)
    return partner_range(position, reach, IS_VARLEN)


@triton.jit
def meets(first, end, start, PARTNER_BLOCK: tl.constexpr, ONCE: tl.constexpr):
    """Who of [start, start + PARTNER_BLOCK) each token meets, ONCE with one comparison a pair.

    Returns [BLOCK, PARTNER_BLOCK].
    """
    partner = start + tl.arange(0, PARTNER_BLOCK)
    if ONCE:  # a place before the first is a huge one
        place = partner[None, :] - first[:, None]
        return place.to(tl.uint32) < tl.maximum(end - first, 0).to(tl.uint32)[:, None]
    return (partner[None, :] >= first[:, None]) & (partner[None, :] < end[:, None])


@triton.jit
def hide_unmet(
    x, filler, bounds, partners, start, PARTNER_BLOCK: tl.constexpr, ONCE: tl.constexpr = False
):
    """x of tokens and partners start, ..., with the filler where a token misses a partner.

    Tiles that all tokens meet skip the masks, so `bounds` has to be the plan for `partners`.
    """
    if (start < bounds[1]) | (start + PARTNER_BLOCK > bounds[2]):
        x = tl.where(meets(partners[0], partners[1], start, PARTNER_BLOCK, ONCE), x, filler)
    return x


@triton.jit
def rounded(product):
    """A product that no addition is fused with: lanes that share a sum would not agree on its bits.

    Each of them would add what others have rounded to a product of its own that is not.
    """
    return product + 0.0

"""The kernel that makes queries of the genes in a ring, and its launcher."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.core.fitness import closed_form, load_rotation, rotate
from kernels.core.launch import launch
from kernels.core.primitives import (
    head_matrix,
    locate_program,
    reciprocal,
    zero_joint_rows,
)
from kernels.core.problem import power_of_2, reach_behind
from kernels.core.windows import (
    add_rows,
    load_halves,
    load_summed,
    segments,
    store_halves,
    sum_rows,
)

WARPS = 4
AVERAGED_ELEMENTS = 4096  # of half a tile


@triton.jit(do_not_specialize=["q_tokens", "capacity", "window"])
def gene_decode_kernel(
    q_ptr, g_ptr, logits_ptr, pressure_ptr, cos_ptr, sin_ptr, lengths_ptr,
    q_strides, g_strides, logits_strides,
    batches, heads, q_tokens, capacity, window, scale,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_ROTARY: tl.constexpr,
):  # fmt: skip
    """q = R(kappa scale gamma) of one of the newest q_tokens of a sequence, for one head.

    The genes of its window are summed up, BLOCK rows of the ring at a time; those of position p are
    row p % capacity, so a window has two stretches of rows at most.
    Grid: (Tq * B * H,).
    """
    token, batch, head = locate_program(batches, heads)
    length = tl.load(lengths_ptr + batch)
    end = length - q_tokens + token + 1
    first = tl.maximum(tl.maximum(end - window, length - capacity), 0)
    ring = head_matrix(g_ptr, g_strides, batch, head, capacity)
    begin = first % capacity
    stop = tl.minimum(begin + end - first, capacity)
    rest = end - first - (stop - begin)  # of the rows, where the ring begins anew
    sums = zero_joint_rows(SEGMENTS, D_FIRST, D_SECOND)
    for turn in tl.static_range(2):
        if turn:
            begin, stop = 0, rest
        for start in range(begin, stop, BLOCK):
            genes = load_summed(ring, start, begin, stop, BLOCK, SEGMENTS, D_FIRST, D_SECOND, True)
            sums = add_rows(sums, sum_rows(genes))

    share = reciprocal(tl.maximum(end - first, 1).to(tl.float32))
    commonness = ()
    for part in tl.static_range(len(sums)):
        commonness = commonness + (tl.sum(sums[part], 0)[None, None, :] * share + 0.5,)
    logits_matrix = head_matrix(logits_ptr, logits_strides, batch, head, q_tokens)
    logits = load_halves(logits_matrix, token, 1, 1, D_FIRST, D_SECOND)
    size = tl.load(pressure_ptr + head).to(tl.float32) * scale
    q = closed_form(commonness, logits, size, D_FIRST, D_SECOND, HAS_ENVIRONMENT)
    if IS_ROTARY:
        table = tl.cast(batch, tl.int64) * q_tokens * D_FIRST
        cos, sin = load_rotation(cos_ptr + table, sin_ptr + table, token, q_tokens, 1, 1, D_FIRST)
        q = rotate(q, cos, sin)
    q_matrix = head_matrix(q_ptr, q_strides, batch, head, q_tokens)
    store_halves(q_matrix, q, token, 1, 1, D_FIRST, D_SECOND)


def launch_gene_decode(
    g: Tensor,
    e: Tensor | None,
    pressure: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    g_cache: Tensor,
    cache_lengths: Tensor,
    window_size: int,
    environment: str,
) -> Tensor:
    """q [B, Tq, H, D] of the selection, in g's type; arguments as `genetic_decode`'s."""
    batches, q_tokens, heads, width = g.shape
    q = g.new_empty(g.shape)
    columns = max(16, power_of_2(width - width // 2))
    launch(
        gene_decode_kernel,
        q_tokens * batches * heads,
        q_ptr=q,
        g_ptr=g_cache,
        logits_ptr=g if e is None else e,  # eps is sigmoid(e), or sigmoid(g), or neither is read
        pressure_ptr=pressure,
        cos_ptr=cos,
        sin_ptr=sin,
        lengths_ptr=cache_lengths,
        batches=batches,
        heads=heads,
        q_tokens=q_tokens,
        capacity=g_cache.shape[1],
        window=reach_behind(window_size) + 1,
        scale=width**0.5,
        D_FIRST=width - width // 2,
        D_SECOND=width // 2,
        BLOCK=AVERAGED_ELEMENTS // columns,
        SEGMENTS=segments(width, WARPS),
        HAS_ENVIRONMENT=environment != "none",
        IS_ROTARY=cos is not None,
        num_warps=WARPS,
    )
    return q

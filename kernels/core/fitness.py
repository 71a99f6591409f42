"""The kernels of gene fitness, forward and backward, and their launchers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.core import tiles
from kernels.core.launch import launch
from kernels.core.primitives import (
    LOG2_E,
    at_row_vector,
    head_matrix,
    locate_program,
    main_width,
    padded_width,
    partner_range,
    reciprocal,
    rounded,
    scale_rows,
)
from kernels.core.problem import Genes, cdiv, reach_behind, sequence_bounds
from kernels.core.windows import (
    add_rows,
    express,
    lie_between,
    load_columns,
    load_halves,
    load_summed,
    segments,
    store_halves,
    store_totals,
    sum_all,
    sum_windows,
    tile_tokens,
    total_matrix,
)


@triton.jit
def inside_half(D: tl.constexpr):
    """Which columns of each tile of D columns are not padding.  # [1, 1, WIDTH] each"""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    inside = ((tl.arange(0, MAIN) < D)[None, None, :],)
    if REST:
        inside = inside + ((tl.arange(0, REST) < D - MAIN)[None, None, :],)
    return inside


@triton.jit
def keep_columns(rows, filler, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr):
    """The rows, with the filler where they are padding."""
    inside = inside_half(D_FIRST)
    if D_SECOND:
        inside = inside + inside_half(D_SECOND)
    result = ()
    for part in tl.static_range(len(rows)):
        result = result + (tl.where(inside[part], rows[part], filler),)
    return result


@triton.jit
def sum_columns(rows):
    """The sum over the columns of all tiles.  # [ROWS, SEGMENTS, 1]"""
    columns, total = rows[0], 0.0
    for part in tl.static_range(1, len(rows)):
        if rows[part].shape[2] == columns.shape[2]:  # one sum over lanes for both
            columns += rows[part]
        else:
            total += tl.sum(rows[part], 2)
    return tl.expand_dims(total + tl.sum(columns, 2), 2)


@triton.jit
def most_of_columns(rows):
    """The greatest element of all tiles.  # [ROWS, SEGMENTS, 1]"""
    columns, most = rows[0], float("-inf")
    for part in tl.static_range(1, len(rows)):
        if rows[part].shape[2] == columns.shape[2]:
            columns = tl.maximum(columns, rows[part])
        else:
            most = tl.maximum(most, tl.max(rows[part], 2))
    return tl.expand_dims(tl.maximum(most, tl.max(columns, 2)), 2)


@triton.jit
def inner_product(a, b):
    """<a, b> of each row.  # [ROWS, SEGMENTS, 1]"""
    products = ()
    for part in tl.static_range(len(a)):
        products = products + (rounded(a[part] * b[part]),)
    return sum_columns(products)


@triton.jit
def rotate(rows, cos, sin):
    """(x1 cos - x2 sin, x2 cos + x1 sin) of rows x whose first and last tiles are x1 and x2."""
    HALF: tl.constexpr = len(rows) // 2
    first, second = (), ()
    for part in tl.static_range(HALF):
        x1, x2 = rows[part], rows[HALF + part]
        first = first + (x1 * cos[part] - x2 * sin[part],)
        second = second + (x2 * cos[part] + x1 * sin[part],)
    return first + second


@triton.jit
def load_rotation(
    cos_ptr, sin_ptr, start, tokens, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D: tl.constexpr
):
    """Rows of the contiguous rotary tables [T, D], where D is half a head's width."""
    kept = lie_between(start, 0, tokens, BLOCK, SEGMENTS)
    cos = load_columns((cos_ptr, D, tokens), 0, start, kept, 0.0, BLOCK, SEGMENTS, D)
    return cos, load_columns((sin_ptr, D, tokens), 0, start, kept, 0.0, BLOCK, SEGMENTS, D)


@triton.jit
def closed_form(
    commonness, logits, size,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, HAS_ENVIRONMENT: tl.constexpr,
):  # fmt: skip
    """size u eps / sum_D u eps, u = 1 / commonness, eps = sigmoid(logits) or, without them, 1.

    eps is taken times exp(-c), c = min(0, max_D logits), or all of a row might underflow.
    """
    if HAS_ENVIRONMENT:
        known = keep_columns(logits, float("-inf"), D_FIRST, D_SECOND)
        c_log2 = tl.minimum(most_of_columns(known), 0.0) * LOG2_E
    weights = ()
    for part in tl.static_range(len(commonness)):
        rarity = commonness[part]
        if HAS_ENVIRONMENT:
            rarity *= tl.exp2(c_log2) + tl.exp2(c_log2 - logits[part] * LOG2_E)
        weights = weights + (reciprocal(rarity),)
    weights = keep_columns(weights, 0.0, D_FIRST, D_SECOND)
    return scale_rows(weights, size * reciprocal(sum_columns(weights)))


@triton.jit
def window_fitness(
    g_matrix, logits_matrix, totals, start, behind, bounds_ptr, size,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_VARLEN: tl.constexpr, ARE_RUNS: tl.constexpr,
):  # fmt: skip
    """gamma, phi + 1/2, p and 1 / n of a tile, whose windows reach `behind` tokens back."""
    tokens = g_matrix[2]
    logits = ()
    if HAS_ENVIRONMENT:  # on its way while the windows are summed
        logits = load_halves(logits_matrix, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
    genes = load_summed(g_matrix, start, 0, tokens, BLOCK, SEGMENTS, D_FIRST, D_SECOND, True)
    sums = sum_windows(
        g_matrix, genes, totals, start, behind, bounds_ptr,
        BLOCK, SEGMENTS, D_FIRST, D_SECOND, IS_VARLEN, ARE_RUNS, True, True,
    )  # fmt: skip
    position = tl.minimum(tile_tokens(start, BLOCK, SEGMENTS), tokens - 1)
    first, end = partner_range(position, (tokens, 0, behind, 0, bounds_ptr), IS_VARLEN)
    population = (end - first).to(tl.float32)[:, :, None]
    share = reciprocal(population)
    commonness = ()
    for part in tl.static_range(len(sums)):
        commonness = commonness + (sums[part] * share + 0.5,)
    gamma = closed_form(commonness, logits, size, D_FIRST, D_SECOND, HAS_ENVIRONMENT)
    return gamma, commonness, genes, share, logits


@triton.jit(do_not_specialize=["tokens", "blocks"])
def totals_kernel(
    g_ptr, totals_ptr, g_strides, batches, heads, tokens, blocks,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Sum of the genes of BLOCK tokens of one head.

    Grid: (blocks * B * H,).
    """
    block, batch, head = locate_program(batches, heads)
    start = block * BLOCK
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    genes = load_summed(g_matrix, start, 0, tokens, BLOCK, SEGMENTS, D_FIRST, D_SECOND, True)
    totals = total_matrix(totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    store_totals(totals, genes, block, D_FIRST, D_SECOND)


@triton.jit(do_not_specialize=["tokens", "blocks", "behind"])
def fitness_kernel(
    g_ptr, logits_ptr, pressure_ptr, cos_ptr, sin_ptr, totals_ptr, bounds_ptr, q_ptr, k_ptr,
    g_strides, logits_strides, q_strides, k_strides,
    batches, heads, tokens, blocks, behind, scale,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_VARLEN: tl.constexpr, ARE_RUNS: tl.constexpr,
    SELECTS: tl.constexpr, IS_ROTARY: tl.constexpr,
):  # fmt: skip
    """gamma = u eps / sum_D u eps for BLOCK tokens of one head, where u = 1 / (phi + 1/2).

    For a selection q = R(kappa scale gamma) and k = R(p), else q = gamma.
    Grid: (blocks * B * H,).
    """
    block, batch, head = locate_program(batches, heads)
    start = block * BLOCK
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    logits_matrix = head_matrix(logits_ptr, logits_strides, batch, head, tokens)
    totals = total_matrix(totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    size = tl.load(pressure_ptr + head).to(tl.float32) * scale if SELECTS else 1.0
    q, _, k, _, _ = window_fitness(
        g_matrix, logits_matrix, totals, start, behind, bounds_ptr, size,
        BLOCK, SEGMENTS, D_FIRST, D_SECOND, HAS_ENVIRONMENT, IS_VARLEN, ARE_RUNS,
    )  # fmt: skip
    if SELECTS:
        if IS_ROTARY:
            cos, sin = load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK, SEGMENTS, D_FIRST)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k_matrix = head_matrix(k_ptr, k_strides, batch, head, tokens)
        store_halves(k_matrix, k, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
    q_matrix = head_matrix(q_ptr, q_strides, batch, head, tokens)
    store_halves(q_matrix, q, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)


@triton.jit(do_not_specialize=["tokens", "blocks", "behind"])
def share_kernel(
    g_ptr, logits_ptr, pressure_ptr, cos_ptr, sin_ptr, totals_ptr, bounds_ptr,
    dq_ptr, excess_ptr, dlogits_ptr, dpressure_ptr, share_ptr, share_totals_ptr,
    g_strides, logits_strides, dq_strides, dlogits_strides, share_strides,
    batches, heads, tokens, blocks, behind, scale,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_VARLEN: tl.constexpr, ARE_RUNS: tl.constexpr,
    SELECTS: tl.constexpr, IS_ROTARY: tl.constexpr,
):  # fmt: skip
    """What each of BLOCK tokens of one head owes every token of its window: dphi / n.

    dl = gamma (dgamma - <dgamma, gamma>), the logits' gradient sigmoid(-logits) dl, dphi = -u dl.
    For a selection dgamma = kappa scale R^-1 dq; these tokens' dkappa is scale <R^-1 dq, gamma>.
    Grid: (blocks * B * H,).
    """
    block, batch, head = locate_program(batches, heads)
    start = block * BLOCK
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    logits_matrix = head_matrix(logits_ptr, logits_strides, batch, head, tokens)
    totals = total_matrix(totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    size = tl.load(pressure_ptr + head).to(tl.float32) * scale if SELECTS else 1.0
    gamma, commonness, genes, one_share, logits = window_fitness(
        g_matrix, logits_matrix, totals, start, behind, bounds_ptr, 1.0,
        BLOCK, SEGMENTS, D_FIRST, D_SECOND, HAS_ENVIRONMENT, IS_VARLEN, ARE_RUNS,
    )  # fmt: skip
    dq_matrix = head_matrix(dq_ptr, dq_strides, batch, head, tokens)
    dgamma = load_halves(dq_matrix, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
    if IS_ROTARY:
        cos, sin = load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK, SEGMENTS, D_FIRST)
        dgamma = rotate(dgamma, cos, scale_rows(sin, -1.0))
    if SELECTS:
        excess_ptr = at_row_vector(excess_ptr, batch, head, heads, tokens)
        token = tile_tokens(start, BLOCK, SEGMENTS)
        excess = tl.load(excess_ptr + token, mask=token < tokens, other=0.0)[:, :, None]
        # All scores of a row are much like its token's own, which dS of sum 0 would cancel.
        dkappa = ()
        for part in tl.static_range(len(gamma)):
            dkappa = dkappa + ((dgamma[part] - excess * genes[part]) * gamma[part],)
        dpressure_ptr = at_row_vector(dpressure_ptr, batch, head, heads, blocks)
        tl.store(dpressure_ptr + block, sum_all(dkappa) * scale)
    dgamma = scale_rows(dgamma, size)
    mean = inner_product(dgamma, gamma)
    dl, share = (), ()
    for part in tl.static_range(len(gamma)):
        dl = dl + (gamma[part] * (dgamma[part] - mean),)
        share = share + (rounded(-dl[part] * reciprocal(commonness[part]) * one_share),)
    share_matrix = head_matrix(share_ptr, share_strides, batch, head, tokens)
    store_halves(share_matrix, share, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
    share_totals = total_matrix(share_totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    store_totals(share_totals, share, block, D_FIRST, D_SECOND)
    if HAS_ENVIRONMENT:
        dlogits = ()
        for part in tl.static_range(len(dl)):
            dlogits = dlogits + (reciprocal(1.0 + tl.exp2(logits[part] * LOG2_E)) * dl[part],)
        dlogits_matrix = head_matrix(dlogits_ptr, dlogits_strides, batch, head, tokens)
        store_halves(dlogits_matrix, dlogits, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)


@triton.jit(do_not_specialize=["tokens", "blocks", "behind"])
def dg_kernel(
    g_ptr, cos_ptr, sin_ptr, dk_ptr, share_ptr, share_totals_ptr, kin_ptr, dg_ptr, bounds_ptr,
    g_strides, dk_strides, share_strides, kin_strides, dg_strides,
    batches, heads, tokens, blocks, behind,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    ARE_KIN: tl.constexpr, IS_VARLEN: tl.constexpr, ARE_RUNS: tl.constexpr,
    SELECTS: tl.constexpr, IS_ROTARY: tl.constexpr,
):  # fmt: skip
    """dg = p (1 - p) dp for BLOCK tokens of one head, plus the gradient of their kin's eps.

    dp sums the shares of all tokens whose windows hold these; for a selection it gains R^-1 dk.
    Grid: (blocks * B * H,).
    """
    block, batch, head = locate_program(batches, heads)
    start = block * BLOCK
    share_matrix = head_matrix(share_ptr, share_strides, batch, head, tokens)
    totals = total_matrix(share_totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    share = load_halves(share_matrix, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
    dp = sum_windows(  # a window looks back, its gradient ahead
        share_matrix, share, totals, start, behind, bounds_ptr,
        BLOCK, SEGMENTS, D_FIRST, D_SECOND, IS_VARLEN, ARE_RUNS, False, False,
    )  # fmt: skip
    if SELECTS:
        dk_matrix = head_matrix(dk_ptr, dk_strides, batch, head, tokens)
        dk = load_halves(dk_matrix, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
        if IS_ROTARY:
            cos, sin = load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK, SEGMENTS, D_FIRST)
            dk = rotate(dk, cos, scale_rows(sin, -1.0))
        dp = add_rows(dp, dk)
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    genes = express(load_halves(g_matrix, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND))
    dg = ()
    for part in tl.static_range(len(dp)):
        dg = dg + (dp[part] * genes[part] * (1.0 - genes[part]),)
    if ARE_KIN:
        kin_matrix = head_matrix(kin_ptr, kin_strides, batch, head, tokens)
        kin = load_halves(kin_matrix, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)
        dg = add_rows(dg, kin)
    dg_matrix = head_matrix(dg_ptr, dg_strides, batch, head, tokens)
    store_halves(dg_matrix, dg, start, BLOCK, SEGMENTS, D_FIRST, D_SECOND)


Windows = tuple[int, dict[str, Any]]  # programs and arguments of the kernels with windows


def launch_fitness(genes: Genes, windows: Windows | None = None) -> tuple[Tensor, Tensor]:
    """q and k of a selection, [B, T, H, D] in g's type; without a pressure gamma in fp32, no k.

    windows is what `sum_blocks` makes of the genes, if that is known.
    """
    g, pressure = genes.g, genes.pressure
    q = g.new_empty(g.shape, dtype=torch.float32 if pressure is None else g.dtype)
    k = None if pressure is None else g.new_empty(g.shape)
    programs, arguments = windows or sum_blocks(genes)
    launch(fitness_kernel, programs, **arguments, q_ptr=q, k_ptr=k)
    return q, g.new_empty((0,) * 4) if k is None else k


def launch_fitness_backward(
    genes: Genes,
    dq: Tensor,
    dk: Tensor | None,
    excess: Tensor | None,
    windows: Windows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, de and dpressure [H] of `launch_fitness`; those of absent inputs are empty."""
    g, environment = genes.g, genes.environment
    batches, _, heads, width = g.shape
    dg = g.new_empty(g.shape)
    dlogits = None if environment == "none" else g.new_empty(g.shape)
    selected = 0 if genes.pressure is None else heads
    programs, arguments = windows or sum_blocks(genes)
    blocks = arguments["blocks"]
    dpressures = g.new_empty(batches, selected, blocks, dtype=torch.float32)
    share = g.new_empty(g.shape, dtype=torch.float32)
    share_totals = g.new_empty(batches, heads, blocks, width, dtype=torch.float32)
    launch(
        share_kernel,
        programs,
        **arguments,
        dq_ptr=dq,
        excess_ptr=excess,
        dlogits_ptr=dlogits,
        dpressure_ptr=dpressures,
        share_ptr=share,
        share_totals_ptr=share_totals,
    )
    launch(
        dg_kernel,
        programs,
        **arguments,
        dk_ptr=dk,
        share_ptr=share,
        share_totals_ptr=share_totals,
        kin_ptr=dlogits if environment == "kin" else None,
        dg_ptr=dg,
        ARE_KIN=environment == "kin",
    )
    dpressure = dpressures.sum((0, 2))
    return dg, g.new_empty((0,) * 4) if dlogits is None else dlogits, dpressure


def sum_blocks(genes: Genes) -> Windows:
    """Sum up the genes of each block, as all kernels with windows need them."""
    g, e, cos, packed = genes.g, genes.e, genes.cos, genes.cu_seqlens
    batches, tokens, heads, width = g.shape
    tile = tiles.choose("fitness", g, tiles.row_width(width, 0, width, False, False))
    blocks = cdiv(tokens, tile.block_m)
    programs, has_environment = blocks * batches * heads, genes.environment != "none"
    totals = g.new_empty(batches, heads, blocks, width, dtype=torch.float32)
    arguments = {
        "g_ptr": g,
        "logits_ptr": (g if e is None else e) if has_environment else None,  # of eps
        "pressure_ptr": genes.pressure,
        "cos_ptr": cos,
        "sin_ptr": genes.sin,
        "totals_ptr": totals,
        "bounds_ptr": None if packed is None else sequence_bounds(packed, tokens),
        "batches": batches,
        "heads": heads,
        "tokens": tokens,
        "blocks": blocks,
        "behind": reach_behind(genes.window_size),
        "scale": width**0.5,
        "D_FIRST": width - width // 2,
        "D_SECOND": width // 2,
        "BLOCK": tile.block_m,
        "SEGMENTS": segments(width, tile.num_warps),
        "HAS_ENVIRONMENT": has_environment,
        "IS_VARLEN": packed is not None,
        "ARE_RUNS": packed is None and genes.window_size >= tile.block_m,
        "SELECTS": genes.pressure is not None,
        "IS_ROTARY": cos is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }
    launch(totals_kernel, programs, **arguments)
    return programs, arguments

"""The kernels of gene fitness, forward and backward, and their launchers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.core import tiles
from kernels.core.launch import launch
from kernels.core.primitives import (
    at_row_vector,
    head_matrix,
    load_rows,
    load_vector,
    locate_program,
    main_width,
    padded_width,
    rounded,
    scale_rows,
    tile_partners,
)
from kernels.core.problem import Genes, is_ragged, reach_behind, sequence_bounds
from kernels.core.windows import (
    add_rows,
    express,
    load_halves,
    store_halves,
    sum_tile,
    sum_windows,
    total_matrix,
)


@triton.jit
def inside_columns(D: tl.constexpr):
    """Which columns of each tile of rows of D columns are not padding.  # [1, WIDTH] each"""
    MAIN: tl.constexpr = main_width(D)
    REST: tl.constexpr = padded_width(D) - MAIN
    inside = ((tl.arange(0, MAIN) < D)[None, :],)
    if REST:
        inside = inside + ((tl.arange(0, REST) < D - MAIN)[None, :],)
    return inside


@triton.jit
def inner_product(a, b):
    """<a, b> of each row.  # [BLOCK]"""
    total = 0.0
    for part in tl.static_range(len(a)):
        total += tl.sum(rounded(a[part] * b[part]), 1)
    return total


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
def load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows of the contiguous rotary tables [T, D], where D is half a head's width."""
    cos = load_rows((cos_ptr, D, tokens), start, BLOCK, D)
    return cos, load_rows((sin_ptr, D, tokens), start, BLOCK, D)


@triton.jit
def closed_form(u, logits, inside, HAS_ENVIRONMENT: tl.constexpr):
    """gamma = u eps / sum_D u eps, with eps = sigmoid(logits), or 1 without an environment.

    eps is taken times exp(-c), c = min(0, max_D logits), or all of a row might underflow.
    """
    if HAS_ENVIRONMENT:
        most = tl.max(tl.where(inside[0], logits[0], float("-inf")), 1)
        for part in tl.static_range(1, len(logits)):
            most = tl.maximum(most, tl.max(tl.where(inside[part], logits[part], float("-inf")), 1))
        c = tl.minimum(most[:, None], 0.0)
    weights, total = (), 0.0
    for part in tl.static_range(len(u)):
        weight = u[part]
        if HAS_ENVIRONMENT:
            weight /= tl.exp(c) + tl.exp(c - logits[part])
        weights = weights + (tl.where(inside[part], weight, 0.0),)
        total += tl.sum(weights[part], 1)
    return scale_rows(weights, tl.expand_dims(1.0 / total, 1))


@triton.jit
def window_fitness(
    g_matrix, logits_matrix, totals, start, behind, bounds_ptr,
    BLOCK: tl.constexpr, D_FIRST: tl.constexpr, D_SECOND: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """gamma, u and n of a tile, whose windows reach `behind` tokens back."""
    tokens = g_matrix[2]
    reach = tokens, 0, behind, 0, bounds_ptr
    first, end = tile_partners(start, tokens, reach, BLOCK, IS_VARLEN)
    sums = sum_windows(
        g_matrix, totals, start, reach, first, end,
        BLOCK, D_FIRST, D_SECOND, IS_VARLEN, True,
    )  # fmt: skip
    population = (end - first).to(tl.float32)[:, None]
    u = ()
    for part in tl.static_range(len(sums)):
        u = u + (1.0 / (sums[part] / population + 0.5),)
    logits = None
    if HAS_ENVIRONMENT:
        logits = load_halves(logits_matrix, start, BLOCK, D_FIRST, D_SECOND)
    inside = inside_columns(D_FIRST)
    if D_SECOND:
        inside = inside + inside_columns(D_SECOND)
    gamma = closed_form(u, logits, inside, HAS_ENVIRONMENT)
    return gamma, u, population


@triton.jit(do_not_specialize=["tokens", "blocks"])
def totals_kernel(
    g_ptr, totals_ptr, g_strides, batches, heads, tokens, blocks,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the genes of BLOCK tokens of one head.

    Grid: (blocks * B * H,).
    """
    block, batch, head = locate_program(batches, heads)
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    genes = express(load_halves(g_matrix, block * BLOCK, BLOCK, D_FIRST, D_SECOND))
    totals = total_matrix(totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    store_halves(totals, sum_tile(genes), block, 1, D_FIRST, D_SECOND)


@triton.jit(do_not_specialize=["tokens", "blocks", "behind"])
def fitness_kernel(
    g_ptr, logits_ptr, pressure_ptr, cos_ptr, sin_ptr, totals_ptr, bounds_ptr, q_ptr, k_ptr,
    g_strides, logits_strides, q_strides, k_strides,
    batches, heads, tokens, blocks, behind, scale,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_VARLEN: tl.constexpr, SELECTS: tl.constexpr,
    IS_ROTARY: tl.constexpr,
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
    q, _, _ = window_fitness(
        g_matrix, logits_matrix, totals, start, behind, bounds_ptr,
        BLOCK, D_FIRST, D_SECOND, HAS_ENVIRONMENT, IS_VARLEN,
    )  # fmt: skip
    if SELECTS:
        q = scale_rows(q, tl.load(pressure_ptr + head).to(tl.float32) * scale)
        k = express(load_halves(g_matrix, start, BLOCK, D_FIRST, D_SECOND))
        if IS_ROTARY:
            cos, sin = load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK, D_FIRST)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k_matrix = head_matrix(k_ptr, k_strides, batch, head, tokens)
        store_halves(k_matrix, k, start, BLOCK, D_FIRST, D_SECOND)
    q_matrix = head_matrix(q_ptr, q_strides, batch, head, tokens)
    store_halves(q_matrix, q, start, BLOCK, D_FIRST, D_SECOND)


@triton.jit(do_not_specialize=["tokens", "blocks", "behind"])
def share_kernel(
    g_ptr, logits_ptr, pressure_ptr, cos_ptr, sin_ptr, totals_ptr, bounds_ptr,
    dq_ptr, excess_ptr, dlogits_ptr, dpressure_ptr, share_ptr, share_totals_ptr,
    g_strides, logits_strides, dq_strides, dlogits_strides, share_strides,
    batches, heads, tokens, blocks, behind, scale,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ENVIRONMENT: tl.constexpr, IS_VARLEN: tl.constexpr, SELECTS: tl.constexpr,
    IS_ROTARY: tl.constexpr,
):  # fmt: skip
    """What each of BLOCK tokens of one head owes every token of its window: dphi / n.

    dl = gamma (dgamma - <dgamma, gamma>), the logits' gradient sigmoid(-logits) dl, dphi = -u dl.
    For a selection dgamma = kappa scale R^-1 dq; these tokens' dkappa is scale <R^-1 dq, gamma>.
    Grid: (blocks * B * H,).
    """
    D: tl.constexpr = D_FIRST + D_SECOND
    block, batch, head = locate_program(batches, heads)
    start = block * BLOCK
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    logits_matrix = head_matrix(logits_ptr, logits_strides, batch, head, tokens)
    totals = total_matrix(totals_ptr, batch, head, heads, blocks, D)
    gamma, u, population = window_fitness(
        g_matrix, logits_matrix, totals, start, behind, bounds_ptr,
        BLOCK, D_FIRST, D_SECOND, HAS_ENVIRONMENT, IS_VARLEN,
    )  # fmt: skip
    dq_matrix = head_matrix(dq_ptr, dq_strides, batch, head, tokens)
    dgamma = load_halves(dq_matrix, start, BLOCK, D_FIRST, D_SECOND)
    if SELECTS:
        if IS_ROTARY:
            cos, sin = load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK, D_FIRST)
            dgamma = rotate(dgamma, cos, scale_rows(sin, -1.0))
        excess_ptr = at_row_vector(excess_ptr, batch, head, heads, tokens)
        excess = load_vector(excess_ptr, start, tokens, BLOCK)
        genes = express(load_halves(g_matrix, start, BLOCK, D_FIRST, D_SECOND))
        # All scores of a row are much like its token's own, which dS of sum 0 would cancel.
        dkappa = inner_product(dgamma, gamma) - excess * inner_product(genes, gamma)
        dpressure_ptr = at_row_vector(dpressure_ptr, batch, head, heads, blocks)
        tl.store(dpressure_ptr + block, tl.sum(dkappa, 0) * scale)
        dgamma = scale_rows(dgamma, tl.load(pressure_ptr + head).to(tl.float32) * scale)
    mean = inner_product(dgamma, gamma)[:, None]
    dl, share = (), ()
    for part in tl.static_range(len(gamma)):
        dl = dl + (gamma[part] * (dgamma[part] - mean),)
        share = share + (-u[part] * dl[part] / population,)
    share_matrix = head_matrix(share_ptr, share_strides, batch, head, tokens)
    store_halves(share_matrix, share, start, BLOCK, D_FIRST, D_SECOND)
    share_totals = total_matrix(share_totals_ptr, batch, head, heads, blocks, D)
    store_halves(share_totals, sum_tile(share), block, 1, D_FIRST, D_SECOND)
    if HAS_ENVIRONMENT:
        logits = load_halves(logits_matrix, start, BLOCK, D_FIRST, D_SECOND)
        dlogits = ()
        for part in tl.static_range(len(dl)):
            dlogits = dlogits + (tl.sigmoid(-logits[part]) * dl[part],)
        dlogits_matrix = head_matrix(dlogits_ptr, dlogits_strides, batch, head, tokens)
        store_halves(dlogits_matrix, dlogits, start, BLOCK, D_FIRST, D_SECOND)


@triton.jit(do_not_specialize=["tokens", "blocks", "behind"])
def dg_kernel(
    g_ptr, cos_ptr, sin_ptr, dk_ptr, share_ptr, share_totals_ptr, kin_ptr, dg_ptr, bounds_ptr,
    g_strides, dk_strides, share_strides, kin_strides, dg_strides,
    batches, heads, tokens, blocks, behind,
    D_FIRST: tl.constexpr, D_SECOND: tl.constexpr, BLOCK: tl.constexpr,
    ARE_KIN: tl.constexpr, IS_VARLEN: tl.constexpr, SELECTS: tl.constexpr,
    IS_ROTARY: tl.constexpr,
):  # fmt: skip
    """dg = p (1 - p) dp for BLOCK tokens of one head, plus the gradient of their kin's eps.

    dp sums the shares of all tokens whose windows hold these; for a selection it gains R^-1 dk.
    Grid: (blocks * B * H,).
    """
    block, batch, head = locate_program(batches, heads)
    start = block * BLOCK
    reach = tokens, 0, 0, behind, bounds_ptr  # a window looks back, its gradient ahead
    first, end = tile_partners(start, tokens, reach, BLOCK, IS_VARLEN)
    share_matrix = head_matrix(share_ptr, share_strides, batch, head, tokens)
    totals = total_matrix(share_totals_ptr, batch, head, heads, blocks, D_FIRST + D_SECOND)
    dp = sum_windows(
        share_matrix, totals, start, reach, first, end,
        BLOCK, D_FIRST, D_SECOND, IS_VARLEN, False,
    )  # fmt: skip
    if SELECTS:
        dk = load_halves(
            head_matrix(dk_ptr, dk_strides, batch, head, tokens), start, BLOCK, D_FIRST, D_SECOND
        )
        if IS_ROTARY:
            cos, sin = load_rotation(cos_ptr, sin_ptr, start, tokens, BLOCK, D_FIRST)
            dk = rotate(dk, cos, scale_rows(sin, -1.0))
        dp = add_rows(dp, dk)
    g_matrix = head_matrix(g_ptr, g_strides, batch, head, tokens)
    genes = express(load_halves(g_matrix, start, BLOCK, D_FIRST, D_SECOND))
    dg = ()
    for part in tl.static_range(len(dp)):
        dg = dg + (dp[part] * genes[part] * (1.0 - genes[part]),)
    if ARE_KIN:
        kin_matrix = head_matrix(kin_ptr, kin_strides, batch, head, tokens)
        dg = add_rows(dg, load_halves(kin_matrix, start, BLOCK, D_FIRST, D_SECOND))
    dg_matrix = head_matrix(dg_ptr, dg_strides, batch, head, tokens)
    store_halves(dg_matrix, dg, start, BLOCK, D_FIRST, D_SECOND)


def launch_fitness(genes: Genes) -> tuple[Tensor, Tensor]:
    """q and k of a selection, [B, T, H, D] in g's type; without a pressure gamma in fp32, no k."""
    g, pressure = genes.g, genes.pressure
    q = g.new_empty(g.shape, dtype=torch.float32 if pressure is None else g.dtype)
    k = g.new_empty((0,) * 4 if pressure is None else g.shape)
    programs, rows = _row_arguments(genes)
    launch(
        fitness_kernel,
        programs,
        **rows,
        **_window_arguments(programs, rows, genes),
        q_ptr=q,
        k_ptr=k,
    )
    return q, k


def launch_fitness_backward(
    genes: Genes, dq: Tensor, dk: Tensor | None, excess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, de and dpressure [H] of `launch_fitness`; those of absent inputs are empty."""
    g, environment = genes.g, genes.environment
    batches, _, heads, width = g.shape
    dg = g.new_empty(g.shape)
    dlogits = g.new_empty((0,) * 4 if environment == "none" else g.shape)
    selected = 0 if genes.pressure is None else heads
    programs, rows = _row_arguments(genes)
    blocks = rows["blocks"]
    dpressures = g.new_empty(batches, selected, blocks, dtype=torch.float32)
    share = g.new_empty(g.shape, dtype=torch.float32)
    share_totals = g.new_empty(batches, heads, blocks, width, dtype=torch.float32)
    launch(
        share_kernel,
        programs,
        **rows,
        **_window_arguments(programs, rows, genes),
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
        **rows,
        dk_ptr=share if dk is None else dk,  # unread
        share_ptr=share,
        share_totals_ptr=share_totals,
        kin_ptr=dlogits,
        dg_ptr=dg,
        ARE_KIN=environment == "kin",
    )
    return dg, dlogits, dpressures.sum((0, 2))


def _row_arguments(genes: Genes) -> tuple[int, dict[str, Any]]:
    """How many programs, and the keyword arguments that all kernels with windows have in common."""
    g, cos, sin, packed = genes.g, genes.cos, genes.sin, genes.cu_seqlens
    batches, tokens, heads, width = g.shape
    ragged = any(is_ragged(x) for x in (g, genes.e) if x is not None)
    tile = tiles.choose("fitness", g, tiles.Width(padded_width(width), ragged))
    blocks = triton.cdiv(tokens, tile.block_m)
    return blocks * batches * heads, {
        "g_ptr": g,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "bounds_ptr": None if packed is None else sequence_bounds(packed, tokens),
        "batches": batches,
        "heads": heads,
        "tokens": tokens,
        "blocks": blocks,
        "behind": reach_behind(genes.window_size),
        "D_FIRST": width - width // 2,
        "D_SECOND": width // 2,
        "IS_VARLEN": packed is not None,
        "SELECTS": genes.pressure is not None,
        "IS_ROTARY": cos is not None,
        "BLOCK": tile.block_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


def _window_arguments(programs: int, rows: dict[str, Any], genes: Genes) -> dict[str, Any]:
    """Those of the kernels that see gamma; runs the one that sums up each block's genes first."""
    g, e = genes.g, genes.e
    batches, _, heads, width = g.shape
    totals = g.new_empty(batches, heads, rows["blocks"], width, dtype=torch.float32)
    of_totals = ("g_ptr", "batches", "heads", "tokens", "blocks", "D_FIRST", "D_SECOND", "BLOCK",
                 "num_warps", "num_stages")  # fmt: skip
    launch(totals_kernel, programs, **{name: rows[name] for name in of_totals}, totals_ptr=totals)
    logits = g if e is None else e  # eps is sigmoid(e), or sigmoid(g), or neither is read
    return {
        "logits_ptr": logits,
        "pressure_ptr": genes.pressure,
        "scale": width**0.5,
        "totals_ptr": totals,
        "HAS_ENVIRONMENT": genes.environment != "none",
    }

"""What the compiler makes of every kernel at every tile of the table, with no GPU at hand.

`python -m bench.resources [--arch 90] [--width 64 64+32] [--packed | --biased | --rank]` compiles
ahead of time, prints one row per kernel and tile, and exits with 1 when a tile spills much (on
sm_90, in its loops of products), has its matrix instructions serialised or their operands written
behind the fence, needs more shared memory than the architecture has, or misses wgmma on sm_90.
`--width every` takes every width of rows that the kernels of attention are launched with, those of
decode and fitness by their padded widths; leave it running.

Of the matrix loops of attention on sm_90 it prints the cycles, interior / masked, that
`bench.cycles` predicts, of fitness those of a program; `--rank` orders by attention's the tiles of
`bench.candidates`, faulty ones last.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from bench import candidates
from bench.compiled import INSTRUCTIONS, MULTIPROCESSORS, Row, compiling
from kernels.core import tiles
from kernels.core.backward import launch_backward
from kernels.core.decode import launch_decode
from kernels.core.fitness import launch_fitness, launch_fitness_backward
from kernels.core.forward import launch_forward
from kernels.core.gene_decode import launch_gene_decode
from kernels.core.primitives import padded_width
from kernels.core.problem import Genes, Problem, new_lse

SHORT_WINDOW = tiles.SHORT // 2
Widths = tuple[tuple[int, int], ...]  # of keys and values, and of keys' rotary part


def _each_shape(low: int, high: int, rope: int) -> Widths:
    """The widths of low to high that padding leaves alone, and ragged ones of as many columns."""
    padded = sorted({padded_width(d) for d in range(low, high + 1)})
    return tuple((d - cut, max(0, rope - cut)) for d in padded for cut in (0, 2))


WIDTHS: Widths = (64, 0), (96, 0), (128, 0), (256, 0)
MLA_WIDTHS: Widths = (64, 32), (128, 64)
LATENT_WIDTHS: Widths = (144, 32), (288, 32), (432, 32), (512, 64)
EVEN_WIDTHS: Widths = tuple((d, 0) for d in range(32, 257, 16))  # `even_rows` makes of 1 to 256
EVERY_WIDTH: Widths = _each_shape(1, 256, rope=0)
EVERY_MLA_WIDTH: Widths = (64, 64), (32, 64), (128, 32), (176, 64), (192, 64)
EVERY_LATENT_WIDTH: Widths = _each_shape(257, 512, rope=64)


def attention_rows(
    arch: int,
    width: int,
    dtype: torch.dtype,
    rope: int = 0,
    packed: bool = False,
    biased: bool = False,
) -> list[Row]:
    """Compile the attention core as its launchers do: 9 query heads over 3, or MLA's 9; a window.

    With rope, that many columns of queries and keys beside width are rotary; without, packed
    sequences have sinks and a second dq sums its excess for MGA, which takes the most registers.
    """
    problem = _problem(width, dtype, rope, packed, biased)
    with compiling(arch) as rows:
        o, lse, rest = launch_forward(problem, with_rest=True)
        short = tiles.HALF_PRECISION[arch].get("short_forward", {})
        one_tile = biased or dtype == torch.float32  # whatever the window
        if not one_tile and padded_width(width) + rope <= max(short, default=0):
            launch_forward(problem._replace(window_size=SHORT_WINDOW), with_rest=True)
        launch_backward(problem, o, lse, rest, o, lse, with_excess=False)
    if not rope and not biased:  # as MGA is
        with compiling(arch, "dq") as more:
            launch_backward(problem, o, lse, rest, o, lse, with_excess=True)
        rows += more
    return rows


def _problem(
    width: int, dtype: torch.dtype, rope: int, packed: bool = False, biased: bool = False
) -> Problem:
    heads, scale = 9 if rope else 3, (width + rope) ** -0.5
    q, k, v = (_meta(1, 4096, h, width, dtype=dtype) for h in (9, heads, heads))
    q_rope = _meta(1, 4096, 9, rope, dtype=dtype) if rope else None
    k_rope = _meta(1, 4096, rope, dtype=dtype) if rope else None
    sinks = _meta(9, dtype=torch.float32) if packed and not rope else None
    offsets = _meta(5, dtype=torch.int32) if packed else None
    bias = _meta(1, 4096, 9, dtype=torch.float64) if biased else None  # as decay makes it
    return Problem(q, k, v, q_rope, k_rope, sinks, bias, offsets, scale, window_size=1024)


def ranked_rows(arch: int, width: int, dtype: torch.dtype, rope: int = 0) -> dict[str, list[Row]]:
    """The candidates for each direction of attention, the fewest predicted cycles first.

    Those of interior tiles, or of short windows those of both kinds, as many as a window has.
    """
    ranked: dict[str, list[Row]] = {}
    plain, biased = (_problem(width, dtype, rope, biased=biased) for biased in (False, True))
    columns = tiles.tile_width(plain.kernel_arguments).columns
    for direction, widths in candidates.ALTERNATIVES.get(arch, {}).items():
        if columns > max(widths):
            continue
        widest = min(w for w in widths if columns <= w)
        problem = biased if direction in tiles.BIASED.values() else plain
        rows = []
        for tile in candidates.tiles_to_try(arch, direction, widest):
            with candidates.using(arch, direction, widest, tile):
                rows += _direction_rows(arch, direction, problem)
        window = SHORT_WINDOW if direction == "short_forward" else None
        ranked[direction] = sorted(rows, key=lambda row: (bool(row.faults), _cost(row, window)))
    return ranked


def _cost(row: Row, window: int | None) -> float:
    """Predicted cycles of 64 queries, over 64 keys or the keys of a window."""
    if row.cycles is None:
        return math.inf
    interior, masked = row.cycles
    if window is None:
        return interior
    edge_tiles = 2 * -(-row.block_m // row.block_n)
    return interior * (window - row.block_m) / 64 + masked * edge_tiles * row.block_n / 64


def _direction_rows(arch: int, direction: tiles.Direction, problem: Problem) -> list[Row]:
    kernel = direction.rpartition("_")[2]
    with compiling(arch, kernel) as rows:
        if kernel in ("dq", "dkdv"):
            o = problem.q.new_empty(*problem.q.shape[:3], problem.v.shape[-1])
            lse = new_lse(problem.q)
            launch_backward(problem, o, lse, o, o, lse, with_excess=False)
        elif direction == "short_forward":
            launch_forward(problem._replace(window_size=SHORT_WINDOW), with_rest=True)
        else:
            launch_forward(problem, with_rest=True)
    return rows


def decode_rows(
    arch: int, width: int, dtype: torch.dtype, rope: int = 0, biased: bool = False
) -> list[Row]:
    """Compile the decode kernels: 9 query heads over 3, or with rope over one latent of width.

    For one new token, for a few and for many, whose tiles have more rows.
    """
    lengths = _meta(8, dtype=torch.int32)
    k = _meta(8, 4096, 1 if rope else 3, width, dtype=dtype)
    v = None if rope else k
    k_rope = _meta(8, 4096, rope, dtype=dtype) if rope else None
    bias = _meta(8, 4096, 9, dtype=torch.float64) if biased else None
    with compiling(arch) as rows:
        for q_tokens in (1, 2 if rope else 8, 64):
            q = _meta(8, q_tokens, 9, width, dtype=dtype)
            q_rope = _meta(8, q_tokens, 9, rope, dtype=dtype) if rope else None
            launch_decode(q, k, v, q_rope, k_rope, lengths, None, bias, None, width**-0.5)
    return rows


def fitness_rows(arch: int, width: int, dtype: torch.dtype, packed: bool = False) -> list[Row]:
    """Compile the kernels of gene fitness: 9 heads, a window.

    For a rotary selection in the query's environment, or of packed kin and no selection.
    """
    g, pressure = _meta(1, 4096, 9, width, dtype=dtype), _meta(9, dtype=torch.float32)
    table, excess = (
        _meta(*shape, dtype=torch.float32) for shape in ((4096, width // 2), (9, 4096))
    )
    offsets = _meta(5, dtype=torch.int32)
    genes = Genes(g, g, pressure, table, table, None, 1024, "query")
    if packed:
        genes = Genes(g, None, None, None, None, offsets, 1024, "kin")
    with compiling(arch) as rows:
        q, k = launch_fitness(genes)
        forward = len(rows)
        upstream = (q, None, None) if packed else (q, k, excess)
        launch_fitness_backward(genes, *upstream)
    return rows[:forward] + rows[forward + 1 :]  # the backward sums up the genes once more


def gene_decode_rows(arch: int, width: int, dtype: torch.dtype) -> list[Row]:
    """Compile the kernel of MGA's decoding: 9 heads, rotary, in the query's environment."""
    g, ring = _meta(8, 1, 9, width, dtype=dtype), _meta(8, 1024, 9, width, dtype=dtype)
    pressure, table = (_meta(*n, dtype=torch.float32) for n in ((9,), (8, 1, width // 2)))
    lengths = _meta(8, dtype=torch.int32)
    with compiling(arch) as rows:
        launch_gene_decode(g, g, pressure, table, table, ring, lengths, 1000, "query")
    return rows


def compiled_rows(
    arch: int,
    dtype: torch.dtype,
    width: int,
    rope: int,
    packed: bool = False,
    biased: bool = False,
) -> list[Row]:
    """The rows of every kernel that serves these widths.

    Decode's sequences are never packed, and genes have no bias.
    """
    rows, shape = [], (width, rope)
    if shape in EVEN_WIDTHS + MLA_WIDTHS + EVERY_MLA_WIDTH:
        rows += attention_rows(arch, width, dtype, rope, packed, biased)
    if shape in EVERY_WIDTH + LATENT_WIDTHS + EVERY_LATENT_WIDTH and not packed:
        rows += decode_rows(arch, width, dtype, rope, biased)
    if shape in EVERY_WIDTH and not biased:
        rows += fitness_rows(arch, width, dtype, packed)
        rows += [] if packed else gene_decode_rows(arch, width, dtype)
    return rows


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def report(rows: Sequence[Row]) -> str:
    """The rows as a table, faults and warnings last in each."""
    columns = ("arch", "kernel", "dtype", "width", "block_m", "block_n", "num_warps", "num_stages",
               "registers", "spill_bytes", "shared_bytes", "ctas_per_sm")  # fmt: skip
    titles = ("sm", "kernel", "type", "width", "M", "N", "warps", "stages", "regs", "spills",
              "shared", "CTAs", *INSTRUCTIONS, "cycles", "faults and warnings")  # fmt: skip
    lines: list[tuple[str, ...]] = [titles]
    for row in rows:
        cells = [str(getattr(row, column)) for column in columns]
        cells += [str(row.instructions[name]) for name in INSTRUCTIONS]
        cells += ["/".join(map(str, row.cycles)) if row.cycles else "-"]
        lines.append((*cells, "; ".join([*row.faults, *row.warnings])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary(rows: Sequence[Row]) -> str:
    """The compilers, and a line each width: tile, registers and faults of its kernels."""
    lines = [f"triton {triton.__version__}"]
    for arch in sorted({row.arch for row in rows}):
        lines.append(f"\nsm_{arch}, ptxas {get_ptxas(arch).version}: MxN/warps/stages registers")
        table: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row.arch == arch:
                tile = f"{row.block_m}x{row.block_n}/{row.num_warps}/{row.num_stages}"
                cell = " ".join([row.kernel, tile, str(row.registers), *row.faults])
                table.setdefault((row.dtype, row.width), []).append(cell)
        lines += [f"{dtype} {width}: {'; '.join(cells)}" for (dtype, width), cells in table.items()]
    return "\n".join(lines) + "\n"


def _by_name(widths: Widths) -> dict[str, tuple[int, int]]:
    return {f"{width}+{rope}" if rope else f"{width}": (width, rope) for width, rope in widths}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    known = sorted(MULTIPROCESSORS)
    models = _by_name(WIDTHS + MLA_WIDTHS + LATENT_WIDTHS)
    every = models | _by_name(EVEN_WIDTHS + EVERY_WIDTH + EVERY_MLA_WIDTH + EVERY_LATENT_WIDTH)
    parser.add_argument("--arch", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--width", nargs="+", choices=[*every, "every"], default=list(models))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--packed", action="store_true", help="the launches of packed sequences")
    instead.add_argument("--biased", action="store_true", help="those with a bias of keys")
    instead.add_argument("--rank", action="store_true", help="candidate tiles, and nothing else")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--summary", type=Path, help="and here a line each width")
    arguments = parser.parse_args(argv)
    names = every if "every" in arguments.width else arguments.width
    if arguments.rank:
        return _rank(arguments, [every[name] for name in names])
    rows = [
        row
        for arch in arguments.arch
        for dtype in arguments.dtype
        for name in names
        for row in compiled_rows(
            arch, getattr(torch, dtype), *every[name], arguments.packed, arguments.biased
        )
    ]
    faulty = sum(bool(row.faults) for row in rows)
    print(f"{report(rows)}\n{len(rows)} kernels, {faulty} with faults")
    if arguments.json:
        about = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(about, indent=1))
    if arguments.summary:
        arguments.summary.write_text(summary(rows))
    return 1 if faulty else 0


def _rank(arguments: argparse.Namespace, widths: Sequence[tuple[int, int]]) -> int:
    found = []
    for arch, (width, rope) in product(arguments.arch, widths):
        for direction, rows in ranked_rows(arch, width, torch.bfloat16, rope).items():
            print(f"{direction}\n{report(rows)}\n", flush=True)
            found += [asdict(row) | {"direction": direction} for row in rows]
    if arguments.json:
        about = {"triton": triton.__version__, "rows": found}
        arguments.json.write_text(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

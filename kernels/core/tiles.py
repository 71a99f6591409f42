"""Launch shapes: a frozen table, chosen with `python -m bench.resources`."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.core.primitives import main_width
from kernels.core.problem import padded_width

SHORT = 512  # keys of a window below which `short_forward` is faster
FEW = 16  # rows of a key head, tokens times query heads, up to which decode takes `short_decode`
Direction = Literal[
    "forward", "short_forward", "biased_forward", "dq", "biased_dq", "dkdv",
    "decode", "short_decode", "fitness",
]  # fmt: skip
SHORTER: dict[Direction, Direction] = {"forward": "short_forward", "decode": "short_decode"}
BIASED: dict[Direction, Direction] = {"forward": "biased_forward", "dq": "biased_dq"}


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, stages of its software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; by default ptxas decides

    @cached_property
    def options(self) -> dict[str, Any]:
        """The tile as a kernel launch takes it."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


Table = dict[Direction, dict[int, Tile]]  # by direction and widest padded width that a tile serves


def roomy(table: dict[int, Tile]) -> dict[int, Tile]:
    """The same tiles with every register; else ptxas spills a few to fit one more program in."""
    return {widest: replace(tile, max_registers=255) for widest, tile in table.items()}


DECODE = roomy(
    {  # the most rows of a tile; a launch with fewer takes a smaller one
        64: Tile(64, 32, 4, 3),
        128: Tile(32, 32, 4, 3),
        192: Tile(64, 32, 8, 2),
        256: Tile(32, 64, 8, 2),
        320: Tile(16, 32, 4, 3),
        576: Tile(32, 16, 8, 2),
    }
)
# Few rows leave registers and shared memory for more keys on their way, which set the pace.
SHORT_DECODE = roomy(
    {
        64: Tile(16, 64, 4, 4),
        128: Tile(16, 64, 4, 3),
        192: Tile(16, 64, 4, 3),
        256: Tile(16, 32, 4, 4),
        320: Tile(16, 32, 4, 4),
        576: Tile(16, 32, 4, 3),
    }
)
SMALL_SHORT_DECODE = roomy(  # in 100 KB of shared memory
    {
        64: Tile(16, 64, 4, 3),
        192: Tile(16, 32, 4, 3),
        256: Tile(16, 32, 4, 3),
        576: Tile(16, 16, 4, 3),
    }
)
FITNESS = {64: Tile(32, 32, 4, 1, 255), 256: Tile(16, 16, 4, 1)}
HALF_PRECISION: dict[int, Table] = {  # by architecture
    80: {
        "forward": {
            64: Tile(64, 64, 4, 3),
            96: Tile(64, 32, 4, 3),
            192: Tile(128, 32, 8, 3),
            256: Tile(64, 32, 8, 3),
        },
        "dq": {128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 3)},
        "dkdv": {
            64: Tile(32, 64, 4, 3),
            96: Tile(16, 64, 4, 3),
            128: Tile(32, 64, 8, 3),
            192: Tile(16, 64, 8, 2),
            256: Tile(32, 32, 8, 2),
        },
        "decode": DECODE,
        "short_decode": SHORT_DECODE,
        "fitness": FITNESS | {64: Tile(32, 32, 4, 1, 128)},
    },
    90: {
        "forward": {
            96: Tile(128, 64, 8, 3, 128),
            192: Tile(128, 64, 8, 3),
            256: Tile(128, 32, 8, 3),
        },
        "short_forward": {64: Tile(64, 64, 4, 3, 128)},
        # The biases of a tile's keys take registers of their own.
        "biased_forward": {64: Tile(64, 32, 4, 3, 128), 96: Tile(128, 32, 8, 3, 128)},
        "dq": {
            64: Tile(128, 64, 8, 3, 128),
            128: Tile(128, 32, 8, 3, 128),
            192: Tile(128, 32, 8, 3),
            256: Tile(128, 32, 8, 3),
        },
        "biased_dq": {64: Tile(64, 64, 4, 3, 168)},
        "dkdv": {
            64: Tile(64, 64, 4, 3),
            96: Tile(32, 64, 4, 3),
            128: Tile(32, 128, 8, 3),
            192: Tile(16, 128, 8, 3),
            256: Tile(16, 64, 8, 3),
        },
        "decode": DECODE,
        "short_decode": SHORT_DECODE,
        "fitness": FITNESS | {64: Tile(32, 32, 4, 1, 128)},
    },
    100: {
        "forward": {
            96: Tile(64, 64, 4, 3, 255),
            128: Tile(64, 64, 8, 3),
            256: Tile(64, 32, 8, 3, 255),
        },
        "dq": {
            64: Tile(64, 64, 4, 3),
            96: Tile(128, 32, 8, 3),
            128: Tile(64, 32, 8, 3),
            192: Tile(64, 32, 8, 2),
            256: Tile(64, 32, 8, 3),
        },
        "dkdv": {64: Tile(32, 64, 4, 3), 128: Tile(32, 64, 8, 3), 256: Tile(32, 32, 8, 2)},
        "decode": DECODE,
        "short_decode": SHORT_DECODE,
        "fitness": FITNESS,
    },
    120: {
        "forward": {
            64: Tile(64, 64, 4, 2),
            96: Tile(64, 32, 4, 3),
            128: Tile(128, 32, 8, 3),
            192: Tile(64, 32, 8, 3),
            256: Tile(64, 32, 8, 2),
        },
        "dq": {
            96: Tile(64, 32, 4, 3),
            128: Tile(64, 32, 8, 3),
            192: Tile(64, 32, 8, 2),
            256: Tile(32, 32, 8, 2, 255),
        },
        "dkdv": {
            64: Tile(32, 64, 4, 3),
            96: Tile(16, 64, 4, 3),
            128: Tile(32, 64, 8, 3),
            192: Tile(16, 64, 8, 2),
            256: Tile(32, 32, 8, 2),
        },
        "decode": DECODE,
        "short_decode": SMALL_SHORT_DECODE,
        "fitness": FITNESS,
    },
}
# Of fp32, and of ragged rows, whose elements are read one by one and take a register each.
PLAIN: Table = {
    "forward": roomy({64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)}),
    "dq": roomy({64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)}),
    "dkdv": roomy({64: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)}),
    "decode": roomy({64: Tile(16, 32, 4, 1), 192: Tile(16, 16, 4, 1), 576: Tile(16, 16, 8, 1)}),
    "fitness": FITNESS,
}
SMALL_FITNESS = {64: Tile(16, 16, 4, 1)}
# In place of those that spill with a version of Triton, by it and the architecture (`PLAIN`: None).
BY_TRITON: dict[tuple[str, int | None], Table] = {
    ("3.6", None): {"fitness": SMALL_FITNESS},
    ("3.6", 80): {"dkdv": {64: Tile(32, 64, 4, 2)}, "fitness": SMALL_FITNESS},
    ("3.6", 90): {"dkdv": {64: Tile(32, 64, 4, 3)}, "fitness": SMALL_FITNESS},
    ("3.6", 100): {"dkdv": {64: Tile(32, 64, 4, 2)}, "fitness": SMALL_FITNESS},
    ("3.6", 120): {"dkdv": {64: Tile(32, 64, 4, 2)}, "fitness": SMALL_FITNESS},
    ("3.9", 90): {"short_forward": {64: Tile(64, 64, 4, 3)}, "dq": {64: Tile(64, 64, 4, 3)}},
}
INTERPRETER: dict[Direction, Tile] = {
    "forward": Tile(64, 32, 4, 1),
    "dq": Tile(32, 64, 4, 1),
    "dkdv": Tile(32, 64, 4, 1),
    "decode": Tile(16, 32, 4, 1),
    "fitness": Tile(32, 32, 4, 1),
}


class Width(NamedTuple):
    """What rows ask of a tile."""

    columns: int  # padded
    plain: bool  # whether only `PLAIN` has one
    short: bool = False  # whether each meets fewer than `SHORT` others; of decode, whether few do
    biased: bool = False  # whether a bias joins each score


def tile_width(arguments: dict[str, Any]) -> Width:
    """That of the rows that an attention kernel meets, all of them even."""
    short = arguments["behind"] + arguments["ahead"] < SHORT
    width = row_width(arguments["D_QK"], arguments["D_ROPE"], arguments["D_V"], False, short)
    return width._replace(biased=True) if arguments["BIAS_PARTS"] else width


@cache
def row_width(d_qk: int, d_rope: int, d_v: int, ragged: bool, short: bool) -> Width:
    """That of the wider of the rows that an attention kernel scores and of those that it sums."""
    scored = padded_width(d_qk) + (padded_width(d_rope) if d_rope else 0)
    if d_rope and scored == 128:  # in two parts, whose sums take more registers than those of one
        scored = 192
    columns = max(scored, padded_width(d_v))
    return Width(columns, ragged or is_narrow(d_qk, columns), short)


def is_narrow(d_qk: int, columns: int) -> bool:
    """Whether dk, with no more columns than rows, would lay out the product of a wide dv."""
    return bool(main_width(d_qk) < 64 < columns)


def choose(direction: Direction, q: Tensor, width: Width) -> Tile:
    """The tile for queries like q, in rows of a width that `kernels.checks` accepts."""
    if q.device.type == "cpu":
        return INTERPRETER[direction]
    arch = None if q.dtype == torch.float32 or width.plain else architecture(q.device)
    return listed(direction, arch, width, triton.__version__)


@cache
def listed(direction: Direction, arch: int | None, width: Width, triton_version: str) -> Tile:
    """The tile in the table of an architecture, or without one in `PLAIN`."""
    version = ".".join(triton_version.split(".")[:2])
    tables = PLAIN if arch is None else HALF_PRECISION[arch], BY_TRITON.get((version, arch), {})
    kinds = SHORTER if width.short else {}, BIASED if width.biased else {}
    names = [direction, *(kind[direction] for kind in kinds if direction in kind)]
    serving: dict[int, Tile] = {}
    for name, table in product(names, tables):  # the last one wins
        serving |= table.get(name, {})
    return serving[min(widest for widest in serving if width.columns <= widest)]


@cache
def architecture(device: torch.device) -> int:
    """The architecture of the table whose tiles a GPU can run.

    Raises:
        NotImplementedError: none can, the GPU is older than Ampere.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise NotImplementedError(
            f"device: expected compute capability 8.0 or later, got {major}.{minor}"
        )
    if major >= 12 or (major == 8 and minor > 0):  # about 100 KB of shared memory
        return 120
    return {8: 80, 9: 90}.get(major, 100)

"""Tiles worth a measurement: for each direction and width, what may beat the table on a GPU.

The table's own tile is always among them, first. `python -m bench.resources --rank` orders them by
predicted cycles, `python -m bench.tune` by measured time.
"""

import contextlib
from collections.abc import Iterator
from inspect import unwrap
from unittest import mock

import triton

from kernels.core import tiles
from kernels.core.tiles import Direction, Table, Tile

# By architecture, direction and widest padded width: what a `Tile` is made of.
ALTERNATIVES: dict[int, dict[Direction, dict[int, tuple[tuple[int, ...], ...]]]] = {
    90: {
        "forward": {
            64: ((128, 64, 8, 2, 128), (64, 64, 4, 3, 128), (64, 64, 4, 3), (128, 128, 8, 3)),
            96: ((128, 64, 8, 2, 128), (64, 64, 4, 3), (128, 32, 8, 3, 128)),
            128: ((64, 64, 4, 3), (128, 32, 8, 3), (128, 128, 8, 2)),
            192: ((128, 32, 8, 3), (64, 32, 4, 3)),
            256: ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 3)),
        },
        "short_forward": {
            64: ((64, 64, 4, 2, 128), (64, 64, 4, 3), (128, 64, 8, 3, 128), (64, 32, 4, 3, 128)),
        },
        "biased_forward": {
            64: ((64, 64, 4, 3, 128), (64, 64, 4, 3), (128, 32, 8, 3, 128), (128, 64, 8, 3, 128)),
            96: ((64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3, 128)),
        },
        "dq": {
            64: ((64, 64, 4, 3), (128, 64, 8, 2, 128), (128, 32, 8, 3, 128), (128, 64, 8, 3)),
            96: ((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3)),
            128: ((64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3)),
            192: ((128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
            256: ((128, 32, 8, 2), (64, 32, 4, 2)),
        },
        "biased_dq": {
            64: ((64, 64, 4, 3), (64, 32, 4, 3, 168), (128, 32, 8, 3, 128), (128, 64, 8, 3, 128)),
        },
        "dkdv": {
            64: ((32, 64, 4, 3), (64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 3), (32, 128, 8, 2)),
            96: ((16, 64, 4, 3), (32, 128, 8, 3), (32, 64, 4, 2)),
            128: ((16, 64, 4, 3), (16, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 2)),
            192: ((16, 128, 8, 2), (32, 64, 8, 2)),  # 128 + 64 columns spill less than 192
            # 32 queries by 64 keys spill 80 bytes, all of them outside the loop of products.
            256: ((32, 32, 8, 2), (32, 32, 8, 3), (16, 64, 8, 2), (32, 64, 8, 3)),
        },
    }
}


def table(arch: int) -> Table:
    """The tiles in use, those of this version of Triton in their places."""
    found = {direction: dict(widths) for direction, widths in tiles.HALF_PRECISION[arch].items()}
    for direction, widths in tiles.BY_TRITON.get(_key(arch), {}).items():
        found[direction] = found.get(direction, {}) | widths
    return found


def tiles_to_try(arch: int, direction: Direction, widest: int) -> list[Tile]:
    """The tile in use for rows of so many padded columns, then the alternatives."""
    in_use = table(arch)[direction]
    tile = in_use[min(columns for columns in in_use if widest <= columns)]
    others = (Tile(*numbers) for numbers in ALTERNATIVES[arch][direction][widest])
    return list(dict.fromkeys((tile, *others)))


@contextlib.contextmanager
def using(arch: int, direction: Direction, widest: int, tile: Tile) -> Iterator[None]:
    """Launches inside take the tile, if no narrower column of the table serves them."""
    patched = table(arch)
    patched[direction] = patched.get(direction, {}) | {widest: tile}
    with (
        mock.patch.dict(tiles.HALF_PRECISION, {arch: patched}),
        mock.patch.dict(tiles.BY_TRITON, {_key(arch): {}}),
        mock.patch.object(tiles, "listed", unwrap(tiles.listed)),  # which remembers tables
    ):
        yield


def _key(arch: int) -> tuple[str, int]:
    return ".".join(triton.__version__.split(".")[:2]), arch

"""A sparse matrix as a bitmap and its kept values, in the order in which a GPU's matrix units read them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array

ROWS, COLUMNS = 16, 128
"""Shape of a panel: 16 tiles of 8 x 16."""
MAP = ROWS * COLUMNS // 8
"""Bytes of a panel's bitmap."""
TILES, LANES = 16, 32
ORDER = (1, 0, 2, 3)
"""The order in which the values of four neighbouring columns are stored."""


def pack_tiles(weight: Array) -> tuple[NDArray[np.uint8], Array]:
    """Cut a matrix into panels of 16 x 128, and write each as a bitmap and its kept values.

    Source: ours; SpInfer (Fan et al., EuroSys 2025) introduced bitmaps from which each lane reads its share of a product.

    In the product m16n8k16, lane l of a warp holds four numbers of row l // 4 of the upper 8 rows, and four of the lower 8.
    It counts the bits of all values stored before the middle of its four: two are stored before that place, two after it.
    In the order 1, 0, 2, 3, the values of columns 0 and 2 are next to the middle, whether or not columns 1 and 3 have one.
    A lane reads 8 neighbouring numbers of x at once. So 32 columns make two products: one with columns 0-3 of every 8, one
    with columns 4-7. A product may sum its columns in any order.

        panels: 16 rows from left to right, then the next 16
        tile t = 4 (c // 32) + 2 (c // 4 mod 2) + r // 8           for row r and column c of a panel
        lane l = 4 (r mod 8) + c // 8 mod 4                        of four numbers j = c mod 4 of that tile
        values: tile by tile, lane by lane, j = 1, 0, 2, 3
        word 16 (t // 4) + 4 (l // 8) + t mod 4 of the bitmap, byte (j + 2) mod 4 of the word, bit l mod 8 of the byte

    Parameters: weight (out, in).
    Returns: (bitmaps (panels, 256) uint8, the lowest byte of a word first; values (kept,), panel by panel).
    A weight of +0 or −0 is left out. No bit is set beyond the last row and column.

    *Deviation*: none.

    >>> bitmaps, values = pack_tiles([[3, 4, 0, 5]])
    >>> bitmaps[0, :4], values
    (array([0, 1, 1, 1], dtype=uint8), array([4., 3., 5.]))
    """
    weight = _checks.array("weight", weight, "out", "in", finite=False)
    rows, columns = weight.shape
    bitmaps = np.zeros((_panels(rows, columns), MAP), dtype=np.uint8)
    values = []
    for row, column, panel, byte, bit in _places(rows, columns):
        if row < rows and column < columns and weight[row, column] != 0:
            bitmaps[panel, byte] |= 1 << bit
            values.append(weight[row, column])
    return bitmaps, np.array(values, dtype=np.float64)


def unpack_tiles(bitmaps: NDArray[np.uint8], values: Array, rows: int, columns: int) -> Array:
    """Restore the weight from its tiles.

    Source: ours, the inverse of `pack_tiles`.

    Parameters: bitmaps, values as `pack_tiles` returns them; rows, columns: of the weight.
    Returns: the weight (rows, columns), with +0 where no value is stored.

    Errors: ValueError or TypeError for a wrong shape or dtype; a bit beyond the last row or column; a number of values
    other than the number of bits.

    *Deviation*: none.

    >>> unpack_tiles(*pack_tiles([[3, 4, 0, 5]]), 1, 4)
    array([[3., 4., 0., 5.]])
    """
    values = _checks.array("values", values, "kept", empty=True, finite=False)
    rows, columns = _checks.integer("rows", rows, 1), _checks.integer("columns", columns, 1)
    _checks.typed("bitmaps", bitmaps, np.uint8, (_panels(rows, columns), MAP))
    kept = []
    for row, column, panel, byte, bit in _places(rows, columns):
        if bitmaps[panel, byte] >> bit & 1:
            if row >= rows or column >= columns:
                raise ValueError(
                    f"bitmaps has a bit set beyond row {rows - 1} or column {columns - 1} in panel {panel}"
                )
            kept.append((row, column))
    if len(values) != len(kept):
        raise ValueError(f"values has {len(values)} entries, but bitmaps has {len(kept)} bits set")
    weight = np.zeros((rows, columns))
    for (row, column), value in zip(kept, values, strict=True):
        weight[row, column] = value
    return weight


def _panels(rows: int, columns: int) -> int:
    """Count the panels of a weight."""
    return -(-rows // ROWS) * -(-columns // COLUMNS)


def _places(rows: int, columns: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (row, column, panel, byte, bit) of every number of every panel, in the order in which values are stored."""
    across = -(-columns // COLUMNS)
    for panel in range(_panels(rows, columns)):
        top, left = panel // across * ROWS, panel % across * COLUMNS
        for tile in range(TILES):
            for lane in range(LANES):
                row = top + tile % 2 * 8 + lane // 4
                first = left + tile // 4 * 32 + lane % 4 * 8 + tile // 2 % 2 * 4
                word = tile // 4 * 16 + lane // 8 * 4 + tile % 4
                for j in ORDER:
                    yield row, first + j, panel, 4 * word + (j + 2) % 4, lane % 8

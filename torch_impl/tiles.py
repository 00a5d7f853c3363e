"""A sparse matrix as a bitmap and its kept values in the order of a GPU's matrix units. Spec: reference/tiles.py."""

from __future__ import annotations

import torch
from torch import nn

from torch_impl import _checks

ROWS, COLUMNS = 16, 128
"""Shape of a panel: 16 tiles of 8 x 16."""
MAP = ROWS * COLUMNS // 8
"""Bytes of a panel's bitmap."""
TILES, LANES = 16, 32
ORDER = (1, 0, 2, 3)
"""The order in which the values of four neighbouring columns are stored; applied twice, it restores the columns."""


def pack_tiles(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack weight (out, in) into (bitmaps (panels, 256) uint8, values (kept,)), on its device."""
    weight = _checks.tensor("weight", weight, "out", "in")
    tiled = _tiled(weight)
    kept = tiled != 0
    # Axes: 32 columns, their tile, 8 lanes of a tile, lane, byte of a word (the columns' order, rotated by two).
    bits = kept[..., list(ORDER)].roll(2, -1).view(-1, 4, 4, 4, 8, 4).permute(0, 1, 3, 2, 5, 4)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=weight.device)
    return (bits * powers).sum(-1, dtype=torch.uint8).view(-1, MAP), tiled[kept]


def unpack_tiles(bitmaps: torch.Tensor, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Restore the weight (rows, columns) from its tiles, with +0 where no value is stored."""
    values = _checks.tensor("values", values, "kept", empty=True)
    rows, columns = _checks.integer("rows", rows, 1), _checks.integer("columns", columns, 1)
    _checks.typed("bitmaps", bitmaps, torch.uint8, (-(-rows // ROWS) * -(-columns // COLUMNS), MAP))
    kept = _kept(bitmaps)
    beyond = kept & ~_tiled(torch.ones(rows, columns, dtype=torch.bool, device=kept.device))
    if bool(beyond.any()):
        panel = int(beyond.flatten(1).any(1).nonzero()[0])
        raise ValueError(f"bitmaps has a bit set beyond row {rows - 1} or column {columns - 1} in panel {panel}")
    bits = int(kept.sum())
    if len(values) != bits:
        raise ValueError(f"values has {len(values)} entries, but bitmaps has {bits} bits set")
    tiled = values.new_zeros(kept.shape)
    tiled[kept] = values
    return _untiled(tiled, rows, columns)


def count(bitmaps: torch.Tensor) -> torch.Tensor:
    """Count the values of each panel: (panels,) int64."""
    return _kept(bitmaps).sum((1, 2, 3))


def _tiled(weight: torch.Tensor) -> torch.Tensor:
    """Reorder a weight (rows, columns) to the order of its values, (panels, tiles, lanes, 4), padded with zeros."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight, (0, -columns % COLUMNS, 0, -rows % ROWS))
    # Axes: 16 rows, 8 of them, row; panel, 32 columns, lane of a row, product, column of a lane.
    parts = padded.view(-1, 2, 8, padded.shape[1] // COLUMNS, 4, 4, 2, 4)
    return parts.permute(0, 3, 4, 6, 1, 2, 5, 7)[..., list(ORDER)].reshape(-1, TILES, LANES, 4)


def _untiled(tiled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Invert `_tiled`."""
    parts = tiled[..., list(ORDER)].view(-(-rows // ROWS), -1, 4, 2, 2, 8, 4, 4).permute(0, 4, 5, 1, 2, 6, 3, 7)
    return parts.reshape(-(-rows // ROWS) * ROWS, -1)[:rows, :columns].contiguous()


def _kept(bitmaps: torch.Tensor) -> torch.Tensor:
    """Return the bits as bool (panels, tiles, lanes, 4), in the order of the values."""
    places = torch.arange(8, dtype=torch.uint8, device=bitmaps.device)
    bits = (bitmaps[..., None] >> places).bitwise_and_(1).view(torch.bool).view(-1, 4, 4, 4, 4, 8)
    return bits.permute(0, 1, 3, 2, 5, 4).roll(2, -1)[..., list(ORDER)].reshape(-1, TILES, LANES, 4)

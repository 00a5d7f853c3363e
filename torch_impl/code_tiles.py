"""A sparse matrix of codes and scales in the order of a GPU's matrix units. Spec: reference/code_tiles.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_impl import _checks
from torch_impl.quantise import GROUP, largest_code

ROWS, COLUMNS = 16, 256
"""Shape of a panel: what one warp multiplies at once."""
LANES, NUMBERS = 32, ROWS * COLUMNS // 32
"""Lanes of a warp, and numbers of a panel that each of them multiplies."""
MAP = ROWS * COLUMNS // 8
"""Bytes of a panel's bitmap."""
WORD = 4
"""Bytes of a word: what a lane reads at once."""


def pack_code_tiles(
    codes: torch.Tensor, scales: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack codes (out, in) int8 and scales: (bitmaps (panels, 512) uint8, scales (panels, 32), words (rows, 128) uint8, starts)."""
    _check_codes(codes, scales, bits)
    width, own = stream_bits(bits), _tiled(codes).int()
    kept = own != 0
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    bitmaps = (kept.view(-1, MAP, 8) * powers).sum(-1, dtype=torch.uint8)
    starts = _starts(kept, width)
    place = _fields(kept, starts, width)
    stream = torch.zeros(int(starts[-1]) * LANES * WORD * 8 // width, dtype=torch.uint8, device=codes.device)
    signed = own.abs() + (own < 0) * 2 ** (width - 1)
    stream[place[kept]] = signed[kept].to(torch.uint8)
    if width == 4:
        stream = stream[::2] | stream[1::2] << 4
    columns = -(-codes.shape[1] // COLUMNS) * (COLUMNS // GROUP)
    spread = nn.functional.pad(scales, (0, columns - scales.shape[1], 0, -len(scales) % ROWS))
    spread = spread.view(-1, ROWS, columns * GROUP // COLUMNS, COLUMNS // GROUP).transpose(1, 2)
    return bitmaps, spread.reshape(len(bitmaps), -1), stream.view(-1, LANES * WORD), starts


def unpack_code_tiles(
    bitmaps: torch.Tensor,
    scales: torch.Tensor,
    words: torch.Tensor,
    starts: torch.Tensor,
    bits: int,
    rows: int,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restore codes (rows, columns) int8 and scales (rows, ⌈columns/128⌉) float16 from their tiles."""
    rows, columns = _checks.integer("rows", rows, 1), _checks.integer("columns", columns, 1)
    width, panels = stream_bits(bits), -(-rows // ROWS) * -(-columns // COLUMNS)
    _checks.typed("bitmaps", bitmaps, torch.uint8, (panels, MAP))
    _checks.typed("scales", scales, torch.float16, (panels, ROWS * COLUMNS // GROUP))
    _checks.typed("starts", starts, torch.int64, (panels + 1,))
    powers = torch.arange(8, dtype=torch.uint8, device=bitmaps.device)
    kept = (bitmaps[..., None] >> powers).bitwise_and_(1).view(torch.bool).view(panels, LANES, NUMBERS)
    needed = _starts(kept, width)
    wrong = (starts != needed).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"starts[{first}] is {int(starts[first])}, but by bitmaps it is {int(needed[first])}")
    _checks.typed("words", words, torch.uint8, (int(starts[-1]), LANES * WORD))
    place = _fields(kept, starts, width)
    stream = words.flatten()
    if width == 4:
        stream = torch.stack([stream & 15, stream >> 4], -1).flatten()
    found = stream[place[kept]].int()
    size = found & (2 ** (width - 1) - 1)
    tiled = torch.zeros(kept.shape, dtype=torch.int8, device=bitmaps.device)
    tiled[kept] = torch.where(found == size, size, -size).to(torch.int8)
    across = -(-columns // COLUMNS)
    spread = scales.view(-1, across, ROWS, COLUMNS // GROUP).transpose(1, 2).reshape(-1, across * COLUMNS // GROUP)
    return _untiled(tiled, rows, columns), spread[:rows, : -(-columns // GROUP)].contiguous()


def stream_bits(bits: int) -> int:
    """Return the bits of a code in a stream."""
    return 4 if largest_code(bits) <= largest_code(4) else 8


def _starts(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Return each panel's first row of words, for codes of `width` bits where kept (panels, lanes, numbers) is true."""
    counts = -(-(kept.sum(-1).amax(1) * width) // (8 * WORD))
    return nn.functional.pad(counts.cumsum(0), (1, 0))


def _fields(kept: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """Return where each code lies among all fields of `width` bits: a word of a lane, then those of the next lane."""
    fields = 8 * WORD // width
    place = kept.cumsum(-1) - 1
    lanes = torch.arange(LANES, device=kept.device)[None, :, None]
    return ((starts[:-1, None, None] + place // fields) * LANES + lanes) * fields + place % fields


def _tiled(codes: torch.Tensor) -> torch.Tensor:
    """Reorder codes (rows, columns) to (panels, lanes, numbers), padded with zeros."""
    rows, columns = codes.shape
    padded = nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS))
    # Axes: 16 rows, 8 of them, row; panel, 32 columns, lane of a row, product, column of a quad.
    parts = padded.view(-1, 2, 8, padded.shape[1] // COLUMNS, COLUMNS // 32, 4, 2, 4)
    return parts.permute(0, 3, 2, 5, 4, 6, 1, 7).reshape(-1, LANES, NUMBERS)


def _untiled(tiled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Invert `_tiled`."""
    parts = tiled.view(-(-rows // ROWS), -1, 8, 4, COLUMNS // 32, 2, 2, 4).permute(0, 6, 2, 1, 4, 3, 5, 7)
    return parts.reshape(-(-rows // ROWS) * ROWS, -1)[:rows, :columns].contiguous()


def _check_codes(codes: Any, scales: Any, bits: int) -> None:
    """Check codes and their scales."""
    q = largest_code(bits)
    _checks.typed("codes", codes, torch.int8)
    if codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(f"codes has shape {tuple(codes.shape)}; allowed: (out, in), none of them 0")
    low, high = (int(value) for value in torch.aminmax(codes))
    if max(-low, high) > q:
        raise ValueError(f"codes holds {low} and {high}; allowed: {-q} to {q} with {bits} bits")
    _checks.typed("scales", scales, torch.float16, (len(codes), -(-codes.shape[1] // GROUP)))

"""A sparse matrix as a bitmap and its kept values, on tensors. Spec: reference/packed.py; the layer: decode/packed_linear.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_impl import _checks

WORD = 32
PARTS = ("bitmap", "values", "offsets")
"""The names of what `pack` returns."""
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack a weight (out, in): (bitmap (out, 4·⌈in/32⌉) uint8, values (kept,), offsets (out + 1,) int64), on its device."""
    weight = _numbers("weight", weight, "out", "in")
    bits = _bits(weight)
    kept = bits != 0
    padded = nn.functional.pad(kept, (0, -weight.shape[1] % WORD))
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=weight.device)
    bitmap = padded.view(torch.uint8).view(len(weight), -1, 8).mul(powers).sum(2, dtype=torch.uint8)
    return bitmap, bits[kept].view(weight.dtype), _running(kept.sum(1))


def unpack(bitmap: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, columns: int) -> torch.Tensor:
    """Check the packed form and restore the weight (out, in), bit for bit."""
    check(bitmap, values, offsets, columns)
    return expand(bitmap, values, columns)


def expand(bitmap: torch.Tensor, values: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack without checks, so nothing is read back from a GPU."""
    bits = torch.zeros(len(bitmap), columns, dtype=_SIGNED[values.element_size()], device=values.device)
    bits.masked_scatter_(_kept(bitmap)[:, :columns], _bits(values))
    return bits.view(values.dtype)


def check(bitmap: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, columns: int) -> None:
    """Check that `pack` can have made these tensors: shapes, dtypes, bits beyond the columns, offsets, values."""
    columns = _checks.integer("columns", columns, 1)
    bitmap, values = _typed("bitmap", bitmap, torch.uint8), _numbers("values", values, "kept")
    offsets = _typed("offsets", offsets, torch.int64)
    width = -(-columns // WORD) * WORD // 8
    if bitmap.dim() != 2 or len(bitmap) == 0 or bitmap.shape[1] != width:
        raise ValueError(
            f"bitmap has shape {tuple(bitmap.shape)}; allowed: (out, {width}) for {columns} columns, out above 0"
        )
    if offsets.shape != (len(bitmap) + 1,):
        allowed = f"({len(bitmap) + 1},), one more than bitmap's rows"
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}; allowed: {allowed}")
    last = columns // 8
    beyond = _first(_kept(bitmap[:, last:])[:, columns - 8 * last :].any(1))
    if beyond is not None:
        raise ValueError(f"bitmap has a bit set beyond column {columns - 1} in row {beyond}")
    running = _running(_popcount(bitmap).sum(1))
    row = _first(offsets != running)
    if row is not None:
        found, wanted = int(offsets[row]), int(running[row])
        raise ValueError(f"offsets[{row}] is {found}, but bitmap has {wanted} bits set before row {row}")
    if len(values) != running[-1]:
        raise ValueError(f"values has {len(values)} entries, but bitmap has {int(running[-1])} bits set")
    empty = _first(_bits(values) == 0)
    if empty is not None:
        raise ValueError(f"values[{empty}] is 0, but only nonzero values are packed")


def bits_per_weight(sparsity: float, value_bits: int, columns: int) -> float:
    """Compute (32 ⌈in/32⌉ + 64) / in + value_bits · (1 − ρ), the bits of the packed form per position of the matrix."""
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("value_bits", value_bits, 1)
    _checks.integer("columns", columns, 1)
    return (-(-columns // WORD) * WORD + 64) / columns + value_bits * (1 - sparsity)


def _bits(value: torch.Tensor) -> torch.Tensor:
    """View the same bits as signed integers, which all torch operations support."""
    return value.contiguous().view(_SIGNED[value.element_size()])


def _kept(bitmap: torch.Tensor) -> torch.Tensor:
    """Return the bits as bool (rows, 8 · bytes), lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (bitmap[:, :, None] >> places).bitwise_and_(1).view(torch.bool).flatten(1)


def _popcount(bitmap: torch.Tensor) -> torch.Tensor:
    """Count the set bits of every byte: add neighbouring bits, then pairs, then fours."""
    twos = bitmap - ((bitmap >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def _running(counts: torch.Tensor) -> torch.Tensor:
    """Return 0, then the running sums."""
    return nn.functional.pad(counts.cumsum(0), (1, 0))


def _first(wrong: torch.Tensor) -> int | None:
    """Return the index of the first True, or None."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def _tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: a tensor")
    return value


def _typed(name: str, value: Any, dtype: torch.dtype) -> torch.Tensor:
    if _tensor(name, value).dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: {str(dtype).removeprefix('torch.')}")
    return _tensor(name, value)


def _numbers(name: str, value: Any, *axes: str) -> torch.Tensor:
    """Check for floating-point or unsigned numbers of 2, 4 or 8 bytes. Only a matrix must not be empty."""
    tensor = _tensor(name, value)
    kind = tensor.is_floating_point() or tensor.dtype in _UNSIGNED
    if not kind or tensor.element_size() not in _SIGNED:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: floating-point or unsigned, of 2, 4 or 8 bytes")
    if tensor.dim() != len(axes) or (len(axes) == 2 and tensor.numel() == 0):
        allowed = f"({', '.join(axes)}){', none of them 0' * (len(axes) == 2)}"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {allowed}")
    return tensor

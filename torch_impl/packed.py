"""A sparse matrix as a bitmap and its kept values, on tensors. Spec: reference/packed.py; the layer: decode/packed_linear.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_impl import _checks
from torch_impl.quantise import FEWEST_BITS, GROUP, MOST_BITS, largest_code

WORD = 32
PARTS = ("bitmap", "values", "offsets")
"""The names of what `pack` returns."""
CODED = ("bitmap", "codes", "scales", "offsets")
"""The names of the parts of a packed matrix of codes."""
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
    values = _numbers("values", values, "kept")
    kept = _check_positions(bitmap, offsets, columns)
    if len(values) != kept:
        raise ValueError(f"values has {len(values)} entries, but bitmap has {kept} bits set")
    empty = _first(_bits(values) == 0)
    if empty is not None:
        raise ValueError(f"values[{empty}] is 0, but only nonzero values are packed")


def pack_codes(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack codes (out, in) int8: (bitmap, codes (⌈kept/8⌉, bits) uint8, offsets), on their device.

    Eight codes are `bits` bytes, each code in two's complement, the lowest bit first.
    """
    codes, q = _checks.typed("codes", codes, torch.int8), largest_code(bits)
    if codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(f"codes has shape {tuple(codes.shape)}; allowed: (out, in), none of them 0")
    low, high = (int(value) for value in torch.aminmax(codes))
    if max(-low, high) > q:
        raise ValueError(f"codes holds {low} and {high}; allowed: {-q} to {q} with {bits} bits")
    bitmap, values, offsets = pack(codes.to(torch.int16).view(torch.float16))
    fields = nn.functional.pad(values.view(torch.int16), (0, -len(values) % 8)).view(-1, 8).long() & (2**bits - 1)
    words = (fields << _places(bits, codes.device)).sum(1, keepdim=True)
    return bitmap, words.view(torch.uint8)[:, :bits].contiguous(), offsets


def unpack_codes(bitmap: torch.Tensor, codes: torch.Tensor, offsets: torch.Tensor, columns: int) -> torch.Tensor:
    """Check the packed form and restore the codes (out, in) int8."""
    _read_codes(codes, _check_positions(bitmap, offsets, columns))
    return expand_codes(bitmap, codes, columns)


def expand_codes(bitmap: torch.Tensor, codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack codes without checks."""
    found = torch.zeros(len(bitmap), columns, dtype=torch.int8, device=codes.device)
    return found.masked_scatter_(_kept(bitmap)[:, :columns], _numbers_of(codes))


def expand_coded(
    bitmap: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Unpack the weight (out, in) of codes and scales without checks, rounded once to `dtype`."""
    # A scale has 11 bits and a code 7: float32 holds their product exactly.
    wide, whole = expand_codes(bitmap, codes, columns).float(), columns // GROUP
    wide[:, : whole * GROUP].unflatten(1, (whole, GROUP)).mul_(scales[:, :whole, None])
    wide[:, whole * GROUP :].mul_(scales[:, whole:])
    return wide.to(dtype)


def check_codes(
    bitmap: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, columns: int
) -> None:
    """Check that these tensors are a packed matrix of codes with scales (out, ⌈in/128⌉) float16, finite and 0 or more."""
    kept = _check_positions(bitmap, offsets, columns)
    _read_codes(codes, kept)
    shape = len(bitmap), -(-columns // GROUP)
    if _checks.typed("scales", scales, torch.float16).shape != shape:
        raise ValueError(f"scales has shape {tuple(scales.shape)}; allowed: {shape}, one for every {GROUP} columns")
    wrong = scales[~((scales >= 0) & scales.isfinite())]
    if len(wrong):
        raise ValueError(f"scales holds {float(wrong[0]):g}; allowed: finite numbers, 0 or more")


def bits_per_weight(sparsity: float, value_bits: int, columns: int) -> float:
    """Compute (32 ⌈in/32⌉ + 64) / in + value_bits · (1 − ρ), the bits of the packed form per position of the matrix."""
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("value_bits", value_bits, 1)
    _checks.integer("columns", columns, 1)
    return (-(-columns // WORD) * WORD + 64) / columns + value_bits * (1 - sparsity)


def _read_codes(codes: torch.Tensor, kept: int) -> None:
    """Check the stream of codes."""
    if _checks.typed("codes", codes, torch.uint8).dim() != 2 or not FEWEST_BITS <= codes.shape[1] <= MOST_BITS:
        allowed = f"(kept / 8, bits), {FEWEST_BITS} to {MOST_BITS} bits"
        raise ValueError(f"codes has shape {tuple(codes.shape)}; allowed: {allowed}")
    if len(codes) != -(-kept // 8):
        raise ValueError(f"codes has {len(codes)} rows; allowed: {-(-kept // 8)}, because bitmap has {kept} bits set")
    numbers = _numbers_of(codes)
    if bool(numbers[kept:].any()):
        raise ValueError("codes has a bit set after the last code")
    q = largest_code(codes.shape[1])
    wrong = _first((numbers[:kept] == 0) | (numbers[:kept] == -q - 1))
    if wrong is not None:
        raise ValueError(f"code {wrong} is {int(numbers[wrong])}; allowed: {-q} to {q} without 0")


def _numbers_of(codes: torch.Tensor) -> torch.Tensor:
    """Return the codes (8 n,) int8 in a stream (n, bits): each row of bytes is one integer."""
    bits = codes.shape[1]
    if bits == MOST_BITS:
        return codes.flatten().view(torch.int8)
    words = (codes.long() << _places(8, codes.device)[:bits]).sum(1, keepdim=True)
    # Move the highest bit of each code to the highest of a byte, then back with its sign.
    fields = (words >> _places(bits, codes.device)).to(torch.uint8) << (8 - bits)
    return (fields.view(torch.int8) >> (8 - bits)).flatten()


def _places(bits: int, device: torch.device) -> torch.Tensor:
    """Return the first bit of each of eight fields."""
    return bits * torch.arange(8, device=device)


def _check_positions(bitmap: torch.Tensor, offsets: torch.Tensor, columns: int) -> int:
    """Check bitmap and offsets; return the number of kept positions."""
    columns = _checks.integer("columns", columns, 1)
    bitmap, offsets = _checks.typed("bitmap", bitmap, torch.uint8), _checks.typed("offsets", offsets, torch.int64)
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
    return int(running[-1])


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


def _numbers(name: str, value: Any, *axes: str) -> torch.Tensor:
    """Check for floating-point or unsigned numbers of 2, 4 or 8 bytes. Only a matrix must not be empty."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: a tensor")
    tensor = value
    kind = tensor.is_floating_point() or tensor.dtype in _UNSIGNED
    if not kind or tensor.element_size() not in _SIGNED:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: floating-point or unsigned, of 2, 4 or 8 bytes")
    if tensor.dim() != len(axes) or (len(axes) == 2 and tensor.numel() == 0):
        allowed = f"({', '.join(axes)}){', none of them 0' * (len(axes) == 2)}"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {allowed}")
    return tensor

"""Round kept values to integer codes with a scale for every group. Spec: reference/quantise.py.

All of it is computed in float64, so the same values have the same codes on every device and in every dtype.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from torch_impl import _checks

FEWEST_BITS, MOST_BITS = 2, 8
GROUP, SCALE_BITS = 128, 16
LARGEST_SCALE = torch.finfo(torch.float16).max
WORD = 32
# How many times the first token of a sequence counts in the Hessian of the inputs of attention.
FIRST_TOKEN = 50.0


def largest_code(bits: int) -> int:
    """Return the largest code q = 2^(b−1) − 1 of b bits."""
    return int(2 ** (_checks.integer("bits", bits, FEWEST_BITS, MOST_BITS) - 1) - 1)


def group_scales(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Choose the scale (groups,) float16 of each row of values (groups, n): max|v| / q, rounded up."""
    size = _checks.finite("values", values, "groups", "n").abs().amax(1).double()
    q = largest_code(bits)
    largest = float(size.max())
    if largest > LARGEST_SCALE * q:
        raise ValueError(f"values holds {largest:g} in size; allowed: at most {LARGEST_SCALE * q:g} with {bits} bits")
    exact = size / q
    nearest = exact.half()
    # The next float16 has the next pattern of bits.
    return torch.where(nearest.double() < exact, (nearest.view(torch.int16) + 1).view(torch.float16), nearest)


def nearest_codes(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Round values (groups, n) to the nearest multiples of their scales (groups,), ties to even; return codes int8."""
    v = _checks.tensor("values", values, "groups", "n").double()
    s = _checks.tensor("scales", scales, "groups").double()
    q = largest_code(bits)
    if len(s) != len(v) or float(s.min()) < 0:
        allowed = f"({len(v)},), 0 or more"
        raise ValueError(f"scales has shape {tuple(s.shape)} and holds {float(s.min())}; allowed: {allowed}")
    # 0 / 0 is not a number, v / 0 is infinite.
    steps = (v / s[:, None]).masked_fill_(s[:, None] == 0, 0.0)
    return steps.round_().clamp_(-q, q).to(torch.int8)


def quantise(values: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the values (n,) of one row in groups of consecutive ones: (codes (n,) int8, scales (⌈n/group⌉,) float16)."""
    values = _checks.tensor("values", values, "n", empty=True)
    largest_code(bits)
    grouped = _in_groups(values, group)
    if not len(values):
        return values.new_zeros(0, dtype=torch.int8), values.new_zeros(0, dtype=torch.float16)
    scales = group_scales(grouped, bits)
    return nearest_codes(grouped, scales, bits).flatten()[: len(values)], scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Return the values (n,) float64 that codes and scales stand for; float32 would hold them exactly, too."""
    if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"codes has dtype {getattr(codes, 'dtype', type(codes).__name__)}; allowed: integers")
    c = _checks.tensor("codes", codes.double(), "n", empty=True)
    s = _checks.tensor("scales", scales, "groups", empty=True).double()
    grouped = _in_groups(c, group)
    if len(s) != len(grouped):
        raise ValueError(f"scales has shape {tuple(s.shape)}; allowed: ({len(grouped)},), one for every {group} codes")
    return (s[:, None] * grouped).flatten()[: len(c)]


def quantise_rows(weight: torch.Tensor, bits: int, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (out, in) row by row: (codes (out, in) int8, scales (out, ⌈in/group⌉) float16)."""
    weight = _checks.tensor("weight", weight, "out", "in")
    rows, columns = weight.shape
    group = min(_checks.integer("group", group, 1), columns)
    # A row that is filled up with zeros has groups of its own.
    codes, scales = quantise(_filled(weight, group).flatten(), bits, group)
    return codes.view(rows, -1)[:, :columns].contiguous(), scales.view(rows, -1)


def dequantise_rows(codes: torch.Tensor, scales: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """Return the weight (out, in) float64 that codes (out, in) and scales (out, ⌈in/group⌉) stand for."""
    scales = _checks.tensor("scales", scales, "out", "groups")
    if not isinstance(codes, torch.Tensor) or codes.dim() != 2 or len(codes) != len(scales):
        shape = tuple(getattr(codes, "shape", ()))
        raise ValueError(f"codes has shape {shape}; allowed: ({len(scales)}, in), a row for each row of scales")
    rows, columns = codes.shape
    groups = -(-columns // _checks.integer("group", group, 1))
    if scales.shape[1] != groups:
        raise ValueError(f"scales has shape ({scales.shape[1]},); allowed: ({groups},), one for every {group} codes")
    group = min(group, max(1, columns))
    return dequantise(_filled(codes, group).flatten(), scales.flatten(), group).view(rows, -1)[:, :columns]


def bits_per_weight(sparsity: float, bits: int, columns: int, group: int = GROUP) -> float:
    """Compute (32 ⌈in/32⌉ + 64 + 16 ⌈in/group⌉) / in + b · (1 − ρ): bitmap, offsets, scales and codes, in bits per position."""
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    largest_code(bits)
    _checks.integer("columns", columns, 1)
    _checks.integer("group", group, 1)
    fixed = -(-columns // WORD) * WORD + 64 + SCALE_BITS * -(-columns // group)
    return fixed / columns + bits * (1 - sparsity)


def _in_groups(row: torch.Tensor, group: int) -> torch.Tensor:
    """Return (⌈n/group⌉, group), filled up with zeros."""
    group = min(_checks.integer("group", group, 1), max(1, len(row)))
    return _filled(row, group).reshape(-1, group)


def _filled(rows: torch.Tensor, group: int) -> torch.Tensor:
    """Fill up the last axis with zeros to whole groups."""
    return functional.pad(rows, (0, -rows.shape[-1] % group))

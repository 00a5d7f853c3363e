"""Sparse rows as kept values and the gaps between them. Spec: reference/gaps.py."""

from __future__ import annotations

from typing import Any

import torch

from torch_impl import _checks

CHUNK = 8
"""Entries of a stream come in chunks of so many."""


def pack_gaps(weight: torch.Tensor, segment: int, gap_bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values (entries,), codes (entries,) uint8, chunks (out, segments) int64) of weight (out, in); no loop over rows."""
    _checks.tensor("weight", weight, "out", "in")
    _checks.integer("segment", segment, 1)
    _checks.integer("gap_bits", gap_bits, 1, 8)
    rows, columns = weight.shape
    segments = -(-columns // segment)
    row, column = torch.nonzero(weight, as_tuple=True)
    stream = row * segments + column // segment
    local = column % segment
    first = torch.ones_like(stream, dtype=torch.bool)
    first[1:] = stream[1:] != stream[:-1]
    gap = local - 1 - torch.where(first, -1, local.roll(1))
    # Entries of a value: one for every 2^g columns jumped, which holds no weight, and its own.
    ends = (1 + (gap >> gap_bits)).cumsum(0)
    last = torch.bincount(stream, minlength=rows * segments).cumsum(0)
    nothing = ends.new_zeros(1)
    used = torch.cat([nothing, ends])[last].diff(prepend=nothing)
    chunks = -(-used // CHUNK)
    unused = CHUNK * chunks - used
    entries = CHUNK * int(chunks.sum())
    values = weight.new_zeros(entries)
    codes = torch.full((entries,), 2**gap_bits - 1, dtype=torch.uint8, device=weight.device)
    # Unused entries at the ends of earlier streams come before this one.
    place = ends - 1 + (unused.cumsum(0) - unused)[stream]
    values[place] = weight[row, column]
    codes[place] = (gap & (2**gap_bits - 1)).to(torch.uint8)
    stops = (CHUNK * chunks).cumsum(0)
    for extra in range(1, CHUNK):
        codes[(stops - extra)[unused >= extra]] = 0
    return values, codes, chunks.view(rows, segments)


def unpack_gaps(
    values: torch.Tensor, codes: torch.Tensor, chunks: torch.Tensor, columns: int, segment: int
) -> torch.Tensor:
    """The weight (out, columns) that `pack_gaps` was given; what it left out is +0."""
    _checks.tensor("values", values, "entries", empty=True)
    _checks.integer("columns", columns, 1)
    _checks.integer("segment", segment, 1)
    segments = -(-columns // segment)
    _check_streams(values, codes, chunks, segments)
    lengths = CHUNK * chunks.flatten()
    stream = torch.repeat_interleave(lengths)
    steps = (codes.long() + 1).cumsum(0)
    origin = torch.cat([steps.new_zeros(1), steps])[lengths.cumsum(0) - lengths][stream]
    local = steps - origin - 1
    column = stream % segments * segment + local
    kept = values != 0
    if bool(((local >= segment) | (column >= columns))[kept].any()):
        raise ValueError(f"codes leads out of a segment; allowed: {segment} of {columns} columns")
    weight = values.new_zeros(len(chunks), columns)
    weight[(stream // segments)[kept], column[kept]] = values[kept]
    return weight


def _check_streams(values: torch.Tensor, codes: Any, chunks: Any, segments: int) -> None:
    """Types and shapes that fit each other."""
    for name, tensor, kind in (("codes", codes, torch.uint8), ("chunks", chunks, torch.int64)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; allowed: a tensor")
        if tensor.dtype != kind:
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {str(kind).removeprefix('torch.')}")
    _checks.same_shape("codes", codes, values, "values")
    if chunks.dim() != 2 or chunks.shape[1] != segments or chunks.numel() == 0 or int(chunks.min()) < 0:
        raise ValueError(f"chunks has shape {tuple(chunks.shape)}; allowed: (out, {segments}), none below 0")
    if CHUNK * int(chunks.sum()) != len(values):
        raise ValueError(f"chunks counts {CHUNK * int(chunks.sum())} entries; allowed: the {len(values)} of values")


def bits_per_weight(sparsity: float, value_bits: int, gap_bits: int) -> float:
    """(v + g)(1−ρ) / (1 − ρ^(2^g)): bits of a weight if zeros fall at random, unused entries not counted."""
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("value_bits", value_bits, 1)
    _checks.integer("gap_bits", gap_bits, 1, 8)
    if sparsity == 1:
        return (value_bits + gap_bits) / 2**gap_bits
    return float((value_bits + gap_bits) * (1 - sparsity) / (1 - sparsity**2**gap_bits))

"""Which layout a packed weight has on a GPU: panels (cuda.py, cuda_coded.py) or gaps (cuda_gaps.py, cuda_coded_gaps.py).

Gaps are for few rows of x: a lane visits kept values only, but each row of x costs as much again. Panels are for more rows, and for
weights with fewer zeros, which they store in fewer bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from torch_impl import gaps, tiles
from torch_impl.decode import cuda, cuda_coded, cuda_coded_gaps, cuda_gaps

# By gpu_gaps, with 7B's shapes on one H200, where gaps were faster from 50 % zeros on: a weight has gaps if
FEW = 2
"""at most so many sequences are decoded at once,"""
MOST_KEPT = 0.55
"""at most this share of it is not 0,"""
MOST_SIZE = 1.15
"""and gaps take at most so many times the bytes of panels: more if its rows have very different numbers of zeros."""
MOST_ENTRIES = 2
"""Gaps of codes, for which the first two are measured too (gpu_coded_gaps): at most so many entries for each code that is not 0."""


def lay_out(weight: torch.Tensor, sequences: int = 1) -> cuda.Layout:
    """Lay out a weight (out, in) in bf16 or fp16, on its device, for decoding so many sequences at once.

    Errors: TypeError for another dtype.
    """
    (rows, columns), kept = weight.shape, int(weight.count_nonzero())
    if sequences <= FEW and kept <= MOST_KEPT * weight.numel():
        layout = cuda_gaps.pack_gaps_rows(weight)
        if layout.nbytes <= MOST_SIZE * _bytes_of_panels(rows, columns, kept):
            return layout
    return cuda.pack_rows(weight)


def lay_out_codes(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype, sequences: int = 1
) -> cuda.Layout:
    """Lay out codes and scales, as `cuda_coded.pack_codes`, for decoding so many sequences at once.

    Errors: TypeError for another dtype.
    """
    kept = int(codes.count_nonzero())
    if sequences <= FEW and kept <= MOST_KEPT * codes.numel():
        layout = cuda_coded_gaps.pack_codes(codes, scales, bits, dtype)
        if len(layout.data) // layout.slot * gaps.LANES * gaps.ENTRIES <= MOST_ENTRIES * kept:
            return layout
    return cuda_coded.pack_codes(codes, scales, bits, dtype)


def lay_out_joined(layouts: Sequence[cuda.Layout], sequences: int) -> cuda.Layout:
    """Lay out the rows of layouts, all of codes or none, below each other: anew, by the rule for all of them."""
    coded = [own for own in layouts if isinstance(own, cuda_coded.CodedLayout | cuda_coded_gaps.CodedGapLayout)]
    if not coded:
        return lay_out(torch.cat([cuda.unpack(own) for own in layouts]), sequences)
    codes, scales = (torch.cat(both) for both in zip(*(own.coded() for own in coded), strict=True))
    return lay_out_codes(codes, scales, max(own.bits for own in coded), coded[0].dtype, sequences)


def by_layout(sequences: Sequence[int]) -> list[list[int]]:
    """Group neighbouring numbers of sequences for which `lay_out` and `lay_out_codes` do the same."""
    return [list(numbers) for _, numbers in itertools.groupby(sequences, lambda number: number <= FEW)]


def _bytes_of_panels(rows: int, columns: int, kept: int) -> float:
    """Estimate the bytes of `cuda.pack_rows`, within 1 %: a panel is filled up by half a piece, and its start has four bytes."""
    panels = -(-rows // tiles.ROWS) * -(-columns // tiles.COLUMNS)
    return panels * (tiles.MAP + cuda.PIECE / 2 + 4) + 2 * kept

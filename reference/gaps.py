"""Sparse rows as kept values and the gaps between them: what the GPU kernels decode."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array

CHUNK = 8
"""Entries of a stream come in chunks of so many, what a GPU lane loads at once (16 bytes of 16-bit values)."""


def pack_gaps(weight: Array, segment: int, gap_bits: int) -> tuple[Array, NDArray[np.uint8], NDArray[np.int64]]:
    """Cut rows into segments, and write each segment as a stream of entries: a value, and how far it is from the last.

    Source: ours; runs of zeros coded in few bits as in Deep Compression (arXiv 1510.00149), Section 2.

        entry (code c, value v): go on c + 1 columns, there stands v; a stream starts one column before its segment
        a gap of more than 2^g columns: entries (2^g − 1, 0) in between, each 2^g columns on

    Parameters: weight (out, in); segment: columns of a stream, the last one of a row may have fewer; gap_bits g, 1 to 8.
    Returns: (values (entries,), codes (entries,) uint8, chunks (out, segments)): streams one after the other, row by row,
    each filled up with entries (0, 0) to whole chunks of 8; chunks says how many. A weight of 0, of either sign, is left out.

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: none.

    >>> values, codes, chunks = pack_gaps([[0, 5, 0, 0, 0, 0, 7, 8]], 8, 2)
    >>> values
    array([5., 0., 7., 8., 0., 0., 0., 0.])
    >>> codes, chunks
    (array([1, 3, 0, 0, 0, 0, 0, 0], dtype=uint8), array([[1]]))
    """
    weight = _checks.array("weight", weight, "out", "in", finite=False)
    _checks.integer("segment", segment, 1)
    _checks.integer("gap_bits", gap_bits, 1, 8)
    values: list[float] = []
    codes: list[int] = []
    chunks = np.zeros((len(weight), -(-weight.shape[1] // segment)), dtype=np.int64)
    for i, row in enumerate(weight):
        for s in range(chunks.shape[1]):
            part = row[s * segment : (s + 1) * segment]
            before, start = -1, len(values)
            for column in np.flatnonzero(part):
                while column - before > 2**gap_bits:
                    before += 2**gap_bits
                    values.append(0.0)
                    codes.append(2**gap_bits - 1)
                values.append(part[column])
                codes.append(int(column) - before - 1)
                before = int(column)
            chunks[i, s] = -(-(len(values) - start) // CHUNK)
            unused = start + CHUNK * int(chunks[i, s]) - len(values)
            values += [0.0] * unused
            codes += [0] * unused
    return np.array(values, dtype=np.float64), np.array(codes, dtype=np.uint8), chunks


def unpack_gaps(
    values: Array, codes: NDArray[np.uint8], chunks: NDArray[np.int64], columns: int, segment: int
) -> Array:
    """The weight that `pack_gaps` was given.

    Source: ours.

    Parameters: values, codes, chunks as `pack_gaps` returns them; columns: of the weight; segment as given to `pack_gaps`.
    Returns: the weight (out, columns); what was left out is +0.

    Errors: ValueError or TypeError naming the argument if shapes do not fit each other or a stream leaves its segment.

    *Deviation*: none.

    >>> unpack_gaps(*pack_gaps([[0, 5, 0, 0, 0, 0, 7, 8]], 4, 2), 8, 4)
    array([[0., 5., 0., 0., 0., 0., 7., 8.]])
    """
    values = _checks.array("values", values, "entries", empty=True, finite=False)
    _checks.integer("columns", columns, 1)
    _checks.integer("segment", segment, 1)
    _check_streams(values, codes, chunks, -(-columns // segment))
    weight = np.zeros((len(chunks), columns))
    entry = 0
    for i in range(len(chunks)):
        for s in range(chunks.shape[1]):
            column = s * segment - 1
            for _ in range(CHUNK * int(chunks[i, s])):
                column += int(codes[entry]) + 1
                if values[entry] != 0:
                    if column >= min((s + 1) * segment, columns):
                        raise ValueError(f"codes leads out of a segment; allowed: {segment} of {columns} columns")
                    weight[i, column] = values[entry]
                entry += 1
    return weight


def _check_streams(values: Array, codes: Any, chunks: Any, segments: int) -> None:
    """Types and shapes that fit each other."""
    for name, array, kind in (("codes", codes, "uint8"), ("chunks", chunks, "int64")):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} is {type(array).__name__}; allowed: an array of real numbers")
        if array.dtype != kind:
            raise TypeError(f"{name} has dtype {array.dtype}; allowed: {kind}")
    _checks.same_shape("codes", codes, values, "values")
    if chunks.ndim != 2 or chunks.shape[1] != segments or chunks.size == 0 or chunks.min() < 0:
        raise ValueError(f"chunks has shape {chunks.shape}; allowed: (out, {segments}), none below 0")
    if CHUNK * int(chunks.sum()) != len(values):
        raise ValueError(f"chunks counts {CHUNK * int(chunks.sum())} entries; allowed: the {len(values)} of values")


def bits_per_weight(sparsity: float, value_bits: int, gap_bits: int) -> float:
    """What a weight costs in this form if zeros fall at random.

    Source: ours.

        bits = (v + g) · (1−ρ) / (1 − ρ^(2^g))       with P(gap > k) = ρ^k: a kept weight needs 1 / (1 − ρ^(2^g)) entries
        bits = (v + g) / 2^g                         the limit at ρ = 1

    Parameters: sparsity ρ in [0, 1]; value_bits v; gap_bits g, 1 to 8. Returns: bits per weight, without the unused
    entries of last chunks. A bitmap costs 1 + v (1−ρ).

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: none.

    >>> [round(bits_per_weight(s, 16, 3), 2) for s in (0.5, 0.6, 0.7)]
    [9.54, 7.73, 6.05]
    """
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("value_bits", value_bits, 1)
    _checks.integer("gap_bits", gap_bits, 1, 8)
    if sparsity == 1:
        return float((value_bits + gap_bits) / 2**gap_bits)
    return float((value_bits + gap_bits) * (1 - sparsity) / (1 - sparsity**2**gap_bits))

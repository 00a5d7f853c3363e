"""A sparse matrix without its zeros: a bitmap of the kept positions, the kept values, and the offset of each row.

Legend: a weight (out, in) is any matrix of 2-, 4- or 8-byte numbers. Only their bits matter. NumPy has no bfloat16: pass
it as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks

WORD = 32


def pack(weight: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.int64]]:
    """Pack a matrix.

    Source: ours; a bitmap with packed values is the input of AVX-512's VPEXPANDW.

        bit j of row i = 1 unless all bits of w_ij are 0
        values = w_ij where that bit is 1, row by row;   offsets_i = number of kept weights in rows 0 .. i − 1

    Parameters: weight (out, in), of float16, float32, float64, uint16, uint32 or uint64.

    Returns: bitmap (out, 4·⌈in/32⌉) uint8, the lowest bit of a byte first, 0 beyond the last column; values (kept,) of the
    weight's dtype; offsets (out + 1,) int64, from 0 to the number of kept weights.

    Rounding: none. A negative zero has its sign bit set, so it is kept. NaN keeps its payload.

    *Deviation*: the paper names no format.

    >>> pack(np.array([[0, 7, 0, 5], [0, 0, 0, 0], [9, 0, 0, 0]], dtype=np.uint16))
    (array([[10,  0,  0,  0], [ 0,  0,  0,  0], [ 1,  0,  0,  0]], dtype=uint8),
     array([7, 5, 9], dtype=uint16),
     array([0, 2, 2, 3]))
    """
    weight = _numbers("weight", weight, "out", "in")
    kept = _bits(weight) != 0
    padded = np.pad(kept, ((0, 0), (0, -weight.shape[1] % WORD)))
    offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int64)
    return np.packbits(padded, axis=1, bitorder="little"), weight[kept], offsets


def unpack(bitmap: NDArray[np.uint8], values: NDArray[Any], offsets: NDArray[np.int64], columns: int) -> NDArray[Any]:
    """Restore the packed matrix, bit for bit.

    Source: ours, the inverse of `pack`.

    Parameters: bitmap, values, offsets as `pack` returns them; columns, the number of inputs. Returns: weight (out, in) of
    the values' dtype.

    Errors: as `check`.

    *Deviation*: none.

    >>> unpack(*pack(np.array([[0, 7, 0], [5, 0, 0]], dtype=np.uint16)), columns=3)
    array([[0, 7, 0], [5, 0, 0]], dtype=uint16)
    """
    check(bitmap, values, offsets, columns)
    weight = np.zeros((len(bitmap), columns), dtype=values.dtype)
    for row in range(len(bitmap)):
        kept = np.unpackbits(bitmap[row], count=columns, bitorder="little") == 1
        weight[row, kept] = values[offsets[row] : offsets[row + 1]]
    return weight


def check(bitmap: NDArray[np.uint8], values: NDArray[Any], offsets: NDArray[np.int64], columns: int) -> None:
    """Check that `pack` can have made these arrays. Each matrix has exactly one packed form.

    Source: ours.

    Parameters: bitmap, values, offsets as `pack` returns them; columns, the number of inputs. Returns: nothing.

    Errors: ValueError or TypeError for a wrong shape or dtype; a bit beyond the last column; offsets that are not the
    running count of bits; a number of values other than the number of bits; a value whose bits are all 0.

    *Deviation*: none.

    >>> bitmap, values, offsets = pack(np.array([[0, 7, 0], [5, 0, 0]], dtype=np.uint16))
    >>> check(bitmap, values[:1], offsets, columns=3)
    Traceback (most recent call last):
    ValueError: values has 1 entries, but bitmap has 2 bits set
    """
    columns = _checks.integer("columns", columns, 1)
    bitmap, values = _typed("bitmap", bitmap, np.uint8), _numbers("values", values, "kept")
    offsets = _typed("offsets", offsets, np.int64)
    width = -(-columns // WORD) * WORD // 8
    if bitmap.ndim != 2 or len(bitmap) == 0 or bitmap.shape[1] != width:
        raise ValueError(f"bitmap has shape {bitmap.shape}; allowed: (out, {width}) for {columns} columns, out above 0")
    if offsets.shape != (len(bitmap) + 1,):
        raise ValueError(
            f"offsets has shape {offsets.shape}; allowed: ({len(bitmap) + 1},), one more than bitmap's rows"
        )
    bits = np.unpackbits(bitmap, axis=1, bitorder="little")
    beyond = np.flatnonzero(bits[:, columns:].any(axis=1))
    if len(beyond):
        raise ValueError(f"bitmap has a bit set beyond column {columns - 1} in row {beyond[0]}")
    running = np.concatenate([[0], bits.sum(axis=1, dtype=np.int64).cumsum()])
    wrong = np.flatnonzero(offsets != running)
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"offsets[{row}] is {offsets[row]}, but bitmap has {running[row]} bits set before row {row}")
    if len(values) != running[-1]:
        raise ValueError(f"values has {len(values)} entries, but bitmap has {running[-1]} bits set")
    empty = np.flatnonzero(_bits(values) == 0)
    if len(empty):
        raise ValueError(f"values[{empty[0]}] is 0, but only nonzero values are packed")


def bits_per_weight(sparsity: float, value_bits: int, columns: int) -> float:
    """Compute the size of the packed form, in bits per position of the matrix.

    Source: ours.

        (32 ⌈in/32⌉ + 64) / in + value_bits · (1 − ρ)        one bit a position, a 64-bit offset a row, the kept values

    Parameters: sparsity ρ, the share of zeros, in [0, 1]; value_bits of one value; columns, the number of inputs. Returns:
    bits, without the last offset.

    *Deviation*: none.

    >>> bits_per_weight(0.75, 16, 4096)
    5.015625
    """
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("value_bits", value_bits, 1)
    _checks.integer("columns", columns, 1)
    return (-(-columns // WORD) * WORD + 64) / columns + value_bits * (1 - sparsity)


def _bits(value: NDArray[Any]) -> NDArray[Any]:
    """View the same bits as unsigned integers."""
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")


def _array(name: str, value: Any) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array of real numbers")
    return value


def _typed(name: str, value: Any, dtype: type) -> NDArray[Any]:
    if _array(name, value).dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: {np.dtype(dtype)}")
    return np.asarray(value)


def _numbers(name: str, value: Any, *axes: str) -> NDArray[Any]:
    """Check for an array of floating-point or unsigned numbers of 2, 4 or 8 bytes. Only a matrix must not be empty."""
    if _array(name, value).dtype.kind not in "fu" or value.dtype.itemsize not in (2, 4, 8):
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: floating-point or unsigned, of 2, 4 or 8 bytes")
    if value.ndim != len(axes) or (len(axes) == 2 and value.size == 0):
        raise ValueError(
            f"{name} has shape {value.shape}; allowed: ({', '.join(axes)}){', none of them 0' * (len(axes) == 2)}"
        )
    return np.asarray(value)

"""A sparse matrix without its zeros: a bitmap of the kept positions, the kept values, and the offset of each row.

Legend: a weight (out, in) is any matrix of 2-, 4- or 8-byte numbers. Only their bits matter. NumPy has no bfloat16: pass
it as uint16. Rounded weights (quantise.py) are packed as codes of b bits, q = 2^(b−1) − 1 the largest, with their scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference.quantise import FEWEST_BITS, GROUP, MOST_BITS, largest_code

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
    values = _numbers("values", values, "kept")
    kept = int(_check_positions(bitmap, offsets, columns).sum())
    if len(values) != kept:
        raise ValueError(f"values has {len(values)} entries, but bitmap has {kept} bits set")
    empty = np.flatnonzero(_bits(values) == 0)
    if len(empty):
        raise ValueError(f"values[{empty[0]}] is 0, but only nonzero values are packed")


def pack_codes(codes: NDArray[np.int8], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    """Pack a matrix of integer codes, each in b bits.

    Source: ours (decision 56).

        bitmap and offsets as `pack`, of the codes that are not 0
        the kept codes, row by row, in two's complement of b bits, are one stream of bits, the lowest bit of a byte first

    Parameters: codes (out, in) int8, from −q to q; bits b from 2 to 8. Returns: bitmap (out, 4·⌈in/32⌉) uint8; codes
    (⌈kept/8⌉, b) uint8, eight codes in each row of b bytes, filled up with zeros; offsets (out + 1,) int64.

    Rounding: none.

    *Deviation*: the paper names no format.

    >>> pack_codes(np.array([[0, 7, -1, 0]], dtype=np.int8), bits=4)  # −1 is 1111, 7 is 0111
    (array([[6, 0, 0, 0]], dtype=uint8),
     array([[247,   0,   0,   0]], dtype=uint8),
     array([0, 2]))
    """
    codes, q = _checks.typed("codes", codes, np.int8), largest_code(bits)
    if codes.ndim != 2 or codes.size == 0:
        raise ValueError(f"codes has shape {codes.shape}; allowed: (out, in), none of them 0")
    if np.abs(codes.astype(np.int64)).max() > q:
        raise ValueError(f"codes holds {codes.min()} and {codes.max()}; allowed: {-q} to {q} with {bits} bits")
    bitmap, values, offsets = pack(codes.view(np.uint8).astype(np.uint16))
    filled = np.pad(values.astype(np.uint8), (0, -len(values) % 8)).reshape(-1, 8, 1)
    stream = np.unpackbits(filled, axis=2, count=bits, bitorder="little").reshape(len(filled), 8 * bits)
    return bitmap, np.packbits(stream, axis=1, bitorder="little"), offsets


def unpack_codes(
    bitmap: NDArray[np.uint8], codes: NDArray[np.uint8], offsets: NDArray[np.int64], columns: int
) -> NDArray[np.int8]:
    """Restore the packed codes.

    Source: ours, the inverse of `pack_codes`.

    Parameters: bitmap, codes, offsets as `pack_codes` returns them; columns, the number of inputs. Returns: codes (out, in)
    int8.

    Errors: as `check_codes`.

    *Deviation*: none.

    >>> unpack_codes(*pack_codes(np.array([[0, 7, -1, 0]], dtype=np.int8), bits=4), columns=4)
    array([[ 0,  7, -1,  0]], dtype=int8)
    """
    kept = _check_positions(bitmap, offsets, columns)
    found = np.zeros(kept.shape, dtype=np.int8)
    found[kept] = _read_codes(codes, int(kept.sum()))
    return found


def check_codes(
    bitmap: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    offsets: NDArray[np.int64],
    columns: int,
) -> None:
    """Check that these arrays are a packed matrix of codes and its scales, one for every 128 columns of a row.

    Source: ours.

    Parameters: bitmap, codes, offsets as `pack_codes` returns them; scales (out, ⌈in/128⌉) float16; columns, the number of
    inputs. Returns: nothing.

    Errors: as `check`, with codes in place of values; also ValueError for a code of −2^(b−1), a bit set after the last code,
    a scale that is negative or not finite.

    *Deviation*: none.

    >>> packed = pack_codes(np.array([[0, 7, -1, 0]], dtype=np.int8), bits=4)
    >>> check_codes(packed[0], packed[1], np.array([[-1]], dtype=np.float16), packed[2], columns=4)
    Traceback (most recent call last):
    ValueError: scales holds -1; allowed: finite numbers, 0 or more
    """
    kept = _check_positions(bitmap, offsets, columns)
    _read_codes(codes, int(kept.sum()))
    shape = len(kept), -(-columns // GROUP)
    if _checks.typed("scales", scales, np.float16).shape != shape:
        raise ValueError(f"scales has shape {scales.shape}; allowed: {shape}, one for every {GROUP} columns")
    wrong = scales[~((scales >= 0) & np.isfinite(scales))]
    if len(wrong):
        raise ValueError(f"scales holds {wrong[0]:g}; allowed: finite numbers, 0 or more")


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


def _read_codes(codes: NDArray[np.uint8], kept: int) -> NDArray[np.int8]:
    """Check the stream of codes and return them (kept,)."""
    codes = _checks.typed("codes", codes, np.uint8)
    if codes.ndim != 2 or not FEWEST_BITS <= codes.shape[1] <= MOST_BITS:
        raise ValueError(f"codes has shape {codes.shape}; allowed: (kept / 8, bits), {FEWEST_BITS} to {MOST_BITS} bits")
    bits = codes.shape[1]
    if len(codes) != -(-kept // 8):
        raise ValueError(f"codes has {len(codes)} rows; allowed: {-(-kept // 8)}, because bitmap has {kept} bits set")
    stream = np.unpackbits(codes, axis=1, bitorder="little").reshape(-1, bits)
    # Two's complement: the highest bit counts −2^(b−1).
    numbers = stream @ np.array([*(2**place for place in range(bits - 1)), -(2 ** (bits - 1))])
    if numbers[kept:].any():
        raise ValueError("codes has a bit set after the last code")
    numbers = numbers[:kept]
    wrong = np.flatnonzero((numbers == 0) | (numbers == -(2 ** (bits - 1))))
    if len(wrong):
        q = largest_code(bits)
        raise ValueError(f"code {wrong[0]} is {numbers[wrong[0]]}; allowed: {-q} to {q} without 0")
    return numbers.astype(np.int8)


def _check_positions(bitmap: NDArray[np.uint8], offsets: NDArray[np.int64], columns: int) -> NDArray[np.bool_]:
    """Check bitmap and offsets; return the kept positions (out, in)."""
    columns = _checks.integer("columns", columns, 1)
    bitmap, offsets = _checks.typed("bitmap", bitmap, np.uint8), _checks.typed("offsets", offsets, np.int64)
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
    return bits[:, :columns] == 1


def _bits(value: NDArray[Any]) -> NDArray[Any]:
    """View the same bits as unsigned integers."""
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")


def _numbers(name: str, value: Any, *axes: str) -> NDArray[Any]:
    """Check for an array of floating-point or unsigned numbers of 2, 4 or 8 bytes. Only a matrix must not be empty."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array of real numbers")
    if value.dtype.kind not in "fu" or value.dtype.itemsize not in (2, 4, 8):
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: floating-point or unsigned, of 2, 4 or 8 bytes")
    if value.ndim != len(axes) or (len(axes) == 2 and value.size == 0):
        raise ValueError(
            f"{name} has shape {value.shape}; allowed: ({', '.join(axes)}){', none of them 0' * (len(axes) == 2)}"
        )
    return np.asarray(value)

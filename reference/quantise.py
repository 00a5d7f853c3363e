"""Round kept values to a few bits: integer codes, and one scale for every group of them.

Legend: b bits, q = 2^(b−1) − 1 the largest code, c codes, s scales. A group is `group` consecutive entries of a row. An entry
that is 0 has code 0 and does not influence the scale. So a group may be of kept values, in packed order, or of the columns
of a row with its zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array

# Numbers of bits from 2, where codes are −1, 0 and 1, to 8, a byte.
FEWEST_BITS, MOST_BITS = 2, 8
# Columns of a group that share a scale, and the bits of a scale.
GROUP, SCALE_BITS = 128, 16
LARGEST_SCALE = float(np.finfo(np.float16).max)
WORD = 32
# How many times the first token of a sequence counts in the Hessian of the inputs of attention.
FIRST_TOKEN = 50.0


def largest_code(bits: int) -> int:
    """Return the largest code of b bits.

    Source: the usual symmetric rounding.

        q = 2^(b−1) − 1

    Parameters: bits b from 2 to 8. Returns: q.

    *Deviation*: none.

    >>> [largest_code(b) for b in (2, 4, 8)]
    [1, 7, 127]
    """
    return int(2 ** (_checks.integer("bits", bits, FEWEST_BITS, MOST_BITS) - 1) - 1)


def group_scales(values: Array, bits: int) -> NDArray[np.float16]:
    """Choose the scale of each group: the largest value becomes the largest code.

    Source: the usual symmetric rounding.

        s = max|v| / q, rounded up to float16

    Parameters: values v (groups, n), at most 65504·q in size; bits b from 2 to 8. Returns: s (groups,) float16; 0 for a group
    of zeros, else above 0.

    Rounding: up, before codes are computed, so no value is cut off and no error exceeds s / 2.

    *Deviation*: GPTQ's code can also try smaller scales, for the least squared error of the weights. That made the weights'
    error smaller and the perplexity larger (decision 49).

    >>> group_scales([[7.0, 0.0, -14.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], bits=4)  # 1/7 is between 0.14282 and 0.14294
    array([2.   , 0.   , 0.143], dtype=float16)
    """
    v = _checks.array("values", values, "groups", "n")
    q = largest_code(bits)
    size = np.abs(v).max(axis=1)
    if size.max() > LARGEST_SCALE * q:
        raise ValueError(
            f"values holds {size.max():g} in size; allowed: at most {LARGEST_SCALE * q:g} with {bits} bits"
        )
    scales = (size / q).astype(np.float16)
    too_small = scales < size / q
    scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
    return scales


def nearest_codes(values: Array, scales: NDArray[Any], bits: int) -> NDArray[np.int8]:
    """Round each value to the nearest multiple of its group's scale.

    Source: the usual symmetric rounding.

        c = min(max(rint(v / s), −q), q);   0 where s = 0

    Parameters: values v (groups, n); scales s (groups,), 0 or more; bits b from 2 to 8. Returns: c (groups, n) int8.

    Ties: rint rounds a half to the even number.

    *Deviation*: none.

    >>> nearest_codes([[0.5, 1.5, -1.5, 9.0]], [1.0], bits=4)
    array([[ 0,  2, -2,  7]], dtype=int8)
    """
    v, s = _checks.array("values", values, "groups", "n"), _checks.array("scales", scales, "groups")
    q = largest_code(bits)
    if len(s) != len(v) or s.min() < 0:
        raise ValueError(f"scales has shape {s.shape} and holds {s.min()}; allowed: ({len(v)},), 0 or more")
    steps = np.divide(v, s[:, None], out=np.zeros(v.shape), where=s[:, None] > 0)
    return np.clip(np.rint(steps), -q, q).astype(np.int8)


def quantise(values: Array, bits: int, group: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round the values of one row, in groups of consecutive ones.

    Source: ours; `group_scales` for each group, then `nearest_codes`.

    Parameters: values (n,), kept values in packed order or a row with its zeros; bits b from 2 to 8; group ≥ 1, the last
    group may be shorter. Returns: (codes (n,) int8 from −q to q, scales (⌈n/group⌉,) float16).

    Ties and rounding: as in these two. What `dequantise` returns is rounded to itself, unless its scale is below 6.1·10⁻⁵,
    where float16 has fewer digits.

    *Deviation*: none.

    >>> quantise([1.5, 7.0, -0.25, 0.0, 2.0], bits=4, group=3)
    (array([2, 7, 0, 0, 7], dtype=int8), array([1.   , 0.286], dtype=float16))
    """
    values = _checks.array("values", values, "n", empty=True)
    largest_code(bits)
    grouped = _in_groups(values, group)
    if not len(values):
        return np.zeros(0, dtype=np.int8), np.zeros(0, dtype=np.float16)
    scales = group_scales(grouped, bits)
    return nearest_codes(grouped, scales, bits).ravel()[: len(values)], scales


def dequantise(codes: NDArray[Any], scales: NDArray[Any], group: int) -> Array:
    """Return the values that codes and scales stand for.

    Source: ours, the inverse of `quantise` up to rounding.

        v_i = s_⌊i/group⌋ · c_i

    Parameters: codes (n,) integers; scales (⌈n/group⌉,); group. Returns: values (n,), exact in float32 and above.

    *Deviation*: none.

    >>> dequantise(np.array([2, 7, 0, 0, 7]), [1.0, 0.25], group=3)
    array([2.  , 7.  , 0.  , 0.  , 1.75])
    """
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes has dtype {codes.dtype}; allowed: integers")
    c, s = _checks.array("codes", codes, "n", empty=True), _checks.array("scales", scales, "groups", empty=True)
    grouped = _in_groups(c, group)
    if len(s) != len(grouped):
        raise ValueError(f"scales has shape {s.shape}; allowed: ({len(grouped)},), one for every {group} codes")
    return (s[:, None] * grouped).ravel()[: len(c)]


def quantise_rows(weight: Array, bits: int, group: int = GROUP) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round a matrix row by row.

    Source: ours; `quantise` for each row with its zeros.

    Parameters: weight (out, in); bits b from 2 to 8; group ≥ 1. Returns: (codes (out, in) int8, scales (out, ⌈in/group⌉)
    float16).

    *Deviation*: none.

    >>> quantise_rows([[7.0, 0.0, 2.0], [0.0, 0.0, -14.0]], bits=4, group=2)
    (array([[ 7,  0,  7],
           [ 0,  0, -7]], dtype=int8),
     array([[1.   , 0.286],
           [0.   , 2.   ]], dtype=float16))
    """
    rows = [quantise(row, bits, group) for row in _checks.array("weight", weight, "out", "in")]
    return np.stack([codes for codes, _ in rows]), np.stack([scales for _, scales in rows])


def dequantise_rows(codes: NDArray[Any], scales: NDArray[Any], group: int = GROUP) -> Array:
    """Return the matrix that codes and scales stand for.

    Source: ours; `dequantise` for each row.

    Parameters: codes (out, in) integers; scales (out, ⌈in/group⌉); group. Returns: weight (out, in), exact in float32 and
    above.

    *Deviation*: none.

    >>> dequantise_rows(np.array([[7, 0, 7]]), [[1.0, 0.25]], group=2)
    array([[7.  , 0.  , 1.75]])
    """
    codes, scales = np.asarray(codes), _checks.array("scales", scales, "out", "groups")
    if codes.ndim != 2 or len(codes) != len(scales):
        raise ValueError(f"codes has shape {codes.shape}; allowed: ({len(scales)}, in), a row for each row of scales")
    return np.stack([dequantise(row, own, group) for row, own in zip(codes, scales, strict=True)])


def bits_per_weight(sparsity: float, bits: int, columns: int, group: int = GROUP) -> float:
    """Compute the size of a sparse matrix of codes, in bits per position, with one scale for every `group` columns.

    Source: ours (decision 49), as `packed.bits_per_weight`.

        (32 ⌈in/32⌉ + 64 + 16 ⌈in/group⌉) / in + b · (1 − ρ)        bitmap, offsets, scales and codes

    Parameters: sparsity ρ, the share of zeros, in [0, 1]; bits b from 2 to 8; columns, the number of inputs; group ≥ 1.
    Returns: bits, without the last offset.

    *Deviation*: none.

    >>> [round(bits_per_weight(s, b, 4096), 2) for s, b in ((0.5, 4), (0.7, 4), (0.7, 8))]
    [3.14, 2.34, 3.54]
    """
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    largest_code(bits)
    _checks.integer("columns", columns, 1)
    _checks.integer("group", group, 1)
    fixed = -(-columns // WORD) * WORD + 64 + SCALE_BITS * -(-columns // group)
    return fixed / columns + bits * (1 - sparsity)


def _in_groups(row: Array, group: int) -> Array:
    """Return (⌈n/group⌉, group), filled up with zeros."""
    group = min(_checks.integer("group", group, 1), max(1, len(row)))
    return np.pad(row, (0, -len(row) % group)).reshape(-1, group)

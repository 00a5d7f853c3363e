"""The base weight of a masked adapter, compressed while the adapter is trained (as QLoRA does, arXiv 2305.14314).

A base W (out, in) is kept as packed.py stores it, and unpacked only while its projection is computed:

    values as they are:  W = unpack(pack(W)), bit for bit
    rounded values:      W = s·c, with codes c and scales s of `round_base`

Output, gradients and merging are those of adapter.py over this W: y = x(M⊙(W + sBA))ᵀ, M = W ≠ 0. Only A and B are trained.
Rounding keeps the mask, so the adapter acts on the same positions. It happens when pruning or reconstruction changes the base. The
merged weight that is saved is not rounded again (decision 72).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array
from reference.quantise import GROUP, MOST_BITS, dequantise_rows, group_scales, nearest_codes


def round_base(
    weight: Array, scales: NDArray[np.float16] | None = None, group: int = GROUP
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round a base weight to codes of 8 bits that are 0 only where it is.

    Source: ours (decision 72); `quantise.group_scales` for each group of columns of a row, then

        c = rint(w / s),   but ±1 with the sign of w where that is 0 and w is not

    Parameters: weight w (out, in); scales (out, ⌈in/group⌉) of an earlier rounding, if any; group ≥ 1 columns. Returns: (codes
    (out, in) int8, scales (out, ⌈in/group⌉) float16).

    Ties and rounding: to even. A group whose values are s·c with its earlier scale, rounded to the weight's dtype, keeps scale
    and codes. So a base that has only lost weights is not rounded a second time. The error of a value is at most s/2, and below
    s where |w| < s/2.

    *Deviation*: rounding to nearest would give small kept weights code 0; they would leave the mask.

    >>> codes, scales = round_base([[127.0, 0.1, 0.0, -2.5]])
    >>> codes, scales
    (array([[127,   1,   0,  -2]], dtype=int8), array([[1.]], dtype=float16))
    >>> round_base([[0.0, 1.0, 0.0, -2.0]], scales)  # lost the largest, and keeps its scale
    (array([[ 0,  1,  0, -2]], dtype=int8), array([[1.]], dtype=float16))
    """
    W = _checks.array("weight", weight, "out", "in")
    dtype = np.asarray(weight).dtype
    group = min(_checks.integer("group", group, 1), W.shape[1])
    fresh = group_scales(_grouped(W, group), MOST_BITS).reshape(len(W), -1)
    codes = _codes(W, fresh, group)
    if scales is None:
        return codes, fresh
    s = _checks.array("scales", scales, "out", "groups")
    if s.shape != fresh.shape or s.min() < 0:
        raise ValueError(f"scales has shape {s.shape} and holds {s.min()}; allowed: {fresh.shape}, 0 or more")
    earlier = _codes(W, s, group)
    meant = dequantise_rows(earlier, s, group).astype(dtype if dtype.kind == "f" else np.float64)
    stays = (
        _grouped(meant == W, group).all(axis=1, where=_grouped(np.ones(W.shape, dtype=bool), group)).reshape(s.shape)
    )
    of_columns = np.repeat(stays, group, axis=1)[:, : W.shape[1]]
    return np.where(of_columns, earlier, codes), np.where(stays, s, fresh).astype(np.float16)


def _codes(W: Array, scales: NDArray[Any], group: int) -> NDArray[np.int8]:
    """Round to the nearest code, but not to 0 what is not 0."""
    c = nearest_codes(_grouped(W, group), scales.ravel(), MOST_BITS).reshape(len(W), -1)[:, : W.shape[1]]
    return np.where((c == 0) & (W != 0), np.sign(W), c).astype(np.int8)


def _grouped(rows: NDArray[Any], group: int) -> NDArray[Any]:
    """Return the groups of all rows (out · groups, group), filled up with zeros."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % group))).reshape(-1, group)

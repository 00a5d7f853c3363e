"""Magnitude pruning: remove the smallest weights."""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.method import Method
from reference.masks.select import matrix_mask

# |W|, compared in the whole matrix.
METHOD = Method.by_score("magnitude", lambda W, _: np.abs(W), whole_matrix=True)


def magnitude_mask(weight: Array, sparsity: float) -> Mask:
    """Prune the weights of smallest magnitude in the whole matrix.

    Source: the baseline of Wanda (arXiv 2306.11695).

        score = |W|

    Parameters: weight W (out, in); sparsity in [0, 1]. Returns: bool (out, in), True = kept.

    Ties: the first in row-major order is pruned first.

    *Deviation*: none.

    >>> magnitude_mask([[-3, 1], [2, 0]], 0.5)
    array([[ True, False],
           [ True, False]])
    """
    weight = _checks.array("weight", weight, "out", "in")
    return matrix_mask(np.abs(weight), sparsity)

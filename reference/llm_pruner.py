"""LLM-Pruner, a baseline: remove the heads and channels whose weights the loss depends on least, by first-order importance.

A structure is all rows and columns that must go together, see `masks/structured.py`. Legend: W (out × in) a projection's weight,
G its gradient, u structures of one kind: equal runs of rows or columns of a projection, L blocks.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array
from reference.sparsity import middle_sparsity


def taylor_score(weight: Array, gradient: Array) -> Array:
    """Estimate how much the loss depends on each weight.

    Source: LLM-Pruner (arXiv 2305.11627), Eq. 5, first order, for each parameter.

        |W_ij · G_ij|

    Parameters: weight W (out, in); gradient G (out, in) of the loss over the whole calibration text. Returns: (out, in).

    *Deviation*: the second-order term of Eq. 5 is left out, as in the published default (param_first).

    >>> taylor_score([[2, -1]], [[1, 5]])
    array([[2., 5.]])
    """
    W, G = _checks.array("weight", weight, "out", "in"), _checks.array("gradient", gradient, "out", "in")
    _checks.same_shape("gradient", G, W, "weight")
    return np.abs(W * G)


def structure_sum(score: Array, structures: int, axis: int) -> Array:
    """Sum the scores of the weights that each structure has in a projection.

    Source: LLM-Pruner, Section 3.2, aggregation by summation. A structure's score is the sum over its projections.

        S_u = Σ of score_ij over the rows (axis 0) or columns (axis 1) of run u

    Parameters: score (out, in); structures u, a divisor of the rows or columns; axis 0 or 1. Returns: (u,). *Deviation*: none.

    >>> structure_sum([[1, 2, 3, 4], [5, 6, 7, 8]], 2, axis=1)  # 1 + 2 + 5 + 6, 3 + 4 + 7 + 8
    array([14., 22.])
    """
    score = _checks.array("score", score, "out", "in")
    _checks.integer("axis", axis, 0, 1)
    lines = score.sum(axis=1 - axis)
    _checks.integer("structures", structures, 1)
    if len(lines) % structures:
        raise ValueError(f"structures is {structures}; allowed: a divisor of {len(lines)}")
    return lines.reshape(structures, -1).sum(axis=1)


def rates_between(target: float, weights: Array, first: int, last: int) -> Array:
    """Prune the blocks in the middle, all alike, and so much more that the model reaches the target.

    Source: LLM-Pruner, Section 4.1: at 7B the first four and the last two of 32 blocks stay whole.

        ρ_l = `sparsity.middle_sparsity` with dense ends  for first ≤ l < L − last,   0 for the others

    Parameters: target s in [0, 1]; weights w (L,), prunable weights per block, above 0; first, last: numbers of blocks that stay,
    together fewer than L. Returns: ρ (L,).

    Errors: as `sparsity.middle_sparsity`.

    *Deviation*: the paper gives the rate of the blocks that are pruned, 0.25 for 20 % of the model.

    >>> rates_between(0.25, [1, 1, 1, 1], first=1, last=1)
    array([0. , 0.5, 0.5, 0. ])
    """
    rates = np.zeros(len(_checks.array("weights", weights, "L")))
    inner = middle_sparsity(target, weights, rates, first, last)
    rates[first : len(rates) - last] = inner
    return rates

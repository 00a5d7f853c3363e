"""Representation mutual information (RMI): how much information each block shares with the others.

A block that shares much is redundant, so it can be pruned more.

Legend: L blocks, n calibration sequences.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array
from reference.hsic import nhsic


def nhsic_matrix(grams: Array) -> Array:
    """Compute nHSIC for every pair of blocks.

    Source: LoSA, Eq. 4.

    Parameters: grams (L, n, n), one Gram matrix of hidden states per block, n ≥ 2. Returns: (L, L), symmetric, in
    [0, 1]; the diagonal is exactly 1, also for a constant representation.

    *Deviation*: X_l is the output of block l; the published code uses its input.

    >>> nhsic_matrix([[[1, 1], [1, 5]], [[2, 2], [2, 2]]])
    array([[1., 0.],
           [0., 1.]])
    """
    grams = _checks.array("grams", grams, "L", "n", "n")
    if grams.shape[1] != grams.shape[2] or grams.shape[1] < 2:
        raise ValueError(f"grams has shape {grams.shape}; allowed: (L, n, n) with n = 2 or more")
    L = len(grams)
    result = np.eye(L)
    for i in range(L):
        for j in range(i + 1, L):
            result[i, j] = result[j, i] = nhsic(grams[i], grams[j])
    return result


def redundancy(nhsic: Array) -> Array:
    """Sum what each block shares with all others.

    Source: LoSA, Eq. 4.

        R_l = Σ_{j≠l} nHSIC(l, j)

    Parameters: nhsic (L, L). Returns: R (L,).

    *Deviation*: none.

    >>> redundancy([[1, 0.5, 0.25], [0.5, 1, 0], [0.25, 0, 1]])
    array([0.75, 0.5 , 0.25])
    """
    nhsic = _checks.square("nhsic", nhsic)
    off_diagonal = nhsic * (1 - np.eye(len(nhsic)))
    return off_diagonal.sum(axis=1)


def importance(redundancy: Array, beta: float = 1.0) -> Array:
    """Turn redundancy into importance: the more a block shares with the others, the less important it is.

    Source: LoSA, Eq. 4; its derivation from the information bottleneck, Eqs. 2-3, is ITPruner's (arXiv 2108.08532).

        R̂ = R / Σ R,   I_l = exp(−β R̂_l)

    Parameters: redundancy R (L,), 0 or more; beta β > 0. Returns: I (L,), above 0, at most 1. If no block shares anything
    (Σ R = 0), all shares are 1/L.

    β does not change the sparsities: they depend on the order of I alone (see `sparsity.allocate_sparsity`). But exp rounds to
    0 below −745, so a β of thousands makes blocks equal.

    *Deviation*: the published code uses β = 1 with Wanda and β = 100 with SparseGPT.

    >>> importance([0.75, 0.5, 0.25]).round(4)  # exp(−1/2), exp(−1/3), exp(−1/6)
    array([0.6065, 0.7165, 0.8465])
    """
    redundancy = _checks.array("redundancy", redundancy, "L")
    if redundancy.min() < 0:
        raise ValueError(f"redundancy holds {redundancy.min()}; allowed: 0 or more")
    if _checks.number("beta", beta) <= 0:
        raise ValueError(f"beta is {beta}; allowed: above 0")
    total = redundancy.sum()
    shares = redundancy / total if total > 0 else np.full(len(redundancy), 1 / len(redundancy))
    return np.exp(-beta * shares)

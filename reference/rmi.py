"""Representation mutual information: how much every block has in common with the others, so how dispensable it is."""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array
from reference.hsic import nhsic


def nhsic_matrix(grams: Array) -> Array:
    """nHSIC of every pair of blocks.

    Source: LoSA, Eq. 4.

    Parameters: grams (L, n, n), the Gram matrix of every block's hidden states, n ≥ 2. Returns: (L, L), symmetric, in
    [0, 1], its diagonal exactly 1, that of a constant representation included.

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: X_l is what block l puts out; the published code takes what it is given.

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
    """What a block shares with all others together.

    Source: LoSA, Eq. 4.

        R_l = Σ_{j≠l} nHSIC(l, j)

    Parameters: nhsic (L, L). Returns: R (L,).

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: none.

    >>> redundancy([[1, 0.5, 0.25], [0.5, 1, 0], [0.25, 0, 1]])
    array([0.75, 0.5 , 0.25])
    """
    nhsic = _checks.square("nhsic", nhsic)
    off_diagonal = nhsic * (1 - np.eye(len(nhsic)))
    return off_diagonal.sum(axis=1)


def importance(redundancy: Array, beta: float = 1.0) -> Array:
    """The more a block shares with the others, the less important it is.

    Source: LoSA, Eq. 4; its derivation from the information bottleneck, Eqs. 2-3, is ITPruner's (arXiv 2108.08532).

        R̂ = R / Σ R,   I_l = exp(−β R̂_l)

    Parameters: redundancy R (L,), not negative; beta β > 0. Returns: I (L,), in (0, 1]. If no block shares anything
    (Σ R = 0) all shares are 1/L.

    The order of I alone decides the rates (see `sparsity.allocate_sparsity`), so β drops out there.

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: the published code uses β = 1 with Wanda and β = 100 with SparseGPT.

    >>> importance([0.75, 0.5, 0.25]).round(4)  # exp(−1/2), exp(−1/3), exp(−1/6)
    array([0.6065, 0.7165, 0.8465])
    """
    redundancy = _checks.array("redundancy", redundancy, "L")
    if redundancy.min() < 0:
        raise ValueError(f"redundancy holds {redundancy.min()}; allowed: 0 or more")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; allowed: more than 0")
    total = redundancy.sum()
    shares = redundancy / total if total > 0 else np.full(len(redundancy), 1 / len(redundancy))
    return np.exp(-beta * shares)

"""Which entries of a score go: the lowest, and among equals those of lower index."""

from __future__ import annotations

import math

import numpy as np

from reference import _checks
from reference._checks import Array, Mask


def row_mask(score: Array, sparsity: float) -> Mask:
    """Prune the same number of the lowest scores in every row.

    Source: Wanda (arXiv 2306.11695), comparison per output.

        k = floor(ρ · in + 1e-9) per row

    Parameters: score (out, in), −inf allowed; sparsity ρ in [0, 1]. Returns: bool (out, in), True = kept.

    Ties: the lower column goes first.

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: the published code sorts without a tie rule.

    >>> row_mask([[3, 1, 2, 1], [0, 0, 0, 0]], 0.5)
    array([[ True, False,  True, False],
           [False, False,  True,  True]])
    """
    score = _checks.scores(score)
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    k = math.floor(sparsity * score.shape[1] + 1e-9)
    order = np.argsort(score, axis=1, kind="stable")
    mask = np.ones(score.shape, dtype=bool)
    np.put_along_axis(mask, order[:, :k], False, axis=1)
    return mask


def matrix_mask(score: Array, sparsity: float) -> Mask:
    """Prune the lowest scores of the whole matrix.

    Source: the magnitude baseline of Wanda (arXiv 2306.11695).

        k = floor(ρ · out · in + 1e-9)

    Parameters: score (out, in), −inf allowed; sparsity ρ in [0, 1]. Returns: bool (out, in), True = kept.

    Ties: the entry that comes first when the matrix is read row by row goes first.

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: none.

    >>> matrix_mask([[3, 1], [1, 1]], 0.5)
    array([[ True, False],
           [False,  True]])
    """
    score = _checks.scores(score)
    return row_mask(score.reshape(1, -1), sparsity).reshape(score.shape)


def rest_sparsity(zeros: Array, sizes: Array, sparsity: float) -> float:
    """The sparsity to ask of every group so that all of them together get the share that is asked.

    A group (a row, a block of columns, a projection, a decoder block) that has more zeros than its share already keeps
    them, and the others lose less for it.

    Source: ours; decision 31.

        a_g = floor(ρ · n_g + 1e-9);   F = {g : z_g > floor(ρ' · n_g + 1e-9)};   ρ' = (Σ_g a_g − Σ_{g∈F} z_g) / Σ_{g∉F} n_g

    starting from ρ' = ρ and an empty F, until F stays as it is: F only grows and ρ' only falls. With it the groups end
    with max(floor(ρ' · n_g + 1e-9), z_g) zeros, together at most Σ a_g, or Σ z_g if that is more.

    Parameters: zeros z (groups,), how many entries of each group are zero; sizes n (groups,), how many entries it has;
    sparsity ρ in [0, 1]. Returns: ρ' in [0, ρ]; ρ itself if no group has more zeros than its share.

    Ties: none. Errors: ValueError or TypeError naming the argument.

    *Deviation*: the published code prunes its share of every group, whatever is zero already, and ends above what was asked.

    >>> rest_sparsity([4, 0], [4, 4], 0.75)  # 3 + 3 zeros are asked, 4 are there: 2 of the other row's 4 go
    0.5
    >>> rest_sparsity([3, 1], [4, 4], 0.75)
    0.75
    """
    zeros = _checks.array("zeros", zeros, "groups")
    sizes = _checks.array("sizes", sizes, "groups")
    _checks.same_shape("zeros", zeros, sizes, "sizes")
    if (zeros < 0).any() or (zeros > sizes).any():
        raise ValueError("zeros are fewer than 0 or more than sizes; allowed: 0 to the group's size")
    rest = sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    asked = np.floor(sparsity * sizes + 1e-9).sum()
    full = np.zeros(len(zeros), dtype=bool)
    while (found := zeros > np.floor(rest * sizes + 1e-9)).sum() > full.sum():
        full = found
        rest = 0.0 if full.all() else max(0.0, float((asked - zeros[full].sum()) / sizes[~full].sum()))
    return rest


def demote_pruned(score: Array, kept: Mask) -> Array:
    """Put weights that are pruned already below every other score, so that they go first and masks nest.

    Source: ours.

    Parameters: score (out, in); kept bool (out, in). Returns: the score, −inf where not kept.

    Errors: ValueError or TypeError naming the argument.

    *Deviation*: without it, a pruned weight and a kept one on a dead input both score 0, and the tie could bring the
    pruned one back.

    >>> demote_pruned([[0, 2]], np.array([[True, False]]))
    array([[  0., -inf]])
    """
    score = _checks.scores(score)
    kept = _checks.mask("kept", kept, score, "score")
    return np.where(kept, score, -np.inf)

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

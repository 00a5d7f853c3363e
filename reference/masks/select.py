"""Choose which entries to prune: those of lowest score; among equal scores, the lower index."""

from __future__ import annotations

import math

import numpy as np

from reference import _checks
from reference._checks import Array, Mask


def row_mask(score: Array, sparsity: float) -> Mask:
    """Prune the k lowest scores of each row.

    Source: Wanda (arXiv 2306.11695), comparison per output.

        k = floor(ρ · in + 1e-9) per row

    Parameters: score (out, in), −inf allowed; sparsity ρ in [0, 1]. Returns: bool (out, in), True = kept.

    Ties: the lower column is pruned first.

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

    Ties: the first in row-major order is pruned first.

    *Deviation*: none.

    >>> matrix_mask([[3, 1], [1, 1]], 0.5)
    array([[ True, False],
           [False,  True]])
    """
    score = _checks.scores(score)
    return row_mask(score.reshape(1, -1), sparsity).reshape(score.shape)


def rest_sparsity(zeros: Array, sizes: Array, sparsity: float) -> float:
    """Lower the sparsity asked of each group, so that all groups together reach ρ although some already exceed it.

    A group is a row, a block of columns, a projection or a decoder block. A group that already has more zeros than its
    share keeps them, and the other groups lose correspondingly fewer weights.

    Source: ours; decision 31.

        a_g = floor(ρ · n_g + 1e-9);   F = {g : z_g > floor(ρ' · n_g + 1e-9)};   ρ' = (Σ_g a_g − Σ_{g∈F} z_g) / Σ_{g∉F} n_g

    Start with ρ' = ρ and F empty. Repeat until F stops changing: F only grows and ρ' only falls. Pruned at ρ', group g
    ends with max(floor(ρ' · n_g + 1e-9), z_g) zeros. Their sum is at most Σ a_g, or Σ z_g if that is more.

    Parameters: zeros z (groups,), the number of zeros in each group; sizes n (groups,), the number of entries; sparsity ρ
    in [0, 1]. Returns: ρ' in [0, ρ]; ρ itself if no group has more zeros than its share.

    *Deviation*: the published code prunes every group at ρ, whatever is already zero, and overshoots the target.

    >>> rest_sparsity([4, 0], [4, 4], 0.75)  # 3 + 3 zeros asked, 4 already there: prune 2 of the other 4
    0.5
    >>> rest_sparsity([3, 1], [4, 4], 0.75)
    0.75
    """
    zeros = _checks.array("zeros", zeros, "groups")
    sizes = _checks.array("sizes", sizes, "groups")
    _checks.same_shape("zeros", zeros, sizes, "sizes")
    if (zeros < 0).any() or (zeros > sizes).any():
        raise ValueError("zeros holds a count outside its group; allowed: 0 to the group's entry in sizes")
    rest = sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    asked = np.floor(sparsity * sizes + 1e-9).sum()
    full = np.zeros(len(zeros), dtype=bool)
    while (found := zeros > np.floor(rest * sizes + 1e-9)).sum() > full.sum():
        full = found
        left = sizes[~full].sum()
        rest = max(0.0, float((asked - zeros[full].sum()) / left)) if left else 0.0
    return rest


def demote_pruned(score: Array, kept: Mask) -> Array:
    """Set the score of already pruned weights to −inf, so that they are pruned first and masks nest.

    Source: ours.

    Parameters: score (out, in); kept bool (out, in). Returns: the score, −inf where not kept.

    *Deviation*: the published code does not do this. There a pruned weight can come back: it ties at score 0 with a kept
    weight whose input is always 0.

    >>> demote_pruned([[0, 2]], np.array([[True, False]]))
    array([[  0., -inf]])
    """
    score = _checks.scores(score)
    kept = _checks.mask("kept", kept, score, "score")
    return np.where(kept, score, -np.inf)

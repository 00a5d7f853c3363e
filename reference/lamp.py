"""LAMP: one threshold for the whole model, over scores that compare each weight with the larger ones of its projection.

Legend: L blocks, W (out × in) one projection's weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array

# Scores are counted in levels: 64 octaves of 1024 levels each, of which the highest begins at 1, and one level for zeros.
OCTAVES, PER_OCTAVE = 64, 1024
LEVELS = 1 + OCTAVES * PER_OCTAVE


def lamp_score(weight: Array) -> Array:
    """Score each weight by its share of the squares that are at least as large.

    Source: LAMP (arXiv 2010.07611), Eq. 4.

        score(w) = w² / Σ_{w'² ≥ w²} w'²

    Parameters: weight W (out, in). Returns: (out, in) in [0, 1]: the largest weight scores 1, zeros score 0. Equal weights
    have equal scores.

    *Deviation*: the published code ranks equal weights, so that only one of them has this score.

    >>> lamp_score([[2, 1, -1, 0]])  # 4 / 4, and 1 / 6 twice
    array([[1.        , 0.16666667, 0.16666667, 0.        ]])
    """
    W = _checks.array("weight", weight, "out", "in")
    values, which, counts = np.unique(W**2, return_inverse=True, return_counts=True)
    tail = np.cumsum((values * counts)[::-1])[::-1]
    return (values / np.where(tail > 0, tail, 1.0))[which].reshape(W.shape)


def lamp_levels(weight: Array) -> NDArray[np.int64]:
    """Count the LAMP scores of a projection by level, so that a model's scores need not be sorted together.

    Source: ours (decision 46).

        level = 0 for a score of 0, else 1 + floor of 1024 · (octave + fraction), from 2⁻⁶³ up; smaller scores have level 1

    Parameters: weight W (out, in). Returns: number of weights of each level (LEVELS,). A level spans at most 0.1 % of a
    score; a score within 1e-9 below a level belongs to it.

    *Deviation*: LAMP sorts all scores.

    >>> found = lamp_levels([[2, 1, -1, 0]])
    >>> np.flatnonzero(found), found[found > 0]
    (array([    0, 61782, 64513]), array([1, 2, 1]))
    """
    score = lamp_score(weight).ravel()
    # score = mantissa · 2^exponent with mantissa in [1/2, 1).
    mantissa, exponent = np.frexp(score * (1 + 1e-9))
    level = 1 + (exponent + OCTAVES - 2) * PER_OCTAVE + np.floor((2 * mantissa - 1) * PER_OCTAVE).astype(np.int64)
    return np.bincount(np.where(score > 0, np.clip(level, 1, LEVELS - 1), 0), minlength=LEVELS)


def lamp_kept(levels: Sequence[NDArray[np.int64]], target: float) -> Array:
    """Compute the share of its weights that each block keeps above one threshold for the whole model.

    Source: LAMP (arXiv 2010.07611), Section 2, by levels (decision 46).

        threshold = the highest level such that at most s of the model's weights are below it

    Parameters: levels: for each block the sum of `lamp_levels` over its projections; target s in [0, 1]. Returns: (L,).
    The blocks keep at least 1 − s of the model's weights together; `sparsity.nearest_rates` prunes what is left to prune.

    *Deviation*: LAMP gives each projection its own rate. Here rates are of blocks: all projections of a block get the
    block's share of zeros, as with every other rule.

    >>> lamp_kept([lamp_levels([[4, 1]]), lamp_levels([[3, 2]])], 0.25)  # scores 1, 1/17; 1, 4/13: the second goes
    array([0.5, 1. ])
    """
    _checks.number("target", target, 0.0, 1.0)
    counts = np.stack(levels)
    below = np.cumsum(counts.sum(axis=0))
    pruned = below <= np.floor(target * counts.sum() + 1e-9)
    return 1 - counts[:, pruned].sum(axis=1) / counts.sum(axis=1)

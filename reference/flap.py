"""FLAP, a baseline: remove heads and channels whose inputs hardly fluctuate, of the whole model at once; a bias makes up for them.

Legend: W (out × in) the weight of o or down, x_j its input channels over all calibration tokens, n structures of the whole model.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask


def fluctuation(weight: Array, variance: Array) -> Array:
    """Score input channels by how much the output would err if each were replaced with its mean.

    Source: FLAP (arXiv 2312.11983), Eq. 4.

        Var(x_j) · Σ_i W_ij²

    Parameters: weight W (out, in); variance of its inputs (in,), 0 or more. Returns: (in,). *Deviation*: none.

    >>> fluctuation([[1, 2], [3, 0]], [2, 1])
    array([20.,  4.])
    """
    W, variance = _checks.array("weight", weight, "out", "in"), _checks.array("variance", variance, "in")
    if variance.shape != (W.shape[1],) or variance.min() < 0:
        raise ValueError(
            f"variance has shape {variance.shape} and minimum {variance.min()}; allowed: ({W.shape[1]},), 0 or more"
        )
    return variance * (W**2).sum(axis=0)


def standardised(score: Array, structures: int) -> Array:
    """Make the scores of one projection's inputs comparable with those of others: mean 0, deviation 1. Average each structure's.

    Source: FLAP, Eq. 6; its published code averages the columns of a head.

        z = (score − mean) / deviation,   S_u = mean of z over run u

    Parameters: score (in,); structures u, a divisor of in: heads, or all channels. Returns: (u,), 0 if all scores are the same.

    *Deviation*: the deviation is the population's, which has a value for one channel, too.

    >>> standardised([1, 1, 5, 5], 2)
    array([-1.,  1.])
    """
    score = _checks.array("score", score, "in")
    _checks.integer("structures", structures, 1)
    if len(score) % structures:
        raise ValueError(f"structures is {structures}; allowed: a divisor of {len(score)}")
    away = score - score.mean()
    deviation = np.sqrt((away**2).mean())
    z = away / deviation if deviation > 1e-12 * np.abs(score).max() else np.zeros(len(score))
    return z.reshape(structures, -1).mean(axis=1)


def remove_lowest(score: Array, weights: Array, sparsity: float) -> Mask:
    """Remove structures of the whole model, lowest score first, until the share of weights that are gone is nearest to s.

    Source: FLAP, Section 3.3, one threshold for heads and channels of all blocks.

        order by score;  as many as bring Σ weights of the removed nearest to s · Σ weights

    Parameters: score (n,), infinite for what must stay; weights (n,), how many each structure has, above 0; sparsity s in [0, 1].
    Returns: bool (n,), True = kept.

    Ties: the lower index goes first; of two numbers equally near, the smaller.

    *Deviation*: the published code counts rows of weights, to the same end.

    >>> remove_lowest([0.5, 0.1, 0.3], weights=[4, 1, 1], sparsity=0.4)  # 2 of 6 weights, or all
    array([ True, False, False])
    """
    score, w = _checks.array("score", score, "n", finite=False), _checks.array("weights", weights, "n")
    if np.isnan(score).any():
        raise ValueError("score holds NaN; allowed: numbers")
    _checks.same_shape("weights", w, score, "score")
    if w.min() <= 0:
        raise ValueError(f"weights has {w.min()}; allowed: above 0")
    s = _checks.number("sparsity", sparsity, 0.0, 1.0)
    order = np.argsort(score, kind="stable")[: (score < np.inf).sum()]
    gone = np.concatenate([[0.0], np.cumsum(w[order])])
    count = int(np.argmin(np.abs(gone - s * w.sum())))
    kept = np.ones(len(score), dtype=bool)
    kept[order[:count]] = False
    return kept


def compensation(weight: Array, mean: Array, kept: Mask) -> Array:
    """Compute the bias that stands for the inputs that are gone: what they add on average.

    Source: FLAP, Eq. 5.

        W ((1 − m) ⊙ mean x)

    Parameters: weight W (out, in); mean of its inputs (in,); kept bool (in,). Returns: (out,). *Deviation*: none.

    >>> compensation([[1, 2], [3, 4]], [10, 100], np.array([True, False]))
    array([200., 400.])
    """
    W, mean = _checks.array("weight", weight, "out", "in"), _checks.array("mean", mean, "in")
    if mean.shape != (W.shape[1],):
        raise ValueError(f"mean has shape {mean.shape}; allowed: {(W.shape[1],)}")
    return W @ np.where(_checks.mask("kept", kept, mean, "mean"), 0.0, mean)

"""Pruner-Zero: score each weight by its square times the gradient of the loss by it.

Legend: W (out × in) one projection's weight, g (n × out × in) the gradient of the loss of each of n calibration sequences by
it, G (out × in) the size of the gradients.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.method import Method
from reference.masks.select import row_mask


def gradient_size(gradients: Array) -> Array:
    """Compute the size of the gradients of all sequences.

    Source: Pruner-Zero (ICML 2024), after GBLM-Pruner (arXiv 2311.04902).

        G = √ Σ_n g_n²

    Parameters: gradients g (n, out, in), of the loss of each sequence. Returns: (out, in).

    *Deviation*: the published code multiplies gradients by 100, so that squares in half precision do not underflow. The factor
    is the same for all weights, so no score depends on it.

    >>> gradient_size([[[3.0, 0.0]], [[4.0, 1.0]]])
    array([[5., 1.]])
    """
    g = _checks.array("gradients", gradients, "n", "out", "in")
    return np.sqrt((g**2).sum(axis=0))


def pruner_zero_score(weight: Array, gradient_size: Array) -> Array:
    """Score each weight by the formula that Pruner-Zero's search found.

    Source: Pruner-Zero (ICML 2024).

        score = W² · minmax(G),   minmax(G) = (G − min G) / (max G − min G) over the whole matrix

    Parameters: weight W (out, in); gradient_size G (out, in) ≥ 0. Returns: (out, in); all 0 if all G are equal.

    *Deviation*: the published code divides by 0 if all G are equal.

    >>> pruner_zero_score([[1.0, -2.0, 3.0]], [[0.0, 1.0, 2.0]])
    array([[0., 2., 9.]])
    """
    W = _checks.array("weight", weight, "out", "in")
    G = _checks.array("gradient_size", gradient_size, "out", "in")
    _checks.same_shape("gradient_size", G, W, "weight")
    if G.min() < 0:
        raise ValueError(f"gradient_size has minimum {G.min()}; allowed: 0 or more")
    span = G.max() - G.min()
    return W**2 * ((G - G.min()) / (span or 1.0))


def pruner_zero_mask(weight: Array, gradient_size: Array, sparsity: float) -> Mask:
    """Prune the weights of lowest score in each row.

    Source: Pruner-Zero (ICML 2024), comparison per output as in Wanda.

    Parameters: weight (out, in); gradient_size (out, in); sparsity in [0, 1]. Returns: bool (out, in), True = kept.

    Ties: the lower column is pruned first.

    *Deviation*: none.

    >>> pruner_zero_mask([[1.0, -2.0, 3.0, 9.0]], [[0.0, 1.0, 2.0, 0.0]], 0.5)
    array([[False,  True,  True, False]])
    """
    return row_mask(pruner_zero_score(weight, gradient_size), sparsity)


METHOD = Method.by_score("pruner_zero", pruner_zero_score, gradient_statistic=gradient_size)

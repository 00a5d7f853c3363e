"""Wanda: score each weight by its magnitude times the norm of the input it multiplies.

Legend: W (out × in) one projection's weight, X (tokens × in) its calibration input.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.method import Method
from reference.masks.select import row_mask


def input_norm(inputs: Array) -> Array:
    """Compute the norm of each input over all calibration tokens.

    Source: Wanda (arXiv 2306.11695), Eq. 1.

        ‖X_j‖₂ = √ Σ_tok X²_{tok,j}

    Parameters: inputs X (tokens, in). Returns: (in,), in the unit of the inputs; 0 for an input that is always 0.

    *Deviation*: the published code also divides by the number of samples. The factor is the same for all inputs, so no
    mask depends on it.

    >>> input_norm([[3, 0], [4, 0]])
    array([5., 0.])
    """
    X = _checks.array("inputs", inputs, "tokens", "in")
    return np.sqrt((X**2).sum(axis=0))


def wanda_score(weight: Array, input_norm: Array) -> Array:
    """Score each weight by how much it contributes to its output.

    Source: Wanda (arXiv 2306.11695), Eq. 1.

        score_ij = |W_ij| · ‖X_j‖₂

    Parameters: weight W (out, in); input_norm (in,) ≥ 0. Returns: (out, in).

    *Deviation*: none.

    >>> wanda_score([[-2, 1]], [1, 5])
    array([[2., 5.]])
    """
    weight = _checks.array("weight", weight, "out", "in")
    norm = _checks.array("input_norm", input_norm, "in")
    if norm.shape[0] != weight.shape[1] or norm.min() < 0:
        raise ValueError(
            f"input_norm has shape {norm.shape} and minimum {norm.min()}; allowed: ({weight.shape[1]},), 0 or more"
        )
    return np.abs(weight) * norm


def wanda_mask(weight: Array, input_norm: Array, sparsity: float) -> Mask:
    """Prune the weights of lowest Wanda score in each row.

    Source: Wanda (arXiv 2306.11695), Algorithm 1.

    Parameters: weight (out, in); input_norm (in,); sparsity in [0, 1]. Returns: bool (out, in), True = kept.

    Ties: the lower column is pruned first.

    *Deviation*: none.

    >>> wanda_mask([[-2, 1]], [1, 5], 0.5)
    array([[False,  True]])
    """
    return row_mask(wanda_score(weight, input_norm), sparsity)


METHOD = Method.by_score("wanda", wanda_score, statistic=lambda inputs, samples: input_norm(inputs))

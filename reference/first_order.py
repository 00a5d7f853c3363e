"""First-order importance: how much the loss would change if a weight were pruned, by its gradient.

Legend: W (out × in) one projection's weight, G (out × in) the gradient of the loss by it.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array


def first_order_importance(weight: Array, gradient: Array) -> float:
    """Estimate how much the loss depends on the weights of a projection.

    Source: Molchanov et al. 2017 (arXiv 1611.06440): loss(W) − loss(W with w = 0) ≈ w · ∂loss/∂w.

        I = Σ_ij |W_ij · G_ij|

    Parameters: weight W (out, in); gradient G (out, in) of the loss over the whole calibration text. A pruned weight adds 0.
    Returns: I ≥ 0, in the unit of the loss. A block's importance is the sum over its projections.

    *Deviation*: G is summed over the text before its size is taken (decision 47). LLM-Pruner (arXiv 2305.11627) does the
    same; sums of sizes per sequence would depend on how the text is cut.

    >>> first_order_importance([[2, -1], [0, 3]], [[1, 1], [5, -1]])  # 2 + 1 + 0 + 3
    6.0
    """
    W = _checks.array("weight", weight, "out", "in")
    G = _checks.array("gradient", gradient, "out", "in")
    _checks.same_shape("gradient", G, W, "weight")
    return float(np.abs(W * G).sum())

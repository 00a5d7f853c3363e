"""OWL: blocks with many outliers among their Wanda scores are pruned less.

Legend: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference import _checks
from reference._checks import Array
from reference.sparsity import nearest_rates


def outlier_share(scores: Sequence[Array], factor: float = 5.0) -> float:
    """Compute the share of a block's weights whose score is far above the mean.

    Source: OWL (arXiv 2310.05175), Section 3; M = 5.

        D_l = 100 · share of the block's weights with score > M · mean of the block's scores

    Parameters: scores: one (out, in) per projection of the block, `wanda.wanda_score`, ≥ 0; factor M. Returns: D_l in
    percent. All weights count, zeros too.

    *Deviation*: none.

    >>> outlier_share([np.array([[0, 0, 0, 0, 0, 9]])])  # mean 1.5, so 9 is above 7.5
    16.666666666666664
    """
    _checks.number("factor", factor, 0.0)
    values = np.concatenate([_checks.array("scores", score, "out", "in").ravel() for score in scores])
    return float(100 * (values > factor * values.mean()).mean())


def owl_rates(outliers: Array, target: float, weights: Array, floor: Array, spread: float = 0.08) -> Array:
    """Give the blocks with more outliers a lower sparsity, within 2λ of each other.

    Source: OWL (arXiv 2310.05175), Section 3; λ = 0.08.

        x_l = (D_l − min D) / (max D − min D);   wanted_l = s − 2λ (x_l − mean x);   ρ = `sparsity.nearest_rates`

    Parameters: outliers D (L,); target s in [0, 1]; weights (L,), prunable weights per block; floor (L,), the sparsity each
    block already has; spread λ ≥ 0. Returns: ρ (L,); s for all where D is the same everywhere and no floor is above s.

    *Deviation*: the mean is weighted by the blocks' sizes, and rates never fall along the steps (decision 43).

    >>> owl_rates([1, 2, 3], 0.5, weights=[1, 1, 1], floor=[0, 0, 0])
    array([0.58, 0.5 , 0.42])
    """
    D = _checks.array("outliers", outliers, "L")
    _checks.number("target", target, 0.0, 1.0)
    _checks.number("spread", spread, 0.0, 1.0)
    x = (D - D.min()) / max(D.max() - D.min(), np.finfo(np.float64).tiny)
    return nearest_rates(target - 2 * spread * (x - x.mean()), target, weights, floor)

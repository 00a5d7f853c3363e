"""Let the first token of each calibration sequence count more, where attention reads it.

Legend: x (sequences × tokens × in) the calibration input of a projection; its first token is t = 0.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array


def weigh_first(inputs: Array, weight: float) -> Array:
    """Make the first token of each sequence count more in the statistics of the inputs of attention.

    Source: ours (decisions 57 and 66). The key and the value of the first token enter the output of all later tokens (the
    attention sink), but it is one token of many in Σ x xᵀ. Unless it counts more, compensation makes its error larger.

        x'_st = x_st · √weight if t = 0, else x_st;   Σ x' x'ᵀ = Σ x xᵀ + (weight − 1) Σ_s x_s0 x_s0ᵀ

    Parameters: inputs (sequences, tokens, in); weight, 0 or more. Returns: (sequences · tokens, in).

    *Deviation*: Wanda, SparseGPT, ALPS, ADMM and GPTQ weigh all tokens alike: weight 1.

    >>> weigh_first([[[1.0, 2.0], [3.0, 4.0]]], weight=4.0)
    array([[2., 4.],
           [3., 4.]])
    """
    X = _checks.array("inputs", inputs, "sequences", "tokens", "in").copy()
    X[:, 0] *= np.sqrt(_checks.number("weight", weight, 0.0))
    return X.reshape(-1, X.shape[2])

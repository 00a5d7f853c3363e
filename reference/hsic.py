"""HSIC: the dependence between two representations of the same samples, from their Gram matrices.

Legend: n samples, d features, X (n × d) features, K = X Xᵀ Gram matrix, H = I − 11ᵀ/n centering.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array

# A representation is constant if centring shrinks its Gram matrix below this share: what is left is rounding.
CONSTANT = 1e-13


def linear_gram(features: Array) -> Array:
    """Compute the inner products of all pairs of samples; HSIC needs nothing else of the features.

    Source: LoSA, Section 3.1 (linear kernel).

        K = X Xᵀ

    Parameters: features X (n, d). Returns: K (n, n), symmetric.

    *Deviation*: none.

    >>> linear_gram([[1, 0], [1, 2]])
    array([[1., 1.],
           [1., 5.]])
    """
    features = _checks.array("features", features, "n", "d")
    return features @ features.T


def center(gram: Array) -> Array:
    """Centre a Gram matrix: the result is the Gram matrix of the features minus their mean over the samples.

    Source: Gretton et al. 2005; LoSA, Eq. 4.

        K̃ = H K H,  H = I − 11ᵀ/n

    Parameters: gram K (n, n). Returns: K̃ (n, n); every row and column sums to 0.

    *Deviation*: none.

    >>> center([[1, 1], [1, 5]])  # samples (1,0), (1,2): their mean is (1,1), so they become (0,−1) and (0,1)
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    gram = _checks.square("gram", gram)
    n = len(gram)
    H = np.eye(n) - np.ones((n, n)) / n
    return H @ gram @ H


def hsic(gram_x: Array, gram_y: Array) -> float:
    """Compute the Hilbert-Schmidt independence criterion: 0 if the representations are linearly unrelated.

    Source: LoSA, Eq. 4 (Gretton et al. 2005).

        HSIC = tr(K̃_x K̃_y) / (n − 1)²

    Parameters: gram_x, gram_y (n, n) of the same samples, n ≥ 2. Returns: HSIC ≥ 0, up to rounding. Its unit is the fourth
    power of the features' unit.

    *Deviation*: none.

    >>> float(hsic([[1, 1], [1, 5]], [[1, 1], [1, 5]]))  # tr([[2,−2],[−2,2]]) / 1
    4.0
    """
    gram_x, gram_y = _pair(gram_x, gram_y)
    n = len(gram_x)
    return float(np.trace(center(gram_x) @ center(gram_y)) / (n - 1) ** 2)


def nhsic(gram_x: Array, gram_y: Array) -> float:
    """Compute HSIC normalised to [0, 1]: 1 if the representations agree up to rotation and scale.

    Source: LoSA, Eq. 4; with the linear kernel this is CKA (Kornblith et al. 2019).

        nHSIC = ⟨K̃_x, K̃_y⟩ / (‖K̃_x‖ ‖K̃_y‖)          (Frobenius)

    Parameters: gram_x, gram_y (n, n), n ≥ 2. Returns: nHSIC in [0, 1]; 0 if a representation is constant (K̃ = 0 up to
    rounding: at most 1e-13 of ‖K‖).

    *Deviation*: the published code divides 0 by 0 for a constant representation.

    >>> round(nhsic([[1, 1], [1, 5]], [[1, 1], [1, 5]]), 12)
    1.0
    >>> nhsic([[1, 1], [1, 5]], [[2, 2], [2, 2]])
    0.0
    """
    gram_x, gram_y = _pair(gram_x, gram_y)
    centred_x, centred_y = center(gram_x), center(gram_y)
    norm_x, norm_y = np.linalg.norm(centred_x), np.linalg.norm(centred_y)
    if norm_x <= CONSTANT * np.linalg.norm(gram_x) or norm_y <= CONSTANT * np.linalg.norm(gram_y):
        return 0.0
    # Divide before multiplying, so that large features do not overflow. Clip, because rounding may leave [0, 1] by one ulp.
    return float(np.clip(np.sum((centred_x / norm_x) * (centred_y / norm_y)), 0.0, 1.0))


def _pair(gram_x: Array, gram_y: Array) -> tuple[Array, Array]:
    gram_x, gram_y = _checks.square("gram_x", gram_x), _checks.square("gram_y", gram_y)
    _checks.same_shape("gram_y", gram_y, gram_x, "gram_x")
    if len(gram_x) < 2:
        raise ValueError(f"gram_x has n = {len(gram_x)} samples; allowed: n = 2 or more")
    return gram_x, gram_y

"""SliceGPT, a baseline: rotate the hidden states onto their principal axes, and leave out the last ones everywhere.

Before each norm of a block the hidden states X (tokens × d) have axes Q_k (d × k) of their own, the first k principal ones. The
sliced model computes X Q_k. A norm without a gain does not change under a rotation, so the matrices around it take the axes over:

    y = x Wᵀ, x = rms_norm(X) ⊙ γ    becomes    y = rms_norm(X Q_k) (W diag(γ) Q_k)ᵀ
    X' = X + y Wᵀ, read by axes Q'_k    becomes    X' Q'_k = (X Q_k) (Q_kᵀ Q'_k) + y (Q'_kᵀ W)ᵀ

Q_kᵀ Q'_k (k × k) is the shortcut, a matrix that the residual did not need before. Nothing changes if k = d. A norm that subtracts
the mean (OPT) does so as a rotation that leaves out one axis: see `centred`.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array


def principal_axes(gram: Array) -> Array:
    """Find the axes along which hidden states vary most, around 0.

    Source: SliceGPT (arXiv 2401.15024), Section 3.3.

        XᵀX = Q diag(λ) Qᵀ,  λ_1 ≥ λ_2 ≥ …

    Parameters: gram XᵀX (d, d), summed over all calibration tokens. Returns: Q (d, d), an axis in each column.

    Ties: any axes of the same λ serve. The sign of an axis does not matter to the sliced model; here Σ_i i·Q_ij ≥ 0, i from 1.

    *Deviation*: none.

    >>> principal_axes([[1, 0], [0, 4]])
    array([[0., 1.],
           [1., 0.]])
    """
    gram = _checks.square("gram", gram)
    Q = np.linalg.eigh(gram)[1][:, ::-1]
    return Q * np.where(np.arange(1, len(Q) + 1) @ Q < 0, -1.0, 1.0)


def kept_axes(sparsity: float, width: int, weights: int, multiple: int = 8) -> int:
    """Choose how many axes to keep, so that the share of a block's weights that is gone is nearest to the sparsity.

    Source: ours, decision 61. A projection has d inputs or d outputs, so k/d of its weights are left; two shortcuts are added.

        k = argmin { |k · n / d + 2 k² − (1 − s) · n| : multiples of `multiple` up to d }

    Parameters: sparsity s in [0, 1]; width d; weights n of a block; multiple. Returns: k; d itself if it is below `multiple`.

    Ties: the larger k.

    *Deviation*: the paper keeps (1 − s) · d axes and does not count the shortcuts, so that less is gone than s.

    >>> kept_axes(0.25, width=16, weights=1024, multiple=4)  # 8 · 64 + 2 · 64 = 640 weights, or 12 · 64 + 288 = 1056, of 768
    8
    """
    s = _checks.number("sparsity", sparsity, 0.0, 1.0)
    d, n = _checks.integer("width", width, 1), _checks.integer("weights", weights, 1)
    _checks.integer("multiple", multiple, 1)
    choices = range(multiple, d + 1, multiple) if d >= multiple else [d]
    return min(choices, key=lambda k: (abs(k * n / d + 2 * k * k - (1 - s) * n), -k))


def centred(axes: Array) -> Array:
    """Subtract from each axis its mean: X times the result is X without the mean of each token's channels, along the axes.

    Source: SliceGPT, Section 3.1: with M = I − 11ᵀ/d, layer_norm(X) = rms_norm(X M).

        M Q

    Parameters: axes Q (d, k). Returns: (d, k). *Deviation*: none.

    >>> centred([[1, 0], [0, 1]])
    array([[ 0.5, -0.5],
           [-0.5,  0.5]])
    """
    Q = _checks.array("axes", axes, "d", "k")
    return Q - Q.mean(axis=0)


def slice_inputs(weight: Array, gain: Array, axes: Array) -> Array:
    """Let a projection behind a norm read sliced states. It takes over the norm's gain.

    Source: SliceGPT, Eq. 7 to 9.

        W diag(γ) Q_k

    Parameters: weight W (out, d); gain γ (d,); axes Q_k (d, k). Returns: (out, k). *Deviation*: none.

    >>> slice_inputs([[1, 2]], gain=[3, 5], axes=[[0], [1]])
    array([[10.]])
    """
    W, gain = _checks.array("weight", weight, "out", "d"), _checks.array("gain", gain, "d")
    Q = _checks.array("axes", axes, "d", "k")
    if gain.shape != (W.shape[1],):
        raise ValueError(f"gain has shape {gain.shape}; allowed: {(W.shape[1],)}")
    _as_long("axes", Q, W.shape[1])
    return (W * gain) @ Q


def slice_outputs(weight: Array, axes: Array) -> Array:
    """Let a projection, or with one column its bias, write sliced states.

    Source: SliceGPT, Eq. 7 to 9.

        Q_kᵀ W

    Parameters: weight W (d, in); axes Q_k (d, k) of the norm that reads the states. Returns: (k, in). *Deviation*: none.

    >>> slice_outputs([[1, 2], [3, 4]], axes=[[0], [1]])
    array([[3., 4.]])
    """
    W, Q = _checks.array("weight", weight, "d", "in"), _checks.array("axes", axes, "d", "k")
    _as_long("axes", Q, len(W))
    return Q.T @ W


def shortcut(before: Array, after: Array) -> Array:
    """Turn sliced states from one set of axes to the next: what the residual is multiplied by from the right.

    Source: SliceGPT, Section 3.3.

        Q_kᵀ Q'_k

    Parameters: before Q_k (d, k); after Q'_k (d, k'). Returns: (k, k'). *Deviation*: none.

    >>> shortcut([[1, 0], [0, 1]], [[0, 1], [1, 0]])
    array([[0., 1.],
           [1., 0.]])
    """
    Q, new = _checks.array("before", before, "d", "k"), _checks.array("after", after, "d", "k")
    _as_long("after", new, len(Q))
    return Q.T @ new


def sliced_norm(x: Array, width: int, eps: float) -> Array:
    """Scale sliced states as the whole ones would be if the axes that are left out were 0: by d, not by k.

    Source: SliceGPT's published code. Without a gain:

        x / √(Σ_k x² / d + ε)

    Parameters: x (..., k); width d ≥ 1; eps ε ≥ 1e-12. Returns: (..., k). *Deviation*: none.

    >>> sliced_norm([3.0, 4.0], width=4, eps=2.75)  # 25 / 4 + 2.75 = 9
    array([1.        , 1.33333333])
    """
    x = _checks.array("x", x, "...", "k", finite=False)
    _checks.integer("width", width, 1)
    _checks.number("eps", eps, 1e-12)
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) / width + eps)


def _as_long(name: str, axes: Array, width: int) -> None:
    if len(axes) != width:
        raise ValueError(f"{name} has {len(axes)} rows; allowed: {width}")

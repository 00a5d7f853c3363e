"""The functions that a LLaMA consists of between its projections, each with its gradient where `llama.py` needs it."""

from __future__ import annotations

import numpy as np

from reference._checks import Array


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Scale each token's channels to root mean square 1, then multiply by the gain.

    Source: Zhang & Sennrich 2019. x: (..., d). gain: (d,). eps: added to the mean square.
    Returns: (..., d). *Deviation*: none.

    >>> rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), eps=12.5)  # mean square (9 + 16) / 2, plus 12.5: root 5
    array([0.6, 1.6])
    """
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm_grad(x: Array, gain: Array, eps: float, grad: Array) -> Array:
    """Compute ∂loss/∂x of `rms_norm`, from grad = ∂loss/∂y.

    Source: with r = (mean x² + ε)^(-1/2) and y = γ r x: ∂r/∂x_j = -r³ x_j / d. x, grad: (..., d). gain: (d,).
    Returns: (..., d). *Deviation*: none.

    >>> rms_norm_grad(np.array([1.0, 1.0]), np.ones(2), 0.0, np.array([1.0, 1.0]))  # the norm ignores the scale
    array([0., 0.])
    """
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    grad = grad * gain
    return inverse * grad - inverse**3 * x * np.mean(grad * x, axis=-1, keepdims=True)


def rotary_angles(tokens: int, head_dim: int, theta: float) -> Array:
    """Compute the angle by which token p rotates channel pair i: p · θ^(-2i/e).

    Source: Su et al. 2021 (RoPE). tokens: t. head_dim: e, even. theta: base.
    Returns: (t, e/2), radians. *Deviation*: none.

    >>> rotary_angles(3, 4, 100.0)  # frequencies 1 and 100^(-2/4) = 0.1
    array([[0. , 0. ],
           [1. , 0.1],
           [2. , 0.2]])
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.arange(tokens)[:, None] * frequencies


def rotate(x: Array, angles: Array) -> Array:
    """Rotate channel pairs (i, i + e/2) by their token's angles. Rotating by -angles is the inverse, and the gradient.

    Source: RoPE, in the half-split pairing of Hugging Face's LLaMA. x: (..., t, e). angles: (t, e/2).
    Returns: (..., t, e).
    *Deviation*: the RoPE paper pairs channels (2i, 2i + 1). Hugging Face's LLaMA checkpoints are permuted to match.

    >>> rotate(np.array([[1.0, 0.0]]), np.array([[np.pi / 2]])).round(12)  # a quarter turn
    array([[0., 1.]])
    """
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Compute exp(x) / Σ exp(x) over the last axis.

    Source: definition. Subtracting the row's maximum first does not change the result. x: (..., k); -inf gives exactly 0.
    Returns: (..., k). *Deviation*: none.

    >>> softmax(np.log([1.0, 3.0]))
    array([0.25, 0.75])
    """
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    """Compute the logarithm of `softmax` without rounding a small probability to 0.

    Source: definition. x: (..., k). Returns: (..., k). *Deviation*: none.

    >>> log_softmax(np.array([0.0, -1000.0]))  # softmax itself would round the second to 0
    array([    0., -1000.])
    """
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def silu(x: Array) -> Array:
    """Compute x · σ(x), the gate of SwiGLU.

    Source: Shazeer 2020. x: any shape. Returns: the same shape.
    *Deviation*: none.

    >>> silu(np.array([0.0, np.log(3.0)])).round(12)  # σ(log 3) = 3/4
    array([0.        , 0.82395922])
    """
    return x * _sigmoid(x)


def silu_grad(x: Array) -> Array:
    """Compute d silu / dx = σ(x) (1 + x (1 - σ(x))).

    Source: product rule. x: any shape. Returns: the same shape.
    *Deviation*: none.

    >>> silu_grad(np.array([0.0]))
    array([0.5])
    """
    sigma = _sigmoid(x)
    return sigma * (1 + x * (1 - sigma))


def _sigmoid(x: Array) -> Array:
    # exp(-x) would overflow; tanh saturates.
    return 0.5 * (1 + np.tanh(0.5 * x))

"""SoRA, a baseline for fine-tuning a pruned model: a low-rank adapter whose gate becomes sparse while it trains.

Legend: W (out × in) a projection's weight, A (r × in) and B (out × r) the adapter, g (r) the gate, one number for each rank,
s = α / r its scale, x (... × in) the input, y (... × out) the output. One optimizer step is

    A, B, g ← AdamW on the loss + λ · mean |g|,   then g ← soft_threshold(g, λ₂)

so a rank whose gate reaches 0 drops out. The adapter fills the zeros of W if it is merged, so it stays beside W.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array


def gated_lora(x: Array, A: Array, B: Array, gate: Array, scale: float) -> Array:
    """Compute what a gated adapter adds to the output of its projection: y = x Wᵀ + Δ.

    Source: SoRA (arXiv 2311.11696), Eq. 6.

        Δ = s · (g ⊙ x Aᵀ) Bᵀ

    Parameters: x (..., in); A (r, in); B (out, r); gate g (r,); scale s. Returns: Δ (..., out).

    *Deviation*: no dropout on the adapter's input.

    >>> gated_lora([[1, 2]], A=[[1, 1], [1, 0]], B=[[1, 1]], gate=[2, 0], scale=0.5)  # 0.5 · (2 · 3 + 0 · 1)
    array([[3.]])
    """
    x = _checks.array("x", x, "...", "in", empty=True, finite=False)
    A, B = _checks.array("A", A, "r", "in", empty=True), _checks.array("B", B, "out", "r", empty=True)
    g = _checks.array("gate", gate, "r", empty=True)
    _checks.number("scale", scale)
    if A.shape != (len(g), x.shape[-1]):
        raise ValueError(f"A has shape {A.shape}; allowed: {(len(g), x.shape[-1])}")
    if B.shape[1] != len(g):
        raise ValueError(f"B has shape {B.shape}; allowed: (out, {len(g)})")
    return scale * (g * (x @ A.T)) @ B.T


def soft_threshold(values: Array, amount: float) -> Array:
    """Move every value towards 0 by `amount`, and to exactly 0 if it is nearer: the proximal step of amount · Σ |v|.

    Source: SoRA (arXiv 2311.11696), Eq. 8.

        sign(v) · max(|v| − amount, 0)

    Parameters: values (n,); amount, 0 or more. Returns: (n,).

    *Deviation*: the paper's amount is learning rate · λ. Its code takes a constant λ₂, and so do we.

    >>> soft_threshold([0.5, -0.25, -1], 0.25)
    array([ 0.25, -0.  , -0.75])
    """
    v = _checks.array("values", values, "n", empty=True)
    _checks.number("amount", amount, 0)
    return np.sign(v) * np.maximum(np.abs(v) - amount, 0)

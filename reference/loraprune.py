"""LoRAPrune, a baseline: heads and channels go while LoRA trains, by a gradient that is estimated from the adapter's alone.

Legend: W (out × in) a frozen weight, A (r × in) and B (out × r) its adapter, s = α / r its scale, g_A and g_B the gradients of the
adapter, u structures as in `llm_pruner.py`, p projections that they run through.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array
from reference.adapter import effective_weight


def lora_score(weight: Array, A: Array, B: Array, scale: float, grad_A: Array, grad_B: Array) -> Array:
    """Estimate how much the loss depends on each weight, without the gradient by the weight.

    Source: LoRAPrune (arXiv 2305.18403), Eq. 9 and 10. ĝ is what a step of size 1 on A and B takes off B A.

        ĝ = g_B A + B g_A − g_B g_A = B A − (B − g_B)(A − g_A)
        |ĝ_ij · (W + s B A)_ij|

    Parameters: weight (out, in); A (r, in); B (out, r); scale s; grad_A (r, in); grad_B (out, r), the gradients at these A and B:
    before an optimizer has moved them. Returns: (out, in).

    *Deviation*: the weight is merged under its mask, so that what is gone scores 0.

    >>> lora_score([[1, 1]], A=[[1, 0]], B=[[0]], scale=1.0, grad_A=[[2, 2]], grad_B=[[3]])  # ĝ = 3·[1, 0] − 3·[2, 2]
    array([[3., 6.]])
    """
    A, B = _checks.array("A", A, "r", "in"), _checks.array("B", B, "out", "r")
    merged = effective_weight(weight, A, B, scale)
    g_A, g_B = _checks.array("grad_A", grad_A, "r", "in"), _checks.array("grad_B", grad_B, "out", "r")
    _checks.same_shape("grad_A", g_A, A, "A")
    _checks.same_shape("grad_B", g_B, B, "B")
    return np.abs((g_B @ A + B @ g_A - g_B @ g_A) * merged)


def smoothed(before: Array, scores: Array, decay: float = 0.9) -> Array:
    """Average the scores of structures over optimizer steps, those of every projection and step in the same unit.

    Source: LoRAPrune, Eq. 11 and 12; λ = 0.9. The published code divides the scores of each projection by their norm.

        λ · before + (1 − λ) · Σ_p score_p / ‖score_p‖₂

    Parameters: before (u,), the average so far, 0 at first; scores (p, u) of this step, a row for each projection that the
    structures run through; decay λ in [0, 1]. Returns: (u,). Scores that are all 0 stay so.

    *Deviation*: none from the code. The paper's equations have no norm.

    >>> smoothed([1, 0], [[3, 4]], 0.5)
    array([0.8, 0.4])
    >>> smoothed([0, 0], [[3, 4], [100, 0]], 0.5)  # (0.6 + 1) / 2, 0.8 / 2
    array([0.8, 0.4])
    """
    before, scores = _checks.array("before", before, "u"), _checks.array("scores", scores, "p", "u")
    if scores.shape[1] != len(before):
        raise ValueError(f"scores has shape {scores.shape}; allowed: (p, {len(before)})")
    _checks.number("decay", decay, 0.0, 1.0)
    norms = np.linalg.norm(scores, axis=1, keepdims=True)
    return decay * before + (1 - decay) * (scores / np.maximum(norms, np.finfo(np.float64).tiny)).sum(axis=0)

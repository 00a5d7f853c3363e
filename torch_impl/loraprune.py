"""LoRAPrune: heads and channels go while LoRA trains, by the adapter's gradients. Spec: reference/loraprune.py.

With a model: experiment/baselines/loraprune.py.
"""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.adapter import effective_weight


def lora_score(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, grad_A: torch.Tensor, grad_B: torch.Tensor
) -> torch.Tensor:
    """Compute |(g_B A + B g_A − g_B g_A) ⊙ (W + s·B A)| (out, in) from the gradients at A (r, in) and B (out, r)."""
    _checks.finite("A", A, "r", "in")
    _checks.finite("B", B, "out", "r")
    merged = effective_weight(weight, A, B, scale)
    g_A, g_B = _checks.finite("grad_A", grad_A, "r", "in"), _checks.finite("grad_B", grad_B, "out", "r")
    _checks.same_shape("grad_A", g_A, A, "A")
    _checks.same_shape("grad_B", g_B, B, "B")
    return score_of(merged, A, B, g_A, g_B)


def score_of(
    merged: torch.Tensor, A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor
) -> torch.Tensor:
    """Compute `lora_score` of W + s·B A without looking at the numbers, for which a GPU would have to be waited for."""
    return ((grad_B @ A + B @ grad_A - grad_B @ grad_A) * merged).abs()


def smoothed(before: torch.Tensor, scores: torch.Tensor, decay: float = 0.9) -> torch.Tensor:
    """Compute λ·before + (1 − λ)·Σ_p score_p / ‖score_p‖ of scores (p, u) of structures, a row for each projection."""
    before, scores = _checks.finite("before", before, "u"), _checks.finite("scores", scores, "p", "u")
    if scores.shape[1] != len(before):
        raise ValueError(f"scores has shape {tuple(scores.shape)}; allowed: (p, {len(before)})")
    _checks.number("decay", decay, 0.0, 1.0)
    return average(before, scores, decay)


def average(before: torch.Tensor, scores: torch.Tensor, decay: float = 0.9) -> torch.Tensor:
    """Compute `smoothed` without looking at the numbers."""
    norms = torch.linalg.vector_norm(scores, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return decay * before + (1 - decay) * (scores / norms).sum(0)

"""First-order importance: how much the loss would change if a weight were pruned. Spec: reference/first_order.py."""

from __future__ import annotations

import torch

from torch_impl import _checks


def first_order_importance(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Compute Σ |W·G| of a weight W and the loss's gradient G, both (out, in), in float32 at least."""
    W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    G = _checks.wide(_checks.finite("gradient", gradient, "out", "in"))
    _checks.same_shape("gradient", G, W, "weight")
    return float((W * G).abs().sum(dtype=torch.float64))

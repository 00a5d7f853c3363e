"""Magnitude pruning: small weights go. Spec: reference/masks/magnitude.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.select import matrix_mask


def magnitude_mask(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Bool (out, in), True = kept: the smallest |W| of the whole matrix pruned."""
    return matrix_mask(_checks.finite("weight", weight, "out", "in").abs(), sparsity)

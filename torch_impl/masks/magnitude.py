"""Magnitude pruning: remove the smallest weights. Spec: reference/masks/magnitude.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.method import Method
from torch_impl.masks.select import matrix_mask

# |W|, compared in the whole matrix.
METHOD = Method.by_score("magnitude", lambda W, _: W.abs(), whole_matrix=True)


def magnitude_mask(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the smallest |W| of the whole matrix; return bool (out, in), True = kept."""
    return matrix_mask(_checks.finite("weight", weight, "out", "in").abs(), sparsity)

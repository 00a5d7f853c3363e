"""Pruner-Zero: score each weight by its square times the size of its gradients. Spec: reference/masks/pruner_zero.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.method import GradientStatistic, Method
from torch_impl.masks.select import row_mask


def gradient_size(gradients: torch.Tensor) -> torch.Tensor:
    """Compute G = √Σ g² (out, in) of the gradients (n, out, in) of each sequence's loss, in float32 at least."""
    g = _checks.tensor("gradients", gradients, "n", "out", "in")
    return torch.linalg.vector_norm(g, dim=0, dtype=torch.promote_types(g.dtype, torch.float32))


def pruner_zero_score(weight: torch.Tensor, gradient_size: torch.Tensor) -> torch.Tensor:
    """Compute W² · minmax(G) (out, in), in float32 at least; 0 if all G (out, in) are equal."""
    W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    G = _checks.wide(_checks.finite("gradient_size", gradient_size, "out", "in"))
    _checks.same_shape("gradient_size", G, W, "weight")
    least, most = G.aminmax()
    if float(least) < 0:
        raise ValueError(f"gradient_size has minimum {float(least)}; allowed: 0 or more")
    return W.square() * ((G - least) / torch.where(most > least, most - least, 1.0))


def pruner_zero_mask(weight: torch.Tensor, gradient_size: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the lowest scores of each row; return bool (out, in), True = kept."""
    return row_mask(pruner_zero_score(weight, gradient_size), sparsity)


METHOD = Method.by_score("pruner_zero", pruner_zero_score, GradientStatistic(part=torch.square, finish=torch.sqrt))

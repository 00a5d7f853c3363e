"""LLM-Pruner: remove the heads and channels whose weights the loss depends on least. Spec: reference/llm_pruner.py.

With a model: experiment/baselines/by_structure.py.
"""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.sparsity import middle_sparsity


def taylor_score(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute |W ⊙ G| of a weight and the loss's gradient, both (out, in), in float32 at least."""
    W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    G = _checks.wide(_checks.finite("gradient", gradient, "out", "in"))
    _checks.same_shape("gradient", G, W, "weight")
    return (W * G).abs()


def structure_sum(score: torch.Tensor, structures: int, axis: int) -> torch.Tensor:
    """Sum score (out, in) over the rows (axis 0) or columns (1) of each of u equal runs; return float64 (u,)."""
    score = _checks.finite("score", score, "out", "in")
    _checks.integer("axis", axis, 0, 1)
    _checks.integer("structures", structures, 1)
    if score.shape[axis] % structures:
        raise ValueError(f"structures is {structures}; allowed: a divisor of {score.shape[axis]}")
    return sum_of(score, structures, axis)


def sum_of(score: torch.Tensor, structures: int, axis: int) -> torch.Tensor:
    """Compute `structure_sum` without looking at the numbers, for which a GPU would have to be waited for."""
    return score.sum(1 - axis, dtype=torch.float64).view(structures, -1).sum(1)


def rates_between(target: float, weights: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return rates (L,): 0 for the first and last blocks, alike for the others, so that the model reaches the target."""
    rates = torch.zeros_like(_checks.tensor("weights", weights, "L"), dtype=torch.float64)
    inner = middle_sparsity(target, weights, rates, first, last)
    rates[first : len(rates) - last] = inner
    return rates

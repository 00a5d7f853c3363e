"""OWL: blocks with many outliers among their Wanda scores are pruned less. Spec: reference/owl.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_impl import _checks
from torch_impl.sparsity import nearest_rates


def outlier_share(scores: Sequence[torch.Tensor], factor: float = 5.0) -> float:
    """Compute the share, in percent, of a block's scores above M times their mean; scores: one (out, in) per projection."""
    _checks.number("factor", factor, 0.0)
    scores = [_checks.tensor("scores", score, "out", "in") for score in scores]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return 100 * (sum(int((score > factor * mean).sum()) for score in scores) / count)


def owl_rates(
    outliers: torch.Tensor, target: float, weights: torch.Tensor, floor: torch.Tensor, spread: float = 0.08
) -> torch.Tensor:
    """Give the blocks with more outliers a lower sparsity, within 2λ of each other. All (L,); returns float64."""
    D = _checks.finite("outliers", outliers, "L").double()
    _checks.number("target", target, 0.0, 1.0)
    _checks.number("spread", spread, 0.0, 1.0)
    x = (D - D.min()) / (D.max() - D.min()).clamp(min=torch.finfo(torch.float64).tiny)
    return nearest_rates(target - 2 * spread * (x - x.mean()), target, weights, floor)

"""LAMP: one threshold for the whole model, over scores that compare each weight with larger ones. Spec: reference/lamp.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_impl import _checks

OCTAVES, PER_OCTAVE = 64, 1024
LEVELS = 1 + OCTAVES * PER_OCTAVE


def lamp_score(weight: torch.Tensor) -> torch.Tensor:
    """Compute w² / Σ_{w'² ≥ w²} w'² (out, in), in float32 at least; the sums in float64."""
    W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    values, places = W.flatten().square().sort()
    score = torch.empty_like(values)
    score[places] = _sorted_scores(values)
    return score.view(W.shape)


def lamp_levels(weight: torch.Tensor) -> torch.Tensor:
    """Count the LAMP scores of a weight (out, in) by level; int64 (LEVELS,), on the CPU."""
    W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    score = _sorted_scores(W.flatten().square().sort().values)
    mantissa, exponent = torch.frexp(score * (1 + 1e-9))
    level = 1 + (exponent.long() + OCTAVES - 2) * PER_OCTAVE + ((2 * mantissa - 1) * PER_OCTAVE).floor().long()
    return torch.bincount(level.clamp(1, LEVELS - 1).masked_fill(score <= 0, 0), minlength=LEVELS).cpu()


def lamp_kept(levels: Sequence[torch.Tensor], target: float) -> torch.Tensor:
    """Compute the share of its weights that each block keeps above one threshold for the whole model, float64 (L,).

    levels: for each block the sum of `lamp_levels` over its projections.
    """
    _checks.number("target", target, 0.0, 1.0)
    counts = torch.stack(list(levels))
    pruned = counts.sum(0).cumsum(0) <= int(target * float(counts.sum()) + 1e-9)
    return 1 - counts[:, pruned].sum(1).double() / counts.sum(1)


def _sorted_scores(values: torch.Tensor) -> torch.Tensor:
    """Compute the scores of increasing squares (n,)."""
    tail = values.double().flip(0).cumsum(0).flip(0)
    # Equal squares share the sum that begins with the first of them.
    first = torch.searchsorted(values, values)
    sums = tail[first]
    return torch.where(sums > 0, values / sums, 0.0).to(values.dtype)

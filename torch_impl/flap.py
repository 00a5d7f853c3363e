"""FLAP: remove heads and channels whose inputs hardly fluctuate; a bias makes up for them. Spec: reference/flap.py.

With a model: experiment/baselines/by_structure.py.
"""

from __future__ import annotations

import torch

from torch_impl import _checks


def fluctuation(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Compute Var(x_j) · Σ_i W_ij² (in,) of a weight (out, in) and the variance of its inputs (in,), in float64."""
    W, variance = _checks.finite("weight", weight, "out", "in"), _checks.finite("variance", variance, "in").double()
    if len(variance) != W.shape[1] or float(variance.min()) < 0:
        raise ValueError(
            f"variance has shape {tuple(variance.shape)} and minimum {float(variance.min())}; "
            f"allowed: ({W.shape[1]},), 0 or more"
        )
    return variance * W.double().square().sum(0)


def standardised(score: torch.Tensor, structures: int) -> torch.Tensor:
    """Shift and scale scores (in,) to mean 0 and deviation 1; return the mean over each of u equal runs, (u,)."""
    score = _checks.finite("score", score, "in").double()
    _checks.integer("structures", structures, 1)
    if len(score) % structures:
        raise ValueError(f"structures is {structures}; allowed: a divisor of {len(score)}")
    away = score - score.mean()
    deviation = away.square().mean().sqrt()
    z = away / deviation if float(deviation) > 1e-12 * float(score.abs().max()) else torch.zeros_like(score)
    return z.view(structures, -1).mean(1)


def remove_lowest(score: torch.Tensor, weights: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Remove structures (n,) by rising score until the share of weights that are gone is nearest to the sparsity.

    Infinite scores stay. Returns bool (n,), True = kept. Ties go by lower index.
    """
    score, w = _checks.tensor("score", score, "n"), _checks.finite("weights", weights, "n").double()
    if bool(torch.isnan(score).any()):
        raise ValueError("score holds NaN; allowed: numbers")
    _checks.same_shape("weights", w, score, "score")
    if float(w.min()) <= 0:
        raise ValueError(f"weights has {float(w.min())}; allowed: above 0")
    s = _checks.number("sparsity", sparsity, 0.0, 1.0)
    order = score.argsort(stable=True)[: int((score < torch.inf).sum())]
    gone = torch.cat([w.new_zeros(1), w[order].cumsum(0)])
    count = int((gone - s * w.sum()).abs().argmin())
    return torch.ones_like(score, dtype=torch.bool).index_fill(0, order[:count], False)


def compensation(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Compute W((1 − m) ⊙ mean x) (out,), what the inputs (in,) that are not kept add on average, in float64."""
    W, mean = _checks.finite("weight", weight, "out", "in"), _checks.finite("mean", mean, "in").double()
    if len(mean) != W.shape[1]:
        raise ValueError(f"mean has shape {tuple(mean.shape)}; allowed: {(W.shape[1],)}")
    return W.double() @ mean.masked_fill(_checks.mask("kept", kept, mean, "mean"), 0.0)

"""Representation mutual information: how redundant each block is. Spec: reference/rmi.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.hsic import unit_grams


def nhsic_matrix(grams: torch.Tensor) -> torch.Tensor:
    """Compute nHSIC (L, L) of all pairs of blocks from their Gram matrices (L, n, n), in one product (LoSA, Eq. 4)."""
    grams = _checks.tensor("grams", grams, "L", "n", "n")
    if grams.shape[1] != grams.shape[2] or grams.shape[1] < 2:
        raise ValueError(f"grams has shape {tuple(grams.shape)}; allowed: (L, n, n) with n = 2 or more")
    units = unit_grams(grams).flatten(1)
    return (units @ units.T).clamp_(0.0, 1.0).fill_diagonal_(1.0)


def redundancy(nhsic: torch.Tensor) -> torch.Tensor:
    """Compute R_l = Σ_{j≠l} nHSIC(l, j), (L,) (LoSA, Eq. 4)."""
    nhsic = _checks.wide(_checks.square("nhsic", nhsic))
    return nhsic.clone().fill_diagonal_(0.0).sum(1)


def importance(redundancy: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Compute I_l = exp(−β R_l / Σ R), (L,) (LoSA, Eq. 4). Sparsities depend on the order of I alone, so not on β."""
    redundancy = _checks.wide(_checks.finite("redundancy", redundancy, "L"))
    if float(redundancy.min()) < 0:
        raise ValueError(f"redundancy holds {float(redundancy.min())}; allowed: 0 or more")
    if _checks.number("beta", beta) <= 0:
        raise ValueError(f"beta is {beta}; allowed: above 0")
    total = redundancy.sum()
    shares = redundancy / total if float(total) > 0 else torch.full_like(redundancy, 1 / len(redundancy))
    return torch.exp(-beta * shares)

"""N:M patterns: keep the N best of every M consecutive inputs of a row. Spec: reference/masks/nm.py."""

from __future__ import annotations

import torch

from torch_impl import _checks


def nm_mask(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n highest of every m consecutive inputs of a row; return bool (out, in), True = kept. Ties by lower column."""
    score = _checks.scores(score)
    _checks.integer("m", m, 1)
    _checks.integer("n", n, 0, m)
    if score.shape[1] % m:
        raise ValueError(f"m is {m}; allowed: a divisor of the {score.shape[1]} inputs")
    groups = score.reshape(-1, m)
    lowest = torch.sort(groups, dim=1, stable=True).indices[:, : m - n]
    mask = torch.ones(groups.shape, dtype=torch.bool, device=score.device).scatter_(1, lowest, False)
    return mask.view(score.shape)


def kept_per_group(sparsity: float, m: int) -> int:
    """Return N_t = M − rint(s_t · M), the N of N:M at one step of the schedule."""
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("m", m, 1)
    return m - round(round(sparsity * m, 9))

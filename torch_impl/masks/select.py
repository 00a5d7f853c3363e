"""Choose which entries to prune: the lowest scores; ties by lower index. Spec: reference/masks/select.py."""

from __future__ import annotations

import math

import numpy as np
import torch

from torch_impl import _checks, _kernels


def row_mask(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the floor(ρ·in + 1e-9) lowest of each row; return bool (out, in), True = kept. Ties by lower column."""
    score = _checks.scores(score)
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    k = math.floor(sparsity * score.shape[1] + 1e-9)
    if _kernels.usable(score) and score.dtype == torch.float32 and score.shape[1] <= _kernels.WIDEST_ROW:
        return _kernels.select(score, k)
    if k == 0:
        return torch.ones(score.shape, dtype=torch.bool, device=score.device)
    # What is below the k-th lowest score of a row goes, and the first of its equals.
    threshold = _kth_lowest(score, k)
    pruned, equal = score < threshold, score == threshold
    short = k - pruned.sum(1, keepdim=True)
    if score.is_cpu and bool((equal.sum(1, keepdim=True) == short).all()):
        pruned |= equal
    else:
        pruned |= equal & (equal.cumsum(1, dtype=torch.int32) <= short)
    return pruned.logical_not_()


def _kth_lowest(score: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th lowest, from 1, of each row of `score` (rows, columns) as (rows, 1)."""
    if score.is_cpu and score.dtype in (torch.float32, torch.float64):
        # NumPy selects about ten times as fast as torch on a CPU.
        return torch.from_numpy(np.partition(score.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return score.topk(k, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def workspace(entries: int, wide: int) -> int:
    """Return the bytes of `row_mask` and `matrix_mask` besides score and mask: the lowest scores and their indices in int64."""
    return entries * (wide + 8)


def matrix_mask(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the floor(ρ·out·in + 1e-9) lowest of the matrix; return bool (out, in), True = kept. Ties by row-major order."""
    return row_mask(_checks.scores(score).reshape(1, -1), sparsity).view(score.shape)


def rest_sparsity(zeros: torch.Tensor, sizes: torch.Tensor, sparsity: float) -> float:
    """Lower ρ to ρ' so that groups pruned at ρ' together reach ρ, although some groups already have more zeros than that.

    zeros, sizes: (groups,), whole numbers in float64.
    """
    zeros = _checks.tensor("zeros", zeros, "groups")
    sizes = _checks.tensor("sizes", sizes, "groups")
    _checks.same_shape("zeros", zeros, sizes, "sizes")
    if bool(((zeros < 0) | (zeros > sizes)).any()):
        raise ValueError("zeros holds a count outside its group; allowed: 0 to the group's entry in sizes")
    rest = sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    asked = float((sparsity * sizes + 1e-9).floor().sum())
    many = 0
    while int((full := zeros > (rest * sizes + 1e-9).floor()).sum()) > many:
        many = int(full.sum())
        left = float(sizes[~full].sum())
        rest = max(0.0, (asked - float(zeros[full].sum())) / left) if left else 0.0
    return rest


def demote_pruned(score: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Set the score (out, in) of pruned weights to −inf, so that they are pruned first and masks nest."""
    score = _checks.scores(score)
    return score.masked_fill(~_checks.mask("kept", kept, score, "score"), -math.inf)
